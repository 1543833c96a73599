"""What heads of semantic segmentation share: a decoder's map that is classified, and an auxiliary classifier."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from fvcore.nn.weight_init import c2_msra_fill
from torch import nn

from ..adapters import Features


def conv_norm_relu(in_channels: int, out_channels: int, kernel: int, norm: str) -> Conv2d:
    """Convolution, normalisation and ReLU that keep the size."""
    conv = Conv2d(
        in_channels, out_channels, kernel, padding=kernel // 2, bias=not norm, norm=get_norm(norm, out_channels),
        activation=F.relu,
    )  # fmt: skip
    c2_msra_fill(conv)
    return conv


def _classifier(channels: int, num_classes: int, dropout: float) -> nn.Sequential:
    conv = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
    return nn.Sequential(nn.Dropout2d(dropout), conv)


def grid_means(x: torch.Tensor, side: int) -> torch.Tensor:
    """What ``F.adaptive_avg_pool2d(x, side)`` gives, in operations that ONNX has for maps of any size."""

    def shares(length: int) -> torch.Tensor:
        """(side, length): what each line of the map contributes to each line of the grid."""
        lines, cells = torch.arange(length, device=x.device), torch.arange(side, device=x.device)[:, None]
        first = torch.div(cells * length, side, rounding_mode="floor")
        last = torch.div((cells + 1) * length + side - 1, side, rounding_mode="floor")
        inside = ((lines >= first) & (lines < last)).to(x.dtype)
        return inside / inside.sum(dim=1, keepdim=True)

    return torch.matmul(torch.matmul(shares(x.shape[2]), x), shares(x.shape[3]).t())


class PyramidPooling(nn.Module):
    """A map beside its averages over grids of several sizes, each through a 1x1 convolution: PSPNet, Sec. 3.2.

    Args:
        in_channels: C of the map.
        channels: D of each of the averages.
        scales: sides of the grids.
        norm: normalisation of the convolutions, "" for none. Batch norms need two values, so training with a grid of
            side 1 takes at least two images (a process, unless the norm is synchronised).
    """

    def __init__(self, in_channels: int, channels: int, scales: Sequence[int], norm: str) -> None:
        super().__init__()
        self.scales = tuple(scales)
        self.convs = nn.ModuleList(conv_norm_relu(in_channels, channels, 1, norm) for _ in scales)
        self.out_channels = in_channels + channels * len(self.scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, h, w) -> (N, C + D scales, h, w)."""
        means = grid_means if torch.jit.is_tracing() else F.adaptive_avg_pool2d
        pooled = [conv(means(x, scale)) for scale, conv in zip(self.scales, self.convs)]
        size = x.shape[2:]
        return torch.cat([x, *(F.interpolate(y, size, mode="bilinear", align_corners=False) for y in pooled)], dim=1)


class DecoderHead(nn.Module):
    """detectron2's interface of heads for semantic segmentation around a decoder.

    A subclass has :meth:`make_decoder` and :meth:`decode`. Distillation reads the output of ``bottleneck``, the last
    module of the decoder (Raw features, WACV 2024).

    Args:
        input_shape: name -> channels and stride of the maps that are read.
        num_classes: K.
        channels: D of the decoder's map; the auxiliary classifier's convolution has half of them.
        pool_scales: see :class:`PyramidPooling`.
        common_stride: pixels of the input per element of the decoder's map.
        norm: normalisation of all convolutions.
        dropout: part of the channels that is dropped before each classifier.
        loss_weight, aux_weight: factor of the losses, and of the auxiliary one relative to the other; 0: there is none.
        ignore_value: label without loss.
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
        super().__init__()
        self.in_features = list(input_shape)
        self.common_stride, self.ignore_value = common_stride, ignore_value
        self.loss_weight, self.aux_weight = loss_weight, aux_weight
        decoded, self.aux_feature = self.make_decoder(input_shape, channels, pool_scales, norm)
        if input_shape[decoded].stride != common_stride:
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.COMMON_STRIDE is {common_stride}, but {decoded} has {input_shape[decoded].stride}"
            )
        self.predictor = _classifier(channels, num_classes, dropout)
        if aux_weight:
            width = input_shape[self.aux_feature].channels
            self.auxiliary = nn.Sequential(
                conv_norm_relu(width, channels // 2, 3, norm), _classifier(channels // 2, num_classes, dropout)
            )

    def make_decoder(
        self, shapes: dict[str, ShapeSpec], channels: int, pool_scales: Sequence[int], norm: str
    ) -> tuple[str, str]:
        """Make the decoder's modules, the last one as ``bottleneck``.

        Returns:
            names of the map on whose grid the decoder's is, and of the map that the auxiliary classifier reads.

        Raises:
            ValueError: the decoder cannot read these maps.
        """
        raise NotImplementedError

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        node = cfg.MODEL.SEM_SEG_HEAD
        missing = [name for name in node.IN_FEATURES if name not in input_shape]
        if missing:
            raise ValueError(f"MODEL.SEM_SEG_HEAD.IN_FEATURES: {missing} are not made; there are {list(input_shape)}")
        return {
            "input_shape": {name: input_shape[name] for name in node.IN_FEATURES},
            "num_classes": node.NUM_CLASSES,
            "channels": node.CONVS_DIM,
            "pool_scales": node.POOL_SCALES,
            "common_stride": node.COMMON_STRIDE,
            "norm": node.NORM,
            "dropout": node.DROPOUT,
            "loss_weight": node.LOSS_WEIGHT,
            "aux_weight": node.AUX_WEIGHT,
            "ignore_value": node.IGNORE_VALUE,
        }

    def decode(self, features: Features) -> torch.Tensor:
        """The decoder's map (N, channels, h, w) of the backbone's maps."""
        raise NotImplementedError

    def layers(self, features: Features) -> torch.Tensor:
        """Class scores (N, K, h, w) on the grid of the decoder's map."""
        return self.predictor(self.decode(features))

    def losses(self, features: Features, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """Cross entropies, means over the pixels that are not ignored, in float32.

        Args:
            targets: (N, H, W), labels on the grid of the input.
        """
        losses = {"loss_sem_seg": self._loss(self.layers(features), targets) * self.loss_weight}
        if self.aux_weight:
            scores = self.auxiliary(features[self.aux_feature])
            losses["loss_sem_seg_aux"] = self._loss(scores, targets) * self.loss_weight * self.aux_weight
        return losses

    def _loss(self, scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        scores = F.interpolate(scores.float(), targets.shape[-2:], mode="bilinear", align_corners=False)
        total = F.cross_entropy(scores, targets, ignore_index=self.ignore_value, reduction="sum")
        # A batch without any label gives 0, not NaN.
        return total / (targets != self.ignore_value).sum().clamp(min=1)

    def forward(
        self, features: Features, targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """
        Args:
            features: maps (N, C, H / stride, W / stride) by name.
            targets: labels (N, H, W), for training.

        Returns:
            In training (None, losses), else (scores (N, K, H, W), {}).
        """
        if self.training:
            return None, self.losses(features, targets)
        scores = self.layers(features)
        return F.interpolate(scores, scale_factor=self.common_stride, mode="bilinear", align_corners=False), {}
