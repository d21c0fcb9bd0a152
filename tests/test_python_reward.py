"""A user's own reward function: what it may return, what it may raise, and what is tried again."""

import sys
from types import SimpleNamespace

from data import python_reward
from data.python_reward import RewardFunction
from data.records import UserError

import pytest
import torch

MINE = """
import multiprocessing
from neighbour import length

class Own(Exception): pass
calls = 0

def pool(texts, prompts):
    with multiprocessing.get_context("spawn").Pool(1) as workers:
        return workers.map(length, texts)
def as_list(texts, prompts): return [length(text) for text in texts]
def as_generator(texts, prompts): yield from map(length, texts)
def as_numpy(texts, prompts):
    import numpy
    return numpy.array([[length(text)] for text in texts])
def as_tensors(texts, prompts):
    import torch
    return torch.tensor([float(length(text)) for text in texts], requires_grad=True)
def state(texts, prompts):
    global calls
    calls += 1
    return [calls] * len(texts)
def own(texts, prompts): raise Own("429")
def stop(texts, prompts): raise StopIteration
def leaves(texts, prompts): raise SystemExit("no key")
def in_neighbour(texts, prompts): return [length(None)]
def late(texts, prompts):
    yield 1
    raise Own("in the second")
def nothing(texts, prompts): pass
async def coroutine(texts, prompts): return [1.0, 2.0]
def infinite(texts, prompts): return [1.0, float("inf")]
def one(texts, prompts): return [1.0]
def words(texts, prompts): return texts
def scalar(texts, prompts): return 1.0
"""


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "neighbour.py").write_text("def length(text):\n    return len(text)\n")
    before, modules = list(sys.path), set(sys.modules)
    yield lambda name, **how: RewardFunction(f"{tmp_path}/mine.py:{name}", CODE_OF_A, **how)
    sys.path[:] = before
    for name in set(sys.modules) - modules:
        del sys.modules[name]


CODE_OF_A = SimpleNamespace(text=lambda tokens: "a" * len(tokens))
BATCH = SimpleNamespace(
    tokens=torch.arange(7), cu_seqlens=torch.tensor([0, 3, 7]), lengths=torch.tensor([1, 2])
)


@pytest.mark.parametrize("name", ["pool", "as_list", "as_generator", "as_numpy", "as_tensors"])
def test_a_reward_function_may_be_written_in_many_ways(name, mine):
    assert mine(name).score(BATCH).tolist() == [1.0, 2.0]


def test_a_reward_function_keeps_its_state(mine):
    function = mine("state")
    assert [function.score(BATCH).tolist() for _ in range(2)] == [[1.0, 1.0], [2.0, 2.0]]


@pytest.mark.parametrize(
    "name, file, words",
    [
        ("own", "mine.py", "Own: 429"),
        ("stop", "mine.py", "StopIteration"),
        ("leaves", "mine.py", "SystemExit: no key"),
        ("in_neighbour", "neighbour.py", "TypeError: object of type 'NoneType' has no len()"),
        ("late", "mine.py", "Own: in the second"),
        ("nothing", "mine.py", "nothing returned None for 2 texts; expected a list with a finite"),
        ("coroutine", "mine.py", "coroutine returned <coroutine object"),
        ("infinite", "mine.py", "infinite returned [1.0, inf] for 2 texts"),
        ("one", "mine.py", "one returned [1.0] for 2 texts"),
        ("words", "mine.py", "words returned ['a', 'aa'] for 2 texts"),
        ("scalar", "mine.py", "scalar returned 1.0 for 2 texts"),
    ],
)
def test_what_a_reward_function_raises_names_its_file_and_line(name, file, words, mine, tmp_path):
    lines = (tmp_path / file).read_text().splitlines()
    start = "return len" if file == "neighbour.py" else f"def {name}("
    line = 1 + next(i for i, text in enumerate(lines) if start in text) + 2 * (name == "late")
    with pytest.raises(UserError) as error:
        mine(name).score(BATCH)
    assert str(error.value).startswith(f"{tmp_path / file}:{line}: {words}")


@pytest.mark.parametrize(
    "place, words",
    [
        ("mine.py:absent", "the file has no function 'absent'"),
        ("absent.py:f", "no Python file; expected path.py:function"),
        ("mine.py", "no Python file; expected path.py:function"),
        ("broken.py:f", "broken.py:2: SyntaxError"),
        ("raises.py:f", "raises.py:1: ZeroDivisionError"),
    ],
)
def test_a_reward_function_that_cannot_be_loaded_is_one_line(place, words, mine, tmp_path):
    (tmp_path / "broken.py").write_text("import os\ndef f(:\n")
    (tmp_path / "raises.py").write_text("1 / 0\n")
    with pytest.raises(UserError) as error:
        RewardFunction(f"{tmp_path}/{place}", CODE_OF_A)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [ConnectionResetError, TimeoutError, "APITimeoutError"])
def test_what_may_pass_is_tried_again(kind, mine, monkeypatch):
    kind = type(kind, (Exception,), {}) if isinstance(kind, str) else kind
    pauses: list[float] = []
    monkeypatch.setattr(python_reward.time, "sleep", pauses.append)
    function = mine("as_list", retries=3)
    calls, ask = [], function.function

    def failing(texts, prompts):
        calls.append(1)
        if len(calls) <= failures:
            raise kind("503")
        return ask(texts, prompts)

    function.function, failures = failing, 3
    assert function.score(BATCH).tolist() == [1.0, 2.0] and pauses == [1, 2, 4]
    calls.clear()
    failures = 4
    with pytest.raises(UserError, match="503"):
        function.score(BATCH)
    assert len(calls) == 4
    function.function = lambda texts, prompts: calls.append(1) or 1 / 0
    with pytest.raises(UserError, match="ZeroDivisionError"):  # which does not pass
        function.score(BATCH)
    assert len(calls) == 5
