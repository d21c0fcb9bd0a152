"""Stage 3: proximal policy optimisation against the reward model (InstructGPT, section 3.5).

The policy starts as the fine-tuned model. Every iteration it answers a batch of prompts; the reward
model scores each response, a penalty per token holds the policy near the fine-tuned model, and PPO
(Schulman et al. 2017) raises the advantages that GAE (Schulman et al. 2016) reads off a value
model, which starts as the reward model. Then all models answer prompts that none has seen, side by
side: base, base with two examples in its prompt, fine-tuned, best of 16, PPO with and without KL.

    python ppo.py                              # train with and without the KL penalty, compare
    python ppo.py --kl_coef 0.6 --no-ablation  # a stronger penalty, and no second run
    python ppo.py --ptx_coef 1 --out out/ppo_ptx --no-ablation          # PPO-ptx
    python ppo.py --preset rloo                # no value model: responses are compared with others
    python ppo.py --init out/ppo --reward_model out/reward2 --out out/ppo2  # iterate
    python ppo.py --compare out/ppo,out/ppo_ptx --out out/compare       # the comparison alone
    python ppo.py --prompts mine.jsonl         # {"prompt": ...} a line, the last held out
    python ppo.py --reward mine.py:my_reward   # a Python function in the reward model's place
"""

import copy
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import data
from data import labeler, processes, report
from data.folders import claim, keep_apart
from data.presets import PPO as PRESETS
from data.processes import gather, generator, mean_of_all, move, my_share, rank_key, shuffled
from data.python_reward import RewardFunction
from data.records import UserError
from data.run import Count, Free, Input, Positive, Rate, Run, RunConfig, Share, command, program
from data.tokenizer import Codec, Pair, columns, documents
from data.weights import check_finite, is_hugging_face
from model import (
    GPT,
    Batch,
    ScalarModel,
    adam,
    batches,
    clip_and_step,
    generate,
    grouped,
    lr_schedule,
    sampling_copy,
    to_device,
    token_logprobs,
)

import torch
from torch import Tensor
from torch.optim import Optimizer


@dataclass
class Config(RunConfig):
    out: Free[str] = "out/ppo"  # run folder; the run without a KL penalty has <out>_no_kl
    sft: Input = "out/sft"  # folder of the fine-tuned model: the policy's start and its reference
    init: Input = ""  # folder of a policy to continue, in place of the fine-tuned model
    reward_model: Input = "out/reward"  # folder of the reward model, where the value model starts
    reward: Input = ""  # path.py:function(texts, prompts) -> scores, in place of the reward model
    reward_retries: Free[Count] = 3  # further calls of it after a lost connection or a time-out
    trust: Free[bool] = False  # train even on a reward model that is not better than chance
    base: Free[Input] = "out/base"  # folder of the base model, for the comparison; or none
    prompts: Input = "toy"  # toy, or a .jsonl file of prompts
    iterations: Count = 52  # rollouts, each followed by ppo_epochs passes over it
    batch_size: Positive = 64  # prompts in a rollout (InstructGPT: 512)
    minibatch_size: Positive = 16  # prompts in an optimiser step (InstructGPT: 64)
    ppo_epochs: Positive = 1  # passes over a rollout, as InstructGPT (lm-human-preferences: 4)
    lr: Rate = 2e-3  # peak learning rate of the policy
    value_lr: Rate = 2e-3  # peak learning rate of the value model
    warmup: Count = 4  # iterations until the learning rates peak; then cosine to a tenth
    kl_coef: Rate = 0.35  # weight of the KL penalty (InstructGPT's beta, there 0.02)
    kl_target: Rate = 0.0  # nats a response: adapt kl_coef to reach this KL; 0 leaves it fixed
    kl_horizon: Positive = 10000  # episodes in which kl_coef changes by a factor of at most e^0.2
    gamma: Share = 1.0  # discount per token
    lam: Share = 0.95  # GAE's lambda: 0 trusts the value model, 1 the observed returns
    advantage: str = "gae"  # gae: from a value model; rloo, grpo: from --samples of each prompt
    samples: Positive = 1  # responses to each prompt of a rollout; batch_size counts all of them
    value_warmup: Count = 0  # first iterations, in which only the value model learns
    cliprange: Rate = 0.2  # a ratio outside 1 +- cliprange earns the policy nothing more
    cliprange_value: Rate = 0.2  # likewise for the value model's change
    max_approx_kl: Rate = 0.0  # end an iteration's updates above this policy/approx_kl; 0: never
    temperature: Annotated[float, 0.01, 100] = 1.0  # of sampling, and of all log-probabilities
    max_new_tokens: Positive = 80  # longest response
    missing_eos_score: float = -1.0  # the score of a response that does not end; nan keeps its own
    # variants
    value: str = "model"  # model: from the reward model; head: a linear layer on the policy
    vf_coef: Rate = 0.1  # weight of the value loss if its head shares the policy's network
    ema_decay: Share = 0.9  # of the averaged policy, per iteration (InstructGPT: 0.992); 0: none
    ptx_coef: Rate = 0.0  # weight of the pretraining loss: PPO-ptx (InstructGPT's gamma: 27.8)
    ptx_ratio: Rate = 0.5  # documents per response in an optimiser step (InstructGPT: 8)
    texts: Input = "toy"  # the documents: toy, .txt, a folder of .txt, or .jsonl with {"text": ...}
    # the comparison
    ablation: Free[bool] = True  # also train without the KL penalty
    compare: Free[str] = ""  # folders of policies, with commas between them: compare, do not train
    eval_prompts: Free[Annotated[int, 2, math.inf]] = 200  # held-out prompts of the comparison
    judge: Free[str] = "gold"  # gold: the rubric, if there is one; human: you rank the answers too
    split: Free[str] = "test"  # toy prompts of the comparison: test; dev while you tune


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


def rloo(rewards: Tensor, samples: int) -> Tensor:
    """A_i = R_i - the mean R of the other responses to the same prompt: (B,) -> (B,).

    REINFORCE leave-one-out (Ahmadian et al. 2024, section 3.3); `samples` adjacent responses belong
    to a prompt, and R_i holds the KL penalty. Theirs is one update for each sample; here, the
    advantage goes to every token of the response and into PPO's clipped loss.
    """
    groups = rewards.view(-1, samples)
    others = (groups.sum(1, keepdim=True) - groups) / (samples - 1)
    return (groups - others).flatten()


def grpo(rewards: Tensor, samples: int) -> Tensor:
    """A_i = (R_i - mean) / standard deviation over the responses to the same prompt: (B,) -> (B,).

    Group-relative advantages (Shao et al. 2024, section 4.1.2), where the KL penalty, kl_k3, is a
    term of the loss and not of R; its gradient is that of KL(pi_ref, pi). Theirs is a mean over
    responses of their means over tokens; here it is the mean over all tokens, as in all losses.
    """
    groups = rewards.view(-1, samples)
    mean, deviation = groups.mean(1, keepdim=True), groups.std(1, keepdim=True)
    return ((groups - mean) / (deviation + 1e-8)).flatten()


def kl_k3(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """rho - 1 - log rho, rho = pi_other / pi: KL(pi, pi_other) per token (Schulman 2020): (N,).

    Unbiased where the tokens were drawn from pi, and never negative; expm1 keeps small values.
    """
    log_ratio = other_logprobs - logprobs
    return log_ratio.expm1() - log_ratio


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
# An iteration: make a rollout, update


@dataclass
class Models:
    policy: GPT
    ref_policy: GPT
    reward_model: ScalarModel | RewardFunction
    value_model: ScalarModel | None  # none with --advantage rloo or grpo
    average: GPT | None  # the policy's moving average: evaluated, never sampled from in training
    codec: Codec
    documents: list[Pair]  # of PPO-ptx

    @classmethod
    def load(cls, config: Config) -> "Models":
        """All networks where they start, in eval mode: there is no dropout anywhere in RL."""
        if config.value == "head" and config.shard:
            raise UserError("--shard needs --value model: a head of the policy's own is whole")
        codec, policy = Codec.load(config.sft), GPT.load(config.init or config.sft)
        if config.init:
            codec.check_same(config.init)
        torch.manual_seed(processes.seed_of(config.seed, "head"))
        if config.advantage != "gae":
            value_model = None
        elif config.value == "head" or config.reward:
            value_model = ScalarModel(policy, shared=config.value == "head")
        else:
            value_model = ScalarModel.load(config.reward_model)
        ref_policy = GPT.load(config.sft)
        average = copy.deepcopy(policy) if config.ema_decay else None
        for network in filter(None, (ref_policy, policy, value_model, average)):
            to_device(network, config).eval()
        texts = []
        if config.ptx_coef:
            texts = data.texts_to_mix(config.texts, 4000, config.seed, config.prompts)
            if not texts:
                raise UserError(f"--ptx_coef with --prompts {config.prompts} needs --texts <file>")
        pages = documents(texts, codec, policy.config.block_size)
        reward_model = load_reward_model(config, codec)
        return cls(policy, ref_policy, reward_model, value_model, average, codec, pages)


def load_reward_model(config: Config, codec: Codec) -> ScalarModel | RewardFunction:
    if config.reward:
        return RewardFunction(config.reward, codec, config.reward_retries)
    codec.check_same(config.reward_model)
    return to_device(ScalarModel.load(config.reward_model), config).eval()


@dataclass
class Rollout:
    """B sampled responses, and all that is known about them before the first update: on the CPU."""

    prompts: list[list[int]]
    responses: list[list[int]]
    lengths: Tensor  # (B,)
    ended: Tensor  # (B,) 1 where end-of-text was sampled
    scores: Tensor  # (B,)
    old_logprobs: Tensor  # (N,), like all below
    ref_logprobs: Tensor
    old_values: Tensor | None  # none without a value model, like returns
    advantages: Tensor
    returns: Tensor | None
    rewards: Tensor | None = None

    def select(self, chosen: list[int]) -> "Rollout":
        """The same about the chosen responses alone, in this order."""
        ends = self.lengths.cumsum(0).tolist()
        tokens = [t for b in chosen for t in range(ends[b] - int(self.lengths[b]), ends[b])]

        def pick(x: list | Tensor | None) -> list | Tensor | None:
            if x is None or isinstance(x, list):
                return x and [x[b] for b in chosen]
            return x[chosen if len(x) == len(self.prompts) else tokens]

        return Rollout(**{field.name: pick(getattr(self, field.name)) for field in fields(self)})

    def micro_batches(self, chosen: list[int], config: Config) -> Iterator[tuple[Batch, "Rollout"]]:
        """The chosen responses, at most config.max_tokens tokens at a time."""
        pairs = [[(self.prompts[b], self.responses[b])] for b in chosen]
        for part, batch in grouped(pairs, config):
            yield batch, move(self.select([chosen[i] for i in part]), batch.tokens.device)


@torch.no_grad()
def make_rollout(
    models: Models, prompts: list[list[int]], config: Config, kl_coef: float, seed: torch.Generator
) -> Rollout:
    """Samples a response to every prompt, and computes what the update needs."""
    # 1. sample; every process takes its share of the prompts
    mine, eos = my_share(prompts), models.codec.eos
    limits = (config.max_new_tokens, eos, config.temperature)
    sampled = generate(models.policy, mine, *limits, generator=seed)

    # 2. score, by the forward pass that also trains, so that the first ratio is exactly 1
    found = defaultdict(list)
    for batch in batches(mine, sampled, config):
        found["lengths"].append(batch.lengths)
        found["scores"].append(models.reward_model.score(batch))
        if models.value_model:
            found["old_values"].append(models.value_model.values(batch))
        for name, model in (("old", models.policy), ("ref", models.ref_policy)):
            found[f"{name}_logprobs"].append(token_logprobs(model, batch, config.temperature)[0])

    # 3. gather: every process knows the whole rollout
    shares = gather((sampled, {name: torch.cat(parts).cpu() for name, parts in found.items()}))
    responses = [tokens for share, _ in shares for tokens in share]
    known = {name: torch.cat([x[name] for _, x in shares]) for name in found}
    check_finite("sampled responses:", known)

    # 4. a response that does not end gets a score of its own
    ended = torch.tensor([float(r[-1] == eos) for r in responses])
    if not math.isnan(config.missing_eos_score):
        known["scores"] = torch.where(ended == 1, known["scores"], config.missing_eos_score)

    # 5. rewards; GRPO has the KL penalty in its loss
    penalty = 0.0 if config.advantage == "grpo" else kl_coef
    lengths, logprobs, ref_logprobs = known["lengths"], known["old_logprobs"], known["ref_logprobs"]
    rewards = kl_penalised_rewards(known["scores"], logprobs, ref_logprobs, lengths, penalty)

    # 6. advantages and returns
    if config.advantage == "gae":
        advantages, returns = gae(rewards, known["old_values"], lengths, config.gamma, config.lam)
        known |= {"advantages": whiten(advantages), "returns": returns}
    else:
        sums = torch.stack([r.sum() for r in rewards.split(lengths.tolist())])
        estimate = {"rloo": rloo, "grpo": grpo}[config.advantage]
        advantages = estimate(sums, config.samples).repeat_interleave(lengths)
        known |= {"advantages": advantages, "old_values": None, "returns": None}
    known |= {"ended": ended, "rewards": rewards}
    return Rollout(prompts=prompts, responses=responses, **known)


def update(
    models: Models, optimizer: Optimizer, rollout: Rollout, config: Config, lr: float, key: tuple
) -> dict[str, float]:
    """ppo_epochs passes over the rollout in shuffled minibatches; returns the mean statistics.

    The last part of the key is the iteration: in the first ones the policy may have to wait.
    """
    stats: dict[str, list[Tensor | float]] = defaultdict(list)
    # Adam is scale-invariant, so a weight between losses that share no parameter hardly matters
    vf_coef = config.vf_coef if config.value == "head" else 1.0
    policy_learns = key[-1] >= config.value_warmup
    for epoch in range(config.ppo_epochs):
        order = shuffled(range(len(rollout.prompts)), *key, epoch)
        for i in range(0, len(order), config.minibatch_size):
            chosen = order[i : i + config.minibatch_size]
            total, loss = int(rollout.lengths[chosen].sum()), 0.0
            before = len(stats["policy/loss"])
            for batch, old in rollout.micro_batches(my_share(chosen), config):
                n = len(batch.decided_at)
                logprobs, entropy = token_logprobs(models.policy, batch, config.temperature)
                pg_loss = policy_loss(logprobs, old.old_logprobs, old.advantages, config.cliprange)
                if config.advantage == "grpo":
                    pg_loss = pg_loss + config.kl_coef * kl_k3(logprobs, old.ref_logprobs).mean()
                if policy_learns:
                    (pg_loss * (n / total)).backward()  # frees the graph before the value pass
                found = {"policy/loss": pg_loss, "policy/entropy": entropy.mean()}
                if models.value_model:
                    values, clip = models.value_model.values(batch), config.cliprange_value
                    vf_loss = value_loss(values, old.old_values, old.returns, clip)
                    (vf_coef * vf_loss * (n / total)).backward()
                    found["value/loss"] = vf_loss
                if n:  # a sharded pass may be empty
                    loss += (pg_loss + vf_coef * found.get("value/loss", 0)).detach() * n / total
                    found |= ratio_statistics(logprobs, old.old_logprobs, config.cliprange)
                    for name, x in found.items():
                        stats[name].append(x.detach())
            if config.ptx_coef and policy_learns:
                n = math.ceil(config.ptx_ratio * len(chosen))
                drawn = shuffled(models.documents, *key, epoch, i, "ptx")[:n]
                stats["ptx/loss"] += add_ptx_gradient(models.policy, drawn, config)
            _, norms = clip_and_step(optimizer, loss, lr)
            for name, norm in zip(("grad_norm", "value/grad_norm"), norms, strict=False):
                stats[name].append(norm)
            if config.max_approx_kl:
                latest = {"kl": stats["policy/approx_kl"][before:]}
                if mean_of_all(latest)["kl"] > config.max_approx_kl:
                    return mean_of_all(stats)
    return mean_of_all(stats)


@torch.no_grad()
def ratio_statistics(logprobs: Tensor, old_logprobs: Tensor, cliprange: float) -> dict[str, Tensor]:
    """KL(old, new), and the share of ratios that are clipped."""
    change = (logprobs - old_logprobs).expm1()
    return {
        "policy/approx_kl": kl_k3(old_logprobs, logprobs).mean(),
        "policy/clipfrac": (change.abs() > cliprange).float().mean(),
    }


def add_ptx_gradient(policy: GPT, drawn: list[Pair], config: Config) -> list[Tensor]:
    """Adds the gradient of ptx_coef times the mean loss on documents; returns their losses.

    PPO-ptx: the last term of InstructGPT's equation 2.
    """
    total, mine, losses = sum(len(rest) for _, rest in drawn), my_share(drawn), []
    for batch in batches(*columns(mine), config):
        n = len(batch.decided_at)
        loss = -token_logprobs(policy, batch)[0].mean()
        (config.ptx_coef * loss * (n / total)).backward()
        losses += [loss.detach()] if n else []
    return losses


@torch.no_grad()
def update_average(average: GPT, policy: GPT, decay: float) -> None:
    """average <- decay average + (1 - decay) policy, weight by weight (InstructGPT, C.4)."""
    for mean, weight in zip(average.parameters(), policy.parameters(), strict=True):
        mean.lerp_(weight, 1 - decay)


def train(config: Config) -> dict[str, GPT]:
    """InstructGPT's third stage. Returns the policy, by its folder's name, and its average."""
    models = Models.load(config)
    if not config.reward and not config.trust:
        check_reward_model(config.reward_model)
    policy, value_model, codec = models.policy, models.value_model, models.codec
    modules, learners = {"model": policy}, [(policy, config.lr)]
    if value_model:
        modules["value_model"] = value_model
        part = value_model.head if config.value == "head" else value_model
        learners.append((part, config.value_lr))
    modules |= {"average": models.average} if models.average else {}
    optimizer = adam(learners)
    B, n, world = config.batch_size, config.eval_prompts, data.rubric(config.prompts)
    needed = config.iterations * B // config.samples
    texts = data.prompts(config.prompts, needed, config.seed + 1, held_out=n)
    room = policy.config.block_size - config.max_new_tokens
    questions = [(text, codec.prompt(text, room)) for text in texts]
    claim(config.out, config.resume)
    held_out = {} if world else {"eval_prompts": str(n)}  # rows of a file that are not trained on
    run = Run("ppo", config, config.out, policy.config, codec, optimizer, held_out, **modules)
    kl_coef = run.extra.setdefault("kl_coef", config.kl_coef)
    for step in run.steps(config.iterations):
        start, key = time.time(), (config.seed, "ppo", step)
        places = [i // config.samples for i in range(step * B, (step + 1) * B)]
        chosen = [questions[i % len(questions)] for i in places]
        asked, prompts = map(list, zip(*chosen, strict=True))
        rollout = make_rollout(models, prompts, config, kl_coef, generator(*rank_key(*key)))
        lr = lr_schedule(step, config.iterations, config.warmup)
        metrics = summary(rollout, kl_coef)
        metrics |= update(models, optimizer, rollout, config, lr, key)
        if models.average:
            update_average(models.average, policy, config.ema_decay)
        metrics |= {"lr": lr * config.lr, "kl_coef": kl_coef}
        if config.kl_target:
            kl, target, horizon = metrics["objective/kl"], config.kl_target, config.kl_horizon
            kl_coef = run.extra["kl_coef"] = adapt_kl_coef(kl_coef, kl, B, target, horizon)
        metrics["tokens_per_second"] = len(rollout.advantages) / (time.time() - start)
        answers = [codec.text(tokens) for tokens in rollout.responses]
        if world:  # the hidden rubric: for the reader, no model sees it
            gold = [world.gold(*pair) for pair in zip(asked, answers, strict=True)]
            metrics["objective/gold"] = sum(gold) / len(gold)
        run.log(metrics, shown=[f"objective/{x}" for x in ("score", "gold", "kl", "length")])
        if step % 10 == 0 or step == config.iterations - 1:
            for b in range(0, min(3 * config.samples, B), config.samples):
                score = f"[step {step}, score {rollout.scores[b]:+.2f}]"
                run.sample(f"{score} {asked[b]}", answers[b])
            run.sample(*token_by_token(models, rollout, config))
    policies = {run.folder.name: policy}
    if models.average:
        policies[f"{run.folder.name}_ema"] = models.average
    return {name: sampling_copy(model, torch.float32) for name, model in policies.items()}


@torch.no_grad()
def token_by_token(models: Models, rollout: Rollout, config: Config) -> list[str]:
    """A table of all numbers about the first response, a line per token, after the update."""
    batch, own = next(rollout.micro_batches([0], config))
    logprobs, _ = token_logprobs(models.policy, batch, config.temperature)
    shown = {"logprob": own.old_logprobs, "ref": own.ref_logprobs}
    shown |= {"kl": own.old_logprobs - own.ref_logprobs, "reward": own.rewards}
    shown |= {"value": own.old_values, "advantage": own.advantages, "return": own.returns}
    shown |= {"ratio": (logprobs - own.old_logprobs).exp()}  # of the new policy to the old one
    known = {name: x.tolist() for name, x in shown.items() if x is not None}
    tokens = [repr(models.codec.tokenizer.decode([t])) for t in own.responses[0]]
    return report.token_table(tokens, known)


CHOICES = {
    "advantage": ("gae", "rloo", "grpo"),
    "value": ("model", "head"),
    "judge": ("gold", "human"),
    "split": ("test", "dev"),
}
UNUSED = {"ptx_coef": ("texts",), "kl_target": ("kl_horizon",), "reward": ("reward_retries",)}


def check_settings(config: Config) -> None:
    """UserError for a value that is unknown, or that contradicts another one."""
    data.run.check_choices(config, CHOICES)
    if config.kl_target and (config.advantage == "grpo" or not config.kl_coef):
        raise UserError("--kl_target adapts the penalty in rewards: --kl_coef > 0, and no grpo")
    B, k, world = config.batch_size, config.samples, processes.rank_and_world()[1]
    if B < world * k:
        raise UserError(f"--batch_size {B} is too small: {world} processes need {world * k}")
    if B % k:
        raise UserError(f"--batch_size {B} is no multiple of --samples {k}")
    if config.advantage != "gae" and config.samples < 2:
        raise UserError(f"--advantage {config.advantage} needs --samples 2 or more")
    if config.value_warmup and (config.advantage != "gae" or config.value == "head"):
        raise UserError("--value_warmup needs a value model of its own: --value model")
    for without, names in UNUSED.items():
        if not getattr(config, without):
            data.run.name_unused(config, f"without --{without}", *names)
    if config.advantage != "gae":
        value = ("value", "value_lr", "cliprange_value", "vf_coef", "gamma", "lam")
        data.run.name_unused(config, f"with --advantage {config.advantage}", *value)
    if config.reward:
        data.run.name_unused(config, "with --reward", "reward_model", "trust")
        if not math.isnan(config.missing_eos_score):
            score = f"--missing_eos_score {config.missing_eos_score}"
            print(f"a response that does not end gets {score} (nan: what --reward returns)")
    for folder in map(Path, config.compare.split(",") if config.compare else [config.out]):
        if folder.name in ROWS:
            raise UserError(f"{folder}: the comparison has a row {folder.name}; rename the folder")
    if config.compare and Path(config.out, "checkpoint.pt").exists():
        raise UserError(f"--out {config.out} holds a run; --compare needs another one: --out <new>")


def check_reward_model(folder: str) -> None:
    """UserError for a reward model in mid-training, or one that is not better than chance."""
    last = [{}, *data.run.load_checkpoint(folder)["metrics"]][-1]
    if not {"accuracy", "accuracy_ci"} <= last.keys():
        raise UserError(f"{folder} is not trained to its end; continue with reward.py --resume")
    accuracy, half_width = last["accuracy"], last["accuracy_ci"]
    if accuracy - half_width <= 0.5:
        raise UserError(
            f"{folder} orders {accuracy:.3f} ± {half_width:.3f} of held-out pairs, no better than "
            "chance; train it on more comparisons, or --trust it"
        )


def summary(rollout: Rollout, kl_coef: float) -> dict[str, float]:
    """What the policy did in this rollout; sums are over a response's tokens, in nats."""
    log_ratio = rollout.ref_logprobs - rollout.old_logprobs
    B, score, returns = len(rollout.prompts), rollout.scores.mean(), rollout.returns
    kl = -log_ratio.sum() / B  # k1: unbiased, and what the reward holds
    found = {
        "objective/score": score,
        "objective/kl": kl,
        "objective/kl_k3": kl_k3(rollout.old_logprobs, rollout.ref_logprobs).sum() / B,
        "objective/reward": score - kl_coef * kl,
        "objective/length": rollout.lengths.float().mean(),
        "objective/eos_rate": rollout.ended.mean(),
    }
    if returns is not None:
        unexplained = (returns - rollout.old_values).var() / returns.var()
        found["value/explained_variance"] = 1 - unexplained
    return {name: value.item() for name, value in found.items()}


# --------------------------------------------------------------------------------------------------
# The comparison: every model answers the same held-out prompts

BEST_OF = 16
ROWS = ("base", "prompted", "sft", "sft_greedy", f"best_of_{BEST_OF}")
Tokens = list[list[int]]


def sample(
    model: GPT, prompts: Tokens, codec: Codec, config: Config, temperature: float | None = None
) -> Tokens:
    """A model's responses. All models draw with the same random numbers: differences are paired."""
    temperature = config.temperature if temperature is None else temperature
    limits = (config.max_new_tokens, codec.eos, temperature)
    seed = generator(config.seed, "compare")
    return generate(model, prompts, *limits, generator=seed, title="answers to compare")


def few_shot_answers(base: GPT, texts: list[str], codec: Codec, config: Config) -> Tokens:
    """The base model's continuation of a page with two worked examples, up to a line break."""
    world, room = data.rubric(config.prompts), base.config.block_size - config.max_new_tokens
    plain, answers = Codec(codec.tokenizer, "{prompt}"), []
    pages = [plain.prompt(world.few_shot(text), room) for text in texts]
    for tokens in sample(base, pages, codec, config):
        text, ended = codec.text(tokens), tokens[-1] == codec.eos
        response = codec.response(world.cut_answer(text))
        answers.append(response if ended or "\n" in text.strip() else response[:-1] or tokens)
    return answers


def score(
    reward_model: ScalarModel | RewardFunction, prompts: Tokens, responses: Tokens, config: Config
) -> list[float]:
    return torch.cat([reward_model.score(b) for b in batches(prompts, responses, config)]).tolist()


def kl_from(
    ref_policy: GPT, model: GPT, prompts: Tokens, responses: Tokens, config: Config
) -> list[float]:
    """Per response, the sum of log pi - log pi_ref: nats, KL(pi, pi_ref) on average."""
    sums: list[float] = []
    for batch in batches(prompts, responses, config):
        logprobs, _ = token_logprobs(model, batch, config.temperature)
        ref_logprobs, _ = token_logprobs(ref_policy, batch, config.temperature)
        parts = (logprobs - ref_logprobs).split(batch.lengths.tolist())
        sums += torch.stack([part.sum() for part in parts]).tolist()
    return sums


def pretraining_loss(model: GPT, codec: Codec, config: Config) -> float | None:
    """Nats per token of documents that pretraining has not seen, where the world has some."""
    if (world := data.rubric(config.prompts)) is None:
        return None
    pages = [codec.response(page)[: model.config.block_size] for page in world.pages(300, -1)]
    sequences = batches([page[:1] for page in pages], [page[1:] for page in pages], config)
    return -torch.cat([token_logprobs(model, batch)[0] for batch in sequences]).mean().item()


def load_base(config: Config, codec: Codec) -> GPT | None:
    """The base model, if there is one. UserError if it does not have the policy's vocabulary."""
    if not (Path(config.base).exists() or is_hugging_face(config.base)):
        return None
    base = GPT.load(config.base)
    if (found := base.config.vocab_size) != (needed := codec.tokenizer.n_vocab):
        raise UserError(
            f"--base {config.base} has {found} tokens and --sft {config.sft} has {needed}; name "
            "the model that was fine-tuned, or --base none"
        )
    return base


@torch.no_grad()
def compare(config: Config, policies: dict[str, GPT], started: float) -> list[dict]:
    """Prints the table, writes results.json and comparison.txt, and returns the table's rows."""
    codec, sft = Codec.load(config.sft), to_device(GPT.load(config.sft), config).eval()
    reward_model, world = load_reward_model(config, codec), data.rubric(config.prompts)
    n, room = config.eval_prompts, sft.config.block_size - config.max_new_tokens
    texts = data.prompts(config.prompts, n, config.seed, config.split, held_out=n)
    prompts = [codec.prompt(text, room) for text in texts]

    def points(responses: Tokens) -> dict[str, list[float]]:
        return report.rubric_points(world, texts, [codec.text(tokens) for tokens in responses])

    # who answers: a model by itself; or (None) by a search, or after another prompt
    answers: dict[str, tuple[Tokens, GPT | None]] = {}
    base = load_base(config, codec)
    if config.judge == "human":  # base and prompted; sft, greedy and best of n; policies
        labeler.check_number(3 + bool(base) * (1 + bool(world)) + len(policies))
    if base:
        base = to_device(base, config).eval()
        answers["base"] = sample(base, prompts, codec, config), base
        if world:
            answers["prompted"] = few_shot_answers(base, texts, codec, config), None
    answers["sft"] = sample(sft, prompts, codec, config), sft
    answers["sft_greedy"] = sample(sft, prompts, codec, config, temperature=0), None
    repeated = [prompt for prompt in prompts for _ in range(BEST_OF)]
    sampled = sample(sft, repeated, codec, config)
    scores = score(reward_model, repeated, sampled, config)
    best = report.best_of_n(sampled, scores, BEST_OF)
    answers[f"best_of_{BEST_OF}"] = best[BEST_OF][0], None
    answers |= {name: (sample(m, prompts, codec, config), m) for name, m in policies.items()}

    rows, rival = [], points(answers["sft"][0]).get("gold")
    for name, (responses, model) in answers.items():
        measured = {"score": score(reward_model, prompts, responses, config)} | points(responses)
        if rival and name != "sft":
            measured["win_rate"] = report.wins(measured["gold"], rival)
        if model:
            measured["kl"] = kl_from(sft, model, prompts, responses, config)
        row = report.row(name, responses, codec.eos, measured)
        row["pretraining_loss"] = model and pretraining_loss(model, codec, config)
        if name.startswith("best_of"):
            row["kl"] = report.best_of_n_kl(BEST_OF)
        rows.append(row)
    curve = report.best_of_n_curve(best, points)
    answered = {n: [codec.text(tokens) for tokens in given] for n, (given, _) in answers.items()}
    report.finish(config, rows, curve, answered, texts, started)
    return rows


def load_policies(config: Config) -> dict[str, GPT]:
    """The policies of --compare by their folders' names, each with its average if it has one."""
    policies, codec = {}, Codec.load(config.sft)
    for folder in map(Path, config.compare.split(",")):
        if folder.name in policies:
            raise UserError(f"--compare {config.compare}: two folders are called {folder.name}")
        codec.check_same(folder)
        policies[folder.name] = to_device(GPT.load(folder), config).eval()
        theirs = data.run.load_checkpoint(folder)["config"]
        n, same = theirs.get("eval_prompts", math.inf), theirs.get("prompts") == config.prompts
        if same and not data.rubric(config.prompts) and n < config.eval_prompts:
            raise UserError(f"{folder} was trained on all but {n} prompts; --eval_prompts {n}")
        if theirs.get("ema_decay"):
            average = GPT.load(folder, average=True)
            policies[f"{folder.name}_ema"] = to_device(average, config).eval()
    return policies


@program
def main(config: Config) -> dict:
    started = time.time()
    check_settings(config)
    load_base(config, Codec.load(config.sft))  # what does not fit fails before the training
    if config.compare:
        policies = load_policies(replace(config, shard=False))  # one process compares
    else:
        no_kl_out = f"{Path(config.out)}_no_kl"
        keep_apart(config, {"out": config.out, "out (without KL)": no_kl_out})
        policies = train(config)
        if config.ablation:
            no_kl = {"kl_coef": 0.0, "kl_target": 0.0, "ema_decay": 0.0}
            policies |= train(replace(config, out=no_kl_out, **no_kl))
    rank, world = processes.rank_and_world()
    if rank:  # one process compares, and asks the others for nothing
        return {}
    alone = {"attention": "plain"} if world > 1 else {}
    rows = compare(replace(config, shard=False, **alone), policies, started)
    print(f"curves: python -m data.plot {config.compare.replace(',', ' ') or config.out}")
    return {row["model"]: row for row in rows}


if __name__ == "__main__":
    command(main, Config, PRESETS)
