"""Tiny models and batches that the tests of the core share. Factories, so that a test says what is special about it."""

from __future__ import annotations

import pytest
import runs
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks
from helpers import between
from torch import nn

from msad import load_config
from msad.distill.distiller import Distiller, student_shapes
from msad.distill.teachers import FrozenTeacher
from msad.resolution import get_resolution

torch.set_num_threads(1)

CHANNELS = 8
CLASSES = 3
KEYPOINTS = 3
# Detectors of detectron2's GeneralizedRCNN: what makes each of them, by name.
RCNNS = {
    "FasterRCNN": {},
    "MaskRCNN": {"MODEL.MASK_ON": True},
    "KeypointRCNN": {"MODEL.KEYPOINT_ON": True},
    "CascadeRCNN": {"MODEL.ROI_HEADS.NAME": "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True},
    "CascadeMask": {
        "MODEL.ROI_HEADS.NAME": "CascadeMaskROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
        "MODEL.MASK_ON": True,
    },
    "HTC": {
        "MODEL.ROI_HEADS.NAME": "HTCROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
        "MODEL.MASK_ON": True, "MODEL.ROI_MASK_HEAD.NAME": "HTCMaskHead",
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _make_rcnn(cfg, names) -> None:
    """Tiny heads on levels ``names``; samples so many anchors and proposals that none is left out at random."""
    cfg.MODEL.FPN.TOP_BLOCK = "maxpool"
    rpn, roi = cfg.MODEL.RPN, cfg.MODEL.ROI_HEADS
    rpn.IN_FEATURES, roi.IN_FEATURES = names, names[:-1]
    rpn.BATCH_SIZE_PER_IMAGE = roi.BATCH_SIZE_PER_IMAGE = 10**6
    rpn.PRE_NMS_TOPK_TRAIN = rpn.PRE_NMS_TOPK_TEST = rpn.POST_NMS_TOPK_TRAIN = rpn.POST_NMS_TOPK_TEST = 40
    roi.NUM_CLASSES, roi.SCORE_THRESH_TEST, roi.NAME = CLASSES, 0.02, "StandardROIHeads"
    box, mask, keypoint = cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_MASK_HEAD, cfg.MODEL.ROI_KEYPOINT_HEAD
    box.NAME, box.NUM_FC, box.FC_DIM, box.POOLER_RESOLUTION = "FastRCNNConvFCHead", 1, 16, 3
    mask.NAME, mask.NUM_CONV, mask.CONV_DIM, mask.POOLER_RESOLUTION = "MaskRCNNConvUpsampleHead", 1, 8, 4
    keypoint.CONV_DIMS, keypoint.NUM_KEYPOINTS, keypoint.POOLER_RESOLUTION = [8], KEYPOINTS, 4
    keypoint.MIN_KEYPOINTS_PER_IMAGE = 0


@pytest.fixture
def tiny_cfg():
    """``tiny_cfg(arch, levels, resolutions, **options)``: config of a detector with an 8-channel pyramid.

    ``arch`` is a meta-architecture or one of RCNNS, whose levels are P2-P6 by default. With ``resolutions`` a
    MultiScaleTeacher of that detector. ``options`` are keys with "__" for the dots.
    """

    def make(arch="FCOS", levels=None, resolutions=None, **options):
        levels = list(levels or (range(2, 7) if arch in RCNNS else range(3, 8)))
        names = [f"p{level}" for level in levels]
        deepest_shift = {"EL": 2, "L": 1}.get((resolutions or ["H"])[-1], 0)
        with_c1 = levels[0] - deepest_shift == 1
        features = ["c1"] * with_c1 + ["res2", "res3", "res4", "res5"]
        cfg = load_config("")
        cfg.MODEL.DEVICE = "cpu"
        cfg.MODEL.WEIGHTS = ""
        cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN" if arch in RCNNS else arch
        cfg.MODEL.BACKBONE.NAME = "build_level_fpn_backbone"
        cfg.MODEL.FPN.BOTTOM_UP = "build_tiny_resnet_backbone"
        cfg.MODEL.FPN.IN_FEATURES = cfg.MODEL.RESNETS.OUT_FEATURES = features
        cfg.MODEL.FPN.OUT_CHANNELS = CHANNELS
        cfg.MODEL.FPN.LEVELS = cfg.MODEL.FCOS.IN_FEATURES = cfg.MODEL.RETINANET.IN_FEATURES = names
        cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 4
        cfg.MODEL.RESNETS.NORM = "BN"
        cfg.MODEL.FCOS.NORM = ""
        cfg.MODEL.FCOS.CONV_DIMS = [8]
        cfg.MODEL.FCOS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = CLASSES
        cfg.MODEL.GFL.IN_FEATURES = names
        cfg.MODEL.GFL.NORM, cfg.MODEL.GFL.CONV_DIMS, cfg.MODEL.GFL.NUM_CLASSES = "", [8], CLASSES
        cfg.MODEL.REPPOINTS.IN_FEATURES, cfg.MODEL.REPPOINTS.NORM = names, ""
        cfg.MODEL.REPPOINTS.CONV_DIMS, cfg.MODEL.REPPOINTS.POINT_DIM = [8], 8
        cfg.MODEL.REPPOINTS.NUM_CLASSES, cfg.MODEL.REPPOINTS.SCORE_THRESH_TEST = CLASSES, 0.02
        cfg.MODEL.RETINANET.NUM_CONVS = 1
        cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.02
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[4 * 2**level] for level in levels]
        cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[1.0]]
        cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [100.0, 110.0, 120.0], [50.0, 60.0, 70.0]
        if arch in RCNNS:
            _make_rcnn(cfg, names)
            for key, value in RCNNS[arch].items():
                cfg.merge_from_list([key, value])
        if resolutions is not None:
            cfg.MSAD.DETECTOR = cfg.MODEL.META_ARCHITECTURE
            cfg.MODEL.META_ARCHITECTURE = "MultiScaleTeacher"
            cfg.MSAD.RESOLUTIONS = list(resolutions)
        for key, value in options.items():
            cfg.merge_from_list([key.replace("__", "."), value])
        return cfg

    return make


@torch.no_grad()
def _shake(model: nn.Module, seed: int) -> nn.Module:
    """As after some training: BatchNorm with statistics of its own, no zero bias, a head that sees differences."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            if module.affine:
                module.weight.uniform_(0.8, 1.2, generator=generator)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "head." not in name:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter))
        elif parameter.dim() == 4 and "head." in name:
            parameter.normal_(0, 0.15, generator=generator)
    return model


@pytest.fixture
def tiny_model(tiny_cfg):
    """``tiny_model(..., seed=0)``: the model of ``tiny_cfg(...)`` with reproducible, uneven weights, in train mode."""

    def make(*args, seed=0, **options):
        torch.manual_seed(seed)
        return _shake(build_model(tiny_cfg(*args, **options)), seed)

    return make


@pytest.fixture
def make_batch():
    """``make_batch(sizes, boxes=2, seed=0)``: detectron2 inputs of random images (h, w) with ``boxes`` objects each.

    The masks are diamonds in the boxes, the keypoints lie on the diagonals.
    """

    def make(sizes, boxes=2, seed=0):
        generator = torch.Generator().manual_seed(seed)
        batch = []
        for number, (h, w) in enumerate(sizes):
            count = boxes[number] if isinstance(boxes, (list, tuple)) else boxes
            corner = torch.rand(count, 2, generator=generator) * torch.tensor([w * 0.4, h * 0.4])
            extent = (0.2 + 0.35 * torch.rand(count, 2, generator=generator)) * torch.tensor([w, h])
            instances = Instances((h, w))
            instances.gt_boxes = Boxes(torch.cat([corner, corner + extent], dim=1))
            instances.gt_classes = torch.randint(CLASSES, (count,), generator=generator)
            boxes_list = instances.gt_boxes.tensor.tolist()
            instances.gt_masks = PolygonMasks(
                [[[(x0 + x1) / 2, y0, x1, (y0 + y1) / 2, (x0 + x1) / 2, y1, x0, (y0 + y1) / 2]]
                 for x0, y0, x1, y1 in boxes_list]
            )  # fmt: skip
            along = torch.linspace(0.2, 0.8, KEYPOINTS)[None, :, None]
            points = instances.gt_boxes.tensor[:, None, :2] * (1 - along)
            points = points + instances.gt_boxes.tensor[:, None, 2:] * along
            instances.gt_keypoints = Keypoints(torch.cat([points, torch.full((count, KEYPOINTS, 1), 2.0)], dim=2))
            image = torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=generator)
            batch.append(
                {"image": image, "instances": instances, "height": h, "width": w, "file_name": f"{number}.png"}
            )
        return batch

    return make


@pytest.fixture
def same_detections():
    """``same_detections(a, b)``: assert equal boxes (pixels), scores and classes, in the same order, and not none."""

    def check(a, b, tolerance=1e-4):
        assert len(a) == len(b)
        assert sum(len(x["instances"]) for x in a) > 0
        for x, y in zip(a, b):
            x, y = x["instances"], y["instances"]
            assert x.image_size == y.image_size and len(x) == len(y)
            torch.testing.assert_close(x.pred_boxes.tensor, y.pred_boxes.tensor, rtol=1e-5, atol=tolerance)
            torch.testing.assert_close(x.scores, y.scores, rtol=1e-5, atol=tolerance)
            assert torch.equal(x.pred_classes, y.pred_classes)

    return check


@pytest.fixture
def make_distiller(tiny_model):
    """``make_distiller(resolution, teacher=, student=, losses=, batch_norm=, **options)``: a Distiller in train mode.

    Default: an FCOS teacher on H and L, and an FCOS student whose levels are moved down as ``resolution`` asks.
    """

    def make(
        resolution="L", *, teacher=None, student=None, losses=({"NAME": "AlignedL1"},), batch_norm="eval", **options
    ):
        resolution = get_resolution(resolution)
        if teacher is None:
            teacher = tiny_model(resolutions=["H", "L"])
        if student is None:
            student = tiny_model(levels=range(3 - resolution.shift, 8 - resolution.shift), seed=1)
        frozen = FrozenTeacher(teacher, batch_norm)
        built = between(list(losses), student_shapes(student, resolution), frozen.shapes())
        return Distiller(student, [frozen], built, resolution, **options).train()

    return make


@pytest.fixture
def student_config(project, teacher_weights, tmp_path):
    """Makes the config of the FCOS student from KEY=value overrides (dots as two underscores)."""

    def make(name="student", **options):
        keys = {key.replace("__", "."): value for key, value in options.items()}
        return runs.config(project, teacher_weights, name, tmp_path / "run", **keys)

    return make
