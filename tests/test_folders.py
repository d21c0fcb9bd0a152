"""The folder of a run: what moves aside, what may differ on --resume, when it is saved, and what
comes of a user's own files, functions, consoles and disks."""

import builtins
import io
import json
import os
import subprocess
import sys
import threading
from contextlib import redirect_stdout
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import ppo
import reward
import sft
from data import folders, records, run
from data.folders import claim, fingerprint, keep_apart
from data.records import UserError, one_line_errors, save_records
from data.run import Run, load_checkpoint, program
from data.tokenizer import Codec
from model import GPT, GPTConfig

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
CODEC = SimpleNamespace(state_dict=lambda: {"tokenizer": {"name": "toy"}, "template": "{prompt}"})
SIZES = GPTConfig(vocab_size=3, block_size=4, n_layer=1, n_head=1, n_embd=1)


@pytest.fixture(autouse=True)
def no_locks_are_left():
    yield
    folders.free(list(folders.LOCKS))
    Run.active_run = None


def make_run(config, stage: str = "ppo", read=()) -> Run:
    """A run of a network with one weight."""
    torch.manual_seed(0)
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    return Run(stage, config, config.out, SIZES, CODEC, optimizer, read, model=model)


def train(config, steps: int = 6, fail_at: tuple[int, str] = (-1, "")) -> Run:
    """Steps on numbers that follow from the step alone; may raise before or after the update."""
    trained = make_run(config)
    for step in trained.steps(steps):
        if fail_at == (step, "before"):
            raise UserError("before the update")
        weight = trained.modules["model"].weight
        ((weight - step) ** 2).sum().backward()
        trained.optimizer.step()
        trained.optimizer.zero_grad()
        if fail_at == (step, "after"):
            raise UserError("after the update")
        trained.log({"weight": weight.item()})
        trained.sample(f"step {step}: {weight.item()}")
    return trained


def program_of_train(config, **how) -> dict:
    return program(lambda config: train(config, **how).metrics[-1])(config)


def config_of(out: Path, **flags) -> ppo.Config:
    (out.parent / "model.txt").touch()
    places = dict.fromkeys(("sft", "reward_model", "base"), str(out.parent / "model.txt"))
    return ppo.Config(out=str(out), **(places | flags))


def same(a: Path, b: Path) -> bool:
    first, second = load_checkpoint(a), load_checkpoint(b)
    files = [(x / name).read_bytes() for name in ("metrics.jsonl", "samples.txt") for x in (a, b)]
    weights = [saved["model"]["weight"] for saved in (first, second)]
    return torch.equal(*weights) and files[0] == files[1] and files[2] == files[3]


# ---- a rerun never destroys


def test_a_run_moves_aside_to_the_first_free_name(tmp_path, capsys):
    content = ""
    for expected in ("", "out.previous", "out.previous2", "out.previous3"):
        claim(tmp_path / "out", resume=False)
        assert os.listdir(tmp_path / "out") == [".lock"]
        if expected:
            assert (tmp_path / expected / "checkpoint.pt").read_text() == content
            assert capsys.readouterr().out.count(f"which is now {tmp_path / expected} ") == 1
        content = expected or "first"
        (tmp_path / "out/checkpoint.pt").write_text(content)
        folders.free(list(folders.LOCKS))


@pytest.mark.parametrize("name", folders.RESULTS)
def test_whatever_a_run_has_written_moves_aside(name, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("x")
    claim(tmp_path / "out", resume=True)
    assert not (tmp_path / "out.previous").exists()
    claim(tmp_path / "out", resume=False)
    assert (tmp_path / "out.previous" / name).read_text() == "x"


def test_what_is_no_run_stays_where_it_is(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.md").write_text("mine")
    (tmp_path / "out/metrics.jsonl").write_text("")  # of a run that ended before its first step
    claim(tmp_path / "out", resume=False)
    assert (tmp_path / "out/notes.md").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_where_one_stands_does_not_move(tmp_path, monkeypatch):
    (tmp_path / "checkpoint.pt").write_text("x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is where you are"):
        claim(".", resume=False)
    assert (tmp_path / "checkpoint.pt").read_text() == "x"


def test_a_link_to_another_disk_stays_a_link(tmp_path):
    (tmp_path / "disk/ppo").mkdir(parents=True)
    (tmp_path / "disk/ppo/checkpoint.pt").write_text("x")
    (tmp_path / "out").symlink_to(tmp_path / "disk/ppo")
    claim(tmp_path / "out", resume=False)
    assert (tmp_path / "disk/ppo.previous/checkpoint.pt").read_text() == "x"
    assert os.listdir(tmp_path / "out") == [".lock"]


INPUTS = [(stage, name) for stage in (sft, reward, ppo)
          for name in folders.inputs(stage.Config(), free=True)]  # fmt: skip


@pytest.mark.parametrize("stage, name", INPUTS)
def test_an_input_in_out_is_refused_however_it_is_spelled(stage, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    (tmp_path / "out/file.py").touch()
    words = f"--{name} .* lies in --out out, which this run writes to"
    for place in (tmp_path / "out", "link/../out/.", "link", "out/file.py", "link/file.py:name"):
        config = stage.Config(out="out", **{name: place})
        with pytest.raises(UserError, match=words):
            keep_apart(config, {"out": config.out})
        keep_apart(replace(config, out="elsewhere"), {"out": "elsewhere"})


def test_the_stages_refuse_before_anything_is_touched(tiny_base, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x/checkpoint.pt").write_bytes((Path(tiny_base) / "checkpoint.pt").read_bytes())
    x = str(tmp_path / "x")
    for main, config in (
        (sft.main, sft.Config(init=x, out=x)),
        (sft.main, sft.Config(base=f"{x}/new", out=f"{x}/new")),
        (reward.main, reward.Config(sft=x, out=x)),
        (ppo.main, ppo.Config(sft=x, out=str(tmp_path / "y"), init=x, reward_model=x, base=x[:-1])),
        (ppo.main, ppo.Config(sft=x, out=x)),
        (ppo.main, ppo.Config(sft=f"{x}", out=x.removesuffix("_no_kl"), trust=True)),
    ):
        if config.out != str(tmp_path / "y"):
            with pytest.raises(UserError, match="lies in|choose two folders"):
                main(config)
    os.rename(x, f"{x}_no_kl")
    with pytest.raises(UserError, match="--sft .*x_no_kl lies in --out .without KL. .*x_no_kl"):
        ppo.main(ppo.Config(sft=f"{x}_no_kl", out=x))
    assert os.listdir(tmp_path) == ["x_no_kl"] and os.listdir(f"{x}_no_kl") == ["checkpoint.pt"]


# ---- what a resumed run compares


def other(field) -> object:
    """Another value than the default that the field accepts."""
    kind, *marks = (*get_args(field.type), field.type)
    if kind is bool:
        return not field.default
    if kind is str:
        return f"{field.default}x"
    return kind(0.5) if marks[:2] == [0, 1] else field.default + 1


@pytest.mark.parametrize("field", fields(ppo.Config), ids=lambda field: field.name)
def test_a_resumed_run_compares_what_decides_its_numbers(field, tmp_path):
    if field.name in ("dtype", "attention", "device", "shard", "resume", "out"):
        return  # resolved values, and folders, have tests of their own
    config = ppo.Config(out=str(tmp_path / "out"))
    train(config, 1)
    changed = replace(config, resume=True, **{field.name: other(field)})
    free = {"max_tokens", "recompute", "save_every", "reward_retries", "trust", "base", "ablation"}
    if field.name in free | {"compare", "eval_prompts", "judge", "split", "reward"}:
        assert make_run(changed).step == 1
    else:
        with pytest.raises(UserError, match=f"made with (another )?--{field.name} "):
            make_run(changed)


def test_a_refused_resume_names_the_way_on(tmp_path):
    config = config_of(tmp_path / "out")
    train(config, 1)
    way = f"train it further: --init {tmp_path}/out --out NEW"
    with pytest.raises(UserError, match=f"--iterations {config.iterations}, not 60; .*, or {way}"):
        make_run(replace(config, iterations=60, resume=True))
    with pytest.raises(UserError, match="holds a run of ppo, not of sft"):
        make_run(replace(config, resume=True), stage="sft")


def test_precision_and_attention_are_compared_as_resolved(tmp_path):
    config = config_of(tmp_path / "out")
    train(config, 1)
    assert make_run(replace(config, resume=True, device="cpu")).step == 1
    saved = load_checkpoint(config.out)
    for name, value in (("dtype", "bfloat16"), ("attention", "fused")):
        torch.save(saved | {"resolved": saved["resolved"] | {name: value}},
                   tmp_path / "out/checkpoint.pt")  # fmt: skip
        with pytest.raises(UserError, match=f"made with --{name} {value}, not "):
            make_run(replace(config, resume=True))


@pytest.mark.parametrize("were", [4, torch.zeros(3)])  # a file may hold anything
def test_another_number_of_processes_is_one_line(were, tmp_path, capsys):
    config = config_of(tmp_path / "out")
    train(config, 1)
    saved = load_checkpoint(config.out)
    saved["resolved"]["processes"] = were
    torch.save(saved, tmp_path / "out/checkpoint.pt")
    make_run(replace(config, resume=True))
    words = f"{were} processes before, 1 now: sampling draws other random numbers"
    assert words in capsys.readouterr().out


def test_a_moved_folder_and_moved_inputs_resume(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_records("prompts.jsonl", [{"prompt": "a"}])
    config = config_of(Path("out"), prompts="prompts.jsonl", missing_eos_score=float("nan"))
    train(config, 1)
    os.rename("out", "renamed")
    os.rename("prompts.jsonl", "moved.jsonl")
    moved = {"out": str(tmp_path / "renamed"), "prompts": str(tmp_path / "moved.jsonl")}
    assert make_run(replace(config, resume=True, **moved)).step == 1


def test_a_changed_input_is_named(tmp_path, capsys):
    prompts, code = tmp_path / "prompts.jsonl", tmp_path / "mine.py"
    prompts.write_text('{"prompt": "a"}\n')
    code.write_text("def f(): pass")
    config = config_of(tmp_path / "out", prompts=str(prompts), reward=f"{code}:f")
    train(config, 1)
    code.write_text("def f(): return 1")
    assert make_run(replace(config, resume=True)).step == 1
    assert f"--reward {code}:f has changed since" in capsys.readouterr().out
    prompts.write_text('{"prompt": "b"}\n')
    with pytest.raises(UserError, match=f"made with another --prompts than {prompts}"):
        make_run(replace(config, resume=True))


def test_a_fingerprint_is_of_what_decides_numbers(tiny_base, tmp_path):
    assert fingerprint("toy") == "toy" and fingerprint("") == ""
    saved = load_checkpoint(tiny_base)
    folder = tmp_path / "base"
    folder.mkdir()
    torch.save(saved | {"config": {"resume": True}}, folder / "checkpoint.pt")
    assert fingerprint(str(folder)) == fingerprint(tiny_base)
    name = min(saved["model"])
    saved["model"][name] = saved["model"][name] + 1e-3
    torch.save(saved, folder / "checkpoint.pt")
    assert fingerprint(str(folder)) != fingerprint(tiny_base)
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("a")
    before = fingerprint(str(texts))
    (texts / "b.txt").write_text("b")
    assert fingerprint(str(texts)) != before


# ---- when it is saved


def test_saving_costs_a_fiftieth_of_the_time_at_most(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(torch, "save", lambda *_: clock.__setitem__(0, clock[0] + 0.5))
    trained = make_run(config_of(tmp_path / "out"))
    assert trained.is_due()  # after the first step: what a save costs is not known before
    trained.save()
    for seconds, due in ((0.0, False), (24.9, False), (25.0, True), (700.0, True)):
        clock[0] = 0.5 + seconds
        assert trained.is_due() == due
    trained.saving = 60.0  # a large model: every ten minutes
    for seconds, due in ((599.0, False), (600.0, True)):
        clock[0] = 0.5 + seconds
        assert trained.is_due() == due
    trained.config = replace(trained.config, save_every=3)
    for step in range(1, 10):
        trained.step = step
        assert trained.is_due() == (step in (3, 6, 9))


def test_an_error_before_the_weights_change_loses_no_step(tmp_path):
    config = config_of(tmp_path / "out", save_every=100)
    with pytest.raises(UserError, match="before"):
        program_of_train(config, fail_at=(4, "before"))
    assert load_checkpoint(config.out)["step"] == len(load_checkpoint(config.out)["metrics"]) == 4
    program_of_train(replace(config, resume=True))
    program_of_train(alone := config_of(tmp_path / "alone", save_every=100))
    assert same(tmp_path / "out", Path(alone.out))


def test_an_error_after_the_weights_changed_goes_back_to_the_last_checkpoint(tmp_path):
    config = config_of(tmp_path / "out", save_every=3)
    with pytest.raises(UserError, match="after"):
        program_of_train(config, fail_at=(4, "after"))
    assert load_checkpoint(config.out)["step"] == 3
    program_of_train(replace(config, resume=True))
    program_of_train(alone := config_of(tmp_path / "alone"))
    assert same(tmp_path / "out", Path(alone.out))


def test_an_error_in_the_first_step_leaves_no_run(tmp_path):
    config = config_of(tmp_path / "out")
    for _ in range(2):
        with pytest.raises(UserError, match="before"):
            program_of_train(config, fail_at=(0, "before"))
    assert not (tmp_path / "out.previous").exists()


# ---- disks and consoles


class FullDisk:
    """The n-th write to a file from now on fails after half of its bytes."""

    def __init__(self, n: int, monkeypatch):
        self.left, self.failed = n, False
        monkeypatch.setattr(records, "open", self.open, raising=False)

    def open(self, path, mode="r", *args, **kwargs):
        file = builtins.open(path, mode, *args, **kwargs)
        if "r" in mode or str(path).endswith(".lock"):
            return file
        write = file.write

        def limited(content) -> int:
            self.left -= 1
            if self.left < 0:
                write(content[: len(content) // 2])
                self.failed = True
                raise OSError(28, "No space left on device")
            return write(content)

        wrapped = SimpleNamespace(write=limited, flush=file.flush, fileno=file.fileno)
        wrapped.seek, wrapped.truncate, wrapped.close = file.seek, file.truncate, file.close
        return ClosingOnExit(wrapped)


class ClosingOnExit:
    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self.file

    def __exit__(self, *_):
        self.file.close()


@pytest.mark.parametrize("n", range(20))
def test_a_full_disk_loses_nothing(n, tmp_path, monkeypatch):
    program_of_train(alone := config_of(tmp_path / "alone", save_every=2))
    config = config_of(tmp_path / "out", save_every=2)
    with monkeypatch.context() as patch:
        disk = FullDisk(n, patch)
        with pytest.raises(OSError, match="No space left on device: '.*out/[a-z]+.[a-z]+'"):
            program_of_train(config)
        assert disk.failed
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix == ".tmp"]
    lines = (tmp_path / "out/metrics.jsonl").read_text() if n > 1 else ""
    assert lines == "" or lines.endswith("\n") and all(map(json.loads, lines.splitlines()))
    program_of_train(replace(config, resume=True))
    assert same(tmp_path / "out", Path(alone.out))


def test_metrics_are_strict_json(tmp_path):
    trained = make_run(config_of(tmp_path / "out", missing_eos_score=float("nan")))
    for _ in trained.steps(1):
        trained.log({"x": float("nan"), "y": float("-inf"), "z": 0.5})

    def refuse(constant: str):
        raise AssertionError(constant)

    line = (tmp_path / "out/metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse) == {"step": 0, "x": None, "y": None, "z": 0.5}
    text = (tmp_path / "out/config.json").read_text()
    assert json.loads(text, parse_constant=refuse)["missing_eos_score"] is None


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_output_never_fails_for_its_encoding(encoding, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with redirect_stdout(out), one_line_errors():
        print("\U0001fabf ü")
    out.flush()
    text = out.buffer.getvalue().decode(encoding)
    assert text == {"ascii": "\\U0001fabf \\xfc\n", "cp1252": "\\U0001fabf ü\n"}[encoding]


CODE = "import sys; from data.records import one_line_errors\n"
CODE += "with one_line_errors():\n"
CODE += "    for i in range(9): print('x' * 99999); print(1, file=sys.stderr)\n"
CODE += "    open('done', 'w').write('x')"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("full", [True, False])
def test_output_without_a_reader_does_not_end_a_run(stream, full, tmp_path):
    if full and not Path("/dev/full").exists():
        pytest.skip("the system has no /dev/full")
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    reading, writing = os.pipe()
    os.close(reading)
    streams[stream] = open("/dev/full", "w") if full else os.fdopen(writing, "w")  # noqa: SIM115
    path = {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CODE]
    status = subprocess.run(command, cwd=tmp_path, env=os.environ | path, **streams).returncode
    streams[stream].close()
    assert status == 0 and (tmp_path / "done").exists()


def test_a_folder_that_vanishes_is_one_line_and_resumable(tmp_path):
    config = config_of(tmp_path / "out", save_every=100)
    program_of_train(alone := config_of(tmp_path / "alone", save_every=100))

    def vanish(self, metrics, shown=()):
        log(self, metrics, shown)
        if self.step == 3:
            os.rename(tmp_path / "out", tmp_path / "gone")

    log = Run.log
    Run.log = vanish
    try:
        with pytest.raises(FileNotFoundError, match="out/(metrics.jsonl|samples.txt)"):
            program_of_train(config)
    finally:
        Run.log = log
    program_of_train(replace(config, resume=True))
    assert same(tmp_path / "out", Path(alone.out))


# ---- notebooks and other hosts


def test_a_finished_or_failed_run_frees_its_folder(tmp_path):
    config = config_of(tmp_path / "out")
    program_of_train(config)
    claiming = f"from data.folders import lock; lock({config.out!r})"
    assert not folders.LOCKS
    assert subprocess.run([sys.executable, "-c", claiming], cwd=ROOT).returncode == 0


def test_a_stage_in_a_notebook(tiny_base, tmp_path):
    """Path and numpy values, in a thread, twice in a row."""
    flags = {"init": Path(tiny_base), "toy_demonstrations": np.int64(20), "lr": np.float32(1e-3)}
    config = sft.Config(out=tmp_path / "sft", epochs=1, batch_size=np.int32(10), **flags)
    found: list[dict] = []
    for _ in range(2):
        thread = threading.Thread(target=lambda: found.append(sft.main(config)))
        thread.start()
        thread.join()
    assert found[0] == found[1] and (tmp_path / "sft.previous/checkpoint.pt").exists()


@pytest.mark.parametrize("name", ["model.py", "data.py", "data/__init__.py"])
@pytest.mark.parametrize("stage", ["ppo", "model"])
def test_a_file_of_the_same_name_earlier_on_the_path_is_named(stage, name, tmp_path):
    if name == f"{stage}.py":
        return
    (tmp_path / "data").mkdir()
    (tmp_path / name).write_text("mine = 1\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])  # as an installed package comes last
    command = [sys.executable, "-c", f"import {stage}; print('fine')"]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, cwd=tmp_path,
                            capture_output=True, text=True)  # fmt: skip
    assert result.stdout == "fine\n" or str(tmp_path / name) in result.stderr


@pytest.mark.parametrize("given, expected", [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"),
                                             ({"OMP_WAIT_POLICY": "PASSIVE"}, "None")])  # fmt: skip
def test_how_threads_wait_is_said_before_torch_is_loaded(given, expected):
    code = "import os, sys, data; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    own = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, env=own | given, cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout == f"{expected} False\n"
    for script in ("sft.py", "reward.py", "ppo.py", "model.py"):
        lines = (ROOT / script).read_text("utf-8").splitlines()
        first = {name: next(i for i, line in enumerate(lines) if line.startswith(name))
                 for name in ("from data", "import torch")}  # fmt: skip
        assert first["from data"] < first["import torch"]


# ---- first contact


def one_line(main, config) -> str:
    with pytest.raises(UserError) as error:
        main(config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_data_of_which_nothing_is_left_is_one_true_line(tiny_base, tmp_path):
    long = [{"prompt": f"p{i}", "response": "word " * 400} for i in range(9)]
    save_records(tmp_path / "long.jsonl", long)
    save_records(tmp_path / "one.jsonl", [{"prompt": "a", "response": "b"}])
    ties = [{"prompt": f"p{i}", "responses": ["a", "b"], "ranks": [1, 1]} for i in range(9)]
    save_records(tmp_path / "ties.jsonl", ties)
    tuning = sft.Config(init=tiny_base, out=str(tmp_path / "out"))
    rating = reward.Config(sft=tiny_base, out=str(tmp_path / "out"))
    for main, config, words in (
        (sft.main, replace(tuning, demonstrations=str(tmp_path / "long.jsonl")), "the context"),
        (sft.main, replace(tuning, demonstrations=str(tmp_path / "one.jsonl")), "none is left"),
        (reward.main, replace(rating, comparisons=str(tmp_path / "ties.jsonl")), "ties alone"),
        (reward.main, replace(rating, toy_prompts=1, responses=2), "none is left to train on"),
        (reward.main, replace(rating, max_new_tokens=300), "45 tokens too small for a prompt"),
    ):
        assert words in one_line(main, config)


def test_two_demonstrations_and_prompts_longer_than_the_context_train(tiny_base, tmp_path):
    rows = [{"prompt": "word " * (400 * (i == 0) + 1), "response": f"{i}"} for i in range(2)]
    save_records(tmp_path / "two.jsonl", rows)
    config = sft.Config(init=tiny_base, demonstrations=str(tmp_path / "two.jsonl"), epochs=1)
    assert sft.main(replace(config, out=str(tmp_path / "out")))["sft"]["loss"] > 0


def test_a_flag_without_effect_is_named(tiny_base, tmp_path, capsys):
    config = sft.Config(init=tiny_base, block_size=64, n_layer=3, toy_demonstrations=20, epochs=1)
    sft.main(replace(config, out=str(tmp_path / "out")))
    sft.main(replace(config, out=str(tmp_path / "out2"), template="{prompt}"))
    out = capsys.readouterr().out
    assert "without effect with --init: --n_layer 3, --block_size 64\n" in out
    assert out.count(f"--init {tiny_base}, which has its own: --template {{prompt}}\n") == 1
    with pytest.raises(UserError, match="--kl_target adapts the penalty"):
        ppo.main(ppo.Config(kl_coef=0.0, kl_target=3.0))


@pytest.mark.parametrize("name", ["toy", "scratch", "gpt2"])
def test_a_word_that_names_no_path_stays_one_whatever_folders_are_called(
    name, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    (tmp_path / name / "x").write_text("x")
    assert fingerprint(name) == name
    config = config_of(tmp_path / "out", texts=name)
    keep_apart(config, {"out": name})


def test_a_comparison_does_not_write_into_the_folder_of_a_run(tmp_path):
    config = config_of(tmp_path / "out")
    train(config, 1)
    with pytest.raises(UserError, match="out holds a run; --compare needs another one"):
        ppo.main(replace(config, compare="a,b"))


def test_a_reward_function_does_not_score_what_does_not_end(capsys):
    ppo.check_settings(ppo.Config(reward="mine.py:f", reward_model="x"))
    expected = "without effect with --reward: --reward_model x\na response that does not end gets "
    assert capsys.readouterr().out.startswith(f"{expected}--missing_eos_score -1.0")
    ppo.check_settings(ppo.Config(reward="mine.py:f", missing_eos_score=float("nan")))
    assert capsys.readouterr().out == ""


def test_the_checkpoint_in_place_of_its_folder_is_one_line(tiny_base, capsys):
    for load in (load_checkpoint, Codec.load, GPT.load):
        with pytest.raises(UserError, match="checkpoint.pt is a file; give the folder"):
            load(f"{tiny_base}/checkpoint.pt")
    assert capsys.readouterr().err == ""


def test_a_model_of_another_tokenizer_is_refused(tiny_base, tmp_path):
    """Of as many tokens, two of which have changed places."""
    saved, other = load_checkpoint(tiny_base), str(tmp_path / "other")
    *lines, a, b = saved["codec"]["tokenizer"]["ranks"].splitlines()
    (one, i), (two, j) = a.split(), b.split()
    saved["codec"]["tokenizer"]["ranks"] = "\n".join([*lines, f"{two} {i}", f"{one} {j}", ""])
    Path(other).mkdir()
    torch.save(saved, f"{other}/checkpoint.pt")
    config = ppo.Config(sft=tiny_base, advantage="rloo", samples=2, reward_model=other)
    few = {"toy_demonstrations": 20, "out": str(tmp_path / "out")}
    for refused in (
        lambda: ppo.Models.load(replace(config, init=other)),
        lambda: ppo.load_reward_model(config, Codec.load(tiny_base)),
        lambda: ppo.load_policies(replace(config, compare=other)),
        lambda: reward.collect(reward.Config(sft=tiny_base, policy=other)),
        lambda: sft.main(sft.Config(init=tiny_base, reward_model=other, **few)),
    ):
        with pytest.raises(UserError, match="other has another tokenizer than"):
            refused()
    assert not (tmp_path / "out").exists()


def test_a_comparison_on_prompts_of_the_training_is_refused(tiny_base, tmp_path):
    saved = load_checkpoint(tiny_base)
    saved["config"] |= {"prompts": "p.jsonl", "eval_prompts": 20, "ema_decay": 0.0}
    torch.save(saved, tmp_path / "checkpoint.pt")
    config = ppo.Config(sft=tiny_base, compare=str(tmp_path), prompts="p.jsonl", eval_prompts=21)
    with pytest.raises(UserError, match="was trained on all but 20 prompts; --eval_prompts 20"):
        ppo.load_policies(config)
    assert ppo.load_policies(replace(config, eval_prompts=20))
    assert ppo.load_policies(replace(config, prompts="q.jsonl"))


def test_more_models_than_a_person_can_rank_are_refused_at_once(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr(ppo, "sample", lambda *_: pytest.fail("it has sampled"))
    (tmp_path / "mine.py").write_text("def f(texts, prompts): return [0] * len(texts)\n")
    places = {"sft": tiny_base, "base": tiny_base, "reward": f"{tmp_path}/mine.py:f"}
    config = ppo.Config(judge="human", eval_prompts=2, device="cpu", **places)
    with pytest.raises(UserError, match="10 responses to a prompt; at most 9 can be ranked"):
        ppo.compare(config, dict.fromkeys("abcde"), 0.0)  # and five that are always compared
