"""Aligned feature imitation: the distillation loss of MSAD."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ...modeling.fusion import masked_mean
from ...resolution import downsampled_size, level_of
from .registry import DISTILL_LOSS_REGISTRY, DistillBatch


def standardise(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Zero mean and unit variance per channel over batch and space, at least in float32; x: (N, C, h, w)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(x, dim=(0, 2, 3), keepdim=True, correction=0)
    return (x - mean) * torch.rsqrt(var + eps)


@DISTILL_LOSS_REGISTRY.register()
class AlignedL1(nn.Module):
    """Sum over levels of the mean absolute difference of aligned maps (MSAD, CVPR 2021, stage 2).

    The released code multiplies it by alpha T with alpha 0.2 and T 3: WEIGHT 0.6.

    Args:
        levels: levels that are compared; the forward pass gets exactly these.
        normalize: compare maps standardised per channel, so that the loss does not grow with the teacher's scale.
        mask_padding: mean over the image without its padding (the released code includes it).
    """

    def __init__(self, levels: list[str], normalize: bool = False, mask_padding: bool = False) -> None:
        super().__init__()
        self.normalize = normalize
        self.mask_padding = mask_padding

    def forward(
        self, student: dict[str, torch.Tensor], teacher: dict[str, torch.Tensor], batch: DistillBatch
    ) -> dict[str, torch.Tensor]:
        total = 0.0
        for name, s in student.items():
            t = teacher[name]
            if self.normalize:
                s, t = standardise(s), standardise(t)
            if self.mask_padding:
                sizes = [downsampled_size(size, level_of(name)) for size in batch.image_sizes]
                total = total + masked_mean((s - t).abs(), sizes).mean()
            else:
                total = total + F.l1_loss(s, t)
        return {"l1": total}
