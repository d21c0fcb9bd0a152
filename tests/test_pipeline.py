"""The three stages in miniature, called in-process: each improves the number it is there for."""

import copy
import dataclasses
import functools
import json
import math
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import get_args

import ppo
import reward
import sft
from data import labeler, toy
from data.folders import lock
from data.records import UserError, load_comparisons, load_demonstrations, save_records
from data.run import Run, command, load_checkpoint, parse
from data.tokenizer import Codec
from model import GPT, GPTConfig, ScalarModel, adam, clip_and_step

import kills
import pytest
import seeds
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("out")


def folders(out: Path, *names: str) -> dict[str, str]:
    return {name: str(out / name) for name in names}


@pytest.fixture(scope="module")
def sft_config(out) -> sft.Config:
    return sft.Config(
        out=str(out / "sft"),
        base=str(out / "base"),
        n_layer=1,
        n_head=2,
        n_embd=48,
        toy_texts=1500,
        pretrain_batch_size=16,
        pretrain_lr=1e-2,
        toy_demonstrations=700,
        lr=4e-3,
        epochs=2,
        batch_size=16,
        held_out=0.03,
    )


@pytest.fixture(scope="module")
def fine_tuned(sft_config) -> dict:
    return sft.main(sft_config)


@pytest.fixture(scope="module")
def reward_config(out) -> reward.Config:
    """Comparisons of four writers, for a model this small writes nothing worth a ranking."""
    rng, comparisons = Random(0), []
    for _ in range(400):
        task = toy.random_task(rng)
        prompt = toy.ask(task, rng)
        responses = [toy.reply(task, rng, writer) for writer in toy.WRITERS[:4]]
        ranks = labeler.rank(prompt, responses, rng, noise=0.5)
        comparisons.append({"prompt": prompt, "responses": responses, "ranks": ranks})
    save_records(out / "comparisons.jsonl", comparisons)
    save_records(out / "demonstrations.jsonl", toy.demonstrations(200, 1))
    return reward.Config(
        out=str(out / "reward"),
        sft=str(out / "sft"),
        comparisons=str(out / "comparisons.jsonl"),
        demonstrations=str(out / "demonstrations.jsonl"),
        epochs=2,
        batch_size=4,
        lr=3e-3,
    )


@pytest.fixture(scope="module")
def rewarded(fine_tuned, reward_config) -> dict:
    return reward.main(reward_config)


@pytest.fixture(scope="module")
def ppo_config(out) -> ppo.Config:
    return ppo.Config(
        out=str(out / "ppo"),
        reward_model=str(out / "reward"),
        iterations=8,
        batch_size=32,
        minibatch_size=16,
        ppo_epochs=4,
        lr=2e-3,
        value_lr=2e-3,
        warmup=1,
        kl_coef=0.1,
        eval_prompts=40,
        split="dev",
        **folders(out, "sft", "base"),
    )


@pytest.fixture(scope="module")
def results(rewarded, ppo_config) -> dict:
    return ppo.main(ppo_config)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def strict_json(path: Path) -> dict:
    """What a file holds by the standard, which knows neither NaN nor Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{path.name} holds {constant}")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_pretraining_and_fine_tuning_lower_the_held_out_loss(fine_tuned, out):
    for stage in ("base", "sft"):
        first, last = metrics(out / stage)[0], metrics(out / stage)[-1]
        assert last["held_out_loss"] < first["held_out_loss"] - 0.3
    # 1,025 words to choose from: an untrained model knows nothing
    assert metrics(out / "base")[0]["held_out_loss"] > 0.8 * math.log(1025)


def test_the_reward_model_beats_chance(rewarded, reward_config):
    assert rewarded["accuracy"] > 0.6
    report = strict_json(Path(reward_config.out) / "report.json")
    share, half_width, pairs = report["pairs"]["reward model, held-out comparisons"]
    assert share == rewarded["accuracy"] and 0 < half_width < 0.2 and pairs > 50


def test_a_correlation_that_is_not_defined_is_null(tiny_base, tmp_path):
    records = [{"prompt": f"p{i}", "responses": ["a", "b"], "ranks": [1, 2]} for i in range(10)]
    save_records(tmp_path / "c.jsonl", records)
    flags = {"comparisons": str(tmp_path / "c.jsonl"), "out": str(tmp_path / "reward")}
    reward.main(reward.Config(sft=tiny_base, epochs=1, **flags))
    assert strict_json(tmp_path / "reward/report.json")["length_correlation"] is None


def test_collecting_ranks_different_samples(fine_tuned, reward_config, tmp_path):
    config = replace(reward_config, out=str(tmp_path), comparisons="", toy_prompts=20)
    reward.main(config)
    comparisons = load_comparisons(tmp_path / "comparisons.jsonl")
    assert len(comparisons) == 20
    for row in comparisons:
        assert len(set(row["responses"])) == len(row["responses"]) == len(row["ranks"])
    assert "rank 1" in (tmp_path / "samples.txt").read_text()


def test_demonstrations_score_zero(rewarded, reward_config):
    model, codec = ScalarModel.load(reward_config.out), Codec.load(reward_config.out)
    records = [
        {"prompt": d["prompt"], "responses": [d["response"]], "ranks": [1]}
        for d in load_demonstrations(reward_config.demonstrations)
    ]
    tokenised = reward.tokenised(records, codec, model.gpt.config.block_size)
    scores = [s for (s,) in reward.score_all(model, tokenised, reward_config)]
    assert sum(scores) / len(scores) == pytest.approx(0, abs=1e-4)


@torch.no_grad()
def test_ppo_raises_the_score(results, ppo_config, out):
    """By one point and more, of 300 prompts: chance is 0.11."""
    codec, reward_model = Codec.load(out / "sft"), ScalarModel.load(out / "reward").eval()
    prompts = [codec.prompt(row["prompt"]) for row in toy.prompts(300, 1, "dev")]
    scores = []
    for name in ("sft", "ppo"):
        responses = ppo.sample(GPT.load(out / name).eval(), prompts, codec, ppo_config)
        scores.append(ppo.score(reward_model, prompts, responses, ppo_config))
    before, after = (sum(own) / 300 for own in scores)
    assert after > before + 0.3


def test_ratio_is_one_and_kl_zero_before_the_first_update(results, out):
    first = metrics(out / "ppo")[0]
    assert first["objective/kl"] == 0
    assert first["objective/reward"] == first["objective/score"]


def test_without_the_penalty_the_policy_strays_further(results):
    assert results["ppo_no_kl"]["kl"] > results["ppo"]["kl"]


def test_the_comparison_has_every_model_and_interval(results, ppo_config):
    names = ["base", "prompted", "sft", "sft_greedy", "best_of_16"]
    names += ["ppo", "ppo_ema", "ppo_no_kl"]
    assert list(results) == names
    saved = strict_json(Path(ppo_config.out) / "results.json")
    assert saved["seed"] == 0 and saved["seconds"] > 0
    assert [row["model"] for row in saved["rows"]] == names
    for row in saved["rows"]:
        assert 0 <= row["gold"] <= 10 and row["gold_ci"] >= 0
        assert (row["win_rate"] is None) == (row["model"] == "sft")
    assert results["sft"]["kl"] == 0
    # log 16 - 15/16
    assert results["best_of_16"]["kl"] == pytest.approx(1.8351, abs=1e-4)
    text = (Path(ppo_config.out) / "comparison.txt").read_text()
    assert text.count("[ppo]") == text.count("[base]") == 5
    curve = saved["best_of_n"]
    assert [point["n"] for point in curve] == [1, 2, 4, 8, 16]
    scores = [point["score"] for point in curve]
    assert scores == sorted(scores) and scores[-1] == pytest.approx(results["best_of_16"]["score"])


def test_the_table_of_several_seeds_reads_the_results(results, ppo_config):
    rows = strict_json(Path(ppo_config.out) / "results.json")["rows"]
    for columns in (seeds.COLUMNS, seeds.PARTS):
        head, _, *lines = seeds.table([rows, rows], columns).splitlines()
        assert head.count("|") == len(columns) + 2
        assert [line.split(" | ")[0] for line in lines] == [f"| {name}" for name in results]
    assert f"| {results['sft']['gold']:.2f} " in seeds.table([rows], ("gold",))


def test_the_comparison_alone_gives_the_same_rows(results, ppo_config, tmp_path):
    compare = f"{ppo_config.out},{ppo_config.out}_no_kl"
    alone = ppo.main(replace(ppo_config, compare=compare, out=str(tmp_path / "compare")))
    assert alone == results
    assert (tmp_path / "compare" / "results.json").exists()


def test_reference_and_reward_model_are_not_touched(results, out):
    before = load_checkpoint(out / "sft")["model"]
    after = load_checkpoint(out / "ppo")["model"]
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert load_checkpoint(out / "sft")["step"] == len(metrics(out / "sft"))


def test_no_learning_without_a_learning_rate(rewarded, ppo_config, tmp_path):
    """Policy and reference stay one: ratio 1 and KL 0 in every epoch of every iteration."""
    config = replace(
        ppo_config, out=str(tmp_path / "ppo"), lr=0.0, value_lr=0.0, iterations=2, ablation=False
    )
    policy = ppo.train(config)["ppo"]
    start = GPT.load(config.sft).state_dict()
    assert all(torch.equal(value, start[name]) for name, value in policy.state_dict().items())
    for row in metrics(tmp_path / "ppo"):
        assert row["objective/kl"] == 0
        assert row["policy/approx_kl"] == pytest.approx(0, abs=1e-6)
        assert row["policy/clipfrac"] == 0


# ---- variants


def test_ptx_keeps_the_pretraining_loss_lower(results, ppo_config, out, tmp_path):
    config = replace(ppo_config, out=str(tmp_path / "ptx"), ptx_coef=2.0)
    policy = ppo.train(config)["ptx"]
    loss = ppo.pretraining_loss(policy, Codec.load(config.sft), config)
    assert loss < results["ppo"]["pretraining_loss"] - 0.05
    rows = metrics(tmp_path / "ptx")
    assert rows[-1]["ptx/loss"] < rows[0]["ptx/loss"]
    assert "ptx/loss" not in metrics(out / "ppo")[0]


def test_a_value_head_on_the_policy_learns(rewarded, ppo_config, tmp_path):
    config = replace(ppo_config, out=str(tmp_path / "ppo"), iterations=12, value="head")
    config = replace(config, value_lr=1e-2, vf_coef=1.0)
    ppo.train(config)
    rows = metrics(tmp_path / "ppo")
    # it starts at 0 and explains nothing: exactly so
    assert rows[0]["value/explained_variance"] == pytest.approx(0, abs=1e-6)
    assert rows[-1]["value/explained_variance"] > 0.1
    saved = load_checkpoint(tmp_path / "ppo")
    for name, weight in saved["model"].items():
        assert torch.equal(saved["training"]["value_model"][f"gpt.{name}"], weight)


def test_a_limit_on_the_kl_ends_the_updates_of_an_iteration(
    rewarded, ppo_config, monkeypatch, tmp_path
):
    steps, step = [], ppo.clip_and_step
    monkeypatch.setattr(ppo, "clip_and_step", lambda *x: steps.append(1) or step(*x))
    config = replace(ppo_config, out=str(tmp_path / "ppo"), iterations=2, warmup=0)
    ppo.train(replace(config, max_approx_kl=1e-9))
    # the first minibatch has ratio 1; the second sees the first one's step, and is the last
    assert len(steps) == 2 * 2
    steps.clear()
    ppo.train(replace(config, max_approx_kl=1e9))
    assert len(steps) == 2 * ppo_config.ppo_epochs * 2
    assert metrics(tmp_path / "ppo")[0]["policy/approx_kl"] > 1e-6


def test_another_round_of_the_loop(results, reward_config, ppo_config, out, tmp_path):
    config = replace(
        reward_config,
        out=str(tmp_path / "reward"),
        policy=str(out / "ppo"),
        comparisons="",
        merge=str(out / "comparisons.jsonl"),
        toy_prompts=40,
        epochs=1,
    )
    reward.main(config)
    new = load_comparisons(tmp_path / "reward" / "comparisons.jsonl")
    assert len(new) == 40
    # of 440 comparisons, half of the 40 new ones are held out
    assert metrics(tmp_path / "reward")[-1]["step"] == 420 // 4 - 1
    config = replace(
        ppo_config,
        init=str(out / "ppo"),
        reward_model=str(tmp_path / "reward"),
        out=str(tmp_path / "ppo2"),
        iterations=1,
        trust=True,
    )
    ppo.train(config)
    # it goes on from the policy, and is held near the fine-tuned model
    assert metrics(tmp_path / "ppo2")[0]["objective/kl"] > 0.1


def test_a_reward_model_no_better_than_chance_is_refused(rewarded, ppo_config, out, tmp_path):
    saved = load_checkpoint(out / "reward")
    for name, changes, needle in (
        ("chance", {"accuracy": 0.55, "accuracy_ci": 0.06}, "orders 0.550 ± 0.060"),
        ("unfinished", {}, "not trained to its end"),
    ):
        (tmp_path / name).mkdir()
        *lines, last = saved["metrics"]
        last = {k: v for k, v in last.items() if not k.startswith("accuracy")} | changes
        torch.save(saved | {"metrics": [*lines, last]}, tmp_path / name / "checkpoint.pt")
        config = replace(
            ppo_config, reward_model=str(tmp_path / name), out=str(tmp_path / "ppo"), iterations=0
        )
        with pytest.raises(UserError, match=needle):
            ppo.train(config)
        assert not (tmp_path / "ppo").exists()
    ppo.train(replace(config, trust=True))


def test_the_epoch_that_the_reward_model_prefers_is_kept(
    rewarded, sft_config, out, capsys, tmp_path
):
    config = replace(
        sft_config,
        init=str(out / "base"),
        out=str(tmp_path / "sft"),
        reward_model=str(out / "reward"),
        epochs=4,
        dropout=0.2,
        pretrain_mix=0.1,
        lr=8e-3,
    )
    last = sft.main(config)["sft"]
    rows = [row for row in metrics(tmp_path / "sft") if "reward_score" in row]
    assert [4 * (row["step"] + 1) // (rows[-1]["step"] + 1) for row in rows] == [1, 2, 3, 4]
    best = max(rows, key=lambda row: row["reward_score"])
    assert last["reward_score"] == best["reward_score"]
    printed = f"best by reward score: epoch {rows.index(best) + 1}, score"
    assert printed in capsys.readouterr().out
    saved = load_checkpoint(tmp_path / "sft")
    weights = saved["training"]["extra"]["weights"]
    assert all(torch.equal(weights[name], value) for name, value in saved["model"].items())


# ---- resuming


class Killed(BaseException):
    """Stands for a signal: nothing may catch it."""


def killed_after(monkeypatch, steps: int, start) -> None:
    """Runs start() until the run has ended so many steps, then pulls the plug in the next one."""
    log = Run.log

    def counting(self, *args, **kwargs):
        log(self, *args, **kwargs)
        if self.step == steps:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", counting)
        with pytest.raises(Killed):
            start()


def same_run(a: Path, b: Path) -> None:
    first, second = load_checkpoint(a), load_checkpoint(b)
    assert first["step"] == second["step"]
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    assert kills.timeless(metrics(a)) == kills.timeless(metrics(b))
    assert (a / "samples.txt").read_text() == (b / "samples.txt").read_text()
    for folder, saved in ((a, first), (b, second)):  # the checkpoint holds both files itself
        assert saved["metrics"] == metrics(folder)
        assert (folder / "samples.txt").read_text().startswith(saved["samples"])


def test_fine_tuning_resumes_bit_for_bit(fine_tuned, sft_config, monkeypatch, tmp_path):
    config = replace(
        sft_config,
        init=sft_config.base,
        out=str(tmp_path / "a"),
        toy_demonstrations=120,
        dropout=0.1,
        save_every=3,
    )
    sft.main(config)
    config = replace(config, out=str(tmp_path / "b"))
    killed_after(monkeypatch, 7, lambda: sft.main(config))
    assert load_checkpoint(tmp_path / "b")["step"] == 6
    assert len(metrics(tmp_path / "b")) == 7  # the seventh goes, and is done again
    sft.main(replace(config, resume=True))
    same_run(tmp_path / "a", tmp_path / "b")
    # a new run into the same folder moves the old one aside, whole
    files = {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    killed_after(monkeypatch, 2, lambda: sft.main(config))  # without --resume
    assert {p.name: p.read_bytes() for p in (tmp_path / "b.previous").iterdir()} == files
    sft.main(replace(config, resume=True))
    same_run(tmp_path / "a", tmp_path / "b")


def test_the_reward_model_resumes_bit_for_bit(rewarded, reward_config, monkeypatch, tmp_path):
    config = replace(
        reward_config,
        out=str(tmp_path / "a"),
        comparisons="",
        toy_prompts=40,
        epochs=1,
        save_every=3,
    )
    reward.main(config)
    config = replace(config, out=str(tmp_path / "b"))
    killed_after(monkeypatch, 4, lambda: reward.main(config))
    reward.main(replace(config, resume=True))
    same_run(tmp_path / "a", tmp_path / "b")


def test_ppo_resumes_bit_for_bit(rewarded, ppo_config, monkeypatch, tmp_path):
    flags = {"kl_target": 3.0, "missing_eos_score": math.nan}  # which is not equal to itself
    config = replace(ppo_config, out=str(tmp_path / "a"), iterations=4, save_every=2, **flags)
    ppo.train(config)
    kl_coefs = [row["kl_coef"] for row in metrics(tmp_path / "a")]
    assert len(set(kl_coefs)) == 4 and load_checkpoint(tmp_path / "a")["training"]["extra"]
    config = replace(config, out=str(tmp_path / "b"))
    killed_after(monkeypatch, 3, lambda: ppo.train(config))
    ppo.train(replace(config, resume=True))
    same_run(tmp_path / "a", tmp_path / "b")


def test_resuming_another_configuration_is_refused(fine_tuned, sft_config):
    config = replace(sft_config, resume=True, batch_size=8)
    with pytest.raises(UserError, match="made with --batch_size 16, not 8"):
        sft.main(config)


@pytest.mark.parametrize("damage", ["another shape", "a weight missing", "no optimizer"])
def test_resuming_another_network_is_one_line(damage, fine_tuned, sft_config, out, tmp_path):
    config = replace(sft_config, init=sft_config.base, out=str(tmp_path), toy_demonstrations=20)
    sft.main(config)
    saved = load_checkpoint(tmp_path)
    if damage == "another shape":
        saved["model"]["wpe.weight"] = torch.zeros(3)
    elif damage == "a weight missing":
        del saved["model"]["wpe.weight"]
    else:
        del saved["training"]["optimizer"]
    torch.save(saved, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="checkpoint.pt: it is not of this network") as error:
        sft.main(replace(config, resume=True))
    assert "\n" not in str(error.value)


def test_a_stage_runs_in_a_thread(tiny_base, tmp_path):
    """Where Python lets nobody handle signals."""
    found, flags = [], {"toy_demonstrations": 20, "batch_size": 10, "epochs": 1}
    config = sft.Config(init=tiny_base, out=str(tmp_path / "sft"), **flags)
    thread = threading.Thread(target=lambda: found.append(sft.main(config)))
    thread.start()
    thread.join()
    assert found[0]["sft"] == metrics(tmp_path / "sft")[-1]


# ---- the command line


def run(*argv: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / argv[0]), *argv[1:]]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


STAGES = {"sft.py": sft, "reward.py": reward, "ppo.py": ppo}


@pytest.mark.parametrize(
    "argv, needle",
    [
        (("reward.py",), "out/sft/checkpoint.pt does not exist; `python sft.py` makes it"),
        (("ppo.py", "--sft", "x"), "x/checkpoint.pt does not exist"),
        (("sft.py", "--dtype", "int8"), "--dtype int8"),
        (("sft.py", "--demonstrations", "missing.jsonl"), "missing.jsonl"),
    ],
)
def test_errors_are_one_line_and_status_2(argv, needle, monkeypatch, tmp_path, capfd):
    stage = STAGES[argv[0]]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", list(argv))
    with pytest.raises(SystemExit) as error:
        command(stage.main, stage.Config, stage.PRESETS)
    assert error.value.code == 2
    errors = capfd.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert needle in errors
    assert not list(tmp_path.iterdir())


def test_a_program_that_fails_prints_the_error_alone(tmp_path):
    result = run("reward.py", cwd=tmp_path)
    line = "error: out/sft/checkpoint.pt does not exist; `python sft.py` makes it\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", line)


@pytest.mark.parametrize("script", STAGES)
def test_every_flag_is_explained(script, capsys):
    stage = STAGES[script]
    with pytest.raises(SystemExit) as end:
        parse(stage.Config, stage.PRESETS, ["--help"])
    shown = capsys.readouterr().out
    assert not end.value.code and shown.startswith("usage: ")
    for name in stage.Config.__dataclass_fields__:
        assert f"--{name}" in shown


def test_an_error_in_a_step_names_it_and_what_is_saved(fine_tuned, out, tmp_path):
    code = "calls = []\ndef f(texts, prompts):\n    calls.append(1)\n"
    (tmp_path / "r.py").write_text(code + "    return [1.0 / (len(calls) < 3)] * len(texts)\n")
    flags = [f"--sft={out / 'sft'}", "--reward=r.py:f", "--iterations=5", "--save_every=2"]
    flags += ["--out=run", "--batch_size=4", "--max_new_tokens=5", "--no-ablation"]
    result = run("ppo.py", *flags, cwd=tmp_path)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and "Traceback" not in result.stderr
    place = " (ppo, step 2; run has a checkpoint of 2 steps)"
    where = f"{(tmp_path / 'r.py').resolve()}:4"
    assert lines == [f"error: {where}: ZeroDivisionError: float division by zero{place}"]
    result = run("ppo.py", *flags, "--resume", "--reward=r.py:f", cwd=tmp_path)
    assert result.stderr.splitlines()[-1].endswith("(ppo, step 4; run has a checkpoint of 4 steps)")


def test_with_no_checkpoint_to_resume_from_a_run_says_so_and_begins(fine_tuned, out, capsys):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    Run("sft", sft.Config(resume=True), out / "new", None, None, optimizer)
    assert "new has no checkpoint to resume from: sft begins at step 0" in capsys.readouterr().out


# ---- a person at the terminal


def test_a_person_ranks_quits_and_goes_on(fine_tuned, reward_config, monkeypatch, tmp_path):
    flags = {"labeler": "human", "comparisons": "", "demonstrations": "", "out": str(tmp_path)}
    flags |= {"toy_prompts": 12, "responses": 3, "max_new_tokens": 10, "epochs": 1}
    config, asked = replace(reward_config, **flags), []

    def rank(self, item, place, total):
        asked.append(place)
        return "q" if len(asked) == 5 else [1, 2, 3][: len(self.items[item]["responses"])]

    monkeypatch.setattr(labeler.Person, "ask", rank)
    with pytest.raises(SystemExit):
        reward.main(config)
    assert "accuracy" in reward.main(replace(config, resume=True))
    assert asked[:6] == [0, 1, 2, 3, 4, 4] and len(load_comparisons(tmp_path / "comparisons.jsonl"))


def test_a_person_judges_models_blind(results, ppo_config, out, monkeypatch, tmp_path):
    def rank(self, item, place, total):  # whoever says least
        lengths = [len(text) for text in self.items[item]["responses"]]
        return [1 + sum(other < own for other in lengths) for own in lengths]

    monkeypatch.setattr(labeler.Person, "ask", rank)
    flags = {"compare": str(out / "ppo"), "judge": "human", "out": str(tmp_path)}
    rows = ppo.main(replace(ppo_config, eval_prompts=4, **flags))
    assert rows["sft"]["human_win_rate"] is None
    assert 0 <= rows["ppo"]["human_win_rate"] <= 1


# ---- what must not be lost


def test_kills_at_random_instants_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(kills.tempfile, "tempdir", str(tmp_path))
    assert kills.main(12) >= 12


def test_what_a_killed_run_had_half_written_goes(tmp_path):
    code = "import os\nfrom data.records import atomic\n"
    code += f"with atomic({str(tmp_path / 'checkpoint.pt')!r}): os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 9
    assert len(list(tmp_path.iterdir())) == 1
    lock(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def until_a_checkpoint(process: subprocess.Popen, folder: Path) -> None:
    while not (folder / "base/checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step(number, tmp_path):
    """Until then, a second run into the same folder is refused."""
    flags = ["--n_embd=16", "--n_layer=1", "--n_head=1", "--save_every=5", "--toy_texts=3000"]
    flags += ["--base=base"]
    command = [sys.executable, str(ROOT / "sft.py"), *flags]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    until_a_checkpoint(process, tmp_path)
    small = {"n_embd": 16, "n_layer": 1, "n_head": 1, "toy_texts": 60}
    with pytest.raises(UserError, match="base is in use by another run"):
        sft.main(sft.Config(base=str(tmp_path / "base"), **small))
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "--resume continues" in errors and "Traceback" not in errors
    step = load_checkpoint(tmp_path / "base")["step"]
    assert len(metrics(tmp_path / "base")) == step > 5


@pytest.mark.parametrize("cut", [0, 100, 0.5, 0.999])
def test_a_damaged_checkpoint_is_one_line(cut, fine_tuned, out, tmp_path):
    content = (out / "sft/checkpoint.pt").read_bytes()
    end = cut if isinstance(cut, int) else int(cut * len(content))
    (tmp_path / "checkpoint.pt").write_bytes(content[:end])
    with pytest.raises(UserError, match="checkpoint.pt cannot be read"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("found", [None, 3, "x"])
def test_a_checkpoint_of_another_format_is_one_line(found, fine_tuned, out, tmp_path):
    saved = torch.load(out / "sft/checkpoint.pt", weights_only=True)
    assert saved.pop("format") == 2
    torch.save(saved if found is None else saved | {"format": found}, tmp_path / "checkpoint.pt")
    words = f"checkpoint.pt has format {found or 1}, expected 2: another version of this project"
    with pytest.raises(UserError, match=words) as error:
        GPT.load(tmp_path)
    assert "\n" not in str(error.value)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_corrupted_checkpoint_loads_or_is_one_line(data, fine_tuned, out, tmp_path):
    content = bytearray((out / "sft/checkpoint.pt").read_bytes())
    # anywhere, or in what names the rest
    directory = content.rindex(b"data.pkl") if data.draw(st.booleans()) else 0
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(directory, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    (tmp_path / "checkpoint.pt").write_bytes(content)
    try:
        Codec.load(tmp_path), GPT.load(tmp_path)
    except UserError as error:
        assert "\n" not in str(error)


def read_sft(folder: Path) -> None:
    """As later stages read it, and as it is resumed."""
    Codec.load(folder), GPT.load(folder)
    gpt = GPT(GPTConfig(1025, 256, 1, 2, 48))
    config = sft.Config(resume=True)
    Run("sft", config, folder, gpt.config, Codec.load(folder), adam([(gpt, 1e-3)]), model=gpt)


def read_reward(folder: Path) -> None:
    ppo.check_reward_model(folder), ScalarModel.load(folder)


def read_ppo(folder: Path) -> None:
    ppo.load_policies(ppo.Config(sft=str(folder), compare=str(folder)))


@functools.cache
def short_checkpoint(path: Path) -> dict:
    """With two lines of metrics, for most of the time to load it goes into those."""
    saved = torch.load(path, weights_only=True)
    return saved | {"metrics": saved["metrics"][-2:]}


READERS = {"sft": read_sft, "reward": read_reward, "ppo": read_ppo}


@pytest.mark.usefixtures("results")
@pytest.mark.parametrize("stage", READERS)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_checkpoint_of_something_else_loads_or_is_one_line(stage, data, out, tmp_path):
    saved = inside = copy.deepcopy(short_checkpoint(out / stage / "checkpoint.pt"))
    if stage == "sft":
        saved["config"] = asdict(sft.Config(resume=True))
    key = data.draw(st.sampled_from(sorted(saved)))
    while isinstance(inside[key], dict | list) and inside[key] and data.draw(st.booleans()):
        inside = inside[key]
        keys = sorted(inside, key=str) if isinstance(inside, dict) else [0, len(inside) - 1]
        key = data.draw(st.sampled_from(keys))
    junk = [None, -1, "x", "{prompt}", [], {}, {"x": 1}, math.nan, torch.zeros(3), True, 10**9]
    if junk := data.draw(st.sampled_from([[x] for x in junk] + [[]])):
        if isinstance(inside, dict):
            key = data.draw(st.sampled_from([key, "other"]))
        inside[key] = junk[0]
    else:
        del inside[key]
    torch.save(saved, tmp_path / "checkpoint.pt")
    try:
        READERS[stage](tmp_path)
    except UserError as error:
        assert "\n" not in str(error)


def test_a_full_disk_leaves_the_old_checkpoint(fine_tuned, sft_config, out, monkeypatch, tmp_path):
    def full(saved, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    shutil.copytree(out / "sft", tmp_path / "sft")
    before = (tmp_path / "sft/checkpoint.pt").read_bytes()
    monkeypatch.setattr(torch, "save", full)
    config = replace(sft_config, init=str(out / "base"), out=str(tmp_path / "sft"))
    config = replace(config, toy_demonstrations=60)
    with pytest.raises(OSError, match="No space left"):
        sft.main(config)
    assert (tmp_path / "sft.previous/checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.glob("sft/*checkpoint.pt*"))


def test_a_value_that_is_not_finite_stops_before_the_weights_change(fine_tuned, out):
    gpt = GPT.load(out / "sft")
    before = {name: weight.clone() for name, weight in gpt.state_dict().items()}
    optimizer = adam([(gpt, 1e-3)])
    loss = gpt.wpe.weight.sum() * math.nan
    loss.backward()
    with pytest.raises(UserError, match="loss is nan, the gradient of wpe.weight has values that"):
        clip_and_step(optimizer, loss.item())
    optimizer.zero_grad()
    loss = gpt.ln_f.bias.sum() + math.inf
    loss.backward()
    with pytest.raises(UserError, match="loss is inf, .* not finite"):
        clip_and_step(optimizer, loss.item())
    assert all(torch.equal(weight, before[name]) for name, weight in gpt.state_dict().items())


def flags_of(config_class: type) -> list[dataclasses.Field]:
    """The numeric ones: a type, or a type and its bounds."""
    fields = dataclasses.fields(config_class)
    return [f for f in fields if (*get_args(f.type), f.type)[0] in (int, float)]


@pytest.mark.parametrize("stage", [sft, reward, ppo])
@settings(max_examples=70, deadline=None)
@given(data=st.data())
def test_a_number_out_of_range_is_one_line(stage, data):
    """Every numeric flag refuses what it cannot be; -1 is a seed, and nan a missing_eos_score."""
    field = data.draw(st.sampled_from(flags_of(stage.Config)))
    bad = ["x", "", "1e", "0x1", "1,5"]
    if field.name != "missing_eos_score":
        bad += ["nan", "inf", "-inf", "-7.5"] + ["-1"] * (field.name != "seed")
    value = data.draw(st.sampled_from(bad))
    with pytest.raises((SystemExit, UserError)) as error:
        parse(stage.Config, stage.PRESETS, [f"--{field.name}={value}"])
    assert error.type is UserError or error.value.code == 2  # argparse's own line
