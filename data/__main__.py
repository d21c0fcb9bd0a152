"""Checks a file of records and shows what is in it, before a stage is trained on it.

    python -m data comparisons.jsonl --template "{prompt}"

Prints how many records there are, their lengths in tokens, the share that fits into the context,
for comparisons how often the longer response wins (a reward model has to beat that), and three
examples. A fault in the file is one line on stderr and exit status 2.
"""

import argparse
import os
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain, combinations

import numpy as np

from data import records
from data.records import Comparison, printable
from data.tokenizer import get_tokenizer

KINDS = {  # by the key that gives a row away, most telling first
    "responses": "comparisons",
    "response": "demonstrations",
    "prompt": "prompts",
    "text": "texts",
}
EXCERPT = 600  # characters of each text that an example shows


def guess_kind(path: str) -> str:
    """What the keys of the first row say the records are; raises DataError, OSError."""
    if os.path.isdir(path) or records.is_plain_text(path):
        return "texts"
    row = next(records.read_rows(path))
    for key, kind in KINDS.items():
        if key in row.fields:
            return kind
    raise row.error("the row is of no known kind", f"one of the keys {', '.join(KINDS)}")


def load(path: str, kind: str) -> list[Comparison]:
    """Records of any kind as comparisons of K >= 0 responses; raises DataError, OSError.

    A demonstration has one response, a prompt none; a document is a response to nothing.
    """
    if kind == "comparisons":
        return records.load_comparisons(path)
    if kind == "demonstrations":
        pairs = [(row["prompt"], [row["response"]]) for row in records.load_demonstrations(path)]
    elif kind == "prompts":
        pairs = [(row["prompt"], []) for row in records.load_prompts(path)]
    else:
        pairs = [("", [text]) for text in records.load_texts(path)]
    return [{"prompt": p, "responses": texts, "ranks": [1] * len(texts)} for p, texts in pairs]


def print_lengths(tokens: dict[str, list[int]]) -> None:
    print(f"\n{'tokens':<24}{'mean':>11}{'p50':>9}{'p95':>9}{'max':>9}{'total':>13}")
    for name, counts in tokens.items():
        p50, p95 = np.percentile(counts, [50, 95])
        middle = f"{np.mean(counts):>11,.1f}{p50:>9,.0f}{p95:>9,.0f}"
        print(f"{name:<24}{middle}{max(counts):>9,}{sum(counts):>13,}")


def print_ranks(lengths: list[list[int]], ranks: list[list[int]]) -> None:
    """Prints K, the ties, and the accuracy of preferring the longer response."""
    of_k = sorted(Counter(map(len, ranks)).items())
    pairs = [rank == other for group in ranks for rank, other in combinations(group, 2)]
    print("responses a prompt: " + ", ".join(f"K = {k}: {n:,}" for k, n in of_k))
    print(f"ties: {sum(pairs):,} of {len(pairs):,} pairs")
    share, half_width, n = records.pair_accuracy(lengths, ranks)
    if n:
        print(f"the longer response wins {share:.1%} ± {half_width:.1%} of {n:,} decided pairs")


def print_examples(prompts: list[str], rows: list[Comparison]) -> None:
    """Prints the first, the middle and the last record, control characters escaped."""
    for i in sorted({0, len(rows) // 2, len(rows) - 1}):
        print(f"\n==== {i + 1:,} of {len(rows):,} ====\n{excerpt(prompts[i])}")
        for rank, text in sorted(zip(rows[i]["ranks"], rows[i]["responses"], strict=True)):
            print(f"---- response, rank {rank} ----\n{excerpt(text)}")


def excerpt(text: str) -> str:
    return printable(text[:EXCERPT]) + ("…" if len(text) > EXCERPT else "")


def report(
    rows: list[Comparison], template: str, encode: Callable[[str], list[int]], block_size: int
) -> None:
    """Prints all there is to say about records that are sound."""
    # replace and not format: a prompt may hold braces of its own; a document has no prompt at all
    prompts = [row["prompt"] and template.replace("{prompt}", row["prompt"]) for row in rows]
    before = [len(encode(prompt)) for prompt in prompts]
    lengths = [[len(encode(text)) for text in row["responses"]] for row in rows]
    whole = [p + n + 1 for p, group in zip(before, lengths, strict=True) for n in group]
    tokens = {"prompt": before, "response": list(chain(*lengths)), "all + end-of-text": whole}
    print_lengths({name: counts for name, counts in tokens.items() if any(counts)})
    if any(prompts):  # documents are cut into blocks and always fit
        fitting, n = sum(count <= block_size for count in whole or before), len(whole or before)
        print(f"{fitting:,} of {n:,} ({fitting / n:.1%}) fit into {block_size:,} tokens of context")
    if any(len(row["ranks"]) > 1 for row in rows):
        print_ranks(lengths, [row["ranks"] for row in rows])
    print_examples(prompts, rows)


def main(argv: Sequence[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m data", description=__doc__, formatter_class=raw)
    parser.add_argument("file", help="records to check; a .txt file or a folder of them")
    parser.add_argument("--kind", choices=KINDS.values(), help="default: by the first row's keys")
    parser.add_argument("--tokenizer", default="gpt2", help="gpt2, toy, or a .tiktoken file")
    parser.add_argument("--block_size", type=int, default=1024, help="context length in tokens")
    parser.add_argument(
        "--template", default="{prompt}\\n", help="what a prompt is put into, \\n for a line break"
    )
    args = parser.parse_args(argv)
    if "{prompt}" not in args.template:
        parser.error(f"--template {args.template!r} has no place for the {{prompt}}")
    try:
        encode = get_tokenizer(args.tokenizer).encode_ordinary
    except (ValueError, OSError) as error:
        parser.error(str(error))
    template = args.template.replace("\\n", "\n")
    with records.one_line_errors():
        kind = args.kind or guess_kind(args.file)
        rows = load(args.file, kind)
        print(f"{args.file}: {len(rows):,} {kind}, all sound")
        report(rows, template, encode, args.block_size)


if __name__ == "__main__":
    main()
