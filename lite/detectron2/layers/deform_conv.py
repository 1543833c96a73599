"""Deformable convolutions (Dai et al., arXiv:1703.06211; modulated: Zhu et al., arXiv:1811.11168).

detectron2's own operator is compiled with it; here torchvision's does the sampling, on CPU and CUDA.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair
from torchvision.ops import deform_conv2d

__all__ = ["DeformConv", "ModulatedDeformConv"]


class _DeformConvBase(nn.Module):
    """What both kinds share: parameters, their initial values, and the sampling."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int], stride, padding, dilation,
        groups: int, deformable_groups: int, norm: nn.Module | None, activation: Callable | None,
    ):
        super().__init__()
        for name, count in (("groups", groups), ("deformable_groups", deformable_groups)):
            if in_channels % count:
                raise ValueError(f"{type(self).__name__}: {in_channels} input channels do not divide by {name}={count}")
        if out_channels % groups:
            raise ValueError(f"{type(self).__name__}: {out_channels} output channels do not divide by groups={groups}")
        self.kernel_size, self.stride = _pair(kernel_size), _pair(stride)
        self.padding, self.dilation = _pair(padding), _pair(dilation)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.groups, self.deformable_groups = groups, deformable_groups
        self.norm, self.activation = norm, activation
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        self.bias = None
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def _sample(self, x: Tensor, offset: Tensor, mask: Tensor | None) -> Tensor:
        taps = self.deformable_groups * self.kernel_size[0] * self.kernel_size[1]
        for name, given, wanted in (("offset", offset, 2 * taps), ("mask", mask, taps)):
            if given is not None and given.shape[1] != wanted:
                raise ValueError(
                    f"{type(self).__name__}: {name} has {given.shape[1]} channels, but {self.deformable_groups} groups "
                    f"of a {self.kernel_size[0]}x{self.kernel_size[1]} kernel need {wanted}"
                )
        _refuse_nan(offset, type(self).__name__)
        # Sampling positions lose whole pixels in half precision, and the CPU operator knows float32 and float64 only.
        kind = x.dtype
        with torch.autocast(x.device.type, enabled=False):
            x, offset, weight, bias, mask = (
                None if t is None else t.float() if t.dtype in (torch.float16, torch.bfloat16) else t
                for t in (x, offset, self.weight, self.bias, mask)
            )
            x = deform_conv2d(x, offset, weight, bias, self.stride, self.padding, self.dilation, mask).to(kind)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x

    def extra_repr(self) -> str:
        names = ("kernel_size", "stride", "padding", "dilation", "groups", "deformable_groups")
        shown = ", ".join(f"{name}={getattr(self, name)}" for name in names)
        return f"{self.in_channels}, {self.out_channels}, {shown}, bias={self.bias is not None}"


class DeformConv(_DeformConvBase):
    """A convolution that samples each tap of its kernel at a displaced position.

    Args:
        kernel_size, stride, padding, dilation, groups: those of ``torch.nn.Conv2d``.
        deformable_groups: groups of input channels that have offsets of their own.
        bias: must be False; the name is there for symmetry.
        norm: applied to the output.
        activation: applied after ``norm``.
    """

    def __init__(
        self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, deformable_groups=1,
        bias=False, norm=None, activation=None,
    ):
        if bias:
            raise ValueError("DeformConv has no bias; ModulatedDeformConv can have one")
        window = (kernel_size, stride, padding, dilation)
        super().__init__(in_channels, out_channels, *window, groups, deformable_groups, norm, activation)

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        """Convolve.

        Args:
            x: (N, in_channels, H, W).
            offset: (N, 2 * deformable_groups * kh * kw, H', W') in pixels of ``x``: for each group and each tap in
                row-major order dy, then dx.

        Returns:
            (N, out_channels, H', W'), where H' and W' are those of an ordinary convolution.

        Raises:
            ValueError: wrong number of channels of ``offset``, or NaN in it on a CPU (where the operator would crash).
        """
        return self._sample(x, offset, None)


class ModulatedDeformConv(_DeformConvBase):
    """:class:`DeformConv` that also weighs each sample, with an optional bias. Same arguments."""

    def __init__(
        self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, deformable_groups=1,
        bias=True, norm=None, activation=None,
    ):
        window = (kernel_size, stride, padding, dilation)
        super().__init__(in_channels, out_channels, *window, groups, deformable_groups, norm, activation)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """As :meth:`DeformConv.forward`; ``mask``, (N, deformable_groups * kh * kw, H', W'), is the samples' factor."""
        return self._sample(x, offset, mask)


def _refuse_nan(offset: Tensor, layer: str) -> None:
    """ValueError for NaN offsets on a CPU. On a GPU they give NaN, and asking would wait for it."""
    if offset.device.type != "cpu" or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return
    if offset.isnan().any():
        raise ValueError(f"{layer}: the offsets contain NaN; the features that they are predicted from have diverged")
