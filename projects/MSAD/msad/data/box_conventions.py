"""Which convention the boxes of a data set follow, if not that of their file's format."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_OVERHANG = 1.0
# How numbers a, b, c, d of a box are to be read -> corners x0, y0, x1, y1.
_CONVENTIONS: dict[str, Callable[..., list[np.ndarray]]] = {
    "corners x0, y0, x1, y1": lambda a, b, c, d: [a, b, c, d],
    "centre and size": lambda a, b, c, d: [a - c / 2, b - d / 2, a + c / 2, b + d / 2],
    "y, x, height, width": lambda a, b, c, d: [b, a, b + d, a + c],
    "corners y0, x0, y1, x1": lambda a, b, c, d: [b, a, d, c],
}


def likely_convention(boxes: np.ndarray, sizes: np.ndarray) -> tuple[str, float] | None:
    """What ``boxes`` are if many of them leave their images as [x, y, width, height] and fit otherwise.

    Args:
        boxes: (n, 4) as written, read as x, y, width, height in pixels.
        sizes: (n, 2) width and height of each one's image.

    Returns:
        the convention and the share of boxes that leave their image without it; None if nothing else fits better.
        "fractions of the image" are boxes without a number above 1.
    """
    if not len(boxes):
        return None
    if (np.abs(boxes) <= 1).all(axis=1).mean() > 0.9 and (sizes > 2).any():
        return "fractions of the image", 1.0
    a, b, c, d = boxes.T
    leaving = _outside([a, b, a + c, b + d], sizes)
    if leaving < 0.05:
        return None
    for name, corners in _CONVENTIONS.items():
        if _outside(corners(a, b, c, d), sizes) <= 0.01:
            return name, leaving
    return None


def _outside(corners: list[np.ndarray], sizes: np.ndarray) -> float:
    """Share of boxes that are no boxes or are more than a pixel over the border."""
    x0, y0, x1, y1 = corners
    inside = (x0 >= -_OVERHANG) & (y0 >= -_OVERHANG) & (x1 > x0) & (y1 > y0)
    inside &= (x1 <= sizes[:, 0] + _OVERHANG) & (y1 <= sizes[:, 1] + _OVERHANG)
    return 1 - float(inside.mean())


def mask_extents(polygons: list[list[float]]) -> list[float]:
    """Corners x0, y0, x1, y1 around polygons [x0, y0, x1, y1, ...]."""
    xs, ys = ([v for polygon in polygons for v in polygon[start::2]] for start in (0, 1))
    return [min(xs), min(ys), max(xs), max(ys)]


def overlap(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """IoU of boxes (n, 4) as corners, pair by pair."""
    corner = np.maximum(first[:, :2], second[:, :2])
    sides = np.clip(np.minimum(first[:, 2:], second[:, 2:]) - corner, 0, None)
    areas = [np.clip(b[:, 2:] - b[:, :2], 0, None).prod(axis=1) for b in (first, second)]
    common = sides.prod(axis=1)
    return common / np.maximum(areas[0] + areas[1] - common, 1e-9)
