"""``TYPE: visdrone``: VisDrone-DET, its text format read as it is, whole images or the four patches to train on.

One file an image, one object a line: left, top, width, height, score, category, truncation, occlusion; some lines end
with a comma. In ground truth a score of 0 marks an object that is not evaluated; category 0 is an ignored region and 11
"others". In results the score is the confidence, and the last two fields are -1.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from PIL import Image

from .dataset_types import DATASET_TYPE_REGISTRY, PATH, Key, add_dataset, check_entry
from .image_files import upright_size

# Categories 1 to 10, those that are evaluated.
CLASSES = (
    "pedestrian", "people", "bicycle", "car", "van", "truck", "tricycle", "awning-tricycle", "bus", "motor",
)  # fmt: skip
IGNORED_REGION, OTHERS = 0, 11
FIELDS = ("left", "top", "width", "height", "score", "category", "truncation", "occlusion")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")


@DATASET_TYPE_REGISTRY.register()
def visdrone(name: str, entry: dict[str, Any]) -> None:
    """VisDrone-DET, evaluated by the metric of its toolkit.

    Keys of the entry:

    - ``IMAGES``: folder of NAME.jpg (or png, bmp).
    - ``ANNOTATIONS``: folder of NAME.txt; without it the set can only be tested on, for result files.
    - ``PATCHES``: True for a training set: each image is cut into four, see :func:`split_into_patches`.
    """
    flag = Key(lambda value: isinstance(value, bool), "True or False", required=False)
    entry = check_entry(entry, {"IMAGES": PATH, "ANNOTATIONS": PATH.optional(), "PATCHES": flag})
    load = functools.partial(
        load_visdrone, entry["IMAGES"], entry.get("ANNOTATIONS"), patches=entry.get("PATCHES", False)
    )
    add_dataset(
        name,
        entry,
        load,
        evaluator_type="visdrone",
        thing_classes=list(CLASSES),
        has_ignored_regions="ANNOTATIONS" in entry,
    )


def read_rows(path: str | os.PathLike) -> np.ndarray:
    """Read ground truth or results of an image: (n, 8) float64, columns FIELDS, boxes in pixels of the image.

    Raises:
        ValueError: a line does not have eight numbers, or a category that does not exist; names file and line.
    """
    rows = []
    with PathManager.open(os.fspath(path), "r") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            fields = [field.strip() for field in line.strip().rstrip(",").split(",")]
            try:
                row = [float(field) for field in fields]
            except ValueError:
                row = []
            if len(row) != len(FIELDS) or not np.all(np.isfinite(row)):
                raise ValueError(
                    f"{path}, line {number}: an object has {len(FIELDS)} numbers ({', '.join(FIELDS)}), "
                    f"got {line.strip()!r}"
                )
            if row[5] not in range(OTHERS + 1):
                raise ValueError(f"{path}, line {number}: category {fields[5]} is none of 0 to {OTHERS}")
            rows.append(row)
    return np.array(rows, dtype=np.float64).reshape(-1, len(FIELDS))


def load_visdrone(
    images: str | os.PathLike, annotations: str | os.PathLike | None = None, *, patches: bool = False
) -> list[dict]:
    """detectron2 dataset dicts of a VisDrone folder.

    A dict has detectron2's fields (classes are categories 1 to 10, from 0), "annotation_file", and
    "ignored_regions", a list of [x0, y0, x1, y1] in pixels of the image: category 0 and objects of score 0, where
    neither objects nor background may be learnt. Objects without area are dropped.

    Args:
        images: folder of NAME.jpg (or png, bmp).
        annotations: folder of NAME.txt, None for a set without labels.
        patches: four dicts an image, see :func:`split_into_patches`.

    Raises:
        FileNotFoundError: a folder, an image or the annotations of an image are missing.
        ValueError: there are no images or two of one name, or an annotation file is malformed.
    """
    images = Path(images)
    for folder in (images, *([] if annotations is None else [Path(annotations)])):
        if not folder.is_dir():
            raise FileNotFoundError(f"VisDrone: no such folder: {folder}")
    files = sorted(file for file in images.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f"VisDrone: there are no images ({', '.join(IMAGE_SUFFIXES)}) in {images}")
    by_name: dict[str, Path] = {}
    for file in files:
        if (other := by_name.setdefault(file.stem, file)) != file:
            raise ValueError(f"VisDrone: {other} and {file} have one name, by which results are kept: remove one")
    if annotations is not None:
        stray = sorted(file.stem for file in Path(annotations).glob("*.txt") if file.stem not in by_name)
        if stray:
            raise FileNotFoundError(
                f"VisDrone: {len(stray)} files in {annotations} have no image in {images}, the first is {stray[0]}.txt"
            )
    records = []
    for file in files:
        with Image.open(file) as image:
            width, height = upright_size(image)
        record = {"file_name": str(file), "image_id": file.stem, "height": height, "width": width}
        if annotations is not None:
            path = Path(annotations) / f"{file.stem}.txt"
            if not path.is_file():
                raise FileNotFoundError(f"VisDrone: image {file.name} has no annotations {path}")
            record |= {"annotation_file": str(path), **_objects(read_rows(path))}
        records += split_into_patches(record) if patches else [record]
    return records


def _objects(rows: np.ndarray) -> dict[str, list]:
    """ "annotations" and "ignored_regions" of the rows of an image."""
    annotations, regions = [], []
    for left, top, width, height, score, category, *_ in rows.tolist():
        if width <= 0 or height <= 0:
            continue
        if category == IGNORED_REGION or score == 0:
            regions.append([left, top, left + width, top + height])
        elif category != OTHERS:
            annotations.append(
                {
                    "bbox": [left, top, width, height],
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": int(category) - 1,
                    "iscrowd": 0,
                }
            )
    return {"annotations": annotations, "ignored_regions": regions}


def split_into_patches(record: dict) -> list[dict]:
    """Four dicts of an image cut at (height // 2, width // 2), as QueryDet trains on VisDrone.

    An object belongs to the patch of its top-left corner alone and is clipped to it; an ignored region is cut. Boxes
    stay in pixels of the whole image; "crop" [x0, y0, x1, y1] says which part of it the patch is.
    """
    width, height = record["width"], record["height"]
    rows, columns = (0, height // 2, height), (0, width // 2, width)
    patches = []
    for i in range(2):
        for j in range(2):
            crop = [columns[j], rows[i], columns[j + 1], rows[i + 1]]
            patch = {**record, "image_id": f"{record['image_id']}_{2 * i + j}", "crop": crop}
            if "annotations" in record:
                mine = [a for a in record["annotations"] if _corner_patch(a["bbox"], rows[1], columns[1]) == (i, j)]
                mine = [(a, _clip(BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS), crop)) for a in mine]
                patch["annotations"] = [
                    {**a, "bbox": box, "bbox_mode": BoxMode.XYXY_ABS} for a, box in mine if box is not None
                ]
                regions = [_clip(region, crop) for region in record["ignored_regions"]]
                patch["ignored_regions"] = [region for region in regions if region is not None]
            patches.append(patch)
    return patches


def _corner_patch(box: list[float], row: int, column: int) -> tuple[int, int]:
    return int(box[1] >= row), int(box[0] >= column)


def _clip(box: list[float], crop: list[int]) -> list[float] | None:
    """The part of ``box`` (x0, y0, x1, y1) inside ``crop``, None if it has no area."""
    x0, y0, x1, y1 = max(box[0], crop[0]), max(box[1], crop[1]), min(box[2], crop[2]), min(box[3], crop[3])
    return [float(x0), float(y0), float(x1), float(y1)] if x1 > x0 and y1 > y0 else None
