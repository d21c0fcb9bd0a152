"""Command lines, run folders and checkpoints, against what a person is told and finds there."""

import json
import math
import os
import signal
import sys
from dataclasses import asdict, replace

import ppo
import sft
from data import folders, records, run
from data.records import UserError
from data.run import Run, RunConfig, command, load_checkpoint, parse, program, progress
from data.tokenizer import Codec, get_tokenizer
from model import GPT, GPTConfig, adam

import pytest
import torch

# ---- flags


@pytest.mark.parametrize(
    "flags, line",
    [
        ({"batch_size": 0}, "--batch_size 0: expected a number, 1 to inf"),
        ({"lam": 1.01}, "--lam 1.01: expected a number, 0 to 1"),
        ({"gamma": -0.01}, "--gamma -0.01: expected a number, 0 to 1"),
        ({"temperature": 0.0}, "--temperature 0.0: expected a number, 0.01 to 100"),
        ({"lr": -0.5}, "--lr -0.5: expected a number, 0 to inf"),
        ({"iterations": -1}, "--iterations -1: expected a number, 0 to inf"),
        ({"lr": math.inf}, "--lr inf: expected a number, 0 to inf"),
        ({"lr": math.nan}, "--lr nan: expected a number, 0 to inf"),
    ],
)
def test_a_number_beyond_its_bounds_is_named_with_them(flags, line):
    with pytest.raises(UserError) as error:
        ppo.Config(**flags)
    assert str(error.value) == line


def test_bounds_themselves_are_allowed():
    ppo.Config(lam=0, gamma=1, temperature=0.01, iterations=0, batch_size=1, lr=0, save_every=1)
    ppo.Config(lam=1, gamma=0, temperature=100, missing_eos_score=math.nan, seed=-1)


def test_a_flag_of_ones_own_comes_before_a_preset_and_that_before_a_default():
    presets = {"paper": {"lr": 0.5, "batch_size": 7}}
    config = parse(ppo.Config, presets, ["--preset=paper", "--lr=0.25", "--no-ablation"])
    assert (config.lr, config.batch_size, config.iterations) == (0.25, 7, ppo.Config.iterations)
    assert config.ablation is False and parse(ppo.Config, presets, []).ablation is True
    assert parse(ppo.Config, presets, []) == parse(ppo.Config, {}, []) == ppo.Config()
    for wrong in (["--preset=other"], ["--batch=3"], ["x"], ["--lr"]):  # no flag is abbreviated
        with pytest.raises(SystemExit) as error:
            parse(ppo.Config, presets, wrong)
        assert error.value.code == 2


def test_help_holds_the_comments_and_defaults(capsys):
    with pytest.raises(SystemExit):
        parse(sft.Config, {}, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Stage 1: supervised fine-tuning on demonstrations (InstructGPT, section 3.5)" in shown
    assert "--n_layer N_LAYER transformer blocks (default: 2)" in shown
    steps = "steps between checkpoints; 0: as often as costs 2 % of the time (default: 0)"
    assert f"--save_every SAVE_EVERY {steps}" in shown
    assert "--out OUT run folder of the fine-tuned model (default: 'out/sft')" in shown


def outcome(main, monkeypatch, capfd) -> tuple[int, str]:
    """The status with which a program ends, and its last line of errors."""
    monkeypatch.setattr(sys, "argv", ["sft.py"])
    with pytest.raises(SystemExit) as error:
        command(main, sft.Config, {})
    return error.value.code, capfd.readouterr().err.strip()


def test_how_a_program_ends(monkeypatch, capfd):
    def fails(error: BaseException):
        def main(config):
            raise error

        return outcome(main, monkeypatch, capfd)

    line = "interrupted; --resume continues from the last checkpoint"
    assert fails(KeyboardInterrupt()) == (130, line)
    remedy = "lower --max_tokens, then --batch_size"
    assert fails(RuntimeError("out of memory\nmore")) == (2, f"error: out of memory; {remedy}")
    long = fails(RuntimeError("out of memory " * 99))[1]
    assert long == f"error: {('out of memory ' * 99)[:200]}; {remedy}"
    assert fails(UserError("no")) == (2, "error: no")
    assert fails(FileNotFoundError("gone")) == (2, "error: gone")
    with pytest.raises(RuntimeError, match="a bug"):
        fails(RuntimeError("a bug"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_precision_is_decided_around_the_program(dtype):
    seen = []

    @program
    def main(config):
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()))
        product = torch.ones(2, 2) @ torch.ones(2, 2)
        return {"product": product, "config": config}

    config = RunConfig(dtype=dtype, device="cpu")
    found = main(config)
    assert seen == [(dtype == "bfloat16", False)] and found["config"] == config
    assert found["product"].dtype == getattr(torch, dtype)
    assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(UserError, match="--dtype int8 is unknown; choose from auto, float32"):
        main(replace(config, dtype="int8"))


def test_a_progress_bar_has_a_title_and_is_shown_by_the_first_process_alone(monkeypatch):
    with progress("words", 10, 4) as bar:
        assert (bar.disable, bar.n, bar.total, bar.desc) == (False, 4, 10, "words")
        assert bar.ncols == 80 and bar.mininterval == 10  # stderr is no terminal here
    with progress("", 10) as bar:
        assert bar.disable
    monkeypatch.setattr(run, "rank_and_world", lambda: (1, 2))
    with progress("words", 10) as bar:
        assert bar.disable


# ---- a run folder


@pytest.fixture
def fresh(tmp_path):
    """Makes a run of a network with a few weights, in tmp_path/run."""

    def make(**flags) -> Run:
        torch.manual_seed(0)
        gpt, codec = GPT(GPTConfig(1025, 8, 1, 1, 4)), Codec(get_tokenizer("toy"), "{prompt}")
        config = sft.Config(out=str(tmp_path / "run"), **flags)
        folders.lock(config.out)
        return Run("sft", config, config.out, gpt.config, codec, adam([(gpt, 0.1)]), model=gpt)

    return make


def lines(made: Run) -> list[dict]:
    return [json.loads(x) for x in (made.folder / "metrics.jsonl").read_text().splitlines()]


def test_what_a_run_writes_and_when(fresh, monkeypatch, tmp_path):
    made, saves, save = fresh(save_every=3), [], Run.save
    monkeypatch.setattr(Run, "save", lambda self: saves.append(self.step) or save(self))
    assert Run.whereabouts() == ""
    for step in made.steps(7):
        assert lines(made) == [{"step": n, "loss": n / 2} for n in range(step)]  # of ended steps
        assert step == made.step
        made.log({"loss": step / 2})
        held = f"a checkpoint of {step // 3 * 3} steps" if step > 2 else "no checkpoint yet"
        assert Run.whereabouts() == f" (sft, step {step}; {made.folder} has {held})"
        if step in (0, 5):
            made.sample(f"[step {step}]", "a\x1bb")
    assert json.loads((made.folder / "config.json").read_text()) == asdict(made.config)
    assert saves == [3, 6, 7] and Run.whereabouts() == "" and made.saved == 7
    blocks = [f"[step {step}]\na\\x1bb\n\n" for step in (0, 5)]
    assert (made.folder / "samples.txt").read_text() == "".join(blocks)
    made.amend({"accuracy": 0.75})
    assert lines(made)[-1] == {"step": 6, "loss": 3.0, "accuracy": 0.75}
    saved = load_checkpoint(made.folder)
    assert (saved["format"], saved["stage"], saved["step"]) == (2, "sft", 7)
    assert saved["metrics"] == lines(made) and saved["samples"] == "".join(blocks)
    assert saved["config"] == asdict(made.config) and saved["gpt"] == asdict(made.gpt)
    assert saved["codec"] == made.codec.state_dict()
    assert saved["training"].keys() == {"optimizer", "extra"}
    assert {p.name for p in tmp_path.iterdir()} == {"run"}
    names = {"config.json", "metrics.jsonl", "samples.txt", "checkpoint.pt", ".lock"}
    assert {path.name for path in made.folder.iterdir()} == names


def test_a_resumed_run_goes_on_where_the_checkpoint_ends(fresh):
    made = fresh(save_every=2)
    with pytest.raises(ZeroDivisionError):
        for step in made.steps(6):
            made.log({"loss": 1 / (3 - step)})
            made.sample(f"{step}")
            made.extra["kl_coef"] = float(step)
            with torch.no_grad():
                made.modules["model"].wpe.weight.fill_(step)
    assert len(lines(made)) == 3 and made.saved == 2
    with pytest.raises(UserError, match="made with --lr 0.0015, not 0.5; resume it with the same"):
        fresh(resume=True, lr=0.5)
    again = fresh(resume=True, save_every=5)  # these two may differ
    assert (again.step, again.saved, again.extra) == (2, 2, {"kl_coef": 1.0})
    assert lines(again) == [{"step": 0, "loss": 1 / 3}, {"step": 1, "loss": 0.5}] == again.metrics
    assert (again.folder / "samples.txt").read_text() == "0\n\n1\n\n" == again.samples
    assert (again.modules["model"].wpe.weight == 1).all()
    assert [again.log({"loss": 0.0}) or step for step in again.steps(4)] == [2, 3]
    assert [row["step"] for row in lines(again)] == [0, 1, 2, 3]
    assert list(fresh(resume=True).steps(4)) == []


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_step_end_and_saves(number, status, fresh, capsys):
    made, handlers = fresh(), [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as end:
        for step in made.steps(5):
            if step == 2:
                assert signal.getsignal(number) not in handlers  # else it would end the tests
                os.kill(os.getpid(), number)
            made.log({"loss": float(step)})
    assert end.value.code == status and made.saved == 3
    assert load_checkpoint(made.folder)["metrics"] == lines(made)
    assert [row["loss"] for row in lines(made)] == [0, 1, 2]
    note = f"{made.folder}: saved after step 3 of 5; --resume continues\n"
    assert note in capsys.readouterr().err
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_the_bar_shows_four_metrics(fresh):
    made = fresh()
    for _ in made.steps(1):
        made.log({"loss": 0.12345, "lr": 1e-5, "grad_norm": 2.0, "a": 1, "b": 2})
        assert made.shown == "loss 0.123, lr 1e-05, grad_norm 2, a 1"
        made.log({"objective/kl": 3.5, "c": 4}, shown=["objective/kl", "missing", "c", "step"])
        assert made.shown == "kl 3.5, c 4"


def test_only_the_first_process_writes(fresh, monkeypatch):
    monkeypatch.setattr(run, "rank_and_world", lambda: (1, 2))
    monkeypatch.setattr(folders, "rank_and_world", lambda: (1, 2))
    monkeypatch.setattr(run, "gather", lambda mine: [mine, mine])
    made = fresh()
    for _ in made.steps(2):
        made.log({"loss": 1.0})
        made.sample("x")
    assert list(made.folder.iterdir()) == [] and made.saved == 2


@pytest.mark.parametrize(
    "folder, maker",
    [("base", "sft"), ("sft", "sft"), ("sft16", "sft"), ("reward", "reward"), ("reward2", "reward"),
     ("ppo", "ppo"), ("mine", "ppo")],
)  # fmt: skip
def test_a_missing_checkpoint_names_the_command_that_makes_it(folder, maker, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load_checkpoint(tmp_path / folder)
    path = tmp_path / folder / "checkpoint.pt"
    assert str(error.value) == f"{path} does not exist; `python {maker}.py` makes it"


CODEC = Codec(get_tokenizer("toy"), "{prompt}").state_dict()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": 3}, "has format 3, expected 2: another version of this project wrote it"),
        ({"stage": 7}, "is no checkpoint of a stage: it has no str stage"),
        ({"step": 1.0}, "is no checkpoint of a stage: it has no int step"),
        ({"step": True}, "is no checkpoint of a stage: it has no int step"),
        ({"metrics": None}, "is no checkpoint of a stage: it has no list metrics"),
        ({"codec": {}}, "is no checkpoint of a stage: it holds None"),
        ({"codec": CODEC | {"template": 3}}, "it holds {'template': 3}"),
        ({"config": {"lr": None}}, "it holds {'lr': None}"),
        ({"gpt": {"n_layer": "x"}}, "it holds {'n_layer': 'x'}"),
        ({"metrics": [{"step": 0}, {"step": "x"}]}, "it holds {'step': 'x'}"),
    ],
)
def test_what_is_no_checkpoint_is_named(change, message, fresh):
    made = fresh()
    made.save()
    path = made.folder / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    assert load_checkpoint(made.folder)["step"] == 0
    torch.save(saved | change, path)
    with pytest.raises(UserError) as error:
        load_checkpoint(made.folder)
    assert str(error.value).startswith(f"{path} ") and message in str(error.value)
    torch.save([saved], path)
    with pytest.raises(UserError, match="it has no str stage"):
        load_checkpoint(made.folder)


# ---- records


@pytest.mark.parametrize(
    "text, place",
    [("a\0b", r"'\\x00' at 1"), ("\ud800", r"'\\ud800' at 0"), ("a" + " " * 500_000, "at 1")],
    ids=["NUL", "lone surrogate", "blanks"],
)
def test_what_a_tokenizer_cannot_take_is_named_with_its_place(text, place):
    row = records.Row("x.jsonl", 3, {"text": text})
    with pytest.raises(records.DataError, match=f'^x.jsonl:3: "text" holds .*{place}; expected no'):
        row.text("text")
    row = records.Row("x.jsonl", 3, {"text": "a" + " " * 499_999 + "b"})
    assert len(row.text("text")) == 500_001


@pytest.mark.parametrize(
    "k, rank, refused",
    [(1_000, 2**31 - 1, False), (2, 2**31, True), (1_001, 1, True), (2, 0, True), (1, 1, True)],
)
def test_the_largest_comparison_and_rank(k, rank, refused, tmp_path):
    row = {"prompt": "p", "responses": ["r"] * k, "ranks": [rank] * k}
    records.save_records(tmp_path / "a.jsonl", [row])
    if refused:
        with pytest.raises(records.DataError, match="a.jsonl:1: "):
            records.load_comparisons(tmp_path / "a.jsonl")
    else:
        assert records.load_comparisons(tmp_path / "a.jsonl") == [row]


def test_an_error_ends_the_program_with_what_only_the_moment_knows(capsys):
    with pytest.raises(SystemExit) as error, records.one_line_errors(lambda: " (step 3)"):
        raise UserError("wrong\nthing")
    assert error.value.code == 2 and capsys.readouterr().err == "error: wrong\\nthing (step 3)\n"


@pytest.mark.parametrize(
    "n, held_out, training",
    [(0, "", "bacbd"), (1, "bb", "acd"), (2, "bb", "acd"), (3, "bba", "cd"), (5, "bbacd", "")],
)
def test_rows_of_one_key_are_on_one_side(n, held_out, training):
    found = records.split_held_out(list("bacbd"), n, key=str)
    assert tuple(map("".join, found)) == (held_out, training)
    assert records.split_held_out(["a", "a", "a"], n, key=str)[0] == ["a"] * min(n, 3)
