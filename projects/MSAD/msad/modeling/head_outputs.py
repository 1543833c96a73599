"""Record the outputs and targets of a detector's heads while a training step runs.

A dense detector has one head, "dense"; an R-CNN has "rpn" (on anchors) and "roi" (on proposals), a cascade "roi0",
"roi1", ... in its place. No detector is edited: outputs are taken by forward hooks and targets by covering the method
that assigns them, for the length of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from detectron2.modeling.box_regression import Box2BoxTransformLinear
from detectron2.structures import Instances
from torch import nn

from .detectors.distribution import DistributionTransform, integral
from .detectors.point_sets import POINTS, PointSetTransform

DENSE, RPN, ROI = "dense", "rpn", "roi"


class Head(NamedTuple):
    """Where a head is found in its detector.

    Attributes:
        module: its output is (class logits, box predictions, ...).
        owner: has ``box2box_transform`` and, but for "roi", ``anchor_generator``.
        assigner: the module whose method ``assign`` gives the targets of a step; that of "roi" is called with
            predictions and proposals that have targets.
        levels: names of the maps it reads.
        classes: without background.
    """

    module: nn.Module
    owner: Any
    assigner: nn.Module
    assign: str
    levels: list[str]
    classes: int
    boxes: int = 1  # where box predictions are in the output


@contextmanager
def covered(owner: Any, method: str, replacement: Callable) -> Iterator[None]:
    """Inside, ``owner.method`` is ``replacement``; covers can be nested."""
    before = vars(owner).get(method)
    setattr(owner, method, replacement)
    try:
        yield
    finally:
        delattr(owner, method)
        if before is not None:
            setattr(owner, method, before)


@contextmanager
def first_result(owner: Any, method: str, key: Callable[..., Any] = lambda *args: None) -> Iterator[None]:
    """Inside, ``owner.method`` runs once for each ``key`` of its arguments, and repeats the result."""
    if not hasattr(owner, method):
        yield
        return
    call, memo = getattr(owner, method), {}

    def first(*args):
        name = key(*args)
        if name not in memo:
            memo[name] = call(*args)
        return memo[name]

    with covered(owner, method, first):
        yield


@dataclass
class HeadRecord:
    """What happened in one training step, by name of the head."""

    outputs: dict[str, tuple] = field(default_factory=dict)
    assigned: dict[str, tuple[tuple, Any]] = field(default_factory=dict)  # arguments and result


@contextmanager
def tap_heads(heads: Mapping[str, Head]) -> Iterator[HeadRecord]:
    """Inside, a training step of the detector of ``heads`` also fills the yielded record; nothing is computed twice."""
    record = HeadRecord()

    def keep(name: str) -> Callable:
        return lambda _module, _args, output: record.outputs.update({name: output})

    def recording(name: str, original: Callable) -> Callable:
        def assign(*args):
            kept = tuple(map(_as_they_are, args))
            result = original(*args)
            record.assigned[name] = kept, result
            return result

        return assign

    with ExitStack() as stack:
        for name, head in heads.items():
            stack.callback(head.module.register_forward_hook(keep(name)).remove)
            assign = recording(name, getattr(head.assigner, head.assign))
            stack.enter_context(covered(head.assigner, head.assign, assign))
        yield record


def _as_they_are(argument: Any) -> Any:
    """Proposals with the fields that they have now, which a detector may replace (TRAIN_ON_PRED_BOXES does)."""
    if isinstance(argument, list) and all(isinstance(item, Instances) for item in argument):
        return [Instances(item.image_size, **item.get_fields()) for item in argument]
    return argument


def box_code(head: Head) -> tuple:
    """What must be equal for the box predictions of two heads to mean the same."""
    transform = head.owner.box2box_transform
    details = (getattr(transform, key, None) for key in ("reg_max", "weights", "normalize_by_size", "way"))
    return (type(transform).__name__, *(tuple(x) if isinstance(x, (list, tuple)) else x for x in details))


def prediction_size(transform: Any) -> int:
    """Numbers that a dense head predicts for the box of an anchor."""
    if isinstance(transform, DistributionTransform):
        return 4 * (transform.reg_max + 1)
    return 2 * POINTS if isinstance(transform, PointSetTransform) else 4


def coordinates(transform: Any, predictions: torch.Tensor) -> torch.Tensor:
    """Box predictions (..., B) -> the 4 numbers a side or delta that ``transform.get_deltas`` gives for a box.

    Distributions become their means, point sets their boxes, and distances of a linear transform pass the ReLU that
    decoding has.
    """
    if isinstance(transform, PointSetTransform):
        return transform.corners(predictions)
    if isinstance(transform, DistributionTransform):
        return integral(predictions.unflatten(-1, (4, -1)))
    return predictions.relu() if isinstance(transform, Box2BoxTransformLinear) else predictions


def decode(transform: Any, numbers: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Boxes (P, 4) of what :func:`coordinates` gives: the inverse of ``transform.get_deltas``."""
    return getattr(transform, "decode", transform.apply_deltas)(numbers, anchors)


def cell_anchors(head: Head) -> list[torch.Tensor]:
    """Anchors (A, 4) of each level around the origin, in the detector's own pixels."""
    return list(head.owner.anchor_generator.cell_anchors)


def proposal_targets(proposals: list[Instances]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Boxes (P, 4), classes (P,) and matched boxes (P, 4) of all images' sampled proposals.

    Proposals of images without objects have no matched boxes and get their own.
    """
    matched = [p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes for p in proposals]
    return (
        torch.cat([p.proposal_boxes.tensor for p in proposals]),
        torch.cat([p.gt_classes for p in proposals]),
        torch.cat([boxes.tensor for boxes in matched]),
    )
