"""Draws the README's figures from the folders that tests/seeds.py leaves; needs the extra `plot`.

    python tests/seeds.py --curves 41 42 43 && python tests/figures.py 41 42 43

Writes story.svg, learning.svg, win_rates.svg, and of the curves methods.svg and
overoptimisation.svg into .github/. Bars and points are means over the seeds; their intervals are
95 % half-widths over the prompts of all seeds.
"""

import json
import sys
from pathlib import Path

from data.plot import draw, read_metrics

import matplotlib
import matplotlib.pyplot as plt
import seeds
from seeds import ROOT, rows_of

GOLD, SCORE, GREY = "#c8890a", "#3465a4", "#888888"
STORY = {
    "base": "base\nmodel",
    "prompted": "base,\nprompted",
    "sft": "fine-\ntuned",
    "best_of_16": "best\nof 16",
    "ppo": "PPO",
    "ppo_no_kl": "PPO,\nno KL penalty",
}
NAMES = {"ppo": "PPO", "rloo": "RLOO", "grpo": "GRPO", "dpo": "DPO"}
matplotlib.rcParams |= {
    "svg.hashsalt": "picorlhf",  # the same figure is the same file
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def pooled(rows: list[dict[str, dict]], model: str, key: str) -> tuple[float, float]:
    """The mean over the seeds and its 95 % half-width."""
    found = [own[model] for own in rows]
    half_widths = [row.get(f"{key}_ci") or 0.0 for row in found]
    mean = sum(row[key] for row in found) / len(found)
    return mean, sum(h * h for h in half_widths) ** 0.5 / len(found)


def save(figure: plt.Figure, name: str, tight: bool = True) -> None:
    path = ROOT / ".github" / f"{name}.svg"
    path.parent.mkdir(exist_ok=True)
    if tight:
        figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    print(f"wrote {path.relative_to(ROOT)}, {path.stat().st_size / 1024:.0f} kB")


def story(rows: list[dict[str, dict]]) -> None:
    figure, left = plt.subplots(figsize=(7.2, 3.0))
    right, places = left.twinx(), range(len(STORY))
    gold, score = ([pooled(rows, m, key) for m in STORY] for key in ("gold", "score"))
    left.bar([x - 0.2 for x in places], [m for m, _ in gold], 0.38, color=GOLD)
    left.errorbar([x - 0.2 for x in places], *zip(*gold, strict=True), fmt="none", ecolor="black")
    low = min(m for m, _ in score) - 0.5
    heights = [m - low for m, _ in score]
    right.bar([x + 0.2 for x in places], heights, 0.38, bottom=low, color=SCORE)
    right.errorbar([x + 0.2 for x in places], *zip(*score, strict=True), fmt="none", ecolor="black")
    left.set_xticks(list(places), STORY.values())
    left.set_ylabel("hidden rubric, 0 to 10", color=GOLD)
    right.set_ylabel("reward model's score", color=SCORE)
    right.spines["right"].set_visible(True)
    left.set_ylim(0, 10)
    save(figure, "story")


def methods(outs: list[Path]) -> None:
    """The rubric against the KL from the fine-tuned model, for each method over its penalty."""
    figure, axis = plt.subplots(figsize=(7.2, 3.4))
    found = [rows_of(out / "compare") | rows_of(out / "curves") for out in outs]
    for number, (method, name) in enumerate(NAMES.items()):
        models = [method, *(f"{method}_beta{beta}" for beta in seeds.BETAS[method])]
        models += ["ppo_no_kl"] * (method == "ppo")
        points = [(pooled(found, m, "kl")[0], *pooled(found, m, "gold")) for m in models]
        kl, gold, half_widths = zip(*sorted(points), strict=True)
        style = {"color": f"C{number}", "markersize": 4, "linewidth": 1}
        axis.errorbar(kl, gold, yerr=half_widths, fmt="o-", label=name, **style)
        axis.plot(
            points[0][0], points[0][1], "o", color=f"C{number}", markersize=9, fillstyle="none"
        )
    curves = [json.loads((out / "compare/results.json").read_text())["best_of_n"] for out in outs]
    gold = [sum(p["gold"] for p in same) / len(same) for same in zip(*curves, strict=True)]
    axis.plot([point["kl"] for point in curves[0]], gold, "k--", linewidth=1, label="best of n")
    axis.set_xscale("symlog", linthresh=1)
    axis.set_xlabel("KL from the fine-tuned model, nats per response")
    axis.set_ylabel("hidden rubric, 0 to 10")
    axis.legend(frameon=False)
    save(figure, "methods")


def overoptimisation(out: Path) -> None:
    """Gold and score against the root of the KL from the fine-tuned model (Gao et al. 2022)."""
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.0))
    runs = {beta: out / f"ppo_beta{beta}" for beta in seeds.BETAS["ppo"]}
    runs |= {json.loads((out / "ppo/config.json").read_text())["kl_coef"]: out / "ppo"}
    runs |= {0.0: out / "ppo_no_kl"}
    colours = plt.get_cmap("viridis")
    for i, (beta, folder) in enumerate(sorted(runs.items())):
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        root = [max(step["objective/kl"], 0) ** 0.5 for step in steps]
        for axis, key in zip(axes, ("objective/gold", "objective/score"), strict=True):
            values = [step[key] for step in steps]
            smooth = [
                sum(v) / len(v) for v in (values[max(0, t - 4) : t + 1] for t in range(len(values)))
            ]
            colour = colours(i / len(runs))
            axis.plot(
                root, smooth, ".-", markersize=3, linewidth=1, color=colour, label=f"β = {beta:g}"
            )
    curve = json.loads((out / "ppo/results.json").read_text())["best_of_n"]
    for axis, key in zip(axes, ("gold", "score"), strict=True):
        x = [point["kl"] ** 0.5 for point in curve]
        axis.plot(x, [point[key] for point in curve], "k--", linewidth=1, label="best of n")
        axis.set_xlabel("√KL from the fine-tuned model, √nats")
    axes[0].set_title("hidden rubric")
    axes[1].set_title("reward model's score")
    axes[0].legend(frameon=False, loc="upper right", fontsize=7)
    save(figure, "overoptimisation")


def win_rates(rows: list[dict[str, dict]]) -> None:
    names = [m for m in rows[0] if m != "sft" and all(m in own for own in rows)]
    figure, axis = plt.subplots(figsize=(7.2, 0.6 + 0.3 * len(names)))
    means, half_widths = zip(*[pooled(rows, m, "win_rate") for m in names], strict=True)
    axis.errorbar(means, range(len(names)), xerr=half_widths, fmt="o", color=SCORE, capsize=3)
    axis.axvline(0.5, color=GREY, linewidth=1, linestyle="--")
    axis.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axis.set_xlim(0, 1)
    axis.invert_yaxis()
    axis.set_xlabel(
        "share of held-out prompts on which the rubric prefers it to the fine-tuned model"
    )
    save(figure, "win_rates")


def learning(folder: Path) -> None:
    """Every metric that PPO logs, with the penalty and without."""
    named = {"with the KL penalty": "ppo", "without": "ppo_no_kl"}
    figure = draw({title: read_metrics(folder / name) for title, name in named.items()})
    save(figure, "learning", tight=False)


def main() -> None:
    outs = [ROOT / "out" / f"seed{seed}" for seed in sys.argv[1:] or sys.exit(__doc__)]
    rows = [rows_of(out / "compare") for out in outs]
    story(rows)
    win_rates(rows)
    learning(outs[0])
    if all((out / "curves" / "results.json").exists() for out in outs):
        methods(outs)
        overoptimisation(outs[0])


if __name__ == "__main__":
    main()
