"""Without a GPU Triton interprets its kernels, if told before model.py is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
