"""Pearson correlation of features (PKD, Cao et al., NeurIPS 2022)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..context import DistillContext, Features
from .registry import DISTILL_LOSS_REGISTRY
from .shared import at_least_float32


def unit_deviation(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """(N, C, h, w) with mean 0 and unbiased standard deviation 1 per channel over batch and space.

    ``eps`` keeps a constant channel, and its gradient, finite: sqrt(var + eps^2) stands for std + eps.
    """
    x = at_least_float32(x)
    single = x.numel() == x.shape[1]  # value per channel; its deviation is 0
    var, mean = torch.var_mean(x, dim=(0, 2, 3), keepdim=True, correction=0 if single else 1)
    return (x - mean) * torch.rsqrt(var + eps**2)


@DISTILL_LOSS_REGISTRY.register()
class PKD(nn.Module):
    """Sum over levels of half the mean squared difference of standardised maps.

    It is (1 - r) (n - 1) / n with r the mean over channels of Pearson's correlation over n = N h w locations.
    Statistics are those of the batch (of a process): images contribute together, and the loss does not grow with their
    number.
    """

    default_weight = 10.0  # dense detectors, first four levels
    two_stage = {"weight": 6.0}

    def __init__(self, levels: list[str]) -> None:
        super().__init__()

    def forward(self, student: Features, teacher: Features, context: DistillContext) -> dict[str, torch.Tensor]:
        terms = (F.mse_loss(unit_deviation(s), unit_deviation(teacher[name])) for name, s in student.items())
        return {"correlation": sum(terms) / 2}
