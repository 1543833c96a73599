"""Keypoints and their heatmap encoding."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Keypoints:
    """K keypoints for each of N instances.

    Attributes:
        tensor: float32, shape (N, K, 3): x and y in pixels, and visibility as in COCO
            (0 not labeled, 1 labeled but hidden, 2 visible).
    """

    def __init__(self, keypoints: Tensor | np.ndarray | list[list[float]]):
        tensor = torch.as_tensor(keypoints, dtype=torch.float32)
        if tensor.dim() != 3 or tensor.shape[2] != 3:
            raise ValueError(f"Keypoints needs shape (N, K, 3), got {tuple(tensor.shape)}")
        self.tensor = tensor

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def to(self, *args: Any, **kwargs: Any) -> "Keypoints":
        """The same keypoints after `Tensor.to`."""
        return type(self)(self.tensor.to(*args, **kwargs))

    def to_heatmap(self, boxes: Tensor, heatmap_size: int) -> tuple[Tensor, Tensor]:
        """Which cell of a `heatmap_size` x `heatmap_size` grid over its box each keypoint falls into.

        Args:
            boxes: (N, 4) boxes in the pixels of the keypoints.

        Returns:
            Flat cell indices (N, K), row by row, int64, 0 where not valid; and their validity (N, K),
            int64, 1 for labeled keypoints inside the box.
        """
        if len(boxes) != len(self):
            raise ValueError(f"Got {len(boxes)} boxes for the keypoints of {len(self)} instances")
        points, visibility = self.tensor[..., :2], self.tensor[..., 2]
        near, far = boxes[:, None, :2], boxes[:, None, 2:]
        cells = ((points - near) * (heatmap_size / (far - near))).floor().long()
        # The right and bottom border belong to the last cell.
        cells = torch.where(points == far, heatmap_size - 1, cells)
        inside = ((cells >= 0) & (cells < heatmap_size)).all(dim=2)
        valid = (inside & (visibility > 0)).long()
        return (cells[..., 1] * heatmap_size + cells[..., 0]) * valid, valid

    @staticmethod
    def cat(keypoints_list: list["Keypoints"]) -> "Keypoints":
        """One object with the instances of all."""
        if len(keypoints_list) == 0 or not all(isinstance(k, Keypoints) for k in keypoints_list):
            raise TypeError("Keypoints.cat takes at least one Keypoints, and nothing else")
        return Keypoints(torch.cat([k.tensor for k in keypoints_list]))

    def __getitem__(self, item: int | slice | Tensor) -> "Keypoints":
        """The keypoints of the selected instances; always of shape (n, K, 3)."""
        if isinstance(item, int):
            return Keypoints(self.tensor[item].unsqueeze(0))
        return Keypoints(self.tensor[item])

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def __repr__(self) -> str:
        return f"Keypoints(num_instances={len(self)})"


@torch.no_grad()
def heatmaps_to_keypoints(maps: Tensor, rois: Tensor) -> Tensor:
    """Decode keypoints as the peaks of heatmaps that are stretched over their boxes.

    Args:
        maps: (N, K, S, S) heatmap logits.
        rois: (N, 4) boxes in image pixels.

    Returns:
        (N, K, 4): x and y in image pixels, the logit at the peak, and a probability: exp(peak) over
        the sum of exp(logit) of the S x S map, so that it is comparable between boxes of any size.
    """
    count, num_keypoints = maps.shape[:2]
    out = maps.new_zeros(count, num_keypoints, 4)
    if count == 0:
        return out
    origin = rois[:, :2]
    extent = (rois[:, 2:] - origin).clamp(min=1)
    grid = extent.ceil()
    ratio = extent / grid
    for i, (width, height) in enumerate(grid.long().tolist()):
        stretched = F.interpolate(maps[i : i + 1], size=(height, width), mode="bicubic", align_corners=False)
        peak, where = stretched[0].flatten(1).max(dim=1)
        cell = torch.stack([where % width, where // width], dim=1)
        out[i, :, :2] = (cell + 0.5) * ratio[i] + origin[i]
        out[i, :, 2] = peak
    out[..., 3] = 1 / (maps.flatten(2) - out[..., 2:3]).exp().sum(dim=2)
    return out
