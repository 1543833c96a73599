"""From pooled features to the vector of each box."""

import math

from fvcore.nn.weight_init import c2_msra_fill, c2_xavier_fill
from torch import nn

from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.utils.registry import Registry

__all__ = ["ROI_BOX_HEAD_REGISTRY", "FastRCNNConvFCHead", "build_box_head"]

ROI_BOX_HEAD_REGISTRY = Registry("ROI_BOX_HEAD")
ROI_BOX_HEAD_REGISTRY.__doc__ = """
Box heads by name; each is called as ``constructor(cfg, input_shape)`` with the :class:`ShapeSpec` of the pooled
features, and has ``output_shape``.
"""


def build_box_head(cfg, input_shape: ShapeSpec) -> nn.Module:
    """Build the box head that ``cfg.MODEL.ROI_BOX_HEAD.NAME`` names."""
    return ROI_BOX_HEAD_REGISTRY.get(cfg.MODEL.ROI_BOX_HEAD.NAME)(cfg, input_shape)


@ROI_BOX_HEAD_REGISTRY.register()
class FastRCNNConvFCHead(nn.Sequential):
    """3x3 convolutions ``conv1``, ``conv2``, ..., then linear layers ``fc1``, ``fc2``, ..., each with ReLU.

    (M, C, H, W) -> (M, fc_dims[-1]), or (M, conv_dims[-1], H, W) without linear layers.

    Args:
        input_shape: channels, height and width of the pooled features.
        conv_dims, fc_dims: channels of the layers; one of the two may be empty.
        conv_norm: normalisation behind the convolutions, "" for none.
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, conv_dims: list[int], fc_dims: list[int], conv_norm=""):
        super().__init__()
        if not conv_dims and not fc_dims:
            raise ValueError("FastRCNNConvFCHead needs at least one convolution or linear layer")
        channels, window = input_shape.channels, (input_shape.height, input_shape.width)
        convs, linears = [], []
        for width in conv_dims:
            convs.append(Conv2d(
                channels, width, 3, padding=1, bias=not conv_norm, norm=get_norm(conv_norm, width),
                activation=nn.ReLU(),
            ))
            self.add_module(f"conv{len(convs)}", convs[-1])
            channels = width
        self._output_shape = ShapeSpec(channels=channels, height=window[0], width=window[1])
        if fc_dims:
            self.add_module("flatten", nn.Flatten())
            features = channels * math.prod(window)
            for width in fc_dims:
                linears.append(nn.Linear(features, width))
                self.add_module(f"fc{len(linears)}", linears[-1])
                self.add_module(f"fc_relu{len(linears)}", nn.ReLU())
                features = width
            self._output_shape = ShapeSpec(channels=features)
        for layers, fill in ((convs, c2_msra_fill), (linears, c2_xavier_fill)):
            for layer in layers:
                fill(layer)

    @classmethod
    def from_config(cls, cfg, input_shape: ShapeSpec) -> dict:
        node = cfg.MODEL.ROI_BOX_HEAD
        return {
            "input_shape": input_shape, "conv_dims": [node.CONV_DIM] * node.NUM_CONV,
            "fc_dims": [node.FC_DIM] * node.NUM_FC, "conv_norm": node.NORM,
        }

    @property
    def output_shape(self) -> ShapeSpec:
        """Shape of the output without the axis of the boxes."""
        return self._output_shape
