"""Records, converters and the checker: good files, bad files, and the oddities of real ones."""

import gzip
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import __main__ as check
from data import hh, instructions, oasst, records, text
from data.records import (
    DataError,
    load_comparisons,
    load_demonstrations,
    load_prompts,
    load_texts,
    printable,
    save_records,
)

ROOT = Path(__file__).parents[1]
REAL = Path(__file__).parents[2] / "shared" / "data"
ONE_LINE = re.compile(r"[^\n]+:(\d+): [^\n]+; expected [^\n]+")

# ---- what each reader accepts ----

HUMAN = "\n\nHuman: hello\n\nAssistant:"
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


def converter(module, *flags: str) -> Callable[[Path, Path], None]:
    return lambda path, out: module.main([str(path), str(out), *flags])


READERS: dict[str, Reader] = {
    "demonstrations": (DEMONSTRATION, load_demonstrations, checker("demonstrations")),
    "comparisons": (COMPARISON, load_comparisons, checker("comparisons")),
    "prompts": ({"prompt": "Say hi."}, load_prompts, checker("prompts")),
    "texts": ({"text": "Once."}, load_texts, checker("texts")),
    "hh": (PAIR, hh.read_hh, converter(hh)),
    "oasst": (TREE, oasst.read_oasst, converter(oasst)),
    "instructions": (ALPACA, instructions.read_instructions, converter(instructions)),
    "preferences": (
        PREFERENCE,
        lambda path: instructions.read_instructions(path, comparisons=True),
        converter(instructions, "--comparisons"),
    ),
    "text": ({"text": "Once."}, text.read_documents, converter(text)),
}


def line_of(row: object) -> bytes:
    return json.dumps(row).encode() + b"\n"


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
    "null": None,
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
BLANK_TEXTS = {"empty": "", "blank": " \r\n\t\u3000"}
TEXT_KEYS = [  # reader, key, may it be blank (then the row is kept, or dropped and counted)
    ("demonstrations", "prompt", False),
    ("demonstrations", "response", False),
    ("comparisons", "prompt", False),
    ("prompts", "prompt", False),
    ("texts", "text", False),
    ("hh", "chosen", False),
    ("hh", "rejected", False),
    ("instructions", "instruction", False),
    ("instructions", "input", True),
    ("instructions", "output", True),
    ("preferences", "instruction", False),
    ("preferences", "chosen", True),
    ("preferences", "rejected", True),
    ("text", "text", False),
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
    for name, key, may_be_blank in TEXT_KEYS:
        good = READERS[name][0]
        for case, value in (BAD_TEXTS if may_be_blank else BAD_TEXTS | BLANK_TEXTS).items():
            add_row(name, f"{key}: {case}", {**good, key: value})
        if key != "input":
            add_row(name, f"{key} missing", {**good, key: ...})
    for case, fields in BAD_COMPARISONS.items():
        add_row("comparisons", case, {**COMPARISON, **fields})
    for name, bad_rows in (("oasst", BAD_TREES), ("hh", BAD_DIALOGUES)):
        for case, row in bad_rows.items():
            add_row(name, case, row)
    for name in ("instructions", "preferences"):
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
        (".txt of blanks", b"a" + b"\n" * 1_000_000 + b"b", 1),
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
    with pytest.raises(SystemExit) as exit:
        main(path, out)
    captured = capsys.readouterr()
    assert exit.value.code == 2 and captured.out == ""
    assert ONE_LINE.fullmatch(captured.err.strip()) and captured.err.startswith("error: ")
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
    with pytest.raises(SystemExit) as exit:
        READERS[name][2](path, tmp_path / "out.jsonl")
    error = capsys.readouterr().err
    assert exit.value.code == 2 and ONE_LINE.fullmatch(error.strip()) and "nothing usable" in error
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("name", READERS)
def test_a_missing_file_and_a_folder_are_one_line(name, tmp_path, capsys):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(SystemExit) as exit:
            READERS[name][2](path, tmp_path / "out.jsonl")
        error = capsys.readouterr().err
        assert exit.value.code == 2 and re.fullmatch("error: [^\n]+\n", error)
        assert str(path) in error and not (tmp_path / "out.jsonl").exists()


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
        (b" " * TEN_MB, False),
    ],
    ids=lambda value: repr(value[:24]) if isinstance(value, bytes) else str(value),
)
def test_a_line_of_ten_megabytes_is_no_trouble(content, loads, tmp_path):
    (path := tmp_path / "long.jsonl").write_bytes(content)
    start = time.perf_counter()
    if loads:
        assert len(load_comparisons(path)) == 1
    else:
        with pytest.raises(DataError) as error:
            load_comparisons(path)
        assert len(str(error.value)) < 500
    assert time.perf_counter() - start < 5


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
    assert load_texts(tmp_path / "b.txt") == ["second\n\nline\x85"]
    assert load_texts(tmp_path) == ["first", "second\n\nline\x85"]
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
    with pytest.raises(DataError, match=r"a\.jsonl:2: cannot write the lone surrogate U\+D800"):
        save_records(path, [DEMONSTRATION, {"prompt": "a", "response": "b\ud800"}])

    def fail(*_):
        raise OSError("disk full")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
            patch.setattr(os, step, fail)
            save_records(path, [])
    assert load_demonstrations(path) == [DEMONSTRATION]
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_converter_may_write_over_its_source(tmp_path):
    path = write(tmp_path / "a.jsonl", ALPACA)
    instructions.main([str(path), str(path)])
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
KEYS = sorted({key for good, _, _ in READERS.values() for key in good} | {"ranks", "context"})
MESSAGE_KEYS = st.sampled_from(["role", "text", "replies", "rank", "deleted"])
ANY_VALUE = (
    ANY_JSON
    | ANY_TEXT.map(lambda words: f"{HUMAN}{words}")
    | st.lists(ANY_TEXT | st.integers(-1, 4), max_size=4)
    | st.dictionaries(MESSAGE_KEYS, ANY_JSON, max_size=5)
)
ANY_ROW = st.dictionaries(st.sampled_from(KEYS), ANY_VALUE, max_size=6)
few = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("any")


def load_or_refuse(path: Path) -> None:
    """Reads the file in every way: sound records, or one line that says why not."""
    for _, read, _ in READERS.values():
        try:
            result = read(path)
        except DataError as error:
            assert ONE_LINE.fullmatch(str(error)) and str(error).isprintable()
            continue
        rows = result[0] if isinstance(result, tuple) else result
        save_records(path.with_name("again.jsonl"), [{"any": row} for row in rows])


@few
@given(content=st.binary(max_size=64), packed=st.booleans())
def test_any_bytes_load_or_are_refused_in_one_line(folder, content, packed):
    (path := folder / ("a.jsonl.gz" if packed else "a.jsonl")).write_bytes(content)
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
    row = records.rank_shuffled(prompt, responses, ranks)
    assert row == records.rank_shuffled(prompt, responses, ranks)
    assert sorted(row["responses"]) == responses
    assert all(
        ranks[int(text)] == r for text, r in zip(row["responses"], row["ranks"], strict=True)
    )


def test_the_place_in_the_list_says_nothing_about_the_rank():
    rows = [records.rank_shuffled(f"{i}", ["a", "b", "c"], [1, 2, 3]) for i in range(3_000)]
    for place in range(3):
        share = np.mean([row["ranks"][place] == 1 for row in rows])
        assert abs(share - 1 / 3) < 0.035  # four standard errors


# ---- Anthropic HH ----


def test_hh_prompt_is_the_shared_dialogue_up_to_its_last_tag(tmp_path):
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    row = {"chosen": f"{start} same start, good", "rejected": f"{start} same start, bad"}
    [comparison], counts = hh.read_hh(write(tmp_path / "a.jsonl", row))
    assert comparison["prompt"] == start
    by_rank = dict(zip(comparison["ranks"], comparison["responses"], strict=True))
    assert by_rank == {1: " same start, good", 2: " same start, bad"}
    assert +counts == {"pairs": 1}


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
    comparisons, counts = hh.read_hh(write(tmp_path / "a.jsonl", row))
    assert +counts == {"pairs": 1} | ({oddity: 1} if oddity else {})
    if oddity and oddity.endswith("dropped"):
        assert comparisons == []
        return
    [comparison] = comparisons
    assert comparison["prompt"] == start and sorted(comparison["ranks"]) == [1, 2]
    assert comparison["responses"][comparison["ranks"].index(1)] == chosen
    assert comparison["responses"][comparison["ranks"].index(2)] == rejected
    best = hh.best_replies(comparisons)  # nobody should imitate a reply that speaks for the human
    turns = "\n\nHuman:" in chosen or "\n\nAssistant:" in chosen
    assert best == ([] if turns else [{"prompt": start, "response": chosen}])


def test_hh_transcripts_that_share_no_prompt_are_dropped(tmp_path, capsys):
    diverging = {
        "chosen": "\n\nHuman: a\n\nAssistant: b",
        "rejected": "\n\nHuman: c\n\nAssistant: d",
    }
    path = write(tmp_path / "a.jsonl", PAIR, diverging, PAIR)
    comparisons, counts = hh.read_hh(path)
    assert len(comparisons) == 2 and counts["diverging dropped"] == 1
    hh.main([str(path), str(tmp_path / "out.jsonl")])
    printed = capsys.readouterr().out
    assert printed.startswith("3 pairs: 1 diverging dropped; 2 records written to ")
    assert load_comparisons(tmp_path / "out.jsonl") == comparisons


@few
@given(st.lists(SOUND_TEXT, min_size=1, max_size=3), VISIBLE_TEXT, VISIBLE_TEXT)
def test_hh_split_loses_nothing(turns, chosen, rejected):
    start = "".join(f"\n\nHuman: {turn}\n\nAssistant:" for turn in turns)
    prompt, better, worse = hh.split_pair(start + chosen, start + rejected)
    assert prompt + better == start + chosen and prompt + worse == start + rejected
    assert prompt.startswith(start) and prompt.endswith("\n\nAssistant:")
    shared = os.path.commonprefix([better, worse])
    assert "\n\nAssistant:" not in shared


def test_hh_writes_demonstrations(tmp_path):
    path, out = write(tmp_path / "a.jsonl", PAIR), tmp_path / "out.jsonl"
    hh.main([str(path), str(out), "--demonstrations"])
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
        hh.main(["harmless-base/train", "out.jsonl"])
    assert len(calls) == 1 and calls[0].endswith(
        "/hh-rlhf/resolve/main/harmless-base/train.jsonl.gz"
    )
    assert len(load_comparisons("out.jsonl")) == 1


def test_hh_offline_says_what_to_do(tmp_path, monkeypatch, capsys):
    hub = pytest.importorskip("torch.hub")

    def offline(url: str, dst: str) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "download_url_to_file", offline)
    with pytest.raises(SystemExit) as exit:
        hh.main(["helpful-base/test", "out.jsonl"])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and re.fullmatch("error: [^\n]+\n", error)
    assert "helpful-base/test.jsonl.gz" in error and "give its path" in error
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
    comparisons, counts = oasst.read_oasst(
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
        "groups of replies": 3,
        "in synthetic trees kept": 2,
        "deleted or rejected replies dropped": 2,
        "without a rank beside ranked replies dropped": 1,
        "with fewer than two ranks dropped": 1,
    }


def test_oasst_null_rank_is_no_rank_and_equal_ranks_tie(tmp_path):
    replies = [message("a", rank=0), message("b", rank=0), message("c", rank=None)]
    [comparison], _ = oasst.read_oasst(write(tmp_path / "a.jsonl", tree(*replies)))
    assert sorted(comparison["responses"]) == [" a", " b"] and comparison["ranks"] == [1, 1]


def test_oasst_survives_a_thread_deeper_than_the_stack():
    thread = message("end", rank=0)
    for depth in range(5_000):
        thread = message("on", thread, role=("prompter", "assistant")[depth % 2])
    found = list(oasst.walk(records.Row("a", 1, thread), Counter()))
    assert len(found) == 2_500


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
        demonstrations, counts = instructions.read_instructions(path)
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
        instructions.read_instructions(path)


def test_preferences_become_comparisons(tmp_path, capsys):
    rows = [PREFERENCE, {**PREFERENCE, "rejected": "2 "}, {**PREFERENCE, "rejected": ""}]
    path, out = write(tmp_path / "a.jsonl", *rows), tmp_path / "out.jsonl"
    instructions.main([str(path), str(out), "--comparisons"])
    assert capsys.readouterr().out.startswith(
        "3 rows: 1 with an empty rejected reply kept, 1 without signal dropped; 2 records written"
    )
    loaded = load_comparisons(out)
    assert [row["prompt"] for row in loaded] == ["Add.", "Add."]
    assert [row["responses"][row["ranks"].index(1)] for row in loaded] == ["2", "2"]


def test_books_become_documents(tmp_path, capsys):
    book = {"title": "A", "author": "B", "text": "# I\r\n\r\nOnce.\r\n"}
    out = tmp_path / "out.jsonl.gz"
    text.main([str(write(tmp_path / "a.jsonl", book)), str(out)])
    assert load_texts(out) == ["# I\n\nOnce.\n"]
    assert capsys.readouterr().out.startswith("1 documents: 11 characters; 1 records written to ")


# ---- the checker ----


@pytest.mark.parametrize("name", ["demonstrations", "comparisons", "prompts", "texts"])
def test_the_checker_sees_the_kind(name, tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", READERS[name][0])
    check.main([str(path), "--tokenizer", "toy"])
    assert f"a.jsonl: 1 {name}, all sound" in capsys.readouterr().out


def test_the_checker_does_not_guess_at_foreign_rows(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", {"question": "a"})
    with pytest.raises(SystemExit) as exit:
        check.main([str(path), "--tokenizer", "toy"])
    assert exit.value.code == 2
    assert "a.jsonl:1: the row is of no known kind; expected one of" in capsys.readouterr().err


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
    with pytest.raises(SystemExit) as exit:
        check.main(
            [str(write(tmp_path / "a.jsonl", DEMONSTRATION)), "--tokenizer", "toy", flag, value]
        )
    assert exit.value.code == 2 and "error: " in capsys.readouterr().err


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
    done = shell("data.hh", str(path), str(out))
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(
        "1 pairs; 1 records"
    )
    done = shell("data", str(out), "--tokenizer", "toy")
    assert (done.returncode, done.stderr) == (0, "") and "1 comparisons, all sound" in done.stdout
    path.write_text("{")
    for words in (("data.hh", str(path), str(out)), ("data", str(path), "--tokenizer", "toy")):
        done = shell(*words)
        assert done.returncode == 2 and done.stdout == ""
        assert re.fullmatch(r"error: \S+a\.jsonl:1: not JSON: [^\n]+\n", done.stderr)
    assert len(load_comparisons(out)) == 1  # the old file


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
    comparisons, counts = hh.read_hh(real("hh/helpful-base.test.jsonl.gz"))
    assert counts["pairs"] == 2_354 and counts["without signal dropped"] == 2
    assert counts["with an empty rejected reply kept"] == 4 and counts["diverging dropped"] == 0
    assert len(comparisons) == 2_352
    assert len(hh.best_replies(comparisons)) == 2_350
    assert baseline(gpt2, comparisons) == pytest.approx(0.608, abs=0.002)
    whole = [c["prompt"] + c["responses"][c["ranks"].index(1)] for c in comparisons]
    assert statistics(gpt2, whole) == pytest.approx((196, 162, 468, 987), abs=1)


def test_real_harmless_base(gpt2):
    comparisons, counts = hh.read_hh(real("hh/harmless-base.test.jsonl.gz"))
    assert counts["pairs"] == 2_312 and counts["with an empty chosen reply dropped"] == 4
    assert len(comparisons) == 2_308
    assert baseline(gpt2, comparisons) == pytest.approx(0.442, abs=0.002)


def test_real_oasst(gpt2):
    comparisons, counts = oasst.read_oasst(real("oasst/en_100_tree.jsonl"))
    assert counts["groups of replies"] == 254 and len(comparisons) == 212
    assert counts["in synthetic trees kept"] == 5
    sizes = [len(row["ranks"]) for row in comparisons]
    assert min(sizes) == 2 and max(sizes) == 9
    # K (K - 1) / 2 summed over all replies is 757; one reply of a group of four has no rank
    assert counts["without a rank beside ranked replies dropped"] == 1
    assert sum(k * (k - 1) // 2 for k in sizes) == 757 - 3
    assert baseline(gpt2, comparisons) == pytest.approx(0.702, abs=0.002)
    assert 0.3 < np.mean([row["ranks"][0] == 1 for row in comparisons]) < 0.5  # no order leaks


def test_real_instructions(gpt2):
    path = real("llms_from_scratch/instruction-data.json")
    demonstrations, _ = instructions.read_instructions(path)
    assert len(demonstrations) == 1_100
    assert statistics(gpt2, [row["response"] for row in demonstrations]) == (12, 11, 26, 50)
    path = real("llms_from_scratch/instruction-data-with-preference.json")
    comparisons, counts = instructions.read_instructions(path, comparisons=True)
    assert counts["rows"] == 1_100 and counts["without signal dropped"] == 6
    assert len(comparisons) == 1_094


def test_real_texts(gpt2):
    [shakespeare] = load_texts(real("text/tinyshakespeare.txt"))
    assert len(gpt2(shakespeare)) == 338_025
    books, _ = text.read_documents(real("text/books_children.jsonl.gz"))
    assert len(books) == 48 and not any("\r\n" in book["text"] for book in books)
