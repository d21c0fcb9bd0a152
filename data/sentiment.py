"""A reward that needs no model: the valence of a text's words (the task of Ziegler et al. 2019).

    python -m data.sentiment sentence_polarity.zip snippets.jsonl
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
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data.records import run_converter

PROMPT_WORDS = 5


def read_member(path: Path, suffix: str) -> str:
    """The text of a file, or of the one in a zip archive whose name ends so; raises ValueError."""
    if path.suffix != ".zip":
        return path.read_text("utf-8")
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith(suffix))
            return archive.read(name).decode("utf-8")
    except (zipfile.BadZipFile, StopIteration, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no zip archive with a *{suffix} ({error})") from None


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


def read_snippets(path: str | Path) -> tuple[list[dict[str, str]], Counter[str]]:
    """The lines of both polarities, alternating; raises OSError, ValueError."""
    records, counts = [], Counter({"snippets": 0})
    both = [read_member(Path(path), f"rt-polarity.{end}").splitlines() for end in ("pos", "neg")]
    for line in (line.strip() for pair in zip(*both, strict=False) for line in pair):
        counts["snippets"] += 1
        words = line.split()
        if len(words) < 2 * PROMPT_WORDS:
            counts["too short to be continued, dropped"] += 1
            continue
        prompt, response = (" ".join(w) for w in (words[:PROMPT_WORDS], words[PROMPT_WORDS:]))
        records.append({"text": line, "prompt": prompt, "response": f" {response}"})
    return records, counts


def main(argv: Sequence[str] | None = None) -> None:
    run_converter(__doc__, argv, lambda args: read_snippets(args.source))


if __name__ == "__main__":
    main()
