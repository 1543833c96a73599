"""``TYPE: argoverse_hd``: videos in the json format of Argoverse-HD, for detection and streaming perception.

COCO's format with sequences: ``sequences`` (names) and ``seq_dirs`` (folder of each) at top level; of an image ``sid``
(index of its sequence), ``fid`` (frame number) and ``name`` instead of ``file_name``. Category ids begin at 0.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from .dataset_types import DATASET_TYPE_REGISTRY, PATH, add_dataset, check_entry

_SECTIONS = ("images", "annotations", "categories", "sequences", "seq_dirs")


@dataclass(frozen=True)
class Sequence:
    """A video: its name, the ids of its images in the order of the frames, and frames per second."""

    name: str
    image_ids: tuple[int, ...]
    fps: float


@DATASET_TYPE_REGISTRY.register()
def argoverse_hd(name: str, entry: dict[str, Any]) -> None:
    """Boxes in Argoverse-HD's format, evaluated by COCO's metrics.

    Keys of the entry: ``JSON``, the annotation file, and ``IMAGES``, the folder that ``seq_dirs`` are relative to.
    """
    entry = check_entry(entry, {"JSON": PATH, "IMAGES": PATH})
    add_dataset(name, entry, functools.partial(_load, entry), evaluator_type="argoverse_hd")


def read_content(json_file: str | os.PathLike) -> dict[str, Any]:
    """The annotation file as COCO's format wants it: images have ``file_name``, no annotation has the id 0.

    pycocotools marks a match by the id of the ground truth, so that an object of id 0 would never be found; if there
    is one, all ids are one higher (the official numbers are computed with this defect: one object of the set).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON or not in this format; names the file and what is missing.
    """
    if not PathManager.isfile(os.fspath(json_file)):
        raise FileNotFoundError(f"Argoverse-HD: no such file: {json_file}")
    with PathManager.open(os.fspath(json_file), "r") as file:
        try:
            content = json.load(file)
        except ValueError as error:
            raise ValueError(f"{json_file} is not valid JSON: {error}") from None
    for section in _SECTIONS:
        if not isinstance(content, dict) or not isinstance(content.get(section), list):
            raise ValueError(f"{json_file} is not in Argoverse-HD's format: it has no list {section!r}")
    if len(content["sequences"]) != len(content["seq_dirs"]):
        raise ValueError(
            f"{json_file}: {len(content['sequences'])} sequences, but {len(content['seq_dirs'])} seq_dirs"
        )
    for image in content["images"]:
        for key in ("id", "sid", "fid", "name", "width", "height"):
            if key not in image:
                raise ValueError(f"{json_file}: image {image.get('id')} has no {key!r}")
        if not 0 <= image["sid"] < len(content["sequences"]):
            raise ValueError(f"{json_file}: image {image['id']} is of sequence {image['sid']}, which does not exist")
        image["file_name"] = os.path.join(content["seq_dirs"][image["sid"]], image["name"])
    known = {"image_id": {i["id"] for i in content["images"]}, "category_id": {c["id"] for c in content["categories"]}}
    shift = any(annotation.get("id") == 0 for annotation in content["annotations"])
    for annotation in content["annotations"]:
        for key, values in known.items():
            if annotation.get(key) not in values:
                raise ValueError(
                    f"{json_file}: annotation {annotation.get('id')} has {key} {annotation.get(key)!r}, "
                    "which is not listed"
                )
        annotation["id"] += shift
        annotation["iscrowd"] = int(annotation.get("iscrowd", 0))
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
    return content


def sequences_of(content: dict[str, Any], fps: float | None = None) -> list[Sequence]:
    """The videos of a file, frames in order.

    Args:
        content: of :func:`read_content`.
        fps: frames per second; None: the images' ``frame_rate``, or 30 (Argoverse-HD's) where they have none.

    Raises:
        ValueError: two frames have the same number, or the frame rates of a sequence differ.
    """
    found = []
    for sid, name in enumerate(content["sequences"]):
        images = sorted((image for image in content["images"] if image["sid"] == sid), key=lambda image: image["fid"])
        if not images:
            continue
        if len({image["fid"] for image in images}) < len(images):
            raise ValueError(f"sequence {name!r} has two images of one frame (fid)")
        rates = {image.get("frame_rate", 30) for image in images} if fps is None else {fps}
        if len(rates) > 1 or min(rates) <= 0:
            raise ValueError(f"sequence {name!r} needs one positive frame rate, got {sorted(rates)}")
        found.append(Sequence(name, tuple(image["id"] for image in images), float(rates.pop())))
    return found


def category_ids(content: dict[str, Any]) -> list[int]:
    """Category id of each class of a model trained on the file: ascending."""
    return sorted(category["id"] for category in content["categories"])


def _load(entry: dict[str, Any]) -> list[dict]:
    """Dataset dicts of one entry, with "sequence" and "frame"; fills in the metadata of the classes."""
    content = read_content(entry["JSON"])
    if not os.path.isdir(entry["IMAGES"]):
        raise FileNotFoundError(f"data set {entry['NAME']!r}: IMAGES: no such folder: {entry['IMAGES']}")
    classes = {category: index for index, category in enumerate(category_ids(content))}
    names = {category["id"]: category["name"] for category in content["categories"]}
    metadata = MetadataCatalog.get(entry["NAME"])
    metadata.thing_classes = [names[category] for category in classes]
    metadata.thing_dataset_id_to_contiguous_id = classes
    annotations: dict[int, list[dict]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        annotations[annotation["image_id"]].append(
            {
                "bbox": [float(value) for value in annotation["bbox"]],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": classes[annotation["category_id"]],
                "iscrowd": annotation["iscrowd"],
            }
        )
    return [
        {
            "file_name": str(Path(entry["IMAGES"]) / image["file_name"]),
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
            "sequence": content["sequences"][image["sid"]],
            "frame": image["fid"],
            "annotations": annotations[image["id"]],
        }
        for image in content["images"]
    ]
