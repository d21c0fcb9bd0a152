"""Runs the toy pipeline for several seeds and prints one table of all: the README's numbers.

    python tests/seeds.py 41 42 43             # into out/seed41, ...; what is finished stays
    python tests/seeds.py --curves 41 42 43    # also every method at other strengths of its penalty
    python tests/seeds.py --variants 41 42 43  # also PPO-ptx, a second round, 16 epochs of SFT
    python tests/seeds.py --bf16 41 42 43      # all networks in bfloat16, into out/bf16/seed41, ...

A cell is the mean over the seeds; ± is the 95 % half-width over the prompts of all seeds. The gold
score of each seed stands in brackets. A second table says what the training of a policy costs.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
COLUMNS = ("gold", "win_rate", "score", "kl", "pretraining_loss")
TEXTS = ("length", "eos_rate", "repetition", "distinct_2")
PARTS = tuple(f"gold/{part}" for part in ("form", "mood", "subject", "variety", "ending", "length"))

FOLDERS = {  # flag: folder, for each script
    "sft.py": {"base": "base"},
    "reward.py": {"sft": "sft"},
    "ppo.py": {"base": "base", "sft": "sft", "reward_model": "reward"},
}
POLICIES = ("ppo", "rloo", "grpo", "dpo")
BETAS = {  # beside the default
    "ppo": (0.02, 0.05, 0.1, 0.2, 0.7, 1.4),
    "rloo": (0.02, 0.05, 0.1, 0.2, 0.7, 1.4),
    "grpo": (0.01, 0.03, 0.3),
    "dpo": (0.03, 0.1, 1.0),
}
ALONE = ("--no-ablation", "--base=none", "--eval_prompts=2", "--ema_decay=0")
PTX_COEF = 1


def stage(out: Path, script: str, folder: str, *switches: str, **flags: object) -> None:
    """Runs a script into a folder. cost.json says what it took, and that it has been done."""
    if (out / folder / "cost.json").exists():
        return
    values = {flag: out / name for flag, name in FOLDERS[script].items()} | flags
    given = [f"--{flag}={value}" for flag, value in values.items()]
    seed = f"--seed={out.name.removeprefix('seed')}"
    command = [sys.executable, ROOT / script, seed, f"--out={out / folder}", *given, *switches]
    if out.parent.name == "bf16":
        command.append("--dtype=bfloat16")
    with subprocess.Popen(command) as process:
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), command)
    cost = {"seconds": used.ru_utime + used.ru_stime, "megabytes": used.ru_maxrss / 1024}
    (out / folder / "cost.json").write_text(json.dumps(cost))


def policy(out: Path, method: str, folder: str, *switches: str, **flags: object) -> None:
    """Trains a policy with the method's own command."""
    if method == "dpo":
        comparisons = out / "reward" / "comparisons.jsonl"
        stage(out, "reward.py", folder, "--preset=dpo", comparisons=comparisons, **flags)
    else:
        preset = [] if method == "ppo" else [f"--preset={method}"]
        stage(out, "ppo.py", folder, *preset, *switches, **flags)


def compared(out: Path, folder: str, names: tuple[str, ...], *switches: str) -> Path:
    """The folder with the comparison of these policies."""
    stage(out, "ppo.py", folder, *switches, compare=",".join(str(out / name) for name in names))
    return out / folder


def run_ppo(out: Path) -> Path:
    """The front page's command, with the seed that the folder out is named after."""
    stage(out, "sft.py", "sft")
    stage(out, "reward.py", "reward")
    stage(out, "ppo.py", "ppo")
    return out / "ppo"


def run(out: Path) -> Path:
    """The folder with the comparison of all methods."""
    run_ppo(out)
    for method in POLICIES:
        if method != "ppo":
            policy(out, method, method)
        if method != "dpo":  # the training alone, for its memory
            policy(out, method, f"{method}_short", *ALONE, iterations=6)
    return compared(out, "compare", ("ppo", "ppo_no_kl", *POLICIES[1:]))


def run_curves(out: Path) -> None:
    """Every method with other strengths of its penalty."""
    for method, betas in BETAS.items():
        name = "beta" if method == "dpo" else "kl_coef"
        for beta in betas:
            folder = f"{method}_beta{beta}"
            policy(out, method, folder, *ALONE, **{name: beta})
    folders = tuple(f"{method}_beta{beta}" for method in BETAS for beta in BETAS[method])
    compared(out, "curves", folders, "--base=none")


def run_variants(out: Path) -> Path:
    """The folder with the comparison of the variants."""
    run(out)
    earlier, short = out / "reward" / "comparisons.jsonl", "--no-ablation"
    stage(out, "ppo.py", "ppo_ptx", short, ptx_coef=PTX_COEF)
    stage(out, "reward.py", "reward2", policy=out / "ppo", merge=earlier)
    stage(out, "ppo.py", "ppo2", short, init=out / "ppo", reward_model=out / "reward2")
    long = {"epochs": 16, "dropout": 0.2, "reward_model": out / "reward"}
    stage(out, "sft.py", "sft16", init=out / "base", **long)
    return compared(out, "variants", ("ppo", "ppo_no_kl", "ppo_ptx", "ppo2", "sft16"))


def cost(outs: list[Path], method: str) -> tuple[float, float, float]:
    """Responses that the reward model scores, seconds of training, peak megabytes: means."""
    rows = []
    for out in outs:
        alone = out / (method if method == "dpo" else f"{method}_short")
        known = json.loads((alone / "cost.json").read_text())
        calls, seconds = 0, known["seconds"]
        if method != "dpo":
            B = json.loads((out / method / "config.json").read_text())["batch_size"]
            lines = (out / method / "metrics.jsonl").read_text().splitlines()
            steps = [json.loads(line) for line in lines]
            calls = B * len(steps)
            seconds = sum(B * s["objective/length"] / s["tokens_per_second"] for s in steps)
        rows.append((calls, seconds, known["megabytes"]))
    return tuple(sum(column) / len(rows) for column in zip(*rows, strict=True))


def rows_of(folder: Path) -> dict[str, dict]:
    rows = json.loads((folder / "results.json").read_text())["rows"]
    return {row["model"]: row for row in rows}


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


def table(results: list[list[dict]], columns: tuple[str, ...], costs: dict | None = None) -> str:
    """A line for each model; costs: {title: {model: number}}, of the training of some of them."""
    costs = costs or {}
    titles = [column.removeprefix("gold/").replace("_", " ") for column in columns]
    titles = [*titles, *costs]
    lines = ["| model | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for rows in zip(*results, strict=True):
        name, cells = rows[0]["model"], [cell(list(rows), column) for column in columns]
        numbers = [known.get(name) for known in costs.values()]
        cells += ["" if number is None else f"{number:,.0f}" for number in numbers]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("seeds", nargs="+", type=int)
    for switch in ("curves", "variants", "bf16"):
        parser.add_argument(f"--{switch}", action="store_true")
    args = parser.parse_args()
    outs = [ROOT / ("out/bf16" if args.bf16 else "out") / f"seed{seed}" for seed in args.seeds]
    made = run_ppo if args.bf16 else run_variants if args.variants else run
    folders = [made(out) for out in outs]
    results = [list(rows_of(folder).values()) for folder in folders]
    costs = {method: cost(outs, method) for method in (() if args.bf16 else POLICIES)}
    titles = ("scores", "seconds", "megabytes")
    columns = {t: {m: found[i] for m, found in costs.items()} for i, t in enumerate(titles)}
    print(
        table(results, COLUMNS, columns), table(results, TEXTS), table(results, PARTS), sep="\n\n"
    )
    reports = [json.loads((out / "reward" / "report.json").read_text()) for out in outs]
    for name in reports[0]["pairs"]:
        shares = [report["pairs"][name][0] for report in reports]
        print(f"{name}: " + " / ".join(f"{share:.3f}" for share in shares))
    if args.curves:
        for out in outs:
            run_curves(out)
        results = [list(rows_of(out / "curves").values()) for out in outs]
        print(table(results, COLUMNS))


if __name__ == "__main__":
    main()
