"""The self-check passes on a sound set-up, and names the fault of each deliberately broken one."""

import dataclasses
import json
import math
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import model as model_module
import ppo
from data.run import Run
from data.tokenizer import Codec, get_tokenizer
from model import GPT, GPTConfig, ScalarModel, adam

import pytest
import self_check
import torch
from self_check import Setup, verdicts


def tiny_gpt(codec: Codec, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(codec.tokenizer.n_vocab, 64, 2, 2, 32, dropout=0.3))
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return gpt.eval()


def save_stage(stage: str, config: ppo.Config, folder: str, model, codec: Codec) -> None:
    sizes = getattr(model, "gpt", model).config
    run = Run(stage, config, folder, sizes, codec, adam([(model, 0.0)]), model=model)
    run.metrics = [{"accuracy": 0.8, "accuracy_ci": 0.05}]
    run.save()


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
    save_stage("sft", config, config.sft, gpt, codec)
    save_stage("reward", config, config.reward_model, ScalarModel(gpt), codec)
    pairs = {"the longer response wins": [0.6, 0.05, 100]}
    (tmp_path / "reward" / "report.json").write_text(json.dumps({"pairs": pairs}))
    return config


def failed(setup: Setup) -> list[str]:
    return [check.__name__ for check, holds, _ in verdicts(setup) if not holds]


def holds(check: str, setup: Setup) -> bool:
    """What one of the checks says."""
    (function,) = [function for function in self_check.CHECKS if function.__name__ == check]
    with torch.set_grad_enabled(check == "a_step_moves_the_policy_alone"):
        return function(setup)[0]


def test_a_sound_setup_passes(config, capsys):
    self_check.main(config)
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("pass")]) == len(self_check.CHECKS)


def test_it_is_a_program_with_the_flags_of_ppo(config):
    """From any folder, with the tests' own code alone: ppo.py knows nothing of it."""
    kept = ("sft", "reward_model", "max_new_tokens", "minibatch_size")
    flags = [f"--{name}={getattr(config, name)}" for name in kept]
    folder = Path(config.sft).parent
    command = [sys.executable, self_check.__file__, *flags, "--missing_eos_score=-1.0"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 2 and not result.stderr
    lines = result.stdout.splitlines()
    assert any(line.startswith("FAIL  responses end: ") for line in lines)
    assert any("likely cause: --max_new_tokens is too small" in line for line in lines)
    assert sum(line[:4] in ("pass", "FAIL") for line in lines) == len(self_check.CHECKS)
    assert "check" not in {field.name for field in dataclasses.fields(ppo.Config)}


def load(config: ppo.Config, change: Callable[[ppo.Models], None] = lambda models: None) -> Setup:
    """The set-up with models that were changed before anything was sampled."""
    models = ppo.Models.load(config)
    change(models)
    return Setup.of(config, models)


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
    assert not holds(expected, load(replace(config, **flags), change))


def test_a_wrong_tokenizer_is_named(config):
    codec = Codec(get_tokenizer("toy"), "Q: {prompt}\\nA:")
    save_stage("reward", config, config.reward_model, ScalarModel(tiny_gpt(codec)), codec)
    assert failed(load(config)) == ["one_tokenizer"]


@pytest.mark.parametrize("accuracy, length", [(0.52, 0.5), (0.7, 0.75), (0.7, 0.2)])
def test_a_reward_model_that_knows_nothing_is_named(accuracy, length, config, tmp_path):
    saved = torch.load(tmp_path / "reward/checkpoint.pt", weights_only=True)
    saved["metrics"] = [{"accuracy": accuracy, "accuracy_ci": 0.05}]
    torch.save(saved, tmp_path / "reward/checkpoint.pt")
    pairs = {"the longer response wins": [length, 0.05, 100]}
    (tmp_path / "reward" / "report.json").write_text(json.dumps({"pairs": pairs}))
    assert failed(load(config)) == ["reward_model_beats_chance_and_length"]


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
    setup = load(config)
    monkeypatch.setattr(self_check, "generate", change(self_check.generate))
    assert not holds("frequencies_match_logprobs", setup)


def test_a_cache_that_forgets_is_named(config, monkeypatch):
    decode = model_module.decode_attention

    def forgets(qkv, cache, lengths, *how):
        return decode(qkv, cache, (lengths - 1).clamp(min=0), *how)

    setup = load(config)
    monkeypatch.setattr(model_module, "decode_attention", forgets)
    assert not holds("the_cache_gives_the_same_tokens", setup)


def test_attention_across_sequences_is_named(config, monkeypatch):
    setup = load(config)
    forward = model_module.GPT.forward

    def leaks(self, batch):
        hidden = forward(self, batch)
        return hidden + hidden.mean(0)

    monkeypatch.setattr(model_module.GPT, "forward", leaks)
    assert not holds("neighbours_change_nothing", setup)


def test_a_penalty_of_the_wrong_sign_is_named(config, monkeypatch):
    correct = ppo.kl_penalised_rewards
    setup = load(config)
    monkeypatch.setattr(
        ppo, "kl_penalised_rewards", lambda s, a, b, lengths, beta: correct(s, a, b, lengths, -beta)
    )
    assert not holds("rewards_add_up", setup)
