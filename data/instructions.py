"""Instruction files as demonstrations, or as comparisons where they hold two answers.

    python -m data.instructions alpaca_data.json demonstrations.jsonl
    python -m data.instructions databricks-dolly-15k.jsonl demonstrations.jsonl
    python -m data.instructions with-preference.json comparisons.jsonl --comparisons

Alpaca's rows are instruction / input / output, Dolly's instruction / context / response; a
comparison is chosen / rejected. The file is a JSON array or JSON Lines. The prompt is the
instruction and, below an empty line, its input if it has one.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from data.records import (
    Comparison,
    Converted,
    Demonstration,
    Row,
    as_row,
    pair_is_usable,
    parse_json,
    rank_shuffled,
    read_lines,
    read_rows,
    run_converter,
)


def read_array(path: str | Path, text: str) -> Iterator[Row]:
    """Yields the objects of a JSON array with the line on which each begins; raises DataError."""
    parse_json(path, 1, text, "a JSON array")  # a fault anywhere ends here; below counts lines
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,]*")
    line, position = 1, 0
    start = between.match(text, text.index("[") + 1).end()
    while text[start] != "]":
        line += text.count("\n", position, start)
        value, end = decoder.raw_decode(text, start)
        yield as_row(path, line, value)
        position, start = start, between.match(text, end).end()


def named(row: Row, alpaca: str, dolly: str) -> str:
    """The text that the two families call by different names; raises DataError."""
    return row.text(dolly if dolly in row.fields else alpaca, may_be_blank=True)


def read_prompts(path: str | Path) -> Iterator[tuple[str, Row]]:
    """Yields (prompt, row) of a JSON array or of JSON Lines; raises DataError, OSError."""
    text = "".join(line for _, line in read_lines(path))
    for row in read_array(path, text) if text.lstrip().startswith("[") else read_rows(path):
        prompt = row.text("instruction")
        has_input = row.fields.keys() & {"input", "context"}
        if has_input and (extra := named(row, "input", "context")).strip():
            prompt += f"\n\n{extra}"
        yield prompt, row


def read_instructions(path: str | Path, comparisons: bool = False) -> Converted:
    """Demonstrations, or comparisons, and what was odd; raises DataError, OSError."""
    kept: list[Demonstration | Comparison] = []
    counts = Counter({"rows": 0})
    for prompt, row in read_prompts(path):
        counts["rows"] += 1
        if comparisons:
            chosen = row.text("chosen", may_be_blank=True)
            rejected = row.text("rejected", may_be_blank=True)
            if pair_is_usable(chosen, rejected, counts):
                kept.append(rank_shuffled(prompt, [chosen, rejected], [1, 2]))
        elif (response := named(row, "output", "response")).strip():
            kept.append({"prompt": prompt, "response": response})
        else:
            counts["with an empty response dropped"] += 1
    return kept, counts


def main(argv: Sequence[str] | None = None) -> None:
    run_converter(
        __doc__,
        argv,
        lambda args: read_instructions(args.source, args.comparisons),
        comparisons="write chosen against rejected answers",
    )


if __name__ == "__main__":
    main()
