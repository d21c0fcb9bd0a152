"""A Python function in the reward model's place: python ppo.py --reward mine.py:my_reward."""

import math
import runpy
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from data.records import UserError

FAULTS = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError)
FAULTS += (RuntimeError, SyntaxError, TypeError, ValueError)


class RewardFunction:
    """my_reward(texts, prompts) of a user's file, lists of text in, a list of numbers out.

    Scores a model.Batch as a model.ScalarModel does; the model.Codec gives the texts back.
    ValueError, one line, for whatever goes wrong in the user's code.
    """

    def __init__(self, place: str, codec):
        path, _, name = place.rpartition(":")
        self.place, self.codec = place, codec
        with self.one_line_errors():
            self.function = runpy.run_path(path).get(name)
        if not callable(self.function):
            raise UserError(f"{path} has no function {name!r}; expected --reward path.py:function")

    @contextmanager
    def one_line_errors(self) -> Iterator[None]:
        """Inside, whatever a user's code raises becomes a ValueError that names its line."""
        try:
            yield
        except FAULTS as error:
            line = traceback.extract_tb(error.__traceback__)[-1].lineno
            kind = type(error).__name__
            raise UserError(f"{self.place}, line {line}: {kind}: {error}") from None

    def score(self, batch) -> Tensor:  # -> (B,)
        sequences = batch.tokens.split(batch.cu_seqlens.diff().tolist())
        pairs = [x.split([len(x) - n, n]) for x, n in zip(sequences, batch.lengths, strict=True)]
        prompts = [self.codec.text(prompt.tolist()) for prompt, _ in pairs]
        texts = [self.codec.text(response.tolist()) for _, response in pairs]
        with self.one_line_errors():
            scores = [float(x) for x in self.function(texts, prompts)]
        if len(scores) != len(texts) or not all(map(math.isfinite, scores)):
            raise UserError(
                f"{self.place} returned {str(scores)[:80]} for {len(texts)} texts; expected a "
                "finite number for each"
            )
        return torch.tensor(scores, dtype=torch.float32, device=batch.tokens.device)
