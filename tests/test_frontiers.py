"""The programs that compare with published results, on numbers that were worked out by hand."""

import math

import ppo
from data.tokenizer import Codec, get_tokenizer
from model import GPT, GPTConfig, pack

import frontiers
import numpy as np
import pytest
import randomwalks
import torch


def test_graph_and_walks_are_those_of_trlx():
    leads_to, walks = randomwalks.graph_and_walks()
    assert leads_to["b"] == "dju" and leads_to["j"] == "n" and "a" in leads_to["n"]
    found = randomwalks.optimality([walk[1:] for walk in walks], [walk[0] for walk in walks])
    assert np.mean(found) == pytest.approx(0.3515, abs=5e-5)  # as trlX's own metric says


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("da", 1),  # 3 nodes; no walk from b is shorter
        ("jna", 6 / 7),  # 4 nodes
        ("daaab", 1),  # what follows the goal does not count
        ("la", 0),  # l does not lead to a
        ("ka", 0),  # nor b to k
        ("dlbdlbdl", 0),  # it does not arrive
        ("dlbdlbdla", 0),
        ("", 0),
        ("7 a", 0),
    ],
)
def test_optimality_by_hand(text, expected):
    assert randomwalks.optimality([text], ["b"]) == [pytest.approx(expected)]


@pytest.mark.parametrize("form", frontiers.FORMS)
def test_a_fit_finds_the_coefficients(form):
    kl = [0.5, 1.0, 4.0, 9.0, 25.0]
    own = frontiers.FORMS[form]
    gain = [math.sqrt(x) * (3 - 0.5 * own(math.sqrt(x))) for x in kl]
    alpha, beta, r2 = frontiers.fit(kl, gain, own)
    assert (alpha, beta, r2) == pytest.approx((3, 0.5, 1))
    other = next(f for name, f in frontiers.FORMS.items() if name != form)
    assert frontiers.fit(kl, gain, other)[2] < 0.999


def test_the_frontier_by_hand():
    # exp(r / beta) is 1 and 2, so the weights are 1/3 and 2/3; no choice in the second prompt
    rewards = np.array([[0.0, 0.5 * math.log(2)], [7.0, 7.0]])
    kl, reward = frontiers.frontier(rewards, beta=0.5)
    assert kl == pytest.approx((math.log(2 / 3) / 3 + 2 * math.log(4 / 3) / 3) / 2)
    assert reward == pytest.approx((math.log(2) / 3 + 7) / 2)


def test_a_favoured_word_is_sampled_and_scored_as_one_policy(monkeypatch):
    codec = Codec(get_tokenizer("toy"), "{prompt}\n")
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(codec.tokenizer.n_vocab, 16, n_layer=1, n_head=1, n_embd=8)).eval()
    config = ppo.Config(max_new_tokens=1, temperature=0.5)
    monkeypatch.setattr(frontiers.sentiment, "valences", lambda: {"queen": 3.0})
    n, prompt, (queen,) = 4000, codec.prompt("x"), codec.tokenizer.encode(" queen")
    kl, responses = frontiers.favoured(gpt, codec, [prompt] * n, config, weight=2.0)
    with torch.no_grad():
        batch = pack([prompt], [[0]])
        ref = (gpt.logits(gpt(batch)[batch.decided_at])[0] / 0.5).softmax(0)
    own = ref.clone()
    own[queen] *= math.exp(2 * 3)
    own /= own.sum()
    p = own[queen].item()
    assert 0.05 < p < 0.95
    drawn = sum(tokens == [queen] for tokens in responses) / n
    assert abs(drawn - p) < 5.5 * math.sqrt(p * (1 - p) / n)
    log_ratios = [(own[token] / ref[token]).log().item() for (token,) in responses]
    assert kl == pytest.approx(np.mean(log_ratios), abs=1e-4)
