"""tools/plot_features.py from the records of runs to a chart."""

import json
import sys

import pytest
from load_tool import load_tool

from msad.visualization.feature_plots import features_figure, read_features


@pytest.fixture
def run_folder(tmp_path):
    """A run that was interrupted after iteration 20, so that it wrote this one twice."""
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [
        {"iteration": i, "levels": {p: {"m": 50.0, "n": n, "mn": n / 10, "angle": 90 - n} for p in ("p3", "p4")}}
        for i, n in ((0, 1.0), (20, 7.0), (20, 9.0), (40, 20.0))
    ]
    (folder / "features.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def call(monkeypatch, capsys):
    module = load_tool("plot_features")

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["plot_features.py", *map(str, args)])
        return module.main(list(map(str, args))), capsys.readouterr()

    return run


def test_later_records_of_an_iteration_count(run_folder):
    found = read_features(run_folder / "features.jsonl")
    assert found["p3"]["iteration"].tolist() == [0, 20, 40] and found["p4"]["n"].tolist() == [1.0, 9.0, 20.0]


def test_figure_has_a_column_a_level_and_a_line_a_run(run_folder):
    run = read_features(run_folder / "features.jsonl")
    axes = features_figure({"a": run, "b": run}).axes
    assert [ax.get_title() for ax in axes[:2]] == ["p3", "p4"]
    assert [len(ax.lines) for ax in axes] == [2, 2, 3, 6, 2, 2]  # m once, and three empty ones for the legend
    assert axes[2].lines[1].get_ydata().tolist() == [1.0, 9.0, 20.0]


def test_command_line(call, run_folder, tmp_path):
    status, printed = call(run_folder, f"w = 3={run_folder}", "--output", tmp_path / "x.png", "--levels", "p4")
    assert status == 0 and "x.png" in printed.out and (tmp_path / "x.png").stat().st_size > 1000
    status, printed = call(run_folder, "--levels", "p9")
    assert status == 2 and "p3, p4" in printed.err
    status, printed = call(tmp_path / "none")
    assert status == 2 and "ANALYSIS_PERIOD" in printed.err
