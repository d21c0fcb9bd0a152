"""Stage 1: supervised fine-tuning on demonstrations (InstructGPT, section 3.5), and before it
language-model pretraining, which makes the base model that everything is compared with.

    python sft.py                                   # the toy world: pretrain, then fine-tune
    python sft.py --init out/base                   # fine-tune an existing model
    python sft.py --init gpt2 --demonstrations mine.jsonl --template "Q: {prompt}\\nA:"
    python sft.py --demonstrations mine.jsonl       # {"prompt": ..., "response": ...} a line
    python sft.py --init out/base --epochs 16 --dropout 0.2 --reward_model out/reward

The base model only ever continues text; the fine-tuned one imitates whoever wrote the
demonstrations, good and bad. The last command makes the paper's baseline (C.1): 16 epochs, of which
the one is kept whose answers the reward model scores highest. PPO starts from 2 epochs (C.3).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data import toy
from data.presets import SFT as PRESETS
from data.records import load_demonstrations, load_texts
from data.tokenizer import get_tokenizer
from model import (
    GPT,
    Batch,
    Codec,
    GPTConfig,
    Pair,
    Run,
    RunConfig,
    ScalarModel,
    adam,
    batch_at,
    batches,
    budget,
    command,
    documents,
    fit,
    generate,
    generator,
    lr_schedule,
    my_place,
    my_share,
    optimizer_step,
    placed,
    precision,
    resolve_device,
    restore,
    seed_of,
    shuffled,
    state_of,
    steps_per_epoch,
    token_logprobs,
)


@dataclass
class Config(RunConfig):
    out: str = "out/sft"  # run folder of the fine-tuned model
    base: str = "out/base"  # run folder of the base model that pretraining makes
    init: str = "scratch"  # scratch: pretrain; or fine-tune this: a folder, gpt2, gpt2-medium …
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
    pretrain_mix: float = 0.1  # documents per demonstration, mixed in (InstructGPT C.3: 0.1)
    dropout: float = 0.0  # on residual branches; the paper's 16-epoch baselines use 0.2
    reward_model: str = ""  # folder of a reward model: keep the epoch whose answers it scores best
    held_out: float = 0.03  # share of documents and demonstrations that only measures the loss


def sft_loss(model: GPT, batch: Batch) -> Tensor:
    """Mean negative log-likelihood of the response tokens, end-of-text included."""
    return -token_logprobs(model, batch)[0].mean()


# --------------------------------------------------------------------------------------------------
# Training: pretraining is fine-tuning on documents, whose first token is the prompt


@torch.no_grad()
def mean_loss(model: GPT, pairs: Sequence[Pair], config: RunConfig) -> float:
    """Nats per response token."""
    model.eval()
    loss = tokens = 0.0
    for batch in batches(*map(list, zip(*pairs, strict=True)), config):
        loss += sft_loss(model, batch).item() * len(batch.where)
        tokens += len(batch.where)
    return loss / tokens


class Selection:
    """The epoch whose answers to held-out prompts the reward model likes best (InstructGPT, C.1).

    The paper's models overfit the held-out loss after one epoch, and still improve by this score.
    """

    def __init__(self, folder: str, codec: Codec, config: Config):
        self.reward_model = ScalarModel.load(folder).to(resolve_device(config.device)).eval()
        self.codec, self.config = codec, config
        self.epochs: list[dict] = []  # what each was worth
        self.weights: dict[str, Tensor] = {}  # of the best

    @torch.no_grad()
    def judge(self, model: GPT, held_out: list[Pair]) -> dict[str, float]:
        """Scores this epoch, and keeps its weights if no earlier one was better."""
        prompts, epoch = [prompt for prompt, _ in held_out], len(self.epochs) + 1
        new = min(80, model.config.block_size - max(map(len, prompts)))
        seed = generator(self.config.seed, "selection", epoch)
        responses = generate(model, prompts, new, self.codec.eos, generator=seed)
        scores = map(self.reward_model.score, batches(prompts, responses, self.config))
        score, loss = torch.cat(list(scores)).mean().item(), mean_loss(model, held_out, self.config)
        if score > max((e["reward_score"] for e in self.epochs), default=-math.inf):
            self.weights = {name: w.clone() for name, w in state_of(model).items()}
        self.epochs.append({"epoch": epoch, "reward_score": score, "held_out_loss": loss})
        return self.epochs[-1]

    def load_best(self, model: GPT) -> dict[str, float]:
        """Puts the kept weights into the model; prints and returns what they were worth."""
        best = max(self.epochs, key=lambda e: e["reward_score"])
        fitted = min(self.epochs, key=lambda e: e["held_out_loss"])
        for e, by in ((best, "reward score"), (fitted, "held-out loss")):
            print(f"best by {by}: epoch {e['epoch']}, score {e['reward_score']:.3f}, "
                  f"loss {e['held_out_loss']:.3f}")  # fmt: skip
        restore(model, self.weights)
        return best

    def state_dict(self) -> dict:
        return {"epochs": self.epochs, "weights": self.weights}

    def load_state_dict(self, state: dict) -> None:
        self.epochs, self.weights = state["epochs"], state["weights"]


def train(run: Run, pairs: list[Pair], epochs: int, batch_size: int, asked: list[str]) -> dict:
    """Epochs over shuffled pairs; held-out loss and three samples eight times on the way."""
    config, model, optimizer = run.config, run.state["model"], run.state["optimizer"]
    selection: Selection | None = run.state.get("selection")
    held_out = max(1, int(config.held_out * len(pairs)))
    held_out, pairs = pairs[:held_out], pairs[held_out:]
    epoch_steps = steps_per_epoch(pairs, batch_size)
    steps = epochs * epoch_steps
    print(f"{run.stage}: {budget({'model': model}, optimizer)}")
    for step in run.steps(steps):
        chosen = batch_at(step, pairs, batch_size, config.seed, run.stage)
        total = sum(len(response) for _, response in chosen)
        prompts, responses = ([pair[i] for pair in my_share(chosen)] for i in (0, 1))
        torch.manual_seed(seed_of(*my_place(config.seed, run.stage, step)))  # dropout
        model.train()
        losses = ((sft_loss(model, b), len(b.where)) for b in batches(prompts, responses, config))
        lr = lr_schedule(step, steps, warmup=steps // 50)
        loss, norms = optimizer_step(optimizer, losses, total, lr)
        run.log({"loss": loss, "grad_norm": norms[0], "lr": optimizer.param_groups[0]["lr"]})
        if selection and (step + 1) % epoch_steps == 0:
            run.log(selection.judge(model, held_out))
        if step % max(1, steps // 8) == 0 or step == steps - 1:
            run.log({"held_out_loss": mean_loss(model, held_out, config)})
            show_samples(run, model, asked, step)
    if selection:
        run.metrics |= selection.load_best(model)
        run.save()
    return run.metrics


def show_samples(run: Run, model: GPT, asked: list[str], step: int) -> None:
    prompts = [run.codec.prompt(text) for text in asked]
    new = min(80, model.config.block_size - max(map(len, prompts)))
    seed = generator(run.config.seed, run.stage, step)
    answers = generate(model, prompts, new, run.codec.eos, generator=seed)
    for text, answer in zip(asked, answers, strict=True):
        run.sample(f"[step {step}] {text}", run.codec.text(answer))


def pretraining_texts(config: Config) -> list[str]:
    if config.texts == "toy":
        return toy.pages(config.toy_texts, config.seed)
    return load_texts(config.texts)


def pretrain(config: Config, asked: list[str]) -> dict:
    """Language modelling from scratch; the base model is in config.base afterwards."""
    codec = Codec(get_tokenizer(config.tokenizer), config.template)
    sizes = (config.block_size, config.n_layer, config.n_head, config.n_embd)
    torch.manual_seed(seed_of(config.seed, "init"))
    model = placed(GPT(GPTConfig(codec.tokenizer.n_vocab, *sizes)), config)
    state = {"model": model, "optimizer": adam([(model, config.pretrain_lr)])}
    run = Run("base", config, config.base, model.config, codec, **state)
    pairs = documents(pretraining_texts(config), codec, config.block_size)
    pairs = shuffled(pairs, config.seed, "documents")
    return train(run, pairs, config.pretrain_epochs, config.pretrain_batch_size, asked)


def finetune(config: Config, rows: list[dict], asked: list[str]) -> dict:
    """Supervised fine-tuning of the base model, or of the one that --init names."""
    source = config.base if config.init == "scratch" else config.init
    codec, model = Codec.load(source, config.template), GPT.load(source, dropout=config.dropout)
    codec.refuse_other_vocabulary(model)
    model = placed(model, config)
    pairs = []
    for row in rows:
        prompt, response = codec.prompt(row["prompt"]), codec.response(row["response"])
        if len(response) < model.config.block_size:
            pairs.append(fit(prompt, response, model.config.block_size))
    if len(pairs) < len(rows):
        print(f"{len(rows) - len(pairs)} responses longer than the context are left out")
    real = config.demonstrations != "toy" and config.texts == "toy"  # then no toys are mixed in
    if config.pretrain_mix and not real:
        pages = documents(pretraining_texts(config), codec, model.config.block_size)
        pairs += pages[: round(config.pretrain_mix * len(pairs))]
    state = {"model": model, "optimizer": adam([(model, config.lr)])}
    if config.reward_model:
        state["selection"] = Selection(config.reward_model, codec, config)
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
    command(main, Config, PRESETS)
