"""Crossing feature-level fusion (C-FF): one gate weighs the aligned maps of all resolutions."""

from __future__ import annotations

import torch
from detectron2.layers import ShapeSpec
from fvcore.nn import weight_init
from torch import nn
from torch.nn.functional import rms_norm

from ..resolution import downsampled_size, level_of, masked_mean


class CrossFeatureLevelFusion(nn.Module):
    """C-FF of MSAD (CVPR 2021): softmax gate over the resolutions, one weight per image and level.

    ``a = softmax(W2 relu(W1 [pool(x_1); ...; pool(x_n)]))`` and ``fused = sum_i a_i x_i``. The gate's two linear
    layers have no bias and are shared by all levels.

    Args:
        channels: C of every map.
        num_branches: n, in the order in which :meth:`forward` gets the maps (H first).
        reduction: hidden width is ``n * channels / reduction``.
        mask_padding: pool over the image only and not over its padding, so that an image's gate does not depend
            on the sizes of the others in its batch (the released code pools over everything).
        normalize: divide the pooled vector by its root mean square, so that the gate depends on directions alone
            (not in the paper). Large maps, as over a pretrained backbone with frozen statistics, make the gate
            steep: it ends with all of the weight on one branch, and without a gradient.
    """

    def __init__(
        self, channels: int, num_branches: int, reduction: int = 16, mask_padding: bool = True, normalize: bool = False
    ) -> None:
        super().__init__()
        hidden = max(num_branches * channels // reduction, 1)
        self.mask_padding = mask_padding
        self.normalize = normalize
        self.squeeze = nn.Linear(num_branches * channels, hidden, bias=False)
        self.excite = nn.Linear(hidden, num_branches, bias=False)
        weight_init.c2_xavier_fill(self.squeeze)
        weight_init.c2_xavier_fill(self.excite)

    @classmethod
    def from_shapes(cls, shapes: dict[str, ShapeSpec], num_branches: int, **kwargs) -> CrossFeatureLevelFusion:
        """Build for maps of these shapes; ValueError if their channel counts differ."""
        channels = {s.channels for s in shapes.values()}
        if len(channels) != 1:
            found = {name: s.channels for name, s in shapes.items()}
            raise ValueError(f"fused levels must have equal channels, got {found}")
        return cls(channels.pop(), num_branches, **kwargs)

    def gates(self, maps: list[torch.Tensor], sizes: list[tuple[int, int]] | None = None) -> torch.Tensor:
        """Softmax weights (N, n) for n aligned maps (N, C, h, w); ``sizes`` as in :func:`masked_mean`."""
        pooled = torch.cat([masked_mean(x, sizes if self.mask_padding else None) for x in maps], dim=1)
        if self.normalize:
            pooled = rms_norm(pooled, pooled.shape[1:])
        return self.excite(torch.relu(self.squeeze(pooled))).softmax(dim=1)

    def forward(self, maps: list[torch.Tensor], sizes: list[tuple[int, int]] | None = None) -> torch.Tensor:
        """Fuse n aligned maps (N, C, h, w) of one level into one (N, C, h, w)."""
        gates = self.gates(maps, sizes).to(maps[0].dtype)[:, :, None, None, None]
        fused = gates[:, 0] * maps[0]
        for i, x in enumerate(maps[1:], start=1):
            fused = torch.addcmul(fused, gates[:, i], x)
        return fused

    def fuse(
        self, branches: list[dict[str, torch.Tensor]], levels: list[str], image_sizes: list[tuple[int, int]] | None
    ) -> dict[str, torch.Tensor]:
        """:meth:`forward` of H-frame ``levels``; sizes (h, w) in H pixels tell the gate where padding begins."""
        return {
            name: self(
                [features[name] for features in branches],
                image_sizes and [downsampled_size(size, level_of(name)) for size in image_sizes],
            )
            for name in levels
        }
