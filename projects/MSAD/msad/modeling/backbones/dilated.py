"""Networks for segmentation, whose last stages keep the resolution and dilate their convolutions instead."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, ResNet
from fvcore.nn.weight_init import c2_msra_fill

from .mobilenetv2 import MobileNetV2

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
# First blocks of the groups of MobileNetV2 that are dilated at stride 8 (the index in torchvision's features).
MOBILENETV2_DILATIONS = {7: 2, 11: 2, 14: 4, 17: 4}
MOBILENETV2_BLOCKS = 18  # without the 1x1 convolution to 1280 channels


class DeepStem(CNNBlockBase):
    """Three 3x3 convolutions, the first of stride 2, and max-pooling: (N, C, H, W) -> (N, out, H/4, W/4).

    The stem of ResNet-C (He et al., CVPR 2019, Sec. 4.2); the first two have half of the channels.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: str) -> None:
        super().__init__(in_channels, out_channels, 4)
        widths = [in_channels, out_channels // 2, out_channels // 2, out_channels]
        for i in (1, 2, 3):
            conv = Conv2d(
                widths[i - 1], widths[i], 3, stride=2 if i == 1 else 1, padding=1, bias=False,
                norm=get_norm(norm, widths[i]), activation=F.relu,
            )  # fmt: skip
            c2_msra_fill(conv)
            self.add_module(f"conv{i}", conv)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H/4, W/4)."""
        return F.max_pool2d(self.conv3(self.conv2(self.conv1(x))), kernel_size=3, stride=2, padding=1)


class DilatedBasicBlock(BasicBlock):
    """detectron2's BasicBlock with a dilated first convolution; the second stays plain."""

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int = 1, norm: str = "BN", dilation: int = 1
    ) -> None:
        super().__init__(in_channels, out_channels, stride=stride, norm=norm)
        self.conv1.dilation = self.conv1.padding = (dilation, dilation)


class DilatedResNet(ResNet):
    """detectron2's ResNet that pads its images to the stride of its last map, so that labels fit the scores."""

    @property
    def size_divisibility(self) -> int:
        """Stride of the coarsest map."""
        return max(self._out_feature_strides.values())


def stage_dilations(dilation: int, blocks: int, contract: bool) -> list[int]:
    """Dilation of each block of a stage: the first one's is half of the others' if ``contract``."""
    first = max(dilation // 2, 1) if contract else dilation
    return [first] + [dilation] * (blocks - 1)


@BACKBONE_REGISTRY.register()
def build_dilated_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> DilatedResNet:
    """ResNet-18 to -152 of MODEL.RESNETS whose RES4_DILATION and RES5_DILATION replace the strides of res4 and res5.

    With 2 and 4 res3, res4 and res5 all have stride 8.

    Raises:
        ValueError: an unknown depth or stem, a dilation below 1, or res5 less dilated than res4.
    """
    options = cfg.MODEL.RESNETS
    if options.DEPTH not in BLOCKS:
        raise ValueError(f"MODEL.RESNETS.DEPTH {options.DEPTH}: build_dilated_resnet_backbone knows {list(BLOCKS)}")
    stems = {"basic": BasicStem, "v1c": DeepStem}
    if options.STEM_TYPE not in stems:
        raise ValueError(f"MODEL.RESNETS.STEM_TYPE must be one of {list(stems)}, not {options.STEM_TYPE!r}")
    dilations = (1, 1, options.RES4_DILATION, options.RES5_DILATION)
    if not 1 <= dilations[2] <= dilations[3]:
        raise ValueError(f"MODEL.RESNETS: RES4_DILATION, RES5_DILATION must be 1 <= RES4 <= RES5, not {dilations[2:]}")
    basic = options.DEPTH < 50
    stages, channels = [], options.STEM_OUT_CHANNELS
    for i, (blocks, dilation) in enumerate(zip(BLOCKS[options.DEPTH], dilations)):
        width = options.RES2_OUT_CHANNELS * 2**i
        common = {
            "in_channels": channels, "out_channels": width, "norm": options.NORM,
            "stride_per_block": [1 if i == 0 or dilation > 1 else 2] + [1] * (blocks - 1),
            "dilation_per_block": stage_dilations(dilation, blocks, options.CONTRACT_DILATION),
        }  # fmt: skip
        if basic:
            stages.append(ResNet.make_stage(DilatedBasicBlock, blocks, **common))
        else:
            stages.append(
                ResNet.make_stage(
                    BottleneckBlock, blocks, **common, num_groups=options.NUM_GROUPS,
                    bottleneck_channels=options.NUM_GROUPS * options.WIDTH_PER_GROUP * 2**i,
                    stride_in_1x1=options.STRIDE_IN_1X1,
                )
            )
        channels = width
    stem = stems[options.STEM_TYPE](input_shape.channels, options.STEM_OUT_CHANNELS, norm=options.NORM)
    return DilatedResNet(stem, stages, out_features=options.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)


class DilatedMobileNetV2(MobileNetV2):
    """MobileNetV2 without its last 1x1 convolution at stride 8: "res3", "res4" and "res5" with 32, 96, 320 channels.

    Args: those of :class:`MobileNetV2`.
    """

    def __init__(self, width: float, out_features: Sequence[str], norm: str = "BN", freeze_at: int = 0) -> None:
        super().__init__(width, list(out_features), norm, freeze_at)
        self.features = self.features[:MOBILENETV2_BLOCKS]
        for index, dilation in MOBILENETV2_DILATIONS.items():
            if index < len(self.features):
                depthwise = self.features[index].conv[1][0]
                depthwise.stride, depthwise.dilation, depthwise.padding = (1, 1), (dilation,) * 2, (dilation,) * 2
        self._out_feature_strides = {name: min(s, 8) for name, s in self._out_feature_strides.items()}
        if "res5" in self._out_feature_channels:
            self._out_feature_channels["res5"] = self.features[-1].out_channels

    @property
    def size_divisibility(self) -> int:
        """Stride of the coarsest map."""
        return max(self._out_feature_strides.values())


@BACKBONE_REGISTRY.register()
def build_dilated_mobilenetv2_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> DilatedMobileNetV2:
    """MobileNetV2 of MODEL.MOBILENETV2 at stride 8, frozen as MODEL.BACKBONE.FREEZE_AT says."""
    return DilatedMobileNetV2.of_config(cfg, input_shape)
