"""Augmentations by mirroring, resizing and rotating; those in crops.py and colors.py are exported here, too.

All draw from numpy's global generator, so ``np.random.seed`` repeats them.
"""

from __future__ import annotations

import sys

import numpy as np
from fvcore.transforms.transform import HFlipTransform, NoOpTransform, Transform, VFlipTransform
from PIL import Image

from .augmentation import Augmentation, as_augmentation
from .colors import RandomBrightness, RandomContrast, RandomLighting, RandomSaturation
from .crops import FixedSizeCrop, MinIoURandomCrop, RandomCrop, RandomCrop_CategoryAreaConstraint, round_size
from .transform import ExtentTransform, ResizeTransform, RotationTransform

__all__ = [
    "FixedSizeCrop",
    "MinIoURandomCrop",
    "RandomApply",
    "RandomBrightness",
    "RandomContrast",
    "RandomCrop",
    "RandomCrop_CategoryAreaConstraint",
    "RandomExtent",
    "RandomFlip",
    "RandomLighting",
    "RandomResize",
    "RandomRotation",
    "RandomSaturation",
    "Resize",
    "ResizeScale",
    "ResizeShortestEdge",
]


class RandomApply(Augmentation):
    """Apply an augmentation or transform with probability ``prob``, otherwise nothing."""

    def __init__(self, tfm_or_aug: Augmentation | Transform, prob: float = 0.5):
        if not 0.0 <= prob <= 1.0:
            raise AssertionError(f"RandomApply: prob must be in [0, 1], got {prob}.")
        self.aug = as_augmentation(tfm_or_aug)
        self.prob = prob

    def get_transform(self, *args) -> Transform:
        return self.aug.get_transform(*args) if self._rand_range() < self.prob else NoOpTransform()

    def __call__(self, aug_input) -> Transform:
        # Passing the whole input on (not get_transform's arguments) lets lists be wrapped, too.
        return self.aug(aug_input) if self._rand_range() < self.prob else NoOpTransform()


class RandomFlip(Augmentation):
    """Mirror left-right (``horizontal``) or upside down (``vertical``) with probability ``prob``."""

    def __init__(self, prob: float = 0.5, *, horizontal: bool = True, vertical: bool = False):
        if horizontal == vertical:
            raise ValueError(
                f"RandomFlip flips along one axis: exactly one of horizontal={horizontal} and "
                f"vertical={vertical} must be true. Chain two RandomFlips for both."
            )
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        height, width = image.shape[:2]
        if self._rand_range() >= self.prob:
            return NoOpTransform()
        return HFlipTransform(width) if self.horizontal else VFlipTransform(height)


class Resize(Augmentation):
    """Resize to ``shape``: (height, width), or one number for a square."""

    def __init__(self, shape: int | tuple[int, int], interp: int = Image.BILINEAR):
        shape = (shape, shape) if isinstance(shape, int) else tuple(shape)
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        return ResizeTransform(*image.shape[:2], *self.shape, self.interp)


class RandomResize(Augmentation):
    """Resize to one of several (height, width), drawn with equal probability."""

    def __init__(self, shape_list: list[tuple[int, int]], interp: int = Image.BILINEAR):
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        new_h, new_w = self.shape_list[np.random.randint(0, len(self.shape_list))]
        return ResizeTransform(*image.shape[:2], new_h, new_w, self.interp)


class ResizeShortestEdge(Augmentation):
    """Scale the shorter side to a drawn length, or less where the longer side would exceed ``max_size``.

    Args:
        short_edge_length: with ``sample_style="range"`` the inclusive (min, max); with ``"choice"`` the
            lengths to draw from. One number is a fixed length. A drawn 0 leaves the image alone.
        max_size: bound of the longer side in pixels.
    """

    def __init__(
        self,
        short_edge_length: int | tuple[int, ...],
        max_size: int = sys.maxsize,
        sample_style: str = "range",
        interp: int = Image.BILINEAR,
    ):
        if sample_style not in ("range", "choice"):
            raise AssertionError(f"sample_style must be 'range' or 'choice', got {sample_style!r}.")
        if isinstance(short_edge_length, int):
            short_edge_length = (short_edge_length, short_edge_length)
        if sample_style == "range" and len(short_edge_length) != 2:
            raise AssertionError(
                f"short_edge_length must be (min, max) for sample_style='range', got {short_edge_length}."
            )
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        length = self._draw_length()
        if not length:
            return NoOpTransform()
        old = image.shape[:2]
        return ResizeTransform(*old, *self.get_output_shape(*old, length, self.max_size), self.interp)

    def _draw_length(self) -> int:
        if self.sample_style != "range":
            return np.random.choice(self.short_edge_length)
        low, high = self.short_edge_length
        return np.random.randint(low, high + 1)

    @staticmethod
    def get_output_shape(oldh: int, oldw: int, short_edge_length: int, max_size: int) -> tuple[int, int]:
        """(height, width) in pixels that an ``oldh x oldw`` image is resized to."""
        length = float(short_edge_length)
        scale = length / min(oldh, oldw)
        # The short side is exact in floating point, which decides halves in the rounding below.
        new_h, new_w = (length, scale * oldw) if oldh < oldw else (scale * oldh, length)
        if max(new_h, new_w) > max_size:
            shrink = max_size / max(new_h, new_w)
            new_h, new_w = new_h * shrink, new_w * shrink
        return round_size(new_h), round_size(new_w)


class ResizeScale(Augmentation):
    """Scale, keeping the aspect ratio, to fit into the target size times a factor from [min_scale, max_scale)."""

    def __init__(
        self, min_scale: float, max_scale: float, target_height: int, target_width: int, interp: int = Image.BILINEAR
    ):
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        factor = np.random.uniform(self.min_scale, self.max_scale)
        height, width = image.shape[:2]
        ratio = min(self.target_height * factor / height, self.target_width * factor / width)
        new_h, new_w = int(np.round(height * ratio)), int(np.round(width * ratio))
        return ResizeTransform(height, width, new_h, new_w, self.interp)


class RandomExtent(Augmentation):
    """Cut out a scaled and shifted copy of the image's rectangle; what lies outside is black.

    Args:
        scale_range: (low, high) of the rectangle's size relative to the image.
        shift_range: (x, y) widths of the shift's range, relative to the image and centred on 0.
    """

    def __init__(self, scale_range: tuple[float, float], shift_range: tuple[float, float]):
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        height, width = image.shape[:2]
        scale = np.random.uniform(*self.scale_range)
        shift_x = width * self.shift_range[0] * (np.random.rand() - 0.5)
        shift_y = height * self.shift_range[1] * (np.random.rand() - 0.5)
        size = np.array((width, height), dtype=float)
        corners = np.array((-0.5, 0.5))[:, None] * size * scale + (shift_x, shift_y) + 0.5 * size
        out_w, out_h = (corners[1] - corners[0]).astype(int)
        return ExtentTransform(tuple(corners.ravel()), (int(out_h), int(out_w)))


class RandomRotation(Augmentation):
    """Rotate by a drawn angle about a drawn point.

    Args:
        angle: degrees; with ``sample_style="range"`` a (min, max), with ``"choice"`` a list of angles. One
            number is a fixed angle.
        expand: enlarge the canvas to hold the rotated image.
        center: relative (x, y), as two corners ((x0, y0), (x1, y1)) of a range or as a list of choices; the
            middle of the image when not given.
        interp: OpenCV interpolation flag.
    """

    def __init__(
        self,
        angle: float | tuple[float, ...],
        expand: bool = True,
        center: tuple[tuple[float, float], ...] | None = None,
        sample_style: str = "range",
        interp: int | None = None,
    ):
        if sample_style not in ("range", "choice"):
            raise AssertionError(f"sample_style must be 'range' or 'choice', got {sample_style!r}.")
        angle = (angle,) * 2 if np.isscalar(angle) else angle
        center = (center,) * 2 if center is not None and np.isscalar(center[0]) else center
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        height, width = image.shape[:2]
        pivot = None
        if self.sample_style == "range":
            angle = np.random.uniform(self.angle[0], self.angle[1])
            if self.center is not None:
                low, high = self.center[0], self.center[1]
                pivot = (np.random.uniform(low[0], high[0]), np.random.uniform(low[1], high[1]))
        else:
            angle = np.random.choice(self.angle)
            if self.center is not None:
                pivot = self.center[np.random.choice(len(self.center))]
        if pivot is not None:
            pivot = (width * pivot[0], height * pivot[1])
        if angle % 360 == 0:
            return NoOpTransform()
        return RotationTransform(height, width, angle, self.expand, pivot, self.interp)
