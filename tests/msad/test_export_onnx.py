"""What onnxruntime finds with an exported file is what the model finds."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.layers import batched_nms
from detectron2.modeling import build_model
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from detectron2.structures.keypoints import heatmaps_to_keypoints
from torch import nn
from torchvision.ops import box_iou

from msad.export import graph_ops as ops
from msad.export.graph import detection_graph

pytest.importorskip("onnx", reason="pip install 'msad[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'msad[onnx]'")

from msad.export import onnx as exporter  # noqa: E402
from msad.export.runner import Detector, to_size  # noqa: E402

SIZES = [(64, 64), (64, 100), (90, 64), (33, 47), (128, 64), (200, 75), (75, 200), (57, 160), (250, 250), (96, 96)]
SIDES = (64, 96)  # short, longest
STOCK = {
    "MODEL__BACKBONE__NAME": "build_resnet_fpn_backbone", "MODEL__RESNETS__STEM_OUT_CHANNELS": 8,
    "MODEL__RESNETS__RES2_OUT_CHANNELS": 8, "MODEL__RESNETS__WIDTH_PER_GROUP": 2,
}  # fmt: skip
KINDS = {
    "FCOS": ("FCOS", {}),
    "RetinaNet": ("RetinaNet", {"MODEL__ANCHOR_GENERATOR__ASPECT_RATIOS": [[0.5, 1.0]]}),
    "GFL": ("GFL", {}),
    "MEInst": ("MEInst", {"MODEL__MEINST__CODE": "checkpoint", "MODEL__MEINST__DIM": 6}),
    "FasterRCNN": ("FasterRCNN", STOCK),
    "MaskRCNN": ("MaskRCNN", {}),
    "KeypointRCNN": ("KeypointRCNN", {}),
    "CascadeRCNN": ("CascadeRCNN", {"MODEL__MASK_ON": True, "MODEL__ROI_MASK_HEAD__CLS_AGNOSTIC_MASK": True}),
}


def images(seed: int = 0) -> list[np.ndarray]:
    """BGR photographs of SIZES, of blobs and noise; the last is of one colour."""
    made = [exporter.example_images([size], seed + i)[0][0].numpy() for i, size in enumerate(SIZES)]
    rng = np.random.default_rng(seed)
    noisy = [np.clip(x + rng.normal(0, 20, x.shape), 0, 255).astype(np.uint8) for x in made]
    return [*noisy[:-1], np.full((*SIZES[-1], 3), 110, np.uint8)]


def resized(image: np.ndarray) -> np.ndarray:
    return T.ResizeShortestEdge(*SIDES).get_transform(image).apply_image(image)


@torch.no_grad()
def reference(model: nn.Module, images: list[np.ndarray]) -> list:
    """Instances in pixels of ``images``, the way detectron2's predictor makes them, but of a whole batch."""
    inputs = []
    for image in images:
        small = torch.from_numpy(np.ascontiguousarray(resized(image).transpose(2, 0, 1))).float()
        inputs.append({"image": small, "height": image.shape[0], "width": image.shape[1]})
    return [output["instances"] for output in model(inputs)]


def set_threshold(model: nn.Module, value: float) -> None:
    for module in model.modules():
        if hasattr(module, "test_score_thresh"):
            module.test_score_thresh = value


def assert_same(found: dict, wanted) -> None:
    """Every object once: same class, box IoU > 0.999, score within 1e-4, mask IoU > 0.99, keypoints within 0.1 px.

    Random networks make slivers of hundredths of a pixel, too thin for IoU in float32: their corners must agree.
    """
    assert len(found["boxes"]) == len(wanted)
    if len(wanted) == 0:
        return
    boxes, scores = torch.from_numpy(found["boxes"]), torch.from_numpy(found["scores"])
    theirs = wanted.pred_boxes.tensor
    sliver = (theirs[:, 2:] - theirs[:, :2]).amin(dim=1) < 0.5
    near = (theirs[:, None] - boxes).abs().amax(dim=2) < 1e-3
    same = (box_iou(theirs, boxes) > 0.999) | (sliver[:, None] & near)
    same &= wanted.pred_classes[:, None] == torch.from_numpy(found["classes"])
    apart, place = (wanted.scores[:, None] - scores).abs().masked_fill(~same, 1).min(dim=1)
    assert (apart < 1e-4).all(), wanted[apart >= 1e-4].pred_boxes
    assert sorted(place.tolist()) == list(range(len(boxes)))
    assert ("masks" in found, "keypoints" in found) == (wanted.has("pred_masks"), wanted.has("pred_keypoints"))
    if wanted.has("pred_masks"):
        mine, theirs = torch.from_numpy(found["masks"])[place], wanted.pred_masks
        both, either = (mine & theirs).flatten(1).sum(1), (mine | theirs).flatten(1).sum(1)
        assert (both[either > 0] / either[either > 0] > 0.99).all()
    if wanted.has("pred_keypoints"):
        points = torch.from_numpy(found["keypoints"])[place]
        torch.testing.assert_close(points[..., :2], wanted.pred_keypoints[..., :2], rtol=0, atol=0.1)
        torch.testing.assert_close(points[..., 2], wanted.pred_keypoints[..., 2], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_onnxruntime_finds_what_the_model_finds(kind, tiny_cfg, tiny_model, tmp_path):
    arch, options = KINDS[kind]
    cfg = tiny_cfg(arch, **options)
    model = tiny_model(arch, **options).eval()
    shots = images()
    # Above all scores of the image of one colour, in which nothing is to be found then.
    set_threshold(model, 0.0)
    plain = reference(model, shots[-1:])[0].scores
    set_threshold(model, float(plain.max()) + 1e-3 if len(plain) else 0.05)
    alone = [reference(model, [image])[0] for image in shots]
    assert len(alone[-1]) == 0 and sum(map(len, alone)) > 20

    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = SIDES
    graph = detection_graph(model)
    content = exporter.trace(graph, exporter.describe(cfg, graph))
    exporter.check(content, graph)
    (tmp_path / "model.onnx").write_bytes(content)
    detector = Detector(tmp_path / "model.onnx", threads=1)
    assert detector.about["detector"] == type(model).__name__ and detector.about["classes"] == ["0", "1", "2"]
    # The same pixels for both: random networks make much of a rounding in the resizing.
    seen = [resized(image) for image in shots]
    for found, wanted in (
        ([detector.run([image])[0] for image in seen], alone),
        (detector.run(seen), reference(model, shots)),  # padding has its effect on what is found, here as there
    ):
        for one, small, image, instances in zip(found, seen, shots, wanted):
            assert_same(to_size(one, small.shape, image.shape), instances)
