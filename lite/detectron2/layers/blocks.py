"""Blocks of convolutional networks."""

from __future__ import annotations

from collections.abc import Callable

import fvcore.nn.weight_init as weight_init
from torch import Tensor, nn

from .batch_norm import FrozenBatchNorm2d, get_norm
from .wrappers import Conv2d

Norm = str | Callable[[int], nn.Module] | None


class CNNBlockBase(nn.Module):
    """A block from (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride

    def freeze(self) -> "CNNBlockBase":
        """Stop training: no parameter takes gradients, and every BatchNorm becomes a frozen one.

        Returns:
            the block itself.
        """
        self.requires_grad_(False)
        FrozenBatchNorm2d.convert_frozen_batchnorm(self)
        return self


class DepthwiseSeparableConv2d(nn.Module):
    """A convolution per channel, then a 1x1 convolution across channels (Xception)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        padding: int = 1,
        dilation: int = 1,
        *,
        norm1: Norm = None,
        activation1: Callable[[Tensor], Tensor] | None = None,
        norm2: Norm = None,
        activation2: Callable[[Tensor], Tensor] | None = None,
    ):
        """
        Args:
            norm1, activation1: after the depthwise convolution.
            norm2, activation2: after the pointwise convolution.
        """
        super().__init__()
        def conv(channels: int, size: int, norm: Norm, activation, **window) -> Conv2d:
            normed = {"bias": not norm, "norm": get_norm(norm, channels), "activation": activation}
            return Conv2d(in_channels, channels, size, **normed, **window)

        window = {"padding": padding, "dilation": dilation, "groups": in_channels}
        self.depthwise = conv(in_channels, kernel_size, norm1, activation1, **window)
        self.pointwise = conv(out_channels, 1, norm2, activation2)
        for layer in (self.depthwise, self.pointwise):
            weight_init.c2_msra_fill(layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))
