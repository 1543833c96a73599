"""What is in an image, whoever says so: annotations and predictions in one form, ready to be drawn."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from detectron2.structures import BoxMode, Instances

from ..data.coco_annotations import bitmap, encoded
from .label_maps import LabelMap


@dataclass(frozen=True)
class Objects:
    """What one source says is in an image, in that image's pixels.

    ``boxes`` (N, 4) XYXY; ``classes`` (N,) contiguous indices; ``scores`` (N,) or None; ``masks`` N lists of polygons
    (arrays x0, y0, x1, y1, ...) or N bool arrays (H, W), or None; ``keypoints`` (N, K, 3) with visibility or score,
    or None.
    """

    boxes: np.ndarray
    classes: np.ndarray
    scores: np.ndarray | None = None
    masks: list | None = None
    keypoints: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def above(self, threshold: float) -> Objects:
        """Those with at least this score, the best last so that they are drawn on top; all if there are no scores."""
        if self.scores is None:
            return self
        order = np.argsort(self.scores, kind="stable")
        keep = order[self.scores[order] >= threshold]
        return Objects(
            self.boxes[keep],
            self.classes[keep],
            self.scores[keep],
            None if self.masks is None else [self.masks[i] for i in keep],
            None if self.keypoints is None else self.keypoints[keep],
        )


# What a picture may be asked to show: also Instances, a dataset dict, or what a model says of one image.
Content = Objects | LabelMap | Instances | dict


def ground_truth(record: dict) -> Objects:
    """The annotations of a detectron2 dataset dict; crowd regions, which nothing is scored on, are left out."""
    annotations = [a for a in record.get("annotations", ()) if not a.get("iscrowd", 0)]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    masks = keypoints = None
    if annotations and all(a.get("segmentation") for a in annotations):
        masks = _masks([a["segmentation"] for a in annotations], record["height"], record["width"])
    counts = {len(a.get("keypoints", ())) for a in annotations} - {0}
    if len(counts) == 1:  # objects without the points of the others get points that are not visible
        blank = [0] * counts.pop()
        keypoints = np.array([a.get("keypoints") or blank for a in annotations], float).reshape(len(annotations), -1, 3)
    return Objects(
        np.array(boxes, float).reshape(-1, 4),
        np.array([a["category_id"] for a in annotations], int),
        masks=masks,
        keypoints=keypoints,
    )


def sought(truth: Objects, found: Collection[Objects]) -> Objects:
    """The ground truth beside what models find: masks and keypoints that none looks for would hide its boxes."""
    unsought = [part for part in ("masks", "keypoints") if all(getattr(o, part) is None for o in found)]
    return replace(truth, **dict.fromkeys(unsought)) if found else truth


def predictions(instances: Instances) -> Objects:
    """The detections of a model."""
    instances = instances.to("cpu")
    return Objects(
        instances.pred_boxes.tensor.numpy(),
        instances.pred_classes.numpy(),
        instances.scores.numpy(),
        list(instances.pred_masks.numpy().astype(bool)) if instances.has("pred_masks") else None,
        instances.pred_keypoints.numpy() if instances.has("pred_keypoints") else None,
    )


def as_json(objects: Objects | LabelMap, names: Sequence[str] = ()) -> list[dict]:
    """Detections as json holds them: COCO's bbox [x, y, width, height], score, category_id from 0, category.

    Of a label map see :meth:`LabelMap.as_json`. ``names`` are those of the classes. Masks are COCO's compressed run
    lengths under "segmentation", keypoints [x, y, score, ...]; all in the pixels of the image.
    """
    if isinstance(objects, LabelMap):
        return objects.as_json(names)
    found = []
    for i, (x0, y0, x1, y1) in enumerate(objects.boxes.tolist()):
        index = int(objects.classes[i])
        entry: dict = {"bbox": [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)], "category_id": index}
        entry["category"] = names[index] if index < len(names) else str(index)
        if objects.scores is not None:
            entry["score"] = round(float(objects.scores[i]), 5)
        if objects.masks is not None:
            entry["segmentation"] = encoded(objects.masks[i])
        if objects.keypoints is not None:
            entry["keypoints"] = [round(v, 2) for v in objects.keypoints[i].ravel().tolist()]
        found.append(entry)
    return found


def _masks(segmentations: list, height: int, width: int) -> list:
    if all(isinstance(s, list) for s in segmentations):
        return [[np.asarray(polygon, float) for polygon in s] for s in segmentations]
    return [bitmap(s, height, width) for s in segmentations]


def resized(objects: Objects, sx: float, sy: float, size: tuple[int, int]) -> Objects:
    """The same objects in an image that is scaled by ``sx`` and ``sy`` to ``size`` (height, width)."""
    masks = objects.masks
    if masks is not None:
        masks = [
            cv2.resize(m.astype(np.float32), size[::-1]) >= 0.5
            if isinstance(m, np.ndarray)
            else [(polygon.reshape(-1, 2) * (sx, sy)).ravel() for polygon in m]
            for m in masks
        ]
    points = objects.keypoints
    return Objects(
        objects.boxes * (sx, sy, sx, sy),
        objects.classes,
        objects.scores,
        masks,
        None if points is None else points * (sx, sy, 1.0),
    )


def as_content(source: Content) -> Objects | LabelMap:
    """Objects and label maps as they are, and what is in a model's output or in a dataset dict."""
    if isinstance(source, (Objects, LabelMap)):
        return source
    if isinstance(source, Instances):
        return predictions(source)
    if "instances" in source:
        return predictions(source["instances"])
    if "sem_seg" in source:
        return LabelMap.of_scores(source["sem_seg"])
    if "sem_seg_file_name" in source and "annotations" not in source:
        return LabelMap.read(source["sem_seg_file_name"])
    return ground_truth(source)
