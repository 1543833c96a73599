"""What several test files make: steps, and losses between two networks."""

from __future__ import annotations

import dataclasses

import torch
from detectron2.structures import Boxes, Instances

from msad.distill.context import DistillContext
from msad.distill.losses import build_losses


def make_context(image_sizes, gt=(), **fields) -> DistillContext:
    """A step with images of these (h, w), H pixels, and their ground truth (default: none)."""
    gt = list(gt) or [Instances(size, gt_boxes=Boxes(torch.zeros(0, 4))) for size in image_sizes]
    images = [torch.zeros(1, 1, 1).expand(3, *size) for size in image_sizes]
    return DistillContext([{"image": x, "instances": y} for x, y in zip(images, gt)], **fields)


def between(entries, student, teacher, seed=0):
    """DISTILL.LOSSES ``entries`` between networks of these neck shapes."""
    return build_losses(entries, lambda tap: student, {"teacher": lambda tap: teacher}, seed)


def evaluate(loss, student, teacher, context=None):
    """A built loss of these features."""
    context = make_context([]) if context is None else context
    return loss(dataclasses.replace(context, student=student, sources={"teacher": teacher}))
