"""Records: text in JSON Lines, one object a line, UTF-8, gzipped if the name ends in .gz.

    demonstrations  {"prompt": str, "response": str}
    comparisons     {"prompt": str, "responses": [str, ...], "ranks": [int, ...]}
    prompts         {"prompt": str}
    texts           {"text": str}, or plain .txt

Rank 1 is best, equal ranks are a tie; without ranks the responses are best first. Further keys are
ignored, but a row in another project's format is refused. Only a compared response may be blank: a
model can say nothing. A byte-order mark, CRLF line ends and blank lines are accepted. All that
reads or writes here raises DataError, which names file and line, or the system's OSError; then
nothing is loaded or written.
"""

import gzip
import json
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

MAX_K = 1_000  # responses per prompt; the pairs to compare grow with its square
MAX_RANK = 2**31 - 1  # what an int32 tensor holds
TXT = (".txt", ".txt.gz")  # plain text
MAX_BLANKS = 500_000  # tiktoken's regular expression panics on 999,999 blanks before a word
# NUL, a lone surrogate, or too many blanks, counted from the first of them
NOT_PLAIN = re.compile(rf"[\0\ud800-\udfff]|(?<!\s)\s{{{MAX_BLANKS}}}")
FOREIGN = {"chosen", "rejected", "messages", "conversations", "completion"}  # not keys of ours
OTHER_FORMATS = "python -m data.convert reads the formats in data/README.md"
ONE_OBJECT = f"one JSON object a line; {OTHER_FORMATS}"
NOT_TEXT = [  # files that are not UTF-8: how they begin, what they are, what to do
    (("PAR1",), "Parquet", "JSON Lines: pandas.read_parquet(A).to_json(B, 'records', lines=True)"),
    (("\udcff\udcfe", "\udcfe\udcff"), "UTF-16", "UTF-8: iconv -f UTF-16 -t UTF-8 A > B"),
    (("\x1f\udc8b",), "gzipped", "a name that ends in .gz"),
    (("BZh", "(\udcb5/\udcfd", "\udcfd7zXZ", "PK\3\4"), "packed, not by gzip", "it unpacked"),
]


class UserError(ValueError):
    """What a user can repair, in one printable line: the value, what is needed, what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message, keep=""))


class DataError(UserError):
    """A fault in a file, in one line: `file:line: what is wrong; expected what`."""

    def __init__(self, path: str | Path, line: int, wrong: str, expected: str) -> None:
        super().__init__(f"{path}:{line}: {wrong}; expected {expected}")


class Row(NamedTuple):
    """A JSON object and where it stands, so that every complaint about it names file and line."""

    path: str | Path
    line: int
    fields: dict[str, object]

    def error(self, wrong: str, expected: str) -> DataError:
        return DataError(self.path, self.line, wrong, expected)

    def text(self, key: str, may_be_blank: bool = False) -> str:
        """The string under `key`; refuses what no model could be trained on."""
        text = self.fields.get(key)
        if not isinstance(text, str):
            wrong = f"is of type {type(text).__name__}" if key in self.fields else "is missing"
            raise self.error(f'"{key}" {wrong}', f"a string; {OTHER_FORMATS}")
        if bad := NOT_PLAIN.search(text):
            expected = f"no NUL, no lone surrogate, no {MAX_BLANKS:,} blanks in a row"
            raise self.error(f'"{key}" holds {ascii(bad[0][0])} at {bad.start():,}', expected)
        if not (may_be_blank or text.strip()):
            raise self.error(f'"{key}" is blank', "at least one visible character")
        return text


def printable(text: str, keep: str = "\n\t") -> str:
    """The text with control characters escaped: data must not steer the reader's terminal."""
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


# ---- reading ----


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yields (number from 1, text with its line end) of every line."""
    number, opened = 0, gzip.open if ends(path, ".gz") else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="\n") as f:
            for number, line in enumerate(f, start=1):
                for starts, found, expected in NOT_TEXT if number == 1 else ():
                    if line.startswith(starts):
                        raise DataError(path, 1, f"the file is {found}", expected)
                if bad := re.search("[\0\udc80-\udcff]", line):  # U+DCff stands for a byte 0xff
                    wrong = f"byte 0x{ord(bad[0]) % 256:02x} is not UTF-8 text"
                    raise DataError(path, number, wrong, "text in UTF-8")
                yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        wrong = f"broken gzip data ({error})"
        raise DataError(path, number + 1, wrong, "a whole file: fetch it again") from None


def parse_json(path: str | Path, line: int, text: str) -> object:
    """The JSON value of a text that begins on that line."""
    try:
        # int() refuses NaN and Infinity, which are no JSON
        return json.loads(text, object_pairs_hook=as_object, parse_constant=int)
    except json.JSONDecodeError as error:
        line, wrong = line + error.lineno - 1, f"{error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # thousands of digits, thousands of brackets
        wrong = str(error).replace("invalid literal for int() with base 10:", "no number in JSON:")
    raise DataError(path, line, f"not JSON: {wrong}", ONE_OBJECT)


def as_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(fields := dict(pairs)) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {name:.40} occurs twice in an object")
    return fields


def as_row(path: str | Path, line: int, value: object, name: str = "the row") -> Row:
    """The value, which must be a JSON object, as a Row."""
    if not isinstance(value, dict):
        raise DataError(path, line, f"{name} is of type {type(value).__name__}", "a JSON object")
    return Row(path, line, value)


def read_rows(path: str | Path) -> Iterator[Row]:
    """Yields the objects of a JSON Lines file, of which there must be one at least."""
    row = None
    for line, text in read_lines(path):
        if row is None and text.lstrip().startswith("["):
            raise DataError(path, line, "the file is a JSON array", ONE_OBJECT)
        if text.strip():
            row = as_row(path, line, parse_json(path, line, text.rstrip("\r\n")))
            yield row
    if row is None:
        raise DataError(path, 1, "the file is empty", "at least one row")


def read_responses(row: Row) -> list[str]:
    responses = row.fields.get("responses")
    if not isinstance(responses, list) or not 2 <= len(responses) <= MAX_K:
        expected = f"2 to {MAX_K:,} strings; {OTHER_FORMATS}"
        raise row.error('"responses" is no list of responses', expected)
    named = row._replace(fields={f"responses[{i}]": r for i, r in enumerate(responses)})
    return [named.text(name, may_be_blank=True) for name in named.fields]


def ranked_responses(row: Row) -> tuple[list[str], list[int]]:
    """The responses of a comparison and their ranks, 1..K where they are absent."""
    if "scores" in row.fields and "ranks" not in row.fields:
        raise row.error('"scores" without "ranks"', f'"ranks"; {OTHER_FORMATS}')
    texts = read_responses(row)
    ranks = row.fields.get("ranks", list(range(1, len(texts) + 1)))
    if not isinstance(ranks, list) or len(ranks) != len(texts):
        raise row.error('"ranks" does not match "responses"', f"a list of {len(texts)} ranks")
    # type() and not isinstance(): true is an int to Python
    if not all(type(rank) is int and 1 <= rank <= MAX_RANK for rank in ranks):
        expected = f"whole numbers, 1 is best; {OTHER_FORMATS}"
        raise row.error('"ranks" holds something that is no rank', expected)
    return texts, ranks


def load_comparisons(path: str | Path) -> list[dict]:
    rows = [(row.text("prompt"), *ranked_responses(row)) for row in read_rows(path)]
    return [{"prompt": prompt, "responses": texts, "ranks": ranks} for prompt, texts, ranks in rows]


def load_demonstrations(path: str | Path) -> list[dict[str, str]]:
    return [{key: row.text(key) for key in ("prompt", "response")} for row in read_rows(path)]


def load_answers(path: str | Path) -> list[dict]:
    """Demonstrations or comparisons, ranked or not, with all their keys."""
    answers = []
    for row in read_rows(path):
        row.text("prompt")
        if "responses" in row.fields:
            read_responses(row)
        else:
            row.text("response", may_be_blank=True)
        answers.append(row.fields)
    return answers


def load_prompts(path: str | Path) -> list[dict[str, str]]:
    """The prompts of a file of prompts, demonstrations or comparisons."""
    prompts = []
    for row in read_rows(path):
        foreign = FOREIGN & row.fields.keys()
        if foreign and not {"response", "responses"} & row.fields.keys():
            raise row.error(f'"{min(foreign)}" is no key of ours', f"records; {OTHER_FORMATS}")
        prompts.append({"prompt": row.text("prompt")})
    return prompts


def load_texts(path: str | Path) -> list[str]:
    """The documents of a .txt file, of those in and below a folder by name, or of JSON Lines."""
    path = Path(path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if ends(p, *TXT) and p.is_file())
        if not files:
            raise DataError(path, 1, "the folder holds no .txt file", "at least one")
        return [text for file in files for text in load_texts(file)]
    if ends(path, *TXT):
        rows = [Row(path, 1, {"text": "".join(line for _, line in read_lines(path))})]
    else:
        rows = read_rows(path)
    return [row.text("text").replace("\r\n", "\n") for row in rows]


def ends(path: str | Path, *suffixes: str) -> bool:
    return str(path).lower().endswith(suffixes)


# ---- writing ----


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Inside, an OSError without a file name, such as that of a full disk, gets this one."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save's own
        if not isinstance(cause, OSError):
            raise
        if cause.errno and not cause.filename:
            cause.filename = str(path)
        raise cause from None


@contextmanager
def atomic(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write, which takes its name when it is complete and on disk, or never."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file; choose another name to write to")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path), open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # a crash after the renaming must not leave an empty file
        os.replace(temporary, path)
        if os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)  # nor may it undo the renaming
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def append(path: str | Path, text: str) -> None:
    """Adds the text to the file, all of it or, on a full disk, nothing."""
    with naming(path), open(path, "ab", buffering=0) as file:
        size, content = file.seek(0, os.SEEK_END), text.encode()
        try:
            written = file.write(content)
            if written < len(content):
                file.write(content[written:])
        except OSError:
            file.truncate(size)
            raise


def remove_unfinished(folder: Path) -> None:
    """Removes what `atomic` was writing in processes that were killed."""
    for temporary in folder.glob(".*.[0-9]*.tmp"):
        temporary.unlink()


def save_records(path: str | Path, records: Iterable[Mapping[str, object]]) -> None:
    """Writes JSON Lines in one piece or not at all."""
    lines = [json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records]
    for number, line in enumerate(lines, start=1):
        Row(path, number, {"record": line}).text("record")  # can it be written and read again?
    content = "".join(lines).encode()
    with atomic(path) as file:
        file.write(gzip.compress(content, mtime=0) if ends(path, ".gz") else content)


def strict_json(value: dict, indent: int | None = None) -> str:
    """The value as JSON; NaN and infinities become null."""
    finite = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return json.dumps(finite, indent=indent, allow_nan=False)


# ---- what every program needs ----


class Console:
    """A stream that never fails: without a reader, or on a full disk, it writes to nowhere."""

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):  # escape what the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with self.unfailing():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self.unfailing():
            self.stream.flush()

    @contextmanager
    def unfailing(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


@contextmanager
def one_line_errors(where: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Inside, a UserError or OSError ends the program as `error: …` with status 2.

    `where` adds what only the moment of the error knows, such as the step that was reached.
    """
    try:
        with redirect_stdout(Console(sys.stdout)), redirect_stderr(Console(sys.stderr)):
            yield
            print(end="", flush=True)
    except (UserError, OSError) as error:
        print(f"error: {error}{where()}", file=sys.stderr)
        raise SystemExit(2) from None


def split_held_out(rows: list, n: int, key: Callable) -> tuple[list, list]:
    """(held_out, training): the first rows, n or a few more, and all others with the same key.

    The key is the prompt, so that no prompt is on both sides. Where all rows have one and the same
    key, the first n rows are held out.
    """
    groups: dict[object, list] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    if len(groups) == 1:
        return rows[:n], rows[n:]
    held_out: list = []
    while groups and len(held_out) < n:
        held_out += groups.pop(next(iter(groups)))
    return held_out, [row for row in rows if key(row) in groups]


def hold_out(rows: list, share: float, key: Callable) -> tuple[list, list]:
    """split_held_out of a share of the rows, one at least; UserError if it leaves none to train."""
    if not rows:
        raise UserError("no record fits into the context of the model; shorten the responses")
    held_out, training = split_held_out(rows, max(1, int(share * len(rows))), key)
    if not training:
        raise UserError(f"{len(held_out)} rows are held out, none is left to train on; add more")
    return held_out, training


def pair_accuracy(scores: list[list[float]], ranks: list[list[int]]) -> tuple[float, float, int]:
    """(share, 95 % half-width, pairs): how often the response of higher score has the better rank.

    Equal ranks and equal scores do not count. Pairs of one prompt depend on each other, so the
    interval takes the prompts as independent draws (the variance of a ratio estimator).
    """
    wins, pairs = np.zeros(len(ranks)), np.zeros(len(ranks))
    for p, group in enumerate(zip(scores, ranks, strict=True)):
        signs = [np.sign(np.subtract.outer(x, x)) for x in group]  # (K, K) each, every pair twice
        wins[p] = (signs[0] * signs[1] < 0).sum() / 2
        pairs[p] = (signs[0] * signs[1] != 0).sum() / 2
    n = max(int(pairs.sum()), 1)
    share = wins.sum() / n
    half_width = 1.96 * np.sqrt(np.square(wins - share * pairs).sum()) / n
    return float(share), float(half_width), int(pairs.sum())
