"""Raw features: naive L2 and its two parts, magnitude and angle (WACV 2024).

For one image and level, with F flattened to D = C h w numbers, m = |F_t|, n = |F_s| and theta the angle between them,
``|F_t - F_s|^2 / D = ((m - n)^2 + 2 m n (1 - cos theta)) / D`` (eq. 10). The angular losses drop the magnitudes
and with them the weight 2 m n / D, which differs from model to model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..context import DistillContext, Features
from .registry import DISTILL_LOSS_REGISTRY
from .shared import at_least_float32

# What is one vector: the whole map of an image, all channels of a location, or all locations of a channel.
UNITS = {"layer": (1, 2, 3), "pixel": (1,), "channel": (2, 3)}


def unit_vectors(x: torch.Tensor, dims: tuple[int, ...], eps: float = 1e-12) -> torch.Tensor:
    """``x`` divided by its norm over ``dims``; vectors shorter than ``eps`` become 0 and get no gradient."""
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True)
    return x * torch.where(norm > eps, 1 / norm.clamp(min=eps), 0)


def angular_loss(s: torch.Tensor, t: torch.Tensor, unit: str) -> torch.Tensor:
    """Mean of 2 (1 - cos) over the vectors of (N, C, h, w) maps: the squared distance of unit vectors, in [0, 4]."""
    dims = UNITS[unit]
    square = (unit_vectors(at_least_float32(s), dims) - unit_vectors(at_least_float32(t), dims)).square()
    return square.sum(dim=dims).mean()


def magnitude_loss(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Mean over images of (m - n)^2 / D."""
    m, n = (torch.linalg.vector_norm(at_least_float32(x), dim=(1, 2, 3)) for x in (t, s))
    return (m - n).square().mean() / s[0].numel()


class _SumOverLevels(nn.Module):
    """Sum of :meth:`compare` over levels. Every loss of the family is a mean over images."""

    default_weight = 3.0

    def __init__(self, levels: list[str]) -> None:
        super().__init__()

    def compare(self, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Loss of one level, maps (N, C, h, w)."""
        raise NotImplementedError

    def forward(self, student: Features, teacher: Features, context: DistillContext) -> dict[str, torch.Tensor]:
        return {"raw": sum(self.compare(s, teacher[name]) for name, s in student.items())}


@DISTILL_LOSS_REGISTRY.register()
class NaiveL2(_SumOverLevels):
    """Mean squared difference, eq. (10)."""

    def compare(self, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(at_least_float32(s), at_least_float32(t))


@DISTILL_LOSS_REGISTRY.register()
class MagnitudeMD(_SumOverLevels):
    """The magnitude term of eq. (10) alone; the paper's control, which does not help."""

    def compare(self, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return magnitude_loss(s, t)


@DISTILL_LOSS_REGISTRY.register()
class Angular(_SumOverLevels):
    """2 (1 - cos) between raw features.

    Args:
        unit: what is one vector: "layer" (an image's whole map), "pixel" (the channels of a location),
            "channel" (the locations of a channel).
    """

    def __init__(self, levels: list[str], unit: str = "layer") -> None:
        super().__init__(levels)
        if unit not in UNITS:
            raise ValueError(f"Angular: UNIT must be one of {', '.join(UNITS)}, not {unit!r}")
        self.unit = unit

    def compare(self, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return angular_loss(s, t, self.unit)


@DISTILL_LOSS_REGISTRY.register()
class LAD(Angular):
    """Angular distillation of layers."""

    def __init__(self, levels: list[str]) -> None:
        super().__init__(levels, "layer")


@DISTILL_LOSS_REGISTRY.register()
class PAD(Angular):
    """Angular distillation of pixels."""

    def __init__(self, levels: list[str]) -> None:
        super().__init__(levels, "pixel")


@DISTILL_LOSS_REGISTRY.register()
class CAD(Angular):
    """Angular distillation of channels: as PKD, but the mean stays and each image is on its own."""

    def __init__(self, levels: list[str]) -> None:
        super().__init__(levels, "channel")
