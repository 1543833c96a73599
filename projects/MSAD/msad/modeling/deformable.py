"""Deformable convolutions (Dai et al., ICCV 2017; modulated: Zhu et al., CVPR 2019), in float32 on any device.

detectron2's own layers are compiled with it, do not take half precision and, where modulated, no CPU. Everything here
goes through torchvision's operator, with either engine.
"""

from __future__ import annotations

import torch
from detectron2.modeling.backbone.resnet import DeformBottleneckBlock
from torch import nn
from torchvision.ops import deform_conv2d


def deform_conv(
    x: torch.Tensor, offset: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, stride=1, padding=1,
    dilation=1, mask: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Convolve ``x`` with sampling points that are moved by ``offset``; bilinear, zeros outside of the map.

    torchvision's operator has no half precision on a CPU, and positions in half precision are off by whole locations on
    large maps; so it always runs in float32.

    Args:
        x: (N, C, H, W).
        offset: (N, 2 k k G, H', W') in locations of ``x``: for each of G groups of channels (dy, dx) of each of the
            k x k taps, row by row.
        weight: (C', C / groups, k, k).
        bias: (C',).
        stride, padding, dilation: a number or two.
        mask: (N, k k G, H', W'), factors of the samples.

    Returns:
        (N, C', H', W') in the type of ``x``.

    Raises:
        FloatingPointError: NaN among the offsets of a CPU tensor, which would end the process inside the operator.
            (A GPU samples zeros there, and the check would make it wait.)
        ValueError: in an export to ONNX, whose opset 17 has no such operator.
    """
    if torch.onnx.is_in_onnx_export():  # here: the exporter would print its whole graph
        raise ValueError("deformable convolutions cannot be exported to ONNX; TorchScript takes them")
    exported = torch.jit.is_tracing() or torch.compiler.is_compiling()
    if offset.device.type == "cpu" and not exported and offset.isnan().any():
        raise FloatingPointError(
            "the offsets of a deformable convolution are NaN: training diverged, or its weights were not loaded"
        )
    with torch.autocast(x.device.type, enabled=False):
        half = (torch.float16, torch.bfloat16)
        operands = (x, offset, weight, bias, mask)
        x_, offset, weight, bias, mask = (y.float() if y is not None and y.dtype in half else y for y in operands)
        return deform_conv2d(x_, offset, weight, bias, stride, padding, dilation, mask).to(x.dtype)


class DeformableConv(nn.Module):
    """A DeformConv or ModulatedDeformConv of detectron2 on :func:`deform_conv`, with its parameters and their names.

    Args:
        layer: of detectron2, with or without normalisation and activation.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, getattr(layer, "bias", None)
        self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation
        self.norm, self.activation = layer.norm, layer.activation

    def forward(self, x: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Arguments and result as of :func:`deform_conv`."""
        x = deform_conv(x, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask)
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)


def use_torchvision(network: nn.Module) -> nn.Module:
    """Replace the deformable layers in detectron2's ResNet blocks, in place, and return the network."""
    for block in network.modules():
        if isinstance(block, DeformBottleneckBlock):
            block.conv2 = DeformableConv(block.conv2)
    return network


class ModulatedConv(nn.Module):
    """A 3x3 convolution that predicts offsets and factors of its samples from its own input (DCNv2).

    Starts as half of an ordinary convolution: no offsets, factors of 1/2.

    Args:
        in_channels, out_channels: of the maps, whose size stays.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")
        self.conv_offset = nn.Conv2d(in_channels, 27, 3, padding=1)
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, h, w) -> (N, C', h, w)."""
        predicted = self.conv_offset(x)
        return deform_conv(x, predicted[:, :18], self.weight, self.bias, mask=predicted[:, 18:].sigmoid())
