"""Tables and charts of a comparison, from numbers whose means and intervals are worked out by hand."""

import json
import runpy
from pathlib import Path

import pytest

from msad.experiments.report.comparison import class_table, entries, format_comparison, table, write_markdown
from msad.visualization import IntervalRow, plot_intervals
from msad.visualization.intervals import intervals_figure
from msad.visualization.weights import weights_figure

COMPARE = Path(__file__).parents[2] / "tools" / "compare.py"


def run(row, seed, ap, kind="row", name=None, **metrics):
    results = {name or row: {"bbox": {"AP": ap, "AP50": 2 * ap, "APl": float("nan"), **metrics}}}
    clocks = {"iterations": 100, "seconds": 12.0, "cpu_seconds": 10.0, "steps": 100}
    return {"kind": kind, "row": row, "seed": seed, **clocks, "results": results}


@pytest.fixture
def data():
    runs = [run("teacher", 0, 40.0, "teacher", "teacher_H"), run("teacher", 0, 42.0, "teacher", "teacher_fused")]
    runs += [run("a", seed, ap) for seed, ap in enumerate((30.0, 31.0, 32.0))]
    runs += [run("b", seed, ap) for seed, ap in enumerate((31.0, 32.5, 32.5))]
    runs += [run("c", 0, 29.0), {"kind": "row", "row": "c", "seed": 1, "error": "FloatingPointError: loss is nan"}]
    runs += [run("a", 0, 30.0, "time")]
    files = {"a": "a.yaml", "b": "b.yaml", "c": "c.yaml"}
    return {"seeds": [0, 1, 2], "reference": "a", "count_teachers": False, "rows": files, "runs": runs}


def test_differences_are_paired_by_seed(data):
    a, b, c = entries(data, "row")
    assert [e.name for e in (a, b, c)] == ["a", "b", "c"]
    assert a.ap.mean == 31.0 and a.ap.std == 1.0 and a.difference is None
    # Differences 1.0, 1.5, 0.5: mean 1, std 0.5, interval 4.303 * 0.5 / sqrt(3).
    assert b.difference.mean == pytest.approx(1.0) and b.difference.half == pytest.approx(1.2421, abs=1e-4)
    assert b.wins == 3 and not b.difference.excludes_zero
    assert c.ap.n == 1 and c.difference.mean == -1.0 and c.difference.half is None
    assert b.others == {"AP50": pytest.approx(64.0)}  # APl is no number


def test_tables(data):
    headers, cells = table(entries(data, "row"), "a")
    assert headers[:7] == ["row", "seeds", "AP", "std", "95 % interval", "minus a", "higher in"]
    assert cells[0][:7] == ["a", "3", "31.00", "1.00", "28.5 to 33.5", "-", "-"]
    assert cells[1][5:7] == ["+1.00 ± 1.24", "3 of 3"]
    assert cells[2][:4] == ["c", "1", "29.00", "-"] and cells[2][5:7] == ["-1.00", "0 of 1"]
    text = format_comparison(data)
    assert "Equal iterations" in text and "Equal training time" in text and "Teachers" in text
    assert "teacher_fused" in text and "c, seed 1: FloatingPointError: loss is nan" in text


def test_significant_difference_is_starred(data):
    data["runs"] = [run("a", s, 30.0) for s in range(3)] + [run("b", s, 31.0 + 0.1 * s) for s in range(3)]
    assert table(entries(data, "row"), "a")[1][1][5] == "+1.10 ± 0.25 *"


def test_classes_if_few(data):
    assert class_table(entries(data, "row")) is None
    data["runs"] = [run("a", 0, 30.0, **{"AP-cell": 20.0, "AP-dust": 40.0})]
    assert class_table(entries(data, "row")) == (["row", "cell", "dust"], [["a", "20.0", "40.0"]])
    data["runs"] = [run("a", 0, 30.0, **{f"AP-{i}": 20.0 for i in range(7)})]
    assert class_table(entries(data, "row")) is None


def test_unknown_metric_names_the_known(data):
    with pytest.raises(ValueError, match=r"segm/AP.*bbox/AP50"):
        entries(data, "row", "segm/AP")


def test_nothing_finished(data):
    assert "No run" in format_comparison({**data, "runs": []})


def test_markdown_has_tables_failures_and_files(data, tmp_path):
    data |= {"command": "python tools/compare.py", "engine": "detectron2 0.6", "torch": "2"}
    write_markdown(data, tmp_path / "compare.md", pictures=("compare.png",))
    text = (tmp_path / "compare.md").read_text()
    assert "| a " in text and "![compare.png](compare.png)" in text and "`c.yaml`" in text
    assert "Runs that failed" in text and "python tools/compare.py" in text
    assert json.loads(json.dumps(data))["reference"] == "a"


def test_weights_are_an_axis_where_rows_differ_in_them(data, tmp_path):
    draw = runpy.run_path(str(COMPARE))["draw"]
    data["losses"] = {"a": [], "b": [{"name": "LAD", "weight": 3}], "c": [{"name": "CAD", "weight": 3}]}
    assert draw(data, tmp_path, "bbox/AP") == ("compare.png", "differences.png")
    data["losses"]["c"] = [{"name": "LAD", "weight": "3e-1"}]
    assert draw(data, tmp_path, "bbox/AP")[-1] == "weights.png" and (tmp_path / "weights.png").stat().st_size > 1000
    points = [(3.0, IntervalRow("b", 32.0, 1.2, (31.0, 32.5, 32.5))), (0.3, IntervalRow("c", 29.0, None, (29.0,)))]
    axes = weights_figure({"LAD": points}, "AP", 31.0, "a").axes[0]
    (curve,) = [line for line in axes.lines if line.get_marker() == "o"]
    assert axes.get_xscale() == "log"
    assert list(curve.get_xdata()) == [0.3, 3.0] and list(curve.get_ydata()) == [29.0, 32.0]
    assert [text.get_text() for text in axes.texts] == ["a"]


def test_chart_shows_every_seed_and_interval(tmp_path):
    series = {
        "equal iterations": [IntervalRow("a", 31.0, 2.5, (30.0, 31.0, 32.0)), IntervalRow("b", 33.0, None, (33.0,))],
        "equal time": [IntervalRow("a", 31.5, 1.0, (31.0, 32.0))],
    }
    axes = intervals_figure(series, "AP", 31.0, "a").axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["b", "a"]  # best first
    dots = [line.get_xdata() for line in axes.lines if line.get_marker() == "o"]
    assert sorted(len(x) for x in dots) == [1, 2, 3]
    (bars,) = [c for c in axes.collections if len(c.get_segments()) and c.get_segments()[0][0][0] == 28.5]
    assert bars.get_segments()[0][1][0] == 33.5
    assert plot_intervals(series, tmp_path / "x" / "chart.png", "AP").stat().st_size > 1000
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_intervals({}, tmp_path / "none.png", "AP")
