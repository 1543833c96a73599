"""A class for every pixel, as labels or as what a segmentor says, ready to be drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from ..data.coco_annotations import encoded

_OPACITY = 0.55


@dataclass(frozen=True)
class LabelMap:
    """What one source says of the pixels of an image.

    ``labels`` (H, W) are numbers of classes; pixels of ``ignored`` say nothing.
    """

    labels: np.ndarray
    ignored: int = 255

    @classmethod
    def read(cls, file: str | Path, ignored: int = 255) -> LabelMap:
        """The label map in a file of one channel, or with a palette whose indices are the classes."""
        with Image.open(file) as opened:
            return cls(np.asarray(opened), ignored)

    @classmethod
    def of_scores(cls, scores: torch.Tensor) -> LabelMap:
        """The best class of each pixel, of scores (K, H, W)."""
        return cls(scores.argmax(dim=0).cpu().numpy(), -1)

    @cached_property
    def classes(self) -> np.ndarray:
        """(N,) numbers of the classes that occur."""
        found = np.unique(self.labels)
        return found[found != self.ignored].astype(int)

    def __len__(self) -> int:
        return len(self.classes)

    def above(self, threshold: float) -> LabelMap:
        """Itself: every pixel has a class, whatever its score."""
        return self

    def resized(self, size: tuple[int, int]) -> LabelMap:
        """The same in ``size`` (height, width), of each pixel the nearest."""
        labels = cv2.resize(self.labels.astype(np.int32), size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
        return LabelMap(labels, self.ignored)

    def paint(self, image: np.ndarray, colours: Mapping[int, tuple[float, float, float]]) -> np.ndarray:
        """``image``, RGB uint8 (H, W, 3), under the colours (RGB in [0, 1]) of the classes; ignored pixels stay."""
        painted = image.copy()
        for label in self.classes.tolist():
            here = self.labels == label
            colour = 255 * np.asarray(colours[label])
            painted[here] = np.round((1 - _OPACITY) * image[here] + _OPACITY * colour).astype(np.uint8)
        return painted

    def as_json(self, names: Sequence[str] = ()) -> list[dict]:
        """Each class that occurs: category_id, category, pixels, and its mask in COCO's compressed run lengths."""
        found = []
        for label in self.classes.tolist():
            mask = self.labels == label
            found.append(
                {
                    "category_id": label, "category": names[label] if label < len(names) else str(label),
                    "pixels": int(mask.sum()), "segmentation": encoded(mask),
                }
            )  # fmt: skip
        return found
