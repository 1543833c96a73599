"""Augmentations that change colours only."""

from __future__ import annotations

import numpy as np
from fvcore.transforms.transform import BlendTransform, Transform

from .augmentation import Augmentation

_LUMA = np.array((0.299, 0.587, 0.114))
# Principal components of ImageNet's RGB pixels and their standard deviations (AlexNet, section 4.1).
_RGB_COMPONENTS = np.array(((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203)))
_RGB_DEVIATIONS = np.array((0.2175, 0.0188, 0.0045))


class _IntensityBlend(Augmentation):
    """Blend with a reference image: a drawn weight of 1 keeps the image, 0 gives the reference."""

    def __init__(self, intensity_min: float, intensity_max: float):
        self.intensity_min = intensity_min
        self.intensity_max = intensity_max

    def _reference(self, image: np.ndarray):
        raise NotImplementedError

    def get_transform(self, image: np.ndarray) -> Transform:
        weight = np.random.uniform(self.intensity_min, self.intensity_max)
        return BlendTransform(self._reference(image), src_weight=1 - weight, dst_weight=weight)


class RandomContrast(_IntensityBlend):
    """Blend with the mean grey value; weights below 1 lower the contrast."""

    def _reference(self, image: np.ndarray):
        return image.mean()


class RandomBrightness(_IntensityBlend):
    """Blend with black; weights below 1 darken."""

    def _reference(self, image: np.ndarray):
        return 0


class RandomSaturation(_IntensityBlend):
    """Blend with the grey-scale version of an RGB image; weights below 1 drain the colours."""

    def _reference(self, image: np.ndarray):
        _require_rgb(self, image)
        return image.dot(_LUMA)[:, :, None]


class RandomLighting(Augmentation):
    """Add noise along the principal components of ImageNet's colours, of deviation ``scale``, to an RGB image."""

    def __init__(self, scale: float):
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        _require_rgb(self, image)
        amounts = np.random.normal(scale=self.scale, size=3)
        return BlendTransform(_RGB_COMPONENTS @ (amounts * _RGB_DEVIATIONS), src_weight=1.0, dst_weight=1.0)


def _require_rgb(aug: Augmentation, image: np.ndarray) -> None:
    if image.ndim != 3 or image.shape[2] != 3:
        raise AssertionError(f"{type(aug).__name__} needs an H x W x 3 RGB image, got shape {image.shape}.")
