"""A padded batch of images that remembers the size of each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ImageList:
    """Images of different sizes in one tensor, padded at the right and the bottom.

    Attributes:
        tensor: (N, H, W) or (N, C, H, W).
        image_sizes: (height, width) of each image without padding.
    """

    def __init__(self, tensor: Tensor, image_sizes: list[tuple[int, int]]):
        self.tensor = tensor
        self.image_sizes = image_sizes

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def to(self, *args: Any, **kwargs: Any) -> "ImageList":
        """The same batch after `Tensor.to`."""
        return ImageList(self.tensor.to(*args, **kwargs), self.image_sizes)

    def __len__(self) -> int:
        return len(self.image_sizes)

    def __getitem__(self, idx: int) -> Tensor:
        """Image `idx` without its padding, shape (H_i, W_i) or (C, H_i, W_i): a view."""
        height, width = self.image_sizes[idx]
        return self.tensor[idx, ..., :height, :width]

    @staticmethod
    def from_tensors(
        tensors: list[Tensor],
        size_divisibility: int = 0,
        pad_value: float = 0.0,
        padding_constraints: dict[str, int] | None = None,
    ) -> "ImageList":
        """Pad images to a common size and stack them.

        Args:
            tensors: images of shape (H_i, W_i) or (C, H_i, W_i), alike in all but height and width.
            size_divisibility: height and width of the batch become multiples of this, if above 1.
            pad_value: fill of the padding.
            padding_constraints: ``{"size_divisibility": int, "square_size": int}``, both optional. The
                former, if positive, replaces the argument of that name; the latter, if positive, is the
                side of a square canvas.
        """
        if not isinstance(tensors, (list, tuple)) or len(tensors) == 0:
            raise TypeError("ImageList.from_tensors takes a non-empty list of image tensors")
        first = tensors[0]
        if any(t.shape[:-2] != first.shape[:-2] or t.dim() < 2 for t in tensors):
            raise ValueError(f"Images of one batch differ in channels: {[tuple(t.shape) for t in tensors]}")

        sizes = [(int(t.shape[-2]), int(t.shape[-1])) for t in tensors]
        height, width = _canvas_size(sizes, size_divisibility, padding_constraints or {})
        shape = (len(tensors), *first.shape[:-2], height, width)
        if all(size == (height, width) for size in sizes):
            return ImageList(torch.stack(list(tensors)), sizes)
        batch = first.new_empty(shape)
        for i, (image, (h, w)) in enumerate(zip(tensors, sizes)):
            canvas = batch[i]  # not iterated: autograd forbids writing to views that come as a group
            # Only the margins are filled: no pixel is written twice.
            canvas[..., :h, :w].copy_(image)
            canvas[..., h:, :].fill_(pad_value)
            canvas[..., :h, w:].fill_(pad_value)
        return ImageList(batch, sizes)


def _canvas_size(
    sizes: list[tuple[int, int]], divisibility: int, constraints: dict[str, int]
) -> tuple[int, int]:
    """(height, width) that holds every image and obeys the constraints."""
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    square = constraints.get("square_size", 0)
    if square > 0:
        if max(height, width) > square:
            raise ValueError(f"An image of the batch ({height}x{width} needed) exceeds square_size={square}")
        height = width = square
    if constraints.get("size_divisibility", 0) > 0:
        divisibility = constraints["size_divisibility"]
    if divisibility > 1:
        height = -(-height // divisibility) * divisibility
        width = -(-width // divisibility) * divisibility
    return height, width
