"""Anthropic's HH transcripts (Bai et al. 2022, arXiv 2204.05862) as comparisons of two replies.

    python -m data.hh helpful-base.test.jsonl.gz comparisons.jsonl
    python -m data.hh helpful-base/train comparisons.jsonl                   # fetches the split
    python -m data.hh helpful-base/train demonstrations.jsonl --demonstrations

A row holds two whole transcripts, "chosen" and "rejected". The prompt is what they share up to its
last "\\n\\nAssistant:", and a response begins with the space that follows: train with the template
"{prompt}". A reply may hold further turns, made up by the model that wrote it; people judged it
with them, so a comparison keeps them, but nobody should imitate them, so a demonstration does not.
"""

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data.records import (
    Comparison,
    Converted,
    Demonstration,
    pair_is_usable,
    rank_shuffled,
    read_rows,
    run_converter,
)

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
URL = "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main/{}.jsonl.gz"
SUBSETS = ("helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base")
SPLITS = [f"{subset}/{part}" for subset in SUBSETS for part in ("train", "test")]


def split_pair(chosen: str, rejected: str) -> tuple[str, str, str] | None:
    """(prompt, chosen reply, rejected reply), None if the transcripts share no whole prompt.

    Each side's last tag would not do: where a reply holds turns of its own, the prompts differ.
    """
    shared = os.path.commonprefix([chosen, rejected])
    tag = shared.rfind(ASSISTANT)
    if tag < 0:
        return None
    end = tag + len(ASSISTANT)
    return chosen[:end], chosen[end:], rejected[end:]


def read_hh(path: str | Path) -> tuple[list[Comparison], Counter[str]]:
    """The comparisons of a file and what became of its rows; raises DataError, OSError."""
    comparisons: list[Comparison] = []
    counts = Counter({"pairs": 0})
    for row in read_rows(path):
        counts["pairs"] += 1
        transcripts = row.text("chosen"), row.text("rejected")
        if not all(ASSISTANT in transcript for transcript in transcripts):
            raise row.error("no dialogue", r"\n\nHuman: … \n\nAssistant: … on both sides")
        if (split := split_pair(*transcripts)) is None:
            counts["diverging dropped"] += 1
            continue
        prompt, chosen, rejected = split
        if pair_is_usable(chosen, rejected, counts):
            counts["with further turns in a reply kept"] += has_turns(chosen) or has_turns(rejected)
            comparisons.append(rank_shuffled(prompt, [chosen, rejected], [1, 2]))
    return comparisons, counts


def has_turns(reply: str) -> bool:
    return HUMAN in reply or ASSISTANT in reply


def best_replies(comparisons: list[Comparison]) -> list[Demonstration]:
    """The chosen replies as demonstrations, without those that go on to speak for the human."""
    best = [(c["prompt"], c["responses"][c["ranks"].index(1)]) for c in comparisons]
    return [{"prompt": p, "response": reply} for p, reply in best if not has_turns(reply)]


def fetch(source: str) -> Path:
    """The path of a local file or of an official split, downloaded once; raises OSError."""
    if Path(source).exists() or source not in SPLITS:
        return Path(source)
    import torch.hub  # here, because a local file needs no torch

    path = Path(torch.hub.get_dir(), "hh-rlhf", f"{source}.jsonl.gz")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        url = URL.format(source)
        try:
            torch.hub.download_url_to_file(url, str(path))
        except OSError as error:
            remedy = "download it elsewhere and give its path instead"
            raise OSError(f"cannot fetch {url} ({error}); {remedy}") from None
    return path


def read_source(args: argparse.Namespace) -> Converted:
    comparisons, counts = read_hh(fetch(args.source))
    if not args.demonstrations:
        return comparisons, counts
    best = best_replies(comparisons)
    counts["chosen with further turns dropped"] = len(comparisons) - len(best)
    return best, counts


def main(argv: Sequence[str] | None = None) -> None:
    run_converter(__doc__, argv, read_source, demonstrations="write the chosen replies alone")


if __name__ == "__main__":
    main()
