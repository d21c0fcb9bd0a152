"""Stage 2: a reward model from rankings (InstructGPT, section 3.5).

The fine-tuned model answers every prompt K times, a labeler ranks the K responses, and the same
network with a scalar head in place of the vocabulary learns to score the better one higher.

    python reward.py                            # sample, let the simulated labeler rank, train
    python reward.py --labeler human            # sample, rank them yourself
    python reward.py --comparisons mine.jsonl   # {"prompt": …, "responses": […], "ranks": […]}
    python reward.py --policy out/ppo --merge out/reward/comparisons.jsonl --out out/reward2

The last one is the next round of the paper's loop: the policy's own responses are ranked, and a new
reward model learns from them and from the earlier comparisons. The labeler of the toy world knows
its hidden rubric and adds noise; the reward model sees only the rankings.
"""

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import labeler, toy
from data.presets import REWARD as PRESETS
from data.records import (
    load_comparisons,
    load_demonstrations,
    load_prompts,
    pair_accuracy,
    save_records,
    write_atomically,
)
from model import (
    GPT,
    Batch,
    Codec,
    Pair,
    Run,
    RunConfig,
    ScalarModel,
    adam,
    all_shares,
    batch_at,
    budget,
    command,
    fit,
    generate,
    generator,
    lock,
    lr_schedule,
    my_place,
    my_share,
    optimizer_step,
    pack,
    passes,
    placed,
    precision,
    rank_and_world,
    resolve_device,
    seed_of,
    steps_per_epoch,
)


@dataclass
class Config(RunConfig):
    out: str = "out/reward"  # run folder
    sft: str = "out/sft"  # folder of the fine-tuned model: it answers the prompts
    init: str = ""  # folder of the model that the reward model starts from; default: --sft's
    cue: str = "Comment:"  # end of text, where the score is read, starts as the end of this; or ""
    # the comparisons
    labeler: str = "gold"  # gold: the toy world's, simulated; human: you; file: in --comparisons
    comparisons: str = ""  # .jsonl of comparisons, in place of sampling and ranking
    merge: str = ""  # .jsonl of earlier comparisons to train on as well
    policy: str = ""  # folder of the model that answers, in place of the fine-tuned one
    prompts: str = "toy"  # what it answers: toy, or a .jsonl file of prompts
    toy_prompts: int = 2800  # how many toy prompts
    responses: int = 6  # K, responses to a prompt (InstructGPT: 4 to 9)
    noise: float = 0.5  # of the simulated labeler, in points of the rubric
    max_new_tokens: int = 80  # longest response
    temperature: float = 1.0  # of sampling
    # the training
    demonstrations: str = ""  # .jsonl whose mean score becomes 0; default: toy, or the best ranked
    epochs: int = 2  # passes over the comparisons (InstructGPT: 1)
    batch_size: int = 4  # prompts a step, with all their responses
    lr: float = 1e-3  # peak learning rate
    held_out: float = 0.1  # share of the prompts that only measures accuracy


def ranking_loss(scores: Tensor, ranks: Tensor, counts: list[int]) -> Tensor:
    """Mean over prompts of the mean of -log sigmoid(r_better - r_worse) over a prompt's pairs.

    InstructGPT, equation 1. scores (N,), ranks (N,) with 1 best and equal = tie, which makes no
    pair; counts[p] adjacent responses belong to prompt p. No pair at all: 0, with zero gradient.
    """
    losses = []
    for r, rank in zip(scores.split(counts), ranks.split(counts), strict=True):  # (K,)
        better = rank[:, None] < rank[None, :]  # (K, K)
        if better.any():
            losses.append(-F.logsigmoid(r[:, None] - r[None, :])[better].mean())
    return torch.stack(losses).mean() if losses else 0 * scores.sum()


# --------------------------------------------------------------------------------------------------
# Collecting


def collect(config: Config) -> list[dict]:
    """{"prompt", "responses"}: K sampled responses to each prompt, duplicates removed."""
    source, codec = config.policy or config.sft, Codec.load(config.sft)
    model = GPT.load(source).to(resolve_device(config.device))
    place = (config.seed, "collect", "policy" if config.policy else "sft")
    if config.prompts == "toy":
        rows = toy.prompts(config.toy_prompts, seed_of(*place))
    else:
        rows = load_prompts(config.prompts)
    room = model.config.block_size - config.max_new_tokens
    prompts = [codec.prompt(row["prompt"])[-room:] for row in rows for _ in range(config.responses)]
    limits = (config.max_new_tokens, codec.eos, config.temperature)
    seed = generator(*my_place(*place))
    title = f"responses of {source}"
    shares = all_shares(generate(model, my_share(prompts), *limits, generator=seed, title=title))
    texts, items = iter([codec.text(tokens) for share in shares for tokens in share]), []
    for row in rows:
        different = dict.fromkeys(next(texts) for _ in range(config.responses))
        responses = [text for text in different if "\0" not in text]  # which no record may hold
        if len(responses) > 1:
            items.append({"prompt": row["prompt"], "responses": responses})
    return items


def ranked_by_rubric(items: list[dict], config: Config) -> list[dict]:
    rng = random.Random(config.seed)
    ranks = [labeler.rank(i["prompt"], i["responses"], rng, config.noise) for i in items]
    return [item | {"ranks": r} for item, r in zip(items, ranks, strict=True)]


def rank_by_hand(config: Config) -> None:
    """Asks at the terminal until all is ranked; ends the program if the person quits before."""
    path = Path(config.out) / "responses.jsonl"
    if rank_and_world()[1] > 1:
        raise ValueError("--labeler human needs a single process; rank first, then train with many")
    if not config.resume:
        labeler.refuse_answers(config.out)
    if not config.resume or not path.exists():
        save_records(path, collect(config))
    person = labeler.Person(load_comparisons(path), config.out, config.seed)
    if not person.rank_all():
        print(f"--resume continues; or --labeler file --comparisons {person.output} trains now")
        raise SystemExit(0)


def ranked(config: Config) -> list[dict]:
    """The comparisons to train on: given, or sampled and ranked now; and the earlier ones."""
    if config.labeler not in ("gold", "human", "file"):
        raise ValueError(f"--labeler {config.labeler} is unknown; choose gold, human or file")
    if config.labeler == "file" and not config.comparisons:
        raise ValueError("--labeler file needs the file: --comparisons <path>")
    lock(config.out)
    path = Path(config.comparisons or Path(config.out) / "comparisons.jsonl")
    if config.labeler == "human":
        rank_by_hand(config)
    elif not config.comparisons and not (config.resume and path.exists()):
        records = ranked_by_rubric(collect(config), config)
        if rank_and_world()[0] == 0:
            save_records(path, records)
        all_shares(None)  # nobody goes on to read what is not there yet
    earlier = load_comparisons(config.merge) if config.merge else []
    records = load_comparisons(path) + earlier  # the new ones first: they are held out
    print(f"{len(records)} comparisons, {len(records) - len(earlier)} of them in {path}")
    return records


# --------------------------------------------------------------------------------------------------
# Training: all responses to a prompt are one batch element, each scored once


@dataclass
class Comparison:
    """A record's responses, tokenised with the prompt before each."""

    record: dict
    pairs: list[Pair]  # K times (prompt, response)

    @property
    def decides(self) -> bool:
        return len(set(self.record["ranks"])) > 1


def tokenised(records: list[dict], codec: Codec, block_size: int) -> list[Comparison]:
    """Comparisons whose responses fit into the context; their prompts are cut from the left."""
    comparisons = []
    for record in records:
        prompt = codec.prompt(record["prompt"])
        responses = [codec.response(text) for text in record["responses"]]
        if max(map(len, responses)) < block_size:
            # cut as for the longest, so that all responses follow the same prompt
            prompt, _ = fit(prompt, max(responses, key=len), block_size)
            comparisons.append(Comparison(record, [(prompt, response) for response in responses]))
    if len(comparisons) < len(records):
        print(f"{len(records) - len(comparisons)} comparisons longer than the context are left out")
    return comparisons


def packed(
    comparisons: list[Comparison], config: Config
) -> Iterator[tuple[Batch, list[Comparison]]]:
    """Comparisons in order as batches of at most config.max_tokens tokens."""
    lengths = [sum(len(p) + len(r) for p, r in c.pairs) for c in comparisons]
    for part in passes(lengths, config):
        chosen = [comparisons[i] for i in part]
        prompts, responses = ([pair[i] for c in chosen for pair in c.pairs] for i in (0, 1))
        yield pack(prompts, responses, resolve_device(config.device)), chosen


def losses(
    model: ScalarModel, comparisons: list[Comparison], config: Config
) -> Iterator[tuple[Tensor, int]]:
    """The ranking loss of each micro-batch, and the number of prompts it is a mean over."""
    for batch, chosen in packed(comparisons, config):
        scores = model.score(batch)
        ranks = torch.tensor([rank for c in chosen for rank in c.record["ranks"]]).to(scores.device)
        yield (
            ranking_loss(scores, ranks, [len(c.pairs) for c in chosen]),
            sum(c.decides for c in chosen),
        )


@torch.no_grad()
def score_all(
    model: ScalarModel, comparisons: list[Comparison], config: Config
) -> list[list[float]]:
    """The score of every response, by prompt."""
    scores = []
    for batch, chosen in packed(comparisons, config):
        counts = [len(c.pairs) for c in chosen]
        scores += [s.tolist() for s in model.score(batch).split(counts)]
    return scores


@torch.no_grad()
def start_from_cue(gpt: GPT, codec: Codec, cue: str) -> None:
    """Gives end of text the embedding of the last token of cue, as soft prompts start from words
    (Lester et al. 2021, 3.2).

    Pretraining has never shown end of text as an input, but it has shown what people say of an
    answer. Without this, a model of the toy world's size learns whether the reply is about the
    asked subject all at once or, from every third initialisation, not at all.
    """
    if tokens := codec.tokenizer.encode_ordinary(cue):
        gpt.wte.weight[codec.eos] = gpt.wte.weight[tokens[-1]]


def train(run: Run, comparisons: list[Comparison]) -> None:
    config, model, optimizer = run.config, run.state["model"], run.state["optimizer"]
    steps = config.epochs * steps_per_epoch(comparisons, config.batch_size)
    print(f"reward: {budget({'reward model': model}, optimizer)}")
    for step in run.steps(steps):
        chosen = batch_at(step, comparisons, config.batch_size, config.seed, "reward")
        lr, total = lr_schedule(step, steps, warmup=steps // 20), sum(c.decides for c in chosen)
        parts = losses(model, my_share(chosen), config)
        loss, norms = optimizer_step(optimizer, parts, max(1, total), lr)
        run.log({"loss": loss, "grad_norm": norms[0], "lr": optimizer.param_groups[0]["lr"]})


# --------------------------------------------------------------------------------------------------
# What it has learned


def report(
    model: ScalarModel,
    training: list[Comparison],
    held_out: list[Comparison],
    codec: Codec,
    config: Config,
) -> dict:
    """What report.json holds, printed: shares of pairs ordered rightly, and the calibration."""
    records = [c.record for c in held_out]
    ranks = [record["ranks"] for record in records]
    scores = score_all(model, held_out, config)
    lengths = [[len(response) for _, response in c.pairs] for c in held_out]
    words = bag_of_words(training, held_out, codec.tokenizer.n_vocab)
    found = {
        "reward model, held-out comparisons": pair_accuracy(scores, ranks),
        "a linear model of word counts": pair_accuracy(words, ranks),
        "the longer response wins": pair_accuracy(lengths, ranks),
    }
    if config.prompts == "toy" and config.labeler == "gold" and not config.comparisons:
        gold = [[toy.gold(r["prompt"], text) for text in r["responses"]] for r in records]
        gold_ranks = [[1 + sum(x > own for x in g) for own in g] for g in gold]
        found["labeler against the hidden rubric"] = pair_accuracy(gold, ranks)
        found["reward model against the hidden rubric"] = pair_accuracy(scores, gold_ranks)
        for flaw in toy.PROBES:
            pairs = [pair for pair in toy.probe_pairs(1200, 1, "test") if pair["flaw"] == flaw]
            probes = [
                {"prompt": p["prompt"], "responses": [p["good"], p["bad"]], "ranks": [1, 2]}
                for p in pairs
            ]
            probe_scores = score_all(model, tokenised(probes, codec, 10**9), config)
            name = f"prefers a perfect response to: {flaw}"
            found[name] = pair_accuracy(probe_scores, [[1, 2]] * len(probes))
    for name, (share, half_width, n) in found.items():
        shown = f"{share:.3f} ± {half_width:.3f} of {n} pairs" if n else "no pairs"
        print(f"{name:48s} {shown}")
    bins = calibration(scores, ranks)
    for predicted, observed, n in bins:
        print(f"pairs ordered with probability {predicted:.2f}: {observed:.2f} rightly, of {n}")
    flat = torch.tensor([[x for group in lists for x in group] for lists in (scores, lengths)])
    length_correlation = flat.corrcoef()[0, 1].item()
    print(f"correlation of score and length {length_correlation:.2f}")
    return {"pairs": found, "calibration": bins, "length_correlation": length_correlation}


def calibration(
    scores: list[list[float]], ranks: list[list[int]]
) -> list[tuple[float, float, int]]:
    """By tenths of the probability sigmoid(r_a - r_b) that the model gives to the order it prefers:
    its mean, the share of pairs that the labeler ordered so too, and their number."""
    pairs = []
    for group in zip(scores, ranks, strict=True):
        for (r, rank), (other, other_rank) in itertools.combinations(zip(*group, strict=True), 2):
            if rank != other_rank:
                p = torch.tensor(abs(r - other)).sigmoid().item()
                pairs.append((p, (r > other) == (rank < other_rank)))
    bins = []
    for tenth in range(5, 10):
        inside = [pair for pair in pairs if min(int(pair[0] * 10), 9) == tenth]
        if inside:
            predicted, observed = (sum(x) / len(inside) for x in zip(*inside, strict=True))
            bins.append((predicted, observed, len(inside)))
    return bins


def bag_of_words(
    training: list[Comparison], held_out: list[Comparison], n_vocab: int
) -> list[list[float]]:
    """Scores by a weight for each token of the vocabulary, learnt by the same loss: a baseline
    that knows neither order nor prompt."""
    bag = nn.EmbeddingBag(n_vocab, 1, mode="sum")
    nn.init.zeros_(bag.weight)
    optimizer, batch_size = torch.optim.Adam(bag.parameters(), lr=0.01), 32

    def scores(comparisons: list[Comparison]) -> Tensor:
        responses = [response for c in comparisons for _, response in c.pairs]
        starts = list(itertools.accumulate(map(len, responses), initial=0))[:-1]
        tokens = list(itertools.chain.from_iterable(responses))
        return bag(torch.tensor(tokens), torch.tensor(starts))[:, 0]

    for step in range(5 * steps_per_epoch(training, batch_size)):
        chosen = batch_at(step, training, batch_size, "bag of words")
        ranks = torch.tensor([rank for c in chosen for rank in c.record["ranks"]])
        loss = ranking_loss(scores(chosen), ranks, [len(c.pairs) for c in chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return [s.tolist() for s in scores(held_out).split([len(c.pairs) for c in held_out])]


def center(model: ScalarModel, comparisons: list[Comparison], codec: Codec, config: Config) -> None:
    """Shifts the head's bias so that demonstrations score 0 on average (InstructGPT, C.2)."""
    if config.demonstrations:
        rows = load_demonstrations(config.demonstrations)
    elif config.prompts == "toy" and config.labeler == "gold" and not config.comparisons:
        rows = toy.demonstrations(500, config.seed + 1)
    else:
        rows = [
            {"prompt": c.record["prompt"], "response": text}
            for c in comparisons[:500]
            for text, rank in zip(c.record["responses"], c.record["ranks"], strict=True)
            if rank == 1
        ]
    records = [{"prompt": r["prompt"], "responses": [r["response"]], "ranks": [1]} for r in rows]
    block_size = model.gpt.config.block_size
    scores = score_all(model, tokenised(records, codec, block_size), config)
    with torch.no_grad():
        model.head.bias -= sum(score for (score,) in scores) / len(scores)


@precision
def main(config: Config) -> dict:
    gpt, codec = GPT.load(config.init or config.sft), Codec.load(config.sft)
    codec.refuse_other_vocabulary(gpt)
    comparisons = tokenised(ranked(config), codec, gpt.config.block_size)
    if len(comparisons) < 2:
        raise ValueError(f"{len(comparisons)} usable comparisons; at least 2 are needed")
    split = max(1, int(config.held_out * len(comparisons)))
    held_out, training = comparisons[:split], comparisons[split:]
    start_from_cue(gpt, codec, config.cue)
    torch.manual_seed(seed_of(config.seed, "head"))
    model = placed(ScalarModel(gpt), config)
    state = {"model": model, "optimizer": adam([(model, config.lr)])}
    run = Run("reward", config, config.out, gpt.config, codec, **state)
    train(run, training)

    if "accuracy" not in run.metrics:
        center(model, training, codec, config)
    found = report(model, training, held_out, codec, config)
    accuracy, accuracy_ci, _ = found["pairs"]["reward model, held-out comparisons"]
    run.metrics |= {"accuracy": accuracy, "accuracy_ci": accuracy_ci}  # ppo.py asks for them
    run.save()
    text = json.dumps(found, indent=1).encode()
    if run.first:
        write_atomically(run.folder / "report.json", lambda file: file.write(text))
    for c, scores in zip(held_out[:5], score_all(model, held_out[:5], config), strict=True):
        rows = sorted(zip(scores, c.record["ranks"], c.record["responses"], strict=True))[::-1]
        lines = [f"score {score:+.2f}, rank {rank}: {text}" for score, rank, text in rows]
        run.sample(c.record["prompt"], *lines)
    print(f"wrote {config.out}: report.json, samples.txt, metrics.jsonl; next: python ppo.py")
    return run.metrics


if __name__ == "__main__":
    command(main, Config, PRESETS)
