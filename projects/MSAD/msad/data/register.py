"""Data sets declared in yaml: ``DATASETS.REGISTER``, a list of COCO-format data sets beside detectron2's own names.

.. code-block:: yaml

    DATASETS:
      REGISTER:
        - {NAME: drones_train, JSON: drones/train.json, IMAGES: drones/images}
        - {NAME: drones_val, JSON: drones/val.json, IMAGES: drones/images, CLASSES: [car, bus]}
      TRAIN: ("drones_train",)

Paths are absolute, URLs, or relative to the environment variable DETECTRON2_DATASETS (default: ``datasets``).
"""

import difflib
import functools
import json
import os
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.file_io import PathManager

REQUIRED = ("NAME", "JSON", "IMAGES")
OPTIONAL = ("CLASSES", "KEYPOINT_FLIP_PAIRS", "KEYPOINT_SIGMAS")

_PALETTE = ((230, 75, 53), (77, 187, 213), (0, 160, 135), (60, 84, 136), (243, 155, 127), (145, 209, 194))


def register_datasets(cfg: CfgNode) -> list[str]:
    """Register every entry of ``cfg.DATASETS.REGISTER`` and return the names.

    Nothing is read from disk before a data set is used. Keys of an entry:

    - ``NAME``, ``JSON``, ``IMAGES``: name, annotation file, image folder.
    - ``CLASSES``: category names by ascending category id. Known before the file is read, and compared with it.
    - ``KEYPOINT_FLIP_PAIRS``: pairs of keypoint names that change places in a mirrored image. Without it the category
      records of the file say so (``flip_pairs``), else names that differ in "left" and "right" are paired.
    - ``KEYPOINT_SIGMAS``: one OKS sigma a keypoint, kept as ``keypoint_oks_sigmas`` in the metadata; without it the
      category records' ``sigmas``, if any.

    Raises:
        ValueError: an entry has an unknown, missing or ill-typed key, or its name is taken by another definition.
            Registering the same definition again is fine.
    """
    entries = cfg.DATASETS.get("REGISTER", ())
    if not isinstance(entries, (list, tuple)):
        raise ValueError(f"DATASETS.REGISTER must be a list of entries, got {type(entries).__name__}: {entries!r}")
    definitions = [_parse(entry, position) for position, entry in enumerate(entries)]
    for definition in definitions:
        _register(definition)
    return [definition["NAME"] for definition in definitions]


def _parse(entry: Any, position: int) -> dict[str, Any]:
    where = f"DATASETS.REGISTER[{position}]"
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} must be a mapping with the keys {', '.join(REQUIRED)}, got {entry!r}")
    if isinstance(entry.get("NAME"), str):
        where += f" ({entry['NAME']!r})"
    missing = [key for key in REQUIRED if key not in entry]
    for key in entry:
        if key in REQUIRED or key in OPTIONAL:
            continue
        known = REQUIRED + OPTIONAL
        spellings = {k: k for k in known} | {k.removeprefix("KEYPOINT_"): k for k in known}
        # Nearest in any case: a key that resembles nothing likely stands for one that is still missing.
        near = difflib.get_close_matches(str(key).upper(), spellings, n=1, cutoff=0.3) or [*missing, *known]
        raise ValueError(
            f"{where}: unknown key {key!r}; did you mean {spellings[near[0]]!r}? Valid keys: {', '.join(known)}"
        )
    if missing:
        raise ValueError(f"{where}: missing key {missing[0]!r}; required are {', '.join(REQUIRED)}")
    for key, (test, wanted) in _TYPES.items():
        if key in entry and not test(entry[key]):
            raise ValueError(f"{where}: {key} must be {wanted}, got {entry[key]!r}")
    return {**entry, "JSON": _resolve(entry["JSON"]), "IMAGES": _resolve(entry["IMAGES"])}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(_is_text, value))


_TYPES = {
    **dict.fromkeys(REQUIRED, (_is_text, "a non-empty string")),
    "CLASSES": (_is_names, "a list of category names"),
    "KEYPOINT_FLIP_PAIRS": (
        lambda v: isinstance(v, (list, tuple)) and all(_is_names(p) and len(p) == 2 for p in v),
        "a list of pairs of keypoint names",
    ),
    "KEYPOINT_SIGMAS": (
        lambda v: isinstance(v, (list, tuple)) and all(isinstance(s, (int, float)) and s > 0 for s in v),
        "a list of positive numbers",
    ),
}


def _resolve(path: str) -> str:
    if "://" in path:
        return path
    # expanduser first: "~" would not count as absolute
    return os.path.join(os.getenv("DETECTRON2_DATASETS", "datasets"), os.path.expanduser(path))


def _register(definition: dict[str, Any]) -> None:
    name = definition["NAME"]
    if name in DatasetCatalog.list():
        present = MetadataCatalog.get(name).get("definition")
        if present == definition:
            return
        if present is None:
            raise ValueError(f"DATASETS.REGISTER: the name {name!r} is already taken by a data set defined elsewhere")
        keys = [k for k in REQUIRED + OPTIONAL if present.get(k) != definition.get(k)]
        raise ValueError(
            f"DATASETS.REGISTER: {name!r} is already registered with another {keys[0]}: "
            f"{present.get(keys[0])!r}, now {definition.get(keys[0])!r}"
        )
    # register_coco_instances binds the file to the name at once; a function of ours can say which entry is wrong
    # when the file is, and add what the file knows about keypoints.
    DatasetCatalog.register(name, functools.partial(_load, definition))
    metadata = MetadataCatalog.get(name)
    metadata.set(
        definition=definition, json_file=definition["JSON"], image_root=definition["IMAGES"], evaluator_type="coco"
    )
    if "CLASSES" in definition:
        metadata.thing_classes = list(definition["CLASSES"])


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
