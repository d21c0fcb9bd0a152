"""Advantages without a value model, DPO, and what the stages do with them."""

import math
from dataclasses import replace

import ppo
import reward
from data import report
from data.records import UserError, save_records
from data.run import load_checkpoint
from data.tokenizer import Codec, get_tokenizer
from model import GPT, GPTConfig, ScalarModel, pack, token_logprobs
from ppo import grpo, kl_k3, rloo
from reward import ImplicitReward, ranking_loss

import pytest
import torch
from torch import tensor


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found, tensor(expected), rtol=0, atol=tolerance)


# ---- equations by hand


def test_rloo_by_hand():
    # the others of 1, 4, 7 have the means 5.5, 4, 2.5; those of 0, 0, 3 have 1.5, 1.5, 0
    close(rloo(tensor([1.0, 4, 7, 0, 0, 3]), 3), [-4.5, 0, 4.5, -1.5, -1.5, 3])
    close(rloo(tensor([1.0, 4]), 2), [-3.0, 3])


def test_grpo_by_hand():
    # 1, 4, 7: mean 4, deviation 3; 0, 0, 3: mean 1, variance (1 + 1 + 4) / 2 = 3
    third = math.sqrt(3)
    expected = [-1, 0, 1, -1 / third, -1 / third, 2 / third]
    close(grpo(tensor([1.0, 4, 7, 0, 0, 3]), 3), expected)
    close(grpo(tensor([2.0, 2, 2]), 3), [0.0, 0, 0])


def test_k3_by_hand():
    # rho = 2: 2 - 1 - ln 2; rho = 1/2: 1/2 - 1 + ln 2; equal: 0
    ln2 = math.log(2)
    close(kl_k3(tensor([0.0, ln2, 1]), tensor([ln2, 0, 1])), [1 - ln2, ln2 - 0.5, 0])


def test_k3_keeps_small_values():
    """exp(x) - 1 - x loses all digits of 1e-8 in single precision; x^2 / 2 is left."""
    small = kl_k3(tensor([0.0]), tensor([1e-4]))
    close(small / 5e-9, [1.0], 1e-3)


# ---- rollouts


def models(advantage: str) -> ppo.Models:
    torch.manual_seed(0)
    codec = Codec(get_tokenizer("toy"), "{prompt}")
    gpt, ref = (GPT(GPTConfig(codec.tokenizer.n_vocab, 16, 1, 1, 4)).eval() for _ in range(2))
    value = ScalarModel(gpt) if advantage == "gae" else None
    return ppo.Models(gpt, ref, ScalarModel(ref), value, gpt, codec, [])


def config_of(advantage: str, **flags) -> ppo.Config:
    return ppo.Config(
        advantage=advantage, samples=2, max_new_tokens=3, device="cpu", batch_size=4, **flags
    )


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_a_rollout_compares_the_responses_to_a_prompt(advantage):
    prompts = [[1], [1], [2], [2]]
    seed = torch.Generator().manual_seed(1)
    rollout = ppo.make_rollout(models(advantage), prompts, config_of(advantage), 0.5, seed)
    whole = []
    for b, (score, n) in enumerate(zip(rollout.scores, rollout.lengths.tolist(), strict=True)):
        own = slice(3 * b, 3 * b + n)  # no response ends early
        kl = (rollout.old_logprobs - rollout.ref_logprobs)[own].sum()
        whole.append(score - 0.5 * kl if advantage == "rloo" else score)
    pairs = [(whole[b], whole[b ^ 1]) for b in range(4)]
    if advantage == "rloo":
        expected = [own - other for own, other in pairs]
    else:  # the deviation of two numbers is their distance over the root of 2
        expected = [(own - other).sign() / math.sqrt(2) for own, other in pairs]
    assert rollout.lengths.tolist() == [3] * 4
    close(rollout.advantages, [x.item() for x in expected for _ in range(3)], 1e-4)
    assert rollout.old_values is None and rollout.returns is None
    assert "value/explained_variance" not in ppo.summary(rollout, 0.5)
    assert rollout.select([2, 0]).old_values is None
    assert torch.equal(rollout.select([2]).rewards, rollout.rewards[6:9])


def policy_gradient(advantage: str, kl_coef: float) -> tuple[torch.Tensor, ...]:
    """(the change that an update with SGD makes, that of the loss computed by hand)."""
    found, config = models(advantage), config_of(advantage, kl_coef=kl_coef, ppo_epochs=1)
    config = replace(config, minibatch_size=4)
    seed = torch.Generator().manual_seed(1)
    rollout = ppo.make_rollout(found, [[1], [1], [2], [2]], config, kl_coef, seed)
    batch = pack(rollout.prompts, rollout.responses)
    logprobs, _ = token_logprobs(found.policy, batch)
    loss = ppo.policy_loss(logprobs, rollout.old_logprobs, rollout.advantages, 0.2)
    if advantage == "grpo":
        loss = loss + kl_coef * kl_k3(logprobs, rollout.ref_logprobs).mean()
    weight, gradients = (
        found.policy.wpe.weight,
        torch.autograd.grad(loss, found.policy.parameters()),
    )
    norm = torch.stack([g.norm() for g in gradients]).norm()
    gradient = gradients[1] / max(1, norm)  # the update clips the norm at 1
    before = weight.detach().clone()
    group = {"params": list(found.policy.named_parameters()), "lr": 1e-3, "peak_lr": 1e-3}
    ppo.update(found, torch.optim.SGD([group]), rollout, config, 1.0, (0, "ppo", 0))
    return before - weight.detach(), 1e-3 * gradient


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_an_update_without_a_value_model_follows_its_loss(advantage):
    moved, expected = policy_gradient(advantage, kl_coef=0.7)
    assert expected.abs().max() > 1e-6
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-8)


def test_grpo_has_its_penalty_in_the_loss_and_rloo_has_not():
    changes = {a: policy_gradient(a, kl_coef=0.0)[0] for a in ("rloo", "grpo")}
    for advantage, change in changes.items():
        with_penalty = policy_gradient(advantage, kl_coef=0.7)[0]
        assert not torch.allclose(with_penalty, change, rtol=1e-2)


# ---- the stages


@pytest.fixture(scope="module")
def flags(tiny_base) -> dict:
    where = {"sft": tiny_base, "base": "none", "reward_model": tiny_base, "trust": True}
    where |= {"ablation": False, "iterations": 2, "batch_size": 4, "minibatch_size": 4}
    return where | {"max_new_tokens": 4, "eval_prompts": 2, "ppo_epochs": 1}


def code_of_length(tmp_path) -> str:
    (tmp_path / "mine.py").write_text("def f(texts, prompts): return [len(t) for t in texts]\n")
    return f"{tmp_path}/mine.py:f"


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_without_a_value_model_none_is_trained_or_saved(advantage, flags, monkeypatch, tmp_path):
    config = ppo.Config(**flags, out=str(tmp_path / "out"), advantage=advantage, samples=2)
    config = replace(config, reward=code_of_length(tmp_path))
    prompts, make_rollout = [], ppo.make_rollout
    monkeypatch.setattr(
        ppo, "make_rollout", lambda m, p, *x: prompts.extend(p) or make_rollout(m, p, *x)
    )
    ppo.main(config)
    pairs = [prompts[i : i + 2] for i in range(0, 8, 2)]  # two iterations of two prompts
    assert all(a == b for a, b in pairs) and len({tuple(a) for a, _ in pairs}) == 4
    saved = load_checkpoint(config.out)
    assert saved["training"].keys() == {"average", "optimizer", "extra"}
    assert not any("value" in name for line in saved["metrics"] for name in line)
    text = (tmp_path / "out/samples.txt").read_text()
    assert "advantage" in text and " return" not in text
    asked = [line for line in text.splitlines() if line.startswith("[step 0")]
    assert len(asked) == len(set(asked)) == 2  # a response to each of two prompts


def test_in_its_warm_up_only_the_value_model_learns(flags, tmp_path):
    config = ppo.Config(**flags, out=str(tmp_path / "out"), value_warmup=1, ema_decay=0.0, lr=1e-2)
    config = replace(config, reward=code_of_length(tmp_path), iterations=1, ptx_coef=0.5)
    start = GPT.load(config.sft).state_dict()
    values = {}
    for warmup in (1, 0):
        ppo.train(replace(config, value_warmup=warmup, out=f"{config.out}{warmup}"))
        saved = load_checkpoint(f"{config.out}{warmup}")
        same = all(torch.equal(w, start[name]) for name, w in saved["model"].items())
        assert same == (warmup == 1)
        values[warmup] = saved["training"]["value_model"]
    for name, w in values[1].items():
        assert torch.equal(w, values[0][name])  # which learns the same, whatever the policy does


RLOO = {"advantage": "rloo", "samples": 2}


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"advantage": "x"}, "--advantage x is unknown; choose from gae, rloo, grpo"),
        ({"advantage": "rloo"}, "--advantage rloo needs --samples 2 or more"),
        ({"samples": 3}, "--batch_size 4 is no multiple of --samples 3"),
        ({"advantage": "grpo", "samples": 2, "kl_target": 3.0}, "--kl_target adapts the penalty"),
        ({"kl_coef": 0.0, "kl_target": 3.0}, "--kl_target adapts the penalty"),
        ({"advantage": "rloo", "samples": 2, "value_warmup": 1}, "--value_warmup needs a value"),
        ({"value": "head", "value_warmup": 1}, "--value_warmup needs a value"),
        ({"compare": "a,runs/sft"}, "runs/sft: the comparison has a row sft; rename"),
        ({"ptx_coef": 1.0, "prompts": "x.jsonl"} | RLOO, "--prompts x.jsonl needs --texts <file>"),
    ],
)
def test_settings_that_contradict_each_other_are_one_line(changed, words, flags, tmp_path):
    with pytest.raises(UserError, match=words):
        ppo.main(ppo.Config(**(flags | changed), out=str(tmp_path / "out")))


def test_a_response_token_by_token(flags, tmp_path):
    config = ppo.Config(**flags, out=str(tmp_path / "out"), lr=0.0, value_lr=0.0)
    ppo.train(replace(config, reward=code_of_length(tmp_path), missing_eos_score=5.0, kl_coef=0.5))
    text = (tmp_path / "out/samples.txt").read_text()
    table = text[text.index("token  ") :].split("\n\n")[0].splitlines()
    names = ["token", "logprob", "ref", "kl", "reward", "value", "advantage", "return", "ratio"]
    assert table[0].split() == names and len(table) == 5  # four tokens
    numbers = [[float(x) for x in line.split()[-8:]] for line in table[1:]]
    logprobs, ref, kl, rewards, *_, ratios = zip(*numbers, strict=True)
    assert logprobs == ref and kl == (0,) * 4 and rewards == (0, 0, 0, 5) and ratios == (1,) * 4


def test_a_token_table_by_hand():
    lines = report.token_table(["' a'", "'\\n'"], {"kl": [0.5, -1.25], "return": [10.0, 1 / 3]})
    assert lines == [
        "token        kl    return",
        "' a'     0.500    10.000",
        "'\\n'    -1.250     0.333",
    ]


# ---- DPO


def test_a_pass_without_responses_has_no_scores():
    """As some of a sharded network's passes are."""
    model, _ = implicit_reward(0.1)
    scores = model.score(pack([], []))
    assert scores.shape == (0,) and scores.requires_grad


def implicit_reward(beta: float) -> tuple[ImplicitReward, GPT]:
    torch.manual_seed(0)
    policy, ref = (GPT(GPTConfig(9, 8, 1, 1, 4)).double() for _ in range(2))
    return ImplicitReward(policy, ref, beta), policy


def sums(gpt: GPT, batch) -> list[torch.Tensor]:
    return [x.sum() for x in token_logprobs(gpt, batch)[0].split(batch.lengths.tolist())]


def test_the_implicit_reward_is_beta_times_the_log_ratio():
    model, policy = implicit_reward(0.3)
    batch = pack([[1], [1]], [[2, 3], [4, 5, 6]])
    logratios = torch.stack(sums(policy, batch)) - torch.stack(sums(model.ref_policy, batch))
    torch.testing.assert_close(model.score(batch), 0.3 * logratios)


def test_its_ranking_loss_for_two_responses_has_dpos_gradient():
    """- beta sigmoid(r_l - r_w) (grad log pi(y_w) - grad log pi(y_l)), Rafailov et al. 2023, 4."""
    model, policy = implicit_reward(0.3)
    batch = pack([[1], [1]], [[2, 3], [4, 5, 6]])
    scores = model.score(batch)
    weights = list(policy.parameters())
    found = torch.autograd.grad(ranking_loss(scores, tensor([2, 1]), [2]), weights)
    losing, winning = sums(policy, batch)
    slope = -0.3 * torch.sigmoid(scores[0] - scores[1]).detach()
    expected = torch.autograd.grad(slope * (winning - losing), weights)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert all(w.grad is None for w in model.ref_policy.parameters())


def test_dpo_makes_a_policy_that_the_comparison_takes(flags, tmp_path):
    rows = [{"prompt": f"p{i}", "responses": ["a b", "c"], "ranks": [1, 2]} for i in range(8)]
    save_records(tmp_path / "c.jsonl", rows)
    config = reward.Config(sft=flags["sft"], comparisons=str(tmp_path / "c.jsonl"), lr=1e-2)
    config = replace(config, objective="dpo", out=str(tmp_path / "dpo"), epochs=8)
    found = reward.main(config)
    assert found["loss"] < math.log(2) - 0.05
    saved = load_checkpoint(config.out)
    assert saved["stage"] == "dpo" and saved["training"].keys() == {"optimizer", "extra"}
    code = code_of_length(tmp_path)
    compared = ppo.Config(**flags, compare=config.out, out=str(tmp_path / "all"), reward=code)
    assert ppo.main(compared)["dpo"]["kl"] != 0
    with pytest.raises(UserError, match="--objective x is unknown; choose reward or dpo"):
        reward.main(replace(config, objective="x"))
