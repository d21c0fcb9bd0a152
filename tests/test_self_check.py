"""The self-check passes on a sound set-up, and names the fault of each deliberately broken one."""

import json
import math
import types
from collections.abc import Callable
from dataclasses import replace

import pytest
import self_check
import torch
from self_check import Setup, verdicts

import model as model_module
import ppo
from data.tokenizer import get_tokenizer
from model import GPT, Codec, GPTConfig, Run, ScalarModel


def tiny_gpt(codec: Codec, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(codec.tokenizer.n_vocab, 64, 2, 2, 32, dropout=0.3))
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return gpt.eval()


@pytest.fixture
def config(tmp_path) -> ppo.Config:
    codec = Codec(get_tokenizer("toy"), "{prompt}\\n")
    gpt = tiny_gpt(codec)
    config = ppo.Config(
        sft=str(tmp_path / "sft"),
        reward_model=str(tmp_path / "reward"),
        max_new_tokens=12,
        missing_eos_score=math.nan,  # a random model does not end what it says
        minibatch_size=8,
    )
    Run("sft", config, config.sft, gpt.config, codec, model=gpt).save()
    run = Run("reward", config, config.reward_model, gpt.config, codec, model=ScalarModel(gpt))
    run.metrics = {"accuracy": 0.8, "accuracy_ci": 0.05}
    run.save()
    pairs = {"the longer response wins": [0.6, 0.05, 100]}
    (tmp_path / "reward" / "report.json").write_text(json.dumps({"pairs": pairs}))
    return config


def failed(setup: Setup) -> list[str]:
    return [check.__name__ for check, holds, _ in verdicts(setup) if not holds]


def test_a_sound_setup_passes(config, capsys):
    self_check.main(config)
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("pass")]) == len(self_check.CHECKS)


def test_it_is_a_flag_of_ppo(config, capsys):
    with pytest.raises(SystemExit) as error:
        ppo.main(replace(config, check=True, missing_eos_score=-1.0))
    assert error.value.code == 2
    out = capsys.readouterr().out
    assert "FAIL  responses end" in out and "likely cause: --max_new_tokens is too small" in out


def reloaded(config: ppo.Config, change: Callable[[ppo.Models], None], **flags) -> Setup:
    """The set-up with models that were changed before anything was sampled."""
    config = replace(config, **flags)
    models = ppo.Models.load(config)
    change(models)
    texts = ppo.training_prompts(config)[: self_check.PROMPTS]
    return Setup.of(config, models, ppo.encode_prompts(texts, models.codec, config, 64))


def damage(m: ppo.Models) -> None:
    next(m.value_model.parameters()).data[0, 0] = math.nan


def dropout(m: ppo.Models) -> None:
    for module in m.policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    m.policy.train()
    m.policy.eval = lambda: m.policy


def swap_reference(m: ppo.Models) -> None:
    m.ref_policy = tiny_gpt(m.codec, seed=1)


def share_reference(m: ppo.Models) -> None:
    m.ref_policy = m.policy


def share_reward_body(m: ppo.Models) -> None:
    m.reward_model.gpt = m.policy


def constant_reward(m: ppo.Models) -> None:
    m.reward_model.head.weight.data.zero_()


def frozen_policy(m: ppo.Models) -> None:
    m.policy.requires_grad_(False)
    m.policy.wte.weight.requires_grad_(True).register_hook(torch.zeros_like)


def forget_what_is_loaded(m: ppo.Models) -> None:
    m.policy.load_state_dict = lambda state: None


def score_in_the_middle(m: ppo.Models) -> None:
    def score(self, batch):
        return self(batch)[batch.cu_seqlens[1:].long() - 3]

    m.reward_model.score = types.MethodType(score, m.reward_model)


BROKEN = {
    "corrupted weights": (damage, {}, "weights_are_finite"),
    "dropout on": (dropout, {}, "ratio_is_one_at_the_start"),
    "swapped reference": (swap_reference, {}, "kl_is_zero_at_the_start"),
    "reference shares weights": (share_reference, {}, "a_step_moves_the_policy_alone"),
    "reward model shares weights": (share_reward_body, {}, "a_step_moves_the_policy_alone"),
    "constant reward": (constant_reward, {}, "scores_differ"),
    "policy gets no gradient": (frozen_policy, {}, "a_step_moves_the_policy_alone"),
    "score in the middle": (score_in_the_middle, {}, "the_score_is_read_at_the_end"),
    "weights do not come back": (forget_what_is_loaded, {}, "saving_changes_nothing"),
    "responses are cut": (lambda m: None, {"missing_eos_score": -1.0}, "responses_end"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_setup_is_named(name, config):
    change, flags, expected = BROKEN[name]
    assert expected in failed(reloaded(config, change, **flags))


def test_a_wrong_tokenizer_is_named(config):
    codec = Codec(get_tokenizer("toy"), "Q: {prompt}\\nA:")
    gpt = tiny_gpt(codec)
    run = Run("reward", config, config.reward_model, gpt.config, codec, model=ScalarModel(gpt))
    run.metrics = {"accuracy": 0.8, "accuracy_ci": 0.05}
    run.save()
    assert failed(Setup.load(config)) == ["one_tokenizer"]


@pytest.mark.parametrize("accuracy, length", [(0.52, 0.5), (0.7, 0.75), (0.7, 0.2)])
def test_a_reward_model_that_knows_nothing_is_named(accuracy, length, config, tmp_path):
    saved = torch.load(tmp_path / "reward/checkpoint.pt", weights_only=True)
    saved["metrics"] = {"accuracy": accuracy, "accuracy_ci": 0.05}
    torch.save(saved, tmp_path / "reward/checkpoint.pt")
    pairs = {"the longer response wins": [length, 0.05, 100]}
    (tmp_path / "reward" / "report.json").write_text(json.dumps({"pairs": pairs}))
    assert failed(Setup.load(config)) == ["reward_model_beats_chance_and_length"]


def sharper(generate):
    """Samples at a temperature of its own."""

    def wrong(model, prompts, new, eos, temperature=1.0, **flags):
        return generate(model, prompts, new, eos, 0.5 * temperature, **flags)

    return wrong


def top_3(generate):
    def wrong(model, prompts, new, eos, temperature=1.0, **flags):
        return generate(model, prompts, new, eos, temperature, top_k=3, **flags)

    return wrong


@pytest.mark.parametrize("change", [sharper, top_3])
def test_sampling_that_is_not_what_is_scored_is_named(change, config, monkeypatch):
    setup = Setup.load(config)
    monkeypatch.setattr(self_check, "generate", change(self_check.generate))
    assert "frequencies_match_logprobs" in failed(setup)


def test_a_cache_that_forgets_is_named(config, monkeypatch):
    decode = model_module.decode_attention

    def forgets(qkv, cache, lengths, bias):
        return decode(qkv, cache, (lengths - 1).clamp(min=0))

    setup = Setup.load(config)
    monkeypatch.setattr(model_module, "decode_attention", forgets)
    assert "the_cache_gives_the_same_tokens" in failed(setup)


def test_attention_across_sequences_is_named(config, monkeypatch):
    setup = Setup.load(config)
    forward = model_module.GPT.forward

    def leaks(self, batch):
        hidden = forward(self, batch)
        return hidden + hidden.mean(0)

    monkeypatch.setattr(model_module.GPT, "forward", leaks)
    assert "neighbours_change_nothing" in failed(setup)


def test_a_penalty_of_the_wrong_sign_is_named(config, monkeypatch):
    correct = ppo.kl_penalised_rewards
    setup = Setup.load(config)
    monkeypatch.setattr(
        ppo, "kl_penalised_rewards", lambda s, a, b, lengths, beta: correct(s, a, b, lengths, -beta)
    )
    assert "rewards_add_up" in failed(setup)
