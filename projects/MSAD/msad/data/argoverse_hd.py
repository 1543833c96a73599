"""``TYPE: argoverse_hd``: videos in the json format of Argoverse-HD, for detection and streaming perception.

COCO's format with sequences: ``sequences`` (names) and ``seq_dirs`` (folder of each) at top level; of an image ``sid``
(index of its sequence), ``fid`` (frame number) and ``name`` instead of ``file_name``. Category ids begin at 0.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from .coco_file import check_content, read_coco
from .dataset_types import DATASET_TYPE_REGISTRY, PATH, add_dataset, check_entry, keep_findings, set_metadata
from .tally import Tally, raise_errors


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
    """The annotation file as COCO's format wants it, see :func:`msad.data.coco_file.check_content`.

    Images have ``file_name``. No annotation has the id 0, by which pycocotools marks what was not found (the official
    numbers are computed with this defect: one object of the set). Without annotations there is no such list.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON or not in this format; names the file and what is wrong.
    """
    return _read(os.fspath(json_file))[0]


def _read(file: str) -> tuple[dict[str, Any], Tally]:
    """:func:`read_content`, and what is found in it."""
    if not PathManager.isfile(file):
        raise FileNotFoundError(f"Argoverse-HD: no such file: {file}")
    content = read_coco(file)
    for section in ("sequences", "seq_dirs"):
        texts = content.get(section)
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{file} is not in Argoverse-HD's format: it has no list {section!r} of texts")
    count = len(content["sequences"])
    if count != len(content["seq_dirs"]):
        raise ValueError(f"{file}: {count} sequences, but {len(content['seq_dirs'])} seq_dirs")
    for image in content["images"]:
        who = f"{file}: image {image.get('id')}"
        for key in ("sid", "fid", "name"):
            if key not in image:
                raise ValueError(f"{who} has no {key!r}")
            if not (isinstance(image[key], str) if key == "name" else type(image[key]) is int):
                wanted = "a text" if key == "name" else "a whole number"
                raise ValueError(f"{who} has {key} {image[key]!r}, not {wanted}")
        if not 0 <= image["sid"] < count:
            raise ValueError(f"{who} is of sequence {image['sid']}, which does not exist")
        image["file_name"] = os.path.join(content["seq_dirs"][image["sid"]], image["name"])
    tally = check_content(content, file)
    raise_errors(tally.findings())
    del content["repaired"]
    return content, tally


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
    """Dataset dicts of one entry, with "sequence" and "frame"; completes the metadata."""
    content, tally = _read(entry["JSON"])
    if not os.path.isdir(entry["IMAGES"]):
        raise FileNotFoundError(f"data set {entry['NAME']!r}: IMAGES: no such folder: {entry['IMAGES']}")
    classes = {category: index for index, category in enumerate(category_ids(content))}
    names = {category["id"]: category["name"] for category in content["categories"]}
    set_metadata(
        entry["NAME"],
        thing_classes=[names[category] for category in classes],
        thing_dataset_id_to_contiguous_id=classes,
    )
    keep_findings(entry["NAME"], tally)
    annotations: dict[int, list[dict]] = {image["id"]: [] for image in content["images"]}
    for annotation in content.get("annotations", ()):
        annotations[annotation["image_id"]].append(
            {
                "bbox": [float(value) for value in annotation["bbox"]],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": classes[annotation["category_id"]],
                "iscrowd": int(annotation["iscrowd"]),
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
