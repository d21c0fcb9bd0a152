"""Runs the toy pipeline for several seeds and prints one table of all: the README's numbers.

    python tests/seeds.py 11 12 13        # into out/seed11, ...; finished seeds are not run again

A cell is the mean over the seeds; ± is the 95 % half-width over the prompts of all seeds. The gold
score of each seed stands in brackets.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
COLUMNS = ("gold", "win_rate", "score", "kl", "length", "eos_rate", "pretraining_loss")
PARTS = tuple(f"gold/{part}" for part in ("form", "mood", "subject", "variety", "ending", "length"))


def run(seed: str) -> Path:
    """The folder with the results of this seed."""
    out = Path("out") / f"seed{seed}"
    folders = {name: f"--{name}={out / name}" for name in ("base", "sft")}
    stages = (
        ("sft.py", f"--out={out / 'sft'}", folders["base"]),
        ("reward.py", f"--out={out / 'reward'}", folders["sft"]),
        ("ppo.py", f"--out={out / 'ppo'}", f"--reward_model={out / 'reward'}", *folders.values()),
    )
    if not (out / "ppo" / "results.json").exists():
        for script, *flags in stages:
            subprocess.run([sys.executable, ROOT / script, f"--seed={seed}", *flags], check=True)
    return out


def cell(rows: list[dict], column: str) -> str:
    values = [row[column] for row in rows]
    if None in values:
        return ""
    mean = sum(values) / len(values)
    half_widths = [row.get(f"{column}_ci") or 0 for row in rows]
    pooled = sum(h * h for h in half_widths) ** 0.5 / len(rows)
    text = f"{mean:.2f} ± {pooled:.2f}" if pooled else f"{mean:.2f}"
    if column == "gold":
        text += f" ({' / '.join(f'{value:.2f}' for value in values)})"
    return text


def table(results: list[list[dict]], columns: tuple[str, ...]) -> str:
    titles = [column.removeprefix("gold/").replace("_", " ") for column in columns]
    lines = ["| model | " + " | ".join(titles) + " |", "|---" * (len(columns) + 1) + "|"]
    for rows in zip(*results, strict=True):
        cells = [cell(list(rows), column) for column in columns]
        lines.append(f"| {rows[0]['model']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    folders = [run(seed) for seed in sys.argv[1:] or sys.exit(__doc__)]
    results = [json.loads((out / "ppo" / "results.json").read_text())["rows"] for out in folders]
    print(table(results, COLUMNS), table(results, PARTS), sep="\n\n")
    reports = [json.loads((out / "reward" / "report.json").read_text()) for out in folders]
    for name in reports[0]["pairs"]:
        shares = [report["pairs"][name][0] for report in reports]
        print(f"{name}: " + " / ".join(f"{share:.3f}" for share in shares))


if __name__ == "__main__":
    main()
