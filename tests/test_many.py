"""Several processes on one machine, with whole and with sharded networks: the same update as one
process, and rollouts of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
UPDATE = """
import atexit, os, sys, torch
sys.path[:0] = [{root!r}]
import ppo, reward, sft
from data.tokenizer import get_tokenizer
from model import *
if "RANK" in os.environ:
    torch.distributed.init_process_group("gloo")
    atexit.register(torch.distributed.destroy_process_group)  # as command() does
torch.manual_seed(0)
gpt = GPT(GPTConfig(1025, 64, 2, 2, 32)).eval()
lengths = [1, 9, 3, 17, 2, 30, 5]  # unequal, and no multiple of two
pairs = [(list(range(3 + n % 4)), [(7 * n + i) % 1024 for i in range(n)]) for n in lengths]

def sgd(models):  # Adam would blow up the rounding of gradients that are 0
    groups = [{{"params": list(m.parameters()), "peak_lr": lr}} for m, lr in models]
    return torch.optim.SGD(groups, lr=1.0)

def save(name, *models):
    states = [state_of(m) for m in models]
    if rank_and_world()[0] == 0:
        torch.save(states, f"{out}/{{name}}.pt")

def one_sft():
    config = RunConfig(max_tokens=40, shard=shard)
    model = placed(copy.deepcopy(gpt), config)
    prompts, responses = ([pair[i] for pair in my_share(pairs)] for i in (0, 1))
    losses = ((sft.sft_loss(model, b), len(b.where)) for b in batches(prompts, responses, config))
    optimizer_step(sgd([(model, 0.1)]), losses, sum(lengths))
    save("sft", model)

def one_reward():
    torch.manual_seed(1)
    config = reward.Config(max_tokens=60, shard=shard)
    model = placed(ScalarModel(gpt), config)
    chosen = [reward.Comparison({{"ranks": [1, 2, 2]}}, pairs[i : i + 3]) for i in range(5)]
    optimizer_step(sgd([(model, 0.1)]), reward.losses(model, my_share(chosen), config), 5)
    save("reward", model)

def one_ppo():
    torch.manual_seed(1)
    codec = Codec(get_tokenizer("toy"), "{{prompt}}")
    config = ppo.Config(minibatch_size=3, ptx_coef=0.5, ppo_epochs=2, max_tokens=64, shard=shard)
    value, policy = placed(ScalarModel(gpt), config), placed(copy.deepcopy(gpt), config)
    models = ppo.Models(policy, gpt, value, value, gpt, codec, pairs)
    n = torch.tensor(lengths)
    x = torch.randn(5, int(n.sum()))
    prompts, responses = zip(*pairs)
    rollout = ppo.Rollout(list(prompts), list(responses), n, n, n, x[0] - 7, x[1], x[2], x[3], x[4])
    optimizer = sgd([(policy, 0.1), (value, 0.1)])
    ppo.update(models, optimizer, rollout, config, 1.0, (0, "x"))
    save("ppo", policy, value)

def one_resume():
    config = RunConfig(shard=shard)
    batch = pack([[1, 2]], [[3, 4, 5]])

    def fresh():
        model = placed(copy.deepcopy(gpt), config)
        return model, adam([(model, 0.01)])

    def step(model, optimizer):
        optimizer_step(optimizer, [(sft.sft_loss(model, batch), 3)], 6)

    one, other = fresh(), fresh()
    mine = sum(p.to_local().numel() if shard else 0 for p in one[0].parameters())
    assert mine < 0.6 * sum(p.numel() for p in gpt.parameters()) or not shard
    step(*one)
    saved = [copy.deepcopy(state_of(thing)) for thing in one]
    step(*one)
    for thing, state in zip(other, saved):
        restore(thing, state)
    step(*other)
    weights = [state_of(model) for model, _ in (one, other)]
    assert all(w.equal(weights[1][name]) for name, w in weights[0].items())
    assert all(w.equal(whole(one[0]).state_dict()[name]) for name, w in weights[0].items())

out, shard = {out!r}, {shard}
one_sft(); one_reward(); one_ppo(); one_resume()
"""


def launch(processes: int, script: Path, *flags: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(script), *flags]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_two_processes_make_the_update_of_one(tmp_path):
    saved = []
    for processes, shard in ((1, False), (2, False), (2, True)):
        out = tmp_path / f"{processes} {shard}"
        out.mkdir()
        script = out / "update.py"
        script.write_text(UPDATE.format(root=str(ROOT), out=str(out), shard=shard))
        result = launch(processes, script, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        saved.append({n: torch.load(out / f"{n}.pt") for n in ("sft", "reward", "ppo")})
    for stage, models in saved[0].items():
        for other in saved[1:]:
            for ours, theirs in zip(models, other[stage], strict=True):
                for name, weight in ours.items():
                    difference = (weight - theirs[name]).abs().max()
                    assert difference < 1e-6, (stage, name, difference)
    moved = saved[0]["ppo"][0]["wte.weight"] - saved[0]["sft"][0]["wte.weight"]
    assert moved.abs().max() > 1e-3  # there was an update to compare


WHITEN = """
import atexit, sys, torch
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import ppo
from test_ppo import close, tiny_models
torch.distributed.init_process_group("gloo")
atexit.register(torch.distributed.destroy_process_group)
seed = torch.Generator().manual_seed(torch.distributed.get_rank())
config = ppo.Config(max_new_tokens=4, device="cpu")
rollout = ppo.sample_and_score(tiny_models(), [[1], [2], [3], [4]], config, 0.1, seed)
close(rollout.advantages, ppo.whiten(rollout.returns - rollout.old_values), 1e-5)
"""


def test_advantages_are_whitened_over_all_processes(tmp_path):
    script = tmp_path / "whiten.py"
    script.write_text(WHITEN.format(root=str(ROOT)))
    result = launch(2, script, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module", params=["--no-shard", "--shard"])
def trained(tmp_path_factory, request) -> Path:
    """All stages, tiny, by two processes."""
    folder = tmp_path_factory.mktemp("many")
    tiny = ["--n_layer=1", "--n_embd=16", "--n_head=1", "--toy_texts=60", "--toy_demonstrations=60"]
    score = ["--toy_prompts=12", "--responses=4", "--max_new_tokens=10", "--epochs=1"]
    steps = ["--iterations=3", "--batch_size=5", "--minibatch_size=3", "--max_new_tokens=10"]
    steps += ["--eval_prompts=4", "--trust", "--no-ablation", "--ptx_coef=1", "--max_approx_kl=1"]
    for script, flags in (("sft.py", tiny), ("reward.py", score), ("ppo.py", steps)):
        result = launch(2, ROOT / script, *flags, request.param, cwd=folder)
        assert result.returncode == 0, result.stderr
    return folder / "out"


def test_all_stages_run_and_one_process_writes(trained):
    for stage in ("base", "sft", "reward", "ppo"):
        lines = (trained / stage / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(len(lines)))
    assert (trained / "ppo/results.json").exists()


def test_processes_sample_different_responses(trained):
    rows = [json.loads(x) for x in (trained / "reward/comparisons.jsonl").read_text().splitlines()]
    texts = [text for row in rows for text in row["responses"]]
    assert len(set(texts)) == len(texts) > 40


def test_sharding_needs_processes(tmp_path):
    result = launch(1, ROOT / "sft.py", "--shard", cwd=tmp_path)
    assert result.returncode == 2 and "torchrun" in result.stderr and "Trace" not in result.stderr


def test_a_process_that_dies_ends_the_run(tmp_path):
    script = tmp_path / "dies.py"
    script.write_text(
        f"import os, sys\nsys.path[:0] = [{str(ROOT)!r}]\nimport sft\n"
        "if os.environ['RANK'] == '1':\n    os._exit(7)\n"
        "sft.command(sft.main, sft.Config, sft.PRESETS)\n"
    )
    result = launch(2, script, "--toy_texts=60", cwd=tmp_path)
    assert result.returncode != 0 and "exitcode" in result.stderr
