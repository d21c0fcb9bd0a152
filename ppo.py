"""Stage 3: proximal policy optimisation against the reward model (InstructGPT, section 3.5).

The policy starts as the fine-tuned model. Every iteration it answers a batch of prompts; the reward
model scores each response, a penalty per token holds the policy near the fine-tuned model, and PPO
(Schulman et al. 2017) raises the advantages that GAE (Schulman et al. 2016) reads off a value
model, which starts as the reward model. Then all models answer prompts that none has seen, side by
side: base, base with two examples in its prompt, fine-tuned, best of 16, PPO without and with KL.

    python ppo.py                              # train with and without the KL penalty, compare
    python ppo.py --kl_coef 0.6 --no-ablation  # a tighter leash, and no second run
    python ppo.py --ptx_coef 1 --out out/ppo_ptx --no-ablation          # PPO-ptx
    python ppo.py --init out/ppo --reward_model out/reward2 --out out/ppo2  # iterate
    python ppo.py --compare out/ppo,out/ppo_ptx --out out/compare       # the comparison alone
    python ppo.py --prompts mine.jsonl         # {"prompt": ...} a line, the last held out
    python ppo.py --reward mine.py:my_reward   # a Python function in the reward model's place
    python ppo.py --check                      # is this set-up sound?
"""

import copy
import itertools
import json
import math
import runpy
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from data import labeler, toy
from data.presets import PPO as PRESETS
from data.python_reward import RewardFunction
from data.records import load_prompts, load_texts, printable, write_atomically
from data.weights import is_hugging_face, refuse_not_finite
from model import (
    GPT,
    Codec,
    Pair,
    Run,
    RunConfig,
    ScalarModel,
    adam,
    all_shares,
    batches,
    budget,
    command,
    documents,
    generate,
    generator,
    load_checkpoint,
    lock,
    lr_schedule,
    mean_and_interval,
    my_place,
    my_share,
    optimizer_step,
    placed,
    precision,
    rank_and_world,
    resolve_device,
    seed_of,
    shuffled,
    token_logprobs,
    whole,
)


@dataclass
class Config(RunConfig):
    out: str = "out/ppo"  # run folder; the run without a KL penalty has <out>_no_kl
    sft: str = "out/sft"  # folder of the fine-tuned model: the policy's start and its reference
    init: str = ""  # folder of a policy to continue, in place of the fine-tuned model
    reward_model: str = "out/reward"  # folder of the reward model, where the value model starts
    reward: str = ""  # path.py:function in its place; (texts, prompts) -> scores, lists of one size
    trust: bool = False  # train even on a reward model that is not better than chance
    base: str = "out/base"  # folder of the base model, for the comparison
    prompts: str = "toy"  # toy, or a .jsonl file of prompts
    iterations: int = 50  # rollouts, each followed by ppo_epochs passes over it
    batch_size: int = 64  # prompts in a rollout (InstructGPT: 512)
    minibatch_size: int = 32  # prompts in an optimiser step (InstructGPT: 64)
    ppo_epochs: int = 4  # passes over a rollout (InstructGPT: 1, lm-human-preferences: 4)
    lr: float = 6e-4  # peak learning rate of the policy
    value_lr: float = 1e-3  # peak learning rate of the value model
    warmup: int = 5  # iterations until the learning rates peak; then cosine to a tenth
    kl_coef: float = 0.3  # weight of the KL penalty (InstructGPT's beta, there 0.02)
    kl_target: float = 0.0  # nats a response: adapt kl_coef to reach this KL; 0 leaves it fixed
    kl_horizon: int = 10000  # episodes in which an adaptive kl_coef changes by a factor e at most
    gamma: float = 1.0  # discount per token
    lam: float = 0.95  # GAE's lambda: 0 trusts the value model, 1 the observed returns
    cliprange: float = 0.2  # a ratio outside 1 +- cliprange earns the policy nothing more
    cliprange_value: float = 0.2  # likewise for the value model's change
    max_approx_kl: float = 0.0  # policy/approx_kl that ends an iteration's updates; 0: none does
    temperature: float = 1.0  # of sampling, and of the log-probabilities that PPO compares
    max_new_tokens: int = 80  # longest response
    missing_eos_score: float = -1.0  # the score of a response that does not end; nan keeps its own
    # variants
    value: str = "model"  # model: from the reward model; head: a linear layer on the policy
    vf_coef: float = 0.1  # weight of the value loss if its head shares the policy's network
    ema_decay: float = 0.9  # of the averaged policy, per iteration (InstructGPT: 0.992); 0: none
    ptx_coef: float = 0.0  # weight of the pretraining loss: PPO-ptx (InstructGPT's gamma: 27.8)
    ptx_ratio: float = 0.5  # documents per response in an optimiser step (InstructGPT: 8)
    texts: str = "toy"  # the documents: toy, .txt, a folder of .txt, or .jsonl with {"text": ...}
    # the comparison
    ablation: bool = True  # also train without the KL penalty
    check: bool = False  # train nothing: check these models, prompts, device and precision
    compare: str = ""  # folders of policies, with commas between them: compare, do not train
    eval_prompts: int = 300  # held-out prompts of the comparison
    judge: str = "gold"  # gold: the rubric, where there is one; human: and you, blind
    split: str = "test"  # toy prompts of the comparison: test; dev while you tune


# --------------------------------------------------------------------------------------------------
# The objective. Vectors (N,) run over the response tokens of B responses, whose lengths (B,) sum to
# N; scores are (B,).


def kl_penalised_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, lengths: Tensor, kl_coef: float
) -> Tensor:
    """r_t = -kl_coef (log pi(a_t) - log pi_ref(a_t)), plus the score at the last token: (N,).

    The terms of InstructGPT's equation 2 spread over tokens, as in Ziegler et al. 2019.
    """
    rewards = -kl_coef * (logprobs - ref_logprobs)
    return rewards.index_add(0, lengths.cumsum(0) - 1, scores)


def gae(
    rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """A_t = delta_t + gamma lam A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t; and R = A + V: (N,).

    Generalised advantage estimation (Schulman et al. 2016, equation 16). A response ends after its
    last token: V_{t+1} and A_{t+1} are 0 there, whatever follows in the batch.
    """
    last = set((lengths.cumsum(0) - 1).tolist())
    r, v, advantages = rewards.tolist(), values.tolist(), [0.0] * len(rewards)
    for t in reversed(range(len(r))):
        next_value, next_advantage = (0.0, 0.0) if t in last else (v[t + 1], advantages[t + 1])
        delta = r[t] + gamma * next_value - v[t]
        advantages[t] = delta + gamma * lam * next_advantage
    result = torch.tensor(advantages, dtype=values.dtype, device=values.device)
    return result, result + values.detach()


def adapt_kl_coef(
    kl_coef: float, kl: float, n_episodes: int, target: float, horizon: float
) -> float:
    """kl_coef (1 + clip(kl / target - 1, -0.2, 0.2) n_episodes / horizon) (Ziegler 2019, 2.2).

    kl: mean over the batch's n_episodes responses of their summed log pi - log pi_ref.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * n_episodes / horizon)


def whiten(x: Tensor, shift_mean: bool = True) -> Tensor:
    """x with variance 1 over all tokens and, if shift_mean, with mean 0: (N,) -> (N,)."""
    mean, variance = x.mean(), x.var(unbiased=False)  # biased, as lm-human-preferences
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return whitened if shift_mean else whitened + mean


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cliprange: float
) -> Tensor:
    """mean max(-A rho, -A clip(rho, 1 - eps, 1 + eps)), rho = pi / pi_old (PPO, equation 7): ()."""
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.max(-advantages * ratio, -advantages * clipped).mean()


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, cliprange_value: float
) -> Tensor:
    """1/2 mean max((V - R)^2, (V_old + clip(V - V_old) - R)^2), as lm-human-preferences: ()."""
    clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2).mean()


# --------------------------------------------------------------------------------------------------
# An iteration: sample, score, penalise, update


@dataclass
class Models:
    policy: GPT
    ref_policy: GPT
    reward_model: ScalarModel | RewardFunction
    value_model: ScalarModel
    average: GPT  # the policy's moving average: evaluated, never sampled from in training
    codec: Codec
    documents: list[Pair]  # of PPO-ptx

    @classmethod
    def load(cls, config: Config) -> "Models":
        """All networks where they start, in eval mode: there is no dropout anywhere in RL."""
        device, codec = resolve_device(config.device), Codec.load(config.sft)
        policy = GPT.load(config.init or config.sft).to(device).eval()
        ref_policy = GPT.load(config.sft).to(device).eval()
        reward_model = load_reward_model(config, codec)
        torch.manual_seed(seed_of(config.seed, "head"))
        if config.value == "head":
            if config.shard:
                raise ValueError("--shard needs --value model: a head of the policy's own is whole")
            value_model = ScalarModel(policy, shared=True).to(device).eval()
        elif isinstance(reward_model, ScalarModel):
            value_model = copy.deepcopy(reward_model)
        else:
            value_model = ScalarModel(policy).to(device).eval()
        average = copy.deepcopy(policy)
        texts = pretraining_texts(config) if config.ptx_coef else []
        pairs = documents(texts, codec, policy.config.block_size)
        for model in (policy, ref_policy, reward_model, value_model, average):
            if isinstance(model, nn.Module):
                placed(model, config)
        return cls(policy, ref_policy, reward_model, value_model, average, codec, pairs)


def load_reward_model(config: Config, codec: Codec) -> ScalarModel | RewardFunction:
    if config.reward:
        return RewardFunction(config.reward, codec)
    return ScalarModel.load(config.reward_model).to(resolve_device(config.device)).eval()


@dataclass
class Penalty:
    """The KL coefficient in force; part of the checkpoint, since it may adapt."""

    kl_coef: float

    def state_dict(self) -> dict[str, float]:
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.kl_coef = state["kl_coef"]


@dataclass
class Rollout:
    """B sampled responses, and all that is known about them before the first update."""

    prompts: list[list[int]]
    responses: list[list[int]]
    lengths: Tensor  # (B,)
    ended: Tensor  # (B,) 1 where end-of-text was sampled
    scores: Tensor  # (B,)
    old_logprobs: Tensor  # (N,), like all below
    ref_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor


@torch.no_grad()
def sample_and_score(
    models: Models,
    prompts: list[list[int]],
    config: Config,
    kl_coef: float,
    seed: torch.Generator,
) -> Rollout:
    mine, eos = my_share(prompts), models.codec.eos
    limits = (config.max_new_tokens, eos, config.temperature)
    sampled = generate(models.policy, mine, *limits, generator=seed)
    responses, columns = of_all(sampled, score(models, mine, sampled, config))
    lengths, scores, logprobs, ref_logprobs, values = columns
    known = {"scores": scores, "log pi": logprobs, "log pi_ref": ref_logprobs, "values": values}
    refuse_not_finite("of the sampled responses", known)
    ended = torch.tensor([float(r[-1] == eos) for r in responses], device=scores.device)
    if not math.isnan(config.missing_eos_score):
        scores = torch.where(ended == 1, scores, config.missing_eos_score)
    rewards = kl_penalised_rewards(scores, logprobs, ref_logprobs, lengths, kl_coef)
    advantages, returns = gae(rewards, values, lengths, config.gamma, config.lam)
    known = (lengths, ended, scores, logprobs, ref_logprobs, values, whiten(advantages), returns)
    return Rollout(prompts, responses, *known)


def score(
    models: Models, prompts: list[list[int]], responses: list[list[int]], config: Config
) -> list[Tensor]:
    """Lengths and scores (B,); log pi, log pi_ref and values (N,), before the first update.

    By the forward pass that also trains, so that the first ratio is exactly 1.
    """
    parts = []
    for batch in batches(prompts, responses, config):
        logprobs, _ = token_logprobs(models.policy, batch, config.temperature)
        ref_logprobs, _ = token_logprobs(models.ref_policy, batch, config.temperature)
        values, scores = models.value_model.values(batch), models.reward_model.score(batch)
        parts.append((batch.lengths, scores, logprobs, ref_logprobs, values))
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def of_all(
    responses: list[list[int]], columns: list[Tensor]
) -> tuple[list[list[int]], list[Tensor]]:
    """The responses of all processes and what is known about them, in order."""
    shares, device = all_shares((responses, [x.cpu() for x in columns])), columns[0].device
    together = zip(*(share for _, share in shares), strict=True)
    return [tokens for share, _ in shares for tokens in share], [
        torch.cat(column).to(device) for column in together
    ]


def update(
    models: Models,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    config: Config,
    lr: float,
    seed: tuple[int | str, ...],
) -> dict[str, float]:
    """ppo_epochs passes over the rollout in shuffled minibatches; returns the mean statistics."""
    columns = (rollout.old_logprobs, rollout.advantages, rollout.old_values, rollout.returns)
    known = torch.stack(columns, dim=1).split(rollout.lengths.tolist())  # B times (L, 4)
    stats: dict[str, list[float]] = defaultdict(list)
    for epoch in range(config.ppo_epochs):
        order = shuffled(range(len(known)), *seed, epoch)
        for i in range(0, len(order), config.minibatch_size):
            chosen = order[i : i + config.minibatch_size]
            total = sum(len(known[b]) for b in chosen)
            losses = minibatch_losses(models, rollout, known, my_share(chosen), config, stats)
            if config.ptx_coef:
                n = math.ceil(config.ptx_ratio * len(chosen))
                drawn = shuffled(models.documents, *seed, epoch, i, "ptx")[:n]
                ptx = ptx_losses(models.policy, drawn, total, config, stats)
                losses = itertools.chain(losses, ptx)
            _, norms = optimizer_step(optimizer, losses, total, lr)
            stats["grad_norm"].append(norms[0])
            stats["value/grad_norm"].append(norms[1])
            latest = {"approx_kl": stats["policy/approx_kl"][-1:]}
            if config.max_approx_kl and means(latest)["approx_kl"] > config.max_approx_kl:
                return means(stats)
    return means(stats)


def means(stats: dict[str, list[float]]) -> dict[str, float]:
    """Of all processes."""
    found: dict[str, list[float]] = defaultdict(list)
    for share in all_shares(stats):
        for name, values in share.items():
            found[name] += values
    return {name: sum(values) / len(values) for name, values in found.items()}


def minibatch_losses(
    models: Models,
    rollout: Rollout,
    known: tuple[Tensor, ...],
    chosen: list[int],
    config: Config,
    stats: dict[str, list[float]],
) -> Iterator[tuple[Tensor, int]]:
    """The losses of each micro-batch of the chosen responses, and its number of tokens."""
    prompts, responses = ([x[b] for b in chosen] for x in (rollout.prompts, rollout.responses))
    rows, at = torch.cat([known[b] for b in chosen] or [known[0][:0]]), 0  # (n, 4)
    # no weight between two losses that share no parameter: Adam would take it out again
    vf_coef = config.vf_coef if config.value == "head" else 1.0
    for batch in batches(prompts, responses, config):
        n = len(batch.where)
        old_logprobs, advantages, old_values, returns = rows[at : at + n].unbind(1)
        logprobs, entropy = token_logprobs(models.policy, batch, config.temperature)
        policy = policy_loss(logprobs, old_logprobs, advantages, config.cliprange)
        yield policy, n  # its activations are gone before those of the value model arise
        values = models.value_model.values(batch)
        value = value_loss(values, old_values, returns, config.cliprange_value)
        yield vf_coef * value, n
        log_ratio = (logprobs - old_logprobs).detach()
        ratio = log_ratio.exp()
        for name, x in (
            ("policy/loss", policy),
            ("policy/approx_kl", (ratio - 1 - log_ratio).mean()),  # k3 (Schulman 2020)
            ("policy/clipfrac", ((ratio - 1).abs() > config.cliprange).float().mean()),
            ("policy/entropy", entropy.mean()),
            ("value/loss", value),
        ):
            stats[name] += [x.item()] if n else []
        at += n


def ptx_losses(
    policy: GPT, drawn: list[Pair], total: int, config: Config, stats: dict[str, list[float]]
) -> Iterator[tuple[Tensor, int]]:
    """PPO-ptx: ptx_coef times the mean loss on documents (InstructGPT, equation 2, last term).

    optimizer_step weighs a loss over n tokens by n / total, the responses' tokens; hence the ratio.
    """
    scale = config.ptx_coef * total / sum(len(rest) for _, rest in drawn)
    first, rest = ([pair[i] for pair in my_share(drawn)] for i in (0, 1))
    for batch in batches(first, rest, config):
        loss, n = -token_logprobs(policy, batch)[0].mean(), len(batch.where)
        stats["ptx/loss"] += [loss.item()] if n else []
        yield scale * loss, n


@torch.no_grad()
def update_average(average: GPT, policy: GPT, decay: float) -> None:
    """average <- decay average + (1 - decay) policy, weight by weight (InstructGPT, C.4)."""
    for mean, weight in zip(average.parameters(), policy.parameters(), strict=True):
        mean.lerp_(weight, 1 - decay)


def train(config: Config) -> dict[str, GPT]:
    """InstructGPT's third stage. Returns the policy, by its folder's name, and its average."""
    if config.batch_size < rank_and_world()[1]:
        raise ValueError(f"--batch_size {config.batch_size} is less than a prompt for each process")
    models = Models.load(config)
    if not config.reward and not config.trust:
        refuse_chance(config.reward_model)
    policy, value_model, codec = models.policy, models.value_model, models.codec
    new = value_model.head if config.value == "head" else value_model
    optimizer = adam([(policy, config.lr), (new, config.value_lr)])
    penalty = Penalty(config.kl_coef)
    state = {"model": policy, "value_model": value_model, "optimizer": optimizer}
    state |= {"penalty": penalty, "average": models.average}
    run = Run("ppo", config, config.out, policy.config, codec, **state)
    rows, length = min(config.batch_size, 256), policy.config.block_size
    print(f"ppo: {budget(vars(models), optimizer, rows, length)}")
    texts = training_prompts(config)
    for step in run.steps(config.iterations):
        start, seed = time.time(), (config.seed, "ppo", step)
        first = step * config.batch_size
        asked = [texts[i % len(texts)] for i in range(first, first + config.batch_size)]
        prompts = encode_prompts(asked, codec, config, policy.config.block_size)
        place = generator(*my_place(*seed))
        rollout = sample_and_score(models, prompts, config, penalty.kl_coef, place)
        lr = lr_schedule(step, config.iterations, config.warmup)
        metrics = summary(rollout, penalty.kl_coef)
        metrics |= update(models, optimizer, rollout, config, lr, seed)
        update_average(models.average, policy, config.ema_decay)
        metrics |= {"lr": lr * config.lr, "kl_coef": penalty.kl_coef}
        if config.kl_target:
            kl, n = metrics["objective/kl"], len(prompts)
            penalty.kl_coef = adapt_kl_coef(
                penalty.kl_coef, kl, n, config.kl_target, config.kl_horizon
            )
        metrics["tokens_per_second"] = len(rollout.returns) / (time.time() - start)
        answers = [codec.text(tokens) for tokens in rollout.responses]
        if config.prompts == "toy":  # the hidden rubric: for the reader, no model sees it
            pairs = zip(asked, answers, strict=True)
            metrics["objective/gold"] = sum(toy.gold(*pair) for pair in pairs) / len(asked)
        shown = [f"objective/{x}" for x in ("score", "gold", "kl", "length", "eos_rate")]
        run.log(metrics, shown=[*shown, "tokens_per_second"])
        if step % 10 == 0 or step == config.iterations - 1:
            for text, answer, score in zip(asked[:3], answers, rollout.scores, strict=False):
                run.sample(f"[step {step}, score {score:+.2f}] {text}", answer)
    name = run.folder.name
    averages = {f"{name}_ema": whole(models.average)} if config.ema_decay else {}
    return {name: whole(policy)} | averages


def refuse_chance(folder: str) -> None:
    """ValueError for a reward model in mid-training, or one that is not better than chance."""
    report = load_checkpoint(folder)["metrics"]
    if "accuracy" not in report:
        raise ValueError(f"{folder} is not trained to its end; continue with reward.py --resume")
    if report["accuracy"] - report["accuracy_ci"] <= 0.5:
        raise ValueError(
            f"{folder} orders {report['accuracy']:.3f} ± {report['accuracy_ci']:.3f} of held-out "
            "pairs, no better than chance; train it on more comparisons, or --trust it"
        )


def summary(rollout: Rollout, kl_coef: float) -> dict[str, float]:
    """What the policy did in this rollout; sums are over a response's tokens, in nats."""
    log_ratio = rollout.ref_logprobs - rollout.old_logprobs
    B, score, returns = len(rollout.prompts), rollout.scores.mean(), rollout.returns
    kl = -log_ratio.sum() / B  # k1: unbiased, and what the reward holds
    unexplained = (returns - rollout.old_values).var() / returns.var()
    found = {
        "objective/score": score,
        "objective/kl": kl,
        "objective/kl_k3": (log_ratio.expm1() - log_ratio).sum() / B,  # unbiased, never negative
        "objective/reward": score - kl_coef * kl,
        "objective/length": rollout.lengths.float().mean(),
        "objective/eos_rate": rollout.ended.mean(),
        "value/explained_variance": 1 - unexplained,
    }
    return {name: value.item() for name, value in found.items()}


def pretraining_texts(config: Config) -> list[str]:
    return toy.pages(4000, config.seed) if config.texts == "toy" else load_texts(config.texts)


def training_prompts(config: Config) -> list[str]:
    """Prompts of the policy's training; a file's last eval_prompts rows are held out."""
    if config.prompts == "toy":
        rows = toy.prompts(config.iterations * config.batch_size, config.seed + 1)
    else:
        rows = load_prompts(config.prompts)[: -config.eval_prompts]
        if not rows:
            raise ValueError(
                f"{config.prompts} has no more than the {config.eval_prompts} prompts that are "
                "held out; lower --eval_prompts"
            )
    return [row["prompt"] for row in rows]


def encode_prompts(
    texts: list[str], codec: Codec, config: Config, block_size: int
) -> list[list[int]]:
    """The prompts in their template, cut from the left where no response would fit behind them."""
    room = block_size - config.max_new_tokens
    if room < 1:
        raise ValueError(
            f"--max_new_tokens {config.max_new_tokens} leaves no room for a prompt in a context of "
            f"{block_size} tokens; lower it"
        )
    return [codec.prompt(text)[-room:] for text in texts]


# --------------------------------------------------------------------------------------------------
# The comparison: every model answers the same held-out prompts

BEST_OF = 16
MEASURES = ("gold", "win_rate", "human_win_rate", "score", "kl", "length", "eos_rate", "repetition")
PARTS = tuple(f"gold/{part}" for part in toy.PARTS)


@dataclass
class Contest:
    """The held-out prompts, and the judges of every answer to them."""

    asked: list[str]
    prompts: list[list[int]]
    sft: GPT
    reward_model: ScalarModel | RewardFunction
    codec: Codec
    config: Config

    def answers(
        self,
        model: GPT,
        prompts: list[list[int]] | None = None,
        temperature: float | None = None,
    ) -> list[list[int]]:
        """The model's responses, to these prompts if not to the held-out ones.

        All models draw with the same random numbers, which narrows the differences between them.
        """
        seed = generator(self.config.seed, "compare")
        if temperature is None:
            temperature = self.config.temperature
        limits = (self.config.max_new_tokens, self.codec.eos, temperature)
        asked = prompts or self.prompts
        return generate(model, asked, *limits, generator=seed, title="answers to compare")

    def scores(self, prompts: list[list[int]], responses: list[list[int]]) -> list[float]:
        scores = [self.reward_model.score(b) for b in batches(prompts, responses, self.config)]
        return torch.cat(scores).tolist()

    def kl(self, model: GPT, responses: list[list[int]]) -> list[float]:
        """Per response, the sum of log pi - log pi_sft: nats, KL(pi, pi_sft) on average."""
        sums: list[float] = []
        for batch in batches(self.prompts, responses, self.config):
            logprobs, _ = token_logprobs(model, batch, self.config.temperature)
            ref_logprobs, _ = token_logprobs(self.sft, batch, self.config.temperature)
            parts = (logprobs - ref_logprobs).split(batch.lengths.tolist())
            sums += [part.sum().item() for part in parts]
        return sums

    def gold(self, responses: list[list[int]]) -> list[float]:
        """Points of the hidden rubric; empty where there is none."""
        if self.config.prompts != "toy":
            return []
        texts = [self.codec.text(tokens) for tokens in responses]
        return [toy.gold(*pair) for pair in zip(self.asked, texts, strict=True)]

    def best_of_n(self) -> tuple[list[list[int]], list[dict]]:
        """Of BEST_OF answers by the fine-tuned model, the one the reward model scores highest.

        Also the curve over n = 1, 2, 4, ... of the best among the first n: KL, score and gold.
        """
        prompts = [prompt for prompt in self.prompts for _ in range(BEST_OF)]
        responses = self.answers(self.sft, prompts)
        scores = torch.tensor(self.scores(prompts, responses)).view(-1, BEST_OF)
        curve, best = [], []
        for n in (2**i for i in range(BEST_OF.bit_length())):
            top = scores[:, :n].max(1)
            best = [responses[p * BEST_OF + i] for p, i in enumerate(top.indices.tolist())]
            gold = self.gold(best)
            curve.append({
                "n": n,
                "kl": best_of_n_kl(n),
                "score": top.values.mean().item(),
                "gold": sum(gold) / len(gold) if gold else None,
            })  # fmt: skip
        return best, curve

    def prompted(self, base: GPT) -> list[list[int]]:
        """The base model's continuation of a page with two worked examples, up to a line break."""
        encode, room = self.codec.tokenizer.encode_ordinary, base.config.block_size
        room -= self.config.max_new_tokens
        prompts = [encode(toy.few_shot(text))[-room:] for text in self.asked]
        answers = []
        for tokens in self.answers(base, prompts):
            text, ended = self.codec.text(tokens), tokens[-1] == self.codec.eos
            response = self.codec.response(toy.cut_answer(text))
            answers.append(response if ended or "\n" in text.strip() else response[:-1] or tokens)
        return answers


def evaluate(
    contest: Contest, name: str, responses: list[list[int]], model: GPT | None, rival: list[float]
) -> tuple[dict, list[float]]:
    """A row of results.json and the gold scores; win_rate is against the rival's, a tie half."""
    measured: dict[str, list[float]] = {
        "score": contest.scores(contest.prompts, responses),
        "length": [len(tokens) for tokens in responses],
        "eos_rate": [tokens[-1] == contest.codec.eos for tokens in responses],
        "repetition": [repetition(tokens) for tokens in responses],
    }
    if model is not None:
        measured["kl"] = contest.kl(model, responses)
    gold = contest.gold(responses)
    if gold:
        texts = [contest.codec.text(tokens) for tokens in responses]
        parts = [toy.gold_parts(*pair) for pair in zip(contest.asked, texts, strict=True)]
        measured |= {"gold": gold} | {f"gold/{k}": [p[k] for p in parts] for k in toy.PARTS}
    if rival:
        pairs = zip(gold, rival, strict=True)
        measured["win_rate"] = [(own > other) / 2 + (own >= other) / 2 for own, other in pairs]
    row: dict = {"model": name}
    for key in (*MEASURES, *PARTS):
        row[key], row[f"{key}_ci"] = None, None
        if key in measured:
            row[key], row[f"{key}_ci"] = mean_and_interval(measured[key])
    row["distinct_2"] = distinct(responses)
    row["pretraining_loss"] = model and pretraining_loss(model, contest.codec, contest.config)
    return row, gold


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n: an upper bound in nats (Stiennon et al. 2020, appendix G.3)."""
    return math.log(n) - (n - 1) / n


def bigrams(tokens: list[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(tokens))


def repetition(tokens: list[int]) -> float:
    """The share of a response's pairs of neighbouring tokens that stood in it before."""
    pairs = bigrams(tokens)
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def distinct(responses: list[list[int]]) -> float:
    """Distinct-2 (Li et al. 2016): different pairs of neighbouring tokens in all, per pair."""
    pairs = [pair for tokens in responses for pair in bigrams(tokens)]
    return len(set(pairs)) / max(1, len(pairs))


def pretraining_loss(model: GPT, codec: Codec, config: Config) -> float | None:
    """Nats per token of toy documents that pretraining has not seen."""
    if config.prompts != "toy":
        return None
    pages = [codec.response(page)[: model.config.block_size] for page in toy.pages(300, -1)]
    sequences = batches([page[:1] for page in pages], [page[1:] for page in pages], config)
    return -torch.cat([token_logprobs(model, batch)[0] for batch in sequences]).mean().item()


def held_out(config: Config) -> list[str]:
    if config.prompts == "toy":
        rows = toy.prompts(config.eval_prompts, config.seed, config.split)
    else:
        rows = load_prompts(config.prompts)[-config.eval_prompts :]
    return [row["prompt"] for row in rows]


@torch.no_grad()
def compare(config: Config, policies: dict[str, GPT], started: float) -> list[dict]:
    """Prints the table, writes results.json and comparison.txt, and returns the table's rows."""
    device, codec, asked = resolve_device(config.device), Codec.load(config.sft), held_out(config)
    sft = GPT.load(config.sft).to(device).eval()
    reward_model = load_reward_model(config, codec)
    prompts = encode_prompts(asked, codec, config, sft.config.block_size)
    contest = Contest(asked, prompts, sft, reward_model, codec, config)
    answers: dict[str, tuple[list[list[int]], GPT | None]] = {}
    if Path(config.base).exists() or is_hugging_face(config.base):
        base = GPT.load(config.base).to(device).eval()
        answers["base"] = contest.answers(base), base
        if config.prompts == "toy":
            answers["prompted"] = contest.prompted(base), None
    answers["sft"] = contest.answers(sft), sft
    answers["sft_greedy"] = contest.answers(sft, temperature=0), None
    best, curve = contest.best_of_n()
    answers[f"best_of_{BEST_OF}"] = best, None
    answers |= {name: (contest.answers(model), model) for name, model in policies.items()}
    # the fine-tuned model first: its gold scores are what the others' win rates are against
    sft_row, rival = evaluate(contest, "sft", *answers["sft"], [])
    rows = []
    for name, (responses, model) in answers.items():
        row = sft_row if name == "sft" else evaluate(contest, name, responses, model, rival)[0]
        if name.startswith("best_of"):
            row["kl"] = best_of_n_kl(BEST_OF)
        rows.append(row)
    if config.judge == "human":
        judge_by_hand(rows, answers, contest)
    print_table(rows)
    results = {"seed": config.seed, "seconds": time.time() - started, "rows": rows}
    write_results(config, results | {"best_of_n": curve}, contest, answers)
    return rows


def judge_by_hand(rows: list[dict], answers: dict, contest: Contest) -> None:
    """A person ranks the models' answers, blind; adds each model's win rate against sft."""
    if not contest.config.resume:
        labeler.refuse_answers(contest.config.out)
    texts = [[contest.codec.text(tokens) for tokens in given] for given, _ in answers.values()]
    items = [
        {"prompt": prompt, "responses": list(responses)}
        for prompt, *responses in zip(contest.asked, *texts, strict=True)
    ]
    person = labeler.Person(items, contest.config.out, contest.config.seed)
    person.rank_all()
    sft, judged = list(answers).index("sft"), [item["ranks"] for item in person.comparisons()]
    for i, row in enumerate(rows):
        wins = [(ranks[i] < ranks[sft]) / 2 + (ranks[i] <= ranks[sft]) / 2 for ranks in judged]
        if wins and i != sft:
            row["human_win_rate"], row["human_win_rate_ci"] = mean_and_interval(wins)


def write_results(config: Config, results: dict, contest: Contest, answers: dict) -> None:
    """results.json, and comparison.txt with answers side by side; prints those to one prompt."""
    blocks = []
    for i, text in enumerate(contest.asked[:5]):
        blocks.append(f"== {text}")
        for name, (tokens, _) in answers.items():
            blocks.append(f"[{name}] {contest.codec.text(tokens[i])}")
    folder = Path(config.out)
    lock(folder)
    for name, content in (
        ("results.json", json.dumps(results, indent=1)),
        ("comparison.txt", printable("\n\n".join(blocks) + "\n")),
    ):
        write_atomically(folder / name, lambda file, text=content: file.write(text.encode()))
    print("\n".join(map(printable, blocks[1 : len(answers) + 1])))


def print_table(rows: list[dict]) -> None:
    """Means with their 95 % half-widths, a model a line; below, the parts of the gold score."""
    for columns in ((*MEASURES, "distinct_2", "pretraining_loss"), PARTS):
        columns = [name for name in columns if any(row[name] is not None for row in rows)]
        if columns:
            titles = [name.removeprefix("pretraining_").removeprefix("gold/") for name in columns]
            print("\n" + f"{'':12}" + "".join(f"{title:>14}" for title in titles))
            for row in rows:
                cells = [cell(row[name], row.get(f"{name}_ci")) for name in columns]
                print(f"{row['model']:12}" + "".join(f"{text:>14}" for text in cells))
    print()


def cell(mean: float | None, half_width: float | None) -> str:
    if mean is None:
        return ""
    return f"{mean:.2f}" if half_width is None else f"{mean:.2f} ± {half_width:.2f}"


@precision
def main(config: Config) -> dict:
    started = time.time()
    if config.check:
        return self_check(config)
    if config.compare:
        policies = load_policies(config)
    else:
        policies = train(config)
        if config.ablation:
            no_kl = {"kl_coef": 0.0, "kl_target": 0.0, "ema_decay": 0.0}
            policies |= train(replace(config, out=f"{config.out}_no_kl", **no_kl))
    if rank_and_world()[0]:  # one process compares
        return {}
    rows = compare(replace(config, shard=False), policies, started)
    print(f"wrote {config.out}: results.json, comparison.txt, samples.txt, metrics.jsonl")
    return {row["model"]: row for row in rows}


def self_check(config: Config) -> dict:
    """tests/self_check.py on this configuration; exit status 2 if a check fails."""
    path = Path(__file__).with_name("tests") / "self_check.py"
    return runpy.run_path(str(path))["main"](config)


def load_policies(config: Config) -> dict[str, GPT]:
    """The policies of --compare by their folders' names, each with its average if it has one."""
    device, policies = resolve_device(config.device), {}
    for folder in map(Path, config.compare.split(",")):
        policies[folder.name] = GPT.load(folder).to(device).eval()
        if load_checkpoint(folder)["config"].get("ema_decay"):
            policies[f"{folder.name}_ema"] = GPT.load(folder, average=True).to(device).eval()
    return policies


if __name__ == "__main__":
    command(main, Config, PRESETS)
