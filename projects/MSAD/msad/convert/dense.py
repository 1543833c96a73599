"""Dense detectors: RetinaNet, FCOS, GFL and RepPoints."""

from __future__ import annotations

from functools import partial

import torch

from . import settings
from .rules import Rule, Tensors, anchor_order, reorder

LEVELS = 5
STRIDES = [8, 16, 32, 64, 128]


def _towers(tensors: Tensors, branch: str, target: str) -> list[Rule]:
    """Rules of a tower of convolutions, with or without normalisation."""
    step = 3 if any(name.startswith(f"bbox_head.{branch}.0.gn.") for name in tensors) else 2
    source = rf"bbox_head\.{branch}\.(\d+)\."
    return [
        Rule(source + r"conv\.(weight|bias)", lambda m: f"head.{target}.{step * int(m[1])}.{m[2]}"),
        Rule(source + r"gn\.(weight|bias)", lambda m: f"head.{target}.{step * int(m[1]) + 1}.{m[2]}"),
        Rule(
            source + r"conv\.conv_offset\.(weight|bias)",
            lambda m: f"head.{target}.{step * int(m[1])}.conv_offset.{m[2]}",
        ),
    ]


def _widths(tensors: Tensors) -> list[int]:
    """Channels of the convolutions of a tower."""
    count = sum(f"bbox_head.cls_convs.{k}.conv.weight" in tensors for k in range(20))
    return [tensors[f"bbox_head.cls_convs.{k}.conv.weight"].shape[0] for k in range(count)]


def _norm(tensors: Tensors) -> str:
    return "GN" if "bbox_head.cls_convs.0.gn.weight" in tensors else ""


def tower_biases(tensors: Tensors) -> Tensors:
    """Zeros for what detectron2's towers have and mmdetection's lack: biases in front of a normalisation."""
    zeros: Tensors = {}
    if not _norm(tensors):
        return zeros
    for branch, target in (("cls_convs", "cls_subnet"), ("reg_convs", "bbox_subnet")):
        for k, width in enumerate(_widths(tensors)):
            if f"bbox_head.{branch}.{k}.conv.bias" not in tensors:
                zeros[f"head.{target}.{3 * k}.bias"] = torch.zeros(width)
    return zeros


def _head(said: dict) -> dict:
    """What the training config says of the head."""
    return settings.part(said, "model", "bbox_head")


def _config(said: dict, architecture: str, node: str, options: dict, **more: dict) -> dict:
    """The config of a detector with these options, and with the thresholds that the training config tells."""
    model = {"META_ARCHITECTURE": architecture, node: options, **more}
    return settings.merge({"MODEL": model}, settings.detections(said, node))


def _levels(first: int = 3) -> list[str]:
    return [f"p{level}" for level in range(first, first + LEVELS)]


def retinanet(tensors: Tensors, said: dict) -> tuple[list[Rule], dict]:
    """Rules and config of RetinaNet."""
    head = _head(said)
    scales = [4 * 2 ** (k / 3) for k in range(3)]
    anchors = settings.anchors(head, "bbox_head", STRIDES, scales, [0.5, 1, 2])
    sizes, shapes = len(anchors.sizes[0]), len(anchors.ratios)
    order = reorder(partial(anchor_order, sizes=sizes, shapes=shapes))
    rules = [
        *_towers(tensors, "cls_convs", "cls_subnet"), *_towers(tensors, "reg_convs", "bbox_subnet"),
        Rule(r"bbox_head\.retina_cls\.(weight|bias)", r"head.cls_score.\1", order),
        Rule(r"bbox_head\.retina_reg\.(weight|bias)", r"head.bbox_pred.\1", order),
    ]  # fmt: skip
    rows = tensors["bbox_head.retina_reg.weight"].shape[0]
    if rows != 4 * sizes * shapes:
        raise ValueError(f"bbox_head.retina_reg has {rows} rows; {sizes} sizes and {shapes} shapes of anchors have "
                         f"{4 * sizes * shapes}")  # fmt: skip
    options = {
        "NUM_CLASSES": tensors["bbox_head.retina_cls.weight"].shape[0] // (sizes * shapes), "IN_FEATURES": _levels(),
        "NUM_CONVS": len(_widths(tensors)), "NORM": _norm(tensors), "SMOOTH_L1_LOSS_BETA": 0.0,
        "BBOX_REG_WEIGHTS": settings.box_weights(head, "bbox_head", (1.0,) * 4),
    }  # fmt: skip
    return rules, _config(said, "RetinaNetClippedFirst", "RETINANET", options, ANCHOR_GENERATOR=anchors.config())


def fcos(tensors: Tensors, said: dict) -> tuple[list[Rule], dict]:
    """Rules and config of FCOS, first version or with normalised distances ("center-normbbox-centeronreg")."""
    rules = [
        *_towers(tensors, "cls_convs", "cls_subnet"), *_towers(tensors, "reg_convs", "bbox_subnet"),
        Rule(r"bbox_head\.(?:conv|fcos)_cls\.(weight|bias)", r"head.cls_score.\1"),
        Rule(r"bbox_head\.(?:conv|fcos)_reg\.(weight|bias)", r"head.bbox_pred.\1"),
        Rule(r"bbox_head\.(?:conv|fcos)_centerness\.(weight|bias)", r"head.ctrness.\1"),
        Rule(r"bbox_head\.scales\.(\d)\.scale", r"head.scales[\1]"),
    ]  # fmt: skip
    head = _head(said)
    truth = (True, False)
    settings.require(head, "bbox_head", strides=(STRIDES,), norm_on_bbox=truth, centerness_on_reg=truth)
    # Without a config: the models with normalised distances have biases in front of GN, and those of the first version
    # have none.
    normalised = head.get("norm_on_bbox", "bbox_head.reg_convs.0.conv.bias" in tensors)
    on_reg = head.get("centerness_on_reg", normalised)
    cls = next(tensors[n] for n in ("bbox_head.conv_cls.weight", "bbox_head.fcos_cls.weight") if n in tensors)
    options = {
        "NUM_CLASSES": cls.shape[0], "IN_FEATURES": _levels(), "CONV_DIMS": _widths(tensors), "NORM": _norm(tensors),
        "SCALES": True, "BOXES": "relu_stride" if normalised else "exp",
        "CENTERNESS_ON": "reg" if on_reg else "cls", "CLIP_BEFORE_NMS": True, "SCORE_RULE": "product_after_threshold",
        "NMS_THRESH_TEST": 0.6 if normalised else 0.5,
        "DEFORM_LAST": f"bbox_head.cls_convs.{len(_widths(tensors)) - 1}.conv.conv_offset.weight" in tensors,
    }  # fmt: skip
    return rules, _config(said, "FCOS", "FCOS", options)


def gfl(tensors: Tensors, said: dict) -> tuple[list[Rule], dict]:
    """Rules and config of GFL."""
    rules = [
        *_towers(tensors, "cls_convs", "cls_subnet"), *_towers(tensors, "reg_convs", "bbox_subnet"),
        Rule(r"bbox_head\.gfl_cls\.(weight|bias)", r"head.cls_score.\1"),
        Rule(r"bbox_head\.gfl_reg\.(weight|bias)", r"head.bbox_pred.\1"),
        Rule(r"bbox_head\.scales\.(\d)\.scale", r"head.scales[\1]"),
    ]  # fmt: skip
    anchors = settings.anchors(_head(said), "bbox_head", STRIDES, [8], [1])
    squares = [[stride * anchors.sizes[0][0] / STRIDES[0]] for stride in STRIDES]
    if anchors != (squares, [1.0]):
        raise ValueError(f"the training config has {anchors}; GFL has one square a location, of equally many strides")
    options = {
        "NUM_CLASSES": tensors["bbox_head.gfl_cls.weight"].shape[0], "IN_FEATURES": _levels(),
        "CONV_DIMS": _widths(tensors), "NORM": _norm(tensors), "OFFSET": 0.0, "CLIP_BEFORE_NMS": True,
        "ANCHOR_SIZE": anchors.sizes[0][0] / STRIDES[0],
        "REG_MAX": tensors["bbox_head.gfl_reg.weight"].shape[0] // 4 - 1,
    }  # fmt: skip
    return rules, _config(said, "GFL", "GFL", options)


def reppoints(tensors: Tensors, said: dict) -> tuple[list[Rule], dict]:
    """Rules and config of RepPoints with moments."""
    rules = []
    for branch, target in (("cls_convs", "cls_subnet"), ("reg_convs", "pts_subnet")):
        source = rf"bbox_head\.{branch}\.(\d+)\."
        rules += [
            Rule(source + r"conv\.(weight|bias)", rf"head.{target}.\1.\2"),
            Rule(source + r"gn\.(weight|bias)", rf"head.{target}.\1.norm.\2"),
        ]
    rules += [
        Rule(r"bbox_head\.reppoints_cls_conv\.weight", "head.cls_conv.weight"),
        Rule(r"bbox_head\.reppoints_cls_out\.(weight|bias)", r"head.cls_score.\1"),
        Rule(r"bbox_head\.reppoints_(pts_(?:init|refine)_(?:conv|out))\.(weight|bias)", r"head.\1.\2"),
        Rule(r"bbox_head\.moment_transfer", "head.transform.moment_transfer"),
    ]
    out = tensors["bbox_head.reppoints_cls_out.weight"]
    if tensors["bbox_head.reppoints_pts_init_out.weight"].shape[0] != 18:
        raise ValueError("bbox_head.reppoints_pts_init_out: only RepPoints with nine free points are known")
    head = _head(said)
    settings.require(head, "bbox_head", point_strides=(STRIDES,))
    of_tensors = "moment" if "bbox_head.moment_transfer" in tensors else "minmax"
    options = {
        "NUM_CLASSES": out.shape[0], "POINT_DIM": out.shape[1], "IN_FEATURES": _levels(),
        "CONV_DIMS": _widths(tensors), "NORM": _norm(tensors),
        "TRANSFORM": head.get("transform_method", of_tensors),
    }  # fmt: skip
    return rules, _config(said, "RepPoints", "REPPOINTS", options)


# What tells each kind, and what it is called; P7 of FCOS alone is made of ReLU(P6).
KINDS = {
    "bbox_head.retina_cls.weight": ("RetinaNet", retinanet),
    "bbox_head.conv_centerness.weight": ("FCOS", fcos),
    "bbox_head.fcos_centerness.weight": ("FCOS", fcos),
    "bbox_head.gfl_cls.weight": ("GFL", gfl),
    "bbox_head.reppoints_cls_out.weight": ("RepPoints", reppoints),
}
