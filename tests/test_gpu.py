"""What a GPU needs, without one: all stages run on a pretended GPU (fake_gpu.py), where a mixture
of devices is an error and every wait for the device is counted."""

import json
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path
from unittest import mock

import model as model_module
import ppo
import reward
import sft
from data import processes
from data.records import UserError
from data.run import Run, RunConfig, command, load_checkpoint, program
from data.tokenizer import Codec, get_tokenizer
from model import GPT, GPTConfig, generate, pack, to_device, token_logprobs

import fake_gpu as fake
import pytest
import torch
from fake_gpu import fake_gpu

STAGES = ("base", "sft", "reward", "ppo")


@pytest.fixture
def steps(monkeypatch) -> list[tuple[int, Counter]]:
    """Notes the waits for the device whenever the optimiser is about to step and has stepped."""
    noted, step = [], model_module.clip_and_step

    def counted(*args):
        before = fake.waits.copy()
        result = step(*args)
        noted.append((before, fake.waits.copy()))
        return result

    for stage in (sft, reward, ppo):
        monkeypatch.setattr(stage, "clip_and_step", counted)
    return noted


def all_stages(folder: Path, compare: bool = True, **flags) -> dict[str, list[dict]]:
    """Trains all of them, tiny; their metrics."""
    place = {name: str(folder / name) for name in STAGES}
    texts = {"toy_texts": 40, "toy_demonstrations": 40, "pretrain_batch_size": 16}
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 96}
    sft.main(sft.Config(out=place["sft"], base=place["base"], **texts, **sizes, **flags))
    few = {"toy_prompts": 6, "responses": 3, "max_new_tokens": 6, "epochs": 1}
    reward.main(reward.Config(out=place["reward"], sft=place["sft"], **few, **flags))
    few = {"iterations": 2, "batch_size": 6, "minibatch_size": 3, "ppo_epochs": 2}
    few |= {"max_new_tokens": 6, "eval_prompts": 2, "trust": True, "ablation": False}
    few |= {"ptx_coef": 1.0, "value_warmup": 1}
    folders = {"sft": place["sft"], "base": place["base"], "reward_model": place["reward"]}
    last = ppo.main if compare else program(ppo.train)
    last(ppo.Config(out=place["ppo"], **folders, **few, **flags))
    return {name: metrics(folder / name) for name in STAGES}


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: x for k, x in line.items() if k != "tokens_per_second"} for line in lines]


def test_all_stages_compute_the_same_and_wait_once_a_step(tmp_path, steps):
    """No mixed devices anywhere; the numbers of a CPU; one wait in an optimiser step of any stage,
    however many passes it takes, and none between two steps of an update."""
    flags = {"dtype": "float32", "attention": "plain", "max_tokens": 150, "save_every": 99}
    expected = all_stages(tmp_path / "cpu", device="cpu", **flags)
    steps.clear()
    with fake_gpu():
        found = all_stages(tmp_path / "gpu", device="cuda", **flags)
    for stage, lines in expected.items():
        for ours, theirs in zip(found[stage], lines, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5), stage
    assert [(after - before).total() for before, after in steps] == [1] * len(steps)
    # a rollout, samples, or a checkpoint may stand between two steps
    between = [before - after for (_, after), (before, _) in pairwise(steps)]
    within = [x for x in between if not any("for b, token in" in place for place in x)]
    assert len(within) >= 2 * 3 and not any(within)  # two updates of four steps each


def test_the_default_on_a_gpu_is_bfloat16(tmp_path):
    with fake_gpu():
        found = all_stages(tmp_path, compare=False, device="cuda", attention="plain")
        torch.set_float32_matmul_precision.assert_called_with("highest")
    for name in STAGES:
        saved = load_checkpoint(tmp_path / name)
        assert saved["config"]["dtype"] == "bfloat16"
        resolved = {"device": "cuda:0", "dtype": "bfloat16", "attention": "plain"}
        assert saved["resolved"].items() >= resolved.items()
        assert all(x == x for line in found[name] for x in line.values())


@pytest.mark.skipif(model_module.triton is None, reason="needs Triton")
def test_fused_attention_trains_as_plain_attention_does(tmp_path, monkeypatch):
    """Scoring, sampling and training of every stage by the kernels, in Triton's interpreter."""
    monkeypatch.setattr(model_module, "trial", lambda dtype, D, device: "right")
    monkeypatch.setattr(model_module, "padded_attention", mock.Mock(side_effect=AssertionError))
    monkeypatch.setattr(model_module, "padded_decode", mock.Mock(side_effect=AssertionError))
    monkeypatch.setattr(model_module, "length_groups", mock.Mock(side_effect=AssertionError))
    with fake_gpu():
        found = a_few_steps(tmp_path / "fused")
    monkeypatch.undo()
    expected = a_few_steps(tmp_path / "plain", device="cpu")
    assert found["attention"] == "fused" and expected["attention"] == "plain"
    assert found["responses"] == expected["responses"]
    for name in ("losses", "values"):
        assert found[name] == pytest.approx(expected[name], abs=1e-5)
    with fake_gpu(), pytest.raises(UserError, match="--attention fused, not plain"):
        a_few_steps(tmp_path / "fused", attention="plain", resume=True)


def a_few_steps(folder: Path, device: str = "cuda", **flags) -> dict:
    config = RunConfig(device=device, dtype="float32", **flags)
    torch.manual_seed(0)
    gpt = to_device(GPT(GPTConfig(11, 16, 1, 1, 16)), config).eval()
    scalar = to_device(model_module.ScalarModel(gpt), config)
    optimizer, codec = model_module.adam([(gpt, 1e-3)]), Codec(get_tokenizer("toy"), "{prompt}")
    batch = pack([[1, 2, 3], [4]], [[5, 6], [7]], gpt.head_weight.device)
    folder.mkdir(exist_ok=True)
    kept = Run("sft", config, str(folder), gpt.config, codec, optimizer, model=gpt)
    kept.save()
    losses = []
    for _ in range(3):
        loss = sft.sft_loss(gpt, batch)
        loss.backward()
        losses.append(model_module.clip_and_step(optimizer, loss.detach())[0])
    seed = torch.Generator().manual_seed(0)
    return {
        "attention": load_checkpoint(folder)["resolved"]["attention"],
        "losses": losses,
        "values": scalar.score(batch).tolist(),
        "responses": generate(gpt, [[1, 2], [3]], 4, 0, generator=seed),
    }


# ---- waits ----


def tiny(device: str, **flags) -> GPT:
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(11, 24, 2, 2, 32)).eval()
    return to_device(gpt, RunConfig(device=device, attention="plain", **flags))


def test_decoding_waits_for_its_tokens_only():
    """One wait a token, for all rows together, and one for each prompt whose row is closed."""
    prompts, steps = [[1, 2], [3], [4, 5, 6]] * 3, 8
    expected = generate(tiny("cpu"), prompts, steps, 0, generator=torch.Generator().manual_seed(0))
    with fake_gpu() as waits:
        gpt = tiny("cuda")
        waits.clear()
        seed = torch.Generator().manual_seed(0)
        assert generate(gpt, prompts, steps, 0, generator=seed) == expected
    assert min(map(len, expected)) < steps == max(map(len, expected))
    tokens = [n for kind, n in waits.items() if kind.startswith("tolist at model.py: for b, token")]
    assert tokens == [steps]
    assert waits.total() - steps <= 2 * len({len(response) for response in expected})


def test_a_batch_and_its_log_probabilities_wait_for_nothing():
    with fake_gpu() as waits:
        gpt = tiny("cuda")
        scalar = model_module.ScalarModel(gpt).to("cuda")
        waits.clear()
        batch = pack([[1, 2], [3]], [[3, 4], [5]], "cuda")
        logprobs, entropy = token_logprobs(gpt, batch)
        (logprobs.sum() + entropy.sum()).backward()
        scalar.score(batch).sum().backward()
        assert not waits


def test_groups_are_computed_once_for_all_layers_and_passes(monkeypatch):
    counted = mock.Mock(side_effect=model_module.length_groups)
    monkeypatch.setattr(model_module, "length_groups", counted)
    gpt, batch = tiny("cpu"), pack([[1, 2], [3]], [[3, 4], [5]])
    for _ in range(3):
        token_logprobs(gpt, batch)
    assert counted.call_count == 1 and counted.call_args.args[0] == [0, 4, 6]


def test_no_average_is_kept_without_a_decay(tmp_path, tiny_base):
    place = {"sft": tiny_base, "base": tiny_base, "init": tiny_base}
    few = {"iterations": 1, "batch_size": 2, "minibatch_size": 2, "max_new_tokens": 3}
    (tmp_path / "mine.py").write_text("def one(texts, prompts):\n    return [1.0] * len(texts)\n")
    for decay in (0.0, 0.9):
        out = str(tmp_path / f"ppo{decay}")
        config = ppo.Config(out=out, reward=f"{tmp_path}/mine.py:one", ema_decay=decay, **place)
        ppo.train(ppo.replace(config, **few))
        assert ("average" in load_checkpoint(out)["training"]) == bool(decay)


# ---- memory ----


def test_the_cache_takes_half_of_the_free_memory(monkeypatch):
    """A row of 12 slots takes 2 * 2 layers * 32 channels * 4 bytes a slot: 6,144 bytes."""
    prompts = [[1, 2], [3], [4, 5, 6]] * 3
    expected = generate(tiny("cpu"), prompts, 9, 0, generator=torch.Generator().manual_seed(0))
    rows, prefill = [], model_module.prefill

    def noted(model, prompts, cache):
        rows.append(len(prompts))
        return prefill(model, prompts, cache)

    monkeypatch.setattr(model_module, "prefill", noted)
    for free, most in ((2 * 6144, 1), (9 * 6144, 4), (2**40, 9)):
        rows.clear()
        with fake_gpu(free):
            seed = torch.Generator().manual_seed(0)
            assert generate(tiny("cuda"), prompts, 9, 0, generator=seed) == expected
        assert max(rows) == most
    with fake_gpu(2 * 6143), pytest.raises(UserError, match="lower --max_new_tokens"):
        generate(tiny("cuda"), prompts, 9, 0)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"
        ),
    ],
)
def test_out_of_memory_names_the_flags(error, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sft.py"])
    with pytest.raises(SystemExit) as exit:
        command(mock.Mock(side_effect=error), sft.Config, {})
    assert exit.value.code == 2
    assert "lower --max_tokens, then --batch_size" in capsys.readouterr().err


def test_an_illegal_access_is_no_lack_of_memory(monkeypatch):
    monkeypatch.setattr("sys.argv", ["sft.py"])
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal"):
        command(mock.Mock(side_effect=error), sft.Config, {})


# ---- the device, and the processes ----


@pytest.fixture
def gpus(monkeypatch) -> mock.Mock:
    """Two GPUs; notes the order in which one is chosen and the group of processes is made."""
    calls = mock.Mock()
    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", calls.set_device)
    monkeypatch.setattr(torch.distributed, "init_process_group", calls.init_process_group)
    monkeypatch.setattr(processes.atexit, "register", calls.register)

    def made(*sizes, device="cpu"):
        if torch.device(device).type == "cpu":
            return empty(*sizes)
        if torch.device(device).index > 1:
            raise RuntimeError("CUDA error: invalid device ordinal")
        return mock.Mock(device=torch.device(device))

    monkeypatch.setattr(torch, "empty", made)
    return calls


@pytest.mark.parametrize(
    "flag, rank, expected",
    [("auto", "0", 0), ("cuda", "1", 1), ("auto", "1", 1), ("cuda:1", "0", 1), ("cuda:0", "1", 0)],
)
def test_a_gpu_that_is_resolved_becomes_the_current_one(flag, rank, expected, gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", rank)
    device = torch.device("cuda", expected)
    assert processes.resolve_device(flag) == device
    gpus.set_device.assert_called_once_with(device)


def test_a_cpu_leaves_the_gpus_alone(gpus):
    assert processes.resolve_device("cpu").type == "cpu"
    assert not gpus.set_device.called


def test_processes_join_with_a_gpu_each(gpus, monkeypatch):
    """NCCL for tensors of GPUs, gloo for those of CPUs and for objects; the GPU is chosen first."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    processes.join("auto")
    assert gpus.mock_calls == [
        mock.call.set_device(torch.device("cuda", 1)),
        mock.call.init_process_group("cpu:gloo,cuda:nccl"),
        mock.call.register(processes.leave),
    ]


def test_processes_on_the_cpus_of_a_machine_with_gpus(gpus, monkeypatch):
    """More of them than there are GPUs."""
    monkeypatch.setenv("LOCAL_RANK", "7")
    processes.join("cpu")
    assert gpus.mock_calls[0] == mock.call.init_process_group("gloo")
    with pytest.raises(UserError, match="cuda:7 is not available"):
        processes.join("cuda")


def test_torchrun_joins_with_the_flags_device(monkeypatch):
    joined = mock.Mock()
    monkeypatch.setattr(processes, "join", joined)
    monkeypatch.setattr("sys.argv", ["sft.py", "--device", "cpu"])
    with mock.patch.dict(os.environ, RANK="0"):
        command(lambda config: None, sft.Config, {})
    joined.assert_called_once_with("cpu")


@pytest.mark.parametrize("rank, world, attention", [(0, 1, "auto"), (0, 2, "plain"), (1, 2, None)])
def test_the_process_that_compares_asks_no_other(rank, world, attention, monkeypatch):
    """The others have ended by then: to wait for them would be to wait for ever."""
    compared = mock.Mock(return_value=[])
    for name, patch in {
        "compare": compared,
        "load_base": mock.Mock(),
        "Codec": mock.Mock(),
    }.items():
        monkeypatch.setattr(ppo, name, patch)
    monkeypatch.setattr(ppo, "load_policies", mock.Mock(return_value={}))
    monkeypatch.setattr(processes, "rank_and_world", lambda: (rank, world))
    ppo.main(ppo.Config(compare="x", shard=world > 1))
    configs = [call.args[0] for call in compared.call_args_list]
    assert [c.attention for c in configs] == ([attention] if attention else [])
    assert not any(c.shard for c in configs)


# ---- precision ----


@pytest.mark.parametrize(
    "flag, device, bf16, resolved, products",
    [
        ("auto", "cuda", True, "bfloat16", "highest"),
        ("auto", "cuda", False, "float32", "high"),
        ("float32", "cuda", True, "float32", "high"),
        ("bfloat16", "cuda", True, "bfloat16", "highest"),
        ("auto", "cpu", True, "float32", None),
        ("bfloat16", "cpu", True, "bfloat16", None),
    ],
)
def test_precision_by_device(flag, device, bf16, resolved, products, monkeypatch):
    """On a GPU bfloat16 where it has it; float32 products there are TF32; a CPU's stay exact."""
    with fake_gpu():
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
        config, low = program(lambda c: (c, torch.is_autocast_enabled(device)))(
            RunConfig(dtype=flag, device=device)
        )
        calls = [call.args[0] for call in torch.set_float32_matmul_precision.mock_calls]
    assert config.dtype == resolved and low == (resolved == "bfloat16")
    assert calls == ([products] if products else [])


@pytest.mark.parametrize("name", ["dtype", "attention"])
def test_an_unknown_choice_is_refused(name):
    with pytest.raises(UserError, match=f"--{name} x is unknown; choose from auto, "):
        program(lambda config: None)(RunConfig(**{name: "x"}))
