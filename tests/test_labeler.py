"""Ranking by hand: what is typed, what is on disk after every answer, quitting and going on."""

import builtins
import json

from data import labeler
from data.labeler import LETTERS, Person, parse_ranking
from data.records import load_comparisons

import pytest
from hypothesis import given
from hypothesis import strategies as st

ITEMS = [{"prompt": f"{i}?", "responses": [f"{i}.{j}" for j in range(3)]} for i in range(12)]


@pytest.mark.parametrize(
    "typed, ranks",
    [
        ("b > a = c", [2, 1, 2]),
        ("b>a=c", [2, 1, 2]),
        ("  c   b a ", [3, 2, 1]),
        ("a =b=  c", [1, 1, 1]),
        ("a=b > c", [1, 1, 3]),
        ("bac", [2, 1, 3]),
        ("ba c", [2, 1, 3]),
        ("ca=b", [2, 2, 1]),
        ("c>ba", [3, 2, 1]),
    ],
)
def test_a_ranking_by_hand(typed, ranks):
    assert parse_ranking(typed, 3) == ranks


@pytest.mark.parametrize(
    "typed",
    [
        "",
        "a b",
        "a b b",
        "a b c d",
        "a b x",
        "ab",
        "abca",
        "abcd",
        "= a b c",
        "a >= b c",
        "a b c >",
        "> a b c",
        "a, b, c",
    ],
)
def test_what_is_no_ranking_is_refused(typed):
    with pytest.raises(ValueError, match="expected each of a, b, c once"):
        parse_ranking(typed, 3)


def test_four_letters_in_a_row():
    assert parse_ranking("badc", 4) == parse_ranking("b > a > d > c", 4) == [2, 1, 4, 3]


@given(st.lists(st.integers(1, 9), min_size=2, max_size=9))
def test_every_ranking_can_be_typed(values):
    ranks = [1 + sum(other < own for other in values) for own in values]
    tiers = [[x for x, r in zip(LETTERS, ranks, strict=False) if r == rank] for rank in set(ranks)]
    tiers.sort(key=lambda tier: ranks[LETTERS.index(tier[0])])
    for better, equal in ((" > ", " = "), (" ", "="), ("", "=")):
        assert parse_ranking(better.join(map(equal.join, tiers)), len(ranks)) == ranks


@pytest.fixture
def types(monkeypatch, capsys):
    """Types these lines at the terminal; a callable is given what stands on the screen."""

    def type_lines(*lines):
        waiting = iter(lines)

        def answer(prompt):
            line = next(waiting, None)
            if line is None:
                raise EOFError
            return line(capsys.readouterr().out) if callable(line) else line

        monkeypatch.setattr(builtins, "input", answer)

    return type_lines


def by_number(screen: str) -> str:
    """Ranks the responses shown: "3.0" before "3.1" before "3.2"."""
    shown = [line.strip().split(") ") for line in screen.splitlines() if ") " in line]
    return " > ".join(letter for letter, text in sorted(shown, key=lambda pair: pair[1]))


def test_ranks_belong_to_the_responses_and_not_to_their_letters(types, tmp_path, capsys):
    types(*[by_number] * 13)  # twelve items, and one of the first ten again
    person = Person(ITEMS, tmp_path, seed=0)
    assert person.rank_all()
    assert [c["ranks"] for c in person.comparisons()] == [[1, 2, 3]] * 12
    assert person.agreement() == (3, 3)
    assert "12 of 12 ranked, 0 skipped" in capsys.readouterr().out
    for row in load_comparisons(tmp_path / "comparisons.jsonl"):
        assert [text for _, text in sorted(zip(row["ranks"], row["responses"], strict=True))] == [
            f"{row['prompt'][:-1]}.{j}" for j in range(3)
        ]


def test_the_order_on_the_screen_says_nothing(types, tmp_path):
    orders = set()

    def note(screen):
        orders.add(by_number(screen))
        return "s"

    types(*[note] * 13)
    Person(ITEMS, tmp_path, seed=0).rank_all()
    assert len(orders) > 1  # of six, in twelve questions: by chance always the same in 3e-9


def test_quitting_skipping_undoing_and_going_on(types, tmp_path):
    types("a b c", "s", "q")
    assert not Person(ITEMS, tmp_path, seed=0).rank_all()
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["ranks"] is None for line in lines] == [False, True]
    types("u", "u", "c b a", "a = b", "a = b = c")  # the fourth is no ranking, and is asked again
    person = Person(ITEMS, tmp_path, seed=0)
    assert len(person.answers) == 2 and not person.rank_all()
    assert [answer["item"] for answer in person.answers] == [0, 1]
    assert sorted(person.answers[0]["ranks"]) == [1, 2, 3]
    assert person.answers[1]["ranks"] == [1, 1, 1]
    assert Person(ITEMS, tmp_path, seed=0).answers == person.answers


def test_disagreement_is_counted_and_ties_are_not(types, tmp_path):
    types(*[by_number] * 10, lambda screen: " ".join(reversed(by_number(screen).split(" > "))))
    person = Person(ITEMS, tmp_path, seed=0)
    person.rank_all()
    assert person.agreement() == (0, 3)
    person.answers[-1]["ranks"] = [1, 1, 1]
    assert person.agreement() == (0, 0)


def test_answers_to_other_questions_are_refused(types, tmp_path):
    types("a b c")
    Person(ITEMS, tmp_path, seed=0).rank_all()
    with pytest.raises(ValueError, match="answers.jsonl:1: an answer to another question"):
        Person([{"prompt": "?", "responses": ["x", "y"]}], tmp_path, seed=0)
    with pytest.raises(ValueError, match="--resume continues"):
        labeler.check_no_answers(tmp_path)


def test_a_response_cannot_steer_the_terminal(types, tmp_path, capsys):
    types("q")
    Person([{"prompt": "\x1b[2J", "responses": ["\x1b]0;x", "y"]}], tmp_path, seed=0).rank_all()
    assert "\x1b" not in capsys.readouterr().out


def test_replies_wrap_at_words_with_a_hanging_indent(types, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "44")
    words = "a kite is a light frame of wood, covered with paper, which flies in the wind"
    wrapped = """\
  b) a kite is a light frame of wood,
     covered with paper, which flies in the
     wind

     so there"""
    assert labeler.hanging("  b) ", f"{words}\n\nso there") == wrapped
    types("q")
    Person([{"prompt": words, "responses": [words, words]}], tmp_path, seed=0).rank_all()
    question = capsys.readouterr().out.partition("[1 of 1]")[2].partition("0 of 1 ranked")[0]
    assert max(map(len, question.splitlines())) <= 44
    assert " ".join(question.split()).count(words) == 3  # no word is broken


def test_after_quitting_with_nothing_ranked_there_is_nothing_to_train_on(types, tmp_path):
    for typed, ranked in (
        (["q"], 0),
        (["s", "q"], 0),
        (["u", "u", "cab", "u", "q"], 0),
        (["cab"], 1),
    ):
        types(*typed)
        person = Person(ITEMS, tmp_path, seed=0)
        assert not person.rank_all() and len(person.comparisons()) == ranked
    labeler.check_no_answers(tmp_path / "elsewhere")
