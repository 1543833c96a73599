"""Dense detectors with heads that cost less at the fine levels of a low-resolution student (MODEL.LIGHT_HEAD)."""

from __future__ import annotations

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from fvcore.nn.weight_init import c2_msra_fill
from torch import nn

from .fcos import FCOS
from .gfl import GFL, GFLHead

TOWERS = ("cls_subnet", "bbox_subnet")


def make_separable(tower: nn.Sequential) -> None:
    """Replace every convolution of a tower, in place, by a depthwise one and a 1x1: k^2 + C multiply-adds a channel
    instead of k^2 C.

    Both begin with weights that keep the variance of what passes, the 1x1 as the ReLU behind it needs them.
    """
    for number, layer in enumerate(tower):
        if isinstance(layer, nn.Conv2d):
            channels, size = layer.in_channels, layer.kernel_size
            depthwise = nn.Conv2d(channels, channels, size, padding=layer.padding, groups=channels, bias=False)
            pointwise = nn.Conv2d(channels, layer.out_channels, 1)
            nn.init.kaiming_normal_(depthwise.weight, nonlinearity="linear")
            nn.init.kaiming_normal_(pointwise.weight, nonlinearity="relu")
            nn.init.zeros_(pointwise.bias)
            tower[number] = nn.Sequential(depthwise, pointwise)


class LightHead:
    """In front of detectron2's RetinaNetHead or a subclass of it: equal outputs, of cheaper layers.

    Args:
        input_shape: a ShapeSpec a level, finest first, of equal channels.
        conv_dims, norm: of the towers, as that head takes them; at least one convolution, "GN" or "".
        separable: see :func:`make_separable`.
        shared: one tower feeds all predictions.
        finest_width: channels of every layer of the finest level, which then has layers of its own; 0: it shares those
            of the others.
        kwargs: of that head.
    """

    def __init__(
        self, *, input_shape: list[ShapeSpec], conv_dims: list[int], norm: str = "", separable: bool = False,
        shared: bool = False, finest_width: int = 0, **kwargs,
    ) -> None:  # fmt: skip
        if norm not in ("", "GN"):
            raise ValueError(f"NORM {norm!r}: a light head has 'GN' or '', the same for all levels")
        if not conv_dims:
            raise ValueError("a light head has at least one convolution a tower, and here there is none")
        if finest_width and len(input_shape) < 2:
            raise ValueError("MODEL.LIGHT_HEAD.FINEST_WIDTH: the head reads one level, of which there is no finest")
        if norm == "GN" and finest_width % 32:
            raise ValueError(f"MODEL.LIGHT_HEAD.FINEST_WIDTH {finest_width}: GN has 32 groups, so a multiple of 32")
        finest, *coarser = input_shape
        shapes = coarser if finest_width else input_shape
        super().__init__(input_shape=shapes, conv_dims=conv_dims, norm=norm, **kwargs)
        if separable:
            for name in TOWERS:
                make_separable(getattr(self, name))
        self.tower = None
        if shared:
            self.tower = self.bbox_subnet
            for name in TOWERS:
                setattr(self, name, nn.Sequential())
        self.narrow = self.finest = None
        if finest_width:
            self.narrow = nn.Conv2d(finest.channels, finest_width, 1)
            c2_msra_fill(self.narrow)
            shape = ShapeSpec(channels=finest_width, stride=finest.stride)
            options = {"norm": norm, "separable": separable, "shared": shared, **kwargs}
            self.finest = type(self)(input_shape=[shape], conv_dims=[finest_width] * len(conv_dims), **options)

    def forward(self, features: list[torch.Tensor]) -> tuple[list[torch.Tensor], ...]:
        """Maps (N, C, h_l, w_l), finest first -> what the head gives without the options."""
        first, coarser = ([], features) if self.finest is None else (features[:1], features[1:])
        if self.tower is not None:
            coarser = [self.tower(x) for x in coarser]
        outputs = super().forward(coarser)
        if first:
            outputs = tuple(a + b for a, b in zip(self.finest([self.narrow(first[0])]), outputs))
        return outputs


class LightRetinaNetHead(LightHead, RetinaNetHead):
    """RetinaNet's."""


class LightFCOSHead(LightHead, FCOSHead):
    """FCOS's."""


class LightGFLHead(LightHead, GFLHead):
    """GFL's; the finest level keeps its factor on the sides."""


def _options(cfg) -> dict:
    keys = cfg.MODEL.LIGHT_HEAD
    return {"separable": keys.SEPARABLE, "shared": keys.SHARED, "finest_width": keys.FINEST_WIDTH}


@META_ARCH_REGISTRY.register()
class LightRetinaNet(RetinaNet):
    """RetinaNet with its keys, and MODEL.LIGHT_HEAD for its head."""

    @classmethod
    def from_config(cls, cfg) -> dict:
        arguments = super().from_config(cfg)
        shapes = arguments["backbone"].output_shape()
        shapes = [shapes[name] for name in cfg.MODEL.RETINANET.IN_FEATURES]
        return {**arguments, "head": LightRetinaNetHead(**RetinaNetHead.from_config(cfg, shapes), **_options(cfg))}


@META_ARCH_REGISTRY.register()
class LightFCOS(FCOS):
    """FCOS with the keys of MODEL.FCOS, and MODEL.LIGHT_HEAD for its head."""

    @classmethod
    def from_config(cls, cfg) -> dict:
        arguments = super().from_config(cfg)
        finest = arguments["head"].finest
        if finest is not None:
            nn.init.constant_(finest.bbox_pred.bias, cfg.MODEL.FCOS.PRIOR_DISTANCE)
        return arguments

    @classmethod
    def build_head(cls, cfg, **kwargs) -> LightFCOSHead:
        if cfg.MODEL.FCOS.SCALES:
            raise ValueError("MODEL.FCOS.SCALES: LightFCOS has none")
        return LightFCOSHead(**kwargs, **_options(cfg))


@META_ARCH_REGISTRY.register()
class LightGFL(GFL):
    """GFL with the keys of MODEL.GFL, and MODEL.LIGHT_HEAD for its head."""

    @classmethod
    def build_head(cls, cfg, input_shape: list[ShapeSpec]) -> LightGFLHead:
        return LightGFLHead(**GFLHead.from_config(cfg, input_shape), **_options(cfg))
