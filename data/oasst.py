r"""OpenAssistant's message trees (Köpf et al. 2023, arXiv 2304.07327) as K-way comparisons.

    python -m data.oasst 2023-04-12_oasst_ready.trees.jsonl.gz comparisons.jsonl

Each message of a person with two or more ranked replies gives one comparison. Its prompt is the
dialogue so far, written as in data/hh.py and ending in "\n\nAssistant:", so train with the template
"{prompt}". A reply without a rank has no place in the order and is left out. Trees begun by a
model ("synthetic") are kept, since people ranked the replies in them like any others.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from data.hh import ASSISTANT, HUMAN
from data.records import (
    MAX_RANK,
    Comparison,
    Row,
    as_row,
    rank_shuffled,
    read_rows,
    run_converter,
)

TAGS = {"prompter": HUMAN, "assistant": ASSISTANT}


def replies_to(message: Row, counts: Counter[str]) -> list[Row]:
    """The replies that reviewers let stand."""
    replies = message.fields.get("replies", [])
    if not isinstance(replies, list):
        raise message.error(f'"replies" is of type {type(replies).__name__}', "a list")
    rows = [as_row(message.path, message.line, reply) for reply in replies]
    kept = [r for r in rows if not r.fields.get("deleted") and r.fields.get("review_result", True)]
    counts["deleted or rejected replies dropped"] += len(rows) - len(kept)
    return kept


def rank_of(reply: Row) -> int | None:
    """0 is best in this source, None means not ranked; raises DataError."""
    rank = reply.fields.get("rank")
    if rank is not None and (type(rank) is not int or not 0 <= rank < MAX_RANK):
        raise reply.error('"rank" is no rank', "a whole number, 0 is best")
    return rank


def walk(tree: Row, counts: Counter[str]) -> Iterator[tuple[str, list[Row]]]:
    """Yields every person's message that has replies, as (dialogue up to here, replies)."""
    waiting = [(tree, "")]  # a list and no recursion: a thread may be deeper than Python's stack
    while waiting:
        message, before = waiting.pop()
        role = message.text("role")
        if role not in TAGS:
            raise message.error('"role" is unknown', f"one of {', '.join(TAGS)}")
        dialogue = f"{before}{TAGS[role]} {message.text('text')}"
        replies = replies_to(message, counts)
        if role == "prompter" and replies:
            yield dialogue, replies
        waiting += [(reply, dialogue) for reply in reversed(replies)]


def read_oasst(path: str | Path) -> tuple[list[Comparison], Counter[str]]:
    """The comparisons of a file of trees and what became of the rest; raises DataError, OSError."""
    comparisons: list[Comparison] = []
    counts = Counter({"groups of replies": 0})
    for row in read_rows(path):
        tree = as_row(path, row.line, row.fields.get("prompt"), name='"prompt"')
        for dialogue, replies in walk(tree, counts):
            counts["groups of replies"] += 1
            ranked = [(reply, rank) for reply in replies if (rank := rank_of(reply)) is not None]
            if len(ranked) < 2:
                counts["with fewer than two ranks dropped"] += 1
                continue
            counts["without a rank beside ranked replies dropped"] += len(replies) - len(ranked)
            counts["in synthetic trees kept"] += tree.fields.get("synthetic") is True
            # with the leading space and the ranks from 1 of all our comparisons
            responses = [f" {reply.text('text')}" for reply, _ in ranked]
            ranks = [rank + 1 for _, rank in ranked]
            comparisons.append(rank_shuffled(dialogue + ASSISTANT, responses, ranks))
    return comparisons, counts


def main(argv: Sequence[str] | None = None) -> None:
    run_converter(__doc__, argv, lambda args: read_oasst(args.source))


if __name__ == "__main__":
    main()
