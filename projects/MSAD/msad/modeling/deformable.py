"""Deformable convolution (Dai et al., ICCV 2017) in float32, also under mixed precision."""

from __future__ import annotations

import torch
from torchvision.ops import deform_conv2d


def deform_conv(
    x: torch.Tensor, offset: torch.Tensor, weight: torch.Tensor, stride: int = 1, padding: int = 1, dilation: int = 1
) -> torch.Tensor:
    """Convolve ``x`` with sampling points that are moved by ``offset``; bilinear, zeros outside of the map.

    torchvision's operator has no half precision on a CPU, and positions in half precision are off by whole cells on
    large maps; so it always runs in float32.

    Args:
        x: (N, C, H, W).
        offset: (N, 2 k k G, H', W') in cells of ``x``: for each of G groups of channels (dy, dx) of each of the k x k
            taps, row by row.
        weight: (C', C / groups, k, k).

    Returns:
        (N, C', H', W') in the type of ``x``.

    Raises:
        FloatingPointError: NaN among the offsets of a CPU tensor, which would end the process inside the operator.
            (A GPU samples zeros there, and the check would make it wait.)
    """
    exported = torch.jit.is_tracing() or torch.compiler.is_compiling()
    if offset.device.type == "cpu" and not exported and offset.isnan().any():
        raise FloatingPointError(
            "the offsets of a deformable convolution are NaN: training diverged, or its weights were not loaded"
        )
    with torch.autocast(x.device.type, enabled=False):
        operands = [y.float() if y.dtype in (torch.float16, torch.bfloat16) else y for y in (x, offset, weight)]
        return deform_conv2d(*operands, None, stride, padding, dilation).to(x.dtype)
