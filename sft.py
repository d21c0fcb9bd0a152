"""Stage 1: supervised fine-tuning on demonstrations (InstructGPT, section 3.5), and before it
language-model pretraining, which makes the base model that everything is compared with.

    python sft.py                                # the toy world: pretrain, then fine-tune
    python sft.py --demonstrations mine.jsonl    # {"prompt": ..., "response": ...} a line
    python sft.py --init gpt2 --demonstrations mine.jsonl --template "Q: {prompt}\\nA:"
    python sft.py --init out/base --epochs 16 --dropout 0.2 --reward_model out/reward

The base model only ever continues text; the fine-tuned one imitates whoever wrote the
demonstrations, good and bad. The last command makes the paper's baseline (C.1): of 16 epochs, it
keeps the one whose answers the reward model scores highest. PPO starts from 2 epochs (C.3).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import data
from data import processes
from data.folders import claim, keep_apart
from data.presets import SFT as PRESETS
from data.processes import batch_at, generator, my_share, seed_of, shuffled, steps_per_epoch
from data.records import UserError, hold_out
from data.run import Free, Input, Positive, Rate, Run, RunConfig, command, name_unused, program
from data.tokenizer import Codec, Pairs, columns, cut_left, documents, fitting, get_tokenizer
from data.weights import is_hugging_face
from model import (
    GPT,
    Batch,
    GPTConfig,
    ScalarModel,
    adam,
    batches,
    clip_and_step,
    generate,
    lr_schedule,
    to_device,
    token_logprobs,
)

import torch


@dataclass
class Config(RunConfig):
    out: Free[str] = "out/sft"  # run folder of the fine-tuned model
    base: Free[Input] = "out/base"  # run folder of the base model that pretraining makes
    init: Input = "scratch"  # scratch: pretrain; or fine-tune this: a folder, gpt2, gpt2-medium …
    # the model from scratch
    tokenizer: Input = "toy"  # toy, gpt2 or a .tiktoken file
    template: str = "{prompt}\\n"  # what every prompt is put into; \n is a line break
    n_layer: Positive = 2  # transformer blocks
    n_head: Positive = 3  # attention heads
    n_embd: Positive = 96  # channels
    block_size: Positive = 256  # the longest sequence
    # pretraining
    texts: Input = "toy"  # documents: toy, or .txt, a folder of .txt, or .jsonl with {"text": ...}
    toy_texts: Positive = 14000  # how many toy documents
    pretrain_epochs: Positive = 1  # passes over the documents
    pretrain_batch_size: Positive = 8  # documents a step
    pretrain_lr: Rate = 6e-3  # peak learning rate
    # fine-tuning
    demonstrations: Input = "toy"  # toy, or a .jsonl file
    toy_demonstrations: Positive = 3000  # how many toy demonstrations
    epochs: Positive = 2  # passes over the demonstrations, as InstructGPT's start of PPO
    batch_size: Positive = 16  # demonstrations a step
    lr: Rate = 1.5e-3  # peak learning rate
    pretrain_mix: Rate = 0.1  # documents per demonstration, mixed in (InstructGPT C.3: 0.1)
    dropout: Annotated[float, 0, 0.99] = 0.0  # on residual branches (16-epoch baseline: 0.2)
    reward_model: Input = ""  # folder of a reward model: keep the epoch whose answers it likes best
    held_out: Annotated[float, 0, 0.9] = 0.02  # share of the data that only measures the loss


def sft_loss(model: GPT, batch: Batch) -> torch.Tensor:
    """Mean negative log-likelihood of the response tokens, end-of-text included: ()."""
    return -token_logprobs(model, batch)[0].mean()


def pretrain(config: Config, asked: list[str]) -> dict:
    """The base model: trained from scratch on documents, whose first token is their prompt."""
    codec = Codec(get_tokenizer(config.tokenizer), config.template)
    sizes = (config.block_size, config.n_layer, config.n_head, config.n_embd)
    torch.manual_seed(seed_of(config.seed, "init"))
    model = to_device(GPT(GPTConfig(codec.tokenizer.n_vocab, *sizes)), config)
    optimizer = adam([(model, config.pretrain_lr)])
    texts = data.texts(config.texts, config.toy_texts, config.seed)
    pairs = shuffled(documents(texts, codec, config.block_size), config.seed, "documents")
    held_out, training = hold_out(pairs, config.held_out, key=id)
    claim(config.base, config.resume)
    run = Run("base", config, config.base, model.config, codec, optimizer, model=model)
    passes = (config.pretrain_epochs, config.pretrain_batch_size)
    return train(run, held_out, training, *passes, asked)


def finetune(config: Config, rows: list[dict], asked: list[str]) -> dict:
    """Supervised fine-tuning of the base model, or of the model that --init names."""
    source = config.base if config.init == "scratch" else config.init
    codec, model = Codec.load(source, config.template), GPT.load(source, dropout=config.dropout)
    codec.check_vocabulary(model.config.vocab_size)
    model, block_size = to_device(model, config), model.config.block_size
    pairs = [pair for _, own in fitting(rows, codec, block_size) for pair in own]
    held_out, training = hold_out(pairs, config.held_out, key=lambda pair: tuple(pair[0]))
    if n_mixed := round(config.pretrain_mix * len(pairs)):
        world = (config.toy_texts, config.seed, config.demonstrations)
        texts = data.texts_to_mix(config.texts, *world)[:n_mixed]  # a text is at least one document
        training += documents(texts, codec, block_size)[:n_mixed]
    if config.reward_model:
        codec.check_same(config.reward_model)
    optimizer = adam([(model, config.lr)])
    claim(config.out, config.resume)
    read = {"base": config.base} if config.init == "scratch" else {}
    run = Run("sft", config, config.out, model.config, codec, optimizer, read, model=model)
    last = train(run, held_out, training, config.epochs, config.batch_size, asked)
    return keep_best_epoch(run) if config.reward_model else last


def train(
    run: Run, held_out: Pairs, pairs: Pairs, epochs: int, batch_size: int, asked: list[str]
) -> dict:
    """Trains on pairs; after each quarter, measures the held-out loss and samples answers."""
    config, model = run.config, run.modules["model"]
    steps = epochs * steps_per_epoch(pairs, batch_size)
    for step in run.steps(steps):
        chosen = batch_at(step, pairs, batch_size, config.seed, run.stage)
        total, loss_sum = sum(len(response) for _, response in chosen), 0.0
        torch.manual_seed(seed_of(*processes.rank_key(config.seed, run.stage, step)))  # dropout
        model.train()
        for batch in batches(*columns(my_share(chosen)), config):
            n = len(batch.decided_at)
            loss = sft_loss(model, batch) * (n / total)  # their sum is the mean over all tokens
            loss.backward()
            loss_sum += loss.detach() if n else 0.0
        lr = lr_schedule(step, steps, warmup=steps // 50)
        loss, (norm,) = clip_and_step(run.optimizer, loss_sum, lr)
        run.log({"loss": loss, "grad_norm": norm, "lr": run.optimizer.param_groups[0]["lr"]})
        if run.stage == "sft" and config.reward_model and (step + 1) % (steps // epochs) == 0:
            judge_epoch(run, held_out)
        if step % max(1, steps // 4) == 0 or step == steps - 1:
            run.log({"held_out_loss": mean_loss(model, held_out, config)})
            answers = answer(run, [run.codec.prompt(text) for text in asked], step)
            for text, tokens in zip(asked, answers, strict=True):
                run.sample(f"[step {step}] {text}", run.codec.text(tokens))
    return run.metrics[-1]


@torch.no_grad()
def mean_loss(model: GPT, pairs: Pairs, config: RunConfig) -> float:
    """Nats per response token, in eval mode."""
    model.eval()
    parts = list(batches(*columns(pairs), config))
    losses = torch.stack([sft_loss(model, batch) for batch in parts]).tolist()
    sums = [loss * len(batch.decided_at) for loss, batch in zip(losses, parts, strict=True)]
    return sum(sums) / sum(len(response) for _, response in pairs)


def answer(run: Run, prompts: list[list[int]], *key: int | str) -> list[list[int]]:
    """The model's responses of at most 80 tokens; a long prompt is cut from the left."""
    model, eos = run.modules["model"], run.codec.eos
    new = min(80, model.config.block_size // 2)
    prompts = [cut_left(prompt, model.config.block_size - new) for prompt in prompts]
    seed = generator(run.config.seed, run.stage, *key)
    return generate(model, prompts, new, eos, generator=seed)


@torch.no_grad()
def judge_epoch(run: Run, held_out: Pairs) -> None:
    """Scores answers to held-out prompts; keeps the weights if no earlier epoch scored as high."""
    config, model, (prompts, _) = run.config, run.modules["model"], columns(held_out)
    reward_model = ScalarModel.load(config.reward_model).to(model.head_weight.device).eval()
    responses = answer(run, prompts, "selection", run.step)
    size = reward_model.gpt.config.block_size
    prompts = [cut_left(p, size - len(r)) for p, r in zip(prompts, responses, strict=True)]
    scores = torch.cat([reward_model.score(b) for b in batches(prompts, responses, config)])
    score = scores.mean().item()
    if score > max(line.get("reward_score", float("-inf")) for line in run.metrics):
        weights = processes.unsharded_weights(model)
        run.extra["weights"] = {name: w.clone() for name, w in weights.items()}
    run.log({"reward_score": score, "held_out_loss": mean_loss(model, held_out, config)})


def keep_best_epoch(run: Run) -> dict:
    """Puts the kept weights back into the model, saves, and returns that epoch's metrics."""
    epochs = [line for line in run.metrics if "reward_score" in line]
    scores, losses = ([line[key] for line in epochs] for key in ("reward_score", "held_out_loss"))
    best, fitted = scores.index(max(scores)), losses.index(min(losses))
    for i, by in ((best, "reward score"), (fitted, "held-out loss")):
        print(f"best by {by}: epoch {i + 1}, score {scores[i]:.3f}, loss {losses[i]:.3f}")
    processes.load_unsharded(run.modules["model"], run.extra["weights"])
    run.amend({"reward_score": scores[best], "held_out_loss": losses[best]})
    return run.metrics[-1]


@program
def main(config: Config) -> dict:
    outs = {"out": config.out}
    if config.init == "scratch":
        outs["base"] = config.base
        if Path(config.base).resolve() == Path(config.out).resolve():
            raise UserError(f"--base and --out are both {config.out}; choose two folders")
    else:
        sizes = ("tokenizer", "n_layer", "n_head", "n_embd", "block_size")
        pretraining = ("pretrain_epochs", "pretrain_batch_size", "pretrain_lr")
        name_unused(config, "with --init", *sizes, *pretraining)
        if not is_hugging_face(config.init):
            name_unused(config, f"with --init {config.init}, which has its own", "template")
    keep_apart(config, outs)
    rows = data.demonstrations(config.demonstrations, config.toy_demonstrations, config.seed)
    asked = [row["prompt"] for row in rows[:3]]  # the first rows are held out
    metrics = {"base": pretrain(config, asked)} if config.init == "scratch" else {}
    metrics["sft"] = finetune(config, rows, asked)
    for stage, last in metrics.items():
        print(f"{stage}: held-out loss {last['held_out_loss']:.3f} nats per token")
    print(f"wrote {config.out}, samples in {config.out}/samples.txt; next: python reward.py")
    print(f"curves: python -m data.plot {config.out}")
    return metrics


if __name__ == "__main__":
    command(main, Config, PRESETS)
