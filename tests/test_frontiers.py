"""The programs that compare with published results, on numbers that were worked out by hand."""

import json
import math

import frontiers
import numpy as np
import pytest
import randomwalks
import seeds


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


def test_what_training_costs_by_hand(tmp_path):
    for method, seconds in (("ppo", 100), ("ppo_short", 7), ("dpo", 30)):
        (tmp_path / method).mkdir()
        cost = {"seconds": seconds, "megabytes": 2 * seconds}
        (tmp_path / method / "cost.json").write_text(json.dumps(cost))
        (tmp_path / method / "config.json").write_text(json.dumps({"batch_size": 64}))
    steps = [{"objective/length": 40.0, "tokens_per_second": 1280.0}] * 3  # two seconds each
    (tmp_path / "ppo" / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    assert seeds.cost([tmp_path], "ppo") == (192, 6, 14)
    assert seeds.cost([tmp_path], "dpo") == (0, 30, 60)
