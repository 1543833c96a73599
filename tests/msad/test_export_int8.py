"""Integer models and the evaluation of exported files."""

from __future__ import annotations

import json
import logging

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.evaluation import DatasetEvaluators
from detectron2.modeling import build_model

from msad import load_config
from msad.data import register_datasets
from msad.engine import DistillTrainer
from msad.export.graph import detection_graph

pytest.importorskip("onnx", reason="pip install 'msad[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'msad[onnx]'")

import onnx

from msad.data.names import dataset_names
from msad.export import onnx as exporter
from msad.export.evaluate import ExportedModel, evaluate_exported
from msad.export.quantize import calibration_inputs, integer_nodes, quantize
from msad.export.runner import Detector, read_image


@pytest.fixture(scope="module")
def exported(project, tmp_path_factory):
    """(config, FCOS with an uneven head, its file)."""
    cfg = load_config(project / "student.yaml")
    register_datasets(cfg)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    for name, parameter in model.head.named_parameters():
        if name.endswith("weight"):
            torch.nn.init.normal_(parameter, std=0.1)
    graph = detection_graph(model)
    file = tmp_path_factory.mktemp("exported") / "model.onnx"
    file.write_bytes(exporter.trace(graph, exporter.describe(cfg, graph, dataset_names(cfg))))
    return cfg, model, file


@pytest.fixture(scope="module")
def images(project):
    return sorted((project / "data").rglob("*.jpg")) + sorted((project / "data").rglob("*.png"))


def test_evaluated_detections_are_those_of_the_model(exported):
    _, model, file = exported
    shown = ExportedModel(file, threads=1)
    for record in DatasetCatalog.get("tiny_val"):
        found = shown([record])[0]["instances"]
        image = cv2.imread(record["file_name"])
        small = T.ResizeShortestEdge(32, 32).get_transform(image).apply_image(image)
        tensor = torch.from_numpy(np.ascontiguousarray(small.transpose(2, 0, 1)))
        with torch.no_grad():
            wanted = model([{"image": tensor, "height": image.shape[0], "width": image.shape[1]}])[0]["instances"]
        assert len(found) == len(wanted) > 20 and found.image_size == wanted.image_size
        torch.testing.assert_close(found.scores, wanted.scores, rtol=0, atol=1e-4)
        assert torch.equal(found.pred_classes, wanted.pred_classes)
        torch.testing.assert_close(found.pred_boxes.tensor, wanted.pred_boxes.tensor, rtol=1e-4, atol=1e-3)


def test_images_are_read_as_the_shipped_program_does(exported, tmp_path):
    """detectron2 makes white of all above 255."""
    _, _, file = exported
    image = np.random.default_rng(0).integers(0, 2**16, (40, 50), np.uint16)
    assert cv2.imwrite(str(tmp_path / "deep.png"), image)
    wanted = Detector(file, 1)([read_image(tmp_path / "deep.png")])[0]
    found = ExportedModel(file, threads=1)([{"file_name": str(tmp_path / "deep.png")}])[0]["instances"]
    assert len(found) == len(wanted["scores"]) > 20
    assert np.array_equal(found.scores.numpy(), wanted["scores"])
    with pytest.raises(ValueError, match=r"absent\.png: run\.py cannot read it"):
        ExportedModel(file, threads=1)([{"file_name": str(tmp_path / "absent.png")}])


def test_evaluates_by_the_evaluator_of_the_data(exported):
    cfg, _, file = exported
    results = evaluate_exported(cfg, file, threads=1)
    assert set(results) == {"tiny_val"} and {"AP", "APs"} <= set(results["tiny_val"]["bbox"])
    assert 0 <= results["tiny_val"]["bbox"]["AP"] <= 100
    json.dumps(results, allow_nan=False)


def test_evaluates_on_data_without_names_of_classes(exported, monkeypatch):
    cfg, _, file = exported
    cfg = load_config("", ["DATASETS.TEST", ("nameless",)])
    DatasetCatalog.register("nameless", lambda: DatasetCatalog.get("tiny_val")[:1])
    monkeypatch.setattr(DistillTrainer, "build_evaluator", lambda *_: DatasetEvaluators([]))
    try:
        assert evaluate_exported(cfg, file, threads=1) == {"nameless": {}}
    finally:
        DatasetCatalog.remove("nameless")


def test_refuses_data_of_other_classes(exported, tmp_path):
    cfg, _, file = exported
    model = onnx.load(file)
    about = Detector(file).about
    about["classes"] = about["classes"][::-1]
    onnx.helper.set_model_props(model, {"msad": json.dumps(about)})
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(ValueError, match=r"has the classes .+, but tiny_val has "):
        evaluate_exported(cfg, tmp_path / "other.onnx", threads=1)


def test_integers_find_nearly_the_same(exported, images, tmp_path):
    _, _, file = exported
    count = quantize(file, images, tmp_path / "int8.onnx")
    names = [node.name for node in integer_nodes(onnx.load(file).graph)]
    layers = [name for name in names if name.split("/")[-1].startswith("Conv")]
    assert count == len(layers) > 20
    assert not any(last in name for name in names for last in ("cls_score", "bbox_pred", "ctrness"))
    made = onnx.load(tmp_path / "int8.onnx")
    assert sum(node.op_type == "QuantizeLinear" for node in made.graph.node) > 20
    floats, integers = Detector(file, 1), Detector(tmp_path / "int8.onnx", 1)
    assert integers.about == {**floats.about, "precision": "int8"}
    shots = [cv2.imread(str(image)) for image in images]
    best = np.array([[m([shot])[0]["scores"][:5] for shot in shots] for m in (floats, integers)])
    assert 0 < np.abs(best[0] - best[1]).mean() < 0.1 * best[0].mean()


def test_heads_that_never_run_are_not_calibrated(tmp_path, images):
    """Without a detection, the range of a mask head's maps would be taken for 0 to 1."""
    opts = ["MODEL.MASK_ON", True, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.ROI_HEADS.NUM_CLASSES", 3]
    cfg = load_config("quickstart/Base-RCNN.yaml", opts)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    file = tmp_path / "model.onnx"
    for threshold, finds in ((0.0, True), (0.999, False)):
        model.roi_heads.box_predictor.test_score_thresh = threshold
        graph = detection_graph(model)
        file.write_bytes(exporter.trace(graph, exporter.describe(cfg, graph, {})))
        if finds:
            assert quantize(file, images[:1], tmp_path / "int8.onnx") > 20
        else:
            with pytest.raises(ValueError, match=r"finds nothing in these images.* a score threshold below 0\.999"):
                quantize(file, images[:1], tmp_path / "int8.onnx")


def test_calibration_images_that_cannot_be_used(exported, images, tmp_path, caplog):
    about = Detector(exported[2]).about
    (tmp_path / "a.jpg").write_bytes(b"no image")
    cv2.imwrite(str(tmp_path / "line.png"), np.zeros((1, 900, 3), np.uint8))
    with caplog.at_level(logging.WARNING):
        assert len(list(calibration_inputs(about, [tmp_path / "a.jpg", tmp_path / "line.png", images[0]]))) == 1
    assert "a.jpg" in caplog.text and "line.png: 900x1 pixels would be" in caplog.text
    with pytest.raises(ValueError, match="none of 1 files can be used"):
        list(calibration_inputs(about, [tmp_path / "a.jpg"]))
