"""Draws every metric of run folders side by side; needs matplotlib (pip install -e '.[plot]').

python -m data.plot out/ppo out/ppo_no_kl                    # writes out/ppo/metrics.svg
python -m data.plot out/ppo out/rloo --out compared.svg
"""

import argparse
import io
import json
from pathlib import Path

from data.records import DataError, UserError, atomic, one_line_errors

SETTINGS = ("step", "lr", "kl_coef", "tokens_per_second")  # which are no results


def read_metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl; a value that is not finite stands there as null."""
    path = folder / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        raise DataError(path, 1, f"it holds something else ({error})", "a run's metrics") from None
    if not lines or not all(isinstance(line, dict) and "step" in line for line in lines):
        raise UserError(f"{path} holds no step of a run; name a folder that a stage has written")
    return lines


def draw(runs: dict[str, list[dict]], columns: int = 4):
    """A figure with a panel for each metric and a line for each run."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install -e '.[plot]'") from None
    matplotlib.rcParams |= {"svg.hashsalt": "picorlhf", "svg.fonttype": "none", "font.size": 8}
    names = dict.fromkeys(key for lines in runs.values() for line in lines for key in line)
    keys = [key for key in names if key not in SETTINGS]
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(9, 0.5 + 1.6 * rows), layout="constrained")
    for i, key in enumerate(keys):
        axis = figure.add_subplot(rows, columns, i + 1)
        axis.set_title(key, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        for number, lines in enumerate(runs.values()):
            found = [(x["step"], x[key]) for x in lines if x.get(key) is not None]
            steps, values = zip(*found, strict=True) if found else ((), ())
            style = "." if 0 < len(found) < len(lines) / 2 else "-"  # measured now and then
            axis.plot(steps, values, style, linewidth=1, color=f"C{number}")
    lines = [matplotlib.lines.Line2D([], [], color=f"C{number}") for number in range(len(runs))]
    figure.legend(lines, list(runs), loc="outside lower center", ncols=columns, frameon=False)
    return figure


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folders", nargs="+", type=Path, help="of runs, as out/ppo")
    parser.add_argument("--out", type=Path, help="default: metrics.svg in the first folder")
    args = parser.parse_args(argv)
    with one_line_errors():
        if (path := args.out or args.folders[0] / "metrics.svg").suffix != ".svg":
            raise UserError(f"--out {path} is no name of an SVG file; expected *.svg")
        figure = draw({str(folder): read_metrics(folder) for folder in args.folders})
        drawn = io.BytesIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
        with atomic(path) as file:
            file.write(drawn.getvalue())
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
