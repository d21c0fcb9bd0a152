"""Checks a set-up before it costs a night: `python tests/self_check.py`, with ppo.py's flags.

On the user's own checkpoints, prompts, device and precision; a line for each property that PPO
relies on, with what was measured and, where it fails, what has probably caused it.
"""

import copy
import io
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import data  # noqa: E402
import ppo  # noqa: E402
from data.processes import generator  # noqa: E402
from data.run import command, load_checkpoint, program  # noqa: E402
from data.tokenizer import Codec  # noqa: E402
from model import GPT, ScalarModel, adam, batches, generate, pack, token_logprobs  # noqa: E402

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

PROMPTS = 16


@dataclass
class Setup:
    config: ppo.Config
    models: ppo.Models
    prompts: list[list[int]]
    rollout: ppo.Rollout
    tolerance: float  # of log-probabilities and scores, by precision

    @classmethod
    def of(cls, config: ppo.Config, models: ppo.Models) -> "Setup":
        """The first prompts of the training, and what the policy answers."""
        held_out, room = config.eval_prompts, models.policy.config.block_size
        texts = data.prompts(config.prompts, PROMPTS, config.seed + 1, held_out=held_out)[:PROMPTS]
        prompts = [models.codec.prompt(text, room - config.max_new_tokens) for text in texts]
        seed = generator(config.seed, "check")
        rollout = ppo.make_rollout(models, prompts, config, config.kl_coef, seed)
        tolerance = 0.1 if config.dtype == "bfloat16" else 1e-3
        return cls(config, models, prompts, rollout, tolerance)

    def logprobs(self, model: GPT) -> Tensor:
        """Of the rollout's responses, as PPO computes them."""
        parts = batches(self.prompts, self.rollout.responses, self.config)
        found = [token_logprobs(model, b, self.config.temperature)[0] for b in parts]
        return torch.cat(found).cpu()

    @property
    def device(self) -> torch.device:
        return self.models.policy.head_weight.device


Verdict = tuple[bool, str]  # does it hold, and what was measured


def largest(x: Tensor) -> float:
    return x.abs().max().item() if len(x) else 0.0


def weights_are_finite(s: Setup) -> Verdict:
    """A checkpoint is damaged, or comes from a run that diverged."""
    networks = {"policy": s.models.policy, "reference": s.models.ref_policy}
    networks |= {"value model": s.models.value_model}
    if isinstance(s.models.reward_model, ScalarModel):
        networks["reward model"] = s.models.reward_model
    bad = [
        f"{name} {key}"
        for name, network in networks.items()
        for key, weight in network.state_dict().items()
        if not weight.isfinite().all()
    ]
    return not bad, f"{len(bad)} tensors are not finite" + (f", the first {bad[0]}" if bad else "")


def one_tokenizer(s: Setup) -> Verdict:
    """The reward model was trained with another tokenizer or template than the policy."""
    if s.config.reward:
        return True, "a Python reward reads text"
    theirs, ours = Codec.load(s.config.reward_model).state_dict(), s.models.codec.state_dict()
    differ = [key for key in ours if ours[key] != theirs[key]]
    sizes = {s.models.policy.config.vocab_size, s.models.codec.tokenizer.n_vocab}
    return not differ and len(sizes) == 1, f"vocabulary {sorted(sizes)}, differing: {differ or 0}"


def reward_model_beats_chance_and_length(s: Setup) -> Verdict:
    """Too few comparisons, or labels that say nothing: PPO would maximise noise, or length."""
    if s.config.reward:
        return True, "a Python reward needs no accuracy"
    found = (load_checkpoint(s.config.reward_model)["metrics"] or [{}])[-1]
    accuracy, half_width = found.get("accuracy", 0.0), found.get("accuracy_ci", 0.0)
    path = Path(s.config.reward_model) / "report.json"
    pairs = json.loads(path.read_text())["pairs"] if path.exists() else {}
    length = pairs.get("the longer response wins", [0.5])[0]
    length = max(length, 1 - length)
    holds = accuracy - half_width > 0.5 and accuracy > length
    return holds, f"{accuracy:.3f} ± {half_width:.3f} of held-out pairs, length alone {length:.3f}"


def scores_differ(s: Setup) -> Verdict:
    """A reward that is the same for all responses teaches nothing."""
    spread = s.rollout.scores.std().item()
    return spread > 1e-4 and math.isfinite(spread), f"standard deviation {spread:.3g}"


def responses_end(s: Setup) -> Verdict:
    """--max_new_tokens is too small, or the fine-tuned model never learnt to stop."""
    share = s.rollout.ended.mean().item()
    return share > 0.5 or math.isnan(s.config.missing_eos_score), f"{share:.2f} of the responses"


def kl_is_zero_at_the_start(s: Setup) -> Verdict:
    """The reference is not the model that the policy starts from, or dropout is on."""
    if s.config.init:
        return True, "--init continues a policy that has moved already"
    x = largest(s.rollout.old_logprobs - s.rollout.ref_logprobs)
    return x < s.tolerance, f"log pi - log pi_ref is at most {x:.2g}"


def ratio_is_one_at_the_start(s: Setup) -> Verdict:
    """Dropout is on, or sampling and training compute log-probabilities in different ways."""
    x = largest((s.logprobs(s.models.policy) - s.rollout.old_logprobs).expm1())
    return x < s.tolerance, f"ratio - 1 is at most {x:.2g}"


def the_cache_gives_the_same_tokens(s: Setup) -> Verdict:
    """Decoding with the key-value cache differs from a forward pass over the whole sequence."""
    new = min(12, s.config.max_new_tokens)
    greedy = generate(s.models.policy, s.prompts, new, s.models.codec.eos, temperature=0)
    batch = pack(s.prompts, greedy, s.device)
    logits = s.models.policy.logits(s.models.policy(batch)[batch.decided_at]).float()
    chosen = logits.gather(1, batch.tokens[batch.decided_at + 1, None])[:, 0]
    x = largest(logits.max(1).values - chosen)  # 0 but for ties within rounding
    return x < s.tolerance, f"a greedy token is at most {x:.2g} less likely than the likeliest"


def frequencies_match_logprobs(s: Setup) -> Verdict:
    """Sampling cuts (top-k, temperature) what scoring does not, or the other way round."""
    n, prompt, t = 4000, s.prompts[0], s.config.temperature
    seed = generator(s.config.seed, "check", "frequencies")
    sampled = generate(s.models.policy, [prompt] * n, 1, s.models.codec.eos, t, generator=seed)
    batch = pack([prompt], [[0]], s.device)
    logits = s.models.policy.logits(s.models.policy(batch)[batch.decided_at]).float()
    p = (logits[0] / t).softmax(-1).double().cpu()
    counts = torch.bincount(torch.tensor(sampled)[:, 0], minlength=len(p)).double()
    common = n * p >= 5
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    p = torch.cat([p[common], p[~common].sum()[None]]).clamp(1e-9, 1 - 1e-9)
    z = largest((counts - n * p) / (n * p * (1 - p) + 1).sqrt())
    return z < 6, f"of {n} first tokens, {z:.1f} standard deviations off at most"


def neighbours_change_nothing(s: Setup) -> Verdict:
    """Attention or positions reach across the sequences of a batch."""
    pairs = list(zip(s.prompts, s.rollout.responses, strict=True))[:4]
    alone = [pack([p], [r], s.device) for p, r in pairs]
    parts = [token_logprobs(s.models.policy, b, s.config.temperature)[0] for b in alone]
    together = torch.cat(parts).cpu()
    x = largest(together - s.rollout.old_logprobs[: len(together)])
    return x < s.tolerance, f"alone and in a batch differ by at most {x:.2g}"


def the_score_is_read_at_the_end(s: Setup) -> Verdict:
    """The reward model's score comes from another position than the response's last token."""
    if s.config.reward:
        return True, "a Python reward reads whole texts"
    batch = pack(s.prompts, s.rollout.responses, s.device)
    everywhere, last = s.models.reward_model(batch), batch.cu_seqlens[1:].long() - 1
    x = largest(s.models.reward_model.score(batch) - everywhere[last])
    return x < s.tolerance, f"differs from the last token's by at most {x:.2g}"


def rewards_add_up(s: Setup) -> Verdict:
    """The KL penalty has the wrong sign, or is not summed over a response's tokens."""
    r, beta = s.rollout, s.config.kl_coef
    moved = r.ref_logprobs - 0.1  # as if the policy had become likelier everywhere
    rewards = ppo.kl_penalised_rewards(r.scores, r.ref_logprobs, moved, r.lengths, beta)
    sums = torch.stack([part.sum() for part in rewards.split(r.lengths.tolist())])
    x = largest(sums - (r.scores - beta * 0.1 * r.lengths))
    return x < 1e-3, f"differ from score - beta · KL by at most {x:.2g}"


def a_step_moves_the_policy_alone(s: Setup) -> Verdict:
    """The reference or the reward model shares its weights with the policy."""
    m = s.models
    fixed = [n for n in (m.ref_policy, m.reward_model) if isinstance(n, torch.nn.Module)]
    policy, value = copy.deepcopy(m.policy.state_dict()), copy.deepcopy(m.value_model.state_dict())
    before = [copy.deepcopy(network.state_dict()) for network in fixed]
    config = replace(s.config, ppo_epochs=1, ptx_coef=0.0)
    new = m.value_model.head if config.value == "head" else m.value_model
    optimizer = adam([(m.policy, 1e-4), (new, 1e-4)])
    ppo.update(m, optimizer, s.rollout, config, 1.0, (config.seed, "check", config.value_warmup))
    pairs = [(b[k], n.state_dict()[k]) for b, n in zip(before, fixed, strict=True) for k in b]
    still = all(torch.equal(old, now) for old, now in pairs)
    moved = any(not torch.equal(policy[k], w) for k, w in m.policy.state_dict().items())
    m.policy.load_state_dict(policy)
    m.value_model.load_state_dict(value)
    for network, state in zip(fixed, before, strict=True):
        network.load_state_dict(state)
    return still and moved, f"policy {'moved' if moved else 'stayed'}, others " + (
        "stayed" if still else "moved"
    )


def saving_changes_nothing(s: Setup) -> Verdict:
    """A weight is not part of the checkpoint, or is shared when it should not be."""
    file = io.BytesIO()
    torch.save(s.models.policy.state_dict(), file)
    file.seek(0)
    again = copy.deepcopy(s.models.policy)
    with torch.no_grad():
        for weight in again.parameters():
            weight.zero_()
    again.load_state_dict(torch.load(file, weights_only=True))
    x = largest(s.logprobs(again) - s.logprobs(s.models.policy))
    return x == 0, f"log-probabilities differ by at most {x:.2g}"


CHECKS: tuple[Callable[[Setup], Verdict], ...] = (
    weights_are_finite,
    one_tokenizer,
    reward_model_beats_chance_and_length,
    scores_differ,
    responses_end,
    kl_is_zero_at_the_start,
    ratio_is_one_at_the_start,
    the_cache_gives_the_same_tokens,
    frequencies_match_logprobs,
    neighbours_change_nothing,
    the_score_is_read_at_the_end,
    rewards_add_up,
    a_step_moves_the_policy_alone,
    saving_changes_nothing,
)


def verdicts(setup: Setup) -> Iterator[tuple[Callable[[Setup], Verdict], bool, str]]:
    for check in CHECKS:
        with torch.set_grad_enabled(check is a_step_moves_the_policy_alone):
            yield check, *check(setup)


@program
def main(config: ppo.Config) -> None:
    """Prints a line for each check; exit status 2 if one fails."""
    began, failed = time.time(), 0
    for check, holds, measured in verdicts(Setup.of(config, ppo.Models.load(config))):
        print(f"{'pass' if holds else 'FAIL'}  {check.__name__.replace('_', ' ')}: {measured}")
        if not holds:
            failed += 1
            print(f"      likely cause: {check.__doc__}")
    print(f"{len(CHECKS) - failed} of {len(CHECKS)} hold, {time.time() - began:.0f} s")
    if failed:
        raise SystemExit(2)


if __name__ == "__main__":
    command(main, ppo.Config, ppo.PRESETS)
