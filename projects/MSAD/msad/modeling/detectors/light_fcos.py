"""FCOS with a head that costs less at the fine levels of a low-resolution student."""

from __future__ import annotations

import math

import torch
from detectron2.config import configurable
from detectron2.layers import get_norm
from detectron2.modeling import META_ARCH_REGISTRY
from fvcore.nn.weight_init import c2_msra_fill
from torch import nn

from .fcos import FCOS


def make_tower(channels: int, dims: list[int], norm: str, separable: bool) -> nn.Sequential:
    """3x3 convolutions to ``dims`` channels, each with ``norm`` ("GN" or "") and ReLU.

    Args:
        channels: of the input.
        separable: each is a depthwise 3x3 and a 1x1 convolution: 9 + C multiply-adds a channel instead of 9 C.
    """
    layers: list[nn.Module] = []
    for width in dims:
        if separable:
            layers.append(nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False))
            c2_msra_fill(layers[-1])
            layers.append(nn.Conv2d(channels, width, 1))
            c2_msra_fill(layers[-1])
        else:
            layers.append(nn.Conv2d(channels, width, 3, padding=1))
            _init_small(layers[-1])
        layers += [get_norm(norm, width)] if norm else []
        layers.append(nn.ReLU())
        channels = width
    return nn.Sequential(*layers)


def _init_small(conv: nn.Conv2d, bias: float = 0.0) -> None:
    """RetinaNet's initialisation (arXiv:1708.02002, sec. 4.1)."""
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.constant_(conv.bias, bias)


class LightBranch(nn.Module):
    """Towers and predictions of FCOS, with the parameter names of detectron2's FCOSHead.

    Args:
        channels: of the maps.
        num_classes, conv_dims, norm, prior_prob: as MODEL.FCOS has them.
        separable: see :func:`make_tower`.
        shared: one tower feeds all predictions.
    """

    def __init__(
        self, channels: int, *, num_classes: int, conv_dims: list[int], norm: str, prior_prob: float, separable: bool,
        shared: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        if norm not in ("", "GN"):
            raise ValueError(f"MODEL.FCOS.NORM {norm!r}: a light head has 'GN' or '', the same for all levels")
        if not conv_dims:
            raise ValueError("MODEL.FCOS.CONV_DIMS is empty: a light head has at least one convolution")
        self.bbox_subnet = make_tower(channels, conv_dims, norm, separable)
        self.cls_subnet = None if shared else make_tower(channels, conv_dims, norm, separable)
        self.cls_score = nn.Conv2d(conv_dims[-1], num_classes, 3, padding=1)
        self.bbox_pred = nn.Conv2d(conv_dims[-1], 4, 3, padding=1)
        self.ctrness = nn.Conv2d(conv_dims[-1], 1, 3, padding=1)
        _init_small(self.cls_score, -math.log((1 - prior_prob) / prior_prob))
        _init_small(self.bbox_pred)
        _init_small(self.ctrness)

    def predict(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(N, C, h, w) -> class logits (N, K, h, w), distances (N, 4, h, w) and centreness logits (N, 1, h, w)."""
        tower = self.bbox_subnet(x)
        classes = tower if self.cls_subnet is None else self.cls_subnet(x)
        return self.cls_score(classes), self.bbox_pred(tower), self.ctrness(tower)


class LightFCOSHead(LightBranch):
    """FCOS's head, of which the finest level, where most locations are, can have narrower layers of its own.

    Args:
        input_shape: a ShapeSpec a level, finest first, of equal channels.
        finest_width: channels of every layer of the finest level; 0: it shares those of the others.
        kwargs: those of :class:`LightBranch`.
    """

    def __init__(self, *, input_shape: list, finest_width: int = 0, **kwargs) -> None:
        channels = input_shape[0].channels
        super().__init__(channels, **kwargs)
        self.narrow = self.finest = None
        if finest_width:
            self.narrow = nn.Conv2d(channels, finest_width, 1)
            c2_msra_fill(self.narrow)
            dims = [finest_width] * len(kwargs["conv_dims"])
            self.finest = LightBranch(finest_width, **{**kwargs, "conv_dims": dims})

    def forward(
        self, features: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """Maps, finest first -> lists over levels of what :meth:`LightBranch.predict` gives."""
        first = 0 if self.finest is None else 1
        levels = [self.finest.predict(self.narrow(x)) for x in features[:first]]
        levels += [self.predict(x) for x in features[first:]]
        logits, sides, centerness = (list(maps) for maps in zip(*levels))
        return logits, sides, centerness


@META_ARCH_REGISTRY.register()
class LightFCOS(FCOS):
    """FCOS with the keys of MODEL.FCOS, and MODEL.LIGHTFCOS for its head."""

    @configurable
    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg) -> dict:
        arguments = super().from_config(cfg)
        finest = arguments["head"].finest
        if finest is not None:
            nn.init.constant_(finest.bbox_pred.bias, cfg.MODEL.FCOS.PRIOR_DISTANCE)
        return arguments

    @classmethod
    def build_head(cls, cfg, **kwargs) -> LightFCOSHead:
        options = cfg.MODEL.LIGHTFCOS
        return LightFCOSHead(
            separable=options.SEPARABLE, shared=options.SHARED, finest_width=options.FINEST_WIDTH, **kwargs
        )
