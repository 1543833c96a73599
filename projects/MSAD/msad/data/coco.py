"""``TYPE: coco``: data sets in COCO's annotation format."""

from __future__ import annotations

import difflib
import functools
import json
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.file_io import PathManager

from .dataset_types import DATASET_TYPE_REGISTRY, NAMES, PATH, Key, add_dataset, check_entry, is_names

KEYS = {
    "JSON": PATH,
    "IMAGES": PATH,
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
_PALETTE = ((230, 75, 53), (77, 187, 213), (0, 160, 135), (60, 84, 136), (243, 155, 127), (145, 209, 194))


@DATASET_TYPE_REGISTRY.register()
def coco(name: str, entry: dict[str, Any]) -> None:
    """Boxes, masks and keypoints in COCO's format, evaluated by COCO's metrics.

    Keys of the entry:

    - ``JSON``, ``IMAGES``: annotation file, image folder.
    - ``CLASSES``: category names by ascending category id. Known before the file is read, and compared with it.
    - ``KEYPOINT_FLIP_PAIRS``: pairs of keypoint names that change places in a mirrored image. Without it the category
      records of the file say so (``flip_pairs``), else names that differ in "left" and "right" are paired.
    - ``KEYPOINT_SIGMAS``: one OKS sigma a keypoint, kept as ``keypoint_oks_sigmas`` in the metadata; without it the
      category records' ``sigmas``, if any.
    """
    entry = check_entry(entry, KEYS)
    metadata = {"json_file": entry["JSON"], "image_root": entry["IMAGES"], "evaluator_type": "coco"}
    if "CLASSES" in entry:
        metadata["thing_classes"] = list(entry["CLASSES"])
    # register_coco_instances binds the file to the name at once; a function of ours can say which entry is wrong
    # when the file is, and add what the file knows about keypoints.
    add_dataset(name, entry, functools.partial(_load, entry), **metadata)


def _load(definition: dict[str, Any]) -> list[dict]:
    """Dataset dicts of one entry; fills in the keypoint metadata."""
    name = definition["NAME"]
    for key, exists in (("JSON", PathManager.isfile), ("IMAGES", PathManager.isdir)):
        if not exists(definition[key]):
            kind = "file" if key == "JSON" else "folder"
            raise FileNotFoundError(f"data set {name!r} (DATASETS.REGISTER): {key}: no such {kind}: {definition[key]}")
    categories = _read_categories(definition)
    _check_classes(definition, categories)
    for key, value in _keypoint_metadata(definition, categories).items():
        setattr(MetadataCatalog.get(name), key, value)
    records = load_coco_json(definition["JSON"], definition["IMAGES"], name)
    for record in records:
        for annotation in record["annotations"]:
            _make_real(annotation)
    return records


def _make_real(annotation: dict[str, Any]) -> None:
    """Turn whole numbers of a box or polygon into floats, in place.

    detectron2 makes an array of them and writes the resized coordinates back into it, so that integers would be cut off
    after the point: up to a pixel of the input, which is much of a small object at low resolution.
    """
    if "bbox" in annotation:  # else msad.data.checks reports it
        annotation["bbox"] = [float(x) for x in annotation["bbox"]]
    if isinstance(annotation.get("segmentation"), list):
        annotation["segmentation"] = [[float(x) for x in polygon] for polygon in annotation["segmentation"]]


def _read_categories(definition: dict[str, Any]) -> list[dict]:
    where = f"data set {definition['NAME']!r}: {definition['JSON']}"
    with PathManager.open(definition["JSON"], "r") as file:
        try:
            content = json.load(file)
        except ValueError as error:
            raise ValueError(f"{where} is not valid JSON: {error}") from None
    for section in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(section), list):
            raise ValueError(f"{where} is not in COCO format: it has no list {section!r}")
    ids = {category["id"] for category in content["categories"]}
    images = {image["id"] for image in content["images"]}
    for annotation in content["annotations"]:
        for key, known in (("category_id", ids), ("image_id", images)):
            if annotation.get(key) not in known:
                raise ValueError(
                    f"{where}: annotation {annotation.get('id')} has {key} {annotation.get(key)!r}, which is not listed"
                )
    return sorted(content["categories"], key=lambda category: category["id"])


def _check_classes(definition: dict[str, Any], categories: list[dict]) -> None:
    found, declared = [category["name"] for category in categories], definition.get("CLASSES")
    if declared is not None and list(declared) != found:
        raise ValueError(
            f"data set {definition['NAME']!r}: CLASSES are {list(declared)}, "
            f"but {definition['JSON']} has by ascending id {found}"
        )


def _keypoint_metadata(definition: dict[str, Any], categories: list[dict]) -> dict[str, Any]:
    """detectron2's keypoint metadata, from the category records that have keypoints and from the entry."""
    where = f"data set {definition['NAME']!r}"
    with_points = [category for category in categories if category.get("keypoints")]
    if not with_points:
        for key in ("KEYPOINT_FLIP_PAIRS", "KEYPOINT_SIGMAS"):
            if definition.get(key):
                raise ValueError(f"{where}: {key} is given, but no category of {definition['JSON']} has keypoints")
        return {}
    first = with_points[0]
    names = list(first["keypoints"])
    for other in with_points[1:]:
        if list(other["keypoints"]) != names:
            raise ValueError(
                f"{where}: the categories {first['name']!r} and {other['name']!r} have different keypoints; "
                "detectron2 supports one set of keypoints a data set"
            )
    pairs = definition.get("KEYPOINT_FLIP_PAIRS", first.get("flip_pairs"))
    if pairs is None:
        mirrored = {point: point.replace("left", "right") for point in names if "left" in point}
        pairs = [pair for pair in mirrored.items() if pair[1] in names]
    for point in (point for pair in pairs for point in pair):
        if point not in names:
            near = difflib.get_close_matches(point, names, n=1, cutoff=0.0)[0]
            raise ValueError(f"{where}: KEYPOINT_FLIP_PAIRS: no keypoint {point!r}; did you mean {near!r}?")
    rules = [
        (names[a - 1], names[b - 1], _PALETTE[i % len(_PALETTE)])
        for i, (a, b) in enumerate(first.get("skeleton") or ())
    ]
    metadata = {
        "keypoint_names": names,
        "keypoint_flip_map": [tuple(pair) for pair in pairs],
        "keypoint_connection_rules": rules,
    }
    sigmas = definition.get("KEYPOINT_SIGMAS", first.get("sigmas"))
    if sigmas is not None:
        if len(sigmas) != len(names):
            raise ValueError(f"{where}: KEYPOINT_SIGMAS has {len(sigmas)} values for {len(names)} keypoints {names}")
        metadata["keypoint_oks_sigmas"] = [float(s) for s in sigmas]
    return metadata
