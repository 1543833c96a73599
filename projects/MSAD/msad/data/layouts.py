"""Find the images and annotations of a folder of detection data, whatever tool has laid it out."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import NamedTuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..files import atomic_write
from ..finding import Finding
from .cache import cache_file
from .converted import CocoBuilder
from .register import registered
from .tally import raise_errors
from .voc import find_voc, read_voc
from .yolo import read_yolo

logger = logging.getLogger(__name__)

LAYOUTS = """\
  images/, annotations_train.json, annotations_val.json
  train/_annotations.coco.json, valid/_annotations.coco.json, images beside them (Roboflow's "COCO" export)
  annotations/instances_train*.json, annotations/instances_val*.json, images in train*/, val*/ (COCO)
  data.yaml, images and labels where it says (YOLO: boxes, polygons or keypoints)
  Annotations/*.xml, JPEGImages/, ImageSets/Main/train.txt, val.txt (Pascal VOC), or train/*.xml, valid/*.xml"""


class Split(NamedTuple):
    """A part of a data set: its annotations in COCO's format, the folder of its images, and what conversion changed."""

    json: Path
    images: Path
    changes: tuple[Finding, ...] = ()


def find_splits(folder: Path, converted: Path | None = None) -> dict[str, Split]:
    """{"train": ..., "val": ...} of a folder in one of LAYOUTS.

    Args:
        folder: or the data.yaml of YOLO.
        converted: where annotations of other formats than COCO's are written to; default: the user's cache, nothing is
            written beside the data.

    Raises:
        FileNotFoundError: there is no such folder, or it is in none of the layouts; names what is missing and LAYOUTS.
        ValueError: a file is not in the format of its layout, or there are several for a split.
    """
    if folder.is_file() and folder.suffix in (".yaml", ".yml"):
        return _convert(read_yolo(folder), folder, converted)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    plain = {split: Split(folder / f"annotations_{split}.json", folder / "images") for split in ("train", "val")}
    if any(split.json.is_file() for split in plain.values()):
        return _complete(folder, plain)
    names = {"train": ("train",), "val": ("valid", "val", "test")}
    files = {s: [folder / n / "_annotations.coco.json" for n in choice] for s, choice in names.items()}
    if any(file.is_file() for choice in files.values() for file in choice):
        found = {s: next((f for f in choice if f.is_file()), choice[0]) for s, choice in files.items()}
        return _complete(folder, {s: Split(f, f.parent) for s, f in found.items()})
    coco = {s: sorted((folder / "annotations").glob(f"instances_{s}*.json")) for s in ("train", "val")}
    if any(coco.values()):
        if several := next((found for found in coco.values() if len(found) > 1), None):
            names = ", ".join(file.name for file in several)
            raise ValueError(f"{folder / 'annotations'}: several files for one split, {names}: leave one of them there")
        chosen = {s: (f or [folder / "annotations" / f"instances_{s}.json"])[0] for s, f in coco.items()}
        return _complete(folder, {s: Split(f, _coco_images(folder, f)) for s, f in chosen.items()})
    if (folder / "data.yaml").is_file():
        return _convert(read_yolo(folder / "data.yaml"), folder, converted)
    if parts := find_voc(folder):
        return _convert(read_voc(parts), folder, converted)
    raise FileNotFoundError(f"{folder} is in none of the layouts that are known:\n{LAYOUTS}")


def _convert(parts: dict[str, tuple[Path, CocoBuilder]], source: Path, converted: Path | None) -> dict[str, Split]:
    """Write annotations that were read from another format; a file with the same content stays untouched."""
    raise_errors(finding for _, builder in parts.values() for finding in builder.findings())
    key = hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:32]
    splits = {}
    for split, (images, builder) in parts.items():
        file = converted / f"annotations_{split}.json" if converted else cache_file(f"converted-{key}-{split}.json")
        text = json.dumps(builder.content())
        if not file.is_file() or file.read_text() != text:
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(file, "w", shared=True) as stream:
                stream.write(text)
        splits[split] = Split(file, images, builder.findings())
    return splits


def _coco_images(folder: Path, file: Path) -> Path:
    """train2017/ or images/train2017/ of instances_train2017.json; images/ if neither is there."""
    name = file.stem.removeprefix("instances_")
    choice = [folder / name, folder / "images" / name, folder / "images"]
    return next((path for path in choice if path.is_dir()), choice[0])


def _complete(folder: Path, splits: dict[str, Split]) -> dict[str, Split]:
    for split in splits.values():
        for path, exists in ((split.json, split.json.is_file()), (split.images, split.images.is_dir())):
            if not exists:
                missing = f"there is no {path.relative_to(folder)} in it"
                raise FileNotFoundError(f"{folder}: {missing}; the layouts that are known:\n{LAYOUTS}")
    return splits


def register_entries(folder: Path, prefix: str, converted: Path | None = None) -> list[dict]:
    """The entries of DATASETS.REGISTER for ``{prefix}_train`` and ``{prefix}_val`` of a folder in one of LAYOUTS.

    Entries that outlive this process need a folder ``converted`` of their own (see :func:`find_splits`): the user's
    cache may be cleared. What conversion from another format than COCO's left out or changed is logged as warnings.

    Raises:
        FileNotFoundError, ValueError: see :func:`find_splits`.
    """
    splits = find_splits(folder, converted)
    for finding in (finding for split in splits.values() for finding in split.changes):
        logger.warning("%s", finding)
    return entries_of(splits, prefix)


def entries_of(splits: dict[str, Split], prefix: str) -> list[dict]:
    """The entries of DATASETS.REGISTER for splits, named ``{prefix}_train`` and ``{prefix}_val``."""
    return [
        {"NAME": f"{prefix}_{name}", "JSON": str(split.json.resolve()), "IMAGES": str(split.images.resolve())}
        for name, split in splits.items()
    ]


def read_contents(entries: list[dict]) -> tuple[dict, dict[str, list[dict]]]:
    """What the data sets of ``entries`` hold, and their dataset dicts by name.

    Returns:
        {"classes": names, "masks": whether there are, "keypoints": number}; name -> dataset dicts.

    Raises:
        ValueError: a file is not in COCO's format; names file and record.
    """
    train, val = ((entry["NAME"],) for entry in entries)
    with registered(CfgNode({"DATASETS": {"REGISTER": entries, "TRAIN": train, "TEST": val}})):
        loaded = {entry["NAME"]: DatasetCatalog.get(entry["NAME"]) for entry in entries}
        annotations = (a for records in loaded.values() for record in records for a in record.get("annotations", ()))
        metadata = MetadataCatalog.get(entries[0]["NAME"])
        return {
            "classes": list(metadata.thing_classes),
            "masks": any("segmentation" in a for a in annotations),
            "keypoints": len(metadata.get("keypoint_names", ())),
        }, loaded
