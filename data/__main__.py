"""Checks a file of records and shows what is in it, before a stage is trained on it.

    python -m data comparisons.jsonl --template "{prompt}"

Prints what the records are and which stage takes them, their lengths in tokens, the share that
fits into the context, for comparisons how often the longer response wins (a reward model has to
beat that), and three examples. A fault in the file is one line on stderr and exit status 2.
"""

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from itertools import combinations

from data import records
from data.records import OTHER_FORMATS
from data.tokenizer import Codec, get_tokenizer

import numpy as np

KINDS = {  # the key that gives a record away, most telling first; and the stage that takes it
    "comparisons": ("responses", "reward.py --labeler file --comparisons"),
    "demonstrations": ("response", "sft.py --demonstrations"),
    "prompts": ("prompt", "ppo.py --prompts"),
    "texts": ("text", "sft.py --texts"),
}
Loaded = tuple[str, list[str], list[int]]  # prompt, responses, ranks


def guess_kind(path: str) -> str:
    """What the keys of the first row say the records are."""
    if os.path.isdir(path) or records.ends(path, *records.TXT):
        return "texts"
    row = next(records.read_rows(path))
    for kind, (key, _) in KINDS.items():
        if key in row.fields:
            return kind
    raise row.error("the row is of no known kind", f"one of {', '.join(KINDS)}; {OTHER_FORMATS}")


def load(path: str, kind: str) -> list[Loaded]:
    """Records of any kind as comparisons of K >= 0 responses; a document answers no prompt."""
    if kind == "comparisons":
        rows = records.load_comparisons(path)
        return [(row["prompt"], row["responses"], row["ranks"]) for row in rows]
    if kind == "demonstrations":
        rows = records.load_demonstrations(path)
        return [(row["prompt"], [row["response"]], [1]) for row in rows]
    if kind == "prompts":
        return [(row["prompt"], [], []) for row in records.load_prompts(path)]
    return [("", [text], [1]) for text in records.load_texts(path)]


def report(rows: list[Loaded], codec: Codec, block_size: int) -> None:
    """Prints lengths in tokens, what fits into the context, and three examples."""
    before = [len(codec.prompt(prompt)) if prompt else 0 for prompt, _, _ in rows]
    lengths = [[len(codec.response(text)) - 1 for text in texts] for _, texts, _ in rows]
    whole = [p + n + 1 for p, group in zip(before, lengths, strict=True) for n in group]
    response = [n for group in lengths for n in group]
    print(f"\n{'tokens':<24}{'mean':>11}{'p50':>9}{'p95':>9}{'max':>9}{'total':>13}")
    columns = {"prompt": before, "response": response, "all + end-of-text": whole}
    for name, counts in columns.items():
        if any(counts):
            p50, p95 = np.percentile(counts, [50, 95])
            middle = f"{np.mean(counts):>11,.1f}{p50:>9,.0f}{p95:>9,.0f}"
            print(f"{name:<24}{middle}{max(counts):>9,}{sum(counts):>13,}")
    if any(before):  # documents are cut into blocks and always fit
        used = whole or before
        fitting, n = sum(count <= block_size for count in used), len(used)
        print(f"{fitting:,} of {n:,} ({fitting / n:.1%}) fit into {block_size:,} tokens of context")
        times = Counter(prompt for prompt, _, _ in rows).values()
        repeated = sum(n > 1 for n in times)
        print(f"{repeated:,} of {len(times):,} different prompts occur more than once")
    if any(len(group) > 1 for group in lengths):
        print_ranks(lengths, [ranks for _, _, ranks in rows])
    for i in sorted({0, len(rows) // 2, len(rows) - 1}):
        prompt, responses, ranks = rows[i]
        shown = prompt and codec.template.replace("{prompt}", prompt)
        print(f"\n==== {i + 1:,} of {len(rows):,} ====\n{excerpt(shown)}")
        for rank, text in sorted(zip(ranks, responses, strict=True)):
            print(f"---- response, rank {rank} ----\n{excerpt(text)}")


def print_ranks(lengths: list[list[int]], ranks: list[list[int]]) -> None:
    """Prints K, the ties, and the accuracy of preferring the longer response."""
    of_k = sorted(Counter(map(len, ranks)).items())
    ties = [rank == other for group in ranks for rank, other in combinations(group, 2)]
    decided = len(ties) - sum(ties)
    share, half_width, n = records.pair_accuracy(lengths, ranks)
    print("responses a prompt: " + ", ".join(f"K = {k}: {n:,}" for k, n in of_k))
    print(f"ties: {sum(ties):,} of {len(ties):,} pairs")
    print(f"decided: {decided:,} pairs, {decided - n:,} of them with responses of equal length")
    if n:
        wins = f"{share:.1%} ± {half_width:.1%}"
        print(f"the longer response wins {wins} of {n:,} decided pairs of unequal length")


def excerpt(text: str, most: int = 600) -> str:
    return records.printable(text[:most]) + "…" * (len(text) > most)


def main(argv: Sequence[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m data", description=__doc__, formatter_class=raw)
    parser.add_argument("file", help="records to check; a .txt file or a folder of them")
    parser.add_argument("--kind", choices=KINDS, help="default: by the first row's keys")
    parser.add_argument("--tokenizer", default="gpt2", help="gpt2, toy, or a .tiktoken file")
    parser.add_argument("--block_size", type=int, default=1024, help="context length in tokens")
    parser.add_argument("--template", default="{prompt}\\n", help="what a prompt is put into")
    args = parser.parse_args(argv)
    with records.one_line_errors():
        codec = Codec(get_tokenizer(args.tokenizer), args.template)
        kind = args.kind or guess_kind(args.file)
        rows = load(args.file, kind)
        print(f"{args.file}: {len(rows):,} {kind}, all sound")
        print(f"taken by: python {KINDS[kind][1]} {args.file}")
        report(rows, codec, args.block_size)


if __name__ == "__main__":
    main()
