"""Find the images and annotations of a folder of detection data, whatever tool has laid it out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

LAYOUTS = """\
  images/, annotations_train.json, annotations_val.json
  train/_annotations.coco.json, valid/_annotations.coco.json, images beside them (Roboflow's "COCO" export)
  annotations/instances_train*.json, annotations/instances_val*.json, images in train*/, val*/ (COCO)"""


class Split(NamedTuple):
    """A part of a data set: its annotations in COCO's format, and the folder of its images."""

    json: Path
    images: Path


def find_splits(folder: Path) -> dict[str, Split]:
    """{"train": ..., "val": ...} of a folder in one of LAYOUTS.

    Raises:
        FileNotFoundError: there is no such folder, or it is in none of the layouts; names what is missing and LAYOUTS.
    """
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
        chosen = {s: (f or [folder / "annotations" / f"instances_{s}.json"])[0] for s, f in coco.items()}
        return _complete(folder, {s: Split(f, _coco_images(folder, f)) for s, f in chosen.items()})
    raise FileNotFoundError(f"{folder} is in none of the layouts that are known:\n{LAYOUTS}")


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


def register_entries(folder: Path, work: Path, prefix: str) -> tuple[list[dict], dict]:
    """The entries of DATASETS.REGISTER for ``{prefix}_train`` and ``{prefix}_val`` of a folder in one of LAYOUTS.

    Files that start with a byte order mark, or that list Roboflow's unused root category, are completed in ``work``.

    Returns:
        the entries, and of the training file {"classes": [name], "masks": bool, "keypoints": number of points}.

    Raises:
        FileNotFoundError: see :func:`find_splits`.
        ValueError: an annotation file is not in COCO's format; names the file and the entry.
    """
    splits = find_splits(folder)
    contents, marked = {}, {}
    for name, split in splits.items():
        contents[name], marked[name] = read_coco(split.json)
    changed = _drop_root(contents.values())
    entries = []
    for name, split in splits.items():
        file = split.json
        if changed or marked[name]:
            work.mkdir(parents=True, exist_ok=True)
            file, text = work / f"annotations_{name}.json", json.dumps(contents[name])
            if not file.is_file() or file.read_text() != text:
                file.write_text(text)
        file, images = str(file.resolve()), str(split.images.resolve())
        entries.append({"NAME": f"{prefix}_{name}", "JSON": file, "IMAGES": images})
    train = contents["train"]
    by_id = sorted(train["categories"], key=lambda category: category["id"])
    points = max((len(category.get("keypoints") or ()) for category in by_id), default=0)
    masks = any(annotation.get("segmentation") for annotation in train["annotations"])
    return entries, {"classes": [c["name"] for c in by_id], "masks": masks, "keypoints": points}


def _drop_root(contents: Iterable[dict]) -> bool:
    """Take Roboflow's root category, id 0, out of files none of which uses it; returns whether it was there."""
    contents = list(contents)
    roots = [c for content in contents for c in content["categories"] if c["id"] == 0]
    used = any(a["category_id"] == 0 for content in contents for a in content["annotations"])
    if used or not any(root.get("supercategory") == "none" for root in roots):
        return False
    if any(len(content["categories"]) < 2 for content in contents):
        return False
    for content in contents:
        content["categories"] = [c for c in content["categories"] if c["id"] != 0]
    return True


def read_coco(file: Path) -> tuple[dict, bool]:
    """(content of an annotation file, whether it starts with a byte order mark), see :func:`register_entries`."""
    text = file.read_bytes()
    try:
        content = json.loads(text.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        found = type(content).__name__
        raise ValueError(f"{file}: not in COCO's format, a {found} instead of an object with images, annotations, ...")
    for section in ("images", "annotations", "categories"):
        if not isinstance(content.get(section), list):
            raise ValueError(f"{file}: not in COCO's format, {section} is {content.get(section)!r} instead of a list")
    _need(file, content, "categories", "category", {"id": int, "name": str})
    size = {"height": (int, float), "width": (int, float)}
    _need(file, content, "images", "image", {"id": (int, str), "file_name": str, **size})
    _need(file, content, "annotations", "annotation", {"id": (int, str), "image_id": (int, str), "category_id": int,
                                                       "bbox": list})  # fmt: skip
    for annotation in content["annotations"]:
        polygons = annotation.get("segmentation")
        if isinstance(polygons, list) and polygons and not isinstance(polygons[0], list):
            raise ValueError(
                f"{file}: annotation {annotation['id']}: segmentation is a list of numbers instead of a list of "
                "polygons, [[x, y, ...], ...]"
            )
    return content, text.startswith(b"\xef\xbb\xbf")


def _need(file: Path, content: dict, section: str, noun: str, keys: dict[str, Any]) -> None:
    for position, item in enumerate(content[section]):
        if not isinstance(item, dict):
            raise ValueError(f"{file}: {section}[{position}] is {item!r} instead of an object")
        for key, kind in keys.items():
            if not isinstance(item.get(key), kind) or isinstance(item[key], bool):
                which = item.get("id", item.get("name", f"number {position}"))
                value = f"has no {key}" if key not in item else f"has {key} {item[key]!r}"
                raise ValueError(f"{file}: {noun} {which} {value}, which must be {_kind(kind)}")


def _kind(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", list: "a list"}
    return " or ".join(names[k] for k in (kind if isinstance(kind, tuple) else (kind,)))
