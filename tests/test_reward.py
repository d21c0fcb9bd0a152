"""The ranking loss by hand, the report, and the positions at which a ScalarModel is read."""

import json
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import data
import reward
from data import report, toy
from data.processes import shuffled
from data.records import UserError, save_records, strict_json
from data.run import Run
from data.tokenizer import Codec, get_tokenizer
from model import GPT, GPTConfig, ScalarModel, pack
from reward import ranking_loss

import pytest
import torch
import torch.nn.functional as F
from torch import tensor

EOS = 0


def close(actual, expected, tolerance=1e-6):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def loss_and_gradient(scores, ranks, counts):
    scores = tensor(scores, dtype=torch.float64, requires_grad=True)
    loss = ranking_loss(scores, tensor(ranks), counts)
    loss.backward()
    return loss.detach(), scores.grad


# ---- the ranking loss ----


def test_two_responses_lose_the_log_of_the_odds():
    # -log sigmoid(1.5 - .5) = log(1 + e^-1) = 0.31326; gradient -+ sigmoid(-1) = 0.26894
    loss, gradient = loss_and_gradient([1.5, 0.5], [1, 2], [2])
    close(loss, 0.31326, 1e-5)
    close(gradient, [-0.26894, 0.26894], 1e-5)


def test_the_worse_response_ahead_loses_more():
    # log(1 + e) = 1.31326: rank 1 is the best
    loss, gradient = loss_and_gradient([1.5, 0.5], [2, 1], [2])
    close(loss, 1.31326, 1e-5)
    close(gradient, [0.73106, -0.73106], 1e-5)


def test_equal_scores_lose_log_2():
    """#42 kwise_sum."""
    # six pairs of gradient -+ 1/2 and weight 1/6; the first wins 3, the second wins 2 and loses 1
    loss, gradient = loss_and_gradient([0.7] * 4, [1, 2, 3, 4], [4])
    close(loss, math.log(2))
    close(gradient, [-0.25, -1 / 12, 1 / 12, 0.25])


def test_four_responses_by_hand():
    """#42 kwise_double_norm, kwise_sum."""
    # margins 1 1.5 3 .5 2 1.5, log(1 + e^-m) = .31326 .20141 .04859 .47408 .12693 .20141,
    # sum 1.36568, over 6 pairs
    loss, _ = loss_and_gradient([2.0, 1.0, 0.5, -1.0], [1, 2, 3, 4], [4])
    close(loss, 0.22761, 1e-5)


def test_the_order_of_the_responses_does_not_matter():
    loss, gradient = loss_and_gradient([2.0, 1.0, 0.5, -1.0], [1, 2, 3, 4], [4])
    shuffled, shuffled_gradient = loss_and_gradient([0.5, -1.0, 2.0, 1.0], [3, 4, 1, 2], [4])
    close(shuffled, loss, 1e-12)
    close(shuffled_gradient, gradient[[2, 3, 0, 1]], 1e-12)


def test_only_the_order_of_the_ranks_counts():
    expected = loss_and_gradient([0.3, -1.0, 2.0], [2, 3, 1], [3])
    for ranks in ([20, 30, 1], [3, 9, 2], [0, 5, -7]):
        for own, other in zip(
            loss_and_gradient([0.3, -1.0, 2.0], ranks, [3]), expected, strict=True
        ):
            close(own, other, 1e-12)


def test_a_tie_makes_no_pair():
    """#43."""
    # ranks 1 2 2: two pairs, margins 1 and 3, (.31326 + .04859) / 2; the tie has no gradient
    loss, gradient = loss_and_gradient([1.0, 0.0, -2.0], [1, 2, 2], [3])
    close(loss, 0.180925, 1e-5)
    # -sigmoid(-1) / 2, -sigmoid(-3) / 2
    close(gradient, [-(0.268941 + 0.047426) / 2, 0.268941 / 2, 0.047426 / 2], 1e-5)


def test_prompts_weigh_equally_whatever_their_number_of_pairs():
    """#43."""
    # one pair of margin 1, and 36 of margin 0: (.31326 + .69315) / 2
    loss, gradient = loss_and_gradient([1.0, 0.0] + [5.0] * 9, [1, 2, *range(1, 10)], [2, 9])
    close(loss, (0.313262 + 0.693147) / 2, 1e-5)
    close(gradient[:2], [-0.268941 / 2, 0.268941 / 2], 1e-5)


def test_a_prompt_without_a_pair_does_not_count():
    """#43: ties only, and a lone response."""
    loss, gradient = loss_and_gradient([9.0, 9.5, 1.0, 0.0, 7.0], [2, 2, 1, 2, 1], [2, 2, 1])
    close(loss, 0.313262, 1e-5)
    close(gradient, [0, 0, -0.268941, 0.268941, 0], 1e-5)


@pytest.mark.parametrize("ranks, counts", [([1, 1, 1], [3]), ([1, 2, 3], [1, 1, 1])])
def test_no_pair_at_all_is_0_with_zero_gradient(ranks, counts):
    loss, gradient = loss_and_gradient([1.0, 2.0, 3.0], ranks, counts)
    close(loss, 0.0, 0)
    close(gradient, [0, 0, 0], 0)


def test_scores_of_different_prompts_are_never_compared():
    # shifting all scores of one prompt changes nothing
    before = loss_and_gradient([1.0, 0.0, 0.2, 0.4], [1, 2, 2, 1], [2, 2])
    after = loss_and_gradient([101.0, 100.0, 0.2, 0.4], [1, 2, 2, 1], [2, 2])
    for own, other in zip(after, before, strict=True):
        close(own, other, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [120.0, 1e4])
def test_extreme_margins_stay_finite(margin, dtype):
    """#44 log_of_sigmoid: in fp32 the sigmoid is 0 below -104."""
    scores = tensor([-margin, 0.0], dtype=dtype, requires_grad=True)
    wrong = ranking_loss(scores, tensor([1, 2]), [2])
    wrong.backward()
    close(wrong, margin)
    close(scores.grad, [-1.0, 1.0])
    close(ranking_loss(-scores, tensor([1, 2]), [2]), 0.0)


def test_gradient_in_float64():
    scores = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ranks = tensor([2, 1, 1, 1, 2, 3, 4, 5, 5])
    assert torch.autograd.gradcheck(
        lambda x: ranking_loss(x, ranks, [3, 1, 5]), scores.requires_grad_()
    )


def test_no_argument_is_written_to():
    scores, ranks, counts = tensor([1.0, 2.0, 3.0]), tensor([2, 1, 1]), [2, 1]
    ranking_loss(scores, ranks, counts)
    assert scores.tolist() == [1, 2, 3] and ranks.tolist() == [2, 1, 1] and counts == [2, 1]


# ---- the report ----


def test_calibration_by_hand():
    # margins 0.2 (right), -0.3 (wrong), 3 (right), 10 (right); a tie is no pair
    scores, ranks = [[0.2, 0.0], [0.0, 0.3], [3.0, 0.0, 0.0]], [[1, 2], [1, 2], [1, 2, 2]]
    bins = report.calibration([*scores, [-5.0, 5.0]], [*ranks, [2, 1]])
    low, high = bins
    # sigmoid .2 = .5498, .3 = .5744, 3 = .9526, 10 = .99995
    assert low == (pytest.approx((0.54983 + 0.57444) / 2, abs=1e-4), 0.5, 2)
    assert high == (pytest.approx((2 * 0.95257 + 0.99995) / 3, abs=1e-4), 1.0, 3)


def test_correlation_by_hand():
    # deviations -1 0 1 and -2 1 1: 3 / sqrt(2 * 6)
    assert report.correlation([[1.0, 2.0], [3.0]], [[1, 4], [4]]) == pytest.approx(3 / 12**0.5)


def test_a_bag_of_words_learns_words_and_neither_order_nor_prompt():
    rng = random.Random(0)

    def comparison(good: list[int], bad: list[int]) -> reward.Comparison:
        prompt = [rng.randrange(20)]
        return reward.Comparison({"ranks": [1, 2]}, [(prompt, good), (prompt, bad)])

    noise = [[rng.randrange(3, 20) for _ in range(5)] for _ in range(400)]
    words = [comparison([*x, 1], [*x, 2]) for x in noise]
    found = reward.bag_of_words(words[:300], words[300:], 20)
    assert all(good > bad for good, bad in found)
    order = [comparison([1, *x, 2], [2, *x, 1]) for x in noise]
    found = reward.bag_of_words(order[:300], order[300:], 20)
    assert all(good == pytest.approx(bad, abs=1e-5) for good, bad in found)


def test_a_bag_of_words_is_five_epochs_of_adam():
    """Of 33 prompts, 32 a step and then one; weights start at 0."""
    rng = random.Random(1)
    ranks = [[1, 2, 2] if rng.random() < 0.5 else [2, 1] for _ in range(33)]
    words = [[[rng.randrange(9) for _ in range(1 + k)] for k in range(len(r))] for r in ranks]
    comparisons = [
        reward.Comparison({"ranks": r}, [([1], w) for w in own])
        for r, own in zip(ranks, words, strict=True)
    ]
    weight = torch.zeros(9, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.01)
    for step in range(10):
        epoch, i = divmod(step, 2)
        losses = []
        for b in shuffled(range(33), "bag of words", epoch)[32 * i :][:32]:
            scores = torch.stack([weight[word].sum() for word in words[b]])
            losses.append(ranking_loss(scores, tensor(ranks[b]), [len(ranks[b])]))
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
    expected = [[weight[word].sum().item() for word in own] for own in words[:4]]
    found = reward.bag_of_words(comparisons, comparisons[:4], 9)
    for own, other in zip(found, expected, strict=True):
        assert own == pytest.approx(other, abs=1e-5)


def test_a_labeler_who_is_always_wrong_is_reported_as_such(monkeypatch):
    """And the reward model as always right by the rubric, for it scores by the rubric here."""
    codec = Codec(get_tokenizer("toy"), "{prompt}\\n")
    records = [
        {"prompt": pair["prompt"], "responses": [pair["bad"], pair["good"]], "ranks": [1, 2]}
        for pair in toy.probe_pairs(20, 0)
    ]
    comparisons = reward.tokenised(records, codec, 10**9)

    def rubric(_, chosen: list[reward.Comparison], config: reward.Config) -> list[list[float]]:
        rows = [c.record for c in chosen]
        return [[toy.gold(row["prompt"], text) for text in row["responses"]] for row in rows]

    monkeypatch.setattr(reward, "score_all", rubric)
    model = ScalarModel(GPT(GPTConfig(codec.tokenizer.n_vocab, 256, 1, 1, 4)))
    run = SimpleNamespace(config=reward.Config(), codec=codec)
    found = reward.measure(model, comparisons, comparisons, run)["pairs"]
    assert found["labeler against the hidden rubric"][0] == 0
    assert found["reward model against the hidden rubric"][0] == 1
    assert found["reward model, held-out comparisons"][0] == 0


def test_every_line_of_the_report_by_hand(monkeypatch):
    """Two prompts: scores, word counts, lengths and the rubric order their pairs differently."""
    codec, texts = Codec(get_tokenizer("toy"), "{prompt}\\n"), ["bbb", "a", "cc"]
    gold, points = {"bbb": 1.0, "a": 5.0, "cc": 0.0}, {"bbb": 3.0, "a": 1.0, "cc": 2.5}
    points |= {"good": 1.0, "bad": 0.0}
    probes = [("good", "bad", "cut off"), ("good", "bad", "cut off"), ("bad", "good", "wrong mood")]
    probes = [dict(zip(("good", "bad", "flaw"), p, strict=True)) | {"prompt": "p"} for p in probes]
    asked = []
    monkeypatch.setattr(toy, "gold", lambda prompt, text: gold[text])
    monkeypatch.setattr(toy, "PROBES", ("wrong mood", "cut off"))
    monkeypatch.setattr(toy, "probe_pairs", lambda *x: asked.append(x) or probes)
    records = [
        {"prompt": "p", "responses": texts, "ranks": [1, 2, 3]},
        {"prompt": "q", "responses": texts[:2], "ranks": [2, 1]},
    ]
    comparisons = reward.tokenised(records, codec, 256)
    lengths = [[len(response) for _, response in c.pairs] for c in comparisons]
    assert lengths == [[3, 2, 3], [3, 2]]  # in tokens, with end of text

    def score_all(model, chosen, config):
        return [[points[text] for text in c.record["responses"]] for c in chosen]

    monkeypatch.setattr(reward, "score_all", score_all)
    monkeypatch.setattr(reward, "bag_of_words", lambda *_: [[0.0, 1.0, 2.0], [3.0, 4.0]])
    model = ScalarModel(GPT(GPTConfig(codec.tokenizer.n_vocab, 256, 1, 1, 4)))
    run = SimpleNamespace(config=reward.Config(), codec=codec)
    found = reward.measure(model, [], comparisons, run)

    def share(first, second):  # (right, pairs) of each prompt: their ratio, and 1.96 sigma of it
        right, n = first[0] + second[0], first[1] + second[1]
        residuals = [r - right / n * pairs for r, pairs in (first, second)]
        half_width = 1.96 * math.hypot(*residuals) / n
        return pytest.approx(right / n), pytest.approx(half_width, abs=1e-6), n

    assert found["pairs"] == {
        "reward model, held-out comparisons": share((2, 3), (0, 1)),
        "a linear model of word counts": share((0, 3), (1, 1)),
        "the longer response wins": share((1, 2), (0, 1)),
        "labeler against the hidden rubric": share((2, 3), (1, 1)),
        "reward model against the hidden rubric": share((1, 3), (0, 1)),
        "prefers a perfect response to: wrong mood": (0.0, 0.0, 1),
        "prefers a perfect response to: cut off": (1.0, 0.0, 2),
    }
    assert asked == [(1200, 1, "test")]
    # margins .5 (right); 2 (right), 1.5 (wrong) and 2 (wrong): sigmoid .6225, .8808 and .8176
    high = pytest.approx((2 * 0.88080 + 0.81757) / 3, abs=1e-4)
    assert found["calibration"] == [
        (pytest.approx(0.62246, abs=1e-4), 1.0, 1),
        (high, pytest.approx(1 / 3), 3),
    ]
    # scores 3 1 2.5 3 1, lengths 3 2 3 3 2: deviations' products sum to 2.2, squares to 4.2, 1.2
    assert found["length_correlation"] == pytest.approx(2.2 / (4.2 * 1.2) ** 0.5, abs=1e-5)


def test_probes_fit_into_a_small_context():
    codec = Codec(get_tokenizer("toy"), "{prompt}\\n")
    model = ScalarModel(GPT(GPTConfig(codec.tokenizer.n_vocab, 45, 1, 1, 4)))
    run = SimpleNamespace(config=reward.Config(device="cpu"), codec=codec)
    found = reward.probe(model, toy, run)
    assert len(found) == len(toy.PROBES)
    assert 0 < sum(n for _, _, n in found.values()) < 1200


# ---- training and its comparisons ----


@pytest.mark.parametrize("max_tokens, cuts", [(999, 1), (14, 2), (1, 4)])
def test_a_step_follows_the_gradient_however_it_is_cut(max_tokens, cuts, monkeypatch, tmp_path):
    """Each prompt weighs the same, but those with ties alone, which weigh nothing."""
    ranks = [[1, 2, 2], [2, 2, 2], [2, 1, 3], [1, 1, 1]]
    pairs = [([1 + b], [2 + b + k, EOS][-1 - k % 2 :]) for b in range(4) for k in range(3)]
    comparisons = [
        reward.Comparison({"ranks": r}, pairs[3 * b : 3 * b + 3]) for b, r in enumerate(ranks)
    ]
    model, count, score = ScalarModel(tiny_gpt()), [], ScalarModel.score
    weights = list(model.parameters())
    scores = model.score(pack([p for p, _ in pairs], [r for _, r in pairs]))
    loss = ranking_loss(scores, tensor(ranks).flatten(), [3] * 4)
    expected = torch.autograd.grad(loss, weights)
    norm = sum(g.square().sum() for g in expected).sqrt().item()
    before = [p.detach().clone() for p in weights]

    monkeypatch.setattr(ScalarModel, "score", lambda *x: count.append(x) or score(*x))
    config = reward.Config(device="cpu", max_tokens=max_tokens, epochs=1, batch_size=4)
    optimizer = torch.optim.SGD([{"params": weights, "peak_lr": 1.0}])
    codec = Codec(get_tokenizer("toy"), "{prompt}")
    run = Run("reward", config, tmp_path, model.gpt.config, codec, optimizer, model=model)
    reward.train(run, run.modules["model"], comparisons)
    assert len(count) == cuts
    assert run.metrics[0]["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert run.metrics[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    for own, old, gradient in zip(weights, before, expected, strict=True):
        change = old - own.detach()
        torch.testing.assert_close(change, gradient / max(1, norm), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("max_tokens", [999, 12])
def test_several_epochs_are_those_of_a_plain_loop(max_tokens, tmp_path):
    """Two to four responses a prompt, with ties; two prompts a step, the last one alone."""
    ranks = [[1, 2], [2, 1, 2], [1, 1, 2, 3], [1, 1], [3, 1, 2]]
    comparisons = [
        reward.Comparison({"ranks": r}, [([1 + b], [2 + b + k, EOS]) for k in range(len(r))])
        for b, r in enumerate(ranks)
    ]

    def start():
        torch.manual_seed(1)
        model = ScalarModel(tiny_gpt())
        return model, torch.optim.SGD([{"params": list(model.parameters()), "peak_lr": 0.5}])

    flags = {"epochs": 2, "batch_size": 2, "seed": 3, "device": "cpu"}
    config = reward.Config(max_tokens=max_tokens, **flags)
    codec = Codec(get_tokenizer("toy"), "{prompt}")
    model, optimizer = start()
    run = Run("reward", config, tmp_path, model.gpt.config, codec, optimizer, model=model)
    reward.train(run, run.modules["model"], comparisons)
    plain, _ = start()
    rates, losses = [], []
    for step in range(6):
        epoch, i = divmod(step, 3)
        order = shuffled(range(5), 3, "reward", epoch)[2 * i :][:2]
        own = [comparisons[b] for b in order if len(set(ranks[b])) > 1]
        loss = sum(
            ranking_loss(plain.score(pack(*map(list, zip(*c.pairs, strict=True)))), r, [len(r)])
            for c, r in ((c, tensor(c.record["ranks"])) for c in own)
        ) / max(1, len(own))  # fmt: skip
        losses.append(loss.item() if own else 0.0)
        rates.append(0.5 * (0.55 + 0.45 * math.cos(math.pi * step / 6)))
        if own:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            with torch.no_grad():
                for p in plain.parameters():
                    p -= rates[-1] * p.grad
                    p.grad = None
    for weight, expected in zip(model.parameters(), plain.parameters(), strict=True):
        close(weight, expected.detach(), 1e-5)
    assert [row["lr"] for row in run.metrics] == pytest.approx(rates)
    assert [row["loss"] for row in run.metrics] == pytest.approx(losses, abs=1e-5)


def test_responses_are_collected_by_prompt_without_those_that_occur_again(
    tiny_base, monkeypatch, tmp_path
):
    """Long prompts cut from the left, NUL in no record, and no prompt with a single response."""
    codec, asked = Codec.load(tiny_base), []
    long = "Which soft things should the queen buy? " * 40
    save_records(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in [long, "b", "c"]])
    answers = ["x", "y", "x", "y\0", "z", "u", "v", "v", "v"]

    def generate(model, prompts, new, eos, temperature, **flags):
        asked.append((prompts, new, eos, temperature, flags["generator"].initial_seed()))
        return [codec.response(text) for text in answers]

    monkeypatch.setattr(reward, "generate", generate)
    flags = {"responses": 3, "max_new_tokens": 200, "temperature": 0.7, "device": "cpu"}
    files = {"sft": tiny_base, "prompts": str(tmp_path / "prompts.jsonl")}
    found = reward.collect(reward.Config(**flags, **files))
    assert found == [
        {"prompt": long, "responses": ["x", "y"]},
        {"prompt": "b", "responses": ["z", "u"]},
    ]
    reward.collect(reward.Config(policy=tiny_base, **flags, **files))
    prompts = [codec.prompt(long)[-(256 - 200) :], codec.prompt("b"), codec.prompt("c")]
    thrice = [prompt for prompt in prompts for _ in range(3)]
    assert [call[:4] for call in asked] == [(thrice, 200, codec.eos, 0.7)] * 2
    assert asked[0][4] != asked[1][4]  # the policy's responses are drawn anew


def test_new_comparisons_come_before_the_merged_ones(tmp_path):
    """The first ones are held out."""
    for name in ("new", "old"):
        row = {"prompt": name, "responses": ["a", "b"], "ranks": [1, 2]}
        save_records(tmp_path / f"{name}.jsonl", [row])
    files = {"comparisons": str(tmp_path / "new.jsonl"), "merge": str(tmp_path / "old.jsonl")}
    config = reward.Config(labeler="file", out=str(tmp_path), **files)
    new, earlier = reward.ranked(config)
    assert [row["prompt"] for row in new] == ["new"] and [r["prompt"] for r in earlier] == ["old"]


@torch.no_grad()
def test_without_demonstrations_the_best_ranked_score_zero(tiny_base):
    model, codec = ScalarModel(GPT.load(tiny_base)).eval(), Codec.load(tiny_base)
    records = [
        {"prompt": "Why?", "responses": ["a b", "c", "d!"], "ranks": ranks}
        for ranks in ([2, 1, 3], [1, 1, 2])
    ]
    comparisons = reward.tokenised(records, codec, 256)
    config = reward.Config(comparisons="x", device="cpu")
    reward.center(model, reward.demonstrated(comparisons, codec, config, 256), config)
    (_, best, _), (one, other, _) = reward.score_all(model, comparisons, config)
    assert best + one + other == pytest.approx(0, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "flags, source",
    [
        ({"seed": 4}, "toy"),
        ({"seed": 4, "comparisons": "x", "demonstrations": "d.jsonl"}, "d.jsonl"),
    ],
)
def test_demonstrations_that_are_no_part_of_the_training_score_zero(
    flags, source, tiny_base, monkeypatch
):
    model, codec, asked = ScalarModel(GPT.load(tiny_base)).eval(), Codec.load(tiny_base), []
    rows = [{"prompt": "Why?", "response": text} for text in ("a b", "c", "d!")]
    monkeypatch.setattr(data, "demonstrations", lambda *x: asked.append(x) or rows)
    config = reward.Config(device="cpu", **flags)
    reward.center(model, reward.demonstrated([], codec, config, 256), config)
    assert asked == [(source, 500, 5)]
    batch = pack([codec.prompt("Why?")] * 3, [codec.response(row["response"]) for row in rows])
    assert model.score(batch).mean().item() == pytest.approx(0, abs=1e-5)


def test_demonstrations_that_do_not_fit_end_the_run_before_the_training(tiny_base, tmp_path):
    save_records(tmp_path / "d.jsonl", [{"prompt": "Why?", "response": "because " * 300}])
    rows = [{"prompt": f"p{i}", "responses": ["a", "b"], "ranks": [1, 2]} for i in range(4)]
    save_records(tmp_path / "c.jsonl", rows)
    files = {name: str(tmp_path / f"{name[0]}.jsonl") for name in ("demonstrations", "comparisons")}
    config = reward.Config(out=str(tmp_path / "reward"), sft=tiny_base, device="cpu", **files)
    with pytest.raises(UserError, match="d.jsonl: none fits into 256 tokens"):
        reward.main(config)
    assert not (tmp_path / "reward").exists()


def test_five_hundred_prompts_are_enough_to_centre(tiny_base, monkeypatch):
    model, codec, scored = ScalarModel(GPT.load(tiny_base)), Codec.load(tiny_base), []
    monkeypatch.setattr(
        reward, "score_all", lambda _, chosen, __: scored.append(chosen) or [[2.0]] * len(chosen)
    )
    record = {"prompt": "p", "responses": ["a", "b"], "ranks": [2, 1]}
    training = [reward.Comparison(record | {"prompt": f"p{i}"}, []) for i in range(502)]
    before = model.head.bias.item()
    config = reward.Config(comparisons="x")
    reward.center(model, reward.demonstrated(training, codec, config, 256), config)
    (rows,) = scored
    assert [c.record["prompt"] for c in rows] == [f"p{i}" for i in range(500)]
    assert {c.record["response"] for c in rows} == {"b"}
    assert model.head.bias.item() == pytest.approx(before - 2)


def test_new_prompts_of_the_toy_world_are_asked_in_every_round(tiny_base, monkeypatch):
    asked = []
    monkeypatch.setattr(data, "prompts", lambda *x: asked.append(x) or ["a"])
    monkeypatch.setattr(reward, "generate", lambda model, prompts, *_, **__: [[1]] * len(prompts))
    for seed, policy in ((0, ""), (0, tiny_base), (1, "")):
        config = reward.Config(sft=tiny_base, policy=policy, seed=seed, toy_prompts=9, device="cpu")
        assert reward.collect(config) == []  # one response only is different
    assert [x[:2] for x in asked] == [("toy", 9)] * 3 and len({x[2] for x in asked}) == 3


def test_a_whole_run_by_hand(tiny_base, monkeypatch, tmp_path, capsys):
    """What is held out, centred, measured, printed and written; and that --resume repeats none."""
    prompts = [f"p{i}" for i in range(9)] + ["p0"]
    rows = [{"prompt": p, "responses": ["a", "bb", "c d"], "ranks": [2, 1, 2]} for p in prompts]
    save_records(tmp_path / "c.jsonl", rows)
    seen, train, measure, center = SimpleNamespace(), reward.train, reward.measure, reward.center

    def noted_train(run, model, comparisons):
        seen.trained, seen.start = comparisons, run.modules["model"].gpt.wte.weight.clone()
        train(run, model, comparisons)

    def noted_measure(model, training, held_out, run):
        seen.found, seen.sides = measure(model, training, held_out, run), (training, held_out)
        seen.scores = reward.score_all(model, held_out, run.config)
        return seen.found

    monkeypatch.setattr(reward, "train", noted_train)
    monkeypatch.setattr(reward, "measure", noted_measure)
    flags = {"comparisons": str(tmp_path / "c.jsonl"), "sft": tiny_base, "held_out": 0.25}
    config = reward.Config(out=str(tmp_path / "reward"), batch_size=3, device="cpu", **flags)
    last = reward.main(config)
    asked = [[c.record["prompt"] for c in side] for side in seen.sides]
    assert asked == [[f"p{i}" for i in range(1, 9)], ["p0", "p0"]]  # a quarter of ten, rounded down
    assert seen.trained == seen.sides[0]
    model, codec = ScalarModel.load(config.out), Codec.load(tiny_base)
    (colon,) = codec.tokenizer.encode_ordinary(":")
    start = GPT.load(tiny_base).wte.weight
    assert seen.start[colon].equal(start[colon]) and seen.start[codec.eos].equal(start[colon])
    best = reward.tokenised([c.record | {"responses": ["bb"]} for c in seen.trained], codec, 256)
    scores = [s for own in reward.score_all(model, best, config) for s in own]
    assert sum(scores) == pytest.approx(0, abs=1e-4)

    share, half_width, n = seen.found["pairs"]["reward model, held-out comparisons"]
    assert (last["accuracy"], last["accuracy_ci"], n) == (share, half_width, 4)
    lines = [json.loads(x) for x in (tmp_path / "reward/metrics.jsonl").read_text().splitlines()]
    assert lines[-1] == last and len(lines) == 2 * 3  # two epochs of eight prompts, three a step
    assert (tmp_path / "reward/report.json").read_text() == strict_json(seen.found, indent=1)
    out = capsys.readouterr().out
    report.print_reward_report(seen.found)
    assert capsys.readouterr().out in out
    assert f"10 comparisons, 10 of them in {tmp_path}/c.jsonl" in out
    text = (tmp_path / "reward/samples.txt").read_text()
    ranked = sorted(zip(seen.scores[0], [2, 1, 2], ["a", "bb", "c d"], strict=True), reverse=True)
    block = "".join(f"score {s:+.2f}, rank {rank}: {answer}\n" for s, rank, answer in ranked)
    assert text == f"p0\n{block}\n" * 2

    monkeypatch.setattr(reward, "center", lambda *_: pytest.fail("it is centred already"))
    assert reward.main(replace(config, resume=True)) == last
    monkeypatch.setattr(reward, "center", center)
    save_records(tmp_path / "c.jsonl", rows[:1])
    with pytest.raises(UserError, match="1 rows are held out, none is left to train on"):
        reward.main(replace(config, out=str(tmp_path / "other")))


# ---- where a ScalarModel is read ----


def tiny_gpt(**overrides):
    """A small GPT whose every parameter, biases and layer-norm gains included, is random."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 13, "block_size": 24, "n_layer": 2, "n_head": 2, "n_embd": 16}
    gpt = GPT(GPTConfig(**sizes | overrides))
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return gpt.eval()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return ScalarModel(tiny_gpt()).eval()


# 6, 2 and 8 tokens; the last prompt has an end-of-text of its own, and its response was cut off
PROMPTS = [[3, 5], [7], [1, EOS, 4, 4, 9]]
RESPONSES = [[2, 8, 6, EOS], [EOS], [11, 12, 2]]


def test_shapes(model):
    batch = pack(PROMPTS, RESPONSES)
    assert model(batch).shape == (16,)
    assert model.values(batch).shape == (8,)
    assert model.score(batch).shape == (3,)


@torch.no_grad()
def test_score_is_read_at_the_last_token(model):
    """#15 rm_reads_last_column, #16 rm_reads_before_eos, #18: whatever the prompt contains."""
    batch = pack(PROMPTS, RESPONSES)
    close(model.score(batch), model(batch)[[5, 7, 15]])


@torch.no_grad()
def test_values_are_read_before_each_response_token(model):
    """#2 value_after_token."""
    batch = pack(PROMPTS, RESPONSES)
    close(model.values(batch), model(batch)[[1, 2, 3, 4, 6, 12, 13, 14]])


@torch.no_grad()
def test_a_value_is_the_score_of_what_has_been_said_so_far(model):
    """#2: V_t of a response is the score of its first t tokens, none of them for V_0."""
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        values = model.values(pack([prompt], [response]))
        so_far = [response[:t] for t in range(len(response))]
        close(values, model.score(pack([prompt] * len(so_far), so_far)), 1e-5)


@torch.no_grad()
def test_a_token_changes_the_values_after_it_only(model):
    """#2 value_after_token, #3 future_leak."""
    before = model.values(pack([[3, 5]], [[2, 8, 6, EOS]]))
    after = model.values(pack([[3, 5]], [[2, 9, 6, EOS]]))  # the token of index 1
    assert torch.equal(before[:2], after[:2])
    assert ((before[2:] - after[2:]).abs() > 1e-4).all()


@torch.no_grad()
def test_another_last_token_is_another_score_and_no_other_value(model):
    """#16 rm_reads_before_eos."""
    ended, cut = pack([[3, 5]], [[2, 8, EOS]]), pack([[3, 5]], [[2, 8, 6]])
    assert (model.score(ended) - model.score(cut)).abs() > 1e-4
    assert torch.equal(model.values(ended), model.values(cut))


@torch.no_grad()
def test_every_token_before_the_last_can_move_the_score(model):
    # whether it stands in the prompt, in the response, or after an end-of-text in the prompt
    score = model.score(pack([[3, EOS, 5]], [[2, 8, EOS]]))
    for prompt, response in [
        ([4, EOS, 5], [2, 8, EOS]),
        ([3, 6, 5], [2, 8, EOS]),
        ([3, EOS, 6], [2, 8, EOS]),
        ([3, EOS, 5], [2, 9, EOS]),
    ]:
        assert (model.score(pack([prompt], [response])) - score).abs() > 1e-4


@torch.no_grad()
def test_a_neighbour_changes_neither_score_nor_values(model):
    """#5 no_attn_mask, #15, #17 rm_max_len_of_pair, #19 pooling over positions."""
    together = pack(PROMPTS, RESPONSES)
    scores, values = model.score(together), model.values(together).split([4, 1, 3])
    for i in range(3):
        alone = pack(PROMPTS[i : i + 1], RESPONSES[i : i + 1])
        close(scores[i : i + 1], model.score(alone), 1e-5)
        close(values[i], model.values(alone), 1e-5)


@torch.no_grad()
def test_the_bias_of_the_head_shifts_scores_and_values(model):
    """#47: the normalisation is this bias, so it travels with the weights."""
    batch, shifted = pack(PROMPTS, RESPONSES), ScalarModel(tiny_gpt()).eval()
    shifted.load_state_dict(model.state_dict())
    shifted.head.bias += 2.5
    close(shifted.score(batch), model.score(batch) + 2.5, 1e-5)
    close(shifted.values(batch), model.values(batch) + 2.5, 1e-5)


def test_gradients_reach_the_whole_body_but_only_what_the_score_has_seen(model):
    model.zero_grad()
    model.score(pack([[3, 5], [7]], [[2, EOS], [9, EOS]]))[0].backward()
    # the output of the last layer at the last position is read, and thereby all before it
    assert all(p.grad is not None for p in model.parameters())
    moved = model.gpt.wte.weight.grad.abs().sum(1) > 0
    assert moved.nonzero()[:, 0].tolist() == [EOS, 2, 3, 5]  # no token of the neighbour
    model.zero_grad()


def test_the_head_starts_with_std_1_over_sqrt_c_plus_1():
    # 1 / sqrt(1025) = 0.03123; 1,024 draws know their std to 2.2 %, and 0.02 is 36 % off. Five and
    # a half standard errors
    torch.manual_seed(0)
    head = ScalarModel(tiny_gpt(n_layer=1, n_embd=1024)).head
    assert head.weight.std().item() == pytest.approx(1025**-0.5, rel=0.122)
    assert abs(head.weight.mean().item()) < 5.5 * 1025**-0.5 / 32
    assert head.bias.item() == 0


def test_a_scalar_model_is_a_copy_of_the_gpt():
    """#48: no shared storage, and training one leaves the other alone."""
    gpt = tiny_gpt()
    before = {name: p.clone() for name, p in gpt.state_dict().items()}
    model = ScalarModel(gpt)
    for name, p in model.gpt.state_dict().items():
        assert torch.equal(p, before[name])
    pointers = {p.data_ptr() for p in gpt.parameters()}
    assert pointers.isdisjoint(p.data_ptr() for p in model.parameters())
    torch.optim.SGD(model.parameters(), lr=1.0).step(
        lambda: model.score(pack([[3]], [[2, EOS]])).sum().backward()
    )
    assert not torch.equal(model.gpt.wte.weight, gpt.wte.weight)
    for name, p in gpt.state_dict().items():
        assert torch.equal(p, before[name])


def test_the_body_is_the_gpts(model):
    # with a head that reads channel c, the scalar model returns channel c of the GPT's hidden state
    gpt, batch = tiny_gpt(), pack(PROMPTS, RESPONSES)
    reader = ScalarModel(gpt).eval()
    with torch.no_grad():
        reader.head.weight.copy_(F.one_hot(tensor([3]), 16))
        close(reader(batch), gpt(batch)[:, 3])


def test_dropout_is_off_in_eval_mode():
    """#6 dropout_on."""
    batch, noisy = pack(PROMPTS, RESPONSES), ScalarModel(tiny_gpt(dropout=0.5)).train()
    with torch.no_grad():
        assert not torch.equal(noisy.score(batch), noisy.score(batch))
        noisy.eval()
        assert torch.equal(noisy.score(batch), noisy.score(batch))


def test_end_of_text_starts_where_the_base_model_would_comment():
    codec = Codec(get_tokenizer("toy"), "{prompt}\n")
    gpt = GPT(GPTConfig(codec.tokenizer.n_vocab, 16, 1, 1, 4))
    before = gpt.wte.weight.detach().clone()
    reward.start_from_cue(gpt, codec, "")
    assert gpt.wte.weight.equal(before)
    reward.start_from_cue(gpt, codec, "Comment:")
    (colon,) = codec.tokenizer.encode_ordinary(":")
    assert gpt.wte.weight[codec.eos].equal(before[colon])
    assert gpt.wte.weight[: codec.eos].equal(before[: codec.eos])  # end of text is the last token


# ---- scoring a file, and what the command line excludes ----


@pytest.fixture
def scoring(tiny_base, tmp_path) -> reward.Config:
    """A reward model of the toy world that nobody has trained, and a file of responses."""
    torch.manual_seed(0)
    model, codec = ScalarModel(GPT.load(tiny_base)), Codec.load(tiny_base)
    folder, sizes = str(tmp_path / "reward"), model.gpt.config
    optimizer = torch.optim.AdamW(model.parameters())
    Run("reward", reward.Config(), folder, sizes, codec, optimizer, model=model).save()
    rows = [{"prompt": "a", "responses": ["b", "c d"], "scores": [5, 1], "id": "x"}]
    save_records(tmp_path / "in.jsonl", [*rows, {"prompt": "a", "response": "b", "ranks": 7}])
    paths = {"score": str(tmp_path / "in.jsonl"), "out": str(tmp_path / "out.jsonl")}
    return reward.Config(reward_model=folder, device="cpu", **paths)


def test_a_scored_file_keeps_its_records(scoring):
    assert reward.main(scoring) == {"records": 2}
    rows = [json.loads(line) for line in open(scoring.out, encoding="utf-8")]
    model, codec = ScalarModel.load(scoring.reward_model).eval(), Codec.load(scoring.reward_model)
    pairs = [(codec.prompt("a"), codec.response(text)) for text in ("b", "c d")]
    expected = model.score(pack(*map(list, zip(*pairs, strict=True)))).tolist()
    assert rows[0].pop("scores") == pytest.approx(expected, abs=1e-6)
    assert rows[1].pop("scores") == pytest.approx(expected[:1], abs=1e-6)
    assert rows[0] == {"prompt": "a", "responses": ["b", "c d"], "id": "x"}
    assert rows[1] == {"prompt": "a", "response": "b", "ranks": 7}


def test_a_file_of_which_nothing_fits_is_not_scored(scoring, tmp_path):
    save_records(scoring.score, [{"prompt": "a", "response": "b " * 10_000}])
    with pytest.raises(UserError, match="in.jsonl: no response fits into the context of"):
        reward.main(scoring)
    assert not (tmp_path / "out.jsonl").exists()


def test_ranks_need_neither_differ_everywhere_nor_begin_at_1(tiny_base, tmp_path, capsys):
    ranks = [[1, 1], [2, 2], [2, 3]] * 4
    rows = [{"prompt": f"p{i}", "responses": ["a", "b"], "ranks": r} for i, r in enumerate(ranks)]
    save_records(tmp_path / "c.jsonl", rows)
    flags = {"comparisons": str(tmp_path / "c.jsonl"), "out": str(tmp_path / "reward")}
    reward.main(reward.Config(sft=tiny_base, epochs=1, **flags))
    out = capsys.readouterr().out
    assert "score and length is not defined: all scores or all lengths are equal" in out


@pytest.mark.parametrize("out", ["in.jsonl", "reward"])
def test_scores_are_not_written_over_what_they_are_made_from(out, scoring, tmp_path):
    before = (tmp_path / "in.jsonl").read_bytes()
    with pytest.raises(UserError, match="--out"):
        reward.main(replace(scoring, out=str(tmp_path / out)))
    assert (tmp_path / "in.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "flags, needle",
    [
        ({"labeler": "human", "comparisons": "x.jsonl"}, "ranked already"),
        ({"labeler": "gold", "prompts": "x.jsonl"}, "toy prompts only"),
        ({"labeler": "file"}, "--comparisons <path>"),
    ],
)
def test_flags_that_exclude_each_other_are_one_line(flags, needle, tmp_path):
    with pytest.raises(UserError, match=needle):
        reward.ranked(reward.Config(out=str(tmp_path / "out"), **flags))
    assert not (tmp_path / "out").exists()


def test_half_of_a_few_new_comparisons_are_trained_on(tiny_base, monkeypatch, tmp_path):
    """The new ones are held out first, beside five hundred earlier ones."""
    for name, n in (("new", 10), ("old", 500)):
        rows = [
            {"prompt": f"{name}{i}", "responses": ["a", "b"], "ranks": [1, 2]} for i in range(n)
        ]
        save_records(tmp_path / f"{name}.jsonl", rows)
    seen = []

    def train(run, model, comparisons):
        seen.extend(c.record["prompt"] for c in comparisons)
        raise UserError("that is enough")

    monkeypatch.setattr(reward, "train", train)
    files = {"comparisons": str(tmp_path / "new.jsonl"), "merge": str(tmp_path / "old.jsonl")}
    config = reward.Config(sft=tiny_base, out=str(tmp_path / "out"), device="cpu", **files)
    with pytest.raises(UserError, match="enough"):
        reward.main(config)
    assert sum(prompt.startswith("new") for prompt in seen) == 5 and len(seen) == 505


def test_more_responses_than_a_person_can_rank_are_refused_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(reward, "collect", lambda config: pytest.fail("it has sampled"))
    config = reward.Config(labeler="human", responses=12, out=str(tmp_path / "out"))
    with pytest.raises(UserError, match="12 responses to a prompt; at most 9 can be ranked"):
        reward.ranked(config)
    assert not (tmp_path / "out").exists()
