r"""Files of other projects as our records; data/README.md shows every format.

    python -m data.convert SOURCE OUT                     # its format is told by its keys
    python -m data.convert SOURCE OUT --demonstrations    # the best reply to each prompt
    python -m data.convert SOURCE OUT --prompts           # the prompts alone
    python -m data.convert hh:helpful-base/train OUT      # downloads a part of Anthropic's HH

SOURCE is JSON Lines, a JSON array, CSV or TSV with a header, plain text or a folder of it, gzipped
if the name ends in .gz. A dialogue is laid out as in HH: its prompt is
"\n\nHuman: a question\n\nAssistant:" and its response begins with a space. To train on it, give
--template "{prompt}".
"""

import argparse
import csv
import difflib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from data import formats, records
from data.formats import ASSISTANT, FORMATS, Dropped, Example, Format
from data.records import DataError, Row, UserError
from data.sentiment import read_member

HH_URL = "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main/{}.jsonl.gz"
HH_SUBSETS = ("helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base")
HH = [f"hh:{subset}/{part}" for subset in HH_SUBSETS for part in ("train", "test")]
SYNONYMS = {  # our key: what it is called elsewhere
    "prompt": ("question", "query", "input", "problem"),
    "response": ("answer", "output", "reply", "target", "solution", "label", "summary"),
    "responses": ("answers", "outputs", "replies", "candidates", "completions", "generations"),
    "chosen": ("accepted", "preferred", "better", "positive"),
    "rejected": ("dispreferred", "worse", "negative"),
    "messages": ("dialog", "dialogue", "conversation", "chat", "turns"),
    "text": ("content", "document", "body", "article"),
}
REPLIES = {"chosen", "rejected", "completion", "output", "response"}
GRADES = {"helpfulness", "rating", "reward", "score"}  # of a reply, which may be a bad one
NEXT = {"0": "1", "1": "2", "a": "b", "A": "B"}  # endings of two names
JSON_COLUMNS = re.compile(  # of a table: lists and scores
    r"responses|ranks|scores|messages|conversations|history|score_\w+|\w+_score|\w+[_-]rating"
)


# ---- rows of any file ----


def fetch(source: str) -> Path:
    """The path of a source; an official part of HH, named hh:..., is downloaded once."""
    if not source.startswith("hh:"):
        return Path(source)
    if source not in HH:
        raise UserError(f"{source} does not exist; choose from {', '.join(HH)}")
    import torch.hub  # here, because a local file needs no torch

    url = HH_URL.format(source.removeprefix("hh:"))
    path = Path(torch.hub.get_dir(), "hh-rlhf", *Path(url).parts[-2:])
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))
        except OSError as error:
            remedy = "download it elsewhere and give its path instead"
            raise UserError(f"cannot fetch {url} ({error}); {remedy}") from None
    return path


def read_source(path: Path) -> Iterator[Row]:
    """Yields the rows of a file or folder; a text without rows is a row of its own."""
    if path.is_dir() or records.ends(path, *records.TXT):
        return (Row(path, 1, {"text": text}) for text in records.load_texts(path))
    if path.suffix == ".zip":
        return read_polarity(path)
    if records.ends(path, ".csv", ".tsv", ".csv.gz", ".tsv.gz"):
        return read_table(path)
    lines = ((number, line.strip()) for number, line in records.read_lines(path) if line.strip())
    number, first = next(lines, (1, "{}"))
    if not first.startswith(("[", "{")):
        expected = "JSON Lines, a JSON array, or a name that ends in .csv, .tsv or .txt"
        raise DataError(path, number, "the first line is no JSON", expected)
    is_lines = first.startswith("{") and first.endswith("}")
    return records.read_rows(path) if is_lines else read_array(path)


def read_array(path: Path) -> Iterator[Row]:
    """Yields the objects of a JSON array, or those that take several lines each, and their line."""
    text = "".join(line for _, line in records.read_lines(path))
    if text.lstrip().startswith("{"):
        text = "[" + re.sub(r"(?m)^}(?=\s*{)", "},", text) + "]"
    records.parse_json(path, 1, text)  # a fault anywhere ends here; below counts lines
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,]*")
    line, position = 1, 0
    start = between.match(text, text.index("[") + 1).end()
    while text[start] != "]":
        line += text.count("\n", position, start)
        value, end = decoder.raw_decode(text, start)
        yield records.as_row(path, line, value)
        position, start = start, between.match(text, end).end()


def read_table(path: Path) -> Iterator[Row]:
    """Yields the rows of a CSV or TSV file by the names in its header."""
    lines = [line for _, line in records.read_lines(path)] or [""]
    csv.field_size_limit(2**31 - 1)
    table = csv.reader(lines, delimiter=max("\t,;", key=lines[0].count), strict=True)
    try:
        header = next(table, [])
        if len(set(header)) < len(header):
            raise DataError(path, 1, "a name occurs twice in the header", "names that differ")
        for cells in filter(None, table):  # without blank lines
            if len(cells) != len(header):
                wrong = f"{len(cells)} cells under {len(header)} names"
                raise DataError(path, table.line_num, wrong, "a cell for each name of the header")
            fields = dict(zip(header, cells, strict=True))
            for name in header:  # a prompt or a reply may be a list of messages
                if JSON_COLUMNS.fullmatch(name) or fields[name].lstrip().startswith("[{"):
                    if (cell := fields.pop(name)).strip():
                        fields[name] = records.parse_json(path, table.line_num, cell)
            yield Row(path, table.line_num, fields)
    except csv.Error as error:
        wrong = f"not CSV: {error}"
        raise DataError(path, table.line_num, wrong, "a table with a header") from None


def read_polarity(path: Path) -> Iterator[Row]:
    """Yields the snippets of film reviews in sentence_polarity.zip, of both polarities in turn."""
    both = [read_member(path, f"rt-polarity.{end}").splitlines() for end in ("pos", "neg")]
    for line, pair in enumerate(zip(*both, strict=False), start=1):
        yield from (Row(path, line, {"snippet": snippet.strip()}) for snippet in pair)


# ---- from rows to records ----


class Fields(dict):
    """The fields of a row that say something, and which of them were not read.

    They are neither null nor blank, but for replies. Dropped if the format needs others.
    """

    def __init__(self, fields: dict, format: Format) -> None:
        blank = {key for key, x in fields.items() if isinstance(x, str) and not x.strip()}
        blank -= REPLIES if format.keys - REPLIES else set()  # HH's replies are whole dialogues
        blank |= {key for key, x in fields.items() if x is None} - {"ranks", "scores", "parent_id"}
        super().__init__({key: x for key, x in fields.items() if key not in blank})
        if lacking := format.keys & blank:
            raise Dropped(f'with a blank or null "{min(lacking)}"')
        self.unread = self.keys() - format.keys - {""}  # "" is a table's column of row numbers

    def get(self, key: str, default: object = None) -> object:
        self.unread.discard(key)
        return super().get(key, default)


def recognise(row: Row, kind: str | None) -> Format:
    """The format whose keys the row has; else an error that says what to rename."""
    found = set(row.fields)
    for key, value in row.fields.items():
        first = value[0] if isinstance(value, list) and value else value
        found |= {f"{key}.{name}" for name in first} if isinstance(first, dict) else set()
    if found and all(isinstance(value, dict) and "0" in value for value in row.fields.values()):
        raise row.error("the file is a table by columns", "rows: to_json(B, 'records') in pandas")
    foreign, renames = row.fields.keys() - set().union(*(format.keys for format in FORMATS)), {}
    for key in SYNONYMS.keys() - found:
        others = [other for other in SYNONYMS[key] if other in found]
        if key == "responses":  # a list of strings
            others = [x for x in others if str(row.fields[x]).startswith(("['", '["'))]
        for other in others or difflib.get_close_matches(key, foreign, 1, cutoff=0.85):
            renames[key] = f'rename "{other}" to "{key}"'
    has = found | renames.keys()
    fits = next((format for format in FORMATS if format.keys <= found), None)
    nearest = max(FORMATS, key=lambda format: len(format.keys & has) / len(format.keys))
    # a prompt beside what may be its reply is not taken for a prompt alone
    if fits and (fits.keys != {"prompt"} or fits is nearest or kind == "prompts"):
        if not kind and fits.read is formats.read_reply and (grades := GRADES & found):
            expected = '"responses" with "scores"; or --demonstrations, to learn from every reply'
            raise row.error(f'a single reply with "{min(grades)}"', expected)
        return fits
    steps = [renames.get(key, f'add "{key}"') for key in sorted(nearest.keys - found)]
    steps += ["or give --prompts"] if fits else []
    remedy = f"{nearest.name}: {', '.join(steps)}"
    if not nearest.keys & has:
        remedy = "a format of data/README.md; a list of rows has to stand in a file alone"
    twins = [(key, key[:-1] + NEXT.get(key[-1:], "?")) for key in row.fields]
    twins = [pair for pair in twins if isinstance(row.fields.get(pair[1]), str | list)]
    for a, b in sorted(twins, key=lambda pair: len(str(row.fields[pair[1]])))[-1:]:
        remedy = f'"chosen" for the better of "{a}" and "{b}", "rejected" for the other'
    keys = ", ".join(sorted(row.fields)) or "(none)"
    raise row.error(f"the keys {keys:.200} are of no known format", remedy)


def read(source: str | Path, kind: str | None = None, last: bool = False) -> tuple:
    """(format, kind, records, counts) of a source; None for kind is the most that its rows hold.

    The counts are the number of rows and what became of some of them; a source without rows has no
    format.
    """
    format, examples, converted, counts, unread = None, [], [], Counter(rows=0), set()
    path = fetch(str(source))
    for row in read_source(path):
        format = format or recognise(row, kind)
        counts["rows"] += 1
        try:
            row = row._replace(fields=Fields(row.fields, format))
            found = list(format.read(row, counts))
        except Dropped as reason:
            counts[f"{reason} dropped"] += 1
            continue
        unread |= row.fields.unread
        if last and format.read is formats.read_dialogue:
            answered = [example for example in found if example.responses][-1:]
            counts["turns before the last reply left out"] += len(found) - len(answered)
            found = answered
        examples += found
    if path.is_dir():  # whose rows are its .txt files
        files = sum(file.is_file() for file in path.rglob("*"))
        counts["files that are no .txt left out"] = files - counts["rows"]
    kind = kind or default_kind(examples)
    dialogue = any(tag for example in examples for tag, _ in example.prompt)
    for example in examples:
        try:
            converted.append(to_record(example, kind, dialogue))
        except Dropped as reason:
            counts[f"{reason} dropped"] += 1
    return format and format._replace(unread=sorted(unread)), kind, converted, counts


def default_kind(examples: list[Example]) -> str:
    if any(len(example.responses) > 1 for example in examples):
        return "comparisons"
    if any(example.responses for example in examples):
        return "demonstrations"
    return "prompts" if any(example.prompt for example in examples) else "texts"


def to_record(example: Example, kind: str, dialogue: bool) -> dict[str, object]:
    """The example as a record of this kind; its prompt laid out as a dialogue, or plainly."""
    if kind == "texts":
        return {"text": example.document}
    if not example.prompt:
        raise Dropped("without a prompt")
    record: dict[str, object] = {"prompt": formats.lay_out(example.prompt, dialogue)}
    own, ranks = not dialogue or formats.is_laid_out(example.prompt[-1]), example.ranks
    responses = [x.removeprefix(" ") if own else x for x in example.responses]
    if kind == "prompts":
        return record
    if kind == "comparisons":
        if len(responses) < 2:
            raise Dropped("with fewer than two replies")
        return record | {"responses": responses, "ranks": ranks}
    if not responses:
        raise Dropped("without a reply")
    if len(responses) > 1 and len(set(ranks)) == 1:
        raise Dropped("without a best reply")
    best = responses[ranks.index(min(ranks))]
    if not best.strip():
        raise Dropped("with an empty response")
    if len(responses) > 1 and formats.has_turns(best):  # it goes on to speak for the person
        raise Dropped("with further turns in the best reply")
    document = {"text": example.document} if example.document else {}
    return document | record | {"response": best}


def main(argv: Sequence[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m data.convert", None, __doc__, formatter_class=raw)
    parser.add_argument("source", help="file, folder of .txt files, or hh:<subset>/<train or test>")
    parser.add_argument("out", help="JSON Lines file to write; gzipped if its name ends in .gz")
    flags = parser.add_mutually_exclusive_group()
    for kind in ("demonstrations", "prompts"):
        flags.add_argument(f"--{kind}", dest="kind", action="store_const", const=kind)
    parser.add_argument("--last", action="store_true", help="the last reply of each dialogue only")
    args = parser.parse_args(argv)
    with records.one_line_errors():
        if not args.out.endswith((".jsonl", ".jsonl.gz")):
            raise UserError(f"{args.out} would hold JSON Lines; expected *.jsonl or *.jsonl.gz")
        format, kind, converted, counts = read(args.source, args.kind, args.last)
        rows = counts.pop("rows")
        odd = ", ".join(f"{n:,} {what}" for what, n in counts.items() if n)
        summary = f"{rows:,} rows" + (f": {odd}" if odd else "")
        if not converted:
            expected = "one usable row or more"
            raise DataError(args.source, 1, f"nothing usable ({summary})", expected)
        records.save_records(args.out, converted)
        keys = ", ".join(sorted(format.keys)) + "; not read: " * bool(format.unread)
        print(f"{args.source}: {format.name} (keys: {keys}{', '.join(format.unread):.300})")
        print(f"{summary}; {len(converted):,} {kind} written to {args.out}")
        if n := sum(str(row.get("prompt")).rstrip().endswith(ASSISTANT) for row in converted):
            print(f'{n:,} of the prompts are dialogues: train with --template "{{prompt}}"')


if __name__ == "__main__":
    main()
