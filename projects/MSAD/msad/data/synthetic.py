"""Seeded synthetic scenes as a COCO-format data set with boxes, masks and keypoints.

Small flat shapes lie on a textured ground. What tells the classes apart (the hole of a ring, the corners of a star)
spans only a few pixels on the small objects, so halving the resolution costs accuracy: the case this project is about,
in a data set that is drawn in seconds on any machine.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from ..files import read_whole_json, write_json
from . import shapes
from .scenes import draw_scene

logger = logging.getLogger(__name__)

# Of the scenes of tools/quickstart.py and the videos of tools/streaming_ap.py.
DEMO = {"size": (128, 128), "objects": (3, 7), "min_size": 10.0, "classes": ("disc", "ring", "triangle")}
_FORMAT = 1  # raise when the drawing changes, so that old folders are drawn again


def make_dataset(
    root: str | Path,
    num_train: int,
    num_val: int,
    size: tuple[int, int] = (192, 192),
    seed: int = 0,
    objects: tuple[int, int] = (4, 10),
    min_size: float = 6.0,
    max_fraction: float = 1 / 3,
    classes: Sequence[str] = shapes.CLASSES,
) -> None:
    """Draw the data set into ``root``, unless it is there already with the same parameters.

    Writes ``images/*.jpg``, ``annotations_train.json``, ``annotations_val.json`` and, last, ``dataset.json`` with the
    parameters. Image i of a split depends on ``seed``, i and the other parameters, not on how many images there are.
    Run it in one process (the main one) only.

    Args:
        size: (height, width) of every image in pixels.
        objects: least and greatest number of objects that are tried in an image; some find no room.
        min_size: diameter of the smallest objects in pixels.
        max_fraction: diameter of the largest objects as a fraction of the image's short side.
        classes: names in ``shapes.CLASSES``.
    """
    root = Path(root)
    scene = {
        "size": list(size),
        "seed": seed,
        "objects": list(objects),
        "min_size": min_size,
        "max_fraction": max_fraction,
        "classes": list(classes),
    }
    parameters = dict(format=_FORMAT, num_train=num_train, num_val=num_val, **scene)
    check_drawing(parameters, {"num_train and num_val must not be negative": min(num_train, num_val) >= 0})
    stamp = root / "dataset.json"
    if read_whole_json(stamp) == parameters:
        return
    # Without the stamp a run that is killed half-way is not taken for a complete data set.
    stamp.unlink(missing_ok=True)
    images = root / "images"
    images.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        for old in images.glob(f"{split}_*.jpg"):
            old.unlink()
    logger.info("Drawing %d + %d synthetic scenes of %dx%d into %s", num_train, num_val, *size, root)
    for split, count in (("train", num_train), ("val", num_val)):
        _write_split(root, split, count, scene)
    write_json(stamp, parameters, indent=None)


def register_entries(root: str | Path, prefix: str = "synthetic") -> list[dict]:
    """The entries of ``DATASETS.REGISTER`` for ``{prefix}_train`` and ``{prefix}_val`` of a data set in ``root``."""
    root = Path(root).absolute()
    return [
        {"NAME": f"{prefix}_{s}", "JSON": str(root / f"annotations_{s}.json"), "IMAGES": str(root / "images")}
        for s in ("train", "val")
    ]


def _write_split(root: Path, split: str, count: int, scene: dict) -> None:
    drawing = {k: v for k, v in scene.items() if k != "seed"}
    images, annotations = [], []
    for index in range(count):
        rng = np.random.default_rng((scene["seed"], int(split == "val"), index))
        image, objects = draw_scene(rng, **drawing)
        name = f"{split}_{index:06d}.jpg"
        if not cv2.imwrite(str(root / "images" / name), image, [cv2.IMWRITE_JPEG_QUALITY, 93]):
            raise OSError(f"cannot write {root / 'images' / name}")
        images.append({"id": index + 1, "file_name": name, "height": image.shape[0], "width": image.shape[1]})
        for record in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": index + 1, **record})
    write_json(
        root / f"annotations_{split}.json",
        {
            "info": {"description": f"MSAD synthetic scenes, {split}, seed {scene['seed']}"},
            "images": images,
            "annotations": annotations,
            "categories": [_category(i, name) for i, name in enumerate(scene["classes"], start=1)],
        },
        indent=None,
    )


def _category(number: int, name: str) -> dict:
    return {
        "id": number,
        "name": name,
        "supercategory": "shape",
        "keypoints": list(shapes.KEYPOINTS),
        "skeleton": [list(pair) for pair in shapes.SKELETON],
        "flip_pairs": [list(pair) for pair in shapes.FLIP_PAIRS],
        "sigmas": list(shapes.KEYPOINT_SIGMAS),
    }


def check_drawing(parameters: dict, conditions: dict[str, bool]) -> None:
    """ValueError that says which of ``conditions`` or of those of a scene does not hold."""
    (height, width), (least, most) = parameters["size"], parameters["objects"]
    conditions = conditions | {
        "seed must not be negative": parameters["seed"] >= 0,
        "objects must be (least, most) with 1 <= least <= most": 1 <= least <= most,
        "min_size must be at least 4 pixels": parameters["min_size"] >= 4,
        "max_fraction must be in (0, 1] and allow objects of min_size": (
            parameters["max_fraction"] <= 1
            and parameters["max_fraction"] * min(height, width) >= parameters["min_size"]
        ),
    }
    conditions[f"classes must be different ones of {', '.join(shapes.CLASSES)}"] = (
        0 < len(parameters["classes"]) == len(set(parameters["classes"]) & set(shapes.CLASSES))
    )
    for message, holds in conditions.items():
        if not holds:
            raise ValueError(f"synthetic data set: {message}; got {parameters}")
