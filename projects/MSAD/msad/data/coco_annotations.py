"""Checks of the annotations of a COCO file: ids, types and ranges; areas and the like are filled in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

from ..finding import ERROR, WARNING
from .tally import Tally

_NUMBERS = {int, float}
_VISIBILITIES = {0, 1, 2}
_KINDS = {str: "texts", list: "lists", bool: "truth values", type(None): "null", dict: "objects"}


def shown(value: Any) -> str:
    """A value of a message, not longer than it helps."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def is_integer(value: Any) -> bool:
    """Whether a value is a whole number and no truth value."""
    return type(value) is int or (type(value) is float and value.is_integer())


class AnnotationChecker:
    """Checks one annotation after another; ``repaired`` if one was changed.

    Args:
        count: number of annotations.
        masks: an annotation is used for its mask, and what its box is does not matter; otherwise for its box.
    """

    def __init__(self, tally: Tally, images: dict[int, dict], categories: set, count: int, masks: bool) -> None:
        self.tally, self.images, self.categories, self.masks = tally, images, categories, masks
        self.of = f"{count} annotations"
        self.ids: set[int] = set()
        self.place = -1
        self.repaired = False

    def check(self, a: dict[str, Any]) -> bool:
        """Whether it can be used: it has a mask, or else a box of four finite numbers."""
        self.place += 1
        add = partial(self._add, a)
        self._check_ids(a, add)
        if a.get("ignore"):
            add(ERROR, "has the key 'ignore', which is not supported", "use iscrowd: 1")
        if "iscrowd" not in a:
            a["iscrowd"], self.repaired = 0, True
        elif type(a["iscrowd"]) not in (int, bool) or a["iscrowd"] not in (0, 1):
            seen = f"has iscrowd {shown(a['iscrowd'])}"
            add(ERROR, "has another iscrowd than 0 and 1", "write 0 (one object) or 1 (a group)", seen)
        boxed = not self.masks and self._check_box(a, add)
        if a.get("segmentation"):
            self._check_mask(a, add)
        elif self.masks:
            add(ERROR, "has no mask (segmentation)", "draw one, or remove the annotation")
        usable = bool(a.get("segmentation")) if self.masks else boxed
        if a.get("keypoints"):
            self._check_keypoints(a, add)
        if usable:
            self._check_area(a, add)
        return usable

    def _check_ids(self, a: dict, add: Callable) -> None:
        number = a.get("id")
        if type(number) is not int:
            seen = f"has id {shown(number)}, not a whole number" if "id" in a else "has no id"
            add(ERROR, "has no whole number as id", "number the annotations: 1, 2, 3, ...", seen)
        elif number in self.ids:
            add(ERROR, "has the id of another annotation", "give each annotation an id of its own")
        else:
            self.ids.add(number)
        for key, known in (("image_id", self.images), ("category_id", self.categories)):
            value = a.get(key)
            if not is_integer(value):
                fix = f"write {key} as a whole number, the id of {'an image' if key == 'image_id' else 'a category'}"
                add(ERROR, f"has no whole number as {key}", fix, f"has {key} {shown(value)}, not a whole number")
            elif value not in known:
                seen = f"has {key} {value!r}, which is not listed"
                add(ERROR, f"has a {key} that is not listed", f"list it, or correct {key}", seen)
            elif type(value) is float:
                a[key], self.repaired = int(value), True

    def _add(self, a: dict, level: str, reason: str, fix: str, seen: str = "") -> None:
        if not self.tally[reason]:
            image = self.images.get(a["image_id"], {}) if is_integer(a.get("image_id")) else {}
            seen = (seen or reason) + (f", in {image['file_name']!r}" if "file_name" in image else "")
        self.tally.add(level, reason, f"annotation {a.get('id', f'number {self.place}')}", fix, self.of, seen)

    def _check_box(self, a: dict, add: Callable) -> bool:
        box = a.get("bbox")
        if box is None or box == []:
            add(WARNING, "has no bbox and is left out", "write bbox: [x, y, width, height] in pixels")
            return False
        if not isinstance(box, list) or len(box) != 4 or not _NUMBERS.issuperset(map(type, box)):
            fix = "write bbox: [x, y, width, height], four numbers in pixels"
            add(ERROR, "has a bbox that is not four numbers", fix, f"has bbox {_values(box)}")
            return False
        if not math.isfinite(sum(box)):
            add(WARNING, "has a bbox with NaN or infinity and is left out", "correct what wrote the file")
            return False
        return True

    def _check_mask(self, a: dict, add: Callable) -> None:
        mask = a["segmentation"]
        if isinstance(mask, dict):
            self._check_rle(a, mask, add)
        elif not isinstance(mask, list) or _NUMBERS & set(map(type, mask)):
            seen = f"has segmentation {shown(mask)}"
            fix = "write a list of polygons, [[x0, y0, x1, y1, ...], ...], or a run-length encoding"
            add(ERROR, "has a segmentation that is no list of polygons", fix, seen)
        else:
            for polygon in mask:
                if not isinstance(polygon, list) or not _NUMBERS.issuperset(map(type, polygon)):
                    fix = "write each polygon as a list of numbers: [x0, y0, x1, y1, ...]"
                    add(ERROR, "has a polygon that is no list of numbers", fix, f"has a polygon {_values(polygon)}")
                elif not math.isfinite(sum(polygon)):
                    add(ERROR, "has a polygon with NaN or infinity", "correct what wrote the file")
                elif not is_polygon(polygon):
                    fix = "give each polygon three points or more, x and y of each"
                    add(WARNING, "has a polygon of fewer than three points, which is left out", fix)
                    # pycocotools fails on them, and a box beside them is as good as any
                    a["segmentation"], self.repaired = [p for p in a["segmentation"] if p is not polygon], True

    def _check_rle(self, a: dict, mask: dict, add: Callable) -> None:
        size, counts = mask.get("size"), mask.get("counts")
        image = self.images.get(a["image_id"], {}) if is_integer(a.get("image_id")) else {}
        wanted = [image.get("height"), image.get("width")]
        if size != wanted:
            fix = "size is [height, width] of the image"
            seen = f"has a run-length mask of size {shown(size)} in an image of {wanted}"
            add(ERROR, "has a run-length mask of another size", fix, seen)
        elif isinstance(counts, list):
            if not _NUMBERS.issuperset(map(type, counts)) or not _cover(counts, size):
                fix = "count down the columns, background first"
                add(ERROR, "has run lengths that do not sum up to its image", fix)
        elif not isinstance(counts, str):
            fix = "write COCO's compressed text or a list of numbers"
            add(ERROR, "has no run-length counts", fix, f"has run-length counts {shown(counts)}")
        elif not _cover(read_counts(counts), size):
            seen = f"has run-length counts {shown(counts)}, which are damaged"
            fix = "write pycocotools' counts.decode(), all of it: neither str(counts) nor base64"
            add(ERROR, "has damaged run-length counts", fix, seen)

    def _check_keypoints(self, a: dict, add: Callable) -> None:
        points = a["keypoints"]
        if not isinstance(points, list) or len(points) % 3 or not _NUMBERS.issuperset(map(type, points)):
            fix = "write x, y and visibility of each keypoint: [x0, y0, v0, x1, ...]"
            add(ERROR, "has keypoints that are not three numbers each", fix, f"has keypoints {_values(points)}")
            return
        if not math.isfinite(sum(points)):
            add(ERROR, "has a keypoint with NaN or infinity", "write 0, 0, 0 for a point that is not labelled")
            return
        visibility = points[2::3]
        if not _VISIBILITIES.issuperset(visibility):
            seen = f"has keypoint visibility {min(set(visibility) - _VISIBILITIES):g}"
            fix = "visibility is 0 (not labelled), 1 (hidden) or 2 (visible), no probability"
            add(ERROR, "has keypoint visibilities other than 0, 1 and 2", fix, seen)
        labelled = sum(v > 0 for v in visibility)
        if "num_keypoints" not in a:
            a["num_keypoints"], self.repaired = labelled, True
        elif a["num_keypoints"] != labelled:
            seen = f"has num_keypoints {shown(a['num_keypoints'])}, but {labelled} of its points are labelled"
            add(WARNING, "has a wrong num_keypoints", "leave the key out: it is counted then", seen)

    def _check_area(self, a: dict, add: Callable) -> None:
        box = (0, 0, 0, 0) if self.masks else a["bbox"]
        if "area" not in a:
            a["area"], self.repaired = _area(a, self.images.get(a.get("image_id"), {}), box), True
            return
        area, (_, _, width, height) = a["area"], box
        fix = "write the area in square pixels, or leave the key out: it is computed then"
        if type(area) not in _NUMBERS or not math.isfinite(area) or area < 0:
            add(ERROR, "has an area that is no number", fix, f"has area {shown(area)}")
        elif width > 0 and height > 0 and (area > (width + 1) * (height + 1) or (area == 0 and width * height > 4)):
            seen = f"has area {area:g}, in a box of {width:g} x {height:g}: APs, APm and APl go by it"
            add(WARNING, "has an area that its box cannot have", fix, seen)


def _values(values: Any) -> str:
    """Values of a message, with what is wrong about their number or types."""
    if not isinstance(values, list):
        return shown(values)
    strange = {type(v) for v in values} - _NUMBERS
    if not strange:
        return f"{shown(values)}, {len(values)} numbers"
    names = ", ".join(sorted(_KINDS.get(kind, kind.__name__) for kind in strange))
    return f"{shown(values)}: {names} instead of numbers"


def _area(a: dict[str, Any], image: dict[str, Any], box: Sequence[float]) -> float:
    """Area in square pixels: of the mask if there is a good one, else of the box."""
    mask = a.get("segmentation")
    try:
        if isinstance(mask, dict) or any(map(is_polygon, mask)):
            return float(mask_util.area(_run_lengths(mask, image["height"], image["width"])))
    except Exception:  # what is wrong with the mask has been counted
        pass
    return float(max(box[2], 0) * max(box[3], 0))


def _cover(runs: Sequence[float], size: Sequence[int]) -> bool:
    """Whether run lengths fill an image of ``size`` (height, width) exactly."""
    return len(runs) > 0 and min(runs) >= 0 and sum(runs) == size[0] * size[1]


def read_counts(text: str) -> list[int]:
    """The run lengths in pixels that COCO's compressed text stands for; [] if it is none.

    A character is 48 + 5 bits of a number, lowest first, + 32 if more follow; the last bit of a number is its sign.
    From the fourth on, the number is the difference to the run before the last. pycocotools decodes a text that is cut
    off without a word, to pixels that are in no file, and writes out every mask for it.
    """
    codes = np.frombuffer(text.encode(errors="surrogatepass"), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(codes < 32)
    if not ends.size or codes.min() < 0 or codes.max() > 63 or ends[-1] < len(codes) - 1:
        return []
    starts = np.append(0, ends[:-1] + 1)
    lengths = ends - starts + 1
    if lengths.max() > 7:  # 35 bits: no image is as large
        return []
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((codes & 31) << shifts, starts) - ((codes[ends] & 16) >> 4 << 5 * lengths)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs.tolist()


def is_polygon(values: list) -> bool:
    """Whether a list of numbers is x and y of three points or more."""
    return len(values) >= 6 and len(values) % 2 == 0


def compressed(mask: dict[str, Any]) -> dict[str, Any]:
    """A run-length mask with COCO's compressed counts."""
    return mask_util.frPyObjects(mask, *mask["size"]) if isinstance(mask["counts"], list) else mask


def encoded(mask: np.ndarray) -> dict[str, Any]:
    """COCO's compressed run lengths, as JSON holds them, of a bool array (height, width)."""
    found = mask_util.encode(np.asfortranarray(mask, np.uint8))
    return {"size": found["size"], "counts": found["counts"].decode()}


def bitmap(mask: list | dict[str, Any], height: int, width: int) -> np.ndarray:
    """COCO polygons or run lengths, compressed or not, as a bool array (height, width).

    What is no polygon is left out, as it is in training.
    """
    return mask_util.decode(_run_lengths(mask, height, width)).astype(bool)


def _run_lengths(mask: list | dict[str, Any], height: int, width: int) -> dict[str, Any]:
    if isinstance(mask, dict):
        return compressed(mask)
    if polygons := list(filter(is_polygon, mask)):
        return mask_util.merge(mask_util.frPyObjects(polygons, height, width))
    return compressed({"size": [height, width], "counts": [height * width]})
