"""The kernels prove themselves: a copy of model.py with right kernels passes its trial, and each
that is wrong falls back to plain attention with one line. In Triton's interpreter, on a CPU."""

from pathlib import Path
from unittest import mock

import model
from data import processes
from data.processes import last_line

import pytest
import torch

pytestmark = pytest.mark.skipif(model.triton is None, reason="needs Triton")
ROOT = Path(__file__).parents[1]
LENGTHS = "(255, 1024, 1024)"  # the longest sequence of each seed
IN_LAUNCH = "BLOCK, STEP, warps, stages = tile\n"
WRONG = {  # what the line says, what stands in model.py, and what then stands there
    "o has an error of": ("acc / total[:, None], D)", "acc / total[:, None] * 1.001, D)"),
    "dk has an error of": (
        "3 * H * D, dk * D**-0.5, D)\n        store(dqkv + at + 2 * H * D, j0, n, 3 * H * D, dv",
        "3 * H * D, dv, D)\n        store(dqkv + at + 2 * H * D, j0, n, 3 * H * D, dk * D**-0.5",
    ),
    "cache has an error of": (
        "store(keys + row, n, S, D, k, D)",
        "store(keys + row, n + 1, S, D, k, D)",
    ),
    "OverflowError: too many": (IN_LAUNCH, IN_LAUNCH + "        raise OverflowError('too many')\n"),
    "no answer in 3 seconds": (IN_LAUNCH, IN_LAUNCH + "        while True:\n            pass\n"),
    "exit status -9": (IN_LAUNCH, IN_LAUNCH + "        import os; os.kill(os.getpid(), 9)\n"),
}


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """Runs the trial of a copy of model.py in which one string is replaced."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Model T")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(model, "__file__", str(tmp_path / "model.py"))
    (tmp_path / "data").symlink_to(ROOT / "data")

    def asked(correct: str = "", wrong: str = "", D: int = 16) -> str:
        source = (ROOT / "model.py").read_text("utf-8")
        assert correct == "" or source.count(correct) == 1
        source = source.replace("0, 63, 129, 200, longest]", "0, 33, longest]")
        source = source.replace(LENGTHS, "(70,)").replace(correct or LENGTHS, wrong)
        (tmp_path / "model.py").write_text(source, "utf-8")
        model.trial.cache_clear()
        return model.trial("float16", D, "cpu")

    yield asked
    model.trial.cache_clear()


def verdicts(folder: Path) -> list[str]:
    return [path.read_text() for path in folder.glob("cache/hub/picorlhf/trial-*")]


def test_right_kernels_pass_and_are_not_asked_again(ask, tmp_path, monkeypatch, capsys):
    assert ask() == "right" and verdicts(tmp_path) == ["right"]
    monkeypatch.setattr(processes, "last_line", mock.Mock(return_value=("wrong", True)))
    assert ask() == "right"  # in another process, or after a restart
    assert capsys.readouterr().out == ""
    assert ask(D=32) == "wrong"  # another head size has its own trial,
    assert ask("import copy\n", "import copy  # \n") == "wrong"  # and other code, too
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Model A")
    assert ask() == "wrong"  # and another GPU


@pytest.mark.parametrize("says", WRONG)
def test_wrong_kernels_fall_back_with_one_line(says, ask, tmp_path, monkeypatch, capsys):
    if "no answer" in says:
        monkeypatch.setattr(model, "TRIAL_SECONDS", 3)
    why = ask(*WRONG[says])
    assert says in why
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and line.startswith("attention in plain PyTorch") and why in line
    kept = [] if "no answer" in why else [why]  # a busy machine may be faster next time
    assert verdicts(tmp_path) == kept


def test_a_verdict_that_cannot_be_kept_counts_all_the_same(ask, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("no folder")
    monkeypatch.setattr(processes, "last_line", mock.Mock(return_value=("right", True)))
    assert ask() == "right" and ask() == "right"
    assert processes.last_line.call_count == 2


def test_out_of_memory_is_no_verdict(tmp_path):
    code = "raise RuntimeError('CUDA out of memory')"
    line, final = last_line([model.sys.executable, "-c", code], tmp_path, 60)
    assert line == "RuntimeError: CUDA out of memory" and not final


def test_a_gpu_before_ampere_is_not_asked(ask, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(processes, "last_line", mock.Mock(side_effect=AssertionError))
    assert "compute capability 8.0" in ask()


@pytest.mark.parametrize("verdict, attention", [("right", "fused"), ("dq is wrong", "plain")])
def test_rank_0_decides_for_all(verdict, attention, monkeypatch):
    """What another process finds itself does not count; it does not even look."""
    gpt = mock.Mock(head_weight=mock.Mock(is_cuda=True, dtype=torch.float16))
    gpt.head_weight.device = torch.device("cuda", 3)
    gpt.config.n_embd, gpt.config.n_head = 64, 2
    trial = mock.Mock(return_value=verdict)
    monkeypatch.setattr(model, "trial", trial)
    assert model.choose_attention(gpt, "auto") == attention
    assert trial.call_args.args == ("float16", 32, "cuda:3")
    assert model.choose_attention(gpt, "plain") == "plain"
    monkeypatch.setattr(model, "rank_and_world", lambda: (1, 2))
    monkeypatch.setattr(model, "gather", lambda mine: [verdict, mine])
    assert model.choose_attention(gpt, "auto") == attention
    assert trial.call_count == 1


def test_a_cpu_is_never_asked(monkeypatch):
    monkeypatch.setattr(model, "trial", mock.Mock(side_effect=AssertionError))
    gpt = model.GPT(model.GPTConfig(5, 4, 1, 1, 8))
    assert model.choose_attention(gpt, "auto") == "plain"
