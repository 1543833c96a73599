"""PSPNet's head (Zhao et al., CVPR 2017): pyramid pooling of the last map, and an auxiliary classifier."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY

from .head import DecoderHead, Features, PyramidPooling, conv_norm_relu


@SEM_SEG_HEADS_REGISTRY.register()
class PSPHead(DecoderHead):
    """PSPNet's decoder: the last map beside its averages over grids, through a 3x3 convolution.

    Args:
        input_shape: name -> channels and stride of the two maps, the auxiliary classifier's first (C4, C5), or of C5
            alone. The last has ``common_stride``.
        num_classes: K.
        channels: of the decoder's map and of each pooled one.
        pool_scales: see :class:`PyramidPooling`.
        norm: normalisation of all convolutions.
        common_stride, dropout, loss_weight, aux_weight, ignore_value: see :class:`DecoderHead`.
    """

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        num_classes: int,
        channels: int,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        common_stride: int = 8,
        norm: str = "SyncBN",
        dropout: float = 0.1,
        loss_weight: float = 1.0,
        aux_weight: float = 0.4,
        ignore_value: int = 255,
    ) -> None:
        super().__init__(list(input_shape), common_stride, loss_weight, aux_weight, ignore_value)
        if not 1 <= len(self.in_features) <= 2 or (aux_weight and len(self.in_features) == 1):
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.IN_FEATURES {self.in_features}: PSPHead reads two maps, the auxiliary "
                "classifier's and the last, or with AUX_WEIGHT 0 the last alone"
            )
        first, last = self.in_features[0], input_shape[self.in_features[-1]]
        if last.stride != common_stride:
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.COMMON_STRIDE is {common_stride}, but {self.in_features[-1]} has {last.stride}"
            )
        self.pooling = PyramidPooling(last.channels, channels, pool_scales, norm)
        self.bottleneck = conv_norm_relu(self.pooling.out_channels, channels, 3, norm)
        self.add_classifiers(channels, num_classes, norm, dropout, (first, input_shape[first].channels))

    def decode(self, features: Features) -> torch.Tensor:
        return self.bottleneck(self.pooling(features[self.in_features[-1]]))
