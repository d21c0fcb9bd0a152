"""Rollouts, updates and PPO iterations beside Hugging Face's and TRL's, on one core.

    pip install -e '.[bench]' && taskset -c 0 python tests/bench.py        # about ten minutes
    taskset -c 0 python tests/bench.py --sizes S --tasks generate ppo      # parts of it
    taskset -c 0 python tests/bench.py --tasks result          # from nothing to the result, 3 seeds
    python tests/bench.py --gpu                      # larger batches, in bfloat16, on a GPU

Pairs run alternately in one process and one thread, trainers one after the other; a number is the
median of its runs in processor time, which other programs on the machine disturb less than they
disturb the clock. S is a GPT of 4 layers, 128 channels, 1,024 tokens; M is GPT-2 small, L medium.
Weights are random. "Floor": the share of our time that the matrix products alone would take at the
rate of one large product, or the reading of all weights where that takes longer. No GPU has run
this yet.
"""

import argparse
import copy
import functools
import json
import multiprocessing
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "TRANSFORMERS_VERBOSITY": "error"}
sys.path.insert(0, str(Path(__file__).parents[1]))

import model as model_module  # noqa: E402
import ppo  # noqa: E402
import sft  # noqa: E402
from data.processes import generator  # noqa: E402
from data.run import Run, RunConfig  # noqa: E402
from data.tokenizer import Codec, get_tokenizer  # noqa: E402
from model import (  # noqa: E402
    GPT,
    GPTConfig,
    ScalarModel,
    adam,
    batches,
    clip_and_step,
    generate,
)

import torch  # noqa: E402

SIZES = {  # vocabulary, context, layers, heads, channels
    "S": (1024, 256, 4, 4, 128),
    "M": (50257, 1024, 12, 12, 768),
    "L": (50257, 1024, 24, 16, 1024),
}
GPU = "--gpu" in sys.argv
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
GENERATE_BATCH = {"S": (1, 16, 64), "M": (1, 16), "L": (1,)}
SFT_BATCH, PPO_BATCH = {"S": 32, "M": 8, "L": 8}, {"S": 64, "M": 8, "L": 8}
if GPU:
    GENERATE_BATCH = dict.fromkeys(SIZES, (16, 256))
    SFT_BATCH, PPO_BATCH = dict.fromkeys(SIZES, 64), dict.fromkeys(SIZES, 512)
PPO_NEW, PPO_EPOCHS = 48, 4
PROMPT, NEW = 32, 64
NO_EOS = 10**9


def both(size: str) -> tuple[GPT, Any]:
    """The same network twice: ours, and a GPT2LMHeadModel of transformers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    names = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = GPT2Config(**dict(zip(names, SIZES[size], strict=True)), **off, **ends)
    theirs = GPT2LMHeadModel(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return GPT.load(folder).eval().to(DEVICE), theirs.to(DEVICE)


def our_precision(low: bool = GPU) -> torch.autocast:
    return torch.autocast(DEVICE, torch.bfloat16, enabled=low, cache_enabled=False)


def clock() -> float:
    """Seconds: of the processor or, where there is a GPU, of the wall once it has done its work."""
    if not GPU:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def alternately(repeats: int, **runs: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each, after one run that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            began = clock()
            run()
            if repeat:
                seconds[name].append(clock() - began)
    return {name: statistics.median(found) for name, found in seconds.items()}


def peak() -> float:
    """The most memory this process has held, in GB."""
    if GPU:
        return torch.cuda.max_memory_allocated() / 2**30
    if Path("/proc/self/status").exists():  # ru_maxrss begins with what the parent held
        held = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(held[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def row(task: str, work: int, floor: float, ours: float, **peers: float) -> None:
    """A line of the table: our tokens a second, the floor in seconds as a share of our time, and
    how many times longer each peer takes."""
    times = "  ".join(f"{peer} {seconds / ours:5.2f}x" for peer, seconds in peers.items())
    print(f"{task:32s} {work / ours:9.0f} tok/s  floor {floor / ours:4.0%}  {times}", flush=True)


# ---- floors


def parameters(size: str) -> tuple[int, int]:
    """Of the blocks' matrices, and of the head's."""
    vocab, _, n_layer, _, n_embd = SIZES[size]
    return 12 * n_layer * n_embd**2, vocab * n_embd


@functools.cache
def rates(size: str) -> tuple[float, float]:
    """Operations a second of a large matrix product; bytes a second of one row times as many
    numbers as the model has weights."""
    n = 8192 if GPU else 1024
    square = torch.randn(n, n, device=DEVICE, dtype=DTYPE)
    tall = torch.randn(sum(parameters(size)) // n, n, device=DEVICE, dtype=DTYPE)
    product = functools.partial(torch.nn.functional.linear, square, square)
    with torch.inference_mode():
        seconds = alternately(9, product=product, reading=lambda: tall @ square[0])
    bytes = tall.numel() * tall.element_size()
    print(f"{size}: {2e-9 * n**3 / seconds['product']:.0f} GFLOP/s, "
          f"{1e-9 * bytes / seconds['reading']:.0f} GB/s")  # fmt: skip
    return 2 * n**3 / seconds["product"], bytes / seconds["reading"]


def decode_floor(size: str, prompt_tokens: int, limits: list[int]) -> float:
    """Seconds for responses of these lengths, of which those that have not ended share a step."""
    (flops, bandwidth), (body, head) = rates(size), parameters(size)
    reading = (body + head) * DTYPE.itemsize / bandwidth
    live = [sum(limit > step for limit in limits) for step in range(max(limits))]
    steps = sum(max(reading, 2 * (body + head) * rows / flops) for rows in live)
    return 2 * body * prompt_tokens / flops + steps


def training_floor(size: str, tokens: int, predicted: int, passes: int = 3) -> float:
    """Seconds of a forward pass, which counts 1, and of its backward pass, which counts 2."""
    body, head = parameters(size)
    return 2 * passes * (body * tokens + head * predicted) / rates(size)[0]


# ---- rollouts


@contextmanager
def ending_after(limits: torch.Tensor | None) -> Iterator[int]:
    """Ours: response b ends after limits[b] tokens, by the end-of-text token it yields."""
    if limits is None:
        yield NO_EOS
        return
    real = model_module.draw

    def draw(*args) -> torch.Tensor:
        rows = sys._getframe(1).f_locals  # of generate's sample: each row's prompt and its step
        tokens = real(*args).clamp(min=1)
        last = torch.tensor(rows["step"]) + 1 >= limits[rows["chosen"]]
        return torch.where(last.to(DEVICE), 0, tokens)

    with mock.patch.object(model_module, "draw", draw):
        yield 0


class EndsAfter:
    """Theirs: a stopping criterion for each row."""

    def __init__(self, limits: torch.Tensor):
        self.limits = limits.to(DEVICE)

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        return ids.shape[1] - PROMPT >= self.limits


def bench_generate(size: str, repeats: int) -> None:
    ours, theirs = both(size)
    theirs.to(DTYPE)
    for batch in GENERATE_BATCH[size]:
        prompts = torch.randint(1, 1000, (batch, PROMPT), generator=generator("prompts"))
        ragged = torch.randint(8, NEW + 1, (batch,), generator=generator("limits"))
        for name, limits in (("even", None), ("ragged", ragged)):
            flags = {"max_new_tokens": NEW, "do_sample": True, "top_k": 0, "pad_token_id": 0}
            mask = torch.ones_like(prompts, device=DEVICE)
            flags |= {"eos_token_id": None, "attention_mask": mask}
            if limits is not None:
                flags["stopping_criteria"] = [EndsAfter(limits)]

            def run_ours(low=GPU, limits=limits, prompts=prompts) -> None:
                with ending_after(limits) as eos, our_precision(low):
                    rows, seed = prompts.tolist(), generator("draw")
                    found = generate(ours, rows, NEW, eos, generator=seed)
                assert limits is None or [len(x) for x in found] == limits.tolist()

            def run_theirs(prompts=prompts, flags=flags, **cache) -> None:
                with torch.inference_mode():
                    theirs.generate(prompts.to(DEVICE), **flags, **cache)

            runs = {"ours": run_ours, "HF": run_theirs}
            if not GPU:
                runs["ours_in_bf16"] = lambda go=run_ours: go(low=True)
            if size == "S":
                runs["HF_static"] = lambda go=run_theirs: go(cache_implementation="static")
            seconds = alternately(repeats, **runs)
            lengths = [NEW] * batch if limits is None else limits.tolist()
            floor = decode_floor(size, prompts.numel(), lengths)
            row(f"generate {size} batch {batch} {name}", sum(lengths), floor, **seconds)


# ---- fine-tuning


def ragged_texts(size: str, n: int) -> list[list[int]]:
    """Log-normal lengths: mean 40 up to 200 tokens for S, mean 120 up to 512 for M."""
    mean, most = (40, 200) if size == "S" else (120, 512)
    draws = torch.randn(n, generator=generator("lengths")) * 0.8
    lengths = (draws.exp() * mean / 1.377).int().clamp(4, most)  # exp(0.8² / 2) = 1.377
    g = generator("texts")
    return [torch.randint(1, 1000, (int(x),), generator=g).tolist() for x in lengths]


def step_times() -> tuple[Any, Callable[[], list[float]]]:
    """A callback for trainers, and the seconds of every step but the first."""
    from transformers import TrainerCallback

    ends: list[float] = []

    class StepTimes(TrainerCallback):
        def on_step_end(self, *_, **__) -> None:
            ends.append(clock())

    return StepTimes(), lambda: [b - a for a, b in zip(ends, ends[1:], strict=False)]


def quiet(folder: str, **flags) -> dict:
    base = {"output_dir": folder, "use_cpu": not GPU, "report_to": "none", "disable_tqdm": True}
    base |= {"save_strategy": "no", "logging_strategy": "no", "dataloader_num_workers": 0}
    base |= {"bf16": GPU, "gradient_checkpointing": False}
    return base | flags


def word_tokenizer() -> Any:
    """1,024 words, for TRL, which wants one; w0 is the pad and the last is end of text."""
    from tokenizers import Tokenizer
    from tokenizers import models as tokenizer_models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(1023)} | {"<|endoftext|>": 1023}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(tokenizer_models.WordLevel(words, unk_token="w0")),
        eos_token="<|endoftext|>",
        pad_token="w0",
        padding_side="left",
    )


def bench_sft(size: str, repeats: int) -> None:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments
    from trl import SFTConfig, SFTTrainer

    batch, steps = SFT_BATCH[size], repeats + 1
    ours, theirs = both(size)
    texts = ragged_texts(size, batch * steps)
    tokens = sum(len(t) - 1 for t in texts[batch:])  # the first step does not count

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        longest = max(len(r["input_ids"]) for r in rows)
        pads = [[0] * (longest - len(r["input_ids"])) for r in rows]
        ids = torch.tensor([r["input_ids"] + p for r, p in zip(rows, pads, strict=True)])
        mask = torch.tensor([[1] * (longest - len(p)) + p for p in pads])
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": ids.masked_fill(mask == 0, -100),
        }

    peers, data = {}, Dataset.from_list([{"input_ids": text} for text in texts])
    for name in ("HF_Trainer", "TRL"):
        times, seconds = step_times()
        trained = copy.deepcopy(theirs).train()
        with tempfile.TemporaryDirectory() as folder:
            flags = quiet(folder, per_device_train_batch_size=batch, max_steps=steps)
            if name == "TRL":
                args = SFTConfig(**flags, max_length=None)
                trainer = SFTTrainer(
                    trained, args, None, data, processing_class=word_tokenizer(), callbacks=[times]
                )
            else:
                args = TrainingArguments(**flags)
                trainer = Trainer(trained, args, collate, data, callbacks=[times])
            with mock.patch.object(Trainer, "_get_train_sampler", lambda *_: range(len(texts))):
                trainer.train()
        peers[name] = sum(seconds())

    optimizer, config = adam([(ours, 1e-5)]), RunConfig()

    def steps_in(low: bool) -> float:
        own = []
        for i in range(0, len(texts), batch):
            began = clock()
            prompts, rest = zip(*((t[:1], t[1:]) for t in texts[i : i + batch]), strict=True)
            total, loss_sum = sum(map(len, rest)), 0.0
            for part in batches(list(prompts), list(rest), config):
                with our_precision(low):
                    loss = sft.sft_loss(ours, part) * (len(part.decided_at) / total)
                loss.backward()
                loss_sum += loss.item()
            clip_and_step(optimizer, loss_sum)
            own.append(clock() - began)
        return sum(own[1:])

    floor, own = training_floor(size, tokens, tokens), steps_in(GPU)
    if not GPU:
        peers["ours_in_bf16"] = steps_in(True)
    row(f"sft {size} batch {batch}", tokens, floor, own, **peers)


# ---- PPO


def ppo_prompts() -> list[list[int]]:
    lengths = torch.randint(16, 33, (512,), generator=generator("prompts"))
    g = generator("ids")
    return [torch.randint(1, 1000, (int(n),), generator=g).tolist() for n in lengths]


def our_ppo(size: str, repeats: int, low: bool = GPU) -> tuple[float, float]:
    """Seconds of an iteration of ppo.train, and the peak of this process's memory in GB."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batch, prompts = PPO_BATCH[size], ppo_prompts()
    policy, average = (GPT(GPTConfig(*SIZES[size])).eval() for _ in range(2))
    reference, score, value = copy.deepcopy(policy), ScalarModel(policy), ScalarModel(policy)
    for network in (policy, average, reference, score, value):
        network.to(DEVICE)
    codec = Codec(get_tokenizer("toy"), "{prompt}")
    codec.eos = NO_EOS  # responses of full length, as theirs
    models = ppo.Models(policy, reference, score.eval(), value.eval(), average, codec, [])
    config = ppo.Config(batch_size=batch, minibatch_size=batch, ppo_epochs=PPO_EPOCHS)
    config.max_new_tokens, config.missing_eos_score = PPO_NEW, float("nan")
    optimizer, own = adam([(policy, 3e-6), (value, 3e-6)]), []
    for step in range(repeats + 1):
        began = clock()
        asked = prompts[step * batch % len(prompts) :][:batch]
        with our_precision(low):
            rollout = ppo.make_rollout(models, asked, config, 0.05, generator("ppo", step))
            ppo.update(models, optimizer, rollout, config, 1.0, ("ppo", step))
        own.append(clock() - began)
    return statistics.median(own[1:]), peak()


def their_ppo(size: str, repeats: int) -> tuple[float, float]:
    from datasets import Dataset
    from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    torch.set_num_threads(1)
    batch, (_, theirs) = PPO_BATCH[size], both(size)
    heads = [GPT2ForSequenceClassification(theirs.config) for _ in range(2)]
    for head in heads:
        head.config.num_labels = 1
        head.score = torch.nn.Linear(theirs.config.n_embd, 1, bias=False)
    ref = GPT2LMHeadModel(theirs.config)
    ref.load_state_dict(theirs.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        times, seconds = step_times()
        at_once = min(batch, 64)
        flags = quiet(folder, per_device_train_batch_size=at_once)
        flags["gradient_accumulation_steps"] = batch // at_once
        flags |= {"num_mini_batches": 1, "num_ppo_epochs": PPO_EPOCHS, "response_length": PPO_NEW}
        flags |= {"total_episodes": batch * (repeats + 1), "num_sample_generations": 0}
        flags |= {"local_rollout_forward_batch_size": at_once, "eval_strategy": "no"}
        data = Dataset.from_list([{"input_ids": p} for p in ppo_prompts()])
        trainer = PPOTrainer(
            args=PPOConfig(**flags),
            processing_class=word_tokenizer(),
            model=theirs,
            ref_model=ref,
            reward_model=heads[0],
            value_model=heads[1],
            train_dataset=data,
            eval_dataset=data,
            callbacks=[times],
        )
        trainer.train()
    return statistics.median(seconds()), peak()


def bench_ppo(size: str, repeats: int) -> None:
    """Each in a process of its own, so that its memory is its own."""
    runs: dict[str, Callable] = {"ours": our_ppo, "TRL": their_ppo}
    if not GPU:
        runs["ours_in_bf16"] = functools.partial(our_ppo, low=True)
    seconds, peaks = {}, []
    for name, run in runs.items():
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds[name], most = pool.apply(run, (size, repeats))
        peaks.append(f"{name} {most:.2f} GB")
    batch, prompts = PPO_BATCH[size], sum(map(len, ppo_prompts()[: PPO_BATCH[size]]))
    new = batch * PPO_NEW
    # policy and reference score every token of the responses, reward and value model one number
    scoring = [training_floor(size, prompts + new, n, passes=1) for n in (new, new, 0, 0)]
    updates = [training_floor(size, prompts + new, n) for n in (new, 0)]
    floor = (
        decode_floor(size, prompts, [PPO_NEW] * batch) + sum(scoring) + PPO_EPOCHS * sum(updates)
    )
    row(f"ppo {size} batch {batch}", new, floor, **seconds)
    print(
        f"ppo {size}: {seconds['ours']:.2f} s an iteration; peaks: {', '.join(peaks)}", flush=True
    )


# ---- growth


def bench_growth(size: str, repeats: int) -> None:
    ours, _ = both(size)
    for new in (32, 64, 128, 200 if size == "S" else 512):
        for batch in (1, 16, 64, 256) if size == "S" else (1, 16):
            prompts = [list(range(1, 33))] * batch
            seconds = alternately(
                max(1, repeats // 2),
                ours=lambda new=new, p=prompts: generate(
                    ours, p, new, NO_EOS, generator=generator("x")
                ),
            )
            floor = decode_floor(size, len(prompts) * PROMPT, [new] * batch)
            row(f"generate {size} batch {batch}, {new} new", batch * new, floor, **seconds)


# ---- checkpoints


def bench_checkpoint(size: str, _: int) -> None:
    """What ppo.py saves and resumes: policy, average, value model and their optimiser."""
    policy, _ = both(size)
    average, value = copy.deepcopy(policy), ScalarModel(policy)
    optimizer = adam([(policy, 1e-6), (value, 1e-6)])
    sum(p.sum() for m in (policy, value) for p in m.parameters()).backward()
    clip_and_step(optimizer, loss=0.0)
    modules = {"model": policy, "value_model": value, "average": average}
    codec = Codec(get_tokenizer("toy"), "{prompt}")

    with tempfile.TemporaryDirectory() as folder:
        config, before = ppo.Config(out=folder, resume=True), peak()
        run = Run("ppo", config, folder, policy.config, codec, optimizer, **modules)
        began = time.perf_counter()
        run.save()
        saved, more = time.perf_counter(), peak() - before
        Run("ppo", config, folder, policy.config, codec, optimizer, **modules)
        seconds = time.perf_counter() - saved
        bytes = (Path(folder) / "checkpoint.pt").stat().st_size
    sizes = f"{bytes / 2**30:.3f} GB, {more:.2f} GB more memory"
    times = f"saved in {saved - began:.3f} s, resumed in {seconds:.3f} s"
    print(f"checkpoint {size}: {sizes}, {times}", flush=True)


# ---- from nothing to the result


def timed(script: str, *flags: str) -> tuple[float, float]:
    """Seconds of the processor and of the wall that a stage takes; of its output only progress."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, Path(__file__).parents[1] / script, *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return spent, time.perf_counter() - began


def run_of(seed: int) -> tuple[list[float], dict[str, dict], dict[str, list]]:
    """The front page's command, on development prompts: the processor's seconds of each stage, the
    rows of the comparison, and the accuracies of the reward model."""
    with tempfile.TemporaryDirectory() as folder:
        names = {"sft": "sft", "base": "base", "reward_model": "reward"}
        flags = {flag: f"--{flag}={folder}/{name}" for flag, name in names.items()}
        own = [f"--out={folder}/{stage}" for stage in ("sft", "reward", "ppo")]
        seed_flag = f"--seed={seed}"
        times = [
            timed("sft.py", seed_flag, own[0], flags["base"]),
            timed("reward.py", seed_flag, own[1], flags["sft"]),
            timed("ppo.py", seed_flag, own[2], *flags.values(), "--split=dev"),
        ]
        rows = json.loads(Path(folder, "ppo", "results.json").read_text())["rows"]
        report = json.loads(Path(folder, "reward", "report.json").read_text())
    spent, walls = map(list, zip(*times, strict=True))
    shown = " + ".join(f"{seconds:.0f}" for seconds in spent)
    total, wall = sum(spent), sum(walls)
    print(f"seed {seed}: {shown} = {total:.0f} s of the processor, {wall:.0f} s in all", flush=True)
    return spent, {row["model"]: row for row in rows}, report["pairs"]


def bench_result(seeds: list[int]) -> None:
    """What the front page's command takes, and whether it still shows what the front page says."""
    seconds, found, pairs = zip(*map(run_of, seeds), strict=True)
    mean = statistics.mean

    def each(model: str, key: str = "gold") -> list[float]:
        return [rows[model][key] for rows in found]

    def above(high: list[float], low: list[float], by: float = 0.0) -> bool:
        return all(a > b + by for a, b in zip(high, low, strict=True))

    def line(what: str, holds: bool, *numbers: list[float]) -> None:
        shown = ", ".join(" / ".join(f"{x:.2f}" for x in values) for values in numbers)
        print(f"{'holds' if holds else 'FAILS'}  {what}: {shown}")

    base, prompted, sft, best, no_kl = map(each, ("base", "prompted", "sft", "ppo", "ppo_no_kl"))
    line("base model: rubric at most 0.3", max(base) <= 0.3, base)
    line("prompted: more than 1 above the base model", above(prompted, base, 1), prompted)
    line("fine-tuned: above prompted", above(sft, prompted), sft)
    line("PPO: more than 2 above fine-tuned", above(best, sft, 2), best)
    line("PPO: at least 8.5 in the mean", mean(best) >= 8.5, best)
    wins, kl = each("ppo", "win_rate"), each("ppo", "kl")
    line("PPO: win rate at least 0.85 in the mean", mean(wins) >= 0.85, wins)
    line("PPO: KL at most 4 nats in the mean", mean(kl) <= 4, kl)
    score, no_kl_score = each("ppo", "score"), each("ppo_no_kl", "score")
    line("no penalty: score above PPO's", above(no_kl_score, score), no_kl_score, score)
    line("no penalty: rubric below fine-tuned", above(sft, no_kl), no_kl)
    for flaw in ("wrong subject", "wrong mood"):
        seen = [report[f"prefers a perfect response to: {flaw}"][0] for report in pairs]
        line(f"reward model: sees a {flaw} in 0.97, in the mean", mean(seen) >= 0.97, seen)
    stages = " + ".join(f"{mean(spent):.0f}" for spent in zip(*seconds, strict=True))
    print(f"sft.py + reward.py + ppo.py: {stages} = {mean(map(sum, seconds)):.0f} s a seed")


TASKS = {"generate": bench_generate, "sft": bench_sft, "ppo": bench_ppo}
TASKS |= {"growth": bench_growth, "checkpoint": bench_checkpoint}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--sizes", nargs="+", choices=SIZES, default=["M", "L"] if GPU else ["S", "M"]
    )
    parser.add_argument("--gpu", action="store_true", help="on a GPU, in bfloat16")
    parser.add_argument("--tasks", nargs="+", choices=[*TASKS, "result"], default=[*TASKS][:3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of result")
    parser.add_argument("--repeats", type=int, default=0, help="default: 5 for S, else 1")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if "result" in args.tasks:
        bench_result(args.seeds)
    for size in args.sizes:
        for task in (task for task in args.tasks if task in TASKS):
            TASKS[task](size, args.repeats or (5 if size == "S" else 1))


if __name__ == "__main__":
    main()
