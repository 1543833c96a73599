"""Box sides as distributions over distances, and the losses that go with them (Generalized Focal Loss, NeurIPS 2020).

A side is predicted as n + 1 logits; bin i stands for a distance of i strides from the centre of the location, and the
distance is the mean of their softmax.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.modeling.box_regression import Box2BoxTransformLinear


def integral(logits: torch.Tensor) -> torch.Tensor:
    """Expected bin of each distribution: (..., n + 1) -> (...) in [0, n]. GFL, eq. (5)."""
    bins = torch.arange(logits.shape[-1], dtype=logits.dtype, device=logits.device)
    return (logits.softmax(dim=-1) * bins).sum(dim=-1)  # a matrix product would round under mixed precision


def distribution_focal_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross entropy with the two bins around a target, weighted by nearness. GFL, eq. (6).

    Args:
        logits: (..., n + 1).
        target: (...) in [0, n).

    Returns:
        (...).
    """
    low = target.floor()
    upper = target - low
    log_p = logits.log_softmax(dim=-1)
    at_low = log_p.gather(-1, low.long()[..., None])[..., 0]
    at_high = log_p.gather(-1, low.long()[..., None] + 1)[..., 0]
    return -((1 - upper) * at_low + upper * at_high)


def quality_focal_loss(logits: torch.Tensor, quality: torch.Tensor, beta: float = 2.0) -> torch.Tensor:
    """Binary cross entropy with soft labels, times |sigmoid - quality|^beta. GFL, eq. (4); elementwise.

    Args:
        logits, quality: of one shape; quality in [0, 1].
    """
    scale = (logits.sigmoid() - quality).abs() ** beta
    return scale * F.binary_cross_entropy_with_logits(logits, quality, reduction="none")


class DistributionTransform:
    """Between boxes and distances to their sides, as detectron2's dense detectors expect of a ``box2box_transform``.

    Args:
        reg_max: n, the largest distance in strides.
    """

    def __init__(self, reg_max: int = 16) -> None:
        if reg_max < 1:
            raise ValueError(f"MODEL.GFL.REG_MAX must be at least 1, not {reg_max}")
        self.reg_max = reg_max
        self._linear = Box2BoxTransformLinear(normalize_by_size=True)

    def get_deltas(self, locations: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Distances from the centres of locations (P, 4) to left, top, right and bottom of boxes (P, 4), in strides.

        Limited to what the bins can express: (P, 4) in [0, n - 0.1].
        """
        return self._linear.get_deltas(locations, boxes).clamp(min=0, max=self.reg_max - 0.1)

    def apply_deltas(self, logits: torch.Tensor, locations: torch.Tensor) -> torch.Tensor:
        """Boxes (P, 4) of distributions (P, 4 (n + 1)) at locations (P, 4)."""
        return self.decode(integral(logits.unflatten(1, (4, self.reg_max + 1))), locations)

    def decode(self, distances: torch.Tensor, locations: torch.Tensor) -> torch.Tensor:
        """Boxes (P, 4) of distances (P, 4) in strides, as :meth:`get_deltas` gives them."""
        return self._linear.apply_deltas(distances, locations)
