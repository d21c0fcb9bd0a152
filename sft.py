"""Stage 1: supervised fine-tuning on demonstrations (InstructGPT, section 3.5), and before it
language-model pretraining, which makes the base model that everything is compared with.

    python sft.py                                   # the toy world: pretrain, then fine-tune
    python sft.py --init out/base                   # fine-tune an existing model
    python sft.py --demonstrations mine.jsonl       # {"prompt": ..., "response": ...} a line

The base model only ever continues text; the fine-tuned one imitates whoever wrote the
demonstrations, good and bad. Left out of the paper: choosing a checkpoint by its score under the
reward model, and the pretraining data mixed into fine-tuning.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data import toy
from data.records import load_demonstrations, load_texts
from data.tokenizer import get_tokenizer
from model import (
    GPT,
    Batch,
    Codec,
    GPTConfig,
    Run,
    RunConfig,
    adam,
    batch_at,
    batches,
    command,
    fit,
    generate,
    generator,
    lr_schedule,
    optimizer_step,
    precision,
    resolve_device,
    seed_of,
    shuffled,
    steps_per_epoch,
    token_logprobs,
)

Pair = tuple[list[int], list[int]]  # tokens of a prompt and of its response


@dataclass
class Config(RunConfig):
    out: str = "out/sft"  # run folder of the fine-tuned model
    base: str = "out/base"  # run folder of the base model that pretraining makes
    init: str = "scratch"  # scratch: pretrain a base model; or the folder of a model to fine-tune
    # the model from scratch
    tokenizer: str = "toy"  # toy, gpt2 or a .tiktoken file
    template: str = "{prompt}\\n"  # what every prompt is put into; \n is a line break
    n_layer: int = 2  # transformer blocks
    n_head: int = 4  # attention heads
    n_embd: int = 128  # channels
    block_size: int = 256  # the longest sequence
    # pretraining
    texts: str = "toy"  # documents: toy, or .txt, a folder of .txt, or .jsonl with {"text": ...}
    toy_texts: int = 16000  # how many toy documents
    pretrain_epochs: int = 1  # passes over the documents
    pretrain_batch_size: int = 8  # documents a step
    pretrain_lr: float = 4e-3  # peak learning rate
    # fine-tuning
    demonstrations: str = "toy"  # toy, or a .jsonl file
    toy_demonstrations: int = 4500  # how many toy demonstrations
    epochs: int = 2  # passes over the demonstrations, as InstructGPT's start of PPO
    batch_size: int = 32  # demonstrations a step
    lr: float = 1.5e-3  # peak learning rate
    dropout: float = 0.0  # on residual branches; the paper's 16-epoch baselines use 0.2
    held_out: float = 0.03  # share of documents and demonstrations that only measures the loss


def sft_loss(model: GPT, batch: Batch) -> Tensor:
    """Mean negative log-likelihood of the response tokens, end-of-text included."""
    return -token_logprobs(model, batch)[0].mean()


# --------------------------------------------------------------------------------------------------
# Training: pretraining is fine-tuning on documents, whose first token is the prompt


def documents(texts: list[str], codec: Codec, block_size: int) -> list[Pair]:
    """Documents in pieces of at most block_size tokens; a piece begins with the last one's end."""
    pairs = []
    for text in texts:
        tokens = codec.response(text)
        for i in range(0, len(tokens) - 1, block_size - 1):
            pairs.append((tokens[i : i + 1], tokens[i + 1 : i + block_size]))
    return pairs


@torch.no_grad()
def mean_loss(model: GPT, pairs: Sequence[Pair], config: RunConfig) -> float:
    """Nats per response token."""
    model.eval()
    loss = tokens = 0.0
    for batch in batches(*map(list, zip(*pairs, strict=True)), config):
        loss += sft_loss(model, batch).item() * len(batch.where)
        tokens += len(batch.where)
    return loss / tokens


def train(run: Run, pairs: list[Pair], epochs: int, batch_size: int, asked: list[str]) -> dict:
    """Epochs over shuffled pairs; held-out loss and three samples eight times on the way."""
    config, codec = run.config, run.codec
    model, optimizer = run.state["model"], run.state["optimizer"]
    held_out = max(1, int(config.held_out * len(pairs)))
    held_out, pairs = pairs[:held_out], pairs[held_out:]
    steps = epochs * steps_per_epoch(pairs, batch_size)
    for step in run.steps(steps):
        chosen = batch_at(step, pairs, batch_size, config.seed, run.stage)
        prompts, responses = map(list, zip(*chosen, strict=True))
        torch.manual_seed(seed_of(config.seed, run.stage, step))  # dropout
        model.train()
        losses = ((sft_loss(model, b), len(b.where)) for b in batches(prompts, responses, config))
        lr = lr_schedule(step, steps, warmup=steps // 50)
        loss, norms = optimizer_step(optimizer, losses, sum(map(len, responses)), lr)
        run.log({"loss": loss, "grad_norm": norms[0], "lr": optimizer.param_groups[0]["lr"]})
        if step % max(1, steps // 8) == 0 or step == steps - 1:
            run.log({"held_out_loss": mean_loss(model, held_out, config)})
            prompts = [codec.prompt(text) for text in asked]
            seed = generator(config.seed, run.stage, step)
            new = min(80, model.config.block_size - max(map(len, prompts)))
            answers = generate(model, prompts, new, codec.eos, generator=seed)
            for text, answer in zip(asked, answers, strict=True):
                run.sample(f"[step {step}] {text}", codec.text(answer))
    return run.metrics


def pretrain(config: Config, asked: list[str]) -> dict:
    """Language modelling from scratch; the base model is in config.base afterwards."""
    codec = Codec(get_tokenizer(config.tokenizer), config.template)
    toy_world = config.texts == "toy"
    texts = toy.pages(config.toy_texts, config.seed) if toy_world else load_texts(config.texts)
    sizes = (config.block_size, config.n_layer, config.n_head, config.n_embd)
    torch.manual_seed(seed_of(config.seed, "init"))
    model = GPT(GPTConfig(codec.tokenizer.n_vocab, *sizes)).to(resolve_device(config.device))
    state = {"model": model, "optimizer": adam([(model, config.pretrain_lr)])}
    run = Run("base", config, config.base, model.config, codec, **state)
    pairs = shuffled(documents(texts, codec, config.block_size), config.seed, "documents")
    return train(run, pairs, config.pretrain_epochs, config.pretrain_batch_size, asked)


def finetune(config: Config, rows: list[dict], asked: list[str]) -> dict:
    """Supervised fine-tuning of the base model, or of the one that --init names."""
    source = config.base if config.init == "scratch" else config.init
    codec, model = Codec.load(source), GPT.load(source, dropout=config.dropout)
    model = model.to(resolve_device(config.device))
    pairs = []
    for row in rows:
        prompt, response = codec.prompt(row["prompt"]), codec.response(row["response"])
        if len(response) < model.config.block_size:
            pairs.append(fit(prompt, response, model.config.block_size))
    if len(pairs) < len(rows):
        print(f"{len(rows) - len(pairs)} responses longer than the context are left out")
    state = {"model": model, "optimizer": adam([(model, config.lr)])}
    run = Run("sft", config, config.out, model.config, codec, **state)
    return train(run, pairs, config.epochs, config.batch_size, asked)


@precision
def main(config: Config) -> dict:
    if config.demonstrations == "toy":
        rows = toy.demonstrations(config.toy_demonstrations, config.seed)
        asked = [row["prompt"] for row in toy.prompts(3, config.seed, "dev")]
    else:
        rows = load_demonstrations(config.demonstrations)
        asked = [row["prompt"] for row in rows[:3]]  # the first rows are held out
    metrics = {}
    if config.init == "scratch":
        metrics["base"] = pretrain(config, asked)
    metrics["sft"] = finetune(config, rows, asked)
    for stage, last in metrics.items():
        print(f"{stage}: held-out loss {last['held_out_loss']:.3f} nats per token")
    print(f"wrote {config.out}, samples in {config.out}/samples.txt; next: python reward.py")
    return metrics


if __name__ == "__main__":
    command(main, Config)
