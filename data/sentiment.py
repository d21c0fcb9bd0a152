"""A reward that needs no model: the valence of a text's words (the task of Ziegler et al. 2019).

    python -m data.convert sentence_polarity.zip snippets.jsonl
    python ppo.py --reward data/sentiment.py:lexicon --prompts snippets.jsonl ...

The lexicon is VADER's (Hutto and Gilbert 2014), as nltk distributes it: the environment variable
VADER_LEXICON names vader_lexicon.txt or vader_lexicon.zip, which is else looked for in this folder.
The snippets are lines of film reviews (Pang and Lee 2005): a record holds the whole line as "text",
to pretrain on, and its first words as "prompt" with the others as "response".
"""

import functools
import os
import re
import zipfile
from pathlib import Path

from data.records import UserError


def read_member(path: Path, suffix: str) -> str:
    """The text of a file, or of the one in a zip archive whose name ends so."""
    if path.suffix != ".zip":
        return path.read_text("utf-8")
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith(suffix))
            return archive.read(name).decode("utf-8")
    except (zipfile.BadZipFile, StopIteration, UnicodeDecodeError):
        raise UserError(f"{path} is no zip archive that holds a text named *{suffix}") from None


@functools.cache
def valences() -> dict[str, float]:
    """From -4, worst, to 4, best, for 7,500 words and emoticons."""
    path = Path(os.environ.get("VADER_LEXICON") or Path(__file__).with_name("vader_lexicon.txt"))
    text = read_member(path, "vader_lexicon.txt")
    rows = (line.split("\t") for line in text.splitlines() if line.strip())
    return {row[0]: float(row[1]) for row in rows}


def lexicon(texts: list[str], prompts: list[str]) -> list[float]:
    """s / sqrt(s^2 + 15) of the summed valence s of a response's words, as VADER: in (-1, 1)."""
    words = valences()
    sums = [sum(words.get(w, 0.0) for w in re.findall(r"\S+", text.lower())) for text in texts]
    return [s / (s * s + 15) ** 0.5 for s in sums]
