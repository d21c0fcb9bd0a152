"""PPO's equations against numbers by hand, and the whole objective against its optimum."""

import copy
import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from types import SimpleNamespace

import data
import ppo
from data import toy
from data.processes import generator, mean_of_all, shuffled
from data.records import UserError, printable, save_records
from data.run import Run
from data.tokenizer import Codec, documents, get_tokenizer
from model import GPT, GPTConfig, ScalarModel, adam, generate, pack, token_logprobs
from ppo import adapt_kl_coef, gae, kl_penalised_rewards, policy_loss, value_loss, whiten

import pytest
import torch
from torch import tensor

# Three responses of 3, 1 and 2 tokens, end to end.
LENGTHS = tensor([3, 1, 2])
SCORES = tensor([2.0, -1.0, 0.5])
LOGPROBS = tensor([-1.0, -2.0, -0.5, -3.0, -0.7, -0.9])
REF_LOGPROBS = tensor([-1.5, -1.0, -0.5, -2.0, -1.7, -0.5])
VALUES = tensor([0.5, 0.6, 0.7, -2.0, 0.3, -0.4])


def close(actual, expected, tolerance=1e-6):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def random_batch(seed=0):
    """Ragged lengths, scores, and three float64 vectors over their tokens."""
    g = torch.Generator().manual_seed(seed)
    lengths = tensor([4, 1, 7, 2, 1])
    flat = torch.randn(3, int(lengths.sum()), generator=g, dtype=torch.float64)
    return lengths, torch.randn(5, generator=g, dtype=torch.float64), *flat


# ---- the reward of a token ----


def test_rewards_are_the_kl_penalty_and_at_the_last_token_the_score():
    # log pi - log pi_ref = .5 -1 0 | -1 | 1 -.4, times -0.1, plus the scores 2 | -1 | 0.5
    rewards = kl_penalised_rewards(SCORES, LOGPROBS, REF_LOGPROBS, LENGTHS, 0.1)
    close(rewards, [-0.05, 0.1, 2.0, -0.9, -0.1, 0.54])


def test_rewards_of_a_response_sum_to_its_score_less_its_penalty():
    lengths, scores, logprobs, ref_logprobs, _ = random_batch()
    rewards = kl_penalised_rewards(scores, logprobs, ref_logprobs, lengths, 0.3)
    kl = (logprobs - ref_logprobs).split(lengths.tolist())
    for own, score, k in zip(rewards.split(lengths.tolist()), scores, kl, strict=True):
        close(own.sum(), score - 0.3 * k.sum(), 1e-12)


def test_raising_one_logprob_lowers_the_reward_of_that_token_alone():
    more = LOGPROBS + tensor([0, 0, 0, 0, 0.25, 0])
    before, after = (
        kl_penalised_rewards(SCORES, x, REF_LOGPROBS, LENGTHS, 0.4) for x in (LOGPROBS, more)
    )
    close(after - before, [0, 0, 0, 0, -0.1, 0])  # -0.4 * 0.25


def test_twice_the_length_is_twice_the_penalty():
    # 0.3 nats a token and kl_coef 0.5: 2 tokens cost 0.3, 4 tokens cost 0.6
    for n, total in ((2, 1 - 0.3), (4, 1 - 0.6)):
        rewards = kl_penalised_rewards(
            tensor([1.0]), torch.full((n,), -0.7), torch.full((n,), -1.0), tensor([n]), 0.5
        )
        close(rewards.sum(), total)


def test_without_penalty_the_last_token_alone_is_rewarded():
    rewards = kl_penalised_rewards(SCORES, LOGPROBS, REF_LOGPROBS, LENGTHS, 0.0)
    close(rewards, [0, 0, 2.0, -1.0, 0, 0.5], 0)


def test_equal_models_leave_the_score():
    rewards = kl_penalised_rewards(SCORES, LOGPROBS, LOGPROBS.clone(), LENGTHS, 5.0)
    close(rewards, [0, 0, 2.0, -1.0, 0, 0.5], 0)


def tiny_models():
    """Four networks of random weights; the policy draws every token now and then."""
    torch.manual_seed(0)
    codec = Codec(get_tokenizer("toy"), "{prompt}")
    gpt = GPT(GPTConfig(codec.tokenizer.n_vocab, 16, 1, 1, 4)).eval()
    networks = (copy.deepcopy(gpt), gpt, ScalarModel(gpt), ScalarModel(gpt), gpt)
    return ppo.Models(*networks, codec, [])


def test_a_response_without_an_end_gets_the_score_for_that():
    models, prompts = tiny_models(), [[1, 2], [3], [4, 5]]

    def scores(missing_eos_score):
        config = ppo.Config(max_new_tokens=4, missing_eos_score=missing_eos_score, device="cpu")
        seed = torch.Generator().manual_seed(0)
        return ppo.make_rollout(models, prompts, config, 0.1, seed)

    first = scores(-7.0)
    assert first.ended.tolist() == [0, 0, 0] and first.scores.tolist() == [-7, -7, -7]
    models.codec.eos = first.responses[1][0]  # which the same random numbers draw again
    rollout, own = scores(-7.0), scores(math.nan)
    assert rollout.ended.tolist() == [0, 1, 0] and rollout.lengths.tolist() == [4, 1, 4]
    assert rollout.scores[[0, 2]].tolist() == [-7, -7]
    assert rollout.scores[1] == own.scores[1] != -7 and not (own.scores == -7).any()


def test_a_rollouts_advantages_are_whitened_and_its_returns_are_not():
    config = ppo.Config(max_new_tokens=4, device="cpu")
    rollout = ppo.make_rollout(tiny_models(), [[1], [2]], config, 0.1, torch.Generator())
    raw = rollout.returns - rollout.old_values
    assert abs(raw.mean()) > 0.01 and abs(raw.std(unbiased=False) - 1) > 0.01
    close(rollout.advantages, whiten(raw), 1e-5)


def test_policy_and_reference_agree_at_any_temperature():
    config = ppo.Config(max_new_tokens=4, device="cpu", temperature=0.7)
    rollout = ppo.make_rollout(tiny_models(), [[1], [2]], config, 0.1, torch.Generator())
    assert torch.equal(rollout.old_logprobs, rollout.ref_logprobs)


def test_a_rollout_is_sampled_and_scored_at_the_temperature():
    models, prompts = tiny_models(), [[1, 2], [3], [4, 5]]
    seeds = [torch.Generator().manual_seed(0) for _ in range(3)]
    cold, warm = (
        generate(models.policy, prompts, 4, models.codec.eos, t, generator=seed)
        for t, seed in zip((0.5, 1.0), seeds[1:], strict=True)
    )
    config = ppo.Config(max_new_tokens=4, device="cpu", temperature=0.5)
    rollout = ppo.make_rollout(models, prompts, config, 0.1, seeds[0])
    assert rollout.responses == cold != warm
    close(rollout.old_logprobs, token_logprobs(models.policy, pack(prompts, cold), 0.5)[0].detach())


def by_hand(models, rollout, config, kl_coef):
    """Scores, returns and whitened advantages, from one token of one response to the one before."""
    scores, returns, advantages = [], [], []
    for prompt, response in zip(rollout.prompts, rollout.responses, strict=True):
        batch, ended = pack([prompt], [response]), response[-1] == models.codec.eos
        policy, reference = (
            token_logprobs(network, batch, config.temperature)[0].tolist()
            for network in (models.policy, models.ref_policy)
        )
        values = [*models.value_model.values(batch).tolist(), 0.0]
        score = models.reward_model.score(batch).item() if ended else config.missing_eos_score
        rewards = [-kl_coef * (p - q) for p, q in zip(policy, reference, strict=True)]
        rewards[-1] += score
        advantage, own = 0.0, []
        for t in reversed(range(len(response))):
            delta = rewards[t] + config.gamma * values[t + 1] - values[t]
            advantage = delta + config.gamma * config.lam * advantage
            own.insert(0, advantage)
        scores.append(score)
        advantages += own
        returns += [a + v for a, v in zip(own, values, strict=False)]
    mean = sum(advantages) / len(advantages)
    deviation = (sum((a - mean) ** 2 for a in advantages) / len(advantages) + 1e-8) ** 0.5
    return scores, returns, [(a - mean) / deviation for a in advantages]


@torch.no_grad()
def other_settings():
    """Models that all differ, of whose responses to these prompts some end; flags that are no
    defaults, and passes that hold a few tokens each."""
    models, prompts = tiny_models(), [[1, 2], [3], [4, 5, 6], [7], [8, 9]]
    for network, scale in ((models.ref_policy, 1.0), (models.value_model.gpt, 2.0)):
        for p in network.parameters():
            p.add_(torch.randn_like(p), alpha=scale)
    flags = {"temperature": 0.7, "gamma": 0.9, "lam": 0.8, "missing_eos_score": -3.0}
    config = ppo.Config(max_new_tokens=4, max_tokens=9, device="cpu", **flags)
    seed = torch.Generator().manual_seed(0)
    sampled = generate(models.policy, prompts, 4, models.codec.eos, 0.7, generator=seed)
    models.codec.eos = sampled[2][1]  # the same random numbers draw it again
    return models, prompts, config


@torch.no_grad()
def test_a_rollout_at_other_settings_by_hand():
    models, prompts, config = other_settings()
    seed = torch.Generator().manual_seed(0)
    rollout = ppo.make_rollout(models, prompts, config, 0.3, seed)
    assert rollout.prompts == prompts and rollout.lengths.tolist() == [4, 4, 2, 4, 4]
    assert rollout.ended.tolist() == [0, 0, 1, 0, 0]
    scores, returns, advantages = by_hand(models, rollout, config, 0.3)
    close(rollout.scores, scores, 1e-5)
    close(rollout.returns, returns, 1e-5)
    close(rollout.advantages, advantages, 1e-4)


@pytest.mark.parametrize("max_tokens", [10**6, 7])
@pytest.mark.parametrize("value", ["model", "head"])
def test_an_update_of_several_epochs_is_that_of_a_plain_loop(value, max_tokens):
    """Minibatches of two responses and of one, with documents, and gradients that are clipped."""
    flags = {"minibatch_size": 2, "ppo_epochs": 2, "temperature": 0.7, "cliprange": 0.1}
    flags |= {"value": value, "vf_coef": 0.3, "ptx_coef": 0.5, "ptx_ratio": 1.5, "device": "cpu"}
    config, key = ppo.Config(max_tokens=max_tokens, **flags), (0, "ppo", 0)
    pages = [([1], [2, 3, 4, 5]), ([6], [7]), ([8], [9, 10, 0]), ([3], [3, 3])]
    rollout = made_rollout()

    def start():
        models = tiny_models()
        models.documents = pages
        if value == "head":
            models.value_model = ScalarModel(models.policy, shared=True)
        parts = [models.policy, models.value_model.head if value == "head" else models.value_model]
        groups = [{"params": list(part.parameters()), "peak_lr": 0.5} for part in parts]
        return models, torch.optim.SGD(groups)

    models, optimizer = start()
    stats = ppo.update(models, optimizer, rollout, config, 0.4, key)
    plain, optimizer = start()
    groups, found, drawn = [group["params"] for group in optimizer.param_groups], [], []
    for epoch in range(2):
        order = shuffled(range(3), *key, epoch)
        for i, n in ((0, 3), (2, 2)):  # documents: 1.5 for each response, rounded up
            old = rollout.select(order[i : i + 2])
            batch = pack(old.prompts, old.responses)
            logprobs, entropy = token_logprobs(plain.policy, batch, 0.7)
            values = plain.value_model.values(batch)
            losses = [policy_loss(logprobs, old.old_logprobs, old.advantages, 0.1)]
            losses.append(value_loss(values, old.old_values, old.returns, 0.2))
            drawn.append(shuffled(pages, *key, epoch, i, "ptx")[:n])
            texts = pack(*map(list, zip(*drawn[-1], strict=True)))
            losses.append(-token_logprobs(plain.policy, texts)[0].mean())
            weight = 0.3 if value == "head" else 1.0
            (losses[0] + weight * losses[1] + 0.5 * losses[2]).backward()
            norms = [torch.nn.utils.clip_grad_norm_(group, 1.0).item() for group in groups]
            with torch.no_grad():
                for p in [p for group in groups for p in group if p.grad is not None]:
                    p -= 0.5 * 0.4 * p.grad
                    p.grad = None
            found.append([*(x.item() for x in (*losses, entropy.mean())), *norms])
    for name in ("policy", "value_model"):
        own, other = (getattr(m, name).parameters() for m in (models, plain))
        for weight, expected in zip(own, other, strict=True):
            close(weight, expected.detach(), 1e-5)
    means = [sum(column) / 4 for column in zip(*found, strict=True)]
    assert [stats["grad_norm"], stats["value/grad_norm"]] == pytest.approx(means[4:], rel=1e-4)
    if max_tokens > 7:
        names = ("policy/loss", "value/loss", "ptx/loss", "policy/entropy")
        assert [stats[name] for name in names] == pytest.approx(means[:4], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("limit, steps", [(1e-9, 2), (1e9, 6), (0.0, 6)])
def test_a_limit_on_the_kl_ends_an_update_after_the_step_that_exceeds_it(limit, steps, monkeypatch):
    """The first step sees ratio 1, the second what the first has changed."""
    models, taken, step = tiny_models(), [], ppo.clip_and_step
    monkeypatch.setattr(ppo, "clip_and_step", lambda *x: taken.append(1) or step(*x))
    flags = {"minibatch_size": 1, "ppo_epochs": 2, "max_approx_kl": limit, "device": "cpu"}
    config, rollout = ppo.Config(**flags), made_rollout()
    with torch.no_grad():
        batch = pack(rollout.prompts, rollout.responses)
        rollout.old_logprobs = token_logprobs(models.policy, batch)[0]
    optimizer = adam([(models.policy, 0.1), (models.value_model, 0.1)])
    stats = ppo.update(models, optimizer, rollout, config, 1.0, (0, "ppo", 0))
    assert len(taken) == steps and stats["policy/approx_kl"] > 1e-6


def test_the_limit_concerns_all_passes_of_the_latest_minibatch(monkeypatch):
    """Three responses take three passes here: the limit is compared with their mean."""
    models, given, mean = tiny_models(), [], ppo.mean_of_all
    monkeypatch.setattr(ppo, "mean_of_all", lambda x: given.append(dict(x)) or mean(x))
    flags = {"minibatch_size": 3, "ppo_epochs": 2, "max_approx_kl": 1e9, "max_tokens": 1}
    config, rollout = ppo.Config(device="cpu", **flags), made_rollout()
    optimizer = adam([(models.policy, 0.1), (models.value_model, 0.1)])
    ppo.update(models, optimizer, rollout, config, 1.0, (0, "ppo", 0))
    first, second, both = (next(x for name, x in g.items() if "kl" in name) for g in given)
    assert len(first) == len(second) == 3 and both == first + second


def test_what_no_process_has_noted_has_no_mean():
    assert mean_of_all({"a": [1.0, tensor(2.0)], "b": []}) == {"a": 1.5}


def test_a_minibatch_may_have_no_documents():
    config = ppo.Config(ptx_coef=1.0, ptx_ratio=0.0, minibatch_size=2, device="cpu")
    models = replace(tiny_models(), documents=[([1], [2, 3])])
    optimizer = adam([(models.policy, 0.1), (models.value_model, 0.1)])
    stats = ppo.update(models, optimizer, made_rollout(), config, 1.0, (0, "ppo", 0))
    assert "ptx/loss" not in stats and "policy/loss" in stats


@pytest.fixture
def looped(tiny_base, monkeypatch, tmp_path):
    """Runs the loop of three iterations over five prompts, with a rollout and an update that are
    made up; what each of them was given."""
    (tmp_path / "mine.py").write_text("def size(texts, prompts): return [len(x) for x in texts]\n")
    long = "Which soft things should the queen buy? " * 40
    save_records(tmp_path / "prompts.jsonl", [{"prompt": p} for p in [long, *"bcdexy"]])
    rollout, given = made_rollout(), SimpleNamespace(rollouts=[], updates=[], averages=[])

    def make_rollout(models, prompts, config, kl_coef, seed):
        given.rollouts.append((prompts, kl_coef))
        return replace(rollout, prompts=prompts)

    def update(models, optimizer, rollout, config, lr, key):
        with torch.no_grad():
            models.policy.ln_f.bias += 1.0
        given.updates.append((rollout.prompts, lr, key))
        return {"policy/loss": 0.5}

    average = ppo.update_average

    def update_average(mean, policy, decay):
        average(mean, policy, decay)
        given.averages.append(mean.ln_f.bias[0].item())

    monkeypatch.setattr(ppo, "make_rollout", make_rollout)
    monkeypatch.setattr(ppo, "update", update)
    monkeypatch.setattr(ppo, "update_average", update_average)
    flags = {"reward": f"{tmp_path}/mine.py:size", "prompts": str(tmp_path / "prompts.jsonl")}
    flags |= {"iterations": 3, "batch_size": 3, "eval_prompts": 2, "max_new_tokens": 200, "lr": 0.5}
    flags |= {"kl_coef": 0.4, "kl_target": 2.0, "kl_horizon": 30, "warmup": 1, "ema_decay": 0.75}
    monkeypatch.setattr(ppo, "token_by_token", lambda *_: ["table"])
    config = ppo.Config(sft=tiny_base, out=str(tmp_path / "ppo"), seed=5, device="cpu", **flags)
    given.codec, given.long, given.folder = Codec.load(tiny_base), long, tmp_path / "ppo"
    given.policies = ppo.train(config)
    return given


def test_the_loop_by_hand(looped):
    """Prompts in turn, cut from the left; learning rates, keys, and the average after each."""
    codec, room = looped.codec, 256 - 200
    cut = codec.prompt(looped.long)[-room:]
    asked = [cut, *map(codec.prompt, "bcde")]
    prompts = [asked[i % 5] for i in range(9)]
    assert [p for p, _ in looped.rollouts] == [prompts[:3], prompts[3:6], prompts[6:]]
    assert [p for p, _, _ in looped.updates] == [p for p, _ in looped.rollouts]
    # warm-up over one step, then .55 + .45 cos 0, and cos(pi / 2) half way to the end
    rates = [lr for _, lr, _ in looped.updates]
    assert rates == pytest.approx([0.5, 1.0, 0.55])
    assert [key for _, _, key in looped.updates] == [(5, "ppo", step) for step in range(3)]
    # policies at 1, 2 and 3: .25 · 1; .75 · .25 + .25 · 2 = .6875; .515625 + .75
    assert looped.averages == pytest.approx([0.25, 0.6875, 1.265625])
    assert [p.ln_f.bias[0].item() for p in looped.policies.values()] == pytest.approx([3, 1.265625])
    assert list(looped.policies) == ["ppo", "ppo_ema"]
    rows = [json.loads(x) for x in (looped.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["lr"] for row in rows] == pytest.approx([0.25, 0.5, 0.275])
    assert [row["policy/loss"] for row in rows] == [0.5] * 3


def test_the_rubric_and_the_speed_of_an_iteration_by_hand(tiny_base, monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text("def size(texts, prompts): return [len(x) for x in texts]\n")
    texts = [row["prompt"] for row in toy.prompts(3, 1, "train")]
    codec, seconds = Codec.load(tiny_base), itertools.count(0, 2)
    given = [toy.write(toy.read_prompt(text), Random(0)) for text in texts]
    given[1:] = "Soup.", given[2].removesuffix(".")  # 10, 0 and, without its ending, 40 / 9 or so
    gold = [toy.gold(*pair) for pair in zip(texts, given, strict=True)]
    assert gold[:2] == [10, 0] and 0 < gold[2] < 10
    rollout = replace(made_rollout(), responses=list(map(codec.response, given)))
    monkeypatch.setattr(ppo, "make_rollout", lambda models, prompts, *_: rollout)
    monkeypatch.setattr(ppo, "update", lambda *_: {})
    monkeypatch.setattr(ppo, "token_by_token", lambda *_: [])
    monkeypatch.setattr(ppo, "time", SimpleNamespace(time=lambda: next(seconds)))
    flags = {"sft": tiny_base, "reward": f"{tmp_path}/mine.py:size", "iterations": 12}
    ppo.train(ppo.Config(batch_size=3, out=str(tmp_path / "ppo"), device="cpu", **flags))
    row, *_ = [json.loads(x) for x in (tmp_path / "ppo/metrics.jsonl").read_text().splitlines()]
    assert row["objective/gold"] == pytest.approx(sum(gold) / 3)
    assert row["tokens_per_second"] == 6 / 2  # tokens, seconds
    heads = re.findall(r"^\[step (\d+),", (tmp_path / "ppo/samples.txt").read_text(), re.M)
    assert heads == [
        step for step in ("0", "10", "11") for _ in range(3)
    ]  # every ten, and the last


def test_the_penalty_follows_its_target_from_one_iteration_to_the_next(looped):
    found = ppo.summary(replace(made_rollout(), prompts=[[0]] * 3), 0.0)["objective/kl"]
    factor = 1 + (0.2 if found > 2.4 else -0.2) * 3 / 30  # far from the target on this side
    assert abs(found / 2.0 - 1) > 0.2
    expected = pytest.approx([0.4, 0.4 * factor, 0.4 * factor**2])
    rows = [json.loads(x) for x in (looped.folder / "metrics.jsonl").read_text().splitlines()]
    assert [kl_coef for _, kl_coef in looped.rollouts] == expected
    assert [row["kl_coef"] for row in rows] == expected
    score = rows[0]["objective/score"]
    assert [r["objective/reward"] for r in rows] == [
        pytest.approx(score - row["kl_coef"] * found) for row in rows
    ]


def test_samples_are_of_the_first_and_the_last_iteration(looped):
    text, codec = (looped.folder / "samples.txt").read_text(), looped.codec
    answers = [codec.text(tokens) for tokens in made_rollout().responses]
    heads = [f"[step 0, score +2.00] {looped.long}", "[step 0, score -1.00] b"]
    heads += ["[step 0, score +0.50] c", "[step 2, score +2.00] b", "[step 2, score -1.00] c"]
    heads += ["[step 2, score +0.50] d"]
    blocks = [f"{h}\n{printable(a)}\n\n" for h, a in zip(heads, answers * 2, strict=True)]
    assert text == "".join([*blocks[:3], "table\n\n", *blocks[3:], "table\n\n"])


def test_every_iteration_draws_anew(tiny_base, monkeypatch, tmp_path):
    """Samples and the order of the minibatches."""
    (tmp_path / "mine.py").write_text("def size(texts, prompts): return [len(x) for x in texts]\n")
    flags = {"sft": tiny_base, "reward": f"{tmp_path}/mine.py:size", "out": str(tmp_path / "ppo")}
    flags |= {"iterations": 3, "batch_size": 4, "ppo_epochs": 1, "max_new_tokens": 12}
    seeds, orders, sample, update = [], [], ppo.make_rollout, ppo.update
    monkeypatch.setattr(
        ppo, "make_rollout", lambda *x: seeds.append(x[-1].initial_seed()) or sample(*x)
    )
    monkeypatch.setattr(ppo, "update", lambda *x: orders.append(x[-1]) or update(*x))
    ppo.train(ppo.Config(device="cpu", **flags))
    assert len(seeds) == len(orders) == 3
    assert len(set(seeds)) == len(set(orders)) == 3


def test_what_is_no_number_stops_before_an_update(monkeypatch):
    models, config = tiny_models(), ppo.Config(max_new_tokens=4, device="cpu")
    monkeypatch.setattr(models.reward_model, "score", lambda batch: tensor([0.5, math.nan]))
    with pytest.raises(UserError, match="sampled responses: scores has values .* no number"):
        ppo.make_rollout(models, [[1], [2]], config, 0.1, torch.Generator())


def made_rollout():
    """Three responses of 3, 1 and 2 tokens, of whose vectors every number is another one."""
    lengths, x = tensor([3, 1, 2]), torch.arange(30.0).view(5, 6).sin()
    prompts, responses = [[1, 2], [3], [4, 5]], [[6, 7, 8], [9], [10, 11]]
    ended, scores = tensor([1.0, 0.0, 1.0]), tensor([2.0, -1.0, 0.5])
    return ppo.Rollout(prompts, responses, lengths, ended, scores, x[0] - 7, *x[1:])


def test_a_selection_of_a_rollout_by_hand():
    rollout = made_rollout()
    chosen = rollout.select([2, 0])
    assert chosen.prompts == [[4, 5], [1, 2]] and chosen.responses == [[10, 11], [6, 7, 8]]
    assert chosen.lengths.tolist() == [2, 3]
    assert chosen.ended.tolist() == [1, 1] and chosen.scores.tolist() == [0.5, 2]
    names = ("old_logprobs", "ref_logprobs", "old_values", "advantages", "returns")
    for name in names:  # tokens 0, 1, 2 | 3 | 4, 5
        assert torch.equal(getattr(chosen, name), getattr(rollout, name)[[4, 5, 0, 1, 2]])
    nothing = rollout.select([])
    assert nothing.prompts == [] and all(len(getattr(nothing, name)) == 0 for name in names)
    one_token_each = ppo.Rollout([[0]] * 2, [[1]] * 2, torch.ones(2).int(), *[tensor([5.0, 6])] * 7)
    assert one_token_each.select([1]).scores.tolist() == [6]
    assert one_token_each.select([1]).returns.tolist() == [6]


@pytest.mark.parametrize("max_tokens, parts", [(10**6, 1), (5, 3)])
def test_an_update_descends_the_mean_loss_over_the_tokens_of_a_minibatch(
    max_tokens, parts, monkeypatch
):
    """However the minibatch is cut, and each token with its own old log-probability."""
    models, rollout = tiny_models(), made_rollout()
    batch = pack(rollout.prompts, rollout.responses)
    logprobs = token_logprobs(models.policy, batch, 0.7)[0]
    pg_loss = policy_loss(logprobs, rollout.old_logprobs, rollout.advantages, 0.2)
    values = models.value_model.values(batch)
    vf_loss = value_loss(values, rollout.old_values, rollout.returns, 0.2)
    weights = [*models.policy.parameters(), *models.value_model.parameters()]
    expected = torch.autograd.grad(pg_loss + vf_loss, weights)

    found, losses = [], []

    def step(optimizer, loss, lr):
        found.extend(p.grad.clone() for p in weights)
        losses.append(loss)
        return loss, [0.0, 0.0]

    cuts = []
    monkeypatch.setattr(ppo, "clip_and_step", step)
    monkeypatch.setattr(ppo, "policy_loss", lambda *x: cuts.append(len(x[0])) or policy_loss(*x))
    flags = {"minibatch_size": 3, "ppo_epochs": 1, "temperature": 0.7}
    config = ppo.Config(max_tokens=max_tokens, device="cpu", **flags)
    optimizer = adam([(models.policy, 0.1), (models.value_model, 0.1)])
    stats = ppo.update(models, optimizer, rollout, config, 1.0, (0, "ppo", 0))
    assert losses == [pytest.approx((pg_loss + vf_loss).item(), rel=1e-5)]
    for gradient, own in zip(found, expected, strict=True):
        close(gradient, own, 1e-5)  # of up to 1
    assert len(cuts) == parts and sum(cuts) == 6
    if parts == 1:
        assert stats["policy/loss"] == pytest.approx(pg_loss.item(), rel=1e-5)
        assert stats["value/loss"] == pytest.approx(vf_loss.item(), rel=1e-5)


def test_every_epoch_sees_each_response_once(monkeypatch):
    seen, select = [], ppo.Rollout.select
    monkeypatch.setattr(
        ppo.Rollout, "select", lambda self, chosen: seen.append(chosen) or select(self, chosen)
    )
    models, ones = tiny_models(), torch.ones(7)
    rollout = ppo.Rollout([[0]] * 7, [[1]] * 7, ones.int(), *[ones] * 7)
    config = ppo.Config(minibatch_size=3, ppo_epochs=2, device="cpu")
    optimizer = adam([(models.policy, 0.1), (models.value_model, 0.1)])
    ppo.update(models, optimizer, rollout, config, 1.0, (0, "ppo", 0))
    assert [len(chosen) for chosen in seen] == [3, 3, 1] * 2
    epochs = [sum(seen[:3], []), sum(seen[3:], [])]
    assert [sorted(epoch) for epoch in epochs] == [list(range(7))] * 2
    assert epochs[0] != epochs[1]


def test_statistics_of_the_ratio_by_hand():
    # ratios 1, e, 1/e and e^.1: k3 is 0, e - 2 = .71828, 1/e = .36788, e^.1 - 1.1 = .00517,
    # mean 1.09133 / 4; two of four are outside 1 +- .2
    change = tensor([0.0, 1.0, -1.0, 0.1])
    found = ppo.ratio_statistics(OLD + change, OLD, 0.2)
    assert found["policy/approx_kl"].item() == pytest.approx(0.27283, abs=1e-5)
    assert found["policy/clipfrac"].item() == 0.5
    assert ppo.ratio_statistics(OLD + change, OLD, 2.0)["policy/clipfrac"].item() == 0


def test_statistics_of_a_rollout_by_hand():
    # log pi - log pi_ref is 2, -1 and 0: k1 sums to 1; k3 is e^-2 - 1 + 2 = 1.13534, then
    # e - 1 - 1 = .71828, then 0: 1.85362 over two responses
    old, ref = tensor([-1.0, -2.0, -3.0]), tensor([-3.0, -1.0, -3.0])
    zeros = torch.zeros(3)
    lengths, ended, scores = tensor([2, 1]), tensor([1.0, 0.0]), tensor([3.0, 1.0])
    returns, values = tensor([1.0, 2.0, 3.0]), tensor([1.0, 2.0, 2.0])
    known = (lengths, ended, scores, old, ref, values, zeros, returns)
    found = ppo.summary(ppo.Rollout([[0]] * 2, [[1, 2], [3]], *known), kl_coef=0.5)
    assert found["objective/kl"] == 0.5 and found["objective/reward"] == 1.75
    assert found["objective/kl_k3"] == pytest.approx(1.85362 / 2, abs=1e-5)
    assert found["objective/length"] == 1.5 and found["objective/eos_rate"] == 0.5
    # returns vary by 1, what the values leave of them (0, 0, 1) by 1/3
    assert found["value/explained_variance"] == pytest.approx(2 / 3)


def test_the_expected_penalty_is_the_kl_divergence():
    # p = .6 .3 .1, q = .5 .25 .25: KL(p, q) = .9 log 1.2 + .1 log .4 = 0.07246. The third token is
    # rarer under p than under q: its penalty is a bonus, log .4 = -0.91629.
    p, q = tensor([0.6, 0.3, 0.1]), tensor([0.5, 0.25, 0.25])
    rewards = kl_penalised_rewards(torch.zeros(3), p.log(), q.log(), tensor([1, 1, 1]), 1.0)
    close(rewards, [-0.18232, -0.18232, 0.91629], 1e-5)
    close(-(p * rewards).sum(), 0.07246, 1e-5)


def test_a_neighbour_changes_no_reward():
    alone = kl_penalised_rewards(SCORES[1:2], LOGPROBS[3:4], REF_LOGPROBS[3:4], tensor([1]), 0.1)
    scores, logprobs = tensor([1e6, -1.0, -1e6]), LOGPROBS.clone()
    logprobs[[0, 1, 2, 4, 5]] = float("nan")
    packed = kl_penalised_rewards(scores, logprobs, REF_LOGPROBS, LENGTHS, 0.1)
    close(packed[3:4], alone, 0)


# ---- generalised advantage estimation ----


def test_advantages_by_hand():
    # rewards -.05 .05 2, values .5 .6 .7, gamma 1, lam .95:
    # delta = (-.05 + .6 - .5, .05 + .7 - .6, 2 - .7) = .05 .15 1.3
    # A = 1.3; .15 + .95 * 1.3 = 1.385; .05 + .95 * 1.385 = 1.36575; R = A + V
    rewards, values = tensor([-0.05, 0.05, 2.0]), tensor([0.5, 0.6, 0.7])
    advantages, returns = gae(rewards, values, tensor([3]), 1.0, 0.95)
    close(advantages, [1.36575, 1.385, 1.3])
    close(returns, [1.86575, 1.985, 2.0])


def test_discounted_advantages_by_hand():
    # rewards 1 2 | 3, values 10 20 | 30, gamma .5, lam .5:
    # delta = 1 + .5 * 20 - 10 = 1; 2 - 20 = -18 | 3 - 30 = -27; A = 1 + .25 * -18 = -3.5
    rewards, values = tensor([1.0, 2.0, 3.0]), tensor([10.0, 20.0, 30.0])
    advantages, returns = gae(rewards, values, tensor([2, 1]), 0.5, 0.5)
    close(advantages, [-3.5, -18.0, -27.0])
    close(returns, [6.5, 2.0, 3.0])


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.95), (0.9, 0.3), (1.0, 0.0), (0.5, 1)])
def test_advantages_are_the_discounted_sum_of_td_errors(gamma, lam):
    lengths, _, rewards, values, _ = random_batch()
    expected = []
    for r, v in zip(rewards.split(lengths.tolist()), values.split(lengths.tolist()), strict=True):
        v = [*v.tolist(), 0.0]
        delta = [r[t].item() + gamma * v[t + 1] - v[t] for t in range(len(r))]
        for t in range(len(r)):
            expected.append(sum((gamma * lam) ** (i - t) * delta[i] for i in range(t, len(r))))
    close(gae(rewards, values, lengths, gamma, lam)[0], expected, 1e-12)


def test_lam_1_gives_the_discounted_rewards_to_go():
    # gamma .5: 1 + .5 * 2 + .25 * 4 = 3; 2 + .5 * 4 = 4; 4 | 8
    rewards, values = tensor([1.0, 2.0, 4.0, 8.0]), tensor([0.3, -5.0, 7.0, 11.0])
    advantages, returns = gae(rewards, values, tensor([3, 1]), 0.5, 1.0)
    close(returns, [3.0, 4.0, 4.0, 8.0])
    close(advantages, tensor([3.0, 4.0, 4.0, 8.0]) - values)


def test_lam_0_gives_the_td_error():
    rewards, values = tensor([1.0, 2.0, 4.0]), tensor([3.0, 5.0, 7.0])
    advantages, _ = gae(rewards, values, tensor([2, 1]), 0.5, 0.0)
    close(advantages, [0.5, -3.0, -3.0])  # 1 + .5 * 5 - 3; 2 - 5 | 4 - 7


def test_nothing_is_bootstrapped_over_the_end():
    rewards = kl_penalised_rewards(SCORES, LOGPROBS, REF_LOGPROBS, LENGTHS, 0.1)
    advantages, returns = gae(rewards, VALUES, LENGTHS, 0.9, 0.95)
    last = LENGTHS.cumsum(0) - 1
    close(advantages[last], rewards[last] - VALUES[last])
    close(returns[last], rewards[last])


def test_a_neighbour_changes_no_advantage():
    rewards = tensor([0.1, 0.2, 0.3, 1.0, -1.0, 2.0])
    alone = gae(rewards[:3], VALUES[:3], tensor([3]), 0.9, 0.95)
    rewards[3:] = float("nan")
    values = torch.cat([VALUES[:3], tensor([99.0, 99.0, 99.0])])
    for own, packed in zip(alone, gae(rewards, values, LENGTHS, 0.9, 0.95), strict=True):
        close(packed[:3], own, 0)


def test_returns_are_values_plus_raw_advantages():
    lengths, _, rewards, values, _ = random_batch()
    advantages, returns = gae(rewards, values, lengths, 0.97, 0.9)
    close(returns - values, advantages, 1e-12)
    assert abs(advantages.mean()) > 0.01 and abs(advantages.std() - 1) > 0.01


def test_no_gradient_flows_through_advantages_and_returns():
    rewards, values = torch.ones(6, requires_grad=True), VALUES.clone().requires_grad_()
    advantages, returns = gae(rewards, values, LENGTHS, 1.0, 0.95)
    assert not advantages.requires_grad and not returns.requires_grad


def test_the_value_of_end_of_text_counts():
    # the second token is end-of-text: it has an advantage, and the first sees its value
    rewards, values = tensor([0.0, 1.0]), tensor([0.2, 0.6])
    close(gae(rewards, values, tensor([2]), 1.0, 0.0)[0], [0.4, 0.4])


# ---- whitening ----


def test_whiten_by_hand():
    """The variance is biased."""
    # 1 2 3 6: mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5
    x = tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
    expected = tensor([-2.0, -1.0, 0.0, 3.0], dtype=torch.float64) / 3.5**0.5
    close(whiten(x), expected, 1e-8)
    close(whiten(x, shift_mean=False), expected + 3, 1e-8)


def test_whiten_gives_mean_0_or_the_old_mean_and_variance_1():
    x = random_batch()[2] * 5 + 7
    for shift_mean, mean in ((True, 0.0), (False, x.mean())):
        y = whiten(x, shift_mean)
        close(y.mean(), mean, 1e-8)
        close(y.var(unbiased=False), 1.0, 1e-8)


def test_whiten_adds_1e_8_to_the_variance():
    # 0 and 2e-4: mean 1e-4, variance 1e-8; 1e-4 / sqrt(2e-8) = 0.70711
    close(whiten(tensor([0.0, 2e-4], dtype=torch.float64)), [-0.70711, 0.70711], 1e-5)
    close(whiten(tensor([3.0, 3.0, 3.0])), [0.0, 0.0, 0.0], 0)


# ---- the policy's loss ----

OLD = tensor([-1.0, -2.0, -0.3, -4.0])
RATIOS = tensor([1.5, 0.5, 1.1, 0.9])


@pytest.mark.parametrize(
    "advantage, loss, gradient",
    [
        # -A rho against -A clip(rho): -1.2 (clipped) -.5 -1.1 -.9, mean -3.7 / 4
        (1.0, -0.925, [0, -0.125, -0.275, -0.225]),
        # 1.5 .8 (clipped) 1.1 .9, mean 4.3 / 4
        (-1.0, 1.075, [0.375, 0, 0.275, 0.225]),
    ],
)
def test_policy_loss_by_hand(advantage, loss, gradient):
    """The gradient is -A rho / 4 or 0."""
    logprobs = (OLD + RATIOS.log()).requires_grad_()
    actual = policy_loss(logprobs, OLD, torch.full((4,), advantage), 0.2)
    close(actual, loss)
    actual.backward()
    close(logprobs.grad, gradient)


def test_policy_loss_clips_at_the_given_range():
    # A = 1: rho 1.5 is kept under a range of 0.6 and cut to 1.3 under one of 0.3
    logprobs = OLD[:1] + math.log(1.5)
    for cliprange, loss in ((0.6, -1.5), (0.3, -1.3)):
        close(policy_loss(logprobs, OLD[:1], torch.ones(1), cliprange), loss)


def test_at_ratio_1_the_gradient_is_minus_the_advantage():
    advantages = tensor([3.0, -1.0, 0.5, -2.5])  # mean 0, as whitened ones have
    logprobs = OLD.clone().requires_grad_()
    loss = policy_loss(logprobs, OLD, advantages, 0.2)
    loss.backward()
    close(loss, 0.0)
    close(logprobs.grad, [-0.75, 0.25, -0.125, 0.625])  # -A / N


def test_policy_loss_gradient_in_float64():
    lengths, _, old_logprobs, change, advantages = random_batch()
    logprobs = (old_logprobs + change).requires_grad_()  # ratios from 0.1 to 10
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(x, old_logprobs, advantages, 0.2), logprobs
    )


# ---- the value model's loss ----


def test_value_loss_by_hand():
    # (V - R)^2     .81  .25       2.25            .04
    # clipped       .81  .64 (.2)  1.44 (-.2)      .01 (.2)
    # the larger    .81  .64       2.25            .04, half the mean of 3.74 is 0.4675
    # gradient, (V - R) / 4 or 0 where the clipped one is larger: -.225 0 -.375 .05
    values = tensor([0.1, 0.5, -0.5, 0.5], requires_grad=True)
    returns = tensor([1.0, 1.0, 1.0, 0.3])
    loss = value_loss(values, torch.zeros(4), returns, 0.2)
    close(loss, 0.4675)
    loss.backward()
    close(values.grad, [-0.225, 0, -0.375, 0.05])


def test_value_loss_clips_around_each_tokens_own_old_value():
    """Not around the values of the whole batch."""
    # .5 from 1 is cut to .8, -.5 from -1 to -.8; .5^2 = .25 exceeds .2^2, so half of .25
    values, old_values = tensor([0.5, -0.5]), tensor([1.0, -1.0])
    close(value_loss(values, old_values, tensor([0.3, -0.3]), 0.2), 0.125)


def test_value_loss_clips_at_the_given_range():
    # V 2, V_old 0, R 3: (2 - 3)^2 = 1 against (.5 - 3)^2 = 6.25 and, unclipped, 1
    for cliprange_value, loss in ((0.5, 3.125), (2.0, 0.5)):
        close(value_loss(tensor([2.0]), tensor([0.0]), tensor([3.0]), cliprange_value), loss)


def test_value_loss_of_a_zero_value_model_is_half_the_mean_squared_return():
    values = torch.zeros(3)
    close(value_loss(values, values, tensor([1.0, -2.0, 3.0]), 0.2), 14 / 6)


def test_value_loss_gradient_in_float64():
    _, _, old_values, change, returns = random_batch()
    values = (old_values + change).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: value_loss(x, old_values, returns, 0.2), values)


# ---- the adaptive KL coefficient ----


@pytest.mark.parametrize(
    "kl, factor",
    [
        (12.0, 1.01024),  # error 1 clipped to .2: 1 + .2 * 512 / 10000
        (0.0, 0.98976),  # error -1 clipped to -.2
        (6.6, 1.00512),  # error .1
        (6.0, 1.0),
    ],
)
def test_kl_coef_follows_the_kl(kl, factor):
    kl_coef = adapt_kl_coef(0.15, kl, 512, 6.0, 10_000)
    assert isinstance(kl_coef, float)
    assert kl_coef == pytest.approx(0.15 * factor, abs=1e-9)


# ---- variants and measures ----


def test_the_average_moves_by_1_minus_decay():
    average, policy = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    with torch.no_grad():
        average.weight.fill_(1.0), average.bias.fill_(0.0)
        policy.weight.fill_(3.0), policy.bias.fill_(-1.0)
    ppo.update_average(average, policy, 0.9)
    close(average.weight, [[1.2]])  # .9 · 1 + .1 · 3
    close(average.bias, [-0.1])
    close(policy.weight, [[3.0]])


@pytest.mark.parametrize("max_tokens", [10**6, 8])  # one micro-batch or two
def test_ptx_adds_its_coefficient_times_the_mean_loss_per_token(max_tokens):
    """The gradient of two losses, each a mean over its own tokens, however they are cut."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=11, block_size=16, n_layer=1, n_head=2, n_embd=8))
    documents = [([1], [2, 3, 4, 5]), ([6], [7]), ([8], [9, 10, 0])]
    response = pack([[1, 2]], [[3, 4, 5]])
    pages = pack([first for first, _ in documents], [rest for _, rest in documents])
    expected = -token_logprobs(model, response)[0].mean()
    expected = expected - 0.7 * token_logprobs(model, pages)[0].mean()
    gradients = torch.autograd.grad(expected, list(model.parameters()))

    config = ppo.Config(ptx_coef=0.7, max_tokens=max_tokens, device="cpu")
    (-token_logprobs(model, response)[0].mean()).backward()
    losses = ppo.add_ptx_gradient(model, documents, config)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        close(p.grad, gradient, 1e-6)
    assert len(losses) == (1 if max_tokens > 8 else 2)
    if max_tokens > 8:
        assert losses == [pytest.approx(-token_logprobs(model, pages)[0].mean().item())]


@pytest.mark.parametrize(
    "function, arguments",
    [
        (kl_penalised_rewards, (SCORES, LOGPROBS, REF_LOGPROBS, LENGTHS, 0.1)),
        (gae, (LOGPROBS, VALUES, LENGTHS, 0.9, 0.95)),
        (whiten, (VALUES,)),
        (whiten, (VALUES, False)),
        (policy_loss, (LOGPROBS, REF_LOGPROBS, VALUES, 0.2)),
        (value_loss, (VALUES, LOGPROBS, REF_LOGPROBS, 0.2)),
    ],
)
def test_no_argument_is_written_to(function, arguments):
    copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
    function(*copies)
    for before, after in zip(arguments, copies, strict=True):
        assert not isinstance(before, torch.Tensor) or torch.equal(before, after)


@pytest.mark.parametrize(
    "name, value", [("betas", (0.9, 0.95)), ("eps", 1e-8), ("weight_decay", 0)]
)
def test_adams_settings(name, value):
    """InstructGPT's betas; torch's own epsilon, since InstructGPT names none."""
    optimizer = adam([(torch.nn.Linear(1, 1), 1e-3), (torch.nn.Linear(1, 1), 1e-4)])
    assert [group[name] for group in optimizer.param_groups] == [value] * 2


# ---- the comparison ----


@pytest.fixture
def compared(tiny_base) -> tuple[GPT, Codec, ppo.Config]:
    """An untrained model, to answer; its codec, and the flags of a comparison."""
    config = ppo.Config(device="cpu", max_new_tokens=8, temperature=0.7)
    return GPT.load(tiny_base).eval(), Codec.load(tiny_base), config


def test_all_models_draw_with_the_same_numbers(compared):
    gpt, codec, config = compared
    prompts = [codec.prompt(row["prompt"]) for row in toy.prompts(3, 0, "dev")]
    config = replace(config, seed=3)
    for given, temperature in (((), 0.7), ((1.3,), 1.3), ((0,), 0)):
        seed = generator(3, "compare")
        expected = generate(gpt, prompts, 8, codec.eos, temperature, generator=seed)
        assert ppo.sample(gpt, prompts, codec, config, *given) == expected


@torch.no_grad()
def test_the_kl_of_a_model_with_itself_is_zero_at_any_temperature(compared):
    gpt, codec, config = compared
    prompts = [codec.prompt(row["prompt"]) for row in toy.prompts(4, 0, "dev")]
    answers = ppo.sample(gpt, prompts, codec, config)
    assert ppo.kl_from(gpt, gpt, prompts, answers, config) == [0, 0, 0, 0]


@torch.no_grad()
def test_the_kl_of_a_response_sums_the_log_ratios_of_its_tokens(compared):
    gpt, _, config = compared
    other, pairs = copy.deepcopy(gpt), (([5, 6], [7, 8, 9]), ([5], [6]))
    other.wte.weight[7, 0] += 1.0
    expected = []
    for prompt, response in pairs:
        batch = pack([prompt], [response])
        own, ref = (token_logprobs(m, batch, config.temperature)[0] for m in (other, gpt))
        expected.append((own - ref).sum().item())
    prompts, responses = ([pair[i] for pair in pairs] for i in (0, 1))
    found = ppo.kl_from(gpt, other, prompts, responses, config)
    assert found == pytest.approx(expected, abs=1e-5) and abs(found[0]) > 1e-3


def test_a_prompted_answer_ends_at_its_line_break(compared, monkeypatch):
    gpt, codec, config = compared
    encode, yes = codec.tokenizer.encode_ordinary, codec.response("Yes.")
    given = [encode(" Yes.\nQuestion: Why?"), yes, encode("Yes, but")]  # the third one is cut,
    given += [encode(" Yes, but "), encode(" ")]  # and these; of the last one nothing is left
    texts = [row["prompt"] for row in toy.prompts(5, 0, "dev")]
    monkeypatch.setattr(ppo, "sample", lambda *_: given)
    cut = [encode("Yes, but")] * 2
    assert ppo.few_shot_answers(gpt, texts, codec, config) == [yes, yes, *cut, encode(" ")]


@torch.no_grad()
def test_the_pretraining_loss_is_of_pages_that_pretraining_has_not_seen(compared, monkeypatch):
    gpt, codec, config = compared
    pages, asked = toy.pages, []
    monkeypatch.setattr(toy, "pages", lambda n, seed: asked.append((n, seed)) or pages(n, seed))
    for seed in (0, 5):
        ppo.pretraining_loss(gpt, codec, replace(config, seed=seed))
    assert asked == [(300, -1)] * 2
    unseen, seen = (
        {page for page in pages(*x) if len(page) > 200} for x in ((300, -1), (16000, 0))
    )
    assert unseen and seen and unseen.isdisjoint(seen)  # short lists of facts may occur again


@torch.no_grad()
def test_the_pretraining_loss_is_a_mean_over_tokens(compared, monkeypatch):
    """Of two pages, of which the longer one is cut to the context."""
    gpt, codec, config = compared
    pages = ["Once there was a ghost.", "Even the moon wept. " * 60]
    monkeypatch.setattr(toy, "pages", lambda n, seed: pages)
    losses = []
    for tokens in map(codec.response, pages):
        tokens = tokens[:256]
        losses += (-token_logprobs(gpt, pack([tokens[:1]], [tokens[1:]]))[0]).tolist()
    assert len(losses) == len(codec.response(pages[0])) - 1 + 255
    found = ppo.pretraining_loss(gpt, codec, replace(config, max_tokens=100))
    assert found == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert ppo.pretraining_loss(gpt, codec, replace(config, prompts="mine.jsonl")) is None


def test_the_comparison_by_hand(compared, tiny_base, monkeypatch, tmp_path):
    """Who is asked what, how each number comes about, and what is written."""
    (tmp_path / "mine.py").write_text("def size(texts, prompts): return [len(x) for x in texts]\n")
    gpt, codec, config = compared
    files = {"sft": tiny_base, "base": tiny_base, "out": str(tmp_path / "out")}
    flags = {"reward": f"{tmp_path}/mine.py:size", "eval_prompts": 2, "split": "dev"}
    config = replace(config, max_new_tokens=60, **files, **flags)
    texts = [row["prompt"] for row in toy.prompts(2, 0, "dev")]
    good = [toy.write(toy.read_prompt(text), Random(0)) for text in texts]
    assert [toy.gold(*pair) for pair in zip(texts, good, strict=True)] == [10, 10]
    prompts, asked, repeated = [codec.prompt(text) for text in texts], [], []
    for p in range(2):  # 16 answers, of which the eleventh is the longest
        repeated += ["x" * (1 + (k == 10)) for k in range(16)] if p else ["y"] * 10 + [good[0]] * 6
    answers = [["a", "bb"], ["c\nd", "e"], ["f", good[1]], ["gg", "h"], repeated, [good[0], "i"]]

    def sample(model, prompts, codec, config, temperature=None):
        asked.append((model.head_weight, prompts, temperature))
        given = [codec.response(text) for text in answers[len(asked) - 1]]
        return [tokens[:-1] if codec.text(tokens) == "e" else tokens for tokens in given]

    monkeypatch.setattr(ppo, "sample", sample)
    monkeypatch.setattr(ppo, "pretraining_loss", lambda model, *_: model.head_weight[0, 0].item())
    other = copy.deepcopy(gpt)
    with torch.no_grad():
        other.wte.weight[7, 0] += 3.0
    rows = {row["model"]: row for row in ppo.compare(config, {"mine": other}, 0.0)}
    pages = [codec.tokenizer.encode_ordinary(toy.few_shot(text)) for text in texts]
    plain = [prompts, [page[-(256 - 60) :] for page in pages], prompts, prompts]
    thrice = [prompt for prompt in prompts for _ in range(16)]
    assert [call[1] for call in asked] == [*plain, thrice, prompts]
    assert [call[2] for call in asked] == [None, None, None, 0, None, None]
    assert [call[0] is other.wte.weight for call in asked] == [False] * 5 + [True]

    a, b = map(len, good)
    expected = {  # score, rubric, win rate: over two prompts; the fine-tuned model has 0 and 10
        "base": (1.5, 0, 0.25),
        "prompted": (1, 0, 0.25),
        "sft": ((1 + b) / 2, 5, None),
        "sft_greedy": (1.5, 0, 0.25),
        "best_of_16": ((a + 2) / 2, 5, 0.5),
        "mine": ((a + 1) / 2, 5, 0.5),
    }
    found = {n: (row["score"], row["gold"], row["win_rate"]) for n, row in rows.items()}
    assert found == expected and list(rows) == list(expected)
    kl = ppo.kl_from(gpt, other, prompts, list(map(codec.response, answers[5])), config)
    assert rows["mine"]["kl"] == pytest.approx(sum(kl) / 2, rel=1e-4) and abs(sum(kl)) > 1e-3
    assert [rows[n]["kl"] for n in ("base", "prompted", "sft", "sft_greedy")] == [0, None, 0, None]
    assert rows["best_of_16"]["kl"] == pytest.approx(1.8351, abs=1e-4)
    losses = [row["pretraining_loss"] for row in rows.values()]
    corner = gpt.wte.weight[0, 0].item()
    assert losses == [corner, None, corner, None, None, corner]
    assert [row["eos_rate"] for row in rows.values()] == [1, 0.5, 1, 1, 1, 1]
    saved = json.loads((tmp_path / "out/results.json").read_text())
    assert saved["rows"] == list(rows.values())
    curve = [(point["n"], point["score"], point["gold"]) for point in saved["best_of_n"]]
    late = ((a + 2) / 2, 5)
    assert curve == [(1, 1, 0), (2, 1, 0), (4, 1, 0), (8, 1, 0), (16, *late)]
    shown = (tmp_path / "out/comparison.txt").read_text()
    first = ["a", "c", "f", "gg", good[0], good[0]]
    blocks = [f"[{name}] {text}\n\n" for name, text in zip(expected, first, strict=True)]
    assert shown.startswith(f"== {texts[0]}\n\n" + "".join(blocks) + f"== {texts[1]}\n\n")


def test_without_a_rubric_and_a_base_model_the_rest_is_compared(
    compared, tiny_base, monkeypatch, tmp_path
):
    (tmp_path / "mine.py").write_text("def size(texts, prompts): return [len(x) for x in texts]\n")
    save_records(tmp_path / "prompts.jsonl", [{"prompt": p} for p in "abcd"])
    gpt, codec, config = compared
    flags = {"reward": f"{tmp_path}/mine.py:size", "prompts": str(tmp_path / "prompts.jsonl")}
    files = {"sft": tiny_base, "base": "none", "out": str(tmp_path / "out")}
    rows = ppo.compare(replace(config, eval_prompts=2, **files, **flags), {"mine": gpt}, 0.0)
    assert [row["model"] for row in rows] == ["sft", "sft_greedy", "best_of_16", "mine"]
    for row in rows:
        assert (row["gold"], row["win_rate"], row["pretraining_loss"]) == (None, None, None)
    assert rows[0] | {"model": "mine"} == rows[3]  # the same model, and random numbers


def test_the_last_prompts_of_a_file_are_held_out(tmp_path):
    def asked(numbers: Sequence[int], split: str) -> list[str]:
        save_records(tmp_path / "p.jsonl", [{"prompt": f"p{i}"} for i in numbers])
        return data.prompts(str(tmp_path / "p.jsonl"), 0, 0, split, held_out=3)

    assert asked(range(10), "train") == [f"p{i}" for i in range(7)]
    assert asked(range(10), "test") == ["p7", "p8", "p9"]
    assert asked((0, 9, 1, 7, 8, 9), "train") == ["p0", "p1", "p7"]  # none is in both
    assert asked((0, 9, 1, 7, 8, 9), "test") == ["p8", "p9", "p9"]


# ---- the whole objective: the optimum of E[score] - kl_coef KL is pi_ref exp(score / kl_coef) / Z
#
# Words 0 and 1 and end-of-text 2, at most 3 tokens: 15 responses. The reference is uniform, the
# score counts the 0s, and kl_coef is 0.5: E[score] rises from 0.7037 to 2.4552 at a KL of 1.6624.

EOS, T, KL_COEF = 2, 3, 0.5
RESPONSES = [(2,), (0, 2), (1, 2)] + [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1, 2)]


def optimum():
    """The optimal probability of each of the RESPONSES, (15,)."""
    reference = tensor([3.0 ** -len(r) for r in RESPONSES])
    score = tensor([float(r.count(0)) for r in RESPONSES])
    p = reference * (score / KL_COEF).exp()
    p = p / p.sum()
    assert (reference * score).sum().item() == pytest.approx(0.7037, abs=1e-4)
    assert (p * score).sum().item() == pytest.approx(2.4552, abs=1e-4)
    assert (p * (p / reference).log()).sum().item() == pytest.approx(1.6624, abs=1e-4)
    return p


def total_variation(p, q):
    return (p - q).abs().sum().item() / 2


@pytest.mark.parametrize("lam", [0.95, 1.0])
def test_a_table_trained_by_ppo_reaches_the_optimum(lam):
    """The policy is a table of logits, one row for each of the 7 prefixes without end-of-text."""

    def prefix(tokens):  # a heap: token a leads from s to 2 s + 1 + a
        s = 0
        for a in tokens:
            s = 2 * s + 1 + a
        return s

    g = torch.Generator().manual_seed(0)
    table = torch.zeros(7, 3, requires_grad=True)
    value_table = torch.zeros(7, requires_grad=True)
    optimizer = torch.optim.Adam([table, value_table], eps=1e-5)
    updates, episodes = 80, 512
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = 0.04 * (1 - update / updates)
        states, actions = torch.zeros(2, episodes, T, dtype=torch.long)
        s = torch.zeros(episodes, dtype=torch.long)
        for t in range(T):
            probabilities = table.detach()[s].softmax(-1)
            states[:, t], actions[:, t] = s, probabilities.multinomial(1, generator=g)[:, 0]
            s = (2 * s + 1 + actions[:, t]).clamp(max=6)  # after end-of-text: anything
        ended = (actions == EOS).cumsum(1) - (actions == EOS).long()  # before this token
        real = ended == 0
        states, flat, lengths = states[real], actions[real], real.sum(1)
        scores = ((actions == 0) & real).sum(1).float()

        old_logprobs = table.detach().log_softmax(-1)[states, flat]
        ref_logprobs = torch.full_like(old_logprobs, -math.log(3))
        old_values = value_table.detach()[states]
        rewards = kl_penalised_rewards(scores, old_logprobs, ref_logprobs, lengths, KL_COEF)
        advantages, returns = gae(rewards, old_values, lengths, 1.0, lam)
        advantages = whiten(advantages)
        for _ in range(4):
            logprobs, values = table.log_softmax(-1)[states, flat], value_table[states]
            loss = policy_loss(logprobs, old_logprobs, advantages, 0.2)
            loss = loss + value_loss(values, old_values, returns, 0.2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    log_p = table.detach().log_softmax(-1)
    p = [sum(log_p[prefix(r[:t]), r[t]].item() for t in range(len(r))) for r in RESPONSES]
    assert total_variation(tensor(p).exp(), optimum()) < 0.01  # beta 0 or a wrong sign: above 0.4


def test_a_gpt_trained_by_ppo_reaches_the_optimum():
    """The same with the network, its sampler and ragged batches, after prompts of two lengths."""
    torch.manual_seed(0)
    policy = GPT(GPTConfig(vocab_size=3, block_size=5, n_layer=1, n_head=2, n_embd=16)).eval()
    value_model, ref_policy = ScalarModel(policy).eval(), copy.deepcopy(policy)
    torch.nn.init.zeros_(ref_policy.ln_f.weight)  # hidden 0, so all logits are 0: uniform
    optimizer = torch.optim.Adam([*policy.parameters(), *value_model.parameters()], eps=1e-5)
    prompts = [[0], [1, EOS]] * 128
    updates = 50
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - update / updates)
        seed = torch.Generator().manual_seed(update)
        responses = generate(policy, prompts, T, EOS, generator=seed)
        batch = pack(prompts, responses)
        with torch.no_grad():
            scores = tensor([float(r.count(0)) for r in responses])
            old_logprobs, ref_logprobs = (
                token_logprobs(model, batch)[0] for model in (policy, ref_policy)
            )
            old_values = value_model.values(batch)
        lengths = batch.lengths
        rewards = kl_penalised_rewards(scores, old_logprobs, ref_logprobs, lengths, KL_COEF)
        advantages, returns = gae(rewards, old_values, lengths, 1.0, 0.95)
        advantages = whiten(advantages)
        for _ in range(4):
            loss = policy_loss(token_logprobs(policy, batch)[0], old_logprobs, advantages, 0.2)
            loss = loss + value_loss(value_model.values(batch), old_values, returns, 0.2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    for prompt in prompts[:2]:
        batch = pack([prompt] * len(RESPONSES), [list(r) for r in RESPONSES])
        logprobs = token_logprobs(policy, batch)[0].detach().split(batch.lengths.tolist())
        p = torch.stack([own.sum() for own in logprobs]).exp()
        assert total_variation(p, optimum()) < 0.05


# ---- what a run is made of ----


@pytest.fixture
def stages(tiny_base, tmp_path):
    """Folders of a fine-tuned model, of another policy with its average, and of a reward model."""
    codec, folders = Codec.load(tiny_base), {}
    for place, name in enumerate(("sft", "policy", "reward")):
        gpt = GPT.load(tiny_base)
        with torch.no_grad():
            gpt.wpe.weight += place
        average = copy.deepcopy(gpt)
        with torch.no_grad():
            average.wpe.weight += 10
        model = ScalarModel(gpt) if name == "reward" else gpt
        networks = {"model": model} | ({"average": average} if name == "policy" else {})
        folders[name] = str(tmp_path / name)
        config, optimizer = ppo.Config(ema_decay=0.5 * (name == "policy")), adam([(model, 0.1)])
        run = Run(name, config, folders[name], gpt.config, codec, optimizer, **networks)
        run.metrics = [{"accuracy": 0.7, "accuracy_ci": 0.1}]
        run.save()
    return folders


def moved(network) -> float:
    """By how much a network's positions differ from those of the first one."""
    return round(getattr(network, "gpt", network).wpe.weight[0, 0].item() - moved.start)


def test_where_each_network_starts(stages, tiny_base, tmp_path):
    moved.start = GPT.load(tiny_base).wpe.weight[0, 0].item()
    folders = {"sft": stages["sft"], "reward_model": stages["reward"]}
    config = ppo.Config(device="cpu", **folders)
    models = ppo.Models.load(config)
    names = ("policy", "ref_policy", "average", "value_model", "reward_model")
    assert [moved(getattr(models, name)) for name in names] == [0, 0, 0, 2, 2]
    networks = [getattr(models, name) for name in names]
    assert not any(network.training for network in networks)
    weights = [p.data_ptr() for network in networks for p in network.parameters()]
    assert len(weights) == len(set(weights))  # none is shared
    value, reward = (getattr(models, name).state_dict() for name in names[3:])
    assert all(weight.equal(reward[name]) for name, weight in value.items())
    assert models.documents == []

    models = ppo.Models.load(replace(config, init=stages["policy"], value="head", ptx_coef=1.0))
    assert [moved(getattr(models, name)) for name in names] == [1, 0, 1, 1, 2]
    assert models.value_model.gpt is models.policy and not models.value_model.head.weight.any()
    texts = documents(toy.pages(4000, 0), models.codec, 256)
    assert models.documents == texts

    (tmp_path / "mine.py").write_text("def size(texts, prompts): return [len(x) for x in texts]\n")
    models = ppo.Models.load(replace(config, reward=f"{tmp_path}/mine.py:size"))
    assert isinstance(models.reward_model, ppo.RewardFunction)
    assert moved(models.value_model) == 0 and models.value_model.gpt is not models.policy
    with pytest.raises(UserError, match="--shard needs --value model"):
        ppo.Models.load(replace(config, value="head", shard=True))
    with pytest.raises(UserError, match="--shard needs several processes"):
        ppo.Models.load(replace(config, value="model", shard=True))


def test_policies_are_compared_with_their_averages(stages, tiny_base):
    moved.start = GPT.load(tiny_base).wpe.weight[0, 0].item()
    compare = f"{stages['policy']},{stages['sft']}"
    found = ppo.load_policies(ppo.Config(sft=tiny_base, compare=compare, device="cpu"))
    assert {name: moved(network) for name, network in found.items()} == {
        "policy": 1,
        "policy_ema": 11,
        "sft": 0,
    }
    assert not any(network.training for network in found.values())


def test_a_run_is_followed_by_one_without_the_penalty_and_the_comparison(stages, monkeypatch):
    trained, compared = [], []
    policies = [{"ppo": "a", "ppo_ema": "b"}, {"ppo_no_kl": "c"}]
    monkeypatch.setattr(ppo, "train", lambda c: trained.append(c) or policies[len(trained) - 1])
    monkeypatch.setattr(
        ppo, "compare", lambda c, p, began: compared.append((c, p)) or [{"model": "x", "y": 1}]
    )
    flags = {"kl_coef": 0.7, "kl_target": 3.0, "ema_decay": 0.5, "shard": True, "device": "cpu"}
    config = ppo.Config(sft=stages["sft"], base="none", out="out/here/", dtype="float32", **flags)
    assert ppo.main(config) == {"x": {"model": "x", "y": 1}}
    off = {"kl_coef": 0.0, "kl_target": 0.0, "ema_decay": 0.0}
    assert trained == [config, replace(config, out="out/here_no_kl", **off)]
    alone = replace(config, shard=False)  # one process compares
    assert compared == [(alone, policies[0] | policies[1])]
    trained.clear(), compared.clear()
    ppo.main(replace(config, ablation=False))
    assert len(trained) == 1 and compared[0][1] == policies[0]
    ppo.main(replace(alone, compare=stages["policy"]))
    assert len(trained) == 1 and list(compared[1][1]) == ["policy", "policy_ema"]


@pytest.mark.parametrize(
    "accuracy, half_width, trusted", [(0.7, 0.19, True), (0.75, 0.25, False), (0.4, 0.05, False)]
)
def test_a_reward_model_has_to_beat_chance_by_its_half_width(
    accuracy, half_width, trusted, stages, tmp_path
):
    path = tmp_path / "reward" / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    saved["metrics"].append({"accuracy": accuracy, "accuracy_ci": half_width})
    torch.save(saved, path)
    if trusted:
        ppo.check_reward_model(stages["reward"])
    else:
        words = f"orders {accuracy:.3f} ± {half_width:.3f} of held-out pairs, no better than chance"
        with pytest.raises(UserError, match=words):
            ppo.check_reward_model(stages["reward"])


def test_a_run_is_refused_on_a_reward_model_that_may_be_worthless(stages, tmp_path):
    path, out = tmp_path / "reward" / "checkpoint.pt", tmp_path / "ppo"
    saved = torch.load(path, weights_only=True)
    torch.save(saved | {"metrics": [{"accuracy": 0.5, "accuracy_ci": 0.1}]}, path)
    files = {"sft": stages["sft"], "reward_model": stages["reward"], "out": str(out)}
    config = ppo.Config(iterations=0, batch_size=1, device="cpu", **files)
    with pytest.raises(UserError, match="orders 0.500 ± 0.100 of held-out pairs"):
        ppo.train(config)
    assert not out.exists()
    assert list(ppo.train(replace(config, trust=True, ema_decay=0.0))) == ["ppo"]
    (tmp_path / "mine.py").write_text("def size(texts, prompts): return [len(x) for x in texts]\n")
    ppo.train(replace(config, reward=f"{tmp_path}/mine.py:size"))
    torch.save(saved | {"metrics": [{"accuracy": 0.9}]}, path)
    with pytest.raises(UserError, match="is not trained to its end; continue with reward.py"):
        ppo.train(config)


# ---- what is refused before any training ----


@pytest.mark.parametrize(
    "flags, needle",
    [
        ({"value": "haed"}, "--value haed is unknown"),
        ({"judge": "humann"}, "--judge humann is unknown"),
        ({"split": "train"}, "--split train is unknown"),
    ],
)
def test_an_unknown_choice_is_one_line(flags, needle, tiny_base):
    with pytest.raises(UserError, match=needle):
        ppo.main(ppo.Config(sft=tiny_base, base="none", **flags))


def test_another_stages_folder_is_no_reward_model(tiny_base):
    with pytest.raises(UserError, match="is a checkpoint of base, not a reward model"):
        ScalarModel.load(tiny_base)


def test_two_policies_of_one_name_are_refused(tiny_base):
    with pytest.raises(UserError, match="two folders are called base"):
        ppo.load_policies(ppo.Config(sft=tiny_base, compare=f"{tiny_base},{tiny_base}"))


def test_a_base_model_of_another_vocabulary_is_refused(tiny_base):
    codec = Codec(get_tokenizer("toy"), "{prompt}")
    codec.tokenizer = SimpleNamespace(n_vocab=7)
    with pytest.raises(UserError, match="has 1025 tokens and --sft .* has 7"):
        ppo.load_base(ppo.Config(base=tiny_base), codec)
    assert ppo.load_base(ppo.Config(base="none"), codec) is None
