"""Segmentors as ONNX files: any size of image, the scores of the model, and the program that runs them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from PIL import Image

from msad import load_config
from msad.modeling.segmentation.head import grid_means

pytest.importorskip("onnx", reason="pip install 'msad[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'msad[onnx]'")

from msad.export import onnx as exporter
from msad.export import runner
from msad.export import verify as verifying
from msad.export.evaluate import evaluate_exported
from msad.export.graph import detection_graph

PSP = Path(__file__).parents[2] / "configs" / "Segmentation" / "pspnet_R_18_voc.yaml"
SIZES = [(64, 64), (64, 100), (90, 61), (33, 47), (128, 40), (96, 150)]
SIDES = (48, 90)  # short, longest
CLASSES = ["ground", "disc", "ring"]


def psp_cfg():
    cfg = load_config(PSP)
    cfg.MODEL.RESNETS.update(NORM="BN", STEM_OUT_CHANNELS=8, RES2_OUT_CHANNELS=8)
    cfg.MODEL.SEM_SEG_HEAD.update(NORM="BN", CONVS_DIM=8)
    return cfg


def uper_cfg():
    cfg = psp_cfg()
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.RESNETS.RES5_DILATION, cfg.MODEL.RESNETS.RES4_DILATION = 1, 1
    cfg.MODEL.SEM_SEG_HEAD.update(NAME="UPerHead", IN_FEATURES=["res3", "res4", "res5"])
    return cfg


def fpn_cfg():
    cfg = load_config("")
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    features = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.RESNETS.update(
        DEPTH=18, RES2_OUT_CHANNELS=64, STEM_OUT_CHANNELS=8, NORM="BN", OUT_FEATURES=features
    )  # fmt: skip
    cfg.MODEL.FPN.update(IN_FEATURES=features, OUT_CHANNELS=8)
    cfg.MODEL.SEM_SEG_HEAD.update(CONVS_DIM=8, NORM="BN", IN_FEATURES=["p2", "p3", "p4", "p5"])
    return cfg


@pytest.fixture(params=[psp_cfg, uper_cfg, fpn_cfg], ids=["PSPHead", "UPerHead", "SemSegFPNHead"])
def segmentor(request):
    cfg = request.param()
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = "cpu", "", 3
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = SIDES
    torch.manual_seed(0)
    model = build_model(cfg)
    for parameter in model.sem_seg_head.predictor.parameters():  # scores that are apart
        torch.nn.init.normal_(parameter, std=1.0)
    inputs = [{"image": torch.rand(3, 64, 96) * 255, "sem_seg": torch.zeros(64, 96, dtype=torch.int64)}] * 2
    for _ in range(3):
        model.train()(inputs)  # statistics of its normalisation
    return cfg, model.eval()


def images():
    return [verifying.example_images([size], i)[0][0].numpy() for i, size in enumerate(SIZES)]


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (6, 6), (12, 9), (2, 30)])
def test_means_over_a_grid_of_any_size(size):
    x = torch.randn(2, 3, *size)
    for side in (1, 2, 3, 6):
        torch.testing.assert_close(grid_means(x, side), F.adaptive_avg_pool2d(x, side))


@torch.no_grad()
def test_onnxruntime_gives_the_labels_of_the_model(segmentor, tmp_path):
    cfg, model = segmentor
    graph = detection_graph(model)
    content = exporter.trace(graph, exporter.describe(cfg, graph, {"stuff_classes": CLASSES}))
    exporter.check(content, model)
    (tmp_path / "model.onnx").write_bytes(content)
    detector = runner.Detector(tmp_path / "model.onnx", 1)
    assert detector.about["classes"] == CLASSES and detector.about["detector"] == "SemanticSegmentor"
    several = 0
    for image in images():
        (found,) = detector([image])
        seen = image if cfg.INPUT.FORMAT == "BGR" else image[:, :, ::-1]
        small = T.ResizeShortestEdge(*SIDES).get_transform(seen).apply_image(seen)
        item = {"image": torch.from_numpy(np.ascontiguousarray(small.transpose(2, 0, 1))).float()}
        scores = model([{**item, "height": image.shape[0], "width": image.shape[1]}])[0]["sem_seg"]
        # One of the sizes is resized to values that differ by 1 of 255, see test_export_runner.
        apart = scores.topk(2, dim=0).values.diff(dim=0)[0].abs()
        labels, sure = scores.argmax(dim=0).numpy(), (apart > 0.01 * scores.abs().max()).numpy()
        mine = np.full(labels.shape, -1)
        for label, mask in zip(found["classes"], found["masks"]):
            assert (mine[mask] == -1).all()
            mine[mask] = label
        assert (mine == labels)[sure].all() and sure.mean() > 0.9
        several += len(found["classes"]) > 1
        probability = scores.softmax(dim=0).amax(dim=0).numpy()
        for mask, score, box in zip(found["masks"], found["scores"], found["boxes"]):
            assert score == pytest.approx(probability[mask].mean(), abs=5e-3)
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            assert box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    assert several >= 3


@pytest.mark.parametrize("segmentor", [psp_cfg], indirect=True)
def test_a_wrong_graph_is_not_written(segmentor):
    _, model = segmentor
    content = exporter.trace(detection_graph(model), {})
    with torch.no_grad():
        list(model.sem_seg_head.predictor.parameters())[-1][0] += 0.1
    with pytest.raises(RuntimeError, match=r"scores of onnxruntime differ by 0\.1"):
        exporter.check(content, model)


@pytest.mark.parametrize("segmentor", [psp_cfg], indirect=True)
def test_export_run_and_evaluate(segmentor, tmp_path, monkeypatch, capsys):
    """From a checkpoint to pictures and mIoU, which is 100 on the labels that the model itself gives."""
    cfg, model = segmentor
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    entry = {"NAME": "own_labels", "TYPE": "sem_seg", "IMAGES": "images", "LABELS": "labels", "IMAGE_SUFFIX": ".png"}
    cfg.DATASETS.REGISTER = [{**entry, "CLASSES": CLASSES}]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), ("own_labels",)
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for number, image in enumerate(images()[:3]):
        cv2.imwrite(str(tmp_path / "images" / f"{number}.png"), image)
        Image.fromarray(np.zeros(image.shape[:2], np.uint8)).save(tmp_path / "labels" / f"{number}.png")
    said = exporter.export_onnx(cfg, str(tmp_path / "model.pth"), tmp_path / "shipped")
    assert "run.py" in said
    file = tmp_path / "shipped" / "model.onnx"
    monkeypatch.setattr(sys, "argv", ["run.py"])
    options = ["--input", str(tmp_path / "images"), "--output", str(tmp_path / "found"), "--threshold", "0"]
    assert runner.main([str(file), *options]) == 0
    results = json.loads((tmp_path / "found" / "detections.json").read_text())
    assert len(results) == 3 and len(list((tmp_path / "found").glob("*.jpg"))) == 3
    detector = runner.Detector(file, 1)
    for number, result in enumerate(results):
        (found,) = detector([cv2.imread(str(tmp_path / "images" / f"{number}.png"))])
        assert [d["category"] for d in result["detections"]] == [CLASSES[i] for i in found["classes"]]
        assert result["detections"][0]["segmentation"] == runner.run_lengths(found["masks"][0])
        labels = np.zeros(found["masks"].shape[1:], np.uint8)
        for label, mask in zip(found["classes"], found["masks"]):
            labels[mask] = label
        Image.fromarray(labels).save(tmp_path / "labels" / f"{number}.png")
    try:
        metrics = evaluate_exported(cfg, file)["own_labels"]["sem_seg"]
        assert metrics["mIoU"] == pytest.approx(100) and metrics["pACC"] == pytest.approx(100)
        cfg.DATASETS.REGISTER = [{**entry, "NAME": "renamed", "CLASSES": ["ground", "ring", "disc"]}]
        cfg.DATASETS.TEST = ("renamed",)
        with pytest.raises(ValueError, match="has the classes ground, disc, ring, but renamed has"):
            evaluate_exported(cfg, file)
    finally:
        for name in ("own_labels", "renamed"):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
