"""HTC's semantic branch (CVPR 2019, Sec. 3.4): stuff and things on one map, made of all levels of a pyramid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec
from fvcore.nn import weight_init
from torch import nn

CONVS = 4  # 3x3 convolutions behind the fusion of the levels


class SemanticBranch(nn.Module):
    """Fuses levels on the grid of one of them; gives class logits, and an embedding for the heads of the boxes.

    Args:
        input_shape: of the maps; those of ``in_features`` have equal channels C.
        in_features: names of maps.
        fusion_level: the one of them on whose grid the others are resized.
        num_classes: of things and stuff together.
        ignore_value: label of pixels that do not count.
        loss_weight: factor of the loss.
    """

    @configurable
    def __init__(
        self, input_shape: dict[str, ShapeSpec], *, in_features: list[str], fusion_level: str, num_classes: int,
        ignore_value: int = 255, loss_weight: float = 0.2,
    ) -> None:  # fmt: skip
        super().__init__()
        absent = [name for name in (*in_features, fusion_level) if name not in input_shape]
        if absent or fusion_level not in in_features:
            raise ValueError(
                f"MODEL.HTC.SEMANTIC_FEATURES {list(in_features)} must be maps of the backbone, which has "
                f"{list(input_shape)}, and have SEMANTIC_LEVEL {fusion_level!r} among them"
            )
        self.in_features, self.fusion_level = list(in_features), fusion_level
        self.stride = input_shape[fusion_level].stride
        self.ignore_value, self.loss_weight = ignore_value, loss_weight
        channels = input_shape[fusion_level].channels

        def conv(size: int) -> Conv2d:
            layer = Conv2d(channels, channels, size, padding=size // 2, activation=F.relu)
            weight_init.c2_msra_fill(layer)
            return layer

        self.lateral_convs = nn.ModuleList(conv(1) for _ in in_features)
        self.convs = nn.ModuleList(conv(3) for _ in range(CONVS))
        self.conv_embedding = conv(1)
        self.conv_logits = Conv2d(channels, num_classes, 1)
        weight_init.c2_msra_fill(self.conv_logits)

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict:
        options = cfg.MODEL.HTC
        return {
            "input_shape": input_shape,
            "in_features": list(options.SEMANTIC_FEATURES),
            "fusion_level": options.SEMANTIC_LEVEL,
            "num_classes": options.SEMANTIC_CLASSES,
            "ignore_value": options.SEMANTIC_IGNORE,
            "loss_weight": options.SEMANTIC_WEIGHT,
        }

    def forward(self, features: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Maps by name -> embedding (N, C, h, w) and, in training, logits (N, classes, h, w); on the grid of
        ``fusion_level``."""
        size = features[self.fusion_level].shape[-2:]
        x = 0
        for name, lateral in zip(self.in_features, self.lateral_convs):
            level = features[name]
            if name != self.fusion_level:
                level = F.interpolate(level, size=size, mode="bilinear", align_corners=True)
            x = x + lateral(level)
        for conv in self.convs:
            x = conv(x)
        return self.conv_embedding(x), self.conv_logits(x) if self.training else None

    def losses(self, logits: torch.Tensor, maps: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """"loss_sem_seg": weighted cross entropy, mean over the pixels that count.

        Args:
            logits: (N, classes, h, w).
            maps: labels (H_i, W_i) int64 of each image, in pixels of the network's input; what an image lacks of the
                padded batch does not count.
        """
        height, width = logits.shape[-2:]
        labels = logits.new_full((len(maps), height, width), self.ignore_value, dtype=torch.int64)
        for label, image in zip(labels, maps):
            coarse = image[:: self.stride, :: self.stride]
            label[: coarse.shape[0], : coarse.shape[1]] = coarse
        total = F.cross_entropy(logits.float(), labels, ignore_index=self.ignore_value, reduction="sum")
        count = (labels != self.ignore_value).sum().clamp(min=1)
        return {"loss_sem_seg": self.loss_weight * total / count}
