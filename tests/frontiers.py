"""Two published relations between reward and KL, checked against the models of this project.

    python tests/frontiers.py gao 41 42 43     # after tests/seeds.py --curves 41 42 43
    python tests/frontiers.py ziegler          # after the sentiment commands of data/README.md

gao: with d = sqrt(KL), the gain of the hidden rubric is d (alpha - beta log d) for RL and
d (alpha - beta d) for best of n (Gao et al. 2022, section 3.1). Both forms are fitted to both.

ziegler: of all policies with the same KL, the one with the highest reward is proportional to
pi_ref(y) exp(r(y) / beta) (Ziegler et al. 2019, figure 3). Samples of the fine-tuned model that
are weighted so give this frontier, beside which the policy stands. A second comparison adds a
multiple of its valence to the logit of every word, whatever stands before it.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import data
import model
import ppo
from data import report, sentiment, toy
from data.tokenizer import Codec
from model import GPT, ScalarModel, batches, token_logprobs

import numpy as np
import torch
from seeds import BETAS, ROOT, rows_of

FORMS: dict[str, Callable] = {
    "d (alpha - beta log d)": np.log,  # of reinforcement learning
    "d (alpha - beta d)": lambda d: d,  # of best of n
}


def fit(kl: Sequence[float], gain: Sequence[float], form: Callable) -> tuple[float, float, float]:
    """alpha, beta and R^2 of gain = d (alpha - beta form(d)) by least squares, d = sqrt(kl)."""
    d, y = np.sqrt(kl), np.asarray(gain)
    inputs = np.stack([d, -d * form(d)], 1)
    (alpha, beta), *_ = np.linalg.lstsq(inputs, y, rcond=None)
    residual = y - inputs @ (alpha, beta)
    return alpha, beta, 1 - (residual**2).sum() / ((y - y.mean()) ** 2).sum()


def best_of_many(out: Path, n: int = 256, questions: int = 64) -> list[dict]:
    """For 1, 2, 4, ..., n samples: the bound of the KL, the mean score and rubric."""
    seed = int(out.name.removeprefix("seed"))
    config = ppo.Config(seed=seed, sft=str(out / "sft"))
    sft, codec = GPT.load(out / "sft").eval(), Codec.load(out / "sft")
    texts = data.prompts("toy", questions, seed, "test")
    prompts = [codec.prompt(text) for text in texts for _ in range(n)]
    responses = ppo.sample(sft, prompts, codec, config)
    reward_model = ScalarModel.load(out / "reward").eval()
    with torch.no_grad():
        scores = ppo.score(reward_model, prompts, responses, config)

    def points(answers: list[list[int]]) -> dict[str, list[float]]:
        return report.rubric_points(toy, texts, [codec.text(tokens) for tokens in answers])

    return report.best_of_n_curve(report.best_of_n(responses, scores, n), points)


def gao(seeds: list[str]) -> None:
    """Fits to means over the seeds: of PPO's models by their penalty, of best of n by n."""
    found: dict[str, list[list[tuple[float, float]]]] = {"PPO": [], "best of n": []}
    for out in (ROOT / "out" / f"seed{seed}" for seed in seeds):
        rows = rows_of(out / "compare") | rows_of(out / "curves")
        own = [rows[m] for m in ("ppo", "ppo_no_kl", *(f"ppo_beta{b}" for b in BETAS["ppo"]))]
        first, *curve = best_of_many(out)
        found["PPO"].append([(row["kl"], row["gold"] - rows["sft"]["gold"]) for row in own])
        found["best of n"].append([(p["kl"], p["gold"] - first["gold"]) for p in curve])
    for name, points in found.items():
        kl, gain = np.mean(points, 0).T
        shown = ", ".join(f"{g:.2f} at {k:.2f} nats" for k, g in sorted(zip(kl, gain, strict=True)))
        print(f"{name}, gain: {shown}")
        for title, form in FORMS.items():
            alpha, beta, r2 = fit(kl, gain, form)
            print(f"{name}, {title}: alpha {alpha:.2f}, beta {beta:.3f}, R2 {r2:.3f}")


def frontier(rewards: np.ndarray, beta: float) -> tuple[float, float]:
    """(KL, mean reward) of pi_ref exp(r / beta) / Z, by weighting samples: rewards (prompts, n)."""
    weights = np.exp((rewards - rewards.max(1, keepdims=True)) / beta)
    weights /= weights.sum(1, keepdims=True)
    kl = (weights * np.log(np.maximum(weights * rewards.shape[1], 1e-300))).sum(1)
    return kl.mean(), (weights * rewards).sum(1).mean()


@torch.no_grad()
def favoured(
    sft: GPT, codec: Codec, prompts: list[list[int]], config: ppo.Config, weight: float
) -> tuple[float, list[list[int]]]:
    """(KL, responses) if weight times a word's valence is added to its log-probability
    everywhere, before the probabilities are made to sum to 1 again."""
    n, T, plain = codec.tokenizer.n_vocab, config.temperature, model.head_logits
    words = [codec.tokenizer.decode([token]) for token in range(n)]
    known = sentiment.valences()
    liked = [known.get(word[1:].lower(), 0.0) if word.startswith(" ") else 0.0 for word in words]
    added = weight * torch.tensor(liked)
    # sampling divides by the temperature after the head, scoring before it
    with mock.patch.object(model, "head_logits", lambda h, head: plain(h, head) + T * added):
        responses = ppo.sample(sft, prompts, codec, config)
    parts = list(batches(prompts, responses, config))
    ref = [token_logprobs(sft, batch, T)[0].sum() for batch in parts]
    with mock.patch.object(model, "head_logits", lambda h, head: plain(h, head) + added):
        own = [token_logprobs(sft, batch, T)[0].sum() for batch in parts]
    return (sum(own) - sum(ref)).item() / len(prompts), responses


def ziegler(n: int = 256) -> None:
    out = ROOT / "out" / "sentiment"
    saved = json.loads((out / "ppo" / "config.json").read_text())
    # null is nan: the score of a response that does not end, which is not needed here
    config = ppo.Config(**{name: value for name, value in saved.items() if value is not None})
    sft, codec = GPT.load(config.sft).eval(), Codec.load(config.sft)
    count = config.eval_prompts
    texts = data.prompts(config.prompts, count, config.seed, "test", held_out=count)
    prompts = [codec.prompt(text) for text in texts for _ in range(n)]
    responses = ppo.sample(sft, prompts, codec, config)
    reward = ppo.load_reward_model(config, codec)
    scores = ppo.score(reward, prompts, responses, config)
    rewards = np.array(scores).reshape(-1, n)
    for beta in (1.0, 0.5, 0.3, 0.2, 0.15, 0.1):
        kl, mean = frontier(rewards, beta)
        print(f"best policy at beta {beta:g}: {mean:.2f} at {kl:.2f} nats")
    for weight in (0.4, 0.6, 0.75, 1.0):
        kl, answers = favoured(sft, codec, prompts[::16], config, weight)
        mean = np.mean(ppo.score(reward, prompts[::16], answers, config))
        print(f"valence times {weight:g} added to logits: {mean:.2f} at {kl:.2f} nats")
    best = report.best_of_n(responses, scores, n)
    for k, (_, top) in best.items():
        print(f"best of {k}: {np.mean(top):.2f} at {report.best_of_n_kl(k):.2f} nats")
    for name, row in rows_of(out / "ppo").items():
        if name.startswith("ppo"):
            print(f"{name}: {row['score']:.2f} at {row['kl']:.2f} nats")


def main() -> None:
    if sys.argv[1:2] == ["gao"] and len(sys.argv) > 2:
        gao(sys.argv[2:])
    elif sys.argv[1:] == ["ziegler"]:
        ziegler()
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
