"""Masked generative distillation (MGD, Yang et al., ECCV 2022)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..context import DistillContext, Features
from .registry import DISTILL_LOSS_REGISTRY
from .shared import at_least_float32


def mask_locations(x: torch.Tensor, ratio: float) -> torch.Tensor:
    """Set each location of (N, C, h, w), all channels together, to 0 with probability ``ratio``; the rest stays.

    Drawn on the device of ``x`` from torch's generator, so a resumed run draws the same masks.
    """
    n, _, h, w = x.shape
    return x * (torch.rand(n, 1, h, w, device=x.device) >= ratio)


def generator(channels: int) -> nn.Sequential:
    """Two 3x3 convolutions that make the teacher's map from what is left of the student's."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(channels, channels, 3, padding=1)
    )


@DISTILL_LOSS_REGISTRY.register()
class MGD(nn.Module):
    """Sum over levels of |G(mask(F_s)) - F_t|^2 / N, over masked and visible locations alike.

    A sum over channels and locations and a mean over images: WEIGHT depends on the size of the maps. The generators G,
    one a level, are trained with the student.

    Args:
        mask_ratio: fraction of the locations that are hidden; two-stage detectors: 0.45.
    """

    default_weight = 2e-5  # one-stage detectors
    two_stage = {"weight": 5e-7, "mask_ratio": 0.45}

    def __init__(self, levels: list[str], channels: dict[str, int], mask_ratio: float = 0.65) -> None:
        super().__init__()
        if not 0.0 <= mask_ratio <= 1.0:
            raise ValueError(f"MGD: MASK_RATIO must be in [0, 1], got {mask_ratio}")
        self.mask_ratio = mask_ratio
        self.generators = nn.ModuleDict({name: generator(channels[name]) for name in levels})

    def forward(self, student: Features, teacher: Features, context: DistillContext) -> dict[str, torch.Tensor]:
        total = 0.0
        for name, s in student.items():
            made = self.generators[name](mask_locations(s, self.mask_ratio))
            made, t = at_least_float32(made), at_least_float32(teacher[name])
            total = total + F.mse_loss(made, t, reduction="sum") / len(s)
        return {"l2": total}
