"""PSPNet's head (Zhao et al., CVPR 2017): pyramid pooling of the last map, and an auxiliary classifier."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY

from .head import DecoderHead, Features, PyramidPooling, conv_norm_relu


@SEM_SEG_HEADS_REGISTRY.register()
class PSPHead(DecoderHead):
    """PSPNet's decoder: the last map beside its averages over grids, through a 3x3 convolution.

    It reads two maps, the auxiliary classifier's first (C4, C5), or with AUX_WEIGHT 0 that of C5 alone.
    """

    def make_decoder(
        self, shapes: dict[str, ShapeSpec], channels: int, pool_scales: Sequence[int], norm: str
    ) -> tuple[str, str]:
        if not 1 <= len(shapes) <= 2 or (self.aux_weight and len(shapes) == 1):
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.IN_FEATURES {self.in_features}: PSPHead reads two maps, the auxiliary "
                "classifier's and the last, or with AUX_WEIGHT 0 the last alone"
            )
        first, last = self.in_features[0], self.in_features[-1]
        self.pooling = PyramidPooling(shapes[last].channels, channels, pool_scales, norm)
        self.bottleneck = conv_norm_relu(self.pooling.out_channels, channels, 3, norm)
        return last, first

    def decode(self, features: Features) -> torch.Tensor:
        return self.bottleneck(self.pooling(features[self.in_features[-1]]))
