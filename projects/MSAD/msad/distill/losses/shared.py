"""What several losses need: float32, attention maps, ground truth boxes on a grid. Pure functions."""

from __future__ import annotations

import torch


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """``x`` in float32 at least, so that sums over maps are safe under mixed precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def attention(x: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Where and in which channels a map is active, as FKD (ICLR 2021) and FGD (CVPR 2022) measure it.

    Args:
        x: (N, C, h, w).

    Returns:
        spatial: (N, h, w), h w softmax over the locations of mean_c |x| / T; sums to h w in each image.
        channel: (N, C), C softmax over the channels of mean_hw |x| / T; sums to C.
    """
    n, c, h, w = x.shape
    energy = at_least_float32(x).abs()
    spatial = h * w * (energy.mean(dim=1).flatten(1) / temperature).softmax(dim=1)
    channel = c * (energy.mean(dim=(2, 3)) / temperature).softmax(dim=1)
    return spatial.view(n, h, w), channel


def rasterize_max(
    rows: torch.Tensor, columns: torch.Tensor, image: torch.Tensor, values: torch.Tensor, num_images: int
) -> torch.Tensor:
    """Draw K rectangles; where several overlap, the largest value counts, and 0 where there is none.

    Needs memory for K h w values.

    Args:
        rows: (K, h), whether a rectangle covers a row.
        columns: (K, w), the same of columns.
        image: (K,), index of the image on which it is drawn.
        values: (K,), positive.

    Returns:
        (num_images, h, w) of the dtype of ``values``.
    """
    covers = rows[:, :, None] & columns[:, None, :]
    canvas = values.new_zeros(num_images, *covers.shape[1:])
    image = image[:, None, None].expand(covers.shape)
    return canvas.scatter_reduce(0, image, covers * values[:, None, None], "amax")


def locations_in_boxes(
    boxes: torch.Tensor, image: torch.Tensor, stride: int, size: tuple[int, int], num_images: int
) -> torch.Tensor:
    """Locations whose centre lies inside a box of their image.

    Args:
        boxes: (K, 4) x0 y0 x1 y1 in H pixels.
        image: (K,) index of the box's image.
        stride: of the grid in H pixels; the centre of location i is at (i + 0.5) stride.
        size: (h, w) of the grid.

    Returns:
        (num_images, h, w) float, 1 inside and 0 elsewhere.
    """
    boxes = at_least_float32(boxes)

    def covered(low: torch.Tensor, high: torch.Tensor, length: int) -> torch.Tensor:
        centre = (torch.arange(length, device=boxes.device) + 0.5) * stride
        return (centre > low[:, None]) & (centre < high[:, None])

    x0, y0, x1, y1 = boxes.unbind(1)
    return rasterize_max(covered(y0, y1, size[0]), covered(x0, x1, size[1]), image, torch.ones_like(x0), num_images)


