"""tools/export_model.py from the command line."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
from detectron2.modeling import build_model
from load_tool import as_program

from msad import load_config


@pytest.fixture
def export(monkeypatch, capsys):
    return as_program("export_model", monkeypatch, capsys)


def test_exports_and_says_how_to_build_the_model(project, tmp_path, export):
    file = project / "stock_student.yaml"
    torch.save({"model": build_model(load_config(file)).state_dict()}, tmp_path / "trained.pth")
    arguments = ["--config-file", file, "--weights", tmp_path / "trained.pth", "--output", tmp_path / "out"]
    code, said, _ = export(*arguments)
    assert code == 0 and said.startswith(f"{tmp_path}/out/config.yaml builds this model in plain detectron2, ")
    assert {"model.pth", "config.yaml"} <= {p.name for p in (tmp_path / "out").iterdir()}

    code, _, error = export(*arguments, "MODEL.RETINANET.NUM_CLASSES", 7)
    assert code == 2 and "trained.pth is not a checkpoint of this config: 2 tensors" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config-file", "absent.yaml", "--weights", "w.pth", "--output", "o"], "no config file absent.yaml"),
        (["--config-file", "{student}", "--weights", "w.pth", "--output", "o"], "no checkpoint w.pth"),
        (
            ["--config-file", "{student}", "--weights", "w.pth", "--output", "o", "MODEL.FCOS.NUM_CLASES", "3"],
            "unknown config key MODEL.FCOS.NUM_CLASES; did you mean MODEL.FCOS.NUM_CLASSES?",
        ),
    ],
)
def test_errors_are_one_line(project, tmp_path, export, arguments, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = export(*(a.format(student=project / "student.yaml") for a in arguments))
    assert code == 2 and message in error
    assert not list(tmp_path.iterdir())


def test_exports_to_onnx(project, tmp_path, export):
    pytest.importorskip("onnx", reason="pip install 'msad[onnx]'")
    pytest.importorskip("onnxruntime", reason="pip install 'msad[onnx]'")
    file = project / "stock_student.yaml"
    torch.manual_seed(0)
    weights = build_model(load_config(file)).state_dict()
    weights["head.cls_score.weight"] *= 100  # scores as far apart as trained ones; the order of equal ones is open
    torch.save({"model": weights}, tmp_path / "trained.pth")
    arguments = ["--config-file", file, "--weights", tmp_path / "trained.pth", "--output", tmp_path / "out"]
    code, said, _ = export(*arguments, "--format", "onnx")
    run = tmp_path / "out" / "run.py"
    assert (code, said) == (0, f"python {run} {run.parent}/model.onnx --input PATH --output DIR runs this model.")
    assert {p.name for p in run.parent.iterdir()} == {"model.onnx", "run.py"}
    calibration = ["--int8", "--calibration", project / "data" / "images"]
    code, said, _ = export(*arguments, "--format", "onnx", *calibration)
    assert code == 0 and re.fullmatch(rf"{run.parent}/model_int8.onnx: \d\d integer layers, 8 images", said)
    export(*arguments, "--format", "onnx")
    assert {p.name for p in run.parent.iterdir()} == {"model.onnx", "run.py"}  # integers of other weights are gone
    code, _, error = export(*arguments, *calibration)
    assert code == 2 and "--int8 needs --format onnx and --calibration DIR" in error
    code, _, error = export(*arguments, "--format", "onnx", "MODEL.RETINANET.NUM_CLASSES", 7)
    assert code == 2 and "trained.pth is not a checkpoint of this config: 2 tensors" in error


def test_exports_to_torchscript(project, tmp_path, export):
    file = project / "stock_student.yaml"
    torch.manual_seed(0)
    weights = build_model(load_config(file)).state_dict()
    weights["head.cls_score.weight"] *= 100
    torch.save({"model": weights}, tmp_path / "trained.pth")
    arguments = ["--config-file", file, "--weights", tmp_path / "trained.pth", "--output", tmp_path / "out"]
    code, said, _ = export(*arguments, "--format", "torchscript")
    assert code == 0 and said.startswith(f"torch.jit.load('{tmp_path}/out/model.torchscript'), after")
    extra = {"msad.json": ""}
    model = torch.jit.load(tmp_path / "out" / "model.torchscript", _extra_files=extra)
    about = json.loads(extra["msad.json"])
    assert about["detector"] == "RetinaNet" and len(about["classes"]) == 6
    assert len(model(torch.zeros(1, 64, 96, 3, dtype=torch.uint8), torch.tensor([[64, 96]]))) == 4


@pytest.fixture
def without_onnxruntime(monkeypatch):
    """As if it were not installed, and nothing had been imported that asks for it."""
    for name in [name for name in sys.modules if name.startswith("msad.export")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)


def test_plain_files_need_no_onnxruntime(project, tmp_path, export, without_onnxruntime):
    file = project / "stock_student.yaml"
    torch.save({"model": build_model(load_config(file)).state_dict()}, tmp_path / "trained.pth")
    arguments = ["--config-file", file, "--weights", tmp_path / "trained.pth", "--output", tmp_path / "out"]
    assert export(*arguments)[0] == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["export_model", "--config-file", "{}", "--weights", "w.pth", "--output", "o", "--format", "onnx"],
        ["evaluate_onnx", "model.onnx", "--config-file", "{}"],
        ["pareto", "--model", "a", "{}", "w.pth", "--output", "o"],
    ],
)
def test_says_what_onnx_needs(project, arguments, monkeypatch, capsys, without_onnxruntime):
    pytest.importorskip("onnx", reason="pip install 'msad[onnx]'")
    program = as_program(arguments[0], monkeypatch, capsys)
    code, _, error = program(*(a.format(project / "student.yaml") for a in arguments[1:]))
    assert code == 2 and "onnxruntime is not installed: pip install 'msad[onnx]'" in error
