"""PPO, run as a user runs it, finds the optimum that is known in closed form.

For responses of one token, the policy that maximises E[r] - beta · KL(pi, pi_ref) is
pi*(a) = pi_ref(a) · exp(r(a) / beta) / Z (Ziegler et al. 2019, section 2). RLOO has the same one.
GRPO divides the reward by its standard deviation, and differentiates an estimate of KL(pi, pi_ref)
whose gradient is that of KL(pi_ref, pi). Where the two balance,
pi(a) (r(a) - mean) / deviation = beta (pi(a) - pi_ref(a)), both of them under pi.
"""

import math

import ppo
from data.records import save_records
from data.run import Run
from data.tokenizer import Codec, get_tokenizer
from model import GPT, GPTConfig, adam, pack

import pytest
import torch

BETA = {"gae": 0.5, "rloo": 0.5, "grpo": 1.2}
REWARDS = {"A": 0.0, "B": 1.0, "C": -1.0, "D": 0.5, "E": 0.3, "F": -0.4}
REFERENCE = {"A": 0.35, "B": 0.05, "C": 0.2, "D": 0.15, "E": 0.15, "F": 0.1}
SOURCE = f"def score(texts, prompts):\n    return [{REWARDS}.get(text, -1.0) for text in texts]\n"


def reference_model(codec: Codec) -> GPT:
    """Says the letters with these probabilities, and anything else almost never."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(codec.tokenizer.n_vocab, block_size=8, n_layer=1, n_head=1, n_embd=16))
    with torch.no_grad():
        gpt.ln_f.weight.zero_()
        gpt.ln_f.bias.copy_(torch.eye(16)[0])
        gpt.wte.weight[:, 0] = math.log(1e-9)
        for letter, probability in REFERENCE.items():
            gpt.wte.weight[codec.response(letter)[0], 0] = math.log(probability)
    return gpt


@torch.no_grad()
def probabilities(gpt: GPT, codec: Codec) -> torch.Tensor:
    """Of the letters, in order, after the prompt."""
    batch = pack([codec.prompt("x")], [[0]])
    p = gpt.eval().logits(gpt(batch)[batch.decided_at])[0].softmax(-1)
    return p[[codec.response(letter)[0] for letter in REWARDS]]


def optimum(before: torch.Tensor, advantage: str) -> torch.Tensor:
    rewards, beta = torch.tensor(list(REWARDS.values())), BETA[advantage]
    if advantage != "grpo":
        best = before * (rewards / beta).exp()
        return best / best.sum()
    best = before
    for _ in range(500):
        mean = (best * rewards).sum()
        pull = (rewards - mean) / (beta * (best * (rewards - mean) ** 2).sum().sqrt())
        low, high = pull.max(), pull.max() + 9  # between them, pi_ref / (x - pull) sums to 1
        for _ in range(50):
            middle = (low + high) / 2
            above = (before / (middle - pull)).sum() > 1
            low, high = (middle, high) if above else (low, middle)
        best = 0.9 * best + 0.1 * before / (high - pull)
    return best


@pytest.mark.parametrize(
    "advantage, seed", [("gae", 0), ("gae", 1), ("gae", 2), ("rloo", 0), ("grpo", 0)]
)
def test_ppo_reaches_the_optimum(advantage, seed, tmp_path):
    codec = Codec(get_tokenizer("toy"), "{prompt}")
    gpt = reference_model(codec)
    optimizer = adam([(gpt, 0.0)])
    Run("sft", ppo.Config(), tmp_path / "sft", gpt.config, codec, optimizer, model=gpt).save()
    (tmp_path / "mine.py").write_text(SOURCE)
    prompts = [{"prompt": prompt} for prompt in 10 * ["x"] + 10 * ["held out"]]
    save_records(tmp_path / "prompts.jsonl", prompts)
    config = ppo.Config(
        seed=seed,
        sft=str(tmp_path / "sft"),
        base=str(tmp_path / "none"),
        out=str(tmp_path / "ppo"),
        reward=f"{tmp_path}/mine.py:score",
        prompts=str(tmp_path / "prompts.jsonl"),
        max_new_tokens=1,
        missing_eos_score=math.nan,  # a letter does not end the text, and is not to be punished
        iterations=80,
        batch_size=256,
        minibatch_size=128,
        ppo_epochs=2,
        lr=3e-3,
        value_lr=3e-3,
        kl_coef=BETA[advantage],
        advantage=advantage,
        samples=1 if advantage == "gae" else 64,
        eval_prompts=10,
        ablation=False,
    )
    ppo.main(config)

    before, after = (probabilities(GPT.load(tmp_path / f), codec) for f in ("sft", "ppo"))
    best = optimum(before, advantage)
    assert abs(before - best).sum() / 2 > 0.3  # total variation: there is a way to go
    assert abs(after - best).sum() / 2 < 0.02
