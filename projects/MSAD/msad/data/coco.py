"""``TYPE: coco``: data sets in COCO's annotation format."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..finding import OK
from .cache import cache_file, file_sha256, write_cache
from .coco_annotations import compressed
from .coco_file import check_content, read_coco
from .dataset_types import (
    DATASET_TYPE_REGISTRY,
    NAMES,
    PATH,
    Key,
    add_dataset,
    check_entry,
    is_names,
    keep_findings,
    set_metadata,
)
from .keypoints import keypoint_metadata
from .label_maps import readable_label_map
from .tally import Tally, raise_errors

KEYS = {
    "JSON": PATH,
    "IMAGES": PATH,
    "LOW_RES_IMAGES": PATH.optional(),
    "STUFF": PATH.optional(),
    "CLASSES": NAMES.optional(),
    "KEYPOINT_FLIP_PAIRS": Key(
        lambda v: isinstance(v, (list, tuple)) and all(is_names(p) and len(p) == 2 for p in v),
        "a list of pairs of keypoint names",
        required=False,
    ),
    "KEYPOINT_SIGMAS": Key(
        lambda v: isinstance(v, (list, tuple)) and all(isinstance(s, (int, float)) and s > 0 for s in v),
        "a list of positive numbers",
        required=False,
    ),
}
# Raise when the content of repaired files changes, so that old ones are not used any more.
_REPAIR_VERSION = 2


@DATASET_TYPE_REGISTRY.register()
def coco(name: str, entry: dict[str, Any]) -> None:
    """Boxes, masks and keypoints in COCO's format, evaluated by COCO's metrics.

    Keys of the entry:

    - ``JSON``, ``IMAGES``: annotation file, image folder.
    - ``LOW_RES_IMAGES``: folder of the student's own images, with the names of those in ``IMAGES``.
    - ``STUFF``: folder of label maps of things and stuff, PNG files with the names of the images, which HTC's semantic
      branch is trained on: values 0, 1, ... are its classes (COCO's ``stuffthingmaps``: 0 to 182), 255 is ignored.
    - ``CLASSES``: category names by ascending category id. Known before the file is read, and compared with it.
    - ``KEYPOINT_FLIP_PAIRS``: pairs of keypoint names that change places in a mirrored image. Without it the category
      records of the file say so (``flip_pairs``), else names that differ in their side (left, right; l, r) are paired.
    - ``KEYPOINT_SIGMAS``: one OKS sigma a keypoint, kept as ``keypoint_oks_sigmas`` in the metadata; without it the
      category records' ``sigmas``, if any.
    """
    entry = check_entry(entry, KEYS)
    metadata = {"json_file": entry["JSON"], "image_root": entry["IMAGES"], "evaluator_type": "coco"}
    if "CLASSES" in entry:
        metadata["thing_classes"] = list(entry["CLASSES"])
    add_dataset(name, entry, functools.partial(_load, entry), **metadata)


def _load(entry: dict[str, Any]) -> list[dict]:
    """Dataset dicts of one entry; completes the metadata.

    Raises:
        FileNotFoundError: a file or folder of the entry is not there.
        ValueError: the file is not what COCO's format says; names file and record.
    """
    name = entry["NAME"]
    for key in ("JSON", "IMAGES", "LOW_RES_IMAGES", "STUFF"):
        kind, exists = ("file", PathManager.isfile) if key == "JSON" else ("folder", PathManager.isdir)
        if key in entry and not exists(entry[key]):
            raise FileNotFoundError(f"data set {name!r}: DATASETS.REGISTER: {key}: no such {kind}: {entry[key]}")
    try:
        content = read_coco(entry["JSON"])
        tally = check_content(content, entry["JSON"])
        raise_errors(tally.findings())
        categories = _classes(entry, content, tally)
        points = keypoint_metadata(entry, categories)
    except ValueError as error:
        raise ValueError(f"data set {name!r}: {error}") from None
    contiguous = {category["id"]: index for index, category in enumerate(categories)}
    if content["repaired"]:
        set_metadata(name, json_file=_write_repaired(content, categories, contiguous, entry["JSON"]))
    set_metadata(
        name,
        thing_classes=[category["name"] for category in categories],
        # The ids in the file that detections are evaluated with.
        thing_dataset_id_to_contiguous_id=(
            {index + 1: index for index in contiguous.values()} if content["repaired"] else contiguous
        ),
        **points,
    )
    keep_findings(name, tally)
    return _records(entry, content, contiguous)


def _classes(entry: dict[str, Any], content: dict[str, Any], tally: Tally) -> list[dict]:
    """The category records in the order of the contiguous ids.

    That is the order of their ids, or that of the training set's classes, if this set is to follow it.
    """
    categories = _own_classes(entry, content)
    if len(categories) < len(content["categories"]):
        content["repaired"] = True
        (left_out,) = (c["name"] for c in content["categories"] if c not in categories)
        reason = f"the category {left_out!r} with id 0 is only the others' supercategory and is no class"
        tally.add(OK, reason, entry["JSON"] + ":", "")
    other = MetadataCatalog.get(entry["NAME"]).get("classes_like")
    wanted = other and known_classes(other)
    found = [category["name"] for category in categories]
    if not wanted or found == wanted:
        return categories
    used = {a["category_id"] for a in content.get("annotations", ())}
    extra = [c["name"] for c in categories if c["name"] not in wanted and c["id"] in used]
    if extra or len(set(found)) < len(found):
        reason = f"has the class {extra[0]!r}, which {other!r} has not" if extra else "has a class twice"
        raise ValueError(f"{entry['JSON']} {reason}: classes {found}, those of {other!r} are {wanted}")
    content["repaired"] = True
    reason = f"has the classes {found}; they are mapped by name to those of {other!r}, {wanted}"
    tally.add(OK, reason, entry["JSON"], "")
    by_name, unused = {c["name"]: c for c in categories}, 1 + max(c["id"] for c in content["categories"])
    return [by_name.get(name) or {"id": unused + index, "name": name} for index, name in enumerate(wanted)]


def _own_classes(entry: dict[str, Any], content: dict[str, Any]) -> list[dict]:
    """The file's categories by ascending id, compared with CLASSES.

    Roboflow writes a category 0 that no annotation has and that all others name as their supercategory. It is left out,
    unless CLASSES have it.
    """
    categories, declared = sorted(content["categories"], key=lambda category: category["id"]), entry.get("CLASSES")
    first, *others = categories
    if first["id"] == 0 and others and declared != [c["name"] for c in categories]:
        used = any(a["category_id"] == 0 for a in content.get("annotations", ()))
        if not used and all(c.get("supercategory") == first["name"] for c in others):
            categories = others
    found = [category["name"] for category in categories]
    if declared is not None and list(declared) != found:
        raise ValueError(f"CLASSES are {list(declared)}, but {entry['JSON']} has by ascending id {found}")
    return categories


def known_classes(name: str) -> list[str] | None:
    """The classes of a registered data set, from its file if need be; None if they cannot be known here."""
    metadata = MetadataCatalog.get(name)
    entry = metadata.get("definition") or {}
    if metadata.get("thing_classes") is not None:
        return list(metadata.thing_classes)
    if entry.get("TYPE", "coco") != "coco" or not PathManager.isfile(entry.get("JSON", "")):
        return None
    try:
        content = read_coco(entry["JSON"])
        raise_errors(check_content(content, entry["JSON"]).findings())
        return [category["name"] for category in _own_classes(entry, content)]
    except ValueError:  # what is wrong with it is said where it is loaded
        return None


def _write_repaired(content: dict[str, Any], categories: list[dict], contiguous: dict[int, int], file: str) -> str:
    """The annotations as they are used, for COCO's evaluation, which reads a file. Category ids are 1, 2, 3, ..."""
    classes = [category["name"] for category in categories]
    key = hashlib.sha256(json.dumps([_REPAIR_VERSION, file_sha256(file), classes]).encode()).hexdigest()[:32]
    name = f"annotations-{key}.json"
    if not cache_file(name).is_file():
        kept = {k: v for k, v in content.items() if k != "repaired"} | {"info": content.get("info", {})}
        kept["categories"] = [{**category, "id": index + 1} for index, category in enumerate(categories)]
        if "annotations" in content:
            kept["annotations"] = [
                {**a, "category_id": contiguous[a["category_id"]] + 1} for a in content["annotations"]
            ]
        write_cache(name, kept)
    return str(cache_file(name))


def _records(entry: dict[str, Any], content: dict[str, Any], contiguous: dict[int, int]) -> list[dict]:
    """detectron2's dataset dicts, by ascending image id."""
    by_image: dict[int, list[dict]] = {image["id"]: [] for image in content["images"]}
    for annotation in content.get("annotations", ()):
        by_image[annotation["image_id"]].append(_convert(annotation, contiguous))
    records = []
    for image in sorted(content["images"], key=lambda image: image["id"]):
        record = {
            "file_name": os.path.join(entry["IMAGES"], image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": by_image[image["id"]],
        }
        if "LOW_RES_IMAGES" in entry:
            record["low_res_file_name"] = os.path.join(entry["LOW_RES_IMAGES"], image["file_name"])
        if "STUFF" in entry:
            record["sem_seg_file_name"] = os.path.join(entry["STUFF"], os.path.splitext(image["file_name"])[0] + ".png")
        records.append(record)
    if "STUFF" in entry:
        _read_label_maps(entry, records)
    return records


def _read_label_maps(entry: dict[str, Any], records: list[dict]) -> None:
    """Look for the label maps of STUFF, and at those that are no remote files; copies take the place of palettes."""
    where, files = f"data set {entry['NAME']!r}: DATASETS.REGISTER: STUFF", [r["sem_seg_file_name"] for r in records]
    missing = [path for path in files if not PathManager.isfile(path)]
    if missing:
        count = f"{len(missing)} of {len(files)}"
        raise FileNotFoundError(f"{where}: {count} label maps are missing, the first is {missing[0]}")
    for record, file in zip(records, files):
        if os.path.isfile(file):
            try:
                record["sem_seg_file_name"] = readable_label_map(file, (record["width"], record["height"]))
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None


def _convert(annotation: dict[str, Any], contiguous: dict[int, int]) -> dict[str, Any]:
    """A checked annotation in detectron2's form.

    Numbers become floats: detectron2 makes an array of them and writes the resized coordinates back into it, so that
    integers would be cut off after the point, up to a pixel of the input, which is much of a small object.
    """
    out = {
        "iscrowd": int(annotation["iscrowd"]),
        "bbox": [*map(float, annotation["bbox"])],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": contiguous[annotation["category_id"]],
    }
    mask = annotation.get("segmentation")
    if isinstance(mask, dict):
        out["segmentation"] = compressed(mask)
    elif mask:
        out["segmentation"] = [[*map(float, polygon)] for polygon in mask]
    if annotation.get("keypoints"):
        # From indices of pixels to continuous coordinates.
        out["keypoints"] = [v if i % 3 == 2 else v + 0.5 for i, v in enumerate(annotation["keypoints"])]
    return out
