"""The gallery of a report: validation images and what each source says is in them, as JSON that the page draws."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.structures import Instances

from ..data.media import Unreadable, read_picture
from ..data.names import skeleton
from ..data.sampling import at_equal_distances
from ..files import write_json
from ..visualization.objects import Objects, ground_truth, predictions, sought

GROUND_TRUTH = "ground truth"
# What the page knows how to compare: "teacher finds, student misses".
ROLES = (GROUND_TRUTH, "teacher", "conventional", "student")
FILE, FOLDER = "gallery.json", "gallery"
LONGEST_SIDE = 1024  # pixels of a stored image
LEAST_SCORE, MOST_OBJECTS = 0.05, 200  # of detections that are kept


def write_gallery(
    out_dir: Path, records: Sequence[dict], metadata: Metadata,
    models: Mapping[str, tuple[str, Callable[[dict, np.ndarray], Instances]]], count: int = 24,
) -> Path:  # fmt: skip
    """Write ``out_dir``/gallery.json and copies of its images to ``out_dir``/gallery/; returns the former.

    Args:
        records: detectron2's dataset dicts; ``count`` of them, at equal distances, are shown.
        metadata: of their data set.
        models: role ("teacher", "conventional", "student") -> name, and a function of a dataset dict and its BGR image
            (h, w, 3) that gives detections in the pixels of that image.

    The file is {"classes", "skeleton": pairs of numbers of keypoints, "sources": [{"role", "name"}], "images":
    [{"file", "name", "width", "height", "objects": {role: [object]}}]}, an object being what :func:`describe` makes.
    Boxes and points are in pixels of the original image, whose size is given, also where the copy is smaller.
    Unreadable images are left out.
    """
    roles = [GROUND_TRUTH, *(role for role in ROLES if role in models)]
    folder = out_dir / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    images = []
    for record in at_equal_distances(records, count):
        try:
            image = read_picture(Path(record["file_name"]))
        except Unreadable:
            continue
        file = folder / f"{len(images):03d}.jpg"
        cv2.imwrite(str(file), _shrunk(image), [cv2.IMWRITE_JPEG_QUALITY, 88])
        found = {role: predictions(models[role][1](record, image)) for role in roles[1:]}
        truth = sought(ground_truth(record), found.values())
        objects = {role: describe(o) for role, o in {GROUND_TRUTH: truth, **found}.items()}
        images.append({
            "file": f"{FOLDER}/{file.name}", "name": Path(record["file_name"]).name, "width": image.shape[1],
            "height": image.shape[0], "objects": objects,
        })  # fmt: skip
    data = {
        "classes": list(metadata.get("thing_classes") or []), "skeleton": skeleton(metadata),
        "sources": [{"role": role, "name": models[role][0] if role in models else role} for role in roles],
        "images": images,
    }  # fmt: skip
    write_json(out_dir / FILE, data, indent=None)
    return out_dir / FILE


def describe(objects: Objects) -> list[dict]:
    """Objects as the page reads them, the best first: {"box": [x0, y0, x1, y1], "class": number} and, where there are
    such, "score", "polygons": [[x, y, x, y, ...]], "points": [[x, y, visibility or score]]."""
    order = range(len(objects))
    if objects.scores is not None:
        best = np.argsort(-objects.scores, kind="stable")[:MOST_OBJECTS]
        order = [i for i in best.tolist() if objects.scores[i] >= LEAST_SCORE]
    found = []
    for i in order:
        one: dict = {"box": _rounded(objects.boxes[i]), "class": int(objects.classes[i])}
        if objects.scores is not None:
            one["score"] = round(float(objects.scores[i]), 3)
        if objects.masks is not None:
            one["polygons"] = [_rounded(polygon) for polygon in _polygons(objects.masks[i])]
        if objects.keypoints is not None:
            one["points"] = [_rounded(point) for point in objects.keypoints[i]]
        found.append(one)
    return found


def _polygons(mask: np.ndarray | list) -> list:
    """Outlines of a mask, holes too (the page fills by the even-odd rule); polygons stay as they are."""
    if isinstance(mask, list):
        return mask
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return [outline.reshape(-1) + 0.5 for outline in outlines]  # through the middles of pixels


def _rounded(values: np.ndarray) -> list[float]:
    return [round(value, 1) for value in np.asarray(values, float).tolist()]


def _shrunk(image: np.ndarray) -> np.ndarray:
    factor = LONGEST_SIDE / max(image.shape[:2])
    return cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA) if factor < 1 else image
