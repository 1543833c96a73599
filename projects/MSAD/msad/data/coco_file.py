"""Reading of COCO annotation files: what is wrong with one is found here, and what is only absent is filled in.

Both engines get the result, so neither engine's own reading of a doubtful file matters.
"""

from __future__ import annotations

import json
from typing import Any

from detectron2.utils.file_io import PathManager

from ..finding import ERROR, WARNING
from .coco_annotations import AnnotationChecker, is_integer, shown
from .tally import Tally


def read_coco(path: str) -> dict[str, Any]:
    """The content of a COCO annotation file, and the key "repaired" (see :func:`check_content`).

    Raises:
        ValueError: it is not JSON, or has no lists of images and categories.
    """
    with PathManager.open(path, "rb") as file:
        raw = file.read()
    if raw.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer; fetch the file with: git lfs pull")
    try:
        content = json.loads(raw.decode("utf-8-sig"))
    except ValueError as error:  # also of decoding
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    for section in ("images", "categories", "annotations"):
        absent = section == "annotations" and isinstance(content, dict) and section not in content
        if not absent and not (isinstance(content, dict) and isinstance(content.get(section), list)):
            found = f"its content is a {type(content).__name__}"
            if isinstance(content, dict):
                found = f"it is {json.dumps(content[section])[:40]}" if section in content else "there is no such key"
            raise ValueError(f"{path} is not in COCO format: it has no list {section!r} ({found})")
        for i, item in enumerate(content.get(section, ())):
            if not isinstance(item, dict):
                raise ValueError(f"{path} is not in COCO format: {section}[{i}] is {item!r}, not an object")
    content["repaired"] = raw.startswith(b"\xef\xbb\xbf")  # which readers of COCO files refuse
    return content


def check_content(content: dict[str, Any], check: str, *, masks: bool = False) -> Tally:
    """Look at every record; fill in ``area``, ``iscrowd`` and ``num_keypoints`` where they are absent, in place.

    Annotations that cannot be used are left out. ``content["repaired"]`` says whether the content is another one than
    that of the file, in a way that matters to COCO's evaluation.

    Args:
        content: as :func:`read_coco` returns it.
        check: name of the data set for the findings.
        masks: annotations are used for their masks, and need no box; a box is what they need otherwise.
    """
    tally = Tally(check)
    categories = _check_categories(content["categories"], tally)
    images = _check_images(content["images"], tally)
    annotations = content.get("annotations", [])
    checker = AnnotationChecker(tally, images, categories, len(annotations), masks)
    usable = [checker.check(annotation) for annotation in annotations]
    if not all(usable):
        content["annotations"] = [a for a, use in zip(annotations, usable) if use]
    if 0 in checker.ids:  # COCO's evaluation takes the id 0 for "matched to nothing"
        next(a for a in annotations if a.get("id") == 0)["id"] = max(checker.ids) + 1
    if not annotations:
        content.pop("annotations", None)  # then detections are written, and no AP of NaN
    content["repaired"] |= checker.repaired or not all(usable) or 0 in checker.ids or not annotations
    return tally


def _check_categories(categories: list[dict], tally: Tally) -> set:
    of, ids, names = f"{len(categories)} categories", set(), set()
    if not categories:
        tally.add(ERROR, "is empty", "the list 'categories'", "list the classes with id and name")
    for i, category in enumerate(categories):
        number, name = category.get("id"), category.get("name")
        who = f"category {number!r}" if "id" in category else f"categories[{i}]"
        if not is_integer(number):
            fix = "number the categories, and category_id of the annotations alike"
            tally.add(ERROR, "has no whole number as id", who, fix, of)
        elif number in ids:
            tally.add(ERROR, "is listed twice", who, "give each category an id of its own", of)
        if not isinstance(name, str) or not name:
            tally.add(ERROR, "has no text as name", who, "name it", of, f"has name {shown(name)}, not a text")
        elif name in names:
            tally.add(WARNING, "has the name of another", f"{who} ({name!r})", "merge them, or rename one", of)
        ids.add(number if is_integer(number) else None)
        names.add(name if isinstance(name, str) else None)
    return ids - {None}


def _check_images(images: list[dict], tally: Tally) -> dict[int, dict]:
    of, by_id, names = f"{len(images)} images", {}, set()
    for i, image in enumerate(images):
        number, name = image.get("id"), image.get("file_name")
        who = f"image {name!r}" if isinstance(name, str) else f"images[{i}]"
        if is_integer(number):
            if number in by_id:
                tally.add(ERROR, "has the id of another", who, "give each image an id of its own", of)
            by_id.setdefault(number, image)
        else:
            fix = "number the images, and image_id of the annotations alike"
            tally.add(ERROR, "has no whole number as id", who, fix, of, f"has id {shown(number)}, not a whole number")
        if not isinstance(name, str) or not name:
            tally.add(ERROR, "has no file_name", who, "name its file, relative to IMAGES", of)
        elif name in names:
            reason = "has the file_name of another: each lacks the objects of the other"
            tally.add(WARNING, reason, who, "list a file once, with all of its annotations", of)
        for key in ("width", "height"):
            if not is_integer(image.get(key)) or image[key] < 1:
                seen = f"has {key} {shown(image[key])}" if key in image else f"has no {key}"
                fix = f"write {key} in pixels of the file, a whole number"
                tally.add(ERROR, f"has no good {key}", who, fix, of, seen)
            else:
                image[key] = int(image[key])
        names.add(name if isinstance(name, str) else None)
    return by_id
