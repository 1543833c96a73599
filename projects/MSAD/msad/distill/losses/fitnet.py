"""Hints: element-wise L2 between maps (FitNets, ICLR 2015)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..context import DistillContext, Features
from .registry import DISTILL_LOSS_REGISTRY
from .shared import at_least_float32, locations_in_boxes

REDUCTIONS = ("mean", "sum")


def hint_loss(
    s: torch.Tensor, t: torch.Tensor, mask: torch.Tensor | None = None, reduction: str = "mean"
) -> torch.Tensor:
    """Squared difference of (N, C, h, w) maps in the locations of ``mask`` (N, h, w), 1 or 0; None: everywhere.

    "mean" is over the elements of all selected locations of the batch, and 0 without any; "sum" is divided by N.
    """
    s, t = at_least_float32(s), at_least_float32(t)
    if mask is None:
        return F.mse_loss(s, t, reduction=reduction) / (1 if reduction == "mean" else len(s))
    total = ((s - t).square().sum(dim=1) * mask).sum()
    return total / (mask.sum() * s.shape[1]).clamp(min=1) if reduction == "mean" else total / len(s)


@DISTILL_LOSS_REGISTRY.register()
class FitNet(nn.Module):
    """Sum over levels of the mean squared difference.

    FitNets state no normalisation; the mean over elements is the reading under which progressive distillation's
    weights (0.5 to 0.8) make sense. Batches: "mean" and "sum" both are means over images, but for GT_ONLY with
    "mean", which is over the locations of the batch.

    Args:
        gt_only: compare locations with their centre in a ground truth box only.
        reduction: "mean" over elements, or "sum" divided by the number of images.
    """

    def __init__(
        self, levels: list[str], strides: dict[str, int], gt_only: bool = False, reduction: str = "mean"
    ) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(f"FitNet: REDUCTION must be one of {', '.join(REDUCTIONS)}, not {reduction!r}")
        self.strides, self.gt_only, self.reduction = strides, gt_only, reduction
        self.needs_boxes = gt_only

    def forward(self, student: Features, teacher: Features, context: DistillContext) -> dict[str, torch.Tensor]:
        total = 0.0
        for name, s in student.items():
            mask = None
            if self.gt_only:
                boxes, image = context.boxes(s.device)
                mask = locations_in_boxes(boxes, image, self.strides[name], s.shape[-2:], len(s))
            total = total + hint_loss(s, teacher[name], mask, self.reduction)
        return {"l2": total}
