"""Settings of the whole suite, made before model.py is imported, and a base model for all."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # the models of the tests are too small for two

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():  # then Triton interprets its kernels, if told beforehand
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of an untrained model of the toy world: for tests that only read it."""
    import sft  # here, since these modules import model.py
    from data.run import Run
    from data.tokenizer import Codec, get_tokenizer
    from model import GPT, GPTConfig, adam

    folder = tmp_path_factory.mktemp("tiny") / "base"
    codec = Codec(get_tokenizer("toy"), "{prompt}\\n")
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(codec.tokenizer.n_vocab, block_size=256, n_layer=1, n_head=1, n_embd=8))
    optimizer = adam([(gpt, 1.0)])
    Run("base", sft.Config(), folder, gpt.config, codec, optimizer, model=gpt).save()
    return str(folder)
