"""Channel-wise distillation (Shu et al., ICCV 2021)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..context import DistillContext, Features
from .registry import DISTILL_LOSS_REGISTRY
from .shared import at_least_float32


def channel_kl(s: torch.Tensor, t: torch.Tensor, tau: float = 1.0) -> torch.Tensor:
    """tau^2 / (N C) sum of KL(softmax(t / tau) || softmax(s / tau)), softmax over the locations of each channel.

    ``s`` and ``t``: (N, C, h, w). Locations of the padding take part.
    """
    log_s, log_t = ((at_least_float32(x).flatten(2) / tau).log_softmax(dim=2) for x in (s, t))
    return tau**2 * F.kl_div(log_s, log_t, reduction="sum", log_target=True) / (s.shape[0] * s.shape[1])


@DISTILL_LOSS_REGISTRY.register()
class CWD(nn.Module):
    """Sum over levels of the divergence between where each channel is active; a mean over images.

    Args:
        tau: temperature of the softmax.
    """

    default_weight = 5.0  # the authors' for detection, on the first four levels; mmrazor: 10 on five
    positive = ("tau",)

    def __init__(self, levels: list[str], tau: float = 1.0) -> None:
        super().__init__()
        self.tau = tau

    def forward(self, student: Features, teacher: Features, context: DistillContext) -> dict[str, torch.Tensor]:
        return {"kl": sum(channel_kl(s, teacher[name], self.tau) for name, s in student.items())}
