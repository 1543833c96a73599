"""Thin extensions of torch's own layers and functions."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


class Conv2d(torch.nn.Conv2d):
    """`torch.nn.Conv2d` followed by an optional normalization and activation."""

    def __init__(self, *args, norm: torch.nn.Module | None = None, activation: Callable | None = None, **kwargs):
        """
        Args:
            norm: applied to the output.
            activation: applied after `norm`.
            args, kwargs: those of `torch.nn.Conv2d`. As in detectron2, `padding_mode` has no effect:
                padding is with zeros.
        """
        super().__init__(*args, **kwargs)
        self.norm, self.activation = norm, activation

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


def cat(tensors: list[Tensor], dim: int = 0) -> Tensor:
    """`torch.cat` that returns a single tensor as it is, without a copy."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def nonzero_tuple(x: Tensor) -> tuple[Tensor, ...]:
    """Indices of the nonzero elements, one tensor per axis (a scalar counts as one axis)."""
    return torch.atleast_1d(x).nonzero(as_tuple=True)


def empty_input_loss_func_wrapper(loss_func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make a loss of (input, target) return 0, still connected to the graph, instead of NaN when it is to
    average over no target at all."""

    def wrapped(input: Tensor, target: Tensor, *, reduction: str = "mean", **kwargs) -> Tensor:
        if target.numel() == 0 and reduction == "mean":
            return input.sum() * 0.0
        return loss_func(input, target, reduction=reduction, **kwargs)

    wrapped.__name__ = getattr(loss_func, "__name__", "loss")
    wrapped.__doc__ = f"As `{wrapped.__name__}`, but 0 instead of NaN for the mean of no targets."
    return wrapped


cross_entropy = empty_input_loss_func_wrapper(F.cross_entropy)


def shapes_to_tensor(x: list[int], device: torch.device | None = None) -> Tensor:
    """A list of sizes as a 1-D integer tensor."""
    return torch.as_tensor(x, device=device)


def move_device_like(src: Tensor, dst: Tensor) -> Tensor:
    """`src` on the device of `dst`."""
    return src.to(dst.device)
