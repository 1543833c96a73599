"""From masks predicted inside boxes to masks of the whole image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GPU_MEM_LIMIT = 1024**3
"""Bytes of scratch memory that pasting may take on an accelerator."""


@torch.no_grad()
def paste_masks_in_image(
    masks: Tensor, boxes: Tensor, image_shape: tuple[int, int], threshold: float = 0.5
) -> Tensor:
    """Resample masks bilinearly into their boxes on an otherwise empty image.

    Args:
        masks: (N, M, M) probabilities; each covers its box.
        boxes: (N, 4) corners in image pixels, or an object that holds them as `.tensor`.
        image_shape: (height, width) of the image in pixels.
        threshold: foreground is at or above it. Negative: no cut, the result is the probability in
            steps of 1/255.

    Returns:
        (N, height, width), bool, or uint8 for a negative threshold; on the device of `masks`.
    """
    if masks.dim() != 3 or masks.shape[1] != masks.shape[2]:
        raise ValueError(f"Masks to paste must be square, of shape (N, M, M); got {tuple(masks.shape)}")
    boxes = getattr(boxes, "tensor", boxes)
    if len(boxes) != len(masks):
        raise ValueError(f"Got {len(boxes)} boxes for {len(masks)} masks")
    height, width = (int(side) for side in image_shape)
    canvas = torch.zeros(
        len(masks), height, width, dtype=torch.uint8 if threshold < 0 else torch.bool, device=masks.device
    )
    if len(masks) == 0:
        return canvas
    masks = masks[:, None].float()
    if masks.device.type == "cpu":
        # Work grows with the area of the box instead of that of the image.
        for i, (x0, y0, x1, y1) in enumerate(_windows(boxes, height, width)):
            soft = _resample(masks[i : i + 1], boxes[i : i + 1], y0, y1, x0, x1)
            canvas[i, y0:y1, x0:x1] = _quantize(soft[0], threshold)
    else:
        # One launch for many masks beats small windows; the chunk bounds the scratch memory.
        per_mask = 4 * 4 * height * width  # float32 grid (x, y), samples and their cut
        chunk = max(1, GPU_MEM_LIMIT // max(per_mask, 1))
        for part, m, b in zip(canvas.split(chunk), masks.split(chunk), boxes.split(chunk)):
            part.copy_(_quantize(_resample(m, b, 0, height, 0, width), threshold))
    return canvas


def _windows(boxes: Tensor, height: int, width: int) -> list:
    """Integer windows (x0, y0, x1, y1) in the image that hold the boxes and a pixel around them."""
    limit = boxes.new_tensor([width, height])
    low = (boxes[:, :2].floor() - 1).clamp(min=0).minimum(limit)
    high = (boxes[:, 2:].ceil() + 1).clamp(min=0).minimum(limit).maximum(low)
    return torch.cat([low, high], dim=1).long().tolist()


def _resample(masks: Tensor, boxes: Tensor, y0: int, y1: int, x0: int, x1: int) -> Tensor:
    """Masks (N, 1, M, M) over their boxes, seen at the pixel centers of a window: (N, y1 - y0, x1 - x0)."""
    left, top, right, bottom = boxes.float()[:, :, None].unbind(dim=1)
    ys = (torch.arange(y0, y1, device=masks.device) + 0.5 - top) / (bottom - top) * 2 - 1
    xs = (torch.arange(x0, x1, device=masks.device) + 0.5 - left) / (right - left) * 2 - 1
    shape = (len(masks), y1 - y0, x1 - x0)
    grid = torch.stack([xs[:, None, :].expand(shape), ys[:, :, None].expand(shape)], dim=3)
    return F.grid_sample(masks, grid, align_corners=False)[:, 0]


def _quantize(soft: Tensor, threshold: float) -> Tensor:
    return (soft * 255).to(torch.uint8) if threshold < 0 else soft >= threshold
