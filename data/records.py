"""Records: text in JSON Lines, one object a line, UTF-8, gzipped if the name ends in .gz.

The three kinds are the TypedDicts below; documents for pretraining are {"text": str} or plain
.txt. Further keys are ignored and not returned. Only a compared response may be blank: a model
can say nothing. A byte-order mark, CRLF line ends and blank lines are survived; any other fault
is a DataError, which names file and line, and nothing is loaded or written.
"""

import argparse
import gzip
import json
import os
import random
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import BinaryIO, NoReturn, TypedDict

import numpy as np

MAX_K = 1_000  # responses per prompt; the pairs to compare grow with its square
MAX_RANK = 2**31 - 1  # what an int32 tensor holds
MAX_BLANKS = 500_000  # tiktoken's regular expression panics on 999,999 blanks before a word


class Demonstration(TypedDict):
    prompt: str
    response: str


class Comparison(TypedDict):
    prompt: str
    responses: list[str]  # K >= 2
    ranks: list[int]  # 1 is best, equal is a tie; left out of a file: the responses are best first


class Prompt(TypedDict):
    prompt: str


Converted = tuple[Sequence[Mapping[str, object]], Counter[str]]  # records, counts; total first


class DataError(ValueError):
    """A fault in a file, in one line: `file:line: what is wrong; expected what`."""

    def __init__(self, path: str | Path, line: int, wrong: str, expected: str) -> None:
        super().__init__(f"{printable(str(path), keep='')}:{line}: {wrong}; expected {expected}")


@dataclass(frozen=True)
class Row:
    """A JSON object and where it stands, so that every complaint about it names file and line."""

    path: str | Path
    line: int
    fields: dict[str, object]

    def error(self, wrong: str, expected: str) -> DataError:
        return DataError(self.path, self.line, wrong, expected)

    def text(self, key: str, may_be_blank: bool = False) -> str:
        """The string under `key`; raises DataError where no model could be trained on it."""
        if key not in self.fields:
            raise self.error(f'"{key}" is missing', f'a string under "{key}"')
        text = self.fields[key]
        if not isinstance(text, str):
            raise self.error(f'"{key}" is of type {type(text).__name__}', "a string")
        if fault := text_fault(text):
            raise self.error(f'"{key}" holds {fault}', "plain text")
        if not (may_be_blank or text.strip()):
            raise self.error(f'"{key}" is blank', "at least one visible character")
        return text


def text_fault(text: str) -> str | None:
    """What in this text would break a file or a tokenizer further on, None if nothing."""
    if "\0" in text:
        return "a NUL character"
    if surrogate := re.search("[\ud800-\udfff]", text):
        return f"the lone surrogate U+{ord(surrogate[0]):04X}"
    # a run of twice MAX_BLANKS fills one of these blocks, wherever it begins
    starts = range(0, len(text) - MAX_BLANKS + 1, MAX_BLANKS)
    if any(text[start : start + MAX_BLANKS].isspace() for start in starts):
        return f"{MAX_BLANKS:,} blanks in a row"
    return None


def printable(text: str, keep: str = "\n\t") -> str:
    """The text with control characters escaped: data must not steer the reader's terminal."""
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


def pair_accuracy(
    scores: Sequence[Sequence[float]], ranks: Sequence[Sequence[int]]
) -> tuple[float, float, int]:
    """(share, 95 % half-width, pairs): how often the response of higher score has the better rank.

    Equal ranks and equal scores do not count. Pairs of one prompt depend on each other, so the
    interval takes the prompts as independent draws (the variance of a ratio estimator).
    """
    wins, pairs = np.zeros(len(ranks)), np.zeros(len(ranks))
    for p, group in enumerate(zip(scores, ranks, strict=True)):
        for (score, rank), (other_score, other_rank) in combinations(zip(*group, strict=True), 2):
            if score != other_score and rank != other_rank:
                wins[p] += (score > other_score) == (rank < other_rank)
                pairs[p] += 1
    n = max(int(pairs.sum()), 1)
    share = wins.sum() / n
    half_width = 1.96 * np.sqrt(np.square(wins - share * pairs).sum()) / n
    return float(share), float(half_width), int(pairs.sum())


# ---- reading ----


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yields (number from 1, text with its line end) of every line; raises DataError, OSError."""
    number = 0
    try:
        with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if b"\0" in line:
                    raise DataError(path, number, "holds a NUL byte", "text in UTF-8")
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        wrong = f"byte 0x{error.object[error.start]:02x} is not UTF-8"
        raise DataError(path, number, wrong, "text in UTF-8") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        wrong = f"broken gzip data ({error})"
        raise DataError(path, number + 1, wrong, "a whole file: fetch it again") from None


def parse_json(
    path: str | Path, line: int, text: str, expected: str = "one JSON object a line"
) -> object:
    """The JSON value of a text that begins on that line; raises DataError if it is none."""

    def refuse(constant: str) -> NoReturn:  # Python alone would accept NaN and Infinity
        raise ValueError(f"{constant} is no JSON number")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        line, wrong = line + error.lineno - 1, f"{error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # thousands of digits, thousands of brackets
        wrong = str(error)
    raise DataError(path, line, f"not JSON: {wrong}", expected)


def as_row(path: str | Path, line: int, value: object, name: str = "the row") -> Row:
    """The value as a Row; raises DataError unless it is a JSON object."""
    if not isinstance(value, dict):
        raise DataError(path, line, f"{name} is of type {type(value).__name__}", "a JSON object")
    return Row(path, line, value)


def read_rows(path: str | Path) -> Iterator[Row]:
    """Yields the objects of a JSON Lines file; raises DataError at a bad line or without a row."""
    row = None
    for line, text in read_lines(path):
        if text.strip():
            row = as_row(path, line, parse_json(path, line, text.rstrip("\r\n")))
            yield row
    if row is None:
        raise DataError(path, 1, "the file is empty", "at least one row")


def load_demonstrations(path: str | Path) -> list[Demonstration]:
    """All demonstrations of a file; raises DataError, OSError."""
    return [
        {"prompt": row.text("prompt"), "response": row.text("response")} for row in read_rows(path)
    ]


def load_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a file, be it of prompts or of another kind; raises DataError, OSError."""
    return [{"prompt": row.text("prompt")} for row in read_rows(path)]


def load_comparisons(path: str | Path) -> list[Comparison]:
    """All comparisons of a file, absent ranks filled in as 1..K; raises DataError, OSError."""
    comparisons: list[Comparison] = []
    for row in read_rows(path):
        prompt, responses = row.text("prompt"), row.fields.get("responses")
        if not isinstance(responses, list) or not 2 <= len(responses) <= MAX_K:
            raise row.error('"responses" is no list of responses', f"2 to {MAX_K:,} strings")
        named = Row(path, row.line, {f"responses[{i}]": r for i, r in enumerate(responses)})
        texts = [named.text(name, may_be_blank=True) for name in named.fields]
        ranks = row.fields.get("ranks", list(range(1, len(texts) + 1)))
        if not isinstance(ranks, list) or len(ranks) != len(texts):
            raise row.error('"ranks" does not match "responses"', f"a list of {len(texts)} ranks")
        # type() and not isinstance(): true is an int to Python
        if not all(type(rank) is int and 1 <= rank <= MAX_RANK for rank in ranks):
            raise row.error('"ranks" holds something that is no rank', "whole numbers, 1 is best")
        comparisons.append({"prompt": prompt, "responses": texts, "ranks": ranks})
    return comparisons


def load_texts(path: str | Path) -> list[str]:
    """The documents of a .txt file, of a folder's .txt files in order of name, or of JSON Lines;
    raises DataError, OSError."""
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if is_plain_text(file))
        if not files:
            raise DataError(path, 1, "the folder holds no .txt file", "at least one")
        return [text for file in files for text in load_texts(file)]
    if not is_plain_text(path):
        return [row.text("text").replace("\r\n", "\n") for row in read_rows(path)]
    text = "".join(line for _, line in read_lines(path))
    return [Row(path, 1, {"text": text}).text("text").replace("\r\n", "\n")]


def is_plain_text(path: str | Path) -> bool:
    return str(path).endswith((".txt", ".txt.gz"))


# ---- writing, and what the command lines share ----


def save_records(path: str | Path, records: Iterable[Mapping[str, object]]) -> None:
    """Writes JSON Lines in one piece or not at all; raises DataError, OSError."""
    path, lines = Path(path), []
    for number, record in enumerate(records, start=1):
        try:
            lines.append(json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        except UnicodeEncodeError as error:
            wrong = f"cannot write the lone surrogate U+{ord(error.object[error.start]):04X}"
            raise DataError(path, number, wrong, "text that UTF-8 can hold") from None
    content = b"".join(lines)
    if path.suffix == ".gz":
        content = gzip.compress(content, mtime=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(content))


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file under a temporary name, and renames it when it is complete and on disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # a crash after the renaming must not leave an empty file
        os.replace(temporary, path)
        if os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)  # nor may it undo the renaming
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Removes what write_atomically was writing in processes that were killed."""
    for temporary in folder.glob(".*.[0-9]*.tmp"):
        temporary.unlink()


def rank_shuffled(prompt: str, responses: list[str], ranks: list[int]) -> Comparison:
    """A comparison in random order, so that nothing can learn a rank from a place in the list."""
    order = list(range(len(responses)))
    random.Random(prompt).shuffle(order)  # the same row always comes out in the same order
    return {
        "prompt": prompt,
        "responses": [responses[i] for i in order],
        "ranks": [ranks[i] for i in order],
    }


def pair_is_usable(chosen: str, rejected: str, counts: Counter[str]) -> bool:
    """Whether a pair says which reply is better; what was odd about it is counted."""
    if chosen.strip() == rejected.strip():
        counts["without signal dropped"] += 1
    elif not chosen.strip():  # a preferred silence would teach PPO to say nothing
        counts["with an empty chosen reply dropped"] += 1
    else:
        counts["with an empty rejected reply kept"] += not rejected.strip()
        return True
    return False


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Inside, a ValueError or OSError ends the program as `error: …` with status 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def run_converter(
    doc: str | None,
    argv: Sequence[str] | None,
    read: Callable[[argparse.Namespace], Converted],
    **flags: str,
) -> None:
    """A converter's command line: reads SOURCE, writes OUT, prints the counts, total first.

    `flags` are its switches, each with its help text.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=raw)
    parser.add_argument("source", help="file to read; gzipped if its name ends in .gz")
    parser.add_argument("out", help="JSON Lines file to write; gzipped if its name ends in .gz")
    for flag, text in flags.items():
        parser.add_argument(f"--{flag}", action="store_true", help=text)
    args = parser.parse_args(argv)
    with one_line_errors():
        records, counts = read(args)
        (what, total), *odd = counts.items()
        rest = ", ".join(f"{n:,} {oddity}" for oddity, n in odd if n)
        summary = f"{total:,} {what}" + (f": {rest}" if rest else "")
        if not records:
            raise DataError(args.source, 1, f"nothing usable ({summary})", "one usable row or more")
        save_records(args.out, records)
    print(f"{summary}; {len(records):,} records written to {args.out}")
