"""Feature pyramid networks (Lin et al., arXiv:1612.03144)."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from fvcore.nn.weight_init import c2_xavier_fill
from torch import nn

from detectron2.layers import Conv2d, ShapeSpec, get_norm

from .backbone import Backbone
from .build import BACKBONE_REGISTRY
from .resnet import build_resnet_backbone

__all__ = [
    "FPN", "LastLevelMaxPool", "LastLevelP6P7", "build_resnet_fpn_backbone",
    "build_retinanet_resnet_fpn_backbone",
]


def _levels_of(names: Sequence[str], strides: Sequence[int]) -> list[int]:
    """log2 of the strides; ValueError unless each stride is twice the one before it."""
    levels = [stride.bit_length() - 1 for stride in strides]
    doubled = all(b == 2 * a for a, b in itertools.pairwise(strides))
    if not doubled or any(1 << level != stride for level, stride in zip(levels, strides)):
        described = ", ".join(f"{n} ({s})" for n, s in zip(names, strides))
        raise ValueError(f"FPN: strides of in_features must be powers of two that double each time: {described}")
    return levels


class FPN(Backbone):
    """Pyramid of equally wide maps from the feature maps of ``bottom_up``.

    Args:
        bottom_up: backbone that provides ``in_features``.
        in_features: names from fine to coarse, contiguous in stride.
        out_channels: channels of every output.
        norm: normalisation of the lateral and output convolutions ("" for none, then they have a bias).
        top_block: module that appends coarser levels; has ``num_levels`` and ``in_feature`` (a name among the
            outputs of ``bottom_up`` or of this pyramid) and returns a list of maps.
        fuse_type: "sum" or "avg" of lateral and upsampled map.
        square_pad: if positive, inputs are to be padded to a square of this many pixels.

    The map of stride 2^l is called ``p{l}``; ``lateral_convs`` and ``output_convs`` go from coarse to fine.
    """

    def __init__(
        self, bottom_up: Backbone, in_features: Sequence[str], out_channels: int, norm="",
        top_block: nn.Module | None = None, fuse_type: str = "sum", square_pad: int = 0,
    ):
        super().__init__()
        if not isinstance(bottom_up, Backbone):
            raise TypeError(f"FPN: bottom_up is a {type(bottom_up).__name__}, which is no Backbone")
        if fuse_type not in ("sum", "avg"):
            raise ValueError(f"FPN: fuse_type must be 'sum' or 'avg', not '{fuse_type}'")
        shapes = bottom_up.output_shape()
        missing = [name for name in in_features if name not in shapes]
        if missing or not in_features:
            raise ValueError(f"FPN: in_features {list(in_features)} must name outputs of bottom_up: {list(shapes)}")
        strides = [shapes[name].stride for name in in_features]
        levels = _levels_of(in_features, strides)

        laterals, outputs = [], []
        for name, level in zip(in_features, levels):
            lateral, output = (
                Conv2d(
                    c_in, out_channels, kernel, padding=kernel // 2, bias=(norm == ""),
                    norm=get_norm(norm, out_channels),
                )
                for c_in, kernel in ((shapes[name].channels, 1), (out_channels, 3))
            )
            for kind, conv, convs in (("lateral", lateral, laterals), ("output", output, outputs)):
                c2_xavier_fill(conv)
                self.add_module(f"fpn_{kind}{level}", conv)
                convs.insert(0, conv)
        self.lateral_convs, self.output_convs = laterals, outputs
        self.in_features = tuple(in_features)
        self.top_block = top_block
        self.bottom_up = bottom_up

        extra = range(levels[-1] + 1, levels[-1] + 1 + (top_block.num_levels if top_block is not None else 0))
        self._out_feature_strides = {f"p{level}": 2**level for level in [*levels, *extra]}
        self._out_features = list(self._out_feature_strides)
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)
        self._size_divisibility = strides[-1]
        self._square_pad = square_pad
        self._fuse_type = fuse_type

    @property
    def size_divisibility(self) -> int:
        """Stride of the coarsest map that is fused."""
        return self._size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        return {"square_size": self._square_pad}

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """(N, C, H, W), H and W multiples of :attr:`size_divisibility` -> ``{"p3": ...}``, fine to coarse."""
        sources = self.bottom_up(x)
        merged, pyramid = None, []
        for name, lateral, output in zip(reversed(self.in_features), self.lateral_convs, self.output_convs):
            # Not in place: forward hooks (distillation) may hold what the lateral convolution gave out.
            side = lateral(sources[name])
            if merged is None:
                merged = side
            else:
                merged = side + F.interpolate(merged, scale_factor=2.0, mode="nearest")
                if self._fuse_type == "avg":
                    merged = merged / 2
            pyramid.insert(0, output(merged))
        if self.top_block is not None:
            # The bottom-up first: a Swin's "p3" has stride 32, the pyramid's 8.
            named = {**dict(zip(self._out_features, pyramid)), **sources}
            pyramid.extend(self.top_block(named[self.top_block.in_feature]))
        return dict(zip(self._out_features, pyramid))


class LastLevelMaxPool(nn.Module):
    """P6 of Faster R-CNN: every second cell of P5."""

    def __init__(self):
        super().__init__()
        self.num_levels, self.in_feature = 1, "p5"

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [F.max_pool2d(x, kernel_size=1, stride=2)]


class LastLevelP6P7(nn.Module):
    """P6 and P7 of RetinaNet: two 3x3 convolutions of stride 2 on ``in_feature``."""

    def __init__(self, in_channels: int, out_channels: int, in_feature: str = "res5"):
        super().__init__()
        self.num_levels, self.in_feature = 2, in_feature
        self.p6 = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)
        for conv in (self.p6, self.p7):
            c2_xavier_fill(conv)

    def forward(self, c5: torch.Tensor) -> list[torch.Tensor]:
        p6 = self.p6(c5)
        return [p6, self.p7(F.relu(p6))]


def _fpn_over_resnet(cfg, input_shape: ShapeSpec, make_top_block) -> FPN:
    """FPN from ``cfg.MODEL.FPN`` on a ResNet from ``cfg.MODEL.RESNETS``."""
    bottom_up = build_resnet_backbone(cfg, input_shape)
    node = cfg.MODEL.FPN
    return FPN(
        bottom_up, node.IN_FEATURES, node.OUT_CHANNELS, norm=node.NORM, fuse_type=node.FUSE_TYPE,
        top_block=make_top_block(bottom_up, node.OUT_CHANNELS),
    )


@BACKBONE_REGISTRY.register()
def build_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """ResNet with FPN whose last level is a max pooling: P2 to P6 for Faster R-CNN."""
    return _fpn_over_resnet(cfg, input_shape, lambda bottom_up, channels: LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """ResNet with FPN and two more levels made from res5: P3 to P7 for RetinaNet and FCOS."""
    return _fpn_over_resnet(
        cfg, input_shape,
        lambda bottom_up, channels: LastLevelP6P7(bottom_up.output_shape()["res5"].channels, channels),
    )
