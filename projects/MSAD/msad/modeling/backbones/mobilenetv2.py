"""MobileNetV2 (Sandler et al., CVPR 2018) at any width, with the feature maps that a pyramid is made from."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torchvision.models import mobilenet_v2

# Name of each map and the number of blocks that make it; the next block halves the map.
STAGE_ENDS = {"c1": 2, "res2": 4, "res3": 7, "res4": 14, "res5": 19}


class MobileNetV2(Backbone):
    """torchvision's MobileNetV2 without classifier, under torchvision's parameter names.

    "c1" and "res2" ... "res5" have strides 2 ... 32. "res5" is the last 1x1 convolution with its 1280 channels, which
    narrow networks keep; all other channels scale with ``width`` and are rounded to multiples of 8.

    Args:
        width: factor on the channels (Sec. 6.1). Slimmable weights exist for 0.35, 0.5, 0.75 and 1.0.
        out_features: names of the maps that are returned. Blocks behind the last of them are left out.
        norm: detectron2's name of a normalisation.
        freeze_at: so many of the stages c1, res2, ... get neither gradients nor new statistics.
    """

    def __init__(self, width: float, out_features: list[str], norm: str = "BN", freeze_at: int = 0) -> None:
        super().__init__()
        unknown = [name for name in out_features if name not in STAGE_ENDS]
        if unknown or not out_features:
            raise ValueError(
                f"MODEL.MOBILENETV2.OUT_FEATURES {list(out_features)} must name some of {list(STAGE_ENDS)}"
            )
        if width <= 0:
            raise ValueError(f"MODEL.MOBILENETV2.WIDTH must be positive, not {width}")
        blocks = mobilenet_v2(weights=None, width_mult=width, norm_layer=lambda channels: get_norm(norm, channels))
        self.features = blocks.features[: max(STAGE_ENDS[name] for name in out_features)]
        self._out_features = sorted(out_features, key=STAGE_ENDS.get)
        self._out_feature_channels = {name: self.features[STAGE_ENDS[name] - 1].out_channels for name in out_features}
        self._out_feature_strides = {name: 2 ** (list(STAGE_ENDS).index(name) + 1) for name in out_features}
        frozen = list(STAGE_ENDS.values())[: max(freeze_at, 0)][-1:]
        for i in range(min(*frozen, len(self.features)) if frozen else 0):
            self.features[i].requires_grad_(False)
            self.features[i] = FrozenBatchNorm2d.convert_frozen_batchnorm(self.features[i])

    @classmethod
    def of_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> MobileNetV2:
        """The network that MODEL.MOBILENETV2 and MODEL.BACKBONE.FREEZE_AT describe.

        Raises:
            ValueError: images of another number of channels than 3.
        """
        if input_shape.channels != 3:
            raise ValueError(f"MobileNetV2 takes images of 3 channels, not {input_shape.channels}")
        options = cfg.MODEL.MOBILENETV2
        return cls(options.WIDTH, options.OUT_FEATURES, options.NORM, cfg.MODEL.BACKBONE.FREEZE_AT)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """(N, 3, H, W), sides multiples of 32 -> maps by name, finest first."""
        outputs, start = {}, 0
        for name in self._out_features:
            for block in self.features[start : STAGE_ENDS[name]]:
                x = block(x)
            outputs[name], start = x, STAGE_ENDS[name]
        return outputs


@BACKBONE_REGISTRY.register()
def build_mobilenetv2_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> MobileNetV2:
    """MobileNetV2 of MODEL.MOBILENETV2, frozen as MODEL.BACKBONE.FREEZE_AT says."""
    return MobileNetV2.of_config(cfg, input_shape)
