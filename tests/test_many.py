"""Several processes on one machine, with whole and with sharded networks: the same update as one
process, and rollouts of their own."""

import json
import subprocess
import sys
from pathlib import Path

import sft
from data.records import UserError

import pytest
import torch

ROOT = Path(__file__).parents[1]
UPDATE = """
import atexit, copy, os, sys, torch
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import ppo, reward, sft
from data import processes
from data.processes import gather, my_share, rank_and_world
from data.run import Run, RunConfig
from data.tokenizer import Codec, get_tokenizer
from model import GPT, GPTConfig, ScalarModel, adam, clip_and_step, pack, sampling_copy, to_device
from test_ppo import by_hand, close, other_settings
if many := "RANK" in os.environ:
    torch.distributed.init_process_group("gloo")
    atexit.register(processes.leave)  # as command() does
torch.manual_seed(0)
gpt = GPT(GPTConfig(1025, 64, 2, 2, 32)).eval()
codec = Codec(get_tokenizer("toy"), "{{prompt}}")
lengths = [1, 9, 3, 17, 2, 30, 5]  # unequal, and no multiple of two
pairs = [(list(range(3 + n % 4)), [(7 * n + i) % 1024 for i in range(n)]) for n in lengths]

def sgd(*models):  # Adam would blow up the rounding of gradients that are 0
    groups = [{{"params": list(m.parameters()), "peak_lr": 0.1}} for m in models]
    return torch.optim.SGD(groups, lr=1.0)

def save(name, *models):
    states = [processes.unsharded_weights(m) for m in models]
    if rank_and_world()[0] == 0:
        torch.save(states, f"{out}/{{name}}.pt")

def a_run(name, config, model):
    model = to_device(model, config)
    return Run(name, config, f"{out}/{{name}}", gpt.config, codec, sgd(model), model=model)

def one_sft():
    empty, batches = [], sft.batches

    def noted(*columns):
        for batch in batches(*columns):
            empty.append(not len(batch.tokens))
            yield batch

    sft.batches = noted
    config = sft.Config(max_tokens=40 if many else 999, shard=shard)
    run = a_run("sft", config, copy.deepcopy(gpt))
    sft.train(run, pairs[:1], pairs, 1, 7, ["Why?"])
    assert any(map(any, gather(empty))) == shard  # the passes of shards are joint
    save("sft", run.modules["model"])

def one_reward():
    torch.manual_seed(1)
    flags = {{"epochs": 1, "batch_size": 4, "shard": shard}}
    config = reward.Config(max_tokens=60 if many else 999, **flags)
    run = a_run("reward", config, ScalarModel(gpt))
    ranks = [[1, 2, 2], [1, 2, 3], [3, 3, 3], [2, 1, 3]]  # ties alone weigh nothing
    chosen = [reward.Comparison({{"ranks": r}}, pairs[i : i + 3]) for i, r in enumerate(ranks)]
    reward.train(run, run.modules["model"], chosen)
    save("reward", run.modules["model"])

def one_ppo():
    torch.manual_seed(1)
    flags = {{"minibatch_size": 3, "ptx_coef": 0.5, "ppo_epochs": 2, "shard": shard}}
    config = ppo.Config(max_tokens=64 if many else 999, **flags)
    value, policy = (to_device(m, config) for m in (ScalarModel(gpt), copy.deepcopy(gpt)))
    models = ppo.Models(policy, gpt, value, value, gpt, codec, pairs)
    n = torch.tensor(lengths)
    x = torch.randn(5, int(n.sum()))
    prompts, responses = zip(*pairs)
    rollout = ppo.Rollout(list(prompts), list(responses), n, n, n, x[0] - 7, x[1], x[2], x[3], x[4])
    ppo.update(models, sgd(policy, value), rollout, config, 1.0, (0, "x", 0))
    save("ppo", policy, value)

def one_resume():
    batch = pack([[1, 2]], [[3, 4, 5]])

    def fresh(resume):
        config = RunConfig(shard=shard, resume=resume)
        model = to_device(copy.deepcopy(gpt), config)
        optimizer = adam([(model, 0.01)])
        return Run("sft", config, f"{out}/resume", gpt.config, codec, optimizer, model=model)

    def step(run):
        (sft.sft_loss(run.modules["model"], batch) / 2).backward()
        clip_and_step(run.optimizer, 1.0)
        return processes.unsharded_weights(run.modules["model"])

    one = fresh(resume=False)
    mine = sum(p.to_local().numel() if shard else 0 for p in one.modules.parameters())
    assert mine < 0.6 * sum(p.numel() for p in gpt.parameters()) or not shard
    step(one)
    one.extra["kl_coef"] = torch.tensor(0.7)
    one.save()
    other = fresh(resume=True)
    weights, resumed = step(one), step(other)
    sampled = sampling_copy(other.modules["model"]).state_dict()
    assert other.extra == one.extra
    for name, w in weights.items():
        assert w.equal(resumed[name]) and w.equal(sampled[name])
        assert not w.equal(gpt.state_dict()[name])
    processes.load_unsharded(other.modules["model"], gpt.state_dict())
    loaded = processes.unsharded_weights(other.modules["model"])
    assert all(w.equal(loaded[name]) for name, w in gpt.state_dict().items())

def one_sum():
    # of w x with x = 1 in process 0, 2 in process 1, ...: gradients 1 + 2 + ..., and no mean
    rank, world = rank_and_world()
    total = world * (world + 1) / 2
    model = torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(3, 2)]), torch.nn.Linear(2, 1))
    model.forward = lambda x: model[1](model[0][0](x))
    torch.nn.init.ones_(model[0][0].weight), torch.nn.init.ones_(model[1].weight)
    if shard:
        processes.shard(model, keep=False, methods=())
    assert shard == any(hasattr(p, "full_tensor") for p in model.parameters())
    model(torch.full((1, 3), rank + 1.0)).sum().backward()
    processes.sum_gradients(list(model.parameters()))
    assert (processes.whole(model[0][0].weight.grad) == total).all()
    assert (processes.whole(model[1].bias.grad) == world).all()
    lone = torch.nn.Parameter(torch.zeros(2))
    lone.grad = None if rank else torch.ones(2)  # a process may have none
    processes.sum_gradients([lone])
    assert lone.grad.tolist() == [1, 1]
    assert gather(rank) == list(range(world))
    assert [x for share in gather(my_share("abcde")) for x in share] == list("abcde")

@torch.no_grad()
def one_rollout():  # of five prompts, two of the first process; whitened over both
    models, prompts, config = other_settings()
    seed = torch.Generator().manual_seed(rank_and_world()[0])
    rollout = ppo.make_rollout(models, prompts, config, 0.3, seed)
    assert rollout.prompts == prompts and len(set(map(tuple, rollout.responses))) == 5
    scores, returns, advantages = by_hand(models, rollout, config, 0.3)
    close(rollout.scores, scores, 1e-5)
    close(rollout.returns, returns, 1e-5)
    close(rollout.advantages, advantages, 1e-4)

out, shard = {out!r}, {shard}
one_sft(); one_reward(); one_ppo(); one_resume(); one_sum(); one_rollout()
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
    with pytest.raises(UserError, match="--shard needs several processes: torchrun"):
        sft.main(sft.Config(shard=True, base=str(tmp_path / "base"), n_layer=1, n_embd=4, n_head=1))
    assert not list(tmp_path.iterdir())


def test_a_process_that_dies_ends_the_run(tmp_path):
    script = tmp_path / "dies.py"
    script.write_text(
        f"import os, sys\nsys.path[:0] = [{str(ROOT)!r}]\nimport sft\n"
        "if os.environ['RANK'] == '1':\n    os._exit(7)\n"
        "sft.command(sft.main, sft.Config, sft.PRESETS)\n"
    )
    result = launch(2, script, "--toy_texts=60", cwd=tmp_path)
    assert result.returncode != 0 and "exitcode" in result.stderr
