"""``TYPE: coco_sem_seg``: the masks of a COCO file as label maps, a class for every pixel."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager

from .cache import file_sha256
from .coco_annotations import bitmap
from .coco_file import check_content, read_coco
from .dataset_types import DATASET_TYPE_REGISTRY, PATH, TEXT, add_dataset, check_entry, keep_findings, set_metadata
from .label_maps import cached_label_map
from .tally import raise_errors

KEYS = {"JSON": PATH, "IMAGES": PATH, "BACKGROUND": TEXT.optional()}
IGNORED = 255
_VERSION = 2  # raise when maps are drawn otherwise, so that old ones are not used any more


@DATASET_TYPE_REGISTRY.register()
def coco_sem_seg(name: str, entry: dict[str, Any]) -> None:
    """Instance masks in COCO's format, trained on and evaluated as semantic segmentation.

    The classes are the background, 0, and the categories by ascending id. Where masks overlap the smaller one counts;
    crowd regions are ignored (255). Label maps are drawn when the set is first used, into the user's cache folder.

    Keys of the entry:

    - ``JSON``, ``IMAGES``: annotation file, image folder.
    - ``BACKGROUND``: name of the class of all other pixels, "background".
    """
    entry = check_entry(entry, KEYS)
    metadata = {"image_root": entry["IMAGES"], "evaluator_type": "sem_seg", "ignore_label": IGNORED}
    add_dataset(name, entry, functools.partial(_load, entry), **metadata)


def _load(entry: dict[str, Any]) -> list[dict]:
    """Dataset dicts of one entry; completes the metadata.

    Raises:
        FileNotFoundError: the file or folder of the entry is not there.
        ValueError: the file is not what COCO's format says, has an object without mask, or other classes than the
            training set; names it.
    """
    name, file = entry["NAME"], entry["JSON"]
    for key, exists in (("JSON", PathManager.isfile), ("IMAGES", PathManager.isdir)):
        if not exists(entry[key]):
            raise FileNotFoundError(f"data set {name!r}: DATASETS.REGISTER: {key}: not found: {entry[key]}")
    try:
        content = read_coco(file)
        tally = check_content(content, file, masks=True)
        raise_errors(tally.findings())
        categories = sorted(content["categories"], key=lambda category: category["id"])
        classes = [entry.get("BACKGROUND", "background"), *(category["name"] for category in categories)]
        _check_classes(name, file, classes)
        objects: dict[int, list[dict]] = {}
        for a in content.get("annotations", ()):
            objects.setdefault(a["image_id"], []).append(a)
    except ValueError as error:
        raise ValueError(f"data set {name!r}: {error}") from None
    labels = {category["id"]: index for index, category in enumerate(categories, start=1)}
    set_metadata(name, stuff_classes=classes)
    keep_findings(name, tally)
    digest = file_sha256(file)
    return [
        {
            "file_name": os.path.join(entry["IMAGES"], image["file_name"]),
            "sem_seg_file_name": cached_label_map(
                f"coco {_VERSION} {digest} {image['id']}",
                functools.partial(draw_labels, objects.get(image["id"], []), labels, image["height"], image["width"]),
            ),
            "image_id": image["id"], "width": image["width"], "height": image["height"],
        }
        for image in content["images"]
    ]  # fmt: skip


def _check_classes(name: str, file: str, classes: list[str]) -> None:
    if len(classes) > IGNORED:
        raise ValueError(f"{file} has {len(classes) - 1} categories; label maps of 8 bits hold {IGNORED - 1}")
    other = MetadataCatalog.get(name).get("classes_like")
    wanted = other and MetadataCatalog.get(other).get("stuff_classes")
    if wanted and classes != wanted:
        raise ValueError(f"{file} has the classes {classes}, those of {other!r} are {wanted}")


def draw_labels(objects: Sequence[dict], labels: dict[int, int], height: int, width: int) -> np.ndarray:
    """(height, width) uint8: the label of the smallest object at each pixel, 255 in crowd regions, 0 elsewhere.

    Args:
        objects: COCO annotations of one image, with ``area``.
        labels: by category id.
    """
    drawn = np.zeros((height, width), np.uint8)
    # Crowd regions first: what is an object inside of one is known.
    for a in sorted(objects, key=lambda a: (not a.get("iscrowd"), -a["area"])):
        label = IGNORED if a.get("iscrowd") else labels[a["category_id"]]
        drawn[bitmap(a["segmentation"], height, width)] = label
    return drawn
