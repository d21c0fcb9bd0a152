"""Everything that is a file: records, other people's formats, tokenizers, the toy world, runs.

Here are the sources of text, each named by a flag: the toy world, or a file. Nothing outside of
this file asks which of the two it is.
"""

import os
from types import ModuleType

from data import records, toy

# A thread of OpenMP that waits for the others spins, which takes the processor from them if the
# machine is busy. These limits act only if torch is loaded after this file.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # of libgomp, in rounds
    os.environ.setdefault("KMP_BLOCKTIME", "1")  # of libomp, in milliseconds

TOY = "toy"


def prompts(source: str, n: int, seed: int, split: str = "train", held_out: int = 0) -> list[str]:
    """n prompts of the toy world's split; or all of a file, whose last `held_out` rows are no
    part of split "train" but all of the others. No prompt is in both.
    """
    if source == TOY:
        return [row["prompt"] for row in toy.prompts(n, seed, split)]
    rows = [row["prompt"] for row in records.load_prompts(source)]
    unseen, training = records.split_held_out(rows[::-1], held_out, key=str)
    if split != "train":
        return unseen[:held_out][::-1]
    if not training:
        wrong = f"{source} has no more than the {held_out} prompts that are held out"
        raise records.UserError(f"{wrong}; lower --eval_prompts")
    return training[::-1]


def demonstrations(source: str, n: int, seed: int) -> list[dict]:
    """n demonstrations of the toy world, or all of a file."""
    return toy.demonstrations(n, seed) if source == TOY else records.load_demonstrations(source)


def texts(source: str, n: int, seed: int) -> list[str]:
    """n documents of the toy world, or all of a file or folder."""
    return toy.pages(n, seed) if source == TOY else records.load_texts(source)


def texts_to_mix(source: str, n: int, seed: int, other: str) -> list[str]:
    """The documents to mix with other data: no toy documents with a file of others."""
    return [] if source == TOY != other else texts(source, n, seed)


def rubric(source: str) -> ModuleType | None:
    """The world that a source's prompts come from, if it can judge the answers: toy.gold, ..."""
    return toy if source == TOY else None
