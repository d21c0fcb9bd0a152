"""The random walks of trlX as an example of `--reward`: short paths, learned from wandering ones.

    python tests/randomwalks.py                # into out/walks; half a minute on one core

The graph has 21 nodes, the letters a to u, and few edges; a walk ends when it reaches a. A model
learns from 1,000 random walks, and PPO makes them short. A walk that takes an edge that does not
exist, or that does not arrive, counts as one of the greatest length. The numbers are drawn in the
order in which trlX draws them, so that graph and walks are its own.
"""

import functools
import string
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from data.records import atomic, save_records
from data.tokenizer import Codec, format_ranks
from model import GPT, generate

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
NODES, MOST = string.ascii_lowercase[:21], 10  # MOST: the nodes of the longest walk
GOAL = NODES[0]


@functools.cache
def graph_and_walks(seed: int = 1000) -> tuple[dict[str, str], list[str]]:
    """{node: the nodes it leads to}, and 1,000 random walks."""
    rng, n = np.random.RandomState(seed), len(NODES)
    edges = np.zeros((n, n), bool)
    while not edges.any(1).all():  # every node leads somewhere
        edges = rng.rand(n, n) > 1 - 0.1
        np.fill_diagonal(edges, False)
    leads_to = {
        a: "".join(b for b, edge in zip(NODES, row, strict=True) if edge)
        for a, row in zip(NODES, edges, strict=True)
    }
    walks = []
    while len(walks) < 1000:
        if (walk := NODES[rng.randint(n)]) == GOAL:
            continue
        while len(walk) < MOST and walk[-1] != GOAL:
            walk += rng.choice(list(leads_to[walk[-1]]))
        walks.append(walk)
    return leads_to, walks


@functools.cache
def shortest() -> dict[str, int]:
    """The number of nodes on a shortest walk from each node to the goal, both included."""
    leads_to, lengths = graph_and_walks()[0], {GOAL: 1}
    for length in range(2, MOST + 1):
        arrived = set(lengths)
        lengths |= {a: length for a in NODES if a not in arrived and arrived & set(leads_to[a])}
    return lengths


def optimality(texts: list[str], prompts: list[str]) -> list[float]:
    """(10 - length) / (10 - shortest length) of the walk prompt + text: from 0 to 1."""
    leads_to, found = graph_and_walks()[0], []
    for start, text in zip(prompts, texts, strict=True):
        walk, length = start + text, MOST
        nodes = walk.partition(GOAL)[0] + GOAL
        if GOAL in walk and all(b in leads_to.get(a, "") for a, b in pairwise(nodes)):
            length = min(MOST, len(nodes))
        found.append((MOST - length) / (MOST - shortest().get(start, 0)))
    return found


def mean_optimality(folder: Path, temperature: float = 1.0) -> float:
    """Over 50 walks from each node."""
    model, codec = GPT.load(folder).eval(), Codec.load(folder)
    starts = [node for node in NODES[1:] for _ in range(50)]
    prompts, seed = [codec.prompt(node) for node in starts], torch.Generator().manual_seed(0)
    walks = generate(model, prompts, MOST - 1, codec.eos, temperature, generator=seed)
    return float(np.mean(optimality([codec.text(walk) for walk in walks], starts)))


def stage(script: str, *flags: str) -> None:
    subprocess.run([sys.executable, ROOT / script, *flags], check=True)


def main() -> None:
    out, walks = ROOT / "out" / "walks", graph_and_walks()[1]
    rows = [{"prompt": walk[0], "response": walk[1:]} for walk in walks]
    save_records(out / "walks.jsonl", rows)
    save_records(out / "texts.jsonl", [{"text": walk} for walk in walks])
    save_records(out / "nodes.jsonl", [{"prompt": node} for node in NODES[1:]])
    with atomic(out / "bytes.tiktoken") as file:
        file.write(format_ranks({bytes([byte]): byte for byte in range(256)}).encode())
    stage(
        "sft.py", f"--base={out / 'base'}", f"--out={out / 'sft'}", "--template={prompt}",
        f"--tokenizer={out / 'bytes.tiktoken'}", f"--texts={out / 'texts.jsonl'}",
        f"--demonstrations={out / 'walks.jsonl'}", "--block_size=16",
        "--pretrain_epochs=4", "--epochs=8",
    )  # fmt: skip
    stage(
        "ppo.py", f"--sft={out / 'sft'}", f"--base={out / 'base'}", f"--out={out / 'ppo'}",
        f"--reward={Path(__file__)}:optimality", f"--prompts={out / 'nodes.jsonl'}",
        "--eval_prompts=2", "--max_new_tokens=9", "--batch_size=128", "--kl_coef=0.02",
        "--missing_eos_score=0", "--no-ablation",
    )  # fmt: skip
    print(
        f"the 1,000 walks: {np.mean(optimality([w[1:] for w in walks], [w[0] for w in walks])):.3f}"
    )
    for name in ("sft", "ppo"):
        greedy = mean_optimality(out / name, temperature=0)
        print(f"{name}: {mean_optimality(out / name):.3f}, greedy {greedy:.3f}")


if __name__ == "__main__":
    main()
