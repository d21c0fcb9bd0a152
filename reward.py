"""Stage 2: a reward model from rankings (InstructGPT, section 3.5).

The fine-tuned model answers every prompt K times, a labeler ranks the K responses, and the same
network with a scalar head in place of the vocabulary learns to score the better one higher.

    python reward.py                            # sample, let the simulated labeler rank, train
    python reward.py --labeler human            # sample, rank them yourself
    python reward.py --comparisons mine.jsonl   # {"prompt": …, "responses": […], "ranks": […]}
    python reward.py --score mine.jsonl --out scores.jsonl       # score responses, train nothing
    python reward.py --preset dpo               # a policy from the same comparisons: DPO, no PPO
    python reward.py --policy out/ppo --merge out/reward/comparisons.jsonl --out out/reward2

The last one is the next round of the paper's loop: the policy's own responses are ranked, and a new
reward model learns from them and from the earlier comparisons. The labeler of the toy world knows
its hidden rubric and adds noise; the reward model sees only the rankings.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated

import data
from data import labeler, processes, records, report
from data.folders import claim, keep_apart
from data.presets import REWARD as PRESETS
from data.processes import batch_at, gather, generator, my_share, seed_of, send, steps_per_epoch
from data.records import UserError, hold_out, load_comparisons, pair_accuracy
from data.run import Free, Input, Positive, Rate, Run, RunConfig, command, name_unused, program
from data.tokenizer import Codec, Pairs, fitting
from model import (
    GPT,
    Batch,
    ScalarModel,
    adam,
    clip_and_step,
    generate,
    grouped,
    lr_schedule,
    to_device,
    token_logprobs,
)

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Config(RunConfig):
    out: Free[str] = "out/reward"  # run folder
    sft: Input = "out/sft"  # folder of the fine-tuned model: it answers the prompts
    init: Input = ""  # folder of the model that the reward model starts from; default: --sft's
    cue: str = "Comment:"  # end of text, where the score is read, starts as the end of this; or ""
    # the comparisons
    labeler: str = "gold"  # gold: the toy world's, simulated; human: you; file: in --comparisons
    comparisons: Input = ""  # .jsonl of comparisons, in place of sampling and ranking
    merge: Input = ""  # .jsonl of earlier comparisons to train on as well
    policy: Input = ""  # folder of the model that answers, in place of the fine-tuned one
    prompts: Input = "toy"  # what it answers: toy, or a .jsonl file of prompts
    toy_prompts: Positive = 2600  # how many toy prompts
    responses: Annotated[int, 2, 1000] = 6  # K, responses to a prompt (InstructGPT: 4 to 9)
    noise: Rate = 0.5  # of the simulated labeler, in points of the rubric
    max_new_tokens: Positive = 80  # longest response
    temperature: Annotated[float, 0.01, 100] = 1.0  # of sampling
    score: Free[str] = ""  # .jsonl of responses: write them with "scores" to --out, train nothing
    reward_model: Free[str] = "out/reward"  # folder of the model that --score takes
    # the training
    objective: str = "reward"  # reward: a reward model; dpo: a policy whose log-ratios are rewards
    beta: Rate = 0.1  # of DPO: what a nat from the fine-tuned model weighs
    demonstrations: Input = ""  # .jsonl whose mean score becomes 0; default: toy, or the best
    epochs: Positive = 2  # passes over the comparisons (InstructGPT: 1)
    batch_size: Positive = 2  # prompts a step, with all their responses
    lr: Rate = 7e-4  # peak learning rate
    held_out: Annotated[float, 0, 0.9] = 0.1  # share of the prompts that only measures accuracy


def ranking_loss(scores: Tensor, ranks: Tensor, counts: list[int]) -> Tensor:
    """Mean over prompts of the mean of -log sigmoid(r_better - r_worse) over a prompt's pairs.

    InstructGPT, equation 1. scores (N,), ranks (N,) on the CPU with 1 best and equal = tie, which
    makes no pair; counts[p] adjacent responses belong to prompt p. No pair: 0, with zero gradient.
    """
    losses = []
    for r, rank in zip(scores.split(counts), ranks.split(counts), strict=True):  # (K,)
        better = (rank[:, None] < rank[None, :]).nonzero(as_tuple=True)  # row and column: a pair
        if len(better[0]):
            better = tuple(send(i, r.device) for i in better)
            losses.append(-F.logsigmoid(r[:, None] - r[None, :])[better].mean())
    return torch.stack(losses).mean() if losses else 0 * scores.sum()


class ImplicitReward(nn.Module):
    """r = beta sum_t (log pi(a_t) - log pi_ref(a_t)), for which pi is the optimal policy: (B,).

    DPO (Rafailov et al. 2023, equation 7) is ranking_loss of these scores with K = 2; with more
    responses, a prompt's pairs share its weight, and ties make no pair, as for a reward model.
    """

    def __init__(self, policy: GPT, ref_policy: GPT, beta: float):
        super().__init__()
        self.gpt, self.ref_policy, self.beta = policy, ref_policy.eval(), beta

    def score(self, batch: Batch) -> Tensor:
        logprobs, _ = token_logprobs(self.gpt, batch)
        with torch.no_grad():
            ref_logprobs, _ = token_logprobs(self.ref_policy, batch)
        parts = (logprobs - ref_logprobs).split(batch.lengths.tolist())
        sums = [part.sum() for part in parts]
        return self.beta * (torch.stack(sums) if sums else logprobs)  # a sharded pass may be empty


Scorer = ScalarModel | ImplicitReward


def collect(config: Config) -> list[dict]:
    """{"prompt", "responses"}: K sampled responses to each prompt, duplicates removed."""
    source, codec = config.policy or config.sft, Codec.load(config.sft)
    if config.policy:
        codec.check_same(config.policy)
    model = to_device(GPT.load(source), config)
    key = (config.seed, "collect", "policy" if config.policy else "sft")
    asked = data.prompts(config.prompts, config.toy_prompts, seed_of(*key))
    room = model.config.block_size - config.max_new_tokens
    prompts = [codec.prompt(text, room) for text in asked for _ in range(config.responses)]
    limits = (config.max_new_tokens, codec.eos, config.temperature)
    seed, title = generator(*processes.rank_key(*key)), f"responses of {source}"
    shares = gather(generate(model, my_share(prompts), *limits, generator=seed, title=title))
    texts, items = iter([codec.text(tokens) for share in shares for tokens in share]), []
    for prompt in asked:
        different = dict.fromkeys(next(texts) for _ in range(config.responses))
        responses = [text for text in different if "\0" not in text]  # no record may hold NUL
        items.append({"prompt": prompt, "responses": responses})
    return [item for item in items if len(item["responses"]) > 1]


def ranked(config: Config) -> tuple[list[dict], list[dict]]:
    """The new comparisons, given or sampled and ranked now, and the earlier ones of --merge."""
    if config.labeler not in ("gold", "human", "file"):
        raise UserError(f"--labeler {config.labeler} is unknown; choose gold, human or file")
    if config.labeler == "human" and config.comparisons:
        raise UserError("--labeler human ranks new responses; --comparisons are ranked already")
    if config.labeler == "gold" and not config.comparisons and not data.rubric(config.prompts):
        raise UserError("--labeler gold ranks toy prompts only; choose human, or --comparisons")
    if config.labeler == "file" and not config.comparisons:
        raise UserError("--labeler file needs the file: --comparisons <path>")
    earlier = load_comparisons(config.merge) if config.merge else []
    if config.labeler == "human":
        labeler.check_number(config.responses)
        if processes.rank_and_world()[1] > 1:
            raise UserError("--labeler human needs a single process; train with many afterwards")
    path = Path(config.comparisons or Path(config.out) / "comparisons.jsonl")
    if not config.comparisons:
        claim(config.out, config.resume)
    if config.labeler == "human":
        labeler.rank_by_hand(lambda: collect(config), config.out, config.seed)
    elif not config.comparisons and not (config.resume and path.exists()):
        items, rng = collect(config), random.Random(config.seed)
        for item in items:
            item["ranks"] = labeler.rank(item["prompt"], item["responses"], rng, config.noise)
        if processes.rank_and_world()[0] == 0:
            records.save_records(path, items)
        gather(None)  # barrier: wait for rank 0 to finish writing
    new = load_comparisons(path)
    print(f"{len(new) + len(earlier)} comparisons, {len(new)} of them in {path}")
    return new, earlier


@dataclass
class Comparison:
    """A record and its tokens: one element of a batch, of which each response is scored once."""

    record: dict
    pairs: Pairs  # K times (prompt, response)

    @property
    def decides(self) -> bool:
        """Whether any response is better than another: ties alone teach nothing."""
        return len(set(self.record["ranks"])) > 1


Comparisons = list[Comparison]


def tokenised(rows: list[dict], codec: Codec, block_size: int) -> Comparisons:
    """Comparisons whose responses fit into the context; their prompts are cut from the left."""
    return [Comparison(row, pairs) for row, pairs in fitting(rows, codec, block_size)]


@torch.no_grad()
def score_all(model: Scorer, comparisons: Comparisons, config: Config) -> list[list[float]]:
    """The score of every response, by prompt."""
    parts = grouped([c.pairs for c in comparisons], config)
    scores = iter([score for _, batch in parts for score in model.score(batch).tolist()])
    return [[next(scores) for _ in c.pairs] for c in comparisons]


@torch.no_grad()
def start_from_cue(gpt: GPT, codec: Codec, cue: str) -> None:
    """Gives end of text the embedding of the cue's last token (Lester et al. 2021, section 3.2).

    End of text is never an input in pretraining. Without a cue, a model of the toy world's size
    learns late or, for one seed in three, never whether a reply is about the prompt's subject.
    """
    if tokens := codec.tokenizer.encode_ordinary(cue):
        gpt.head_weight[codec.eos] = gpt.head_weight[tokens[-1]]  # tied to the embedding


def train(run: Run, model: Scorer, comparisons: Comparisons) -> None:
    """Minimises the ranking loss over all comparisons."""
    config = run.config
    steps = config.epochs * steps_per_epoch(comparisons, config.batch_size)
    for step in run.steps(steps):
        chosen = batch_at(step, comparisons, config.batch_size, config.seed, "reward")
        mine, total, loss_sum = my_share(chosen), max(1, sum(c.decides for c in chosen)), 0.0
        for part, batch in grouped([c.pairs for c in mine], config):
            own = [mine[i] for i in part]
            scores, counts = model.score(batch), [len(c.pairs) for c in own]
            ranks = torch.tensor([rank for c in own for rank in c.record["ranks"]])
            weight = sum(c.decides for c in own) / total  # the mean over all prompts results
            loss = ranking_loss(scores, ranks, counts) * weight
            loss.backward()
            loss_sum += loss.detach()
        lr = lr_schedule(step, steps, warmup=steps // 20)
        loss, (norm,) = clip_and_step(run.optimizer, loss_sum, lr)
        run.log({"loss": loss, "grad_norm": norm, "lr": run.optimizer.param_groups[0]["lr"]})


def demonstrated(training: Comparisons, codec: Codec, config: Config, size: int) -> Comparisons:
    """Demonstrations, or else the best-ranked responses. UserError if none fits into `size`."""
    if config.demonstrations or own_world(config):
        rows = data.demonstrations(config.demonstrations or config.prompts, 500, config.seed + 1)
    else:
        rows = [
            {"prompt": c.record["prompt"], "response": text}
            for c in training[:500]
            for text, rank in zip(c.record["responses"], c.record["ranks"], strict=True)
            if rank == min(c.record["ranks"])
        ]
    if found := tokenised(rows, codec, size):
        return found
    raise UserError(f"--demonstrations {config.demonstrations}: none fits into {size} tokens")


def center(model: ScalarModel, demonstrations: Comparisons, config: Config) -> None:
    """Shifts the head's bias so that demonstrations score 0 on average (InstructGPT, C.2)."""
    scores = score_all(model, demonstrations, config)
    with torch.no_grad():
        model.head.bias -= sum(score for (score,) in scores) / len(scores)


def own_world(config: Config) -> ModuleType | None:
    """The world that the comparisons come from, if its rubric has ranked them; else None."""
    simulated = config.labeler == "gold" and not config.comparisons
    return data.rubric(config.prompts) if simulated else None


def measure(model: Scorer, training: Comparisons, held_out: Comparisons, run: Run) -> dict:
    """What report.json holds: how often several scores order held-out pairs as the labeler did."""
    rows = [c.record for c in held_out]
    ranks = [row["ranks"] for row in rows]
    scores = score_all(model, held_out, run.config)
    lengths = [[len(response) for _, response in c.pairs] for c in held_out]
    words = bag_of_words(training, held_out, run.codec.tokenizer.n_vocab)
    pairs = {
        "reward model, held-out comparisons": pair_accuracy(scores, ranks),
        "a linear model of word counts": pair_accuracy(words, ranks),
        "the longer response wins": pair_accuracy(lengths, ranks),
    }
    if world := own_world(run.config):
        gold = [[world.gold(row["prompt"], text) for text in row["responses"]] for row in rows]
        gold_ranks = [[1 + sum(x > own for x in g) for own in g] for g in gold]
        pairs["labeler against the hidden rubric"] = pair_accuracy(gold, ranks)
        pairs["reward model against the hidden rubric"] = pair_accuracy(scores, gold_ranks)
        pairs |= probe(model, world, run)
    found = {"pairs": pairs, "calibration": report.calibration(scores, ranks)}
    return found | {"length_correlation": report.correlation(scores, lengths)}


def probe(model: ScalarModel, world: ModuleType, run: Run) -> dict:
    """How often a perfect response scores higher than itself with one flaw, by the flaw."""
    found, rows = {}, world.probe_pairs(1200, 1, "test")
    for flaw in world.PROBES:
        own = [r | {"responses": [r["good"], r["bad"]]} for r in rows if r["flaw"] == flaw]
        chosen = tokenised(own, run.codec, model.gpt.config.block_size)
        accuracy = pair_accuracy(score_all(model, chosen, run.config), [[1, 2]] * len(chosen))
        found[f"prefers a perfect response to: {flaw}"] = accuracy
    return found


def bag_of_words(training: Comparisons, held_out: Comparisons, n_vocab: int) -> list[list[float]]:
    """The scores of a baseline that knows neither word order nor prompt: the sum of a weight for
    each token of a response, trained with the same loss."""
    bag = nn.EmbeddingBag(n_vocab, 1, mode="sum")
    nn.init.zeros_(bag.weight)
    optimizer, batch_size = torch.optim.Adam(bag.parameters(), lr=0.01), 32

    def scores(comparisons: Comparisons) -> Tensor:
        responses = [torch.tensor(response) for c in comparisons for _, response in c.pairs]
        starts = torch.tensor([0, *map(len, responses[:-1])]).cumsum(0)
        return bag(torch.cat(responses), starts)[:, 0]

    for step in range(5 * steps_per_epoch(training, batch_size)):
        chosen = batch_at(step, training, batch_size, "bag of words")
        ranks = torch.tensor([rank for c in chosen for rank in c.record["ranks"]])
        loss = ranking_loss(scores(chosen), ranks, [len(c.pairs) for c in chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return [s.tolist() for s in scores(held_out).split([len(c.pairs) for c in held_out])]


def score_file(config: Config) -> dict:
    """Writes the records of --score to --out with the score of each response."""
    if not config.out.endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"--score writes a file, and --out {config.out} is none; expected *.jsonl")
    if Path(config.score).resolve() == Path(config.out).resolve():
        raise UserError(f"--out {config.out} is the file that --score reads; choose another one")
    codec, model = Codec.load(config.reward_model), ScalarModel.load(config.reward_model)
    comparisons = tokenised(records.load_answers(config.score), codec, model.gpt.config.block_size)
    if not comparisons:
        raise UserError(f"{config.score}: no response fits into the context of the reward model")
    scores = score_all(to_device(model, config).eval(), comparisons, config)
    scored = [c.record | {"scores": s} for c, s in zip(comparisons, scores, strict=True)]
    records.save_records(config.out, scored)
    print(f"wrote {len(scored)} records with scores to {config.out}")
    return {"records": len(scored)}


@program
def main(config: Config) -> dict:
    if config.score:
        return score_file(config)
    if config.objective not in ("reward", "dpo"):
        raise UserError(f"--objective {config.objective} is unknown; choose reward or dpo")
    unused = ("cue", "demonstrations") if config.objective == "dpo" else ("beta",)
    name_unused(config, f"with --objective {config.objective}", *unused)
    keep_apart(config, {"out": config.out})
    if config.comparisons:
        sampling = ("policy", "prompts", "toy_prompts", "responses", "temperature")
        name_unused(config, "with --comparisons", *sampling, "max_new_tokens", "noise")
    gpt, codec = GPT.load(config.init or config.sft), Codec.load(config.sft)
    codec.check_vocabulary(gpt.config.vocab_size)
    new, earlier = (tokenised(rows, codec, gpt.config.block_size) for rows in ranked(config))
    comparisons, share = new + earlier, config.held_out  # the first ones are held out
    if earlier:  # half of the new ones at least are trained on
        share = min(share, 0.5 * len(new) / len(comparisons))
    held_out, training = hold_out(comparisons, share, lambda c: c.record["prompt"])
    if not any(c.decides for c in training):
        raise UserError("no response is better than another: ties alone teach nothing")
    torch.manual_seed(seed_of(config.seed, "head"))
    stage, shown = config.objective, []
    if stage == "dpo":
        reference = to_device(GPT.load(config.init or config.sft), config)
        learner = to_device(gpt, config)
        model = ImplicitReward(learner, reference, config.beta)
    else:
        shown = demonstrated(training, codec, config, gpt.config.block_size)
        start_from_cue(gpt, codec, config.cue)
        model = learner = to_device(ScalarModel(gpt), config)
    optimizer = adam([(learner, config.lr)])
    if config.comparisons:
        claim(config.out, config.resume)
    read = {} if config.comparisons else {"comparisons": f"{config.out}/comparisons.jsonl"}
    run = Run(stage, config, config.out, gpt.config, codec, optimizer, read, model=learner)
    train(run, model, training)
    if stage == "reward" and "accuracy" not in run.metrics[-1]:  # it was not centered before
        center(model, shown, config)
    found = measure(model, training, held_out, run)
    accuracy, accuracy_ci, _ = found["pairs"]["reward model, held-out comparisons"]
    run.amend({"accuracy": accuracy, "accuracy_ci": accuracy_ci})  # ppo.py asks for them
    report.print_reward_report(found)
    run.write("report.json", records.strict_json(found, indent=1))
    for c, scores in zip(held_out[:5], score_all(model, held_out[:5], config), strict=True):
        rows = sorted(zip(scores, c.record["ranks"], c.record["responses"], strict=True))[::-1]
        lines = [f"score {score:+.2f}, rank {rank}: {text}" for score, rank, text in rows]
        run.sample(c.record["prompt"], *lines)
    following = f"ppo.py --compare {config.out} --out out/compare" if stage == "dpo" else "ppo.py"
    print(f"wrote {config.out}: report.json, samples.txt, metrics.jsonl; next: python {following}")
    print(f"curves: python -m data.plot {config.out}")
    return run.metrics[-1]


if __name__ == "__main__":
    command(main, Config, PRESETS)
