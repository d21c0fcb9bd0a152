"""Records, converters and the checker: good files, bad files, and the oddities of real ones."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import re
import subprocess
import sys
import time
import urllib.error
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from data import __main__ as check
from data import convert, formats, records
from data.records import (
    DataError,
    UserError,
    load_comparisons,
    load_demonstrations,
    load_prompts,
    load_texts,
    printable,
    save_records,
)

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]
REAL = Path(__file__).parents[2] / "shared" / "data"
ONE_LINE = re.compile(r"[^\n]+:(\d+): [^\n]+; expected [^\n]+")

# ---- what each reader accepts ----

HUMAN = "\n\nHuman: hello\n\nAssistant:"
ASKED = "\n\nHuman: a\n\nAssistant:"
DEMONSTRATION = {"prompt": "Say hi.", "response": "hi"}
COMPARISON = {"prompt": "Say hi.", "responses": ["hi", "no", "ho"], "ranks": [1, 3, 2]}
PAIR = {"chosen": f"{HUMAN} hi", "rejected": f"{HUMAN} no"}
ALPACA = {"instruction": "Add.", "input": "1 + 1", "output": "2"}
PREFERENCE = {"instruction": "Add.", "chosen": "2", "rejected": "3"}


def message(words: str, *replies: dict, **fields: object) -> dict:
    return {"role": "assistant", "text": words, "replies": list(replies), **fields}


def tree(*replies: dict, **fields: object) -> dict:
    return {"prompt": message("hello", *replies, role="prompter", **fields)}


TREE = tree(message("hi", rank=0), message("no", rank=1))

# name: (a good row, the function that reads a file, the command line that reads it)
Reader = tuple[dict, Callable[[Path], object], Callable[[Path, Path], None]]


def checker(kind: str) -> Callable[[Path, Path], None]:
    return lambda path, out: check.main([str(path), "--kind", kind, "--tokenizer", "toy"])


def converted(path: Path, kind: str | None = None) -> list[dict]:
    return convert.read(path, kind)[2]


def converter(path: Path, out: Path) -> None:
    convert.main([str(path), str(out)])


def chat(*turns: str) -> list[dict]:
    """Messages with OpenAI's names, the first by a person."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": words} for i, words in enumerate(turns)]


def share(*turns: str) -> list[dict]:
    """The same with ShareGPT's names."""
    return [{"from": ("human", "gpt")[i % 2], "value": words} for i, words in enumerate(turns)]


SCORED = {"prompt": "Say hi.", "responses": ["hi", "no", "ho"], "scores": [2, -1.5, 0]}
COMPLETION = {"prompt": "Say hi.", "completion": " hi"}
CHOICE = {"prompt": "Say hi.", "chosen": "hi", "rejected": "no"}
CHOICE_OF_CHATS = {"prompt": "a", "chosen": chat("a", "yes"), "rejected": chat("a", "no")}


READERS: dict[str, Reader] = {
    "demonstrations": (DEMONSTRATION, load_demonstrations, checker("demonstrations")),
    "comparisons": (COMPARISON, load_comparisons, checker("comparisons")),
    "prompts": ({"prompt": "Say hi."}, load_prompts, checker("prompts")),
    "texts": ({"text": "Once."}, load_texts, checker("texts")),
    "hh": (PAIR, converted, converter),
    "oasst": (TREE, converted, converter),
    "instructions": (ALPACA, converted, converter),
    "preferences": (PREFERENCE, converted, converter),
    "text": ({"text": "Once."}, converted, converter),
    "ranked": (COMPARISON, converted, converter),
    "scored": (SCORED, converted, converter),
    "completions": (COMPLETION, converted, converter),
    "choices": (CHOICE, converted, converter),
    "choices of chats": (CHOICE_OF_CHATS, converted, converter),
    "messages": ({"messages": chat("a", "b", "c", "d")}, converted, converter),
    "conversations": ({"conversations": share("a", "b")}, converted, converter),
}


def line_of(row: object) -> bytes:
    return json.dumps(row).encode() + b"\n"


def refused(run: Callable[[], object], capsys, *parts: str) -> str:
    """What a program says, in one line and with status 2, that ends with an error."""
    with pytest.raises(SystemExit) as exit:
        run()
    captured = capsys.readouterr()
    assert exit.value.code == 2 and captured.out == ""
    assert re.fullmatch("error: [^\n]+\n", captured.err), captured.err
    assert all(part in captured.err for part in parts), captured.err
    return captured.err


def not_converted(path: Path, capsys, *parts: str) -> None:
    """The converter refuses a file with these words, and writes nothing."""
    before = sorted(path.parent.iterdir())
    error = refused(lambda: converter(path, path.parent / "out.jsonl"), capsys, *parts)
    assert ONE_LINE.fullmatch(error.strip()) and sorted(path.parent.iterdir()) == before


def write(path: Path, *rows: object) -> Path:
    path.write_bytes(b"".join(map(line_of, rows)))
    return path


# ---- what each reader refuses ----

BAD_LINES = {  # at line 3 of every kind of file
    "open brace": b"{",
    "no closing brace": b'{"prompt": "a"',
    "no quotes": b"{prompt: 1}",
    "single quotes": b"{'prompt': 'a'}",
    "trailing comma": b'{"prompt": "a",}',
    "two objects": b"{} {}",
    "prose": b"hello",
    "comment": b"// hello",
    "null": b"null",
    "true": b"true",
    "number": b"17",
    "string": b'"prompt"',
    "empty list": b"[]",
    "list of an object": b"[{}]",
    "NaN": b"NaN",
    "NaN in an object": b'{"prompt": NaN}',
    "infinity": b'{"x": -Infinity}',
    "no keys": b"{}",
    "foreign keys": b'{"question": "a", "answer": "b"}',
    "invalid UTF-8": b'{"prompt": "\xff"}',
    "Latin-1": '{"prompt": "Köpf"}'.encode("latin-1"),
    "cut UTF-8": b'{"prompt": "\xe2\x82',
    "surrogate in UTF-8": b'{"prompt": "\xed\xa0\x80"}',
    "NUL": b'{"prompt": "a\x00b"}',
    "control character": b'{"prompt": "a\x07b"}',
    "second byte-order mark": b'\xef\xbb\xbf{"prompt": "a"}',
    "bad escape": rb'{"prompt": "\x41"}',
    "nested 100,000 deep": b"[" * 100_000,
    "objects 100,000 deep": b'{"a":' * 100_000,
    "5,000 digits": b'{"prompt": ' + b"1" * 5_000 + b"}",
}
BAD_TEXTS = {
    "boolean": True,
    "whole number": 1,
    "number": 1.5,
    "list": ["a"],
    "object": {"a": "b"},
    "NUL": "a\0b",
    "lone surrogate": "a\ud800b",
    "half an emoji": "\udc4d",
    "half a million blanks": " " * 1_000_000 + "x",
}
BLANK_TEXTS = {"null": None, "empty": "", "blank": " \r\n\t\u3000"}  # converters drop such rows
TEXT_KEYS = [  # reader, key
    ("demonstrations", "prompt"),
    ("demonstrations", "response"),
    ("comparisons", "prompt"),
    ("prompts", "prompt"),
    ("texts", "text"),
    ("hh", "chosen"),
    ("hh", "rejected"),
    ("instructions", "instruction"),
    ("instructions", "input"),
    ("instructions", "output"),
    ("preferences", "instruction"),
    ("preferences", "chosen"),
    ("preferences", "rejected"),
    ("text", "text"),
    ("ranked", "prompt"),
    ("scored", "prompt"),
    ("completions", "prompt"),
    ("completions", "completion"),
    ("choices", "prompt"),
    ("choices", "chosen"),
    ("choices", "rejected"),
]
BAD_COMPARISONS = {
    "responses missing": {"responses": ...},
    "responses null": {"responses": None},
    "responses a string": {"responses": "hi no"},
    "responses an object": {"responses": {"a": 1, "b": 2}},
    "no response": {"responses": [], "ranks": []},
    "one response": {"responses": ["hi"], "ranks": [1]},
    "1,001 responses": {"responses": ["hi"] * 1_001, "ranks": [1] * 1_001},
    "a response is null": {"responses": ["hi", None, "ho"]},
    "a response is a boolean": {"responses": [True, "no", "ho"]},
    "a response is a number": {"responses": ["hi", 2, "ho"]},
    "a response is a list": {"responses": ["hi", ["no"], "ho"]},
    "a response has a NUL": {"responses": ["hi", "n\0", "ho"]},
    "a response has a surrogate": {"responses": ["hi", "no", "\ud83d"]},
    "ranks null": {"ranks": None},
    "ranks a string": {"ranks": "132"},
    "ranks an object": {"ranks": {}},
    "ranks empty": {"ranks": []},
    "ranks too short": {"ranks": [1, 2]},
    "ranks too long": {"ranks": [1, 2, 3, 4]},
    "rank 0": {"ranks": [0, 1, 2]},
    "rank negative": {"ranks": [1, 2, -3]},
    "rank a boolean": {"ranks": [True, 2, 3]},
    "rank a float": {"ranks": [1.0, 2, 3]},
    "rank a string": {"ranks": ["1", 2, 3]},
    "rank null": {"ranks": [1, 2, None]},
    "rank a list": {"ranks": [[1], 2, 3]},
    "rank too large for a tensor": {"ranks": [1, 2, 2**31]},
    "rank enormous": {"ranks": [1, 2, 10**400]},
}
BAD_TREES = {
    "prompt a string": {"prompt": "hello"},
    "prompt a list": {"prompt": [message("hello")]},
    "prompt null": {"prompt": None},
    "role missing": {"prompt": {"text": "hello", "replies": []}},
    "role unknown": tree(message("hi", role="system")),
    "role a boolean": tree(message("hi", role=True)),
    "text missing": {"prompt": {"role": "prompter", "replies": []}},
    "text blank": tree(message("")),
    "text a boolean": tree(message(True)),
    "text with a surrogate deep down": tree(message("hi", message("\ud800", role="prompter"))),
    "replies null": {"prompt": {"role": "prompter", "text": "a", "replies": None}},
    "replies an object": {"prompt": {"role": "prompter", "text": "a", "replies": {}}},
    "a reply is a string": {"prompt": {"role": "prompter", "text": "a", "replies": ["b"]}},
    "a reply is null": {"prompt": {"role": "prompter", "text": "a", "replies": [None]}},
    "rank negative": tree(message("hi", rank=-1), message("no", rank=0)),
    "rank a boolean": tree(message("hi", rank=False), message("no", rank=True)),
    "rank a string": tree(message("hi", rank="0"), message("no", rank="1")),
    "rank a float": tree(message("hi", rank=0.0), message("no", rank=1.0)),
    "rank too large": tree(message("hi", rank=0), message("no", rank=2**31)),
}
BAD_SCORES = {
    "scores null": {"scores": None},
    "scores a string": {"scores": "123"},
    "scores empty": {"scores": []},
    "scores too short": {"scores": [1, 2]},
    "a score is null": {"scores": [1, None, 3]},
    "a score is a boolean": {"scores": [1, True, 3]},
    "a score is a string": {"scores": [1, "2", 3]},
    "a score is infinite": {"scores": [1, float("inf"), 3]},
    "responses missing": {"responses": ...},
    "responses a string": {"responses": "hi"},
    "scores for one response": {"scores": [1]},
    "a million scores": {"scores": [1] * 1_000_000},
}
BAD_MESSAGES = {  # in place of a message
    "null": None,
    "a string": "hello",
    "a list": [{"role": "user", "content": "a"}],
    "no role": {"content": "a"},
    "role null": {"role": None, "content": "a"},
    "role unknown": {"role": "narrator", "content": "a"},
    "role a control sequence": {"role": "\x1b[2J", "content": "a"},
    "no content": {"role": "user"},
    "content an object": {"role": "user", "content": {"text": "a"}},
    "content with a NUL": {"role": "user", "content": "a\0"},
    "a part is a string": {"role": "user", "content": ["a"]},
    "a part without text": {"role": "user", "content": [{"type": "text"}]},
    "a part with a surrogate": {"role": "user", "content": [{"type": "text", "text": "\ud800"}]},
}
BAD_CHOICES = {
    "chosen missing": {"chosen": ...},
    "rejected missing": {"rejected": ...},
    "a score is null": {"score_chosen": 1, "score_rejected": None},
    "a score is a string": {"chosen_score": "1", "rejected_score": 2},
    "a score is a boolean": {"chosen_rating": True, "rejected_rating": 0},
    "a score is missing": {"score_chosen": 1},
    "history a string": {"history": "a"},
    "history of one": {"history": [["a"]]},
    "history of numbers": {"history": [[1, 2]]},
    "history of messages": {"history": [{"role": "user", "content": "a"}]},
    "system a number": {"system": 1},
}
BAD_DIALOGUES = {
    "no dialogue": {"chosen": "hi", "rejected": "no"},
    "one side no dialogue": {**PAIR, "rejected": "no"},
    "only a human": {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: b"},
    "chosen missing": {"rejected": f"{HUMAN} no"},
    "rejected missing": {"chosen": f"{HUMAN} hi"},
}


def bad_files() -> list:
    """(reader, content of the file, line at fault) for every malformed input."""
    cases = []

    def add(name: str, case: str, content: bytes, line: int, suffix: str = ".jsonl") -> None:
        cases.append(pytest.param(name, content, line, suffix, id=f"{name}: {case}"))

    def add_row(name: str, case: str, row: dict) -> None:
        row = {key: value for key, value in row.items() if value is not ...}
        add(name, case, line_of(READERS[name][0]) + b"\r\n" + line_of(row), line=3)

    for name, (good, _, _) in READERS.items():
        first = line_of(good)
        for case, bad in BAD_LINES.items():
            add(name, case, first + b"\n" + bad + b"\n" + first, line=3)
        add(name, "bad last line without its end", first + b"{", line=2)
        add(name, "bad first line", b"oops\n" + first, line=1)
        add(name, "empty file", b"", line=1)
        add(name, "blank lines only", b"\n \r\n\t\n", line=1)
        add(name, "byte-order mark only", b"\xef\xbb\xbf", line=1)
        add(name, "UTF-16", json.dumps(good).encode("utf-16"), line=1)
        packed = gzip.compress(first * 1_000)
        add(name, "gz: not gzipped", first, 1, ".jsonl.gz")
        add(name, "gz: empty", gzip.compress(b""), 1, ".jsonl.gz")
        add(name, "gz: cut after its head", packed[:10], 1, ".jsonl.gz")
        add(name, "gz: wrong checksum", packed[:-8] + bytes(8), 1_001, ".jsonl.gz")
        add(name, "gz: damaged", packed[:20] + b"\xff" * 20 + packed[40:], 0, ".jsonl.gz")
        add(name, "gz: rubbish behind", gzip.compress(first) + b"x", 0, ".jsonl.gz")
        add(name, "gz: bad line", gzip.compress(first + b"{\n"), 2, ".jsonl.gz")
        add(name, "not gzipped by name", gzip.compress(first), 0)
    for name, key in TEXT_KEYS:
        good, read, _ = READERS[name]
        for case, value in (BAD_TEXTS if read is converted else BAD_TEXTS | BLANK_TEXTS).items():
            add_row(name, f"{key}: {case}", {**good, key: value})
        if key != "input":
            add_row(name, f"{key} missing", {**good, key: ...})
    for case, fields in BAD_COMPARISONS.items():
        add_row("comparisons", case, {**COMPARISON, **fields})
    for name, bad_rows in (("oasst", BAD_TREES), ("hh", BAD_DIALOGUES)):
        for case, row in bad_rows.items():
            add_row(name, case, row)
    for name, bad_fields in (("scored", BAD_SCORES), ("choices", BAD_CHOICES)):
        for case, fields in bad_fields.items():
            add_row(name, case, {**READERS[name][0], **fields})
    for case, bad in BAD_MESSAGES.items():
        add_row("messages", case, {"messages": [*chat("a", "b"), bad]})
        add_row("conversations", case, {"conversations": [bad, *share("a", "b")]})
        add_row("choices of chats", case, {**CHOICE_OF_CHATS, "rejected": [bad, *chat("a", "b")]})
    for name in ("messages", "conversations"):
        for case, value in BAD_TEXTS.items():
            add_row(name, f"all {case}", {name: value})
    for name in ("instructions", "preferences", "messages", "scored"):
        good = json.dumps(READERS[name][0]).encode()
        add(name, "array not closed", b"[\n" + good + b",\n" + good, 3, ".json")
        add(name, "array of numbers", b"[\n" + good + b",\n\n 17]", 4, ".json")
        add(name, "array without a comma", b"[" + good + b"\n" + good + b"]", 2, ".json")
        add(name, "array with a bad row", b"[" + good + b',\n{"instruction": 1}]', 2, ".json")
        add(name, "two arrays", b"[" + good + b"]\n[]", 2, ".json")
        add(name, "array with NaN", b"[" + good + b',\n{"instruction": NaN}]', 1, ".json")
    for case, content, line in (
        ("empty .txt", b"", 1),
        ("blank .txt", b"\n \n", 1),
        ("NUL in .txt", b"a\nb\0", 2),
        ("Latin-1 .txt", b"a\n\nK\xf6pf", 3),
        ("UTF-16 .txt", "abc".encode("utf-16"), 1),
        (".txt of blanks", b"a" + b"\n" * 500_000 + b"b", 1),
    ):
        add("texts", case, content, line, ".txt")
        add("text", case, content, line, ".txt")
    return cases


@pytest.mark.parametrize("name, content, line, suffix", bad_files())
def test_a_bad_file_is_one_line(name, content, line, suffix, tmp_path, capsys):
    path, out = tmp_path / f"bad{suffix}", tmp_path / "out.jsonl"
    path.write_bytes(content)
    _, read, main = READERS[name]
    with pytest.raises(DataError) as error:
        read(path)
    found = ONE_LINE.fullmatch(str(error.value))
    assert found and str(error.value).startswith(str(path)) and str(error.value).isprintable()
    assert line in (0, int(found[1]))  # 0: compressed data does not say
    assert ONE_LINE.fullmatch(refused(lambda: main(path, out), capsys).strip())
    assert [file.name for file in tmp_path.iterdir()] == [path.name]  # nothing written


@pytest.mark.parametrize(
    "name, content",
    [
        ("hh", line_of({"chosen": f"{HUMAN} hi", "rejected": f"{HUMAN} hi"})),
        ("oasst", line_of(tree())),
        ("instructions", b"[ ]"),
        ("instructions", line_of({**ALPACA, "output": " "})),
        ("preferences", line_of({**PREFERENCE, "chosen": ""})),
    ],
)
def test_a_file_without_a_usable_row_is_refused(name, content, tmp_path, capsys):
    (path := tmp_path / "source.jsonl").write_bytes(content)
    not_converted(path, capsys, "nothing usable")


NOTHING = [(name, key) for name, key in TEXT_KEYS if READERS[name][1] is converted]
NOTHING += [("messages", "messages"), ("conversations", "conversations"), ("scored", "responses")]
NOTHING.remove(("instructions", "input"))  # which is optional


@pytest.mark.parametrize("name, key", NOTHING)
@pytest.mark.parametrize("blank", BLANK_TEXTS.values(), ids=BLANK_TEXTS)
def test_a_row_that_says_nothing_is_dropped_and_counted(name, key, blank, tmp_path, capsys):
    good = READERS[name][0]
    nothing = write(tmp_path / "nothing.jsonl", {**good, key: blank})
    expected = converted(write(tmp_path / "good.jsonl", good)) * 2
    _, _, found, counts = convert.read(
        write(tmp_path / "a.jsonl", good, {**good, key: blank}, good)
    )
    if key == "rejected" and name != "hh" and blank is not None:  # silence may be compared
        assert len(found) == 3 and counts["with an empty rejected reply kept"] == 1
        return
    assert found == expected and counts["rows"] == 3
    [dropped] = [what for what, n in counts.items() if n and what.endswith("dropped")]
    assert counts[dropped] == 1
    not_converted(nothing, capsys, f"nothing usable (1 rows: 1 {dropped})")


@pytest.mark.parametrize("blank", BLANK_TEXTS.values(), ids=BLANK_TEXTS)
def test_optional_keys_may_be_blank_or_null(blank, tmp_path):
    optional = dict.fromkeys(("context", "input", "system", "system_prompt", "label"), blank)
    row = {"instruction": "Add.", "output": "2", "history": None if blank is None else []}
    _, _, found, counts = convert.read(write(tmp_path / "a.jsonl", row | optional))
    assert found == [{"prompt": "Add.", "response": "2"}] and +counts == {"rows": 1}


@pytest.mark.parametrize("name", READERS)
def test_a_missing_file_and_a_folder_are_one_line(name, tmp_path, capsys):
    _, _, main = READERS[name]
    for path in (tmp_path / "none.jsonl", tmp_path):
        refused(lambda path=path: main(path, tmp_path / "out.jsonl"), capsys, str(path))
        assert not (tmp_path / "out.jsonl").exists()


TEN_MB = 10_000_000


@pytest.mark.parametrize(
    "content, loads",
    [
        (line_of({**COMPARISON, "prompt": "word " * (TEN_MB // 5)}), True),
        (line_of({**COMPARISON, "prompt": "é" * (TEN_MB // 6)}), True),  # six bytes each in JSON
        (line_of({**COMPARISON, "extra": [{"x": 1}] * (TEN_MB // 10)}), True),
        (line_of({**COMPARISON, "prompt": " \n" * (TEN_MB // 3) + "a"}), False),
        (line_of({**COMPARISON, "responses": [""] * (TEN_MB // 4)}), False),
        (b"[" * TEN_MB, False),
        (b'{"a":' * (TEN_MB // 5), False),
        (b'{"prompt": ' + b"7" * TEN_MB + b"}", False),
        (b'{"prompt": "' + b"a" * TEN_MB, False),
        (b'{"a": 1' + b', "b": 1, "cc": 2' * (TEN_MB // 17) + b"}", False),
        (b'{"' + b"a" * TEN_MB + b'": 1, "' + b"a" * TEN_MB + b'": 2}', False),
        (b" " * TEN_MB, False),
    ],
    ids=lambda value: repr(value[:24]) if isinstance(value, bytes) else str(value),
)
def test_a_line_of_ten_megabytes_is_no_trouble(content, loads, tmp_path):
    (path := tmp_path / "long.jsonl").write_bytes(content)
    start = time.process_time()
    if loads:
        assert len(load_comparisons(path)) == 1
    else:
        with pytest.raises(DataError) as error:
            load_comparisons(path)
        assert len(str(error.value)) < 500
    assert time.process_time() - start < 5


# ---- good files ----


@pytest.mark.parametrize("name", READERS)
def test_every_reader_survives_marks_line_ends_blank_lines_and_gzip(name, tmp_path):
    good, read, _ = READERS[name]
    line = json.dumps({**good, "extra": [None, True, 1.5, "\ud800"]}).encode()
    contents = {
        "plain.jsonl": line + b"\n" + line + b"\n",
        "no_last_end.jsonl": line + b"\n" + line,
        "mark.jsonl": b"\xef\xbb\xbf" + line + b"\n" + line,
        "crlf.jsonl": line + b"\r\n" + line + b"\r\n",
        "blank.jsonl": b"\n \n" + line + b"\n\n\t\r\n" + line + b"\n\n",
        "packed.jsonl.gz": gzip.compress(line + b"\n" + line),
        "two_parts.jsonl.gz": gzip.compress(line + b"\n") + gzip.compress(line),
    }
    results = []
    for file, content in contents.items():
        (tmp_path / file).write_bytes(content)
        results.append(read(tmp_path / file))
    assert results[0] and all(result == results[0] for result in results)


def test_rows_hold_their_own_keys_alone(tmp_path):
    path = write(tmp_path / "a.jsonl", {**COMPARISON, "response": "hi", "text": "Once.", "id": 7})
    assert load_comparisons(path) == [COMPARISON]
    assert load_demonstrations(path) == [DEMONSTRATION]
    assert load_prompts(str(path)) == [{"prompt": "Say hi."}]
    assert load_texts(path) == ["Once."]


def test_ranks_are_filled_in_kept_and_may_all_be_equal(tmp_path):
    rows = [{**COMPARISON, "ranks": ranks} for ranks in ([1, 1, 1], [2, 9, 2])]
    bare = {"prompt": "Say hi.", "responses": ["hi", "", "hi"]}
    loaded = load_comparisons(write(tmp_path / "a.jsonl", bare, *rows))
    assert [row["ranks"] for row in loaded] == [[1, 2, 3], [1, 1, 1], [2, 9, 2]]
    assert loaded[0]["responses"] == ["hi", "", "hi"]  # a compared response may be empty


def test_text_is_kept_to_the_letter(tmp_path):
    words = "  “naïve” 🤖 \ufffd {prompt} <|endoftext|>\r\n\x85\u2028\x1b[31m "
    path = write(tmp_path / "a.jsonl", {"prompt": words, "response": words})
    assert load_demonstrations(path) == [{"prompt": words, "response": words}]


def test_texts_come_from_a_file_a_folder_or_rows(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfsecond\r\n\r\nline\xc2\x85")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"first"))
    (tmp_path / "ignored.md").write_text("# third")
    (tmp_path / "c").mkdir()
    (tmp_path / "c/D.TXT").write_text("below")
    assert load_texts(tmp_path / "b.txt") == ["second\n\nline\x85"]
    assert load_texts(tmp_path) == ["first", "second\n\nline\x85", "below"]
    rows = write(tmp_path / "c.jsonl", {"text": "a\r\nb", "title": "A"}, {"text": " c"})
    assert load_texts(rows) == ["a\nb", " c"]
    (many := tmp_path / "many").mkdir()
    for i in (3, 9, 1, 7, 0, 5, 2, 8, 6, 4):
        (many / f"{i}.txt").write_text(str(i))
    assert load_texts(many) == list("0123456789")
    (empty := tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="folder:1: the folder holds no .txt file"):
        load_texts(empty)


# ---- writing ----


def test_records_are_written_as_they_are_read(tmp_path):
    rows = [{"prompt": "ü🤖\n{x}", "response": "\x1b[31m"}, {"prompt": "b", "response": "c"}]
    for name in ("new/folder/a.jsonl", "a.jsonl.gz"):
        save_records(tmp_path / name, iter(rows))
        assert load_demonstrations(tmp_path / name) == rows
    assert "ü🤖" in (tmp_path / "new/folder/a.jsonl").read_text("utf-8")
    assert (tmp_path / "a.jsonl.gz").read_bytes()[:2] == b"\x1f\x8b"


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", DEMONSTRATION)
    with pytest.raises(DataError, match=r"a\.jsonl:2: \"record\" holds '\\ud800' at 30"):
        save_records(path, [DEMONSTRATION, {"prompt": "a", "response": "b\ud800"}])

    def fail(*_):
        raise OSError("disk full")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
            patch.setattr(os, step, fail)
            save_records(path, [])
    assert load_demonstrations(path) == [DEMONSTRATION]
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_atomic_writes_all_or_nothing(tmp_path):
    with records.atomic(tmp_path / "new/folder/a") as file:
        file.write(b"whole")
    with pytest.raises(KeyError), records.atomic(tmp_path / "new/folder/a") as file:
        file.write(b"half")
        raise KeyError
    assert [path.name for path in (tmp_path / "new/folder").iterdir()] == ["a"]
    assert (tmp_path / "new/folder/a").read_bytes() == b"whole"


def test_atomic_replaces_regular_files_only(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(UserError, match="is not a regular file"), records.atomic(path) as file:
            file.write(b"x")
    assert (tmp_path / "pipe").is_fifo()


def test_only_what_a_user_can_repair_becomes_one_line(capsys):
    for error in (UserError("too few"), DataError("a", 1, "too few", "more"), OSError("too few")):
        with pytest.raises(SystemExit) as exit, records.one_line_errors(lambda: " (step 3)"):
            raise error
        printed = capsys.readouterr().err
        assert exit.value.code == 2 and printed == f"error: {error} (step 3)\n"
    with pytest.raises(ValueError, match="our bug"), records.one_line_errors():
        raise ValueError("our bug")


@pytest.mark.parametrize(
    "n, held_out, training",
    [(0, "", "abcAda"), (1, "aAa", "bcd"), (3, "aAa", "bcd"), (4, "aAab", "cd"), (9, "aAabcd", "")],
)
def test_held_out_means_unseen(n, held_out, training):
    found = records.split_held_out(list("abcAda"), n, key=str.lower)
    assert found == (list(held_out), list(training))
    assert records.split_held_out(["a", "A", "a"], 1, key=str.lower) == (["a"], ["A", "a"])


def test_a_converter_may_write_over_its_source(tmp_path):
    path = write(tmp_path / "a.jsonl", ALPACA)
    convert.main([str(path), str(path)])
    assert load_demonstrations(path) == [{"prompt": "Add.\n\n1 + 1", "response": "2"}]


# ---- any file at all ----

# Short texts, with the characters that make trouble more often than chance would have them.
TROUBLE = ("\0", "\ud800", "\r", "\n", "\x1b", "\x85", "\u2028", "\ufeff", "{", "}", "🤖", " ", "a")
ANY_TEXT = st.text(st.sampled_from(TROUBLE) | st.characters(exclude_categories=()), max_size=8)
SOUND_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
VISIBLE_TEXT = SOUND_TEXT.filter(str.strip)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=8,
)
KEYS = {key for good, _, _ in READERS.values() for key in good} | {"ranks", "context", "question"}
KEYS = sorted(
    KEYS | {"completions", "answers", "conversation", "history", "system", "score_chosen"}
)
MESSAGE_KEYS = [
    "role",
    "text",
    "replies",
    "rank",
    "deleted",
    "content",
    "answer",
    "input",
    "output",
]
MESSAGE_KEYS = st.sampled_from([*MESSAGE_KEYS, "response", "overall_score", "weight", "from"])
ANY_VALUE = (
    ANY_JSON
    | ANY_TEXT.map(lambda words: f"{HUMAN}{words}")
    | st.lists(ANY_TEXT | st.integers(-1, 4), max_size=4)
    | st.dictionaries(MESSAGE_KEYS, ANY_JSON, max_size=5)
    | st.lists(st.dictionaries(MESSAGE_KEYS, ANY_JSON, max_size=5), max_size=3)
)
ANY_ROW = st.dictionaries(st.sampled_from(KEYS), ANY_VALUE, max_size=6)
few = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("any")


def load_or_refuse(path: Path) -> None:
    """Reads the file in every way: sound records, or one line that says why not."""
    for read in {read for _, read, _ in READERS.values()}:
        try:
            result = read(path)
        except DataError as error:
            assert ONE_LINE.fullmatch(str(error)) and str(error).isprintable()
            continue
        save_records(again := path.with_name("again.jsonl"), [{"any": row} for row in result])
        if read is converted and result:  # what is written can be loaded
            save_records(again, result)
            assert len(READERS[convert.read(path)[1]][1](again)) == len(result)


@few
@given(
    content=st.binary(max_size=64),
    suffix=st.sampled_from(["jsonl", "jsonl.gz", "json", "csv", "tsv", "csv.gz", "txt"]),
)
def test_any_bytes_load_or_are_refused_in_one_line(folder, content, suffix):
    (path := folder / f"a.{suffix}").write_bytes(content)
    load_or_refuse(path)


@few
@given(
    header=st.lists(st.sampled_from(KEYS), min_size=1, max_size=4),
    cells=st.lists(st.lists(ANY_TEXT | ANY_JSON.map(json.dumps), max_size=4), max_size=3),
    end=st.sampled_from(["\n", "\r\n", "\r", '"', ""]),
)
def test_any_table_loads_or_is_refused_in_one_line(folder, header, cells, end):
    content = io.StringIO()
    csv.writer(content).writerows([header, *cells])
    (path := folder / "a.csv").write_text(content.getvalue() + end, "utf-8", "surrogatepass")
    load_or_refuse(path)


@few
@given(rows=st.lists(ANY_ROW, min_size=1, max_size=3), as_array=st.booleans())
def test_any_json_loads_or_is_refused_in_one_line(folder, rows, as_array):
    path = write(folder / "rows.jsonl", *([rows] if as_array else rows))
    load_or_refuse(path)


@few
@given(data=st.data(), name=st.sampled_from(sorted(READERS)))
def test_a_good_file_with_one_byte_changed_loads_or_is_refused(folder, data, name):
    content = bytearray(line_of(READERS[name][0]) * 2)
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (path := folder / "changed.jsonl").write_bytes(content)
    load_or_refuse(path)


@few
@given(
    rows=st.lists(
        st.fixed_dictionaries({"prompt": VISIBLE_TEXT, "response": VISIBLE_TEXT}), min_size=1
    ),
    suffix=st.sampled_from([".jsonl", ".jsonl.gz"]),
)
def test_what_is_saved_is_loaded(folder, rows, suffix):
    save_records(path := folder / f"saved{suffix}", rows)
    assert load_demonstrations(path) == rows


@few
@given(words=ANY_TEXT)
def test_nothing_printable_steers_a_terminal(words):
    assert all(c.isprintable() or c in "\n\t" for c in printable(words))
    assert printable(words, keep="").isprintable()
    assert printable("é “q” 🤖\ttab\n") == "é “q” 🤖\ttab\n"
    assert printable("\x1b[2J\r\x07\u202e\x9b\0") == r"\x1b[2J\r\x07\u202e\x9b\x00"


@few
@given(ranks=st.lists(st.integers(1, 5), min_size=2, max_size=9), prompt=VISIBLE_TEXT)
def test_shuffling_moves_responses_and_ranks_together(ranks, prompt):
    responses = [f"{i}" for i in range(len(ranks))]
    row = formats.shuffled([("", prompt)], responses, ranks)
    assert row == formats.shuffled([("", prompt)], responses, ranks)
    assert sorted(row.responses) == responses
    assert all(ranks[int(text)] == r for text, r in zip(row.responses, row.ranks, strict=True))


def test_the_place_in_the_list_says_nothing_about_the_rank():
    rows = [formats.shuffled([("", f"{i}")], ["a", "b", "c"], [1, 2, 3]) for i in range(3_000)]
    for place in range(3):
        share = np.mean([row.ranks[place] == 1 for row in rows])
        assert abs(share - 1 / 3) < 0.035  # four standard errors


# ---- Anthropic HH ----


def test_hh_prompt_is_the_shared_dialogue_up_to_its_last_tag(tmp_path):
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    row = {"chosen": f"{start} same start, good", "rejected": f"{start} same start, bad"}
    _, _, [comparison], counts = convert.read(write(tmp_path / "a.jsonl", row))
    assert comparison["prompt"] == start
    by_rank = dict(zip(comparison["ranks"], comparison["responses"], strict=True))
    assert by_rank == {1: " same start, good", 2: " same start, bad"}
    assert +counts == {"rows": 1}


HH_ODDITIES = [  # chosen reply, rejected reply, what is counted beside the pair; None: kept as is
    (" yes", " no", None),
    (" Dasher", " Dasher, Dancer", None),  # one side a strict prefix of the other
    (" Welcome!\n", " Welcome! More?", None),
    (" “ça” 🤖 \ufffd", " no", None),
    (" yes", " ", "with an empty rejected reply kept"),
    (" yes", "", "with an empty rejected reply kept"),
    (" ", " sure", "with an empty chosen reply dropped"),
    ("", " sure", "with an empty chosen reply dropped"),
    (" yes", " yes", "without signal dropped"),
    (" yes", " yes ", "without signal dropped"),
    ("", " \n", "without signal dropped"),
    (" yes", " no\n\nHuman: go on\n\nAssistant: no", "with further turns in a reply kept"),
    (" yes\n\nAssistant: and more", " no", "with further turns in a reply kept"),
    (" yes\n\nHuman: thanks", " no", "with further turns in a reply kept"),
]


@pytest.mark.parametrize("chosen, rejected, oddity", HH_ODDITIES)
def test_hh_oddities(chosen, rejected, oddity, tmp_path):
    # two turns of one role in a row are part of the prompt like any others
    start = "\n\nHuman: a\n\nHuman: b\n\nAssistant: c\n\nAssistant:"
    row = {"chosen": start + chosen, "rejected": start + rejected}
    path = write(tmp_path / "a.jsonl", row)
    _, _, comparisons, counts = convert.read(path)
    assert +counts == {"rows": 1} | ({oddity: 1} if oddity else {})
    if oddity and oddity.endswith("dropped"):
        assert comparisons == []
        return
    [comparison] = comparisons
    assert comparison["prompt"] == start and sorted(comparison["ranks"]) == [1, 2]
    assert comparison["responses"][comparison["ranks"].index(1)] == chosen
    assert comparison["responses"][comparison["ranks"].index(2)] == rejected
    best = converted(path, "demonstrations")  # nobody should imitate a reply that speaks for both
    turns = "\n\nHuman:" in chosen or "\n\nAssistant:" in chosen
    assert best == ([] if turns else [{"prompt": start, "response": chosen}])


def test_hh_transcripts_that_share_no_prompt_are_dropped(tmp_path, capsys):
    diverging = {
        "chosen": "\n\nHuman: a\n\nAssistant: b",
        "rejected": "\n\nHuman: c\n\nAssistant: d",
    }
    path = write(tmp_path / "a.jsonl", PAIR, diverging, PAIR)
    _, _, comparisons, counts = convert.read(path)
    assert len(comparisons) == 2 and counts["diverging dropped"] == 1
    convert.main([str(path), str(tmp_path / "out.jsonl")])
    taken_for, summary, _ = capsys.readouterr().out.splitlines()
    assert taken_for == f"{path}: chosen and rejected dialogues, as in HH (keys: chosen, rejected)"
    assert summary.startswith("3 rows: 1 diverging dropped; 2 comparisons written to ")
    assert load_comparisons(tmp_path / "out.jsonl") == comparisons


@pytest.mark.parametrize("before, start", [("", ""), ("Be terse.", "\n\nSystem: Be terse.")])
def test_what_precedes_the_first_turn_of_a_transcript_is_kept(before, start, tmp_path):
    row = {key: before + words if before else words.lstrip() for key, words in PAIR.items()}
    [found] = converted(write(tmp_path / "a.jsonl", row))
    assert found["prompt"] == start + HUMAN and sorted(found["responses"]) == [" hi", " no"]


@few
@given(st.lists(SOUND_TEXT, min_size=1, max_size=3), VISIBLE_TEXT, VISIBLE_TEXT)
def test_hh_split_loses_nothing(turns, chosen, rejected):
    start = "".join(f"\n\nHuman: {turn}\n\nAssistant:" for turn in turns)
    row = records.Row("a", 1, {"chosen": start + chosen, "rejected": start + rejected})
    turns, *replies = formats.split(*(formats.read_transcript(row, side) for side in row.fields))
    prompt, [better, worse] = formats.lay_out(turns, dialogue=True), replies
    assert prompt + better == start + chosen and prompt + worse == start + rejected
    assert prompt.startswith(start) and prompt.endswith("\n\nAssistant:")
    shared = os.path.commonprefix([better, worse])
    assert "\n\nAssistant:" not in shared


def test_hh_writes_demonstrations(tmp_path):
    path, out = write(tmp_path / "a.jsonl", PAIR), tmp_path / "out.jsonl"
    convert.main([str(path), str(out), "--demonstrations"])
    assert load_demonstrations(out) == [{"prompt": HUMAN, "response": " hi"}]


def test_hh_split_is_downloaded_once(tmp_path, monkeypatch, capsys):
    hub = pytest.importorskip("torch.hub")
    calls = []

    def download(url: str, dst: str) -> None:
        calls.append(url)
        Path(dst).write_bytes(gzip.compress(line_of(PAIR)))

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "download_url_to_file", download)
    for _ in range(2):
        convert.main(["hh:harmless-base/train", "out.jsonl"])
    assert len(calls) == 1 and calls[0].endswith(
        "/hh-rlhf/resolve/main/harmless-base/train.jsonl.gz"
    )
    assert len(load_comparisons("out.jsonl")) == 1


def test_an_unknown_part_of_hh_is_refused(tmp_path, capsys):
    command = ["hh:helpful-base", str(tmp_path / "out.jsonl")]
    refused(lambda: convert.main(command), capsys, "hh:helpful-base/train")


def test_another_zip_archive_is_refused(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("rows.jsonl", "{}")
    refused(lambda: converter(tmp_path / "a.zip", tmp_path / "out.jsonl"), capsys)


def test_hh_offline_says_what_to_do(tmp_path, monkeypatch, capsys):
    hub = pytest.importorskip("torch.hub")

    def offline(url: str, dst: str) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "download_url_to_file", offline)
    command = ["hh:helpful-base/test", "out.jsonl"]
    remedy = ("helpful-base/test.jsonl.gz", "give its path")
    refused(lambda: convert.main(command), capsys, *remedy)
    assert not Path("out.jsonl").exists()


# ---- OpenAssistant ----


def test_oasst_groups_become_comparisons(tmp_path):
    follow_up = message(
        "and now?",
        message("later", rank=1),
        message("soon", rank=0),
        message("never", rank=3),  # a gap stays a gap
        message("spam", rank=2, deleted=True),
        message("rude", review_result=False),
        message("unseen"),
        role="prompter",
    )
    row = tree(message("hi", follow_up, rank=0), message("no", rank=1), synthetic=True)
    _, _, comparisons, counts = convert.read(
        write(tmp_path / "a.jsonl", row, tree(message("one", rank=0)))
    )
    assert {
        c["prompt"]: dict(zip(c["responses"], c["ranks"], strict=True)) for c in comparisons
    } == {
        "\n\nHuman: hello\n\nAssistant:": {" hi": 1, " no": 2},
        "\n\nHuman: hello\n\nAssistant: hi\n\nHuman: and now?\n\nAssistant:": {
            " soon": 1,
            " later": 2,
            " never": 4,
        },
    }
    assert +counts == {
        "rows": 2,
        "groups of replies": 3,
        "groups in synthetic trees kept": 2,
        "deleted or rejected replies dropped": 2,
        "replies without a rank dropped": 1,
        "groups with fewer than two ranks dropped": 1,
    }


def test_oasst_null_rank_is_no_rank_and_equal_ranks_tie(tmp_path):
    replies = [message("a", rank=0), message("b", rank=0), message("c", rank=None)]
    [comparison] = converted(write(tmp_path / "a.jsonl", tree(*replies)))
    assert sorted(comparison["responses"]) == [" a", " b"] and comparison["ranks"] == [1, 1]


def test_oasst_survives_a_thread_deeper_than_the_stack():
    thread = message("end", rank=0)
    for depth in range(2_000):
        replies = (thread, message("no", rank=1)) if depth % 2 == 0 else (thread,)
        thread = message("on", *replies, role=("prompter", "assistant")[depth % 2], rank=0)
    found = list(formats.read_tree(records.Row("a", 1, tree(thread)), Counter()))
    assert len(found) == 1_000


# ---- instructions and text ----


def test_instructions_of_both_families(tmp_path):
    rows = [
        ALPACA,
        {"instruction": "Sum.", "input": "", "output": " 4"},
        {"instruction": "Sum.", "input": " \n", "output": "5"},
        {"instruction": "Sum.", "output": "6"},
        {"instruction": "Why?", "context": "Since.", "response": "So.", "category": "qa"},
        {"instruction": "Why?", "context": " ", "response": "", "category": "qa"},
    ]
    expected = [
        {"prompt": "Add.\n\n1 + 1", "response": "2"},
        {"prompt": "Sum.", "response": " 4"},
        {"prompt": "Sum.", "response": "5"},
        {"prompt": "Sum.", "response": "6"},
        {"prompt": "Why?\n\nSince.", "response": "So."},
    ]
    (array := tmp_path / "a.json").write_text(json.dumps(rows, indent=4))
    for path in (write(tmp_path / "a.jsonl", *rows), array):
        _, _, demonstrations, counts = convert.read(path)
        assert demonstrations == expected
        assert counts == {"rows": 6, "with an empty response dropped": 1}


@pytest.mark.parametrize("indent", [None, 0, 4])
def test_a_bad_row_of_an_array_is_found_on_its_line(indent, tmp_path):
    content = json.dumps(
        [ALPACA, {**ALPACA, "input": "[1,\n2],"}, {"instruction": 3}], indent=indent
    )
    line = 1 + content[: content.rindex("{")].count("\n")
    (path := tmp_path / "a.json").write_text("\n\n" + content)
    with pytest.raises(DataError, match=rf'a\.json:{line + 2}: "instruction" is of type int'):
        convert.read(path)


def test_preferences_become_comparisons(tmp_path, capsys):
    rows = [PREFERENCE, {**PREFERENCE, "rejected": "2 "}, {**PREFERENCE, "rejected": ""}]
    path, out = write(tmp_path / "a.jsonl", *rows), tmp_path / "out.jsonl"
    convert.main([str(path), str(out)])
    summary = "3 rows: 1 with an empty rejected reply kept, 1 without signal dropped; 2 comparisons"
    assert capsys.readouterr().out.splitlines()[1].startswith(summary)
    loaded = load_comparisons(out)
    assert [row["prompt"] for row in loaded] == ["Add.", "Add."]
    assert [row["responses"][row["ranks"].index(1)] for row in loaded] == ["2", "2"]


def test_messages_become_a_demonstration_for_each_reply_or_the_last(tmp_path):
    system = {"role": "system", "content": "Be terse."}
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    turns = [system, *chat("hi", "ho", "why", "so", "what?")]
    turns[1] = {"role": "user", "content": parts}
    path = write(tmp_path / "a.jsonl", {"messages": turns}, {"messages": chat("a", "b")})
    first = "\n\nSystem: Be terse.\n\nHuman: hel\nlo\n\nAssistant:"
    expected = [
        {"prompt": first, "response": " ho"},
        {"prompt": f"{first} ho\n\nHuman: why\n\nAssistant:", "response": " so"},
        {"prompt": "\n\nHuman: a\n\nAssistant:", "response": " b"},
    ]
    format, kind, found, counts = convert.read(path)
    assert (format.name, kind, found) == ("chat messages", "demonstrations", expected)
    merged = "messages of several parts merged"
    assert +counts == {"rows": 2, merged: 1, "without a reply dropped": 1}
    beside = write(
        tmp_path / "b.jsonl", {"prompt": "a", "prompt_id": "1", "messages": chat("a", "b")}
    )
    assert converted(beside) == expected[2:]
    _, _, found, counts = convert.read(path, last=True)
    assert found == expected[1:]
    assert +counts == {"rows": 2, merged: 1, "turns before the last reply left out": 2}
    prompts = converted(path, "prompts")
    assert [len(row["prompt"]) > 0 for row in prompts] == [True] * 4
    assert prompts[2]["prompt"] == f"{first} ho\n\nHuman: why\n\nAssistant: so" + (
        "\n\nHuman: what?\n\nAssistant:"
    )


def test_conversations_by_sharegpt(tmp_path):
    rows = [
        {"conversations": share("a", "b"), "system": "Be terse."},
        {"conversations": share("", "greeting", "c", "d")[1:]},  # a model speaks first
        {"conversations": chat("e", "f")},  # OpenAI's names
        {"conversations": [*share("g"), {"from": "tool", "value": "x"}]},
    ]
    _, _, found, counts = convert.read(write(tmp_path / "a.jsonl", *rows))
    assert found == [
        {"prompt": "\n\nSystem: Be terse.\n\nHuman: a\n\nAssistant:", "response": " b"},
        {
            "prompt": "\n\nAssistant: greeting\n\nHuman: c\n\nAssistant:",
            "response": " d",
        },
        {"prompt": "\n\nHuman: e\n\nAssistant:", "response": " f"},
    ]
    assert +counts == {"rows": 4, "with tool calls dropped": 1, "without a prompt dropped": 1}


def test_what_is_not_text_is_dropped_with_its_row(tmp_path):
    picture = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    older = {"role": "assistant", "content": None, "function_call": {"name": "f"}}
    result = {"role": "tool", "content": "x"}
    silent = {"role": "assistant", "content": None, "tool_calls": None}
    unlearnt = {"role": "assistant", "content": "b", "weight": 0}
    others = (
        [picture, *chat("a", "b")],
        [call],
        [older],
        [result],
        [*chat("a"), silent],
        [unlearnt],
    )
    rows = [{"messages": turns} for turns in (chat("a", "b"), *others)]
    _, _, found, counts = convert.read(write(tmp_path / "a.jsonl", *rows))
    assert found == [{"prompt": ASKED, "response": " b"}]
    assert +counts == {
        "rows": 7,
        "with tool calls dropped": 3,
        "with images or other parts that are not text dropped": 1,
        "with null for a message dropped": 1,
        "with a message of weight 0 dropped": 1,
    }


def test_a_prompt_that_is_a_dialogue_already_is_laid_out_once(tmp_path):
    for prompt in (HUMAN, "Human: hello\n\nAssistant:", f"Be terse.{HUMAN} Well,"):
        for reply in ({"chosen": " hi", "rejected": " no"}, {"responses": [" hi", " no"]}):
            row = {"prompt": prompt, **reply}
            others = [{**row, "prompt": chat("a")}, {**row, "system": "S"}]
            [alone] = converted(write(tmp_path / "a.jsonl", row))
            beside, other, _ = converted(write(tmp_path / "b.jsonl", row, *others))
            assert beside == alone and (alone["prompt"], other["prompt"]) == (prompt, ASKED)
            assert by_rank(alone) == [(1, " hi"), (2, " no")]
    told = {"prompt": HUMAN, "completion": " hi"}
    plain, said = {**told, "prompt": "Hi"}, {**told, "prompt": chat("a")}
    found = converted(write(tmp_path / "a.jsonl", told, {**told, "system": "S"}))
    assert [row["prompt"] for row in found] == [HUMAN, f"\n\nSystem: S{HUMAN}"]
    found = converted(write(tmp_path / "a.jsonl", told, plain))  # our own records stay as they are
    assert [row["prompt"] for row in found] == [HUMAN, "Hi"]
    found = converted(write(tmp_path / "a.jsonl", told, plain, said))
    assert [row["prompt"] for row in found] == [HUMAN, "\n\nHuman: Hi\n\nAssistant:", ASKED]


def objects(**columns: list) -> list[dict]:
    """Replies that are objects: [{"text": …, "rank": …}, …]."""
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


TURN = [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}]
GRADES = objects(response=["x", "y", "z"], overall_score=[3.5, 9, 3.5])
OTHER_SHAPES = {  # rows of public data sets: what they become, and the keys that are not read
    "Orca DPO pairs": (
        {"system": "S", "question": "a", "chosen": "x", "rejected": "y"},
        (f"\n\nSystem: S{ASKED}", [" x", " y"], [1, 2]),
        "",
    ),
    "OpenOrca": (
        {"id": "1", "system_prompt": "", "question": "a", "response": "x"},
        ("a", ["x"]),
        "id",
    ),
    "UltraFeedback": (
        {"instruction": "a", "completions": GRADES, "models": ["m"], "source": "s"},
        ("a", ["x", "y", "z"], [2, 1, 2]),
        "models source",
    ),
    "Nectar": (
        {"prompt": ASKED, "answers": objects(answer=["y", "x"], rank=[2.0, 1.0]), "turns": 1},
        (ASKED, ["y", "x"], [2, 1]),
        "turns",
    ),
    "binarised UltraFeedback": (
        CHOICE_OF_CHATS | {"prompt_id": "1", "score_chosen": 8.0, "score_rejected": 3.0},
        (ASKED, [" yes", " no"], [1, 2]),
        "prompt_id",
    ),
    "HH beside its prompt": ({"prompt": HUMAN, **PAIR}, (HUMAN, [" hi", " no"], [1, 2]), ""),
    "Capybara": ({"conversation": TURN[:1], "source": "s"}, (ASKED, [" b"]), "source"),
    "WildChat": ({"conversation": chat("a", "b")}, (ASKED, [" b"]), ""),
    "ShareGPT with a later role": (
        {"conversations": [share("a")[0], {"from": "chatgpt", "value": "b"}], "id": "x_0"},
        (ASKED, [" b"]),
        "id",
    ),
    "Dolly": (
        {"instruction": "a", "context": "c", "response": "x", "category": "qa"},
        ("a\n\nc", ["x"]),
        "category",
    ),
    "KTO of chats": (
        {"prompt": chat("a"), "completion": chat("", "x")[1:], "label": True},
        (ASKED, [" x"]),
        "",
    ),
    "an input that no format reads": (
        {**DEMONSTRATION, "input": "x"},
        ("Say hi.", ["hi"]),
        "input",
    ),
}


@pytest.mark.parametrize("name", OTHER_SHAPES)
def test_rows_of_public_data_sets(name, tmp_path, capsys):
    row, (prompt, replies, *ranks), unread = OTHER_SHAPES[name]
    path, out = write(tmp_path / "a.jsonl", row), tmp_path / "out.jsonl"
    convert.main([str(path), str(out)])
    [found] = map(json.loads, out.read_text("utf-8").splitlines())
    assert found["prompt"] == prompt
    if ranks:
        places = sorted(range(len(replies)), key=lambda i: (ranks[0][i], replies[i]))
        assert by_rank(found) == [(ranks[0][i], replies[i]) for i in places]
    else:
        assert [found["response"]] == replies
    taken_for = capsys.readouterr().out.splitlines()[0]
    said = f"; not read: {', '.join(unread.split())})" if unread else ")"
    assert taken_for.endswith(said) and taken_for.count("not read") == bool(unread)


def test_turns_of_a_question_and_its_answer(tmp_path):
    found = converted(write(tmp_path / "a.jsonl", {"conversation": TURN}))
    assert [row["response"] for row in found] == [" b", " d"]
    assert found[1]["prompt"] == f"{ASKED} b\n\nHuman: c\n\nAssistant:"


TWO = {"prompt": "a", "responses": ["x", "y"]}
AT_ODDS = [  # a row that contradicts itself: what is counted, and what it becomes, if anything
    ({**CHOICE, "score_chosen": 1, "score_rejected": 4}, "with a lower score for the chosen", 2),
    ({**TWO, "ranks": [1, 2], "scores": [1, 9]}, "with scores against the ranks, which stand", 2),
    ({**TWO, "ranks": [2, 1], "scores": [1, 9]}, None, 2),
    ({**TWO, "ranks": [1, 1], "scores": [1, 9]}, None, 2),
    ({**TWO, "ranks": [1, 2], "scores": ["1", "9"]}, None, 2),
    ({**CHOICE_OF_CHATS, "prompt": "other"}, "with another prompt than their dialogues, which", 2),
    ({**CHOICE_OF_CHATS, "prompt": chat("other")}, "with another prompt than their dialogues", 2),
    ({**CHOICE_OF_CHATS, "prompt": chat("a")}, None, 2),
    ({**CHOICE_OF_CHATS, "prompt": ASKED}, None, 2),
    ({"prompt": "other", **PAIR}, "with another prompt than their dialogues, which stand", 2),
    ({"prompt": "a", "responses": ["x", "x "], "scores": [1, 2]}, "without signal dropped", 0),
    (
        {"prompt": "a", "responses": ["x", "x", "y"], "ranks": [1, 2, 3]},
        "with equal replies ranked apart kept",
        3,
    ),
    ({"prompt": "a", "responses": ["x", "x", "y"], "ranks": [1, 1, 3]}, None, 3),
    (TWO, "taken to be best first", 2),
    ({**TWO, "lengths": [7, 9]}, "taken to be best first", 2),
]


@pytest.mark.parametrize("row, what, replies", AT_ODDS)
def test_rows_at_odds_with_themselves_are_counted(row, what, replies, tmp_path):
    _, _, found, counts = convert.read(write(tmp_path / "a.jsonl", row))
    odd = [key for key, n in counts.items() if n and key not in ("rows", "ranked by score")]
    assert len(odd) == bool(what) and all(key.startswith(what) for key in odd)
    assert [len(x["responses"]) for x in found] == ([replies] if replies else [])
    if replies == 2 and "ranks" not in row:  # what the row says first stands
        assert by_rank(found[0])[0][1].strip() in ("hi", "yes", "x")


@pytest.mark.parametrize("system", [None, " ", "Be terse."])
@pytest.mark.parametrize("history", [None, [], [["who?", "me"], ["you?", "him"]]])
def test_history_and_system_lead_to_a_dialogue(system, history, tmp_path):
    rows = [{**ALPACA, "history": history, "system": system}, ALPACA]
    found = converted(write(tmp_path / "a.jsonl", *rows))
    if system != "Be terse." and not history:
        assert found == [{"prompt": "Add.\n\n1 + 1", "response": "2"}] * 2
        return
    # one layout for all rows of a file
    before = "\n\nSystem: Be terse." if system == "Be terse." else ""
    if history:
        before += "\n\nHuman: who?\n\nAssistant: me\n\nHuman: you?\n\nAssistant: him"
    question = "\n\nHuman: Add.\n\n1 + 1\n\nAssistant:"
    assert found == [
        {"prompt": before + question, "response": " 2"},
        {"prompt": question, "response": " 2"},
    ]


def by_rank(row: dict) -> list[tuple[int, str]]:
    return sorted(zip(row["ranks"], row["responses"], strict=True))


@pytest.mark.parametrize(
    "row, prompt, responses",
    [
        (CHOICE, "Say hi.", ["hi", "no"]),
        ({**CHOICE, "system": "Sir."}, "\n\nSystem: Sir.\n\nHuman: Say hi.\n\nAssistant:", None),
        (CHOICE_OF_CHATS, ASKED, [" yes", " no"]),
        ({**CHOICE_OF_CHATS, "prompt": ...}, ASKED, [" yes", " no"]),
        ({**CHOICE, "prompt": chat("a")}, ASKED, [" hi", " no"]),
        (
            {"prompt": chat("a"), "chosen": chat("", "x")[1:], "rejected": chat("", "y")[1:]},
            ASKED,
            [" x", " y"],
        ),
        (
            {
                "conversations": share("a"),
                "chosen": {"from": "gpt", "value": "x"},
                "rejected": {"from": "gpt", "value": "y"},
            },
            ASKED,
            [" x", " y"],
        ),
        (
            {"chosen": chat("a", "b", "c", "d"), "rejected": chat("a", "b", "c", "e")},
            f"{ASKED} b\n\nHuman: c\n\nAssistant:",
            [" d", " e"],
        ),
        (
            {"chosen": chat("a", "b", "c", "d"), "rejected": chat("a", "B", "c", "e")},
            ASKED,
            [" b\n\nHuman: c\n\nAssistant: d", " B\n\nHuman: c\n\nAssistant: e"],
        ),
        (
            {"chosen": chat("a", "b", "c", "d"), "rejected": chat("a", "b", "C", "e")},
            ASKED,
            [" b\n\nHuman: c\n\nAssistant: d", " b\n\nHuman: C\n\nAssistant: e"],
        ),
    ],
)
def test_two_replies_become_a_comparison(row, prompt, responses, tmp_path):
    row = {key: value for key, value in row.items() if value is not ...}
    [found] = converted(write(tmp_path / "a.jsonl", row))
    assert found["prompt"] == prompt
    assert by_rank(found) == list(enumerate(responses or [" hi", " no"], start=1))


@pytest.mark.parametrize("keys", ["score_{}", "{}_score", "{}_rating"])
def test_equal_scores_are_ties(keys, tmp_path):
    rows = [
        {**CHOICE, keys.format("chosen"): a, keys.format("rejected"): b}
        for a, b in ((8, 3.5), (2, 2.0), (1, 4))
    ]
    path = write(tmp_path / "a.jsonl", *rows)
    _, _, found, counts = convert.read(path)
    assert [sorted(row["ranks"]) for row in found] == [[1, 2], [1, 1], [1, 2]]
    assert all(by_rank(found[i]) == [(1, "hi"), (2, "no")] for i in (0, 2))
    lower = {"with a lower score for the chosen reply, which stands": 1}
    assert +counts == {"rows": 3, "with equal scores tied": 1} | lower
    _, _, found, counts = convert.read(path, "demonstrations")
    assert found == [{"prompt": "Say hi.", "response": "hi"}] * 2
    assert counts["without a best reply dropped"] == 1


def test_scores_become_ranks(tmp_path):
    rows = [SCORED, {**SCORED, "scores": [0.5, 0.5, 9]}, {**SCORED, "prompt": chat("a")}]
    _, _, found, counts = convert.read(write(tmp_path / "a.jsonl", *rows[:2]))
    assert [row["ranks"] for row in found] == [[1, 3, 2], [2, 2, 1]]
    assert [row["responses"] for row in found] == [SCORED["responses"]] * 2
    assert +counts == {"rows": 2, "ranked by score": 2}
    [found] = converted(write(tmp_path / "b.jsonl", rows[2]))
    assert found == {"prompt": ASKED, "responses": [" hi", " no", " ho"], "ranks": [1, 3, 2]}


def test_completions_may_be_messages_and_a_false_label_is_no_demonstration(tmp_path):
    rows = [
        {**COMPLETION, "label": True},
        {**COMPLETION, "label": False},
        {**COMPLETION, "completion": " "},
    ]
    _, _, found, counts = convert.read(write(tmp_path / "a.jsonl", *rows))
    assert found == [{"prompt": "Say hi.", "response": " hi"}]
    assert +counts == {
        "rows": 3,
        "with the label false dropped": 1,
        "with an empty response dropped": 1,
    }
    row = {"prompt": chat("a"), "completion": chat("", "b")[1:]}
    assert converted(write(tmp_path / "b.jsonl", row)) == [{"prompt": ASKED, "response": " b"}]


@pytest.mark.parametrize("mark", [{"label": False}, {"label": 0}, {"kto_tag": "false"}])
def test_a_dialogue_marked_as_bad_is_no_demonstration(mark, tmp_path):
    good, bad = {"messages": chat("a", "b")}, {"messages": chat("a", "worse")} | mark
    _, _, found, counts = convert.read(write(tmp_path / "a.jsonl", good, bad))
    assert found == [{"prompt": ASKED, "response": " b"}]
    assert +counts == {"rows": 2, "with the label false dropped": 1}


def test_a_cell_of_a_table_may_be_a_list_of_messages(tmp_path):
    path = tmp_path / "a.csv"
    with open(path, "w", newline="") as file:
        cells = ["a", json.dumps(chat("a", "b")), json.dumps(chat("a", "c"))]
        csv.writer(file).writerows([["prompt", "chosen", "rejected"], cells])
    [found] = converted(path)
    assert found["prompt"] == ASKED and by_rank(found) == [(1, " b"), (2, " c")]


def test_equal_ratings_are_ties_under_any_name(tmp_path):
    row = {"prompt": "a", "chosen": "x", "rejected": "y"}
    ratings = {"chosen-rating": 5.0, "rejected-rating": 5.0}
    [found] = converted(write(tmp_path / "a.jsonl", row | ratings))
    assert found["ranks"] == [1, 1]


@pytest.mark.parametrize("name", ["demonstrations", "comparisons", "prompts", "texts"])
def test_our_own_records_pass_unchanged(name, tmp_path):
    good, load, _ = READERS[name]
    more = [{**COMPARISON, "ranks": [7, 7, 1]}, {**COMPARISON, "responses": ["", "b", "a"]}]
    path = write(tmp_path / "a.jsonl", good, *(more if name == "comparisons" else [good]))
    assert convert.read(path)[1] == name
    save_records(again := tmp_path / "again.jsonl", converted(path))
    assert load(again) == load(path) and (name == "texts" or converted(path) == load(path))
    if name == "comparisons":  # what a table program has made of whole numbers
        rows = [{**row, "ranks": [float(rank) for rank in row["ranks"]]} for row in load(path)]
        assert converted(write(tmp_path / "b.jsonl", *rows)) == load(path)
        with pytest.raises(DataError, match="whole numbers, 1 is best; python -m data.convert"):
            load(tmp_path / "b.jsonl")
        with pytest.raises(DataError, match="holds something that is no rank"):
            convert.read(write(tmp_path / "c.jsonl", {**COMPARISON, "ranks": [1.5, 2, 3]}))


def test_prompts_of_anything(tmp_path):
    for name in ("hh", "instructions", "scored", "completions", "choices", "demonstrations"):
        _, kind, found, _ = convert.read(write(tmp_path / "a.jsonl", READERS[name][0]), "prompts")
        assert kind == "prompts" and [list(row) for row in found] == [["prompt"]]
    [row] = converted(write(tmp_path / "a.jsonl", {"prompt": chat("a")}), "prompts")
    assert row == {"prompt": ASKED}


TABLES = {
    "a.csv": 'prompt,completion\r\n"Say ""hi"",\r\nplease",hi\r\n\r\nb,ü\r\n',
    "a.tsv": 'prompt\tcompletion\n"Say ""hi"",\nplease"\thi\nb\tü\n',
    "semicolons.csv": 'prompt;completion\n"Say ""hi"",\nplease";hi\nb;ü',
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("packed", [False, True])
def test_tables(name, packed, tmp_path):
    path = tmp_path / (f"{name}.gz" if packed else name)
    content = b"\xef\xbb\xbf" + TABLES[name].encode()
    path.write_bytes(gzip.compress(content) if packed else content)
    found = converted(path)
    assert [row["prompt"].replace("\r\n", "\n") for row in found] == ['Say "hi",\nplease', "b"]
    assert [row["response"] for row in found] == ["hi", "ü"]


def test_cells_that_are_not_text_hold_json(tmp_path):
    (path := tmp_path / "a.csv").write_text(
        'prompt,responses,ranks,id\na,"[""b"", ""c""]","[2.0, 1.0]",x\na,"[""b"", ""c""]",,y\n'
    )
    assert [row["ranks"] for row in converted(path)] == [[2, 1], [1, 2]]
    path.write_text('messages\n"[{""role"": ""user"", ""content"": ""a""}]"\n')
    assert converted(path, "prompts") == [{"prompt": ASKED}]
    path.write_text("prompt,chosen,rejected,score_chosen,score_rejected\na,b,c,1,1.0\na,b,c,,\n")
    assert [sorted(row["ranks"]) for row in converted(path)] == [[1, 1], [1, 2]]
    path.write_text("prompt,completion,label\na,b,True\na,c,False\na,d,good\n")
    assert [row["response"] for row in converted(path)] == ["b", "d"]


@pytest.mark.parametrize(
    "content, wrong",
    [
        (b"prompt,completion\na,b,c\n", "a.csv:2: 3 cells under 2 names"),
        (b"prompt,completion\na,b\nc\n", "a.csv:3: 1 cells under 2 names"),
        (b"prompt,prompt\na,b\n", "a.csv:1: a name occurs twice in the header"),
        (b'prompt,completion\na,"b', "a.csv:2: not CSV: unexpected end of data"),
        (b'prompt,completion\na,"b"c\n', "a.csv:2: not CSV: ',' expected after"),
        (b"prompt,completion\na,b\0\n", "a.csv:2: byte 0x00 is not UTF-8 text"),
        (b"prompt,completion\na,\xff\n", "a.csv:2: byte 0xff is not UTF-8"),
        (b"prompt,completion\n,c\n", '1 with a blank or null "prompt" dropped'),
        (b"prompt,responses\na,b\n", "a.csv:2: not JSON: Expecting value"),
        (b"prompt,responses\na,\"['b', 'c']\"\n", "a.csv:2: not JSON: Expecting value"),
        (b"prompt,completion\n", "a.csv:1: nothing usable"),
        (b"", "a.csv:1: nothing usable"),
    ],
)
def test_a_bad_table_is_one_line(content, wrong, tmp_path, capsys):
    (path := tmp_path / "a.csv").write_bytes(content)
    not_converted(path, capsys, wrong)


@pytest.mark.parametrize(
    "row, remedy",
    [
        ({"question": "a", "answer": "b"}, 'rename "answer" to "response"'),
        ({"question": "a", "answer": "b"}, 'rename "question" to "prompt"'),
        ({"prompt": "a", "answer": "b"}, 'rename "answer" to "response", or give --prompts'),
        ({"question": "a", "chosen": "b", "reject": "c"}, 'rename "reject" to "rejected"'),
        ({"query": "a", "chosen": "b", "rejected": "c"}, 'in both, or a "prompt"'),
        ({"prompt": "a", "answers": ["b"]}, 'rename "answers" to "responses", or give --prompts'),
        (
            {"prompt": "a", "response_0": "b", "response_1": "c", "better_response_id": 0},
            '"chosen" for the better of "response_0" and "response_1", "rejected" for the other',
        ),
        ({"instruction": "a"}, 'instructions with outputs: add "output"'),
        ({"promt": "a", "completion": "b"}, 'rename "promt" to "prompt"'),
        ({"dialog": chat("a", "b")}, 'chat messages: rename "dialog" to "messages"'),
        ({"foo": 1, "bar\x1b[2J": 2}, r"the keys bar\x1b[2J, foo are of no known format"),
        ({}, "the keys (none) are of no known format"),
        ({"data": [CHOICE]}, "a list of rows has to stand in a file alone"),
        ({"prompt": {"0": "a"}, "response": {"0": "b"}}, "the file is a table by columns"),
        (
            {"conversation_a": chat("a", "b"), "conversation_b": chat("a", "c")},
            '"conversation_b", ',
        ),
        ({**DEMONSTRATION, "helpfulness": 0, "verbosity": 4}, 'a single reply with "helpfulness"'),
        ({"question": "a", "answers": {"text": ["b"]}}, 'prompts: rename "question" to "prompt"'),
        ({"instruction": "a", "generations": ["b", "c"]}, 'rename "generations" to "responses"'),
        ({"prompt": "a", "label": "b"}, 'rename "label" to "response"'),
        ({**TWO, "rank": [2, 1]}, 'neither "ranks" nor "scores"; expected "ranks" (1 is best) or'),
        ({**TWO, "rewards": [0.5, -1]}, 'rename "rewards"'),
        ({**TWO, "scores": [1]}, '"scores" is no list of numbers; expected a score for each of'),
        ({**CHOICE, "chosen_score": 9}, "the chosen reply has the score 9, the rejected one None"),
        ({"prompt": []}, "nothing usable (1 rows: 1 without a prompt dropped)"),
        ({"text": "a", "parent_id": None}, "a message without its dialogue"),
    ],
)
def test_an_unknown_format_says_what_to_rename(row, remedy, tmp_path, capsys):
    not_converted(write(tmp_path / "a.jsonl", row), capsys, remedy)


def test_files_that_are_not_text_have_a_remedy(tmp_path, capsys):
    for content, remedy in (
        (b"PAR1\x15\x04", "the file is Parquet; expected JSON Lines: pandas.read_parquet"),
        (json.dumps(COMPLETION).encode("utf-16"), "the file is UTF-16; expected UTF-8: iconv"),
        (gzip.compress(line_of(COMPLETION)), "the file is gzipped; expected a name that ends"),
        (
            bz2.compress(line_of(COMPLETION)),
            "the file is packed, not by gzip; expected it unpacked",
        ),
        (lzma.compress(line_of(COMPLETION)), "the file is packed, not by gzip"),
        (b"\x28\xb5\x2f\xfd\x04\x00", "the file is packed, not by gzip"),
        (b"PK\x03\x04\x14\x00", "the file is packed, not by gzip"),
        (b"prompt,completion\na,b\n", "no JSON; expected JSON Lines, a JSON array, or a name that"),
    ):
        (tmp_path / "a.jsonl").write_bytes(content)
        not_converted(tmp_path / "a.jsonl", capsys, remedy)


def test_the_case_of_a_name_says_nothing(tmp_path):
    contents = {
        "A.CSV": b"prompt,completion\nSay hi., hi\n",
        "A.TSV.GZ": gzip.compress(b"prompt\tcompletion\nSay hi.\t hi\n"),
        "A.JSONL.GZ": gzip.compress(line_of(COMPLETION)),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert converted(tmp_path / name) == [{"prompt": "Say hi.", "response": " hi"}]
    (tmp_path / "A.TXT").write_text("Once.")
    assert converted(tmp_path / "A.TXT") == [{"text": "Once."}] == converted(tmp_path)
    save_records(tmp_path / "B.GZ", [DEMONSTRATION])
    assert load_demonstrations(tmp_path / "B.GZ") == [DEMONSTRATION]


@pytest.mark.parametrize("indent", [1, 4])
def test_objects_that_take_several_lines(indent, tmp_path, capsys):
    rows = [COMPLETION, {"prompt": "}\n{", "completion": "}", "extra": {"a": [{}]}}]
    lines = [json.dumps(row, indent=indent) for row in rows]
    expected = [{"prompt": row["prompt"], "response": row["completion"]} for row in rows]
    for n in (1, 2):
        (path := tmp_path / "a.json").write_text("\n" + "\n\n".join(lines[:n]) + "\n")
        assert converted(path) == expected[:n]
    path.write_text(
        "\n".join([*lines, json.dumps({"prompt": 1, "completion": "b"}, indent=indent)])
    )
    line = 1 + sum(text.count("\n") + 1 for text in lines)
    not_converted(path, capsys, f'a.json:{line}: "prompt" is of type int')
    path.write_text("\n".join([*lines, "{"]))
    not_converted(path, capsys, "a.json:", "not JSON")


@pytest.mark.parametrize("read", [load_demonstrations, converted])
def test_a_key_that_occurs_twice_and_nan_are_named(read, tmp_path):
    for extra, wrong in (
        ('"prompt": "b"', "the key prompt occurs twice in an object"),
        ('"x": {"a": 1, "b": 2, "a": 1}', "the key a occurs twice in an object"),
        ('"x": NaN', "no number in JSON: 'NaN'"),
        ('"x": -Infinity', "no number in JSON: '-Infinity'"),
    ):
        row = json.dumps(DEMONSTRATION)
        (tmp_path / "a.jsonl").write_text(f"{row}\n{row[:-1]}, {extra}}}\n")
        with pytest.raises(DataError, match=rf"a\.jsonl:2: not JSON: {re.escape(wrong)}"):
            read(tmp_path / "a.jsonl")


def test_a_reply_with_its_grade_is_learnt_only_if_that_is_wanted(tmp_path):
    path = write(tmp_path / "a.jsonl", {**DEMONSTRATION, "score": 0.5})
    with pytest.raises(DataError, match='"responses" with "scores"; or --demonstrations'):
        convert.read(path)
    assert converted(path, "demonstrations") == [DEMONSTRATION]
    assert converted(path, "prompts") == [{"prompt": "Say hi."}]


def test_the_last_reply_and_kinds_are_flags(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", {"messages": chat("a", "b", "c", "d")})
    out = tmp_path / "b.jsonl"
    convert.main([str(path), str(out), "--last"])
    printed = capsys.readouterr().out
    assert "1 rows: 1 turns before the last reply left out; 1 demonstrations written" in printed
    assert 'the prompts are dialogues: train with --template "{prompt}"' in printed
    assert load_demonstrations(out)[0]["response"] == " d"
    with pytest.raises(SystemExit) as exit:
        convert.main([str(path), str(out), "--prompts", "--demonstrations"])
    assert exit.value.code == 2 and "not allowed with" in capsys.readouterr().err


# Good rows of each format, and the places where a value of another type is a fault.
ESSENTIAL = {
    "scored": [("prompt",), ("responses", 0), ("scores", 1), ("scores",), ("responses",)],
    "completions": [("prompt",), ("completion",)],
    "choices": [("prompt",), ("chosen",), ("rejected",)],
    "choices of chats": [
        ("chosen", 0, "role"),
        ("chosen", 1, "content"),
        ("rejected", 1),
        ("rejected",),
    ],
    "messages": [
        ("messages",),
        ("messages", 0),
        ("messages", 1, "role"),
        ("messages", 3, "content"),
    ],
    "conversations": [("conversations", 0, "from"), ("conversations", 1, "value")],
    "history": [("history", 0), ("history", 0, 1), ("history",), ("system",), ("instruction",)],
    "graded": [
        ("completions", 0),
        ("completions", 1, "response"),
        ("completions", 2),
        ("instruction",),
    ],
    "questions": [("question",), ("chosen",), ("rejected",)],
    "turns": [("conversation", 0), ("conversation", 1, "input"), ("conversation", 1, "output")],
}
GOOD = {name: row for name, (row, _, _) in READERS.items()}
GOOD["history"] = {**ALPACA, "history": [["a", "b"]], "system": "Be terse."}
GOOD["graded"] = {"instruction": "a", "completions": GRADES}
GOOD["questions"] = {"question": "a", "chosen": "b", "rejected": "c"}
GOOD["turns"] = {"conversation": TURN}
MALFORMED = 30  # generated inputs for each format
FAULTS = st.sampled_from([True, 7, -0.5, "a\0", "\ud800", [["a"]], [7], {"a": 1}])


@settings(few, max_examples=400)
@given(
    name=st.sampled_from(sorted(ESSENTIAL)),
    place=st.integers(0, 9),
    fault=FAULTS | st.lists(st.booleans(), min_size=1) | st.floats(),
    good_before=st.integers(0, 2),
    container=st.sampled_from(["lines.jsonl", "array.json", "packed.jsonl.gz"]),
)
def test_malformed_rows_of_every_format(folder, name, place, fault, good_before, container):
    row = json.loads(json.dumps(GOOD[name]))
    *path, last = ESSENTIAL[name][place % len(ESSENTIAL[name])]
    target = row
    for step in path:
        target = target[step]
    if path == ["scores"] and type(fault) in (int, float):
        fault = str(fault)  # a number is no fault there
    target[last] = fault
    rows = [GOOD[name]] * good_before + [row]
    content = b"".join(map(line_of, rows))
    if container == "array.json":
        content = json.dumps(rows).encode()
    refused_whole(folder / container, content)


def refused_whole(source: Path, content: bytes) -> None:
    """The converter says one line about this content, ends with status 2, and writes nothing."""
    source.write_bytes(gzip.compress(content) if source.suffix == ".gz" else content)
    (out := source.with_name("converted.jsonl")).unlink(missing_ok=True)
    printed, error = io.StringIO(), io.StringIO()
    with redirect_stdout(printed), redirect_stderr(error), pytest.raises(SystemExit) as exit:
        convert.main([str(source), str(out)])
    assert exit.value.code == 2 and printed.getvalue() == "" and not out.exists()
    assert ONE_LINE.fullmatch(error.getvalue().removeprefix("error: ").rstrip("\n"))
    assert error.getvalue().count("\n") == 1


def damage(row: dict, draw: random.Random) -> bytes:
    """The row as a line that no reader may accept."""
    line, key = json.dumps(row), draw.choice(list(row))
    at, value = draw.randrange(1, len(line)), json.dumps(row[key])
    return draw.choice(
        [
            line[:at].encode(),  # cut off
            line[at:].encode(),
            (line[:at] + "\0" + line[at:]).encode(),
            line[:at].encode() + b"\xff" + line[at:].encode(),
            f'{line[:-1]}, "{key}": {value}}}'.encode(),  # the key twice
            line.replace(value, draw.choice(["NaN", "Infinity", "-Infinity", "'a'"]), 1).encode(),
            line.replace(value, value[:1] + value, 1).encode(),
            json.dumps({f"my_{name}": x for name, x in row.items()}).encode(),
            json.dumps([row]).encode() + b"]",
            json.dumps(list(row)).encode(),
        ]
    )


@pytest.mark.parametrize(
    "name", [name for name in GOOD if name in ESSENTIAL or READERS[name][1] is converted]
)
def test_generated_malformed_inputs_are_one_line(name, tmp_path):
    draw = random.Random(name)
    for _ in range(MALFORMED):
        rows = [line_of(GOOD[name])] * draw.choice([0, 0, 1, 2])
        rows.insert(draw.randint(0, len(rows)), damage(GOOD[name], draw) + b"\n")
        source = tmp_path / draw.choice(["a.jsonl", "a.json", "a", "a.jsonl.gz"])
        refused_whole(source, b"".join(rows))


def test_books_become_documents(tmp_path, capsys):
    book = {"title": "A", "author": "B", "text": "# I\r\n\r\nOnce.\r\n"}
    out = tmp_path / "out.jsonl.gz"
    convert.main([str(write(tmp_path / "a.jsonl", book)), str(out)])
    assert load_texts(out) == ["# I\n\nOnce.\n"]
    assert "\n1 rows: 11 characters; 1 texts written to " in capsys.readouterr().out


# ---- the checker ----


@pytest.mark.parametrize(
    "kind, command",
    [
        ("demonstrations", "python sft.py --demonstrations FILE"),
        ("comparisons", "python reward.py --labeler file --comparisons FILE"),
        ("prompts", "python ppo.py --prompts FILE"),
        ("texts", "python sft.py --texts FILE"),
    ],
)
def test_the_checker_sees_the_kind_and_says_which_stage_takes_it(kind, command, tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", READERS[kind][0])
    check.main([str(path), "--tokenizer", "toy"])
    printed = capsys.readouterr().out
    assert f"a.jsonl: 1 {kind}, all sound" in printed
    assert command.replace("FILE", str(path)) in printed


def test_the_checker_does_not_guess_at_foreign_rows(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", {"question": "a"})
    wrong = "a.jsonl:1: the row is of no known kind; expected one of"
    refused(lambda: check.main([str(path), "--tokenizer", "toy"]), capsys, wrong)


def test_the_checker_reports(tmp_path, capsys):
    rows = [
        {"prompt": "a", "responses": ["b", "b b b"], "ranks": [2, 1]},
        {"prompt": "a", "responses": ["b", "b b b"], "ranks": [1, 2]},
        {"prompt": "a" * 100, "responses": ["b b", "b b b", "b"], "ranks": [1, 1, 3]},
    ]
    path = write(tmp_path / "a.jsonl", *rows)
    check.main([str(path), "--tokenizer", "toy", "--block_size", "40", "--template", "{prompt}"])
    out = capsys.readouterr().out
    assert "4 of 7 (57.1%) fit into 40 tokens of context" in out
    assert "responses a prompt: K = 2: 2, K = 3: 1" in out and "ties: 1 of 5 pairs" in out
    assert "the longer response wins 75.0%" in out and "of 4 decided pairs" in out
    assert out.count("====") == 6  # three examples


def test_the_checker_counts_pairs_of_equal_length_and_prompts_that_occur_again(tmp_path, capsys):
    row = {"prompt": "a", "responses": ["yes", "no"], "ranks": [1, 2]}  # one token each
    path = write(tmp_path / "a.jsonl", row, row, {**row, "prompt": "b"})
    check.main([str(path), "--tokenizer", "toy"])
    out = capsys.readouterr().out
    assert "decided: 3 pairs, 3 of them with responses of equal length" in out
    assert "1 of 2 different prompts occur more than once" in out and "wins" not in out


MISREAD = {  # rows of other formats, which a loader would misread, and what may still be loaded
    "scores": (SCORED, ["prompts"]),
    "choices": (CHOICE, []),
    "choices of chats": (CHOICE_OF_CHATS, []),
    "HH": (PAIR, []),
    "completions": (COMPLETION, []),
    "messages": ({"messages": chat("a", "b")}, []),
    "messages beside a prompt": ({"prompt": "a", "messages": chat("a", "b")}, []),
    "conversations": ({"conversations": share("a", "b")}, []),
    "instructions": (ALPACA, []),
}


@pytest.mark.parametrize("name", MISREAD)
@pytest.mark.parametrize("kind", ["", "demonstrations", "comparisons", "prompts", "texts"])
def test_what_would_be_misread_is_refused(name, kind, tmp_path, capsys):
    row, loadable = MISREAD[name]
    path = write(tmp_path / "a.jsonl", row)
    flags = ["--kind", kind] if kind else []
    if kind in loadable:
        return check.main([str(path), "--tokenizer", "toy", *flags])
    run = [str(path), "--tokenizer", "toy", *flags]
    error = refused(lambda: check.main(run), capsys, "python -m data.convert")
    assert ONE_LINE.fullmatch(error.strip())
    if kind:
        with pytest.raises(DataError, match="python -m data.convert"):
            READERS[kind][1](path)


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_array_is_told_to_convert(indent, tmp_path, capsys):
    (path := tmp_path / "a.json").write_text(json.dumps([DEMONSTRATION] * 2, indent=indent))
    parts = ("the file is a JSON array", "python -m data.convert")
    refused(lambda: check.main([str(path), "--tokenizer", "toy"]), capsys, *parts)


def test_a_sequence_with_its_end_of_text_has_to_fit(tmp_path, capsys):
    encode = check.get_tokenizer("toy").encode_ordinary
    path = write(tmp_path / "a.jsonl", DEMONSTRATION)
    n = len(encode("Say hi.\n")) + len(encode("hi")) + 1
    for block_size, fitting in ((n, 1), (n - 1, 0)):
        check.main([str(path), "--tokenizer", "toy", "--block_size", str(block_size)])
        assert f"{fitting} of 1 ({fitting:.1%}) fit into {block_size}" in capsys.readouterr().out


def test_the_checker_fills_the_template_and_escapes(tmp_path, capsys):
    words = "{0} {prompt} \x1b[2J\u202e<|endoftext|>"
    path = write(tmp_path / "a.jsonl", {"prompt": words, "response": words})
    check.main([str(path), "--tokenizer", "toy", "--template", "Q: {prompt}\nA:"])
    out = capsys.readouterr().out
    assert "Q: {0} {prompt} \\x1b[2J\\u202e<|endoftext|>\nA:" in out
    assert all(c.isprintable() or c == "\n" for c in out)


def test_a_literal_end_of_text_is_plain_text_to_the_checker(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", {"text": "<|endoftext|>"})
    check.main([str(path), "--tokenizer", "toy"])
    mean = re.search(r"^response +([\d.]+)", capsys.readouterr().out, re.MULTILINE)
    assert mean and float(mean[1]) > 1  # spelled out, and not the one control token


@pytest.mark.parametrize("flag, value", [("--template", "Q: {}"), ("--tokenizer", "none.tiktoken")])
def test_the_checker_refuses_bad_flags(flag, value, tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", DEMONSTRATION)
    refused(lambda: check.main([str(path), "--tokenizer", "toy", flag, value]), capsys)


def test_longer_wins_by_hand():
    # first prompt: 3 > 1 wins, 3 > 2 wins, 2 and 1 are a tie; second: equal lengths; third: loses
    lengths, ranks = [[3, 1, 2], [4, 4], [1, 9]], [[1, 2, 2], [1, 2], [1, 2]]
    share, half_width, n = records.pair_accuracy(lengths, ranks)
    assert (share, n) == (pytest.approx(2 / 3), 3)
    residuals = [2 - 2 / 3 * 2, 0, 0 - 2 / 3 * 1]
    assert half_width == pytest.approx(1.96 * sum(r * r for r in residuals) ** 0.5 / 3)
    assert records.pair_accuracy([[1, 1]], [[1, 2]]) == (0, 0, 0)
    # with one pair a prompt it is the interval of a proportion
    lengths, ranks = [[2, 1]] * 10, [[1, 2]] * 6 + [[2, 1]] * 4
    share, half_width, n = records.pair_accuracy(lengths, ranks)
    assert (share, n) == (0.6, 10) and half_width == pytest.approx(1.96 * (0.24 / 10) ** 0.5)


# ---- as a user would ----


def shell(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")


def test_the_command_lines_as_processes(tmp_path):
    path, out = write(tmp_path / "a.jsonl", PAIR), tmp_path / "out.jsonl"
    done = shell("data.convert", str(path), str(out))
    assert (done.returncode, done.stderr) == (0, "") and "1 rows; 1 comparisons" in done.stdout
    done = shell("data", str(out), "--tokenizer", "toy")
    assert (done.returncode, done.stderr) == (0, "") and "1 comparisons, all sound" in done.stdout
    path.write_text("{")
    for words in (("data.convert", str(path), str(out)), ("data", str(path), "--tokenizer", "toy")):
        done = shell(*words)
        assert done.returncode == 2 and done.stdout == ""
        assert re.fullmatch(r"error: \S+a\.jsonl:1: not JSON: [^\n]+\n", done.stderr)
    assert len(load_comparisons(out)) == 1  # the old file


def test_a_reader_who_has_seen_enough_ends_the_checker_quietly(tmp_path):
    path = write(tmp_path / "a.jsonl", DEMONSTRATION)
    command = [sys.executable, "-m", "data", str(path), "--tokenizer", "toy"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        process.stdout.close()  # as `head` does
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.parametrize("module", ["data", "data.convert"])
def test_no_output_fails_for_its_encoding(module, tmp_path):
    words = "“ça” 🤖"
    path = write(tmp_path / "Köpf 🤖.jsonl", {"prompt": words, "response": words})
    command = [sys.executable, "-m", module, str(path)]
    command += ["--tokenizer", "toy"] if module == "data" else [str(tmp_path / "🤖.jsonl")]
    for encoding in ("ascii", "cp1252"):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, env=environment)
        assert (done.returncode, done.stderr) == (0, b"") and b"\\U0001f916" in done.stdout


# ---- the real files ----


def real(name: str) -> Path:
    if not (REAL / name).exists():
        pytest.skip(f"needs {name}, a public data set that is not part of this repository")
    return REAL / name


@pytest.fixture
def gpt2(monkeypatch) -> Callable[[str], list[int]]:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(real("tiktoken_cache")))
    return check.get_tokenizer("gpt2").encode_ordinary


def statistics(encode: Callable[[str], list[int]], texts: list[str]) -> tuple[int, ...]:
    lengths = [len(encode(words)) for words in texts]
    p50, p95 = np.percentile(lengths, [50, 95])
    return round(np.mean(lengths)), round(p50), round(p95), max(lengths)


def baseline(encode: Callable[[str], list[int]], rows: list) -> float:
    lengths = [[len(encode(words)) for words in row["responses"]] for row in rows]
    return records.pair_accuracy(lengths, [row["ranks"] for row in rows])[0]


def test_real_helpful_base(gpt2):
    path = real("hh/helpful-base.test.jsonl.gz")
    _, _, comparisons, counts = convert.read(path)
    assert counts["rows"] == 2_354 and counts["without signal dropped"] == 2
    assert counts["with an empty rejected reply kept"] == 4 and counts["diverging dropped"] == 0
    assert len(comparisons) == 2_352
    assert len(converted(path, "demonstrations")) == 2_350
    assert baseline(gpt2, comparisons) == pytest.approx(0.608, abs=0.002)
    whole = [c["prompt"] + c["responses"][c["ranks"].index(1)] for c in comparisons]
    assert statistics(gpt2, whole) == pytest.approx((196, 162, 468, 987), abs=1)


def test_real_harmless_base(gpt2):
    _, _, comparisons, counts = convert.read(real("hh/harmless-base.test.jsonl.gz"))
    assert counts["rows"] == 2_312 and counts["with an empty chosen reply dropped"] == 4
    assert len(comparisons) == 2_308
    assert baseline(gpt2, comparisons) == pytest.approx(0.442, abs=0.002)


def test_real_oasst(gpt2):
    _, _, comparisons, counts = convert.read(real("oasst/en_100_tree.jsonl"))
    assert counts["groups of replies"] == 254 and len(comparisons) == 212
    assert counts["groups in synthetic trees kept"] == 5
    sizes = [len(row["ranks"]) for row in comparisons]
    assert min(sizes) == 2 and max(sizes) == 9
    # K (K - 1) / 2 summed over all replies is 757; one reply of a group of four has no rank
    assert counts["replies without a rank dropped"] == 1
    assert sum(k * (k - 1) // 2 for k in sizes) == 757 - 3
    assert baseline(gpt2, comparisons) == pytest.approx(0.702, abs=0.002)
    assert 0.3 < np.mean([row["ranks"][0] == 1 for row in comparisons]) < 0.5  # no order leaks


def test_real_instructions(gpt2):
    demonstrations = converted(real("llms_from_scratch/instruction-data.json"))
    assert len(demonstrations) == 1_100
    assert statistics(gpt2, [row["response"] for row in demonstrations]) == (12, 11, 26, 50)
    path = real("llms_from_scratch/instruction-data-with-preference.json")
    _, kind, comparisons, counts = convert.read(path)
    assert kind == "comparisons" and len(comparisons) == 1_094
    assert counts["rows"] == 1_100 and counts["without signal dropped"] == 6


def test_real_texts(gpt2):
    [shakespeare] = load_texts(real("text/tinyshakespeare.txt"))
    assert len(gpt2(shakespeare)) == 338_025
    books = converted(real("text/books_children.jsonl.gz"))
    assert len(books) == 48 and not any("\r\n" in book["text"] for book in books)


def test_real_snippets():
    format, kind, found, counts = convert.read(real("sentiment/sentence_polarity.zip"))
    assert counts["rows"] == 2 * 5_331 and len(found) == 9_415  # those of ten words at least
    assert all(row["text"].split() == (row["prompt"] + row["response"]).split() for row in found)


@pytest.mark.parametrize(
    "name, kind, rows",
    [
        ("array_of_demonstrations.json", "demonstrations", 6),
        ("equal_lengths.jsonl", "comparisons", 12),
        ("first_prompts_longer_than_the_context.jsonl", "demonstrations", 21),
        ("instruction_with_history.json", "demonstrations", 1),
        ("messages_with_system.jsonl", "demonstrations", 6),
        ("one_demonstration.jsonl", "demonstrations", 1),
        ("preference.jsonl", "comparisons", 6),
        ("preference_messages.jsonl", "comparisons", 6),
        ("prompt_completion.jsonl", "demonstrations", 6),
        ("scores.jsonl", "comparisons", 3),
    ],
)
def test_small_cases(name, kind, rows):
    _, found_kind, found, counts = convert.read(real(f"../cases/data/{name}"))
    assert (found_kind, counts["rows"], len(found)) == (kind, rows, rows)
    if name == "scores.jsonl":
        assert all(row["ranks"] == [2, 1] for row in found)
    if name == "instruction_with_history.json":
        assert "The first is red." in found[0]["prompt"]
    if name == "messages_with_system.jsonl":
        assert all("You are terse." in row["prompt"] for row in found)


def test_the_rows_shown_in_the_readme_convert(tmp_path):
    text = (ROOT / "data/README.md").read_text("utf-8")
    shown = [line.strip() for line in text.splitlines() if line.startswith("    {")]
    kinds = []
    for line in shown:
        if "[…]" not in line and ", …" not in line:
            (path := tmp_path / "a.jsonl").write_text(line, "utf-8")
            kinds.append(convert.read(path)[1])
    assert kinds == ["comparisons"] * 5 + ["demonstrations"] * 5 + ["texts"]


def test_a_converter_does_not_write_over_a_second_text(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("mine")
    with pytest.raises(SystemExit) as ended:
        convert.main([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")])
    assert ended.value.code == 2 and "expected *.jsonl or *.jsonl.gz" in capsys.readouterr().err
    assert (tmp_path / "b.txt").read_text() == "mine"
