"""The curves of runs, drawn and refused."""

import json
import re
import sys

from data import plot

import pytest

pytest.importorskip("matplotlib", reason="needs the extra `plot`")


def write(folder, lines) -> str:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def test_a_panel_for_each_metric_and_a_curve_for_each_run(tmp_path, capsys):
    first = write(tmp_path / "a", [{"step": i, "loss": i * i, "lr": 1} for i in range(3)])
    lines = [{"step": i, "loss": None if i == 1 else 2.0, "kl": 0.5} for i in range(3)]
    second = write(tmp_path / "b", lines)
    figure = plot.draw({n: plot.read_metrics(tmp_path / n) for n in ("a", "b")})
    loss, kl = figure.axes
    assert [axis.get_title() for axis in figure.axes] == ["loss", "kl"]
    drawn = [[curve.get_xydata().tolist() for curve in axis.lines] for axis in (loss, kl)]
    assert drawn[0] == [[[0, 0], [1, 1], [2, 4]], [[0, 2], [2, 2]]]
    assert drawn[1] == [[], [[0, 0.5], [1, 0.5], [2, 0.5]]]
    plot.main([first, second])
    assert capsys.readouterr().out == f"wrote {first}/metrics.svg\n"
    svg = (tmp_path / "a/metrics.svg").read_text()
    assert all(re.search(f">{text}<", svg) for text in ("loss", "kl", first, second))
    plot.main([second, "--out", str(tmp_path / "x/y.svg")])
    assert (tmp_path / "x/y.svg").exists()


@pytest.mark.parametrize("content", [None, "", "x", "[1]\n", "{}\n"])
def test_what_is_no_run_is_one_line(content, tmp_path, capsys):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(SystemExit) as status:
        plot.main([str(tmp_path)])
    error = capsys.readouterr().err
    assert status.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert "metrics.jsonl" in error and not list(tmp_path.glob("*.svg"))


def test_without_matplotlib_the_remedy_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        plot.main([write(tmp_path / "a", [{"step": 0, "loss": 1}])])
    assert "pip install -e '.[plot]'" in capsys.readouterr().err


def test_only_svg_is_written(tmp_path, capsys):
    folder = write(tmp_path / "a", [{"step": 0, "loss": 1}])
    with pytest.raises(SystemExit) as ended:
        plot.main([folder, "--out", str(tmp_path / "x.png")])
    assert ended.value.code == 2 and "x.png is no name of an SVG file" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()
