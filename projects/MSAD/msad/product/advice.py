"""How large the objects of a data set are at an input size, and which sizes to train at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from detectron2.data import transforms as T

LIMITS = (8, 16, 32)  # pixels
# Short sides of H that are considered; multiples of 64, so that a quarter is one of 16.
LADDER = (128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024)
# H is the least size at which no more than this share of objects is smaller than MIN_SIDE at H, i.e. half of it at L.
MIN_SIDE, MAX_SHARE = 16, 0.1
# The longest side that an image may have, in short sides, as in detectron2's 800 x 1333.
LONGEST = 5 / 3


class Objects(NamedTuple):
    """The objects of a data set.

    Attributes:
        sides: sqrt(width x height) of each box, in pixels of its file (N,).
        frames: height, width of its image (N, 2).
        images: height, width of every image (M, 2).
        per_class: number of objects by class; classes of one name have their index behind it.
        most: objects in the fullest image.
    """

    sides: np.ndarray
    frames: np.ndarray
    images: np.ndarray
    per_class: dict[str, int]
    most: int


def measure_objects(records: Sequence[dict], classes: Sequence[str], what: str = "the images") -> Objects:
    """Look at detectron2's dataset dicts; crowds are no objects.

    Args:
        what: the records are, for the error.

    Raises:
        ValueError: there is no object.
    """
    sides, frames, labels, counts = [], [], Counter(), [0]
    for record in records:
        found = [a for a in record.get("annotations", ()) if not a.get("iscrowd")]
        sides += [(max(a["bbox"][2], 0) * max(a["bbox"][3], 0)) ** 0.5 for a in found]
        frames += [(record["height"], record["width"])] * len(found)
        labels.update(a["category_id"] for a in found)
        counts.append(len(found))
    if not sides:
        crowds = sum(len(record.get("annotations", ())) for record in records)
        raise ValueError(f"{what} have no object" + (f", only {crowds} crowds" if crowds else ""))
    images = np.array([(record["height"], record["width"]) for record in records])
    names = [name if list(classes).count(name) == 1 else f"{name} ({index})" for index, name in enumerate(classes)]
    per_class = {name: labels[index] for index, name in enumerate(names)}
    return Objects(np.array(sides), np.array(frames), images, per_class, max(counts))


def longest_side(short: int) -> int:
    """The longest side in pixels that goes with a short side."""
    return round(short * LONGEST)


def sides_at(objects: Objects, short: int) -> np.ndarray:
    """Sides of the objects in pixels of images that are resized to this short side (N,)."""
    unique, index = np.unique(objects.frames, axis=0, return_inverse=True)
    shapes = [T.ResizeShortestEdge.get_output_shape(int(h), int(w), short, longest_side(short)) for h, w in unique]
    factors = np.array([shape[0] / h for shape, (h, _) in zip(shapes, unique)])
    return objects.sides * factors[index.reshape(-1)]


def shares_below(sides: np.ndarray) -> dict[int, float]:
    """Share of objects smaller than each of LIMITS, in pixels."""
    return {limit: float((sides < limit).mean()) for limit in LIMITS}


def native_side(objects: Objects) -> int:
    """Median short side of the files, in pixels."""
    return round(float(np.median(objects.images.min(axis=1))))


def typical_image(objects: Objects) -> tuple[int, int]:
    """Height, width of the commonest size of the files."""
    (height, width), _ = Counter(map(tuple, objects.images.tolist())).most_common(1)[0]
    return height, width


def recommend(objects: Objects) -> int:
    """Short side of H in pixels: the least of LADDER at which few enough objects are small, at most that of the files.

    Enlarging files adds no information, so where objects are small in them, their own size is taken (at most the
    largest of LADDER). Files that are smaller than the least of LADDER get that one.
    """
    native = native_side(objects)
    for short in LADDER:
        if short <= native and shares_below(sides_at(objects, short))[MIN_SIDE] <= MAX_SHARE:
            return short
    return max((short for short in LADDER if short <= native), default=LADDER[0])


def finest_anchor(objects: Objects, short: int, stride: int) -> int:
    """Side in pixels of H of the anchors on the finest level: near the smallest tenth of the objects.

    A power of two from twice the level's stride to 32, detectron2's own.
    """
    small = max(float(np.quantile(sides_at(objects, short), 0.1)), 1.0)
    return int(np.clip(2 ** round(np.log2(small)), 2 * stride, 32))


def describe(objects: Objects, short: int, scale: int) -> list[str]:
    """The advice in words and a table.

    Args:
        short: short side of H.
        scale: 2 or 4; the student sees H divided by it.
    """
    native, best = native_side(objects), recommend(objects)
    rows = {native: "files", best: "recommended H", short: "H", round(short / 2): "L", round(short / 4): "EL"}
    lines = [
        f"{len(objects.images)} images (median short side {native} px), {len(objects.sides)} objects in "
        f"{len(objects.per_class)} classes, median side {np.median(objects.sides):.0f} px, up to {objects.most} in an "
        "image",
        "short side   " + "".join(f"{f'< {limit} px':>9}" for limit in LIMITS),
    ]
    for side in sorted(rows, reverse=True):
        shares = "".join(f"{100 * share:8.0f}%" for share in shares_below(sides_at(objects, side)).values())
        lines.append(f"{side:>7} px   {shares}   {rows[side]}")
    chosen = "" if short == best else f"; chosen: H {short} px"
    lines.append(f"recommended: H {best} px, L {round(best / 2)} px{chosen}")
    rare = [name for name, count in objects.per_class.items() if count < 10]
    if rare:
        names = f"{', '.join(rare[:6])}{', ...' if len(rare) > 6 else ''}"
        lines.append(f"note: fewer than 10 objects to learn from: {names}")
    if shares_below(sides_at(objects, short / scale))[8] > 0.5:
        lines.append(f"note: at 1/{scale} most objects have less than 8 px: a larger H (--short-side), or images that "
                     "are cut into parts, would serve them better")  # fmt: skip
    elif scale == 2 and shares_below(sides_at(objects, short / 4))[8] <= MAX_SHARE:
        lines.append("note: objects are large enough for --scale 1/4")
    return lines
