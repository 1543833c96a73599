"""Label maps: what is wrong with one, and those that are made from other files, kept in the user's cache folder."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from detectron2.data.detection_utils import read_image
from PIL import Image, ImageOps

from ..files import atomic_write
from ..finding import ERROR
from .cache import cache_file
from .image_files import upright_size
from .sampling import at_equal_distances
from .tally import Tally

THREADS = 4  # label maps that are decoded at once


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


def readable_label_map(file: str, size: tuple[int, int]) -> str:
    """Path of a label map as detectron2's mapper is to read it: the file, or a copy of the indices into its palette.

    The mapper would read the brightness of a palette's colours. Only the header of other files is looked at.

    Args:
        size: (width, height) of the upright image.

    Raises:
        ValueError: it has another size, is not of one channel of 8 bits, or cannot be decoded; names it.
    """
    return _readable(file, size, os.stat(file).st_mtime_ns)


@functools.lru_cache(maxsize=1 << 17)
def _readable(file: str, size: tuple[int, int], changed: int) -> str:
    # Data sets are loaded several times in a run; the time of the last change is there to be remembered.
    with _decoding(file) as opened:
        if opened.mode not in ("L", "P"):
            raise ValueError(
                f"label map {file} has mode {opened.mode!r}, not one channel of 8 bits ('L' or 'P'): its numbers "
                "would not be read as those of classes"
            )
        if opened.size != size and upright_size(opened) != size:  # whose EXIF data are known once it is decoded
            raise ValueError(f"label map {file} has {opened.size} pixels (width, height), its image {size}")
        if opened.mode == "L":
            return file
        key = f"palette {Path(file).absolute()} {changed}"
        return cached_label_map(key, lambda: np.asarray(ImageOps.exif_transpose(opened), np.uint8))


def wrong_labels(file: str, classes: int, ignored: int) -> list[int]:
    """Values of a label map that are neither 0 to ``classes - 1`` nor ``ignored``, ascending.

    Raises:
        ValueError: it cannot be decoded; names it.
    """
    with _decoding(file) as opened:
        present = np.flatnonzero(np.bincount(np.asarray(opened).ravel(), minlength=256))
    return present[(present >= classes) & (present != ignored)].tolist()


@contextmanager
def _decoding(file: str) -> Iterator[Image.Image]:
    """The opened label map; ValueError that names it where it cannot be decoded in the block."""
    try:
        with Image.open(file) as opened:
            yield opened
    except (OSError, SyntaxError) as error:  # what Pillow raises at damaged files, not always with their name
        raise ValueError(f"label map {file} cannot be read: {error}") from None


def check_label_maps(
    tally: Tally, records: Sequence[dict], classes: int, ignored: int, count: int, needed: bool
) -> None:
    """Whether the images have the label maps that a semantic branch is trained on, with its classes.

    Args:
        classes, ignored: of the branch.
        count: so many files, taken at equal distances, are looked into; 0: all.
        needed: an image without a label map is an error.
    """
    of = f"{len(records)} images"
    without = [record for record in records if "sem_seg_file_name" not in record]
    for record in without if needed else ():
        reason, fix = "has no label map", "give its set STUFF, or set MODEL.HTC.SEMANTIC_ON False"
        tally.add(ERROR, reason, record["file_name"], fix, of, f"{reason}, which HTC's semantic branch learns from")
    records = [record for record in records if "sem_seg_file_name" in record]
    records = at_equal_distances(records, count) if count else records
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda record: _labels_problem(record["sem_seg_file_name"], classes, ignored), records)
    for record, problem in zip(records, found):
        if problem:
            reason, fix = "has a label map that cannot be used", "correct it, or MODEL.HTC.SEMANTIC_CLASSES"
            tally.add(ERROR, reason, record["file_name"], fix, f"{len(records)} label maps", f"{reason}: {problem}")


def _labels_problem(file: str, classes: int, ignored: int) -> str:
    try:
        wrong = wrong_labels(file, classes, ignored)
    except ValueError as error:
        return str(error)
    return f"it has the label {wrong[0]}; classes are 0 to {classes - 1}, ignored is {ignored}" if wrong else ""


def resized_label_map(file: str, width: int, height: int) -> str:
    """Path of a copy of a label map, resized to ``width`` x ``height`` pixels: of each the label at its middle."""
    key = f"resized {width} {height} {Path(file).absolute()} {os.stat(file).st_mtime_ns}"
    return cached_label_map(key, lambda: _resized(file, (width, height)))


def _resized(file: str, size: tuple[int, int]) -> np.ndarray:
    labels = Image.fromarray(read_image(file, "L").squeeze(2))
    return np.asarray(labels.resize(size, Image.Resampling.NEAREST), np.uint8)
