"""Videos of synthetic scenes in Argoverse-HD's form: a camera that moves over a scene larger than its frames."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from ..files import read_whole_json, write_json
from . import shapes
from .scenes import draw_scene
from .synthetic import check_drawing

_FORMAT = 1  # raise when the drawing changes, so that old folders are drawn again
_LARGER = 2  # sides of the scene over those of a frame
_LEAST_INSIDE = 0.35  # of a box, for the object to count in a frame


def make_videos(
    root: str | Path, count: int = 6, frames: int = 60, size: tuple[int, int] = (128, 128), speed: float = 3.0,
    seed: int = 0, objects: tuple[int, int] = (3, 7), min_size: float = 10.0, max_fraction: float = 1 / 3,
    classes: Sequence[str] = shapes.CLASSES,
) -> dict:
    """Draw videos into ``root``, unless they are there already with the same parameters.

    They run at 30 frames a second. Writes ``images/VIDEO/FRAME.jpg`` and, last, ``annotations.json``. Video i depends
    on ``seed``, i and the other parameters, not on how many videos there are.

    Args:
        size: (height, width) of a frame in pixels.
        speed: of the camera in pixels a frame; at the scene's borders it turns back.
        objects: least and greatest number of objects that are tried for the area of a frame.
        min_size: diameter of the smallest objects in pixels.
        max_fraction: diameter of the largest objects as a fraction of the frame's short side.
        classes: names in ``shapes.CLASSES``.

    Returns:
        the entry of ``DATASETS.REGISTER``, "synthetic_videos".

    Raises:
        ValueError: a parameter is out of its range; names it.
    """
    root = Path(root).absolute()
    frame = {
        "size": list(size), "objects": list(objects), "min_size": min_size, "max_fraction": max_fraction,
        "classes": list(classes),
    }  # fmt: skip
    parameters = {"format": _FORMAT, "count": count, "frames": frames, "speed": speed, "seed": seed, **frame}
    check_drawing(parameters, {
        "count and frames must be positive": min(count, frames) > 0, "speed must not be negative": speed >= 0,
    })  # fmt: skip
    drawing = frame | {
        "size": [_LARGER * side for side in size], "objects": [_LARGER**2 * number for number in objects],
        "max_fraction": max_fraction / _LARGER,
    }  # fmt: skip
    entry = {"NAME": "synthetic_videos", "TYPE": "argoverse_hd", "JSON": str(root / "annotations.json"),
             "IMAGES": str(root / "images")}  # fmt: skip
    if (read_whole_json(root / "annotations.json") or {}).get("info") == parameters:
        return entry
    (root / "annotations.json").unlink(missing_ok=True)
    shutil.rmtree(root / "images", ignore_errors=True)
    names = [f"video_{index:03d}" for index in range(count)]
    images, annotations = [], []
    for index, name in enumerate(names):
        (root / "images" / name).mkdir(parents=True)
        rng = np.random.default_rng((seed, index))
        scene, records = draw_scene(rng, **drawing)
        for number, (x, y) in enumerate(_path(rng, frames, speed, size)):
            file = root / "images" / name / f"{number:04d}.jpg"
            if not cv2.imwrite(str(file), scene[y : y + size[0], x : x + size[1]], [cv2.IMWRITE_JPEG_QUALITY, 93]):
                raise OSError(f"cannot write {file}")
            image = {"id": len(images), "sid": index, "fid": number, "name": file.name}
            images.append({**image, "height": size[0], "width": size[1]})
            for box, record in _inside(records, (x, y), size):
                annotations.append({
                    "id": len(annotations) + 1, "image_id": image["id"], "category_id": record["category_id"] - 1,
                    "bbox": box, "area": box[2] * box[3], "iscrowd": 0,
                })  # fmt: skip
    categories = [{"id": i, "name": name} for i, name in enumerate(classes)]
    write_json(root / "annotations.json", {
        "info": parameters, "sequences": names, "seq_dirs": names, "categories": categories,
        "images": images, "annotations": annotations,
    }, indent=None)  # fmt: skip
    return entry


def _path(rng: np.random.Generator, frames: int, speed: float, size: tuple[int, int]) -> np.ndarray:
    """(frames, 2) whole x and y of the frames' left upper corners in the scene: a line, reflected at the borders."""
    room = (_LARGER - 1) * np.array([size[1], size[0]], float)
    angle = rng.uniform(0, 2 * np.pi)
    way = rng.uniform((0, 0), room) + speed * np.arange(frames)[:, None] * [np.cos(angle), np.sin(angle)]
    return np.floor(room - np.abs(way % (2 * room) - room)).astype(int)


def _inside(records: list[dict], corner: Sequence[int], size: tuple[int, int]):
    """(box in the frame (left, top, width, height), record) of the objects that are there."""
    for record in records:
        x, y, width, height = record["bbox"]
        low = np.clip([x - corner[0], y - corner[1]], 0, size[::-1])
        high = np.clip([x + width - corner[0], y + height - corner[1]], 0, size[::-1])
        extent = high - low
        if extent.prod() >= _LEAST_INSIDE * width * height:
            yield [round(float(v), 2) for v in (*low, *extent)], record
