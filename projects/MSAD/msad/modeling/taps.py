"""Places in a detector, beside its neck, at which features can be read while it runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from detectron2.layers import ShapeSpec
from torch import nn

from .adapters import Features, UnfitDetector
from .fusion_student import FusionBackbone

NECK = "neck"


class Tap(NamedTuple):
    """A place to read features at.

    Attributes:
        module: detector -> the module whose output is read; AttributeError if it has none.
        shapes: detector -> channels and strides (pixels of its input) of that output, by name, finest first.
        features: the module's output -> features (N, C, h, w) by name.
    """

    module: Callable[[nn.Module], nn.Module]
    shapes: Callable[[nn.Module], dict[str, ShapeSpec]]
    features: Callable[[object], Features] = dict


def bottom_ups(detector: nn.Module) -> list[nn.Module]:
    """What a detector has in front of its neck: a network, or one for each branch of a fusion student.

    A backbone without a neck is one as a whole.

    Raises:
        UnfitDetector: a backbone makes a pyramid and has no ``bottom_up``.
    """
    backbone = detector.backbone
    networks = backbone.branches.values() if isinstance(backbone, FusionBackbone) else [backbone]
    for network in networks:
        if not hasattr(network, "bottom_up") and _makes_pyramid(network):
            raise UnfitDetector(
                f"{type(network).__name__} has no attribute bottom_up: TAP bottom_up and DISTILL.FREEZE_BACKBONE_ITERS "
                "look there for the network in front of its neck"
            )
    return [getattr(network, "bottom_up", network) for network in networks]


def _makes_pyramid(backbone: nn.Module) -> bool:
    """Whether a map is named as a level of a pyramid, P_l of stride 2^l; a bare Swin has p0 of stride 4."""
    return any(name == f"p{math.log2(shape.stride):g}" for name, shape in backbone.output_shape().items())


def before_neck(detector: nn.Module) -> list[nn.Module]:
    """A detector's backbone without its neck: :func:`bottom_ups`, and the second network of a recursive pyramid."""
    second = getattr(detector.backbone, "rfp_bottom_up", None)
    return [*bottom_ups(detector), *([] if second is None else [second])]


def _bottom_up(detector: nn.Module) -> nn.Module:
    network, *others = bottom_ups(detector)
    if others:
        raise AttributeError(f"its backbone has {1 + len(others)} branches")
    return network


TAPS: dict[str, Tap] = {"bottom_up": Tap(_bottom_up, lambda detector: _bottom_up(detector).output_shape())}


def get_tap(name: str) -> Tap:
    """Look up a tap other than the neck; ValueError for an unknown name, with those there are."""
    if name not in TAPS:
        raise ValueError(f"TAP must be one of {', '.join([NECK, *TAPS])}, not {name!r}")
    return TAPS[name]


def tap_shapes(detector: nn.Module, name: str, scale: float = 1.0) -> dict[str, ShapeSpec]:
    """Channels and strides, finest first, of what ``detector`` gives at a tap.

    Args:
        scale: size of the detector's input relative to H; strides are in H pixels.

    Raises:
        ValueError: no such tap, or the detector has nothing there.
    """
    tap = get_tap(name)
    try:
        shapes = tap.shapes(detector)
    except AttributeError as error:
        raise ValueError(f"TAP {name}: a {type(detector).__name__} has nothing to read there ({error})") from None
    found = {}
    for level, shape in sorted(shapes.items(), key=lambda item: item[1].stride):
        stride = shape.stride / scale
        found[level] = ShapeSpec(channels=shape.channels, stride=int(stride) if stride == int(stride) else stride)
    return found


@contextmanager
def tap(detector: nn.Module, levels: Mapping[str, Collection[str]]) -> Iterator[dict[str, Features]]:
    """Inside, a forward pass of ``detector`` also fills the yielded dict: features by tap.

    Those that are not among the ``levels`` of their tap are not kept: the finest of a network can be larger than all
    that a training step has to hold. Of several passes through one module, as of the branches of a multi-resolution
    teacher, the first one counts: H.
    """
    taken: dict[str, Features] = {}

    def keep(name: str, features: Callable[[object], Features]) -> Callable:
        def hook(_module, _args, output) -> None:
            if name not in taken:
                taken[name] = {level: x for level, x in features(output).items() if level in levels[name]}

        return hook

    with ExitStack() as hooks:
        for name in levels:
            found = get_tap(name)
            hooks.enter_context(found.module(detector).register_forward_hook(keep(name, found.features)))
        yield taken
