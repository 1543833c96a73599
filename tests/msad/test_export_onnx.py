"""What onnxruntime finds with an exported file is what the model finds."""

from __future__ import annotations

import io
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

from msad import load_config
from msad.data.names import dataset_names
from msad.export import graph_ops as ops
from msad.export.graph import detection_graph

pytest.importorskip("onnx", reason="pip install 'msad[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'msad[onnx]'")

from msad.export import onnx as exporter
from msad.export import verify as verifying
from msad.export.runner import Detector, to_size
from msad.export.torchscript import METADATA, script

SIZES = [(64, 64), (64, 100), (90, 64), (33, 47), (128, 64), (200, 75), (75, 200), (57, 160), (250, 250), (96, 96)]
SIDES = (64, 96)  # short, longest
STOCK = {
    "MODEL__BACKBONE__NAME": "build_resnet_fpn_backbone", "MODEL__RESNETS__STEM_OUT_CHANNELS": 8,
    "MODEL__RESNETS__RES2_OUT_CHANNELS": 8, "MODEL__RESNETS__WIDTH_PER_GROUP": 2,
}  # fmt: skip
KINDS = {
    "FCOS": ("FCOS", {}),
    "FCOS_of_mmdetection": ("FCOS", {
        "MODEL__FCOS__SCORE_RULE": "product_after_threshold", "MODEL__FCOS__CLIP_BEFORE_NMS": True,
        "MODEL__FCOS__SCALES": True, "MODEL__FCOS__BOXES": "exp",
    }),
    "EfficientNetLite": ("FCOS", {
        "MODEL__FPN__BOTTOM_UP": "build_efficientnet_lite_backbone", "MODEL__EFFICIENTNET_LITE__NORM": "BN",
    }),
    "RetinaNet": ("RetinaNet", {"MODEL__ANCHOR_GENERATOR__ASPECT_RATIOS": [[0.5, 1.0]]}),
    "GFL": ("GFL", {}),
    "LightFCOS": ("LightFCOS", {"MODEL__LIGHT_HEAD__SEPARABLE": True, "MODEL__LIGHT_HEAD__FINEST_WIDTH": 4}),
    "LightRetinaNet": ("LightRetinaNet", {"MODEL__LIGHT_HEAD__SHARED": True, "MODEL__LIGHT_HEAD__FINEST_WIDTH": 4}),
    "LightGFL": ("LightGFL", {"MODEL__LIGHT_HEAD__SHARED": True, "MODEL__LIGHT_HEAD__FINEST_WIDTH": 4}),
    "MEInst": ("MEInst", {"MODEL__MEINST__CODE": "checkpoint", "MODEL__MEINST__DIM": 6}),
    "FasterRCNN": ("FasterRCNN", STOCK),
    "MaskRCNN": ("MaskRCNN", {}),
    "KeypointRCNN": ("KeypointRCNN", {}),
    "CascadeRCNN": ("CascadeRCNN", {"MODEL__MASK_ON": True, "MODEL__ROI_MASK_HEAD__CLS_AGNOSTIC_MASK": True}),
}


def images(seed: int = 0) -> list[np.ndarray]:
    """BGR photographs of SIZES, of blobs and noise; the last is of one colour."""
    made = [verifying.example_images([size], seed + i)[0][0].numpy() for i, size in enumerate(SIZES)]
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


@torch.no_grad()
def take_statistics(network: nn.Module) -> None:
    """Running statistics of noise: many random layers without them make the same of every image."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
        norm.reset_running_stats()
    network.train()(100 * torch.rand(2, 3, 128, 128) - 50)
    network.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_onnxruntime_finds_what_the_model_finds(kind, tiny_cfg, tiny_model, tmp_path):
    arch, options = KINDS[kind]
    levels = range(3, 7) if arch.endswith("RCNN") else range(3, 6)  # few: most of the time is spent on tracing
    cfg = tiny_cfg(arch, levels, **options)
    model = tiny_model(arch, levels, **options).eval()
    if kind == "EfficientNetLite":
        take_statistics(model.backbone.bottom_up)
    shots = images()
    # High enough for nothing to be found in the image of one colour.
    set_threshold(model, 0.0)
    plain = reference(model, shots[-1:])[0].scores
    set_threshold(model, threshold := float(plain.max()) + 1e-3 if len(plain) else 0.05)
    while len(reference(model, shots[-1:])[0]):
        set_threshold(model, threshold := threshold * 1.05)
    alone = [reference(model, [image])[0] for image in shots]
    assert len(alone[-1]) == 0 and sum(map(len, alone)) > 20

    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = SIDES
    graph = detection_graph(model)
    content = exporter.trace(graph, exporter.describe(cfg, graph, {}))
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
            if getattr(model, "clip_before_nms", False):  # otherwise empty boxes are dropped later
                assert (one["boxes"][:, 2:] > one["boxes"][:, :2]).all()
            assert_same(to_size(one, small.shape, image.shape), instances)


def graph_and_cfg(arch, tiny_cfg, tiny_model, threshold):
    levels = range(3, 7) if arch.endswith("RCNN") else range(3, 6)
    model = tiny_model(arch, levels)
    set_threshold(model, threshold)
    return detection_graph(model), tiny_cfg(arch, levels)


# One image, several, and one without detections.
BATCHES = [(64, 64)], [(96, 70), (50, 100)], [(40, 60)]


@pytest.mark.parametrize(("arch", "threshold"), [("GFL", 0.01), ("KeypointRCNN", 0.2), ("FCOS", 0.99)])
def test_openvino_reads_the_file(arch, threshold, tiny_cfg, tiny_model, tmp_path):
    openvino = pytest.importorskip("openvino", reason="pip install 'msad[openvino]'")
    graph, cfg = graph_and_cfg(arch, tiny_cfg, tiny_model, threshold)
    (tmp_path / "model.onnx").write_bytes(exporter.trace(graph, exporter.describe(cfg, graph, {})))
    compiled = openvino.compile_model(tmp_path / "model.onnx", "CPU")
    for sizes in BATCHES:
        images, sizes = verifying.example_images(sizes, seed=3)
        with torch.no_grad():
            wanted = graph(images, sizes)
        found = compiled({"images": images.numpy(), "sizes": sizes.numpy()})
        assert len(wanted[0]) == 0 if arch == "FCOS" else len(wanted[0]) > 5
        for number, values in enumerate(wanted):
            torch.testing.assert_close(torch.from_numpy(found[number]), values, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("arch", ["FCOS", "RetinaNet", "GFL", "FasterRCNN", "MaskRCNN", "KeypointRCNN"])
def test_torchscript_finds_what_the_graph_finds(arch, tiny_cfg, tiny_model):
    graph, cfg = graph_and_cfg(arch, tiny_cfg, tiny_model, 0.02)
    extra = {METADATA: ""}
    content = io.BytesIO(script(graph, exporter.describe(cfg, graph, {})))
    loaded = torch.jit.load(content, _extra_files=extra)
    assert json.loads(extra[METADATA])["detector"] == type(graph.detector).__name__
    for sizes in BATCHES:
        images, sizes = verifying.example_images(sizes, seed=3)
        with torch.no_grad():
            wanted, found = graph(images, sizes), loaded(images, sizes)
        assert len(wanted[0]) > 1
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_a_wrong_graph_is_refused(tiny_cfg, tiny_model):
    model = tiny_model("FCOS", range(3, 6)).eval()
    graph = detection_graph(model)
    content = exporter.trace(graph, exporter.describe(tiny_cfg("FCOS"), graph, {}))
    exporter.check(content, model)
    find = model.forward_inference
    # As a detector does whose class overrides this method.
    model.forward_inference = lambda images, features, predictions: find(
        images, features, [predictions[0], [x + 1 for x in predictions[1]], predictions[2]]
    )
    with pytest.raises(RuntimeError, match="The exported graph is wrong"):
        exporter.check(content, model)


@pytest.mark.parametrize(
    ("arch", "part", "options"),
    [
        ("MaskRCNN", "roi_heads.mask_head.predictor", {}),
        ("KeypointRCNN", "roi_heads.keypoint_head.score_lowres", {}),
        ("MEInst", "mask_code", {"MODEL__MEINST__CODE": "checkpoint", "MODEL__MEINST__DIM": 6}),
    ],
)
def test_wrong_masks_and_keypoints_are_refused(arch, part, options, tiny_cfg, tiny_model):
    levels = range(3, 7) if arch.endswith("RCNN") else range(3, 6)
    model = tiny_model(arch, levels, **options).eval()
    tensors = list(model.get_submodule(part).state_dict().values())
    for tensor in tensors:
        tensor.uniform_(0.1, 0.5)
    graph = detection_graph(model)
    content = exporter.trace(graph, exporter.describe(tiny_cfg(arch, levels, **options), graph, {}))
    exporter.check(content, model)
    for tensor in tensors:
        tensor.uniform_(0.1, 0.5)  # others than the file's
    with pytest.raises(RuntimeError, match=r"of \d+ objects .+ have the same (masks|keypoints)"):
        exporter.check(content, model)


def test_a_check_compares_something(tiny_cfg, tiny_model):
    """Of a model that finds nothing in random images, a graph with a lower score threshold is checked first."""
    model = tiny_model("FCOS", range(3, 6)).eval()
    set_threshold(model, 0.99)
    graph = detection_graph(model)
    about = exporter.describe(tiny_cfg("FCOS"), graph, {})
    content = exporter.trace(graph, about)
    with pytest.raises(RuntimeError, match="neither the file nor the model finds anything"):
        exporter.check(content, model)
    assert verifying.checked(lambda: exporter.trace(graph, about), exporter.check, model) == content
    assert model.test_score_thresh == 0.99

    def wrong():
        model.head.bbox_pred.bias.data += 1
        made = exporter.trace(graph, about)
        model.head.bbox_pred.bias.data -= 1
        return made

    with pytest.raises(RuntimeError, match="The exported graph is wrong"):
        verifying.checked(wrong, exporter.check, model)
    # One that finds nothing, at the lower threshold either.
    with pytest.raises(RuntimeError, match=r"the file finds 0 objects .+ where the model finds \d\d"):
        verifying.checked(lambda: content, exporter.check, model)


def test_what_cannot_be_exported_is_named(tiny_cfg, tiny_model):
    cfg = tiny_cfg()
    cfg.MODEL.META_ARCHITECTURE = "FusionStudent"
    cfg.MSAD.FUSION_STUDENT.BRANCHES = [{"RESOLUTION": "H"}, {"RESOLUTION": "L"}]
    with pytest.raises(TypeError, match="a fusion student cannot be exported to ONNX"):
        detection_graph(build_model(cfg))
    with pytest.raises(TypeError, match="a MultiScaleTeacher cannot be exported to ONNX"):
        detection_graph(tiny_model(resolutions=["H", "L"]))
    with pytest.raises(TypeError, match="an R-CNN of RPN and CascadeMaskROIHeads cannot be exported"):
        detection_graph(tiny_model("CascadeMask"))
    model = tiny_model("MaskRCNN")
    model.roi_heads.mask_pooler = None
    with pytest.raises(TypeError, match="without pooler of its mask head"):
        detection_graph(model)


def test_operators_that_onnx_lacks_are_named(tiny_cfg, tiny_model, monkeypatch, capfd):
    graph = detection_graph(tiny_model("FCOS", range(3, 6), MODEL__FCOS__SCALES=True, MODEL__FCOS__DEFORM_LAST=True))
    with pytest.raises(ValueError, match="deformable convolutions cannot be exported to ONNX; TorchScript takes them"):
        exporter.trace(graph, {})
    assert not capfd.readouterr().out
    assert script(graph, {})
    graph = detection_graph(tiny_model("FCOS", range(3, 6)))  # and any other, as of somebody's own layers
    monkeypatch.setattr(ops, "clip", lambda boxes, sizes: torch.special.i1(boxes))
    with pytest.raises(ValueError, match=r"cannot be exported to ONNX, TorchScript may take it: .*special_i1"):
        exporter.trace(graph, {})


@pytest.mark.parametrize("order", ["L", "YUV-BT.601"])
def test_other_channels_than_red_green_and_blue_are_refused(order, tiny_cfg, tmp_path):
    """They would be read from files as detectron2 makes them, which the program beside the model cannot."""
    with pytest.raises(ValueError, match=f"INPUT.FORMAT is '{order}'; an exported model reads BGR or RGB images"):
        exporter.export_onnx(tiny_cfg(INPUT__FORMAT=order), "absent.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_metadata_names_what_the_data_set_knows(project, tiny_model):
    cfg = load_config(project / "student.yaml")
    graph = detection_graph(build_model(cfg))
    about = exporter.describe(cfg, graph, dataset_names(cfg))
    assert len(about["classes"]) == 6 and not any(name.isdigit() for name in about["classes"])
    assert {k: about[k] for k in ("format", "min_size", "max_size", "detector", "score_threshold")} == {
        "format": "BGR", "min_size": 32, "max_size": 32, "detector": "FCOS", "score_threshold": 0.001,
    }  # fmt: skip
    assert json.loads(json.dumps(about)) == about


def random_boxes(count: int, side: float, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    corner = torch.rand(count, 2) * side
    return torch.cat([corner, corner + torch.rand(count, 2) * side * 0.4], dim=1)


@pytest.mark.parametrize("limit", [-1, 7])
def test_suppression_of_a_batch_is_that_of_its_images(limit):
    boxes, scores = random_boxes(600, 60.0), torch.rand(600)
    image, group = torch.randint(3, (600,)), torch.randint(5, (600,))
    kept = ops.suppress(boxes, scores, image, group, 4, 5, 0.4, limit)  # the fourth image is empty
    wanted = []
    for number in range(4):
        mine = (image == number).nonzero()[:, 0]
        best = batched_nms(boxes[mine], scores[mine], group[mine], 0.4)
        wanted.append(mine[best if limit < 0 else best[:limit]])
    assert torch.equal(kept, torch.cat(wanted)) and len(kept) < 600
    assert ops.suppress(boxes[:0], scores[:0], image[:0], group[:0], 2, 5, 0.4, limit).shape == (0,)


def test_pooling_is_that_of_the_pooler():
    pooler = ROIPooler(3, [1 / 4, 1 / 8, 1 / 16], 0, "ROIAlignV2", canonical_box_size=40, canonical_level=3)
    maps = [torch.rand(2, 5, 64 // stride, 96 // stride) for stride in (4, 8, 16)]
    boxes, image = random_boxes(50, 64.0), torch.arange(50) % 2
    pooled = ops.pool(pooler, maps, boxes, image)
    wanted = pooler(maps, [Boxes(boxes[image == i]) for i in range(2)])
    torch.testing.assert_close(torch.cat([pooled[image == i] for i in range(2)]), wanted)


def test_keypoints_are_the_peaks_that_detectron2_finds():
    boxes = torch.cat([random_boxes(6, 90.0), torch.tensor([[3.0, 4.0, 3.2, 4.9]])])  # one below a pixel
    maps = torch.randn(7, 4, 14, 14, generator=torch.Generator().manual_seed(1))
    found, wanted = ops.keypoint_peaks(maps, boxes), heatmaps_to_keypoints(maps, boxes)
    torch.testing.assert_close(found, wanted[..., [0, 1, 3]], rtol=1e-4, atol=1e-4)
    assert ops.keypoint_peaks(maps[:0], boxes[:0]).shape == (0, 4, 3)
