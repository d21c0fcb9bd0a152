"""Settings of the whole suite, made before model.py is imported."""

import os

import torch

torch.set_num_threads(1)  # the models of the tests are too small for two
if not torch.cuda.is_available():  # then Triton interprets its kernels, if told beforehand
    os.environ.setdefault("TRITON_INTERPRET", "1")
