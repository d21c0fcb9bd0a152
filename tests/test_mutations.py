"""The bugs of mutations.py can still be put into the code, and the rules of mistakes.py make what
they say; whether tests see it takes longer."""

import ast
import json
import random
from pathlib import Path

import pytest
from mistakes import EQUIVALENT, mistakes, wrong_versions
from mutations import BUGS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name, tests, file, correct, wrong", BUGS, ids=[bug[0] for bug in BUGS])
def test_a_bug_still_applies(name, tests, file, correct, wrong):
    assert (ROOT / f"tests/test_{tests}.py").exists()
    assert (ROOT / file).read_text("utf-8").count(correct) == 1 and wrong != correct


@pytest.mark.parametrize(
    "code, wrong",
    [
        ("a < b", {"a <= b", "a >= b"}),
        ("a - b", {"a + b", "b - a"}),
        ("-a", {"a"}),
        ("3", {"4", "2"}),
        ("x[i]", {"x[i + 1]"}),
        ("x[key]", set()),
        ("f(a, b, 1, 2)", {"f(b, a, 1, 2)"}),
        ("a if b else c", {"c if b else a"}),
        ("a and b", {"a or b"}),
        ("not a", {"a"}),
        ("x.max", {"x.min"}),
        ("True", {"False"}),
    ],
)
def test_the_rules_by_hand(code, wrong):
    node = ast.parse(code, mode="eval").body
    assert {ast.unparse(version) for version in wrong_versions(node)} == wrong


def test_a_mistake_is_another_program_of_as_many_lines():
    every = mistakes("ppo.py")
    source = (ROOT / "ppo.py").read_bytes()
    for m in random.Random(0).sample(every, 15):
        made = source[: m.start] + m.text + source[m.end :]
        assert ast.dump(ast.parse(made)) != ast.dump(ast.parse(source))
        assert m.line in m.function or not m.function
    code = "ratio = (logprobs - old_logprobs).exp()"
    wrong = {m.wrong for m in every if m.code == code}
    assert "ratio = (old_logprobs - logprobs).exp()" in wrong


def test_what_changes_nothing_can_still_be_made():
    """Code that is no longer there needs no reason."""
    for line in EQUIVALENT.read_text("utf-8").splitlines():
        found = json.loads(line)
        assert found.keys() == {"file", "code", "wrong", "reason"}
        made = {(m.code, m.wrong) for m in mistakes(found["file"])}
        assert (found["code"], found["wrong"]) in made, found["code"]
