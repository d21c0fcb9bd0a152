"""Rollouts, updates and PPO iterations beside Hugging Face's and TRL's, on one core.

    pip install -e '.[bench]' && taskset -c 0 python tests/bench.py        # about ten minutes
    taskset -c 0 python tests/bench.py --sizes S --tasks generate ppo      # parts of it

Pairs run alternately in one process and one thread, trainers one after the other; a number is the
median of its runs in processor time, which other programs on the machine disturb less than they
disturb the clock. S is a GPT of 4 layers, 128 channels, 1,024 tokens; M is GPT-2 small. Weights are
random.
"""

import argparse
import copy
import multiprocessing
import os
import resource
import statistics
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

import torch  # noqa: E402

import model as model_module  # noqa: E402
import ppo  # noqa: E402
import sft  # noqa: E402
from data.tokenizer import get_tokenizer  # noqa: E402
from model import (  # noqa: E402
    GPT,
    Codec,
    GPTConfig,
    Run,
    RunConfig,
    ScalarModel,
    adam,
    batches,
    generate,
    generator,
    optimizer_step,
)

SIZES = {  # vocabulary, context, layers, heads, channels
    "S": (1024, 256, 4, 4, 128),
    "M": (50257, 1024, 12, 12, 768),
}
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
        return GPT.load(folder).eval(), theirs


def alternately(repeats: int, **runs: Callable[[], object]) -> dict[str, float]:
    """Median seconds of processor time of each, after one run that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            began = time.process_time()
            run()
            if repeat:
                seconds[name].append(time.process_time() - began)
    return {name: statistics.median(found) for name, found in seconds.items()}


def peak() -> float:
    """The most memory this process has held, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def row(task: str, work: int, ours: float, **peers: float) -> None:
    """A line of the table: our tokens a second, and how many times longer each peer takes."""
    times = "  ".join(f"{peer} {seconds / ours:5.2f}x" for peer, seconds in peers.items())
    print(f"{task:32s} {work / ours:9.0f} tok/s  {times}", flush=True)


# ---- rollouts


@contextmanager
def ending_after(limits: torch.Tensor | None) -> Iterator[int]:
    """Ours: response b ends after limits[b] tokens, by the end-of-text token it yields."""
    if limits is None:
        yield NO_EOS
        return
    real = model_module.draw

    def draw(*args) -> torch.Tensor:
        rows = sys._getframe(1).f_locals  # of generate: the prompt and the step of each row
        tokens = real(*args).clamp(min=1)
        return torch.where(rows["step"] + 1 >= limits[rows["who"]], 0, tokens)

    with mock.patch.object(model_module, "draw", draw):
        yield 0


class EndsAfter:
    """Theirs: a stopping criterion for each row."""

    def __init__(self, limits: torch.Tensor):
        self.limits = limits

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        return ids.shape[1] - PROMPT >= self.limits


def bench_generate(size: str, repeats: int) -> None:
    ours, theirs = both(size)
    for batch in (1, 16, 64) if size == "S" else (1, 16):
        prompts = torch.randint(1, 1000, (batch, PROMPT), generator=generator("prompts"))
        ragged = torch.randint(8, NEW + 1, (batch,), generator=generator("limits"))
        for name, limits in (("even", None), ("ragged", ragged)):
            flags = {"max_new_tokens": NEW, "do_sample": True, "top_k": 0, "pad_token_id": 0}
            flags |= {"eos_token_id": None, "attention_mask": torch.ones_like(prompts)}
            if limits is not None:
                flags["stopping_criteria"] = [EndsAfter(limits)]

            def run_ours(limits=limits, prompts=prompts) -> None:
                with ending_after(limits) as eos:
                    rows, seed = prompts.tolist(), generator("draw")
                    found = generate(ours, rows, NEW, eos, generator=seed)
                assert limits is None or [len(x) for x in found] == limits.tolist()

            def run_theirs(prompts=prompts, flags=flags, **cache) -> None:
                with torch.inference_mode():
                    theirs.generate(prompts, **flags, **cache)

            runs = {"ours": run_ours, "HF": run_theirs}
            if size == "S":
                runs["HF_static"] = lambda go=run_theirs: go(cache_implementation="static")
            seconds = alternately(repeats, **runs)
            work = int(limits.sum()) if limits is not None else batch * NEW
            row(f"generate {size} batch {batch} {name}", work, **seconds)


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
            ends.append(time.process_time())

    return StepTimes(), lambda: [b - a for a, b in zip(ends, ends[1:], strict=False)]


def quiet(folder: str, **flags) -> dict:
    base = {"output_dir": folder, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    base |= {"save_strategy": "no", "logging_strategy": "no", "dataloader_num_workers": 0}
    base |= {"bf16": False, "gradient_checkpointing": False}
    return base | flags


def bench_sft(size: str, repeats: int) -> None:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    batch = 32 if size == "S" else 8
    steps = repeats + 1
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

    with tempfile.TemporaryDirectory() as folder:
        times, seconds = step_times()
        flags = quiet(folder, per_device_train_batch_size=batch, max_steps=steps, max_grad_norm=1.0)
        data = Dataset.from_list([{"input_ids": text} for text in texts])
        theirs.train()
        trainer = Trainer(theirs, TrainingArguments(**flags), collate, data, callbacks=[times])
        with mock.patch.object(Trainer, "_get_train_sampler", lambda *_: range(len(texts))):
            trainer.train()

    optimizer, config, own = adam([(ours, 1e-5)]), RunConfig(), []
    for i in range(0, len(texts), batch):
        began = time.process_time()
        prompts, rest = [t[:1] for t in texts[i : i + batch]], [t[1:] for t in texts[i : i + batch]]
        losses = ((sft.sft_loss(ours, b), len(b.where)) for b in batches(prompts, rest, config))
        optimizer_step(optimizer, losses, sum(map(len, rest)))
        own.append(time.process_time() - began)
    row(f"sft {size} batch {batch}", tokens, sum(own[1:]), HF_Trainer=sum(seconds()))


# ---- PPO


PPO_NEW, PPO_EPOCHS = 48, 4
PPO_BATCH = {"S": 64, "M": 8}


def ppo_prompts() -> list[list[int]]:
    lengths = torch.randint(16, 33, (512,), generator=generator("prompts"))
    g = generator("ids")
    return [torch.randint(1, 1000, (int(n),), generator=g).tolist() for n in lengths]


def our_ppo(size: str, repeats: int) -> tuple[float, float]:
    """Seconds of an iteration of ppo.train, and the peak of this process's memory in GB."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batch, prompts = PPO_BATCH[size], ppo_prompts()
    policy, average = (GPT(GPTConfig(*SIZES[size])).eval() for _ in range(2))
    reference, score, value = copy.deepcopy(policy), ScalarModel(policy), ScalarModel(policy)
    codec = Codec(get_tokenizer("toy"), "{prompt}")
    codec.eos = NO_EOS  # responses of full length, as theirs
    models = ppo.Models(policy, reference, score.eval(), value.eval(), average, codec, [])
    config = ppo.Config(batch_size=batch, minibatch_size=batch, ppo_epochs=PPO_EPOCHS)
    config.max_new_tokens, config.missing_eos_score = PPO_NEW, float("nan")
    optimizer, own = adam([(policy, 3e-6), (value, 3e-6)]), []
    for step in range(repeats + 1):
        began = time.process_time()
        asked = prompts[step * batch % 448 :][:batch]
        rollout = ppo.sample_and_score(models, asked, config, 0.05, generator("ppo", step))
        ppo.update(models, optimizer, rollout, config, 1.0, ("ppo", step))
        own.append(time.process_time() - began)
    return statistics.median(own[1:]), peak()


def their_ppo(size: str, repeats: int) -> tuple[float, float]:
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers import models as tokenizer_models
    from transformers import (
        GPT2ForSequenceClassification,
        GPT2LMHeadModel,
        PreTrainedTokenizerFast,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    torch.set_num_threads(1)
    batch, (_, theirs) = PPO_BATCH[size], both(size)
    words = {f"w{i}": i for i in range(1023)} | {"<|endoftext|>": 1023}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(tokenizer_models.WordLevel(words, unk_token="w0")),
        eos_token="<|endoftext|>",
        pad_token="w0",
        padding_side="left",
    )
    heads = [GPT2ForSequenceClassification(theirs.config) for _ in range(2)]
    for head in heads:
        head.config.num_labels = 1
        head.score = torch.nn.Linear(theirs.config.n_embd, 1, bias=False)
    ref = GPT2LMHeadModel(theirs.config)
    ref.load_state_dict(theirs.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        times, seconds = step_times()
        flags = quiet(folder, per_device_train_batch_size=batch, gradient_accumulation_steps=1)
        flags |= {"num_mini_batches": 1, "num_ppo_epochs": PPO_EPOCHS, "response_length": PPO_NEW}
        flags |= {"total_episodes": batch * (repeats + 1), "num_sample_generations": 0}
        flags |= {"local_rollout_forward_batch_size": batch, "eval_strategy": "no"}
        data = Dataset.from_list([{"input_ids": p} for p in ppo_prompts()])
        trainer = PPOTrainer(
            args=PPOConfig(**flags),
            processing_class=tokenizer,
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
    found = []
    for run in (our_ppo, their_ppo):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found.append(pool.apply(run, (size, repeats)))
    (ours, our_peak), (theirs, their_peak) = found
    row(f"ppo {size} batch {PPO_BATCH[size]}", PPO_BATCH[size] * PPO_NEW, ours, TRL=theirs)
    print(f"ppo {size}: {ours:.2f} s an iteration, peaks {our_peak:.2f} GB, TRL's {their_peak:.2f}")


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
            row(f"generate {size} batch {batch}, {new} new", batch * new, **seconds)


# ---- checkpoints


def bench_checkpoint(size: str, _: int) -> None:
    """What ppo.py saves and resumes: policy, average, value model and their optimiser."""
    policy, _ = both(size)
    average, value = copy.deepcopy(policy), ScalarModel(policy)
    optimizer = adam([(policy, 1e-6), (value, 1e-6)])
    optimizer_step(
        optimizer, [(sum(p.sum() for m in (policy, value) for p in m.parameters()), 1)], 1
    )
    state = {"model": policy, "value_model": value, "optimizer": optimizer, "average": average}
    codec = Codec(get_tokenizer("toy"), "{prompt}")

    with tempfile.TemporaryDirectory() as folder:
        config, before = ppo.Config(out=folder, resume=True), peak()
        run = Run("ppo", config, folder, policy.config, codec, **state)
        began = time.perf_counter()
        run.save()
        saved, more = time.perf_counter(), peak() - before
        Run("ppo", config, folder, policy.config, codec, **state)
        seconds = time.perf_counter() - saved
        bytes = (Path(folder) / "checkpoint.pt").stat().st_size
    sizes = f"{bytes / 2**30:.3f} GB, {more:.2f} GB more memory"
    times = f"saved in {saved - began:.3f} s, resumed in {seconds:.3f} s"
    print(f"checkpoint {size}: {sizes}, {times}", flush=True)


TASKS = {"generate": bench_generate, "sft": bench_sft, "ppo": bench_ppo}
TASKS |= {"growth": bench_growth, "checkpoint": bench_checkpoint}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["generate", "sft", "ppo"])
    parser.add_argument("--repeats", type=int, default=0, help="default: 5 for S, 1 for M")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for size in args.sizes:
        for task in args.tasks:
            TASKS[task](size, args.repeats or {"S": 5, "M": 1}[size])


if __name__ == "__main__":
    main()
