"""Augmentations that crop, and pad where the image is smaller."""

from __future__ import annotations

import numpy as np
from fvcore.transforms.transform import CropTransform, NoOpTransform, PadTransform, Transform, TransformList

from .augmentation import Augmentation

_CROP_TYPES = ("relative", "relative_range", "absolute", "absolute_range")
_CATEGORY_TRIALS = 10


def round_size(value: float) -> int:
    """Nearest integer, halves away from zero, for non-negative sizes."""
    return int(value + 0.5)


class FixedSizeCrop(Augmentation):
    """Crop at a random place to at most ``crop_size`` (height, width) and pad what is smaller.

    Padding goes to the right and the bottom, with ``pad_value`` in images and ``seg_pad_value`` in labels.
    With ``pad=False`` smaller images stay small.
    """

    def __init__(
        self, crop_size: tuple[int, int], pad: bool = True, pad_value: float = 128.0, seg_pad_value: int = 255
    ):
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> TransformList:
        height, width = image.shape[:2]
        crop_h, crop_w = self.crop_size
        place = np.random.uniform(0.0, 1.0)
        y0, x0 = (int(np.round(max(surplus, 0) * place)) for surplus in (height - crop_h, width - crop_w))
        steps: list[Transform] = [CropTransform(x0, y0, crop_w, crop_h, width, height)]
        if self.pad:
            kept_h, kept_w = min(height, crop_h), min(width, crop_w)
            missing_w, missing_h = crop_w - kept_w, crop_h - kept_h
            steps.append(PadTransform(0, 0, missing_w, missing_h, kept_w, kept_h, self.pad_value, self.seg_pad_value))
        return TransformList(steps)


class RandomCrop(Augmentation):
    """Crop at a uniformly drawn place.

    Args:
        crop_type: how ``crop_size`` (two numbers) gives the height and width of the crop:
            ``relative``: fractions of the image's height and width;
            ``relative_range``: lower bounds of fractions, drawn from [bound, 1) each;
            ``absolute``: pixels, cut to the image;
            ``absolute_range``: (min, max) in pixels, cut to the image, from which both sides are drawn.
    """

    def __init__(self, crop_type: str, crop_size: tuple[float, float]):
        if crop_type not in _CROP_TYPES:
            raise AssertionError(f"crop_type must be one of {_CROP_TYPES}, got {crop_type!r}.")
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        height, width = image.shape[:2]
        crop_h, crop_w = self.get_crop_size((height, width))
        if crop_h > height or crop_w > width:
            raise AssertionError(f"{self!r} asks for {crop_h} x {crop_w} of a {height} x {width} image.")
        y0 = np.random.randint(height - crop_h + 1)
        x0 = np.random.randint(width - crop_w + 1)
        return CropTransform(x0, y0, crop_w, crop_h)

    def get_crop_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Draw the (height, width) of the crop for an image of (height, width), all in pixels."""
        first, second = self.crop_size
        height, width = image_size
        if self.crop_type == "absolute":
            return min(first, height), min(second, width)
        if self.crop_type == "absolute_range":
            if first > second:
                raise AssertionError(f"absolute_range needs (min, max), got {self.crop_size}.")
            sides = (np.random.randint(min(side, first), min(side, second) + 1) for side in image_size)
            return tuple(sides)
        if self.crop_type == "relative_range":
            least = np.array((first, second), dtype=np.float32)
            first, second = least + np.random.rand(2) * (1 - least)
        return round_size(height * first), round_size(width * second)


class RandomCrop_CategoryAreaConstraint(Augmentation):
    """:class:`RandomCrop` that tries ten times to find a place where no class covers nearly everything.

    Args:
        crop_type, crop_size: those of :class:`RandomCrop`.
        single_category_max_area: largest part of the labelled pixels that one class may have; 1 for no limit.
        ignored_category: label that does not count as a class, nor its pixels as labelled.
    """

    def __init__(
        self, crop_type: str, crop_size: tuple[float, float], single_category_max_area: float = 1.0,
        ignored_category: int | None = None,
    ):
        self._init(locals())
        self.crop_aug = RandomCrop(crop_type, crop_size)

    def get_transform(self, image: np.ndarray, sem_seg: np.ndarray) -> Transform:
        """Choose a crop for labels ``sem_seg`` (H x W)."""
        if self.single_category_max_area >= 1.0:
            return self.crop_aug.get_transform(image)
        height, width = sem_seg.shape
        for _ in range(_CATEGORY_TRIALS):
            crop_h, crop_w = self.crop_aug.get_crop_size((height, width))
            y0 = np.random.randint(height - crop_h + 1)
            x0 = np.random.randint(width - crop_w + 1)
            classes, areas = np.unique(sem_seg[y0 : y0 + crop_h, x0 : x0 + crop_w], return_counts=True)
            if self.ignored_category is not None:
                areas = areas[classes != self.ignored_category]
            if len(areas) > 1 and areas.max() < areas.sum() * self.single_category_max_area:
                break
        return CropTransform(x0, y0, crop_w, crop_h)


class MinIoURandomCrop(Augmentation):
    """Crop such that every box keeps at least a drawn IoU with the crop (SSD, section 2.2).

    Args:
        min_ious: the bounds to draw from, besides "no crop" and "any crop".
        min_crop_size: smallest side of a crop relative to the image's.
        mode_trials: draws of a bound before giving up.
        crop_trials: crops tried for each bound.
    """

    def __init__(
        self,
        min_ious: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9),
        min_crop_size: float = 0.3,
        mode_trials: int = 1000,
        crop_trials: int = 50,
    ):
        self._init(locals())

    def get_transform(self, image: np.ndarray, boxes: np.ndarray) -> Transform:
        """Choose a crop for ``boxes`` (N x 4 XYXY, pixels of ``image``)."""
        height, width = image.shape[:2]
        for _ in range(self.mode_trials):
            bound = np.random.choice((1, *self.min_ious, 0))
            if bound == 1:
                break
            for _ in range(self.crop_trials):
                crop = self._draw(height, width)
                if crop is not None and _keeps_boxes(crop, boxes, bound):
                    return CropTransform(*(int(value) for value in crop))
        return NoOpTransform()

    def _draw(self, height: int, width: int) -> tuple[float, float, float, float] | None:
        """One candidate (x0, y0, width, height) in fractional pixels, or None when it is too slim."""
        crop_w = np.random.uniform(self.min_crop_size * width, width)
        crop_h = np.random.uniform(self.min_crop_size * height, height)
        if not 0.5 <= crop_h / crop_w <= 2:
            return None
        # One argument to uniform is the lower end of a range up to 1: places near the top left corner are
        # out of reach. detectron2 draws so, and results under a seed should agree with it.
        return np.random.uniform(width - crop_w), np.random.uniform(height - crop_h), crop_w, crop_h


def _keeps_boxes(crop: tuple[float, float, float, float], boxes: np.ndarray, bound: float) -> bool:
    """Whether each box overlaps the crop by IoU >= bound and at least one box has its centre inside."""
    left, top, crop_w, crop_h = crop
    x0, y0, x1, y1 = int(left), int(top), int(left + crop_w), int(top + crop_h)
    if x1 <= x0 or y1 <= y0:
        return False
    if len(boxes) == 0:
        return True
    low, high = np.maximum(boxes[:, :2], (x0, y0)), np.minimum(boxes[:, 2:], (x1, y1))
    shared = np.prod(np.clip(high - low, 0, None), axis=1)
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    union = areas + (x1 - x0) * (y1 - y0) - shared
    if np.min(shared / union) < bound:
        return False
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    return bool(np.any(np.all((centers > (x0, y0)) & (centers < (x1, y1)), axis=1)))
