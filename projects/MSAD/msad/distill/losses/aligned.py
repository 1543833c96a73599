"""Mean absolute difference of aligned features: the distillation loss of MSAD."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ...resolution import inside_images, masked_mean
from ..context import DistillContext, Features
from .registry import DISTILL_LOSS_REGISTRY
from .shared import at_least_float32


def standardise(x: torch.Tensor, inside: torch.Tensor | None = None, eps: float = 1e-6) -> torch.Tensor:
    """Zero mean and unit variance per channel over batch and space, at least in float32.

    Args:
        x: (N, C, h, w).
        inside: bool (N, 1, h, w), the locations that count; None: all.
    """
    x = at_least_float32(x)
    if inside is None:
        var, mean = torch.var_mean(x, dim=(0, 2, 3), keepdim=True, correction=0)
    else:
        share = inside / inside.sum()
        mean = (share * x).sum(dim=(0, 2, 3), keepdim=True)
        var = (share * (x - mean).square()).sum(dim=(0, 2, 3), keepdim=True)
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

    def forward(self, student: Features, teacher: Features, context: DistillContext) -> dict[str, torch.Tensor]:
        total = 0.0
        for name, s in student.items():
            t = teacher[name]
            extents = context.extents(s, self.strides[name]) if self.mask_padding else None
            if self.normalize:
                inside = None if extents is None else inside_images(s, extents)
                s, t = standardise(s, inside), standardise(t, inside)
            total = total + (F.l1_loss(s, t) if extents is None else self._inside_images(s, t, extents))
        return {"l1": total}

    @staticmethod
    def _inside_images(s: torch.Tensor, t: torch.Tensor, sizes: list[tuple[int, int]]) -> torch.Tensor:
        with torch.autocast(s.device.type, enabled=False):  # float16 is too small for the gradient of a mean's sums
            return masked_mean((at_least_float32(s) - at_least_float32(t)).abs(), sizes).mean()
