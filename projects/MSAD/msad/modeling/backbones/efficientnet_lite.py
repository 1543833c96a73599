"""EfficientNet-Lite 0 to 2, with the feature maps that a pyramid is made from.

EfficientNet (Tan and Le, ICML 2019) without squeeze-excitation and with ReLU6, as TensorFlow released it: convolutions
of stride 2 pad one line less at the top and left than at the bottom and right, and norms have epsilon 1e-3. ImageNet
weights are on the package index, see ``pretrained.py``.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import nn

from .pretrained import PREFIX

STEM_CHANNELS = 32
# Kernel, stride and expansion of the blocks of each group; the stride is that of a group's first block alone.
GROUPS = ((3, 1, 1), (3, 2, 6), (5, 2, 6), (3, 2, 6), (5, 1, 6), (5, 2, 6), (3, 1, 6))
# Channels and number of blocks of each group.
VARIANTS = {
    "lite0": ((16, 24, 40, 80, 112, 192, 320), (1, 2, 2, 3, 3, 4, 1)),
    "lite1": ((16, 24, 40, 80, 112, 192, 320), (1, 3, 3, 4, 4, 5, 1)),
    "lite2": ((16, 24, 48, 88, 120, 208, 352), (1, 3, 3, 4, 4, 5, 1)),
}
# Name of each map and the number of groups that make it; the next group halves the map.
MAP_ENDS = {"c1": 1, "res2": 2, "res3": 3, "res4": 5, "res5": 7}
BATCH_NORM_EPSILON = 1e-3
# Of the images that the packaged weights were trained on: INPUT.FORMAT, MODEL.PIXEL_MEAN, MODEL.PIXEL_STD.
PREPROCESSING = ("RGB", (127.0,) * 3, (128.0,) * 3)


def _norm(name: str, channels: int) -> nn.Module:
    norm = get_norm(name, channels)
    if isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)):
        norm.eps = BATCH_NORM_EPSILON
    return norm


def _same_padding(kernel: int, stride: int) -> nn.ZeroPad2d:
    """TensorFlow's SAME for sides that divide by ``stride``: kernel - stride lines, the odd one at the end."""
    total = kernel - stride
    return nn.ZeroPad2d((total // 2, total - total // 2) * 2)


class MBConv(nn.Sequential):
    """Inverted residual block: expansion (if any), depthwise convolution, projection without activation.

    Args:
        in_channels: of the input.
        out_channels: of the output; with stride 1 and as many channels as the input, the input is added.
        kernel: of the depthwise convolution.
        stride: 1 or 2; sides of the input must divide by it.
        expansion: the depthwise convolution has ``expansion * in_channels`` channels.
        norm: detectron2's name of a normalisation.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int, expansion: int, norm: str
    ) -> None:
        wide = expansion * in_channels
        layers = OrderedDict()
        if expansion > 1:
            layers["_expand_conv"] = nn.Conv2d(in_channels, wide, 1, bias=False)
            layers["_bn0"] = _norm(norm, wide)
            layers["expand_relu"] = nn.ReLU6(inplace=True)
        if stride > 1:
            layers["pad"] = _same_padding(kernel, stride)
        padding = kernel // 2 if stride == 1 else 0
        layers["_depthwise_conv"] = nn.Conv2d(wide, wide, kernel, stride, padding, groups=wide, bias=False)
        layers["_bn1"] = _norm(norm, wide)
        layers["depthwise_relu"] = nn.ReLU6(inplace=True)
        layers["_project_conv"] = nn.Conv2d(wide, out_channels, 1, bias=False)
        layers["_bn2"] = _norm(norm, out_channels)
        super().__init__(layers)
        self.adds_input = stride == 1 and in_channels == out_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride)."""
        out = super().forward(x)
        return x + out if self.adds_input else out


class EfficientNetLite(Backbone):
    """EfficientNet-Lite without its last 1x1 convolution and classifier, under the parameter names of public weights.

    "c1" and "res2" ... "res5" have strides 2 ... 32; with lite0 they have 16, 24, 40, 112 and 320 channels.

    Args:
        variant: "lite0", "lite1" or "lite2".
        out_features: names of the maps that are returned. Blocks behind the last of them are left out.
        norm: detectron2's name of a normalisation; "FrozenBN" keeps the pretrained statistics.
        freeze_at: so many of the stages c1 (with the stem), res2, ... get neither gradients nor new statistics.
    """

    def __init__(self, variant: str, out_features: list[str], norm: str = "BN", freeze_at: int = 0) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"MODEL.EFFICIENTNET_LITE.VARIANT must be one of {list(VARIANTS)}, not {variant!r}")
        unknown = [name for name in out_features if name not in MAP_ENDS]
        if unknown or not out_features:
            raise ValueError(
                f"MODEL.EFFICIENTNET_LITE.OUT_FEATURES {list(out_features)} must name some of {list(MAP_ENDS)}"
            )
        if not norm:
            raise ValueError("MODEL.EFFICIENTNET_LITE.NORM is empty: the convolutions have no bias and need a norm")
        widths, depths = VARIANTS[variant]
        last = max(MAP_ENDS[name] for name in out_features)
        self._pad = _same_padding(3, 2)
        self._conv_stem = nn.Conv2d(3, STEM_CHANNELS, 3, stride=2, bias=False)
        self._bn0 = _norm(norm, STEM_CHANNELS)
        self._relu = nn.ReLU6(inplace=True)
        self._blocks = nn.ModuleList()
        self._group_ends = []  # number of blocks up to the end of each group
        channels = STEM_CHANNELS
        for (kernel, stride, expansion), width, depth in zip(GROUPS[:last], widths, depths):
            for i in range(depth):
                self._blocks.append(MBConv(channels, width, kernel, stride if i == 0 else 1, expansion, norm))
                channels = width
            self._group_ends.append(len(self._blocks))
        self._out_features = sorted(out_features, key=MAP_ENDS.get)
        self._out_feature_channels = {name: widths[MAP_ENDS[name] - 1] for name in out_features}
        self._out_feature_strides = {name: 2 ** (list(MAP_ENDS).index(name) + 1) for name in out_features}
        self._freeze(freeze_at)

    def _freeze(self, stages: int) -> None:
        if stages < 1:
            return
        self._conv_stem.requires_grad_(False)
        self._bn0.requires_grad_(False)
        self._bn0 = FrozenBatchNorm2d.convert_frozen_batchnorm(self._bn0)
        groups = min(list(MAP_ENDS.values())[:stages][-1], len(self._group_ends))
        for i in range(self._group_ends[groups - 1]):
            self._blocks[i].requires_grad_(False)
            self._blocks[i] = FrozenBatchNorm2d.convert_frozen_batchnorm(self._blocks[i])

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """(N, 3, H, W), sides multiples of 32 -> maps by name, finest first."""
        x = self._relu(self._bn0(self._conv_stem(self._pad(x))))
        outputs, start = {}, 0
        for name in self._out_features:
            end = self._group_ends[MAP_ENDS[name] - 1]
            for block in self._blocks[start:end]:
                x = block(x)
            outputs[name], start = x, end
        return outputs


def _check_packaged_weights(cfg: CfgNode) -> None:
    """ValueError if MODEL.WEIGHTS names the packaged weights of another variant or of images in another form."""
    weights, variant = cfg.MODEL.WEIGHTS.partition("?")[0], cfg.MODEL.EFFICIENTNET_LITE.VARIANT
    if not weights.startswith(f"{PREFIX}efficientnet_"):
        return
    if weights != f"{PREFIX}efficientnet_{variant}":
        raise ValueError(f"MODEL.WEIGHTS {weights} are not those of MODEL.EFFICIENTNET_LITE.VARIANT {variant!r}")
    found = (cfg.INPUT.FORMAT, tuple(cfg.MODEL.PIXEL_MEAN), tuple(cfg.MODEL.PIXEL_STD))
    if found != PREPROCESSING:
        raise ValueError(
            f"INPUT.FORMAT, MODEL.PIXEL_MEAN, MODEL.PIXEL_STD are {found}; {weights} was trained with {PREPROCESSING}"
        )


@BACKBONE_REGISTRY.register()
def build_efficientnet_lite_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> EfficientNetLite:
    """EfficientNet-Lite of MODEL.EFFICIENTNET_LITE, frozen as MODEL.BACKBONE.FREEZE_AT says."""
    if input_shape.channels != 3:
        raise ValueError(f"EfficientNet-Lite takes images of 3 channels, not {input_shape.channels}")
    _check_packaged_weights(cfg)
    options = cfg.MODEL.EFFICIENTNET_LITE
    return EfficientNetLite(options.VARIANT, options.OUT_FEATURES, options.NORM, cfg.MODEL.BACKBONE.FREEZE_AT)
