"""From a checkpoint of mmdetection to a detectron2 checkpoint and the yaml that gives the same detections."""

from __future__ import annotations

from typing import NamedTuple

import torch
from detectron2.modeling import build_model

from ..config import default_config
from . import backbones, dense, settings
from .files import Checkpoint
from .rcnn import rcnn
from .rules import Plan, Tensors, make_plan

# Channel order, means and deviations of the images, by name: of torchvision's networks, of caffe's (MSRA) ones, of
# those that detectron gave (the plain FCOS), and of ResNeXt-101 32x8d.
PIXELS = {
    "torchvision": ("RGB", [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),
    "caffe": ("BGR", [103.53, 116.28, 123.675], [1.0, 1.0, 1.0]),
    "detectron": ("BGR", [102.9801, 115.9465, 122.7717], [1.0, 1.0, 1.0]),
    "x101-32x8d": ("BGR", [103.53, 116.28, 123.675], [57.375, 57.12, 58.395]),
}
STYLES = ("pytorch", "caffe")  # stride 2 in the 3x3 or in the first 1x1 convolution of a block


class Converted(NamedTuple):
    """A detector in detectron2's terms.

    Attributes:
        kind: what was recognised, as "RetinaNet".
        tensors: by detectron2's names.
        config: nested dict of the yaml.
        plan: which tensor went where.
        added: names of tensors that the file lacks: zeros in front of normalisations, indices of Swin's windows.
    """

    kind: str
    tensors: Tensors
    config: dict
    plan: Plan
    added: list[str]


def convert(checkpoint: Checkpoint, pixels: str = "", style: str = "") -> Converted:
    """Rename the tensors of a detector, and describe it.

    Args:
        pixels: one of PIXELS, "" to take what the file's config says.
        style: one of STYLES, "" to take what the file's config says.

    Raises:
        ValueError: an unknown detector or part of one, tensors left on either side, or what the file does not tell
            and was not given; names all of it.
    """
    tensors, said = checkpoint.tensors, settings.read(checkpoint.config, checkpoint.prefix)
    kind, rules, config = _head(tensors, said)
    body_rules, body = _body(tensors, kind, _style(tensors, said, style), said)
    rules = [*body_rules, *backbones.neck_rules(tensors), *rules]
    plan = make_plan(list(tensors), rules)
    if plan.unknown:
        raise ValueError(f"{len(plan.unknown)} tensors of the {kind} are unknown: {_some(plan.unknown)}")
    config = settings.merge({"VERSION": 2}, body, settings.test_size(said), config, _pixels(said, pixels))
    out = plan.to_detectron2(tensors)
    added = backbones.swin_indices(out)
    if kind in ("RetinaNet", "FCOS", "GFL"):
        added |= dense.tower_biases(tensors)
    out |= added
    check(out, config, kind)
    return Converted(kind, out, config, plan, list(added))


def _head(tensors: Tensors, said: dict) -> tuple[str, list, dict]:
    for name, (kind, describe) in dense.KINDS.items():
        if name in tensors:
            return kind, *describe(tensors, said)
    if "rpn_head.rpn_conv.weight" in tensors and any(name.startswith("roi_head.") for name in tensors):
        rules, config = rcnn(tensors, said)
        model = config["MODEL"]
        heads = model["ROI_HEADS"]["NAME"]
        cascade = "Cascade " if heads.startswith("Cascade") else ""
        plain = "Mask R-CNN" if model["MASK_ON"] else "R-CNN" if cascade else "Faster R-CNN"
        return "HTC" if heads.startswith("HTC") else cascade + plain, rules, config
    heads = sorted({".".join(name.split(".")[:2]) for name in tensors if not name.startswith(("backbone.", "neck."))})
    known = sorted({kind for kind, _ in dense.KINDS.values()})
    raise ValueError(f"no known detector: {_some(heads)}; known are R-CNNs with boxes and {', '.join(known)}")


def _body(tensors: Tensors, kind: str, stride_in_1x1: bool, said: dict) -> tuple[list, dict]:
    if "backbone.layer1.0.conv1.weight" in tensors:
        settings.check_resnet(said)
        rules = backbones.resnet_rules("backbone.", "backbone.bottom_up.")
        config = backbones.resnet_config(tensors, stride_in_1x1)
        maps = ["res2", "res3", "res4", "res5"]
    elif any(name.startswith("backbone.patch_embed.") for name in tensors):
        rules, config = backbones.swin_rules(), backbones.swin_config(tensors)
        maps = config["MODEL"]["SWIN"]["OUT_FEATURES"]
    else:
        begun = sorted({".".join(name.split(".")[:2]) for name in tensors if name.startswith("backbone.")})
        raise ValueError(f"no known backbone: {_some(begun)}; known are ResNets and Swin Transformers")
    if "neck.lateral_convs.0.conv.weight" not in tensors:
        raise ValueError("no known neck: there is no neck.lateral_convs.0.conv.weight")
    neck = backbones.neck_config(tensors, maps, settings.neck_relu(said, kind == "FCOS"))
    config = settings.merge(config, neck)
    if "RESNETS" in config["MODEL"]:
        config["MODEL"]["RESNETS"]["OUT_FEATURES"] = config["MODEL"]["FPN"]["IN_FEATURES"]
    return rules, config


def _style(tensors: Tensors, said: dict, style: str) -> bool:
    """Whether the first 1x1 convolution of a block is strided; False where there is none."""
    if style and style not in STYLES:
        raise ValueError(f"the style must be one of {STYLES}, not {style!r}")
    if "backbone.layer1.0.conv3.weight" not in tensors:
        return False
    told = settings.part(said, "model", "backbone").get("style")
    if not style and told not in STYLES:
        raise ValueError(
            "the file does not tell the style of its ResNet; give it: pytorch, or caffe if it has 'caffe' in its name"
        )
    return (style or told) == "caffe"


def _pixels(said: dict, pixels: str) -> dict:
    if pixels and pixels not in PIXELS:
        raise ValueError(f"the pixels must be one of {list(PIXELS)}, not {pixels!r}")
    found = PIXELS[pixels] if pixels else settings.pixels(said)
    if found is None:
        raise ValueError(f"the file does not tell the mean and the deviation of its pixels; give one of {list(PIXELS)}")
    order, mean, std = found
    return {"INPUT": {"FORMAT": order}, "MODEL": {"PIXEL_MEAN": mean, "PIXEL_STD": std}}


def check(tensors: Tensors, config: dict, kind: str) -> None:
    """ValueError that names what the model of ``config`` lacks of ``tensors``, and the other way round."""
    cfg = default_config()
    cfg.merge_from_other_cfg(type(cfg)(config))
    # Without values, which take a while to draw; but detectron2's Swin computes its settings with tensors.
    cfg.MODEL.DEVICE = "cpu" if "SWIN" in config["MODEL"] else "meta"
    with torch.device(cfg.MODEL.DEVICE):
        wanted = {name: value.shape for name, value in build_model(cfg).state_dict().items()}
    missing = sorted(wanted.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - wanted.keys())
    differing = [
        f"{name} {tuple(value.shape)} instead of {tuple(wanted[name])}"
        for name, value in tensors.items() if name in wanted and value.shape != wanted[name]
    ]  # fmt: skip
    problems = [
        f"{what}: {_some(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", differing))
        if names
    ]
    if problems:
        raise ValueError(f"the tensors do not make up the {kind} that they were taken for; {'; '.join(problems)}")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown
