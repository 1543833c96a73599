"""ResNets beyond detectron2's: one with the stride-2 map C1, and a tiny one for CPUs and small data."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_resnet_backbone
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet

from ...config_values import copy_with


class ResNetC1(Backbone):
    """A detectron2 ResNet that can also return "c1", the stem's output before max-pooling (stride 2).

    P1, the finest level of a quarter-resolution branch, is made from it (MSAD supplementary, Sec. E). Weights keep
    the names that they have in detectron2's ResNet.
    """

    def __init__(self, resnet: ResNet, out_features: list[str]) -> None:
        super().__init__()
        self.stem = resnet.stem
        self.stage_names = list(resnet.stage_names)
        for name in self.stage_names:
            self.add_module(name, getattr(resnet, name))
        shapes = dict(resnet.output_shape(), c1=ShapeSpec(channels=resnet.stem.conv1.out_channels, stride=2))
        unknown = [name for name in out_features if name not in shapes]
        if unknown:
            raise ValueError(f"MODEL.RESNETS.OUT_FEATURES: unknown {unknown}; this ResNet has {sorted(shapes)}")
        self._out_features = list(out_features)
        self._out_feature_channels = {name: shapes[name].channels for name in out_features}
        self._out_feature_strides = {name: shapes[name].stride for name in out_features}

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """(N, 3, H, W) -> maps by name; "c1" is (N, C, H/2, W/2)."""
        outputs = {"c1": F.relu(self.stem.conv1(x))}
        x = F.max_pool2d(outputs["c1"], kernel_size=3, stride=2, padding=1)
        for name in self.stage_names:
            outputs[name] = x = getattr(self, name)(x)
        return {name: outputs[name] for name in self._out_features}


@BACKBONE_REGISTRY.register()
def build_resnet_c1_backbone(cfg, input_shape: ShapeSpec) -> ResNetC1:
    """detectron2's ResNet of MODEL.RESNETS, whose OUT_FEATURES may also name "c1"."""
    wanted = list(cfg.MODEL.RESNETS.OUT_FEATURES)
    inner = copy_with(cfg, {"MODEL.RESNETS.OUT_FEATURES": [name for name in wanted if name != "c1"]})
    return ResNetC1(build_resnet_backbone(inner, input_shape), wanted)


@BACKBONE_REGISTRY.register()
def build_tiny_resnet_backbone(cfg, input_shape: ShapeSpec) -> Backbone:
    """A ResNet of basic blocks with MODEL.RESNETS.BLOCKS per stage and freely chosen widths.

    Stage s of res2..res5 has ``RES2_OUT_CHANNELS * 2**(s-2)`` channels. Trained from scratch: nothing is frozen.
    OUT_FEATURES may name "c1".
    """
    options = cfg.MODEL.RESNETS
    stem = BasicStem(input_shape.channels, options.STEM_OUT_CHANNELS, norm=options.NORM)
    stages, channels = [], options.STEM_OUT_CHANNELS
    for i, blocks in enumerate(options.BLOCKS):
        width = options.RES2_OUT_CHANNELS * 2**i
        strides = [1 if i == 0 else 2] + [1] * (blocks - 1)
        shape = {"in_channels": channels, "out_channels": width, "norm": options.NORM}
        stages.append(ResNet.make_stage(BasicBlock, blocks, stride_per_block=strides, **shape))
        channels = width
    wanted = list(options.OUT_FEATURES)
    resnet = ResNet(stem, stages, out_features=[name for name in wanted if name != "c1"])
    return ResNetC1(resnet, wanted) if "c1" in wanted else resnet
