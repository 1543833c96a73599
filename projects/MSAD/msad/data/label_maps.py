"""Label maps that are made from other files, kept in the user's cache folder as images of one 8-bit channel."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from detectron2.data.detection_utils import read_image
from PIL import Image, ImageOps

from ..files import atomic_write
from .cache import cache_file


def cached_label_map(key: str, make: Callable[[], np.ndarray]) -> str:
    """Path of a PNG whose pixels are numbers of classes; it is made once.

    Args:
        key: what the map depends on, as a text.
        make: draws it: (h, w) uint8.
    """
    digest = hashlib.sha256(key.encode()).hexdigest()
    path = cache_file("label_maps") / digest[:2] / f"{digest}.png"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, shared=True) as file:
            Image.fromarray(make()).save(file, "PNG")
    return str(path)


def without_palette(file: str) -> str:
    """Path of a copy of a label map with a palette, whose pixels are the indices into the palette.

    detectron2's mapper would read the brightness of the colours.
    """
    key = f"palette {Path(file).absolute()} {os.stat(file).st_mtime_ns}"
    return cached_label_map(key, lambda: _indices(file))


def resized_label_map(file: str, width: int, height: int) -> str:
    """Path of a copy of a label map, resized to ``width`` x ``height`` pixels: of each the label at its middle."""
    key = f"resized {width} {height} {Path(file).absolute()} {os.stat(file).st_mtime_ns}"
    return cached_label_map(key, lambda: _resized(file, (width, height)))


def _resized(file: str, size: tuple[int, int]) -> np.ndarray:
    labels = Image.fromarray(read_image(file, "L").squeeze(2))
    return np.asarray(labels.resize(size, Image.Resampling.NEAREST), np.uint8)


def _indices(file: str) -> np.ndarray:
    with Image.open(file) as opened:
        return np.asarray(ImageOps.exif_transpose(opened), np.uint8)
