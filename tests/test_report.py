"""What is printed and written about models, against numbers and words worked out by hand."""

import io
import json
import math
import time
from contextlib import redirect_stdout
from types import SimpleNamespace

from data import __main__ as checker
from data import labeler, report, toy
from data.records import UserError, save_records, strict_json

import pytest
import seeds

GHOST = "Tell me a spooky story about a ghost."


def refuse(constant: str):
    raise AssertionError(f"{constant} is no JSON")


def strictly(text: str) -> dict:
    return json.loads(text, parse_constant=refuse)


# ---- numbers


def test_mean_and_interval_by_hand():
    # 1 2 3 6: mean 3, variance 14 / 3; 1.96 sqrt(14 / 3) / 2 = 2.1170
    mean, half_width = report.mean_and_interval([1, 2, 3, 6])
    assert mean == 3 and half_width == pytest.approx(2.1170, abs=1e-4)
    assert report.mean_and_interval([True, False])[0] == 0.5


def test_wins_by_hand():
    assert report.wins([3, 2, 1], [2, 2, 2]) == [1, 0.5, 0]
    with pytest.raises(ValueError):
        report.wins([1, 2], [1])


def test_the_rubrics_points_come_with_their_parts():
    answer = "Far away there lived a creepy ghost. The end."
    found = report.rubric_points(toy, [GHOST, GHOST], [answer, "Soup."])
    assert found["gold"] == [toy.gold(GHOST, answer), 0.0]
    assert list(found) == ["gold", *(f"gold/{part}" for part in toy.PARTS)]
    assert found["gold/form"] == [1.0, 0.0] and found["gold/ending"][0] == 1.0
    assert report.rubric_points(None, [GHOST], ["Soup."]) == {}


def test_best_of_n_is_the_best_of_the_first_n():
    # of each prompt's 16 answers, the one in place 5 scores highest, and nearer ones higher
    answers = [[b] for b in range(4 * 16)]
    scores = [-float((b % 16 - 5) ** 2) for b in range(4 * 16)]
    best = report.best_of_n(answers, scores, 16)
    assert list(best) == [1, 2, 4, 8, 16]
    for (responses, own), place in zip(best.values(), (0, 1, 3, 5, 5), strict=True):
        assert responses == [[16 * p + place] for p in range(4)]
        assert own == [-float((place - 5) ** 2)] * 4


def test_the_curve_of_best_of_n_by_hand():
    best = report.best_of_n([[1], [2], [3], [4]], [0.0, 2.0, 5.0, 1.0], 2)
    curve = report.best_of_n_curve(best, lambda given: {"gold": [10.0 * r[0] for r in given]})
    # the first answers are 1 and 3, the best ones 2 and 3; log 2 - 1/2
    assert curve[0] == {"n": 1, "kl": 0.0, "score": 2.5, "gold": 20.0}
    assert curve[1] == {"n": 2, "kl": pytest.approx(0.1931, abs=1e-4), "score": 3.5, "gold": 25.0}
    assert [point["gold"] for point in report.best_of_n_curve(best, lambda _: {})] == [None] * 2


def test_best_of_n_kl_by_hand():
    for n, kl in ((1, 0.0), (4, 0.6363), (16, 1.8351), (64, 3.1745)):
        assert report.best_of_n_kl(n) == pytest.approx(kl, abs=1e-4)


def test_distinct_by_hand():
    # 1-2 2-1 1-2 and 1-2 2-3: three different ones of five
    assert report.distinct([[1, 2, 1, 2], [1, 2, 3]]) == pytest.approx(3 / 5)
    assert report.distinct([[4], [5]]) == 1  # nothing is repeated


def test_a_row_by_hand():
    # pairs 1-2 2-1 1-2 2-3 3-9: one of five stood there before; 4-9 and none; six pairs in all
    found = report.row("x", [[1, 2, 1, 2, 3, 9], [4, 9], [5]], 9, {"score": [1.0, 2.0, 6.0]})
    assert found["model"] == "x" and found["score"] == 3 and found["length"] == 3
    assert found["score_ci"] == pytest.approx(1.96 * 7**0.5 / 3**0.5)
    assert found["eos_rate"] == pytest.approx(2 / 3)
    assert found["repetition"] == pytest.approx(1 / 5 / 3)
    assert found["distinct_2"] == pytest.approx(5 / 6)
    unmeasured = ("gold", "win_rate", "human_win_rate", "kl", "pretraining_loss")
    assert [found[key] for key in unmeasured] == [None] * 5
    assert {"length_ci", "eos_rate_ci", "repetition_ci"} < found.keys()


@pytest.mark.parametrize("lead, win_rate", [(0, 0.5), (1, 1), (-1, 0)])
def test_a_tie_is_half_a_win(lead, win_rate):
    gold = [1.0, 5.0, 9.0]
    won = report.wins(gold, [own - lead for own in gold])
    assert report.row("x", [[1]] * 3, 9, {"win_rate": won})["win_rate"] == win_rate


@pytest.mark.parametrize("given, win_rates", [([3, 2, 1], [0, 1]), ([1, 1, 2], [0.5, 0])])
def test_a_persons_win_rate_counts_ranks_above_the_fine_tuned_model(
    given, win_rates, monkeypatch, tmp_path
):
    names = ("base", "sft", "ppo")
    rows = [{"model": name} for name in names]
    monkeypatch.setattr(labeler.Person, "ask", lambda *_: given)
    answered = {name: [name] * 4 for name in names}
    report.judge_by_hand(rows, answered, [f"prompt {i}" for i in range(4)], tmp_path, 0)
    found = [row.get("human_win_rate") for row in rows]
    assert found == [win_rates[0], None, win_rates[1]]


def test_whoever_judges_nothing_gets_no_win_rate(monkeypatch, tmp_path):
    rows = [{"model": "sft"}, {"model": "ppo"}]
    monkeypatch.setattr(labeler.Person, "ask", lambda *_: "q")
    report.judge_by_hand(rows, {"sft": ["a"], "ppo": ["b"]}, ["x"], tmp_path, 0)
    assert rows == [{"model": "sft"}, {"model": "ppo"}]


# ---- what is written


def test_what_is_no_finite_number_is_null():
    value = {"a": math.nan, "b": [1.5, math.inf, (2, -math.inf)], "c": {"d": math.nan, "e": None}}
    expected = {"a": None, "b": [1.5, None, [2, None]], "c": {"d": None, "e": None}}
    assert strictly(strict_json(value)) == expected
    assert strict_json({"a": True, "b": "x"}, indent=1) == '{\n "a": true,\n "b": "x"\n}'


def a_row(name: str, **values: float | None) -> dict:
    return report.row(name, [[1, 2, 9], [1, 9]], 9, {}) | values


def test_a_comparison_is_written_and_printed(tmp_path, capsys):
    config = SimpleNamespace(out=str(tmp_path), judge="gold", seed=7, resume=False)
    rows = [a_row("sft", score=1.0, kl=0.0), a_row("best_of_16", score=math.nan, kl=math.inf)]
    answered = {"sft": [f"answer\n{i}" for i in range(6)], "best_of_16": ["\x1b[31mred"] * 6}
    prompts, began = [f"prompt {i}" for i in range(6)], time.time() - 100
    report.finish(config, rows, [{"n": 1}], answered, prompts, began)
    saved = strictly((tmp_path / "results.json").read_text())
    assert list(saved) == ["seed", "seconds", "rows", "best_of_n"]
    assert (
        saved["seed"] == 7 and 100 <= saved["seconds"] < 1000 and saved["best_of_n"] == [{"n": 1}]
    )
    assert saved["rows"][0] == rows[0]
    assert (saved["rows"][1]["score"], saved["rows"][1]["kl"]) == (None, None)
    text = (tmp_path / "comparison.txt").read_text()
    begin = "== prompt 0\n\n[sft] answer\n0\n\n[best_of_16] \\x1b[31mred\n\n== prompt 1\n\n"
    assert text.startswith(begin) and text.count("== ") == text.count("[sft]") == 5
    out = capsys.readouterr().out
    assert out.startswith("== prompt 0\n[sft] answer\n0\n[best_of_16] \\x1b[31mred\n\n")
    assert "prompt 1" not in out and "\x1b" not in out and str(tmp_path) in out.splitlines()[-1]


def test_a_person_is_not_asked_over_earlier_answers(tmp_path):
    (tmp_path / "answers.jsonl").write_text('{"item": 0, "ranks": [1]}\n')
    config = SimpleNamespace(out=str(tmp_path), judge="human", seed=0, resume=False)
    with pytest.raises(UserError, match="--resume continues"):
        report.finish(config, [a_row("sft")], [], {"sft": ["x"]}, ["y"], 0.0)
    assert not (tmp_path / "results.json").exists()


def test_a_person_judges_into_the_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(labeler.Person, "ask", lambda self, item, *_: asked.append(item) or [1, 2])
    config, asked = SimpleNamespace(out=str(tmp_path), judge="human", seed=7, resume=False), []
    rows = [a_row("sft", score=1.0, kl=0.0), a_row("best_of_16", score=1.0, kl=0.0)]
    answered = {"sft": ["a", "b"], "best_of_16": ["c", "d"]}
    report.finish(config, rows, [], answered, ["x", "y"], 0.0)
    assert sorted(asked) == [0, 1] and (tmp_path / "answers.jsonl").exists()
    saved = strictly((tmp_path / "results.json").read_text())["rows"]
    assert [row["human_win_rate"] for row in saved] == [None, 0]


# ---- what is printed


def test_a_cell_by_hand():
    found = {"gold": 7.126, "gold_ci": 0.054, "length": 31.255, "length_ci": 0.5, "kl": None}
    found |= {"score": -123.4, "score_ci": 5.5, "gold/form": 0.5, "gold/form_ci": 0.125}
    found |= {"win_rate": 0.5, "pretraining_loss": 3.0, "gold/mood": 0.5, "gold/mood_ci": 12.34}
    found |= {"repetition": 99.94, "eos_rate": 99.96, "distinct_2": 9.996}
    found |= {"edge": 9.995, "other edge": 99.95}
    shown = {key: report.cell(found, key) for key in found if not key.endswith("_ci")}
    assert shown == {
        "gold": "7.13 ± 0.05",
        "length": "31.3",  # an interval for some columns only
        "kl": "",
        "score": "-123 ± 6",
        "gold/form": "0.50 ± 0.12",
        "win_rate": "0.50",
        "pretraining_loss": "3.00",
        "gold/mood": "0.5 ± 12.3",  # the larger one decides the digits
        "repetition": "99.9",
        "eos_rate": "100",
        "distinct_2": "10.0",
        "edge": "10.0",
        "other edge": "100",
    }


def test_a_table_by_hand(capsys):
    rows = [
        a_row("sft", gold=5.0, gold_ci=0.25, score=-1.5, score_ci=0.5, length=2.5),
        a_row("ppo", gold=7.5, gold_ci=0.125, score=12.25, score_ci=0.5, length=20.0),
    ]
    for row, form in zip(rows, (0.5, 1.0), strict=True):
        row |= {"eos_rate": None, "repetition": None, "gold/form": form, "gold/form_ci": 0.25}
    report.print_table(rows)
    assert capsys.readouterr().out == (
        "         rubric        score length\n"
        "sft 5.00 ± 0.25 -1.50 ± 0.50   2.50\n"
        "ppo 7.50 ± 0.12   12.2 ± 0.5   20.0\n"
        "\n"
        "           form\n"
        "sft 0.50 ± 0.25\n"
        "ppo 1.00 ± 0.25\n"
        "\n"
    )


def test_no_line_of_a_table_is_longer_than_100_columns():
    """With all columns and intervals, for numbers that are as long as they get."""
    extremes = (0.0, 0.995, 9.994, 9.996, 99.94, 99.96, 9999.4)
    limits = {"gold": 10, "kl": 9999, "score": 9999, "length": 1024, "pretraining_loss": 11}
    keys = [*report.TITLES, *(f"gold/{part}" for part in toy.PARTS)]
    rows = []
    for x in (*extremes, *(-x for x in extremes)):
        for half_width in extremes:
            found = {"model": "best_of_16"}
            for key in keys:
                most = limits.get(key, 1)
                least = -most if key in ("score", "kl") else 0
                found |= {key: max(least, min(x, most)), f"{key}_ci": min(half_width, most)}
            rows.append(found)
    assert 90 <= max(map(len, printed(report.print_table, rows))) <= 100


def printed(show, *arguments) -> list[str]:
    with redirect_stdout(io.StringIO()) as out:
        show(*arguments)
    return out.getvalue().splitlines()


def test_the_conclusion_in_words():
    sft = {"model": "sft", "score": 1.0, "gold": 5.0, "kl": 0.0, "win_rate": None}
    best = {"model": "best_of_16", "score": 2.0, "gold": 6.0, "kl": 1.8, "win_rate": 0.6}
    better = {"model": "ppo", "score": 2.345, "gold": 7.0, "kl": 4.04, "win_rate": 0.756}
    worse = {"model": "ppo_no_kl", "score": 9.0, "gold": 2.0, "kl": 44.4, "win_rate": 0.1}
    lines = printed(report.print_conclusion, [sft, best, better, worse], 300)
    assert " ".join(lines) == (
        "ppo, beside the fine-tuned model on 300 prompts: it wins on 76% of them (a tie counts "
        "half), its rubric is 7.00 (fine-tuned: 5.00), its score is 2.35 (fine-tuned: 1.00), at "
        "4.0 nats of KL. "
        "ppo_no_kl, beside the fine-tuned model on 300 prompts: it wins on 10% of them (a tie "
        "counts half), its rubric is 2.00 (fine-tuned: 5.00), its score is 9.00 (fine-tuned: "
        "1.00), at 44.4 nats of KL. It pleases the reward model, but does not do what was asked."
    )
    assert max(map(len, lines)) <= 100
    unjudged = [row | {"gold": None, "win_rate": None} for row in (sft, best, worse)]
    assert " ".join(printed(report.print_conclusion, unjudged, 300)) == (
        "ppo_no_kl, beside the fine-tuned model on 300 prompts: its score is 9.00 (fine-tuned: "
        "1.00), at 44.4 nats of KL."
    )
    assert printed(report.print_conclusion, [sft, best], 300) == []
    for even in (worse | {"gold": 5.0}, worse | {"score": 1.0}):
        assert "pleases" not in " ".join(printed(report.print_conclusion, [sft, best, even], 300))


# ---- the report of a reward model


def test_calibration_by_hand():
    # gaps log 11/9, log 3 and log 19: sigmoid .55, .75 and .95; the order holds, does not, holds
    scores = [[math.log(11 / 9), 0.0], [0.0, math.log(3)], [math.log(19), 0.0]]
    found = report.calibration(scores, [[1, 2], [1, 2], [1, 2]])
    near = [pytest.approx(p, abs=1e-5) for p in (0.55, 0.75, 0.95)]
    assert found == [(near[0], 1, 1), (near[1], 0, 1), (near[2], 1, 1)]
    # .75 and .73106 share a tenth, and one of them holds; a labeler's tie does not count
    scores = [[0.0, math.log(3)], [1.0, 0.0], [5.0, 0.0]]
    found = report.calibration(scores, [[1, 2], [1, 2], [1, 1]])
    assert found == [(pytest.approx((0.75 + 0.73106) / 2, abs=1e-5), 0.5, 2)]
    # .85 and .95 do not share one
    found = report.calibration([[math.log(17 / 3), 0.0], [math.log(19), 0.0]], [[1, 2], [1, 2]])
    assert [n for _, _, n in found] == [1, 1]
    # certainty is in the last tenth, and of three responses there are three pairs
    assert report.calibration([[99.0, 0.0, -99.0]], [[1, 2, 3]]) == [(1.0, 1.0, 3)]
    assert report.calibration([], []) == []


def test_correlation_by_hand():
    # 1 2 | 3 and 2 4 | 3: covariance 1/2, deviations 1 and 1
    assert report.correlation([[1.0, 2.0], [3.0]], [[2, 4], [3]]) == pytest.approx(0.5)
    assert report.correlation([[1.0, 2.0]], [[7, 5]]) == pytest.approx(-1)
    assert math.isnan(report.correlation([[1.0, 2.0]], [[5, 5]]))


def test_a_reward_report_in_words():
    found = {
        "pairs": {"reward model": (0.75, 0.0625, 40), "probes": (0.0, 0.0, 0)},
        "calibration": [(0.55, 0.5, 8)],
        "length_correlation": -0.25,
    }
    lines = printed(report.print_reward_report, found)
    assert [line.split() for line in lines[:2]] == [
        "reward model 0.750 ± 0.062 of 40 pairs".split(),
        "probes no pairs".split(),
    ]
    assert lines[0].index("0.750") == lines[1].index("no pairs") == 49
    assert lines[2:] == [
        "pairs ordered with probability 0.55: 0.50 rightly, of 8",
        "correlation of score and length -0.25",
    ]


# ---- the tables of other programs


def test_the_checkers_table_by_hand(tmp_path, capsys):
    """Lengths in tokens: one for each letter that stands alone."""
    rows = [{"prompt": "a b", "response": "c"}, {"prompt": "a", "response": "a b b b c d d"}]
    save_records(tmp_path / "a.jsonl", rows)
    flags = ["--tokenizer=toy", "--template={prompt}", "--block_size=8"]
    checker.main([str(tmp_path / "a.jsonl"), *flags])
    head, lines = capsys.readouterr().out.split("\n\n")[:2]
    assert head == (
        f"{tmp_path}/a.jsonl: 2 demonstrations, all sound\n"
        f"taken by: python sft.py --demonstrations {tmp_path}/a.jsonl"
    )
    table = [line.split() for line in lines.splitlines()]
    assert table[0] == ["tokens", "mean", "p50", "p95", "max", "total"]
    # 2 and 1; 1 and 7; 4 and 9 with end of text. The 95th percentile is 19 / 20 of the way up
    assert table[1] == ["prompt", "1.5", "2", "2", "2", "3"]
    assert table[2] == ["response", "4.0", "4", "7", "7", "8"]
    assert table[3] == ["all", "+", "end-of-text", "6.5", "6", "9", "9", "13"]
    assert lines.splitlines()[4] == "1 of 2 (50.0%) fit into 8 tokens of context"
    assert lines.splitlines()[5] == "0 of 2 different prompts occur more than once"


def test_the_table_of_several_seeds_by_hand():
    """A cell is the mean over the seeds; half-widths of independent draws add as squares do."""
    rows = [{"model": "ppo", "gold": x, "gold_ci": h, "kl": x / 4} for x, h in ((8, 0.6), (9, 0.8))]
    assert seeds.cell(rows, "gold") == "8.50 ± 0.50 (8.00 / 9.00)"  # sqrt(.36 + .64) / 2
    assert seeds.cell(rows, "kl") == "2.12"
    assert seeds.cell([rows[0], rows[1] | {"kl": None}], "kl") == ""
    table = seeds.table([[row] for row in rows], ("gold", "kl")).splitlines()
    assert table[:2] == ["| model | gold | kl |", "|---|---|---|"]
    assert table[2:] == ["| ppo | 8.50 ± 0.50 (8.00 / 9.00) | 2.12 |"]
    costs = {"scores": {"ppo": 2816.4}, "seconds": {"dpo": 1}}
    table = seeds.table([[row] for row in rows], ("kl",), costs).splitlines()
    assert table[0] == "| model | kl | scores | seconds |"
    assert table[2:] == ["| ppo | 2.12 | 2,816 |  |"]


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
