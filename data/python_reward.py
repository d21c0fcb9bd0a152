"""A Python function in the reward model's place: python ppo.py --reward mine.py:my_reward."""

import importlib.util
import inspect
import math
import re
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.records import UserError

import torch
from torch import Tensor

MAY_PASS = re.compile("Connect|Timeout|URLError")  # in the name of an exception's class


class RewardFunction:
    """my_reward(texts, prompts) of a user's file, lists of text in, a list of numbers out.

    Scores a model.Batch as a model.ScalarModel does; the model.Codec gives the texts back. Errors
    of connection and time are tried again, `retries` times, after 1, 2, 4, ... seconds. Whatever
    else goes wrong in the user's code is a UserError with the user's file and line.
    """

    def __init__(self, place: str, codec, retries: int = 3):
        path, _, self.name = place.rpartition(":")
        self.path, self.codec, self.retries = Path(path).resolve(), codec, retries
        if not path.endswith(".py") or not self.path.is_file():
            raise UserError(f"--reward {place}: no Python file; expected path.py:function")
        with faults_of(self.path):
            self.function = getattr(import_file(self.path), self.name, None)
        if not callable(self.function):
            raise UserError(f"--reward {place}: the file has no function {self.name!r}")

    def score(self, batch) -> Tensor:  # -> (B,)
        sequences = batch.tokens.cpu().split(batch.cu_seqlens.diff().tolist())
        lengths = batch.lengths.tolist()
        pairs = [x.split([len(x) - n, n]) for x, n in zip(sequences, lengths, strict=True)]
        prompts = [self.codec.text(prompt.tolist()) for prompt, _ in pairs]
        texts = [self.codec.text(response.tolist()) for _, response in pairs]
        with faults_of(self.path):
            returned = self.call(texts, prompts)
        scores = numbers(returned)
        if len(scores) != len(texts) or not all(map(math.isfinite, scores)):
            code = getattr(inspect.unwrap(self.function), "__code__", None)
            line = f":{code.co_firstlineno}" if code else ""
            raise UserError(
                f"{self.path}{line}: {self.name} returned {str(returned):.80} for {len(texts)} "
                "texts; expected a list with a finite number for each"
            )
        return torch.tensor(scores, dtype=torch.float32, device=batch.tokens.device)

    def call(self, texts: list[str], prompts: list[str]) -> object:
        for attempt in range(self.retries + 1):
            try:
                returned = self.function(texts, prompts)
                return list(returned) if isinstance(returned, Iterator) else returned
            except BaseException as error:
                kinds = " ".join(kind.__name__ for kind in type(error).__mro__)
                if attempt == self.retries or not MAY_PASS.search(kinds):
                    raise
                print(f"{where(error, self.path)}; tried again in {2**attempt} s", file=sys.stderr)
            time.sleep(2**attempt)


@contextmanager
def faults_of(path: Path) -> Iterator[None]:
    """Inside, whatever a user's file raises becomes a UserError with the file and the line."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UserError(where(error, path)) from error


def where(error: BaseException, path: Path) -> str:
    """file:line: class: message, for the last line of the user's own files that was reached."""
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    own = [(file, line) for file, line in frames if Path(file).is_relative_to(path.parent)]
    file, line = own[-1] if own else (path, 1)
    if isinstance(error, SyntaxError):
        file, line = error.filename, error.lineno
    return f"{file}:{line}: {type(error).__name__}: {error}"


def import_file(path: Path):
    """The file as a module, as if Python had been started with it: its neighbours are found."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    module = importlib.util.module_from_spec(spec)
    if path.stem not in sys.modules or vars(sys.modules[path.stem]).get("__file__") == str(path):
        sys.modules[path.stem] = module  # for pickle, with which multiprocessing sends functions
    spec.loader.exec_module(module)
    return module


def numbers(returned: object) -> list[float]:
    """What the function returned as numbers; [] if it is none."""
    if inspect.iscoroutine(returned):
        returned.close()  # or Python warns that nobody awaited it
    try:
        return [float(x.item() if hasattr(x, "item") else x) for x in returned]
    except (TypeError, ValueError, RuntimeError):
        return []
