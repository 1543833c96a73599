"""One instance mask, whatever form it came in."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pycocotools.mask as coco_mask
import torch

from detectron2.structures import polygons_to_bitmask


class GenericMask:
    """The mask of one instance in any of the forms that data sets and models use.

    Args:
        mask_or_polygons: COCO run lengths (a dict), polygons [x0, y0, x1, y1, ...], or a bitmap (H, W).
        height, width: size of the image in pixels.
    """

    def __init__(self, mask_or_polygons: Any, height: int, width: int):
        self.height, self.width = height, width
        self._mask: np.ndarray | None = None
        self._polygons: list[np.ndarray] | None = None
        self.is_vector = isinstance(mask_or_polygons, (list, tuple))
        """Whether polygons were given."""
        if self.is_vector:
            self._polygons = [np.asarray(p, dtype=np.float64).ravel() for p in mask_or_polygons]
            return
        if isinstance(mask_or_polygons, dict):
            runs = mask_or_polygons
            if isinstance(runs["counts"], list):
                runs = coco_mask.frPyObjects(runs, height, width)
            mask = coco_mask.decode(runs)
        elif isinstance(mask_or_polygons, (np.ndarray, torch.Tensor)):
            mask = np.asarray(mask_or_polygons)
        else:
            raise ValueError(f"A mask is a dict, a list of polygons or an array, not {mask_or_polygons!r}")
        if mask.shape != (height, width):
            raise ValueError(f"A mask of shape {mask.shape} does not fit an image of {(height, width)}")
        self._mask = mask.astype(np.uint8)

    @property
    def mask(self) -> np.ndarray:
        """uint8 (H, W), 1 for foreground."""
        if self._mask is None:
            self._mask = polygons_to_bitmask(self._polygons, self.height, self.width).astype(np.uint8)
        return self._mask

    @property
    def polygons(self) -> list[np.ndarray]:
        """The given polygons, or the contours of the bitmap through the centers of its border pixels."""
        if self._polygons is None:
            contours, _ = cv2.findContours(self._mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
            self._polygons = [c.ravel() + 0.5 for c in contours if len(c) >= 3]
        return self._polygons

    def area(self) -> int:
        """Foreground pixels."""
        return int(self.mask.sum())

    def bbox(self) -> np.ndarray:
        """Tight box (x0, y0, x1, y1) around the foreground; zeros for an empty mask."""
        x, y, w, h = cv2.boundingRect(self.mask)
        return np.asarray([x, y, x + w, y + h], dtype=np.float64)
