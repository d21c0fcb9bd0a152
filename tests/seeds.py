"""Runs the toy pipeline for several seeds and prints one table of all: the README's numbers.

    python tests/seeds.py 31 32 33             # into out/seed31, ...; what is finished stays
    python tests/seeds.py --variants 31 32 33  # also PPO-ptx, a second round, 16 epochs of SFT
    python tests/seeds.py --bf16 31 32 33      # all networks in bfloat16, into out/bf16/seed31, ...

A cell is the mean over the seeds; ± is the 95 % half-width over the prompts of all seeds. The gold
score of each seed stands in brackets.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
COLUMNS = ("gold", "win_rate", "score", "kl", "length", "eos_rate", "repetition")
COLUMNS += ("distinct_2", "pretraining_loss")
PARTS = tuple(f"gold/{part}" for part in ("form", "mood", "subject", "variety", "ending", "length"))


LAST = {"sft.py": "samples.txt", "reward.py": "report.json", "ppo.py": "results.json"}
FOLDERS = {  # flag: folder, for each script
    "sft.py": {"base": "base"},
    "reward.py": {"sft": "sft"},
    "ppo.py": {"base": "base", "sft": "sft", "reward_model": "reward"},
}
PTX_COEF = 1
BETAS = (0.05, 0.1, 0.4, 0.8)  # for the first seed only: one figure shows them


def stage(out: Path, script: str, folder: str, *switches: str, **flags: object) -> None:
    """Runs a script into a folder, unless that has been done."""
    if not (out / folder / LAST[script]).exists():
        values = {flag: out / name for flag, name in FOLDERS[script].items()} | flags
        given = [f"--{flag}={value}" for flag, value in values.items()]
        seed = f"--seed={out.name.removeprefix('seed')}"
        command = [sys.executable, ROOT / script, seed, f"--out={out / folder}", *given, *switches]
        if out.parent.name == "bf16":
            command.append("--dtype=bfloat16")
        subprocess.run(command, check=True)


def run(out: Path) -> Path:
    """The folder with the results of the seed that the folder out is named after."""
    stage(out, "sft.py", "sft")
    stage(out, "reward.py", "reward")
    stage(out, "ppo.py", "ppo")
    return out / "ppo"


def run_variants(out: Path, betas: tuple[float, ...]) -> Path:
    """The folder with the comparison of the variants."""
    run(out)
    earlier, short = out / "reward" / "comparisons.jsonl", "--no-ablation"
    stage(out, "ppo.py", "ppo_ptx", short, ptx_coef=PTX_COEF)
    stage(out, "reward.py", "reward2", policy=out / "ppo", merge=earlier)
    stage(out, "ppo.py", "ppo2", short, init=out / "ppo", reward_model=out / "reward2")
    long = {"epochs": 16, "dropout": 0.2, "reward_model": out / "reward"}
    stage(out, "sft.py", "sft16", init=out / "base", **long)
    for beta in betas:
        stage(out, "ppo.py", f"ppo_beta{beta}", short, kl_coef=beta)
    names = ("ppo", "ppo_no_kl", "ppo_ptx", "ppo2", "sft16")
    stage(out, "ppo.py", "compare", compare=",".join(str(out / name) for name in names))
    return out / "compare"


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
    seeds = [seed for seed in sys.argv[1:] if not seed.startswith("--")] or sys.exit(__doc__)
    outs = [Path("out/bf16" if "--bf16" in sys.argv else "out") / f"seed{seed}" for seed in seeds]
    if "--variants" in sys.argv:
        folders = [run_variants(out, BETAS if out == outs[0] else ()) for out in outs]
    else:
        folders = [run(out) for out in outs]
    results = [json.loads((folder / "results.json").read_text())["rows"] for folder in folders]
    print(table(results, COLUMNS), table(results, PARTS), sep="\n\n")
    reports = [json.loads((f.parent / "reward" / "report.json").read_text()) for f in folders]
    for name in reports[0]["pairs"]:
        shares = [report["pairs"][name][0] for report in reports]
        print(f"{name}: " + " / ".join(f"{share:.3f}" for share in shares))


if __name__ == "__main__":
    main()
