"""tools/pareto.py on the miniature project, and what it calls best."""

from __future__ import annotations

import json

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from load_tool import load_tool

from msad import load_config
from msad.export import pareto as measuring
from msad.export.pareto import Candidate
from msad.visualization.pareto import pareto_figure


@pytest.fixture(scope="module")
def tool():
    return load_tool("pareto")


def row(name: str, ap: float, ms: float, engine: str = "torch") -> dict:
    return {"name": name, "engine": engine, "AP": ap, "gmacs": ms, "milliseconds": {"1": ms}}


def test_best_is_what_nothing_of_its_engine_beats():
    rows = [row("good", 30, 10), row("slower", 30, 11), row("worse", 29, 10), row("cheap", 20, 5)]
    rows += [row("twin", 30, 10), row("other", 1, 100, "int8")]
    best = [r["name"] for r in rows if not any(measuring._beats(other, r, 1) for other in rows)]
    assert best == ["good", "cheap", "twin", "other"]


def test_measures_in_every_engine(tool, project, tmp_path, capsys):
    pytest.importorskip("onnx", reason="pip install 'msad[onnx]'")
    pytest.importorskip("onnxruntime", reason="pip install 'msad[onnx]'")
    file = project / "student.yaml"
    torch.save({"model": build_model(load_config(file)).state_dict()}, tmp_path / "trained.pth")
    silent = tmp_path / "silent.yaml"  # it detects nothing, of which evaluations say NaN
    silent.write_text(f"_BASE_: {file}\nMODEL: {{FCOS: {{SCORE_THRESH_TEST: 0.999}}}}\n")
    output = tmp_path / "out"
    trained = str(tmp_path / "trained.pth")
    status = tool.main([
        "--model", "student", str(file), trained, "--model", "student@64", str(file), trained,
        "--model", "silent", str(silent), trained, "--output", str(output),
        "--calibration", str(project / "data" / "images"), "--images", "2", "--rounds", "1", "--threads", "1", "2",
    ])  # fmt: skip
    assert status == 0
    rows = json.loads((output / "pareto.json").read_text())["rows"]
    assert [(r["name"], r["engine"]) for r in rows] == [
        (name, engine) for name in ("student", "student_64", "silent") for engine in ("torch", "onnxruntime", "int8")
    ]
    assert all(0 < r["milliseconds"]["2"] < float("inf") and r["AP"] >= 0 for r in rows)
    assert [r["AP"] for r in rows[6:]] == [0.0, 0.0, 0.0]
    assert 3 < rows[3]["gmacs"] / rows[0]["gmacs"] < 5  # twice the side
    assert rows[0]["AP"] == pytest.approx(rows[1]["AP"], abs=0.5)
    assert (output / "pareto.png").stat().st_size > 5000
    assert (output / "student_64" / "model_int8.onnx").is_file()
    assert "student_64" in capsys.readouterr().out


def test_the_line_joins_the_best():
    rows = [row("good", 30, 10), row("slower", 25, 11), row("cheap", 20, 5)]
    for one in rows:
        one["best"] = one["name"] != "slower"
    _, time = pareto_figure(rows).axes
    assert [list(line.get_xdata()) for line in time.lines] == [[5, 10, 11], [5, 10]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["MODEL.META_ARCHITECTURE", "SemanticSegmentor"], "other is a segmentor; only the AP of boxes"),
        (["DATASETS.TEST", ("without_boxes",)], "other: data set 'without_boxes' has no annotated boxes"),
    ],
)
def test_models_without_boxes_are_refused_before_any_export(project, tmp_path, monkeypatch, options, message):
    DatasetCatalog.register("without_boxes", lambda: [{"file_name": "a.png", "annotations": []}])
    cfg = load_config(project / "student.yaml")
    other = load_config(project / "student.yaml", options)
    monkeypatch.setattr(measuring, "export_onnx", lambda *args: pytest.fail("exported"))
    try:
        with pytest.raises(ValueError, match=message):
            measuring.measure([Candidate("good", cfg, "w.pth"), Candidate("other", other, "w.pth")], tmp_path)
    finally:
        DatasetCatalog.remove("without_boxes")


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([("a@big", "{}")], "--model a@big: behind the @ comes a short side in pixels"),
        ([("a", "{}"), ("a", "{}")], "names must differ, got a, a"),
        ([("a", "absent.yaml")], "no config file absent.yaml"),
    ],
)
def test_errors_are_one_line(tool, project, tmp_path, capsys, models, message):
    arguments = [x for n, f in models for x in ("--model", n, f.format(project / "student.yaml"), "w.pth")]
    assert tool.main([*arguments, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
