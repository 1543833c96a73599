"""Ultralytics' format: data.yaml, images, and a text file of labels for each, with boxes, polygons or keypoints."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pycocotools.cocoeval import Params

from ..files import files_below
from .converted import SUFFIXES, CocoBuilder, text_of

# Coordinates are fractions of the image; further outside than this, they are no coordinates.
_MARGIN = 0.5


def read_yolo(file: Path) -> dict[str, tuple[Path, CocoBuilder]]:
    """{"train": ..., "val": ...}: the folder that file names are relative to, and the split.

    A split is a folder of images or a text file with their paths, or a list of these. Labels lie in the folder that is
    called ``labels`` where the images' is called ``images``, or beside the images. An image without a label file is one
    without objects. Lines that are no labels are left out and counted.

    Args:
        file: data.yaml.

    Raises:
        FileNotFoundError: a folder that it names is not there, or a split has no label file at all.
        ValueError: it is no such file; names the key.
    """
    spec = _read(file)
    categories, points = _categories(spec, file)
    out = {}
    for split, keys in {"train": ("train",), "val": ("val", "valid", "test")}.items():
        key = next((key for key in keys if spec.get(key)), keys[0])
        images = [image for place in _places(spec, key, file) for image in _images(place)]
        root = Path(os.path.commonpath([image.parent for image in images]))
        builder = CocoBuilder(f"{file}, {key}", categories)
        _add(builder, sorted(set(images)), root, points)
        out[split] = root, builder
    return out


def _read(file: Path) -> dict[str, Any]:
    try:
        spec = yaml.safe_load(text_of(file))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no yaml file: {error}") from None
    if not isinstance(spec, dict) or "names" not in spec:
        raise ValueError(f"{file} is no description of a data set: it has no key 'names'")
    return spec


def _categories(spec: dict[str, Any], file: Path) -> tuple[list[dict], tuple[int, int]]:
    """Category records; (number of keypoints, numbers of each), (0, 0) for none."""
    names = spec["names"]
    if isinstance(names, dict):
        if names.keys() != set(range(len(names))):
            raise ValueError(f"{file}: names must be numbered 0, 1, ..., got {list(names)}")
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list) or not names or len(set(map(str, names))) < len(names):
        raise ValueError(f"{file}: names must be a list of different names, got {names!r}")
    if spec.get("nc", len(names)) != len(names):
        raise ValueError(f"{file}: nc is {spec['nc']}, but there are {len(names)} names")
    categories = [{"id": index + 1, "name": str(name)} for index, name in enumerate(names)]
    shape = spec.get("kpt_shape")
    if shape is None:
        return categories, (0, 0)
    good = isinstance(shape, list) and len(shape) == 2 and type(shape[0]) is int
    if not good or shape[0] < 1 or shape[1] not in (2, 3):
        raise ValueError(f"{file}: kpt_shape must be [number of keypoints, 2 or 3], got {shape!r}")
    count = shape[0]
    points = [f"point_{index}" for index in range(count)]
    # The format has no sigmas; Ultralytics takes 17 points for those of COCO's person, and else 1 / K of each.
    coco = Params("keypoints").kpt_oks_sigmas.tolist()
    sigmas = coco if count == len(coco) else [1 / count] * count
    extra = {"keypoints": points, "skeleton": [], "sigmas": sigmas}
    if spec.get("flip_idx"):  # without it, what a mirrored image exchanges is not known
        extra["flip_pairs"] = _flip_pairs(spec["flip_idx"], points, file)
    return [{**category, **extra} for category in categories], (count, shape[1])


def _flip_pairs(flip: Any, points: list[str], file: Path) -> list[list[str]]:
    """Pairs of keypoints that mirroring exchanges, of flip_idx: the index of each one's counterpart."""
    count = len(points)
    if not isinstance(flip, list) or len(flip) != count or any(
        type(j) is not int or not 0 <= j < count or flip[j] != i for i, j in enumerate(flip)
    ):  # fmt: skip
        raise ValueError(f"{file}: flip_idx must exchange pairs of the {count} keypoints, got {flip}")
    return [[points[i], points[j]] for i, j in enumerate(flip) if i < j]


def _places(spec: dict[str, Any], key: str, file: Path) -> list[Path]:
    """Folders or lists of a split, which are relative to ``path``, or to data.yaml wherever it has been moved."""
    value = spec.get(key)
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(entry, str) and entry for entry in values):
        raise ValueError(f"{file}: {key} must name a folder of images, got {value!r}")
    bases = [file.parent / str(spec.get("path") or ""), file.parent]
    out = []
    for entry in values:
        choice = [base / form for base in bases for form in (entry, entry.removeprefix("../"))]
        found = next((path for path in choice if path.exists()), None)
        if found is None:
            raise FileNotFoundError(f"{file}: {key}: there is no {choice[0]}")
        out.append(Path(os.path.abspath(found)))  # labels lie beside links, not beside what they point to
    return out


def _images(place: Path) -> list[Path]:
    if place.is_dir():
        found = [path for path in map(Path, files_below(place)) if path.suffix.lower() in SUFFIXES]
    else:
        lines = [line.strip() for line in text_of(place).splitlines()]
        found = [Path(os.path.abspath(place.parent / line)) for line in lines if line]
    if not found:
        raise FileNotFoundError(f"{place}: there are no images")
    return found


def _label_file(image: Path) -> Path:
    parts = list(image.parts)
    if "images" in parts[:-1]:
        last = len(parts) - 2 - parts[-2::-1].index("images")
        parts[last] = "labels"
    return Path(*parts).with_suffix(".txt")


def _add(builder: CocoBuilder, images: Sequence[Path], root: Path, points: tuple[int, int]) -> None:
    labels = {image: _label_file(image) for image in images}
    if not any(label.is_file() for label in labels.values()):
        raise FileNotFoundError(f"{builder.tally.check}: there is no label file, e.g. {labels[images[0]]}")
    for file, record in builder.add_images(images, root):
        label = labels[file]
        if not label.is_file():
            builder.drop("has no label file: taken as an image without objects", str(file))
            continue
        for number, line in enumerate(text_of(label).splitlines(), start=1):
            if line.strip():
                _add_line(builder, record, line, f"{label}:{number}", points)
    _same_kind(builder)


def _add_line(builder: CocoBuilder, image: dict, line: str, culprit: str, points: tuple[int, int]) -> None:
    try:
        label, *values = map(float, line.split())
    except ValueError:
        builder.drop("is no label: not all are numbers, left out", culprit)
        return
    count, dims = points
    is_polygon = not count and len(values) >= 6 and len(values) % 2 == 0
    if not is_polygon and len(values) != 4 + count * dims:
        wanted = f"4 + {count} x {dims}" if count else "4 (box) or an even number from 6 on (polygon)"
        builder.drop(f"has not {wanted} numbers behind the class, left out", culprit)
        return
    if not label.is_integer() or not 0 <= label < len(builder.categories):
        builder.drop(f"has a class that is none of 0 to {len(builder.categories) - 1}, left out", culprit)
        return
    if not all(map(_is_fraction, values if is_polygon else values[:4])):
        builder.drop("has coordinates that are no fractions of the image, left out", culprit)
        return
    width, height = image["width"], image["height"]
    if is_polygon:
        xs, ys = ([value * side for value in values[i::2]] for i, side in ((0, width), (1, height)))
        corners = min(xs), min(ys), max(xs), max(ys)
        inside = [(min(max(x, 0), width), min(max(y, 0), height)) for x, y in zip(xs, ys)]
        flat = [round(value, 2) for point in inside for value in point]
        more: dict[str, Any] = {"segmentation": [flat], "area": round(_polygon_area(flat), 3)}
    else:
        x, y, w, h = (value * side for value, side in zip(values, (width, height, width, height)))
        corners = x - w / 2, y - h / 2, x + w / 2, y + h / 2
        more = _keypoints(builder, values[4:], dims, image, culprit) if count else {}
    builder.add_object(image, corners, int(label), culprit, **more)


def _is_fraction(value: float) -> bool:
    return -_MARGIN <= value <= 1 + _MARGIN  # not so for NaN


def _keypoints(builder: CocoBuilder, values: Sequence[float], dims: int, image: dict, culprit: str) -> dict[str, Any]:
    """COCO's keypoints; without visibility in the file, (0, 0) is a point that is not there.

    A point that cannot be used becomes one that is not labelled, which is counted.
    """
    out: list[float] = []
    for at in range(0, len(values), dims):
        x, y = values[at : at + 2]
        visible = values[at + 2] if dims == 3 else 2 * bool(x or y)
        point = [0, 0, 0]
        if visible not in (0, 1, 2):
            builder.drop("has a keypoint whose visibility is none of 0, 1 and 2, taken as not labelled", culprit)
        elif visible and not (_is_fraction(x) and _is_fraction(y)):
            builder.drop("has a keypoint that is no fraction of the image, taken as not labelled", culprit)
        elif visible:
            point = [round(x * image["width"], 3), round(y * image["height"], 3), int(visible)]
        out += point
    return {"keypoints": out, "num_keypoints": sum(v > 0 for v in out[2::3])}


def _polygon_area(flat: Sequence[float]) -> float:
    """By the shoelace formula."""
    xs, ys = flat[::2], flat[1::2]
    return abs(sum(x * ys[i - 1] - xs[i - 1] * y for i, (x, y) in enumerate(zip(xs, ys)))) / 2


def _same_kind(builder: CocoBuilder) -> None:
    """Masks of a part of the objects teach nothing: then only boxes stay."""
    with_mask = [a for a in builder.annotations if "segmentation" in a]
    if 0 < len(with_mask) < len(builder.annotations):
        builder.drop(f"has polygons for {len(with_mask)} of {len(builder.annotations)} objects: masks left out, boxes "
                     "stay", builder.tally.check)  # fmt: skip
        for annotation in with_mask:
            del annotation["segmentation"]
            annotation["area"] = round(annotation["bbox"][2] * annotation["bbox"][3], 3)
