"""tools/quickstart.py from drawing scenes to the report, with a handful of iterations."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

SCRIPT = Path(__file__).parents[2] / "tools" / "quickstart.py"
ROWS = ["baseline_L", "baseline_L_shifted", "teacher", "student_L_control", "student_L"]


@pytest.fixture(scope="module")
def quickstart():
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.SYNTHETIC = {"num_train": 8, "num_val": 4, "size": (96, 96), "objects": (3, 5), "min_size": 16.0, "seed": 0}
    return module


def call(module, monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *map(str, args)])
    return module.main()


def test_from_scenes_to_report(quickstart, monkeypatch, tmp_path, capsys):
    known = set(DatasetCatalog.list())
    args = ["--output", tmp_path, "--iterations", 4, "--rows", *ROWS, "--", "SOLVER.IMS_PER_BATCH", 2]
    assert call(quickstart, monkeypatch, *args) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    evaluated = {*ROWS, "teacher_H", "teacher_L", "teacher_fused"} - {"teacher"}
    assert set(metrics["results"]) == evaluated == set(metrics["cost"])
    assert all("AP" in row["bbox"] and row["iterations"] == 4 for row in metrics["results"].values())
    assert metrics["engine"].startswith("detectron2") and metrics["seconds"] > 0
    # The L branch alone costs what the student costs, and the fusion more than both branches.
    macs = {row: cost["gmacs"]["total"] for row, cost in metrics["cost"].items()}
    assert macs["teacher_L"] == pytest.approx(macs["student_L"], rel=1e-6)
    assert macs["teacher_fused"] > macs["teacher_H"] > macs["student_L"] > macs["baseline_L"]
    for file in ("report.html", "report.md", "curves.png", "panels.jpg", "results.png"):
        assert (tmp_path / file).stat().st_size > 0
    assert "student_L_control" in capsys.readouterr().out

    # Finished rows are kept, whatever else is repeated; a new process has not registered their data.
    for name in set(DatasetCatalog.list()) - known:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    stamps = {row: (tmp_path / "seed0" / row / "model_final.pth").stat().st_mtime_ns for row in ROWS}
    assert call(quickstart, monkeypatch, *args) == 0
    assert stamps == {row: (tmp_path / "seed0" / row / "model_final.pth").stat().st_mtime_ns for row in ROWS}
    again = json.loads((tmp_path / "metrics.json").read_text())
    assert again["results"] == metrics["results"] and again["seconds"] > metrics["seconds"]

    # Results of another configuration are not mixed in.
    args = ["--output", tmp_path, "--iterations", 5, "--rows", "baseline_L"]
    assert call(quickstart, monkeypatch, *args) == 2
    assert "another configuration" in capsys.readouterr().err


def test_failures_are_named(quickstart, monkeypatch, tmp_path, capsys):
    args = ["--output", tmp_path, "--iterations", 1, "--rows", "baseline_L", "student_L", "--"]
    args += ["SOLVER.IMS_PER_BATCH", 2, "MODEL.BACKBONE.NAME", "build_no_such_backbone"]
    assert call(quickstart, monkeypatch, *args) == 1
    error = capsys.readouterr().err
    assert "baseline_L, seed 0: KeyError" in error and "build_no_such_backbone" in error
    assert "student_L, seed 0: not run, because what it needs (teacher, seed 0) failed" in error
    assert not (tmp_path / "report.html").exists()


def test_data_folder_must_be_complete(quickstart, monkeypatch, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    assert call(quickstart, monkeypatch, "--data", tmp_path, "--output", tmp_path / "out") == 2
    assert "annotations_train.json" in capsys.readouterr().err


def test_short_side_scales_every_row(quickstart, tmp_path):
    study = quickstart.Study(SCRIPT.parents[1] / "configs/quickstart", tmp_path, rows=("baseline_H",), short_side=384)
    high, low = (study.config(study.task(row, 0)) for row in ("baseline_H", "baseline_L"))
    assert high.INPUT.MIN_SIZE_TEST == 384 and tuple(high.INPUT.MIN_SIZE_TRAIN) == (384,)
    assert low.INPUT.MIN_SIZE_TEST == 192 and low.INPUT.MAX_SIZE_TEST == high.INPUT.MAX_SIZE_TEST // 2


def test_unknown_row_is_named(quickstart, tmp_path):
    study = quickstart.Study(SCRIPT.parents[1] / "configs/quickstart", tmp_path, rows=("baseline_XL",))
    with pytest.raises(ValueError, match="baseline_XL"):
        study.ordered()
