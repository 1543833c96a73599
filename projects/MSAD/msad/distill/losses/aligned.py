"""Mean absolute difference of aligned features: the distillation loss of MSAD."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from ...resolution import masked_mean
from ..context import DistillContext
from .registry import DISTILL_LOSS_REGISTRY
from .shared import at_least_float32


def standardise(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Zero mean and unit variance per channel over batch and space, at least in float32; x: (N, C, h, w)."""
    x = at_least_float32(x)
    var, mean = torch.var_mean(x, dim=(0, 2, 3), keepdim=True, correction=0)
    return (x - mean) * torch.rsqrt(var + eps)


@DISTILL_LOSS_REGISTRY.register()
class AlignedL1(nn.Module):
    """Sum over levels of the mean absolute difference of aligned maps (MSAD, CVPR 2021, stage 2).

    The released code multiplies it by alpha T with alpha 0.2 and T 3: WEIGHT 0.6.

    Args:
        levels: levels that are compared; the forward pass gets exactly these.
        strides: of the grid on which each is compared, in H pixels.
        normalize: compare maps standardised per channel, so that the loss does not grow with the teacher's scale.
        mask_padding: mean over the image without its padding (the released code includes it).
    """

    def __init__(
        self, levels: list[str], strides: dict[str, float], normalize: bool = False, mask_padding: bool = False
    ) -> None:
        super().__init__()
        self.strides = strides
        self.normalize = normalize
        self.mask_padding = mask_padding

    def forward(
        self, student: dict[str, torch.Tensor], teacher: dict[str, torch.Tensor], context: DistillContext
    ) -> dict[str, torch.Tensor]:
        total = 0.0
        for name, s in student.items():
            t = teacher[name]
            if self.normalize:
                s, t = standardise(s), standardise(t)
            if self.mask_padding:
                total = total + self._inside_images(s, t, _extents(context.image_sizes, self.strides[name], s))
            else:
                total = total + F.l1_loss(s, t)
        return {"l1": total}

    @staticmethod
    def _inside_images(s: torch.Tensor, t: torch.Tensor, sizes: list[tuple[int, int]]) -> torch.Tensor:
        with torch.autocast(s.device.type, enabled=False):  # float16 is too small for the gradient of a mean's sums
            return masked_mean((at_least_float32(s) - at_least_float32(t)).abs(), sizes).mean()


def _extents(sizes: list[tuple[int, int]], stride: float, maps: torch.Tensor) -> list[tuple[int, int]]:
    """(rows, columns) of ``maps`` (N, C, h, w) that images of ``sizes`` (height, width) in H pixels cover."""
    return [
        tuple(min(math.ceil(side / stride), limit) for side, limit in zip(size, maps.shape[-2:])) for size in sizes
    ]
