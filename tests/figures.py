"""Draws the README's figures from the folders that tests/seeds.py leaves; needs the extra `plot`.

    python tests/seeds.py 31 32 33 && python tests/figures.py 31 32 33

Writes story.svg and learning.svg into .github/; after seeds.py --variants overoptimisation.svg and
win_rates.svg too. Bars and points are means over the seeds; their intervals are 95 % half-widths
over the prompts of all seeds.
"""

import json
import sys
from pathlib import Path

from data.plot import draw, read_metrics

import matplotlib
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
GOLD, SCORE, GREY = "#c8890a", "#3465a4", "#888888"
STORY = {
    "base": "base\nmodel",
    "prompted": "base,\nprompted",
    "sft": "fine-\ntuned",
    "best_of_16": "best\nof 16",
    "ppo": "PPO",
    "ppo_no_kl": "PPO,\nno KL penalty",
}
matplotlib.rcParams |= {
    "svg.hashsalt": "picorlhf",  # the same figure is the same file
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def rows_of(folder: Path) -> dict[str, dict]:
    rows = json.loads((folder / "results.json").read_text())["rows"]
    return {row["model"]: row for row in rows}


def pooled(seeds: list[dict[str, dict]], model: str, key: str) -> tuple[float, float]:
    """The mean over the seeds and its 95 % half-width."""
    found = [seed[model] for seed in seeds if model in seed and seed[model][key] is not None]
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


def story(seeds: list[dict[str, dict]]) -> None:
    figure, left = plt.subplots(figsize=(7.2, 3.0))
    right, places = left.twinx(), range(len(STORY))
    gold, score = ([pooled(seeds, m, key) for m in STORY] for key in ("gold", "score"))
    left.bar(
        [x - 0.2 for x in places], *zip(*[(m, 0.38) for m, _ in gold], strict=True), color=GOLD
    )
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


def overoptimisation(folders: list[Path]) -> None:
    """Gold and score against the root of the KL from the fine-tuned model (Gao et al. 2022)."""
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.0))
    out = folders[0]
    runs = {float(p.name.removeprefix("ppo_beta")): p for p in out.glob("ppo_beta*")}
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
    axes[1].legend(frameon=False)
    save(figure, "overoptimisation")


def win_rates(seeds: list[dict[str, dict]]) -> None:
    names = [m for m in seeds[0] if m != "sft" and all(m in seed for seed in seeds)]
    figure, axis = plt.subplots(figsize=(7.2, 0.6 + 0.3 * len(names)))
    means, half_widths = zip(*[pooled(seeds, m, "win_rate") for m in names], strict=True)
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
    folders = [Path("out") / f"seed{seed}" for seed in sys.argv[1:] or sys.exit(__doc__)]
    story([rows_of(folder / "ppo") for folder in folders])
    learning(folders[0])
    if all((folder / "compare").exists() for folder in folders):
        overoptimisation(folders)
        win_rates([rows_of(folder / "compare") for folder in folders])


if __name__ == "__main__":
    main()
