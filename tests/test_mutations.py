"""The bugs of mutations.py can still be put into the code; whether tests see them takes longer."""

from pathlib import Path

import pytest
from mutations import BUGS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name, tests, file, correct, wrong", BUGS, ids=[bug[0] for bug in BUGS])
def test_a_bug_still_applies(name, tests, file, correct, wrong):
    assert (ROOT / f"tests/test_{tests}.py").exists()
    assert (ROOT / file).read_text("utf-8").count(correct) == 1 and wrong != correct
