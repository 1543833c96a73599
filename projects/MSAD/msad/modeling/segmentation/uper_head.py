"""UPerNet's head (Xiao et al., ECCV 2018): a pyramid whose top is PSPNet's pooling, fused at its finest level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import nn

from .head import DecoderHead, Features, PyramidPooling, conv_norm_relu


def _resize(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


@SEM_SEG_HEADS_REGISTRY.register()
class UPerHead(DecoderHead):
    """UPerNet's decoder for semantic segmentation.

    Every map but the last goes through a 1x1 convolution, the last through pyramid pooling and a 3x3 convolution; each
    level gets what is above it added, then, but for the top, a 3x3 convolution. All levels, resized to the finest, are
    fused by ``bottleneck``. The auxiliary classifier reads the map before the last.

    It reads two maps or more, finest first.
    """

    def make_decoder(
        self, shapes: dict[str, ShapeSpec], channels: int, pool_scales: Sequence[int], norm: str
    ) -> tuple[str, str]:
        strides = [shape.stride for shape in shapes.values()]
        if len(strides) < 2 or strides != sorted(strides):
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.IN_FEATURES {self.in_features} (strides {strides}): UPerHead reads two maps or "
                "more, finest first"
            )
        *finer, last = shapes.values()
        self.pooling = PyramidPooling(last.channels, channels, pool_scales, norm)
        self.top = conv_norm_relu(self.pooling.out_channels, channels, 3, norm)
        self.laterals = nn.ModuleList(conv_norm_relu(shape.channels, channels, 1, norm) for shape in finer)
        self.outputs = nn.ModuleList(conv_norm_relu(channels, channels, 3, norm) for _ in finer)
        self.bottleneck = conv_norm_relu(channels * len(strides), channels, 3, norm)
        return self.in_features[0], self.in_features[-2]

    def decode(self, features: Features) -> torch.Tensor:
        *finer, last = (features[name] for name in self.in_features)
        levels = [self.top(self.pooling(last))]  # coarsest first
        for lateral, x in zip(reversed(self.laterals), reversed(finer)):
            levels.append(lateral(x) + _resize(levels[-1], x.shape[-2:]))
        top, *others = levels
        made = [top, *(output(x) for output, x in zip(reversed(self.outputs), others))]
        size = finer[0].shape[-2:]
        return self.bottleneck(torch.cat([_resize(x, size) for x in reversed(made)], dim=1))
