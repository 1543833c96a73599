"""Metric of VisDrone-DET: AP, AP50, AP75 and AR at 1, 10, 100 and 500 detections, with ignored regions.

Follows the rules of the challenge's toolkit, which differ from COCO's:

- What lies to half or more in an ignored region (category 0) is left out, ground truth and detections alike.
- The limit on detections holds for an image over all classes together, so AR1 is tiny by construction.
- Ground truth of score 0 absorbs detections, by the share of their own area; it stays in the denominator of recall,
  as do boxes without area, which nothing can match.
- AP is the area under the interpolated precision at every recall, not COCO's mean over 101 points.
- The toolkit (since June 2018) averages over classes weighted by the number of images that contain them. That is
  "AP"; the plain mean over the ten classes is "AP_plain", and so on.

Detections are sorted by score here; the toolkit takes the lines as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..data.visdrone import CLASSES, IGNORED_REGION

THRESHOLDS = np.arange(50, 100, 5) / 100  # each the double nearest to its decimal, since equality matches
LIMITS = (1, 10, 100, 500)


class ClassResult(NamedTuple):
    """One class: AP (10,) by THRESHOLDS, recall (4, 10) by LIMITS and THRESHOLDS, number of images that contain it."""

    ap: np.ndarray
    recall: np.ndarray
    images: int


class _Matched(NamedTuple):
    """Detections of one class in one image, best first."""

    scores: np.ndarray  # (d,)
    places: np.ndarray  # (d,) number of better detections in the image, of any class
    verdicts: np.ndarray  # (10, d): 1 true, 0 false, -1 absorbed by ignored ground truth
    objects: int  # ground truth, ignored or not


def outside_regions(boxes: np.ndarray, regions: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(n,) bool: less than half of the box lies in ignored regions.

    Pixels are counted as in the toolkit: boxes are rounded, their four numbers are at least 1, pixels are numbered
    from 1. A region of left x and width w covers the columns x to x + w, both included; a box the columns x + 1 to
    x + w inside the image, and the share is that of its whole area.

    Args:
        boxes: (n, 4) left, top, width, height in pixels.
        regions: (r, 4) alike.
        size: (height, width) of the image.
    """
    if not len(regions) or not len(boxes):
        return np.ones(len(boxes), dtype=bool)
    height, width = size
    covered = np.zeros((height, width))
    for x, y, w, h in _whole_pixels(regions):
        covered[y - 1 : y + h, x - 1 : x + w] = 1
    total = np.zeros((height + 1, width + 1))
    total[1:, 1:] = covered.cumsum(axis=0).cumsum(axis=1)
    x, y, w, h = _whole_pixels(boxes).T
    x0, y0 = np.minimum(x, width), np.minimum(y, height)
    x1, y1 = np.minimum(x0 + w, width), np.minimum(y0 + h, height)
    inside = total[y1, x1] - total[y0, x1] - total[y1, x0] + total[y0, x0]
    return inside / (w * h) < 0.5


def _whole_pixels(boxes: np.ndarray) -> np.ndarray:
    return np.maximum(np.floor(boxes + 0.5), 1).astype(int)


def overlaps(detections: np.ndarray, objects: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """(d, g) IoU of boxes (left, top, width, height); with ``ignored`` objects (g,) intersection / detection area."""
    d, g = detections[:, None], objects[None]
    sides = np.minimum(d[..., :2] + d[..., 2:], g[..., :2] + g[..., 2:]) - np.maximum(d[..., :2], g[..., :2])
    shared = np.prod(np.maximum(sides, 0), axis=-1)
    area = np.prod(detections[:, 2:], axis=1)[:, None]
    union = np.where(ignored[None], area, area + np.prod(objects[:, 2:], axis=1)[None] - shared)
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def match(detections: np.ndarray, objects: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """Match detections of one class in one image greedily at each of THRESHOLDS.

    A detection takes the free object of the largest overlap at or above the threshold (of equal ones the last);
    without one, it is absorbed if it overlaps an ignored object so much. Ignored objects are never used up.

    Args:
        detections: (d, 4) left, top, width, height, best first.
        objects: (g, 4).
        ignored: (g,) bool.

    Returns:
        (10, d) int8: 1 matched to an object, -1 absorbed, 0 neither.
    """
    verdicts = np.zeros((len(THRESHOLDS), len(detections)), dtype=np.int8)
    if not len(detections) or not len(objects):
        return verdicts
    table = overlaps(detections, objects, ignored)
    absorbing, real = table[:, ignored].max(axis=1, initial=-1.0), table[:, ~ignored]
    free = np.ones((len(THRESHOLDS), real.shape[1]), dtype=bool)
    for i in np.flatnonzero(table.max(axis=1) >= THRESHOLDS[0]):
        candidates = np.where(free & (real[i] >= THRESHOLDS[:, None]), real[i], -1.0)
        verdicts[:, i] = -(absorbing[i] >= THRESHOLDS).astype(np.int8)
        if candidates.shape[1]:
            last = candidates.shape[1] - 1 - candidates[:, ::-1].argmax(axis=1)  # argmax takes the first
            found = candidates[np.arange(len(THRESHOLDS)), last] >= 0
            verdicts[found, i] = 1
            free[found, last[found]] = False
    return verdicts


def average_precision(scores: np.ndarray, verdicts: np.ndarray, objects: int) -> float:
    """Area under the interpolated precision over recall, from detections (d,) of all images and their verdicts."""
    verdicts = verdicts[np.argsort(-scores, kind="stable")]
    hits, misses = np.cumsum(verdicts == 1), np.cumsum(verdicts == 0)
    counted = verdicts != -1
    hits, misses = hits[counted], misses[counted]
    recall = np.concatenate([[0.0], hits / max(objects, 1), [1.0]])
    precision = np.concatenate([[0.0], hits / np.maximum(hits + misses, 1), [0.0]])
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall) * envelope[1:]))


def evaluate_classes(
    ground_truth: Sequence[np.ndarray], detections: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]]
) -> list[ClassResult]:
    """Results of the ten classes.

    Args:
        ground_truth: of each image (n, 8) rows as :func:`msad.data.visdrone.read_rows` reads them.
        detections: of each image (m, 6 or more): left, top, width, height, score, category (1 to 10).
        sizes: (height, width) of each image in pixels.
    """
    matched: list[list[_Matched]] = [[] for _ in CLASSES]
    for rows, found, size in zip(ground_truth, detections, sizes, strict=True):
        regions, rows = rows[rows[:, 5] == IGNORED_REGION, :4], rows[rows[:, 5] != IGNORED_REGION]
        rows = rows[outside_regions(rows[:, :4], regions, size)]
        found = found[outside_regions(found[:, :4], regions, size)]
        found = found[np.argsort(-found[:, 4], kind="stable")][: LIMITS[-1]]
        for category, images in enumerate(matched, start=1):
            objects, places = rows[rows[:, 5] == category], np.flatnonzero(found[:, 5] == category)
            mine = found[places]
            verdicts = match(mine[:, :4], objects[:, :4], objects[:, 4] == 0)
            images.append(_Matched(mine[:, 4], places, verdicts, len(objects)))
    return [_class_result(images) for images in matched]


def _class_result(images: list[_Matched]) -> ClassResult:
    objects = sum(image.objects for image in images)
    scores = np.concatenate([image.scores for image in images] or [np.zeros(0)])
    places = np.concatenate([image.places for image in images] or [np.zeros(0)])
    verdicts = np.concatenate([image.verdicts for image in images] or [np.zeros((len(THRESHOLDS), 0))], axis=1)
    return ClassResult(
        ap=np.array([average_precision(scores, row, objects) for row in verdicts]),
        recall=np.array([(verdicts[:, places < k] == 1).sum(axis=1) / max(objects, 1) for k in LIMITS]),
        images=sum(image.objects > 0 for image in images),
    )


def summarize(classes: Sequence[ClassResult]) -> dict[str, float]:
    """The metrics in percent.

    "AP", "AP50", "AP75", "AR1", "AR10", "AR100", "AR500" weigh a class by the number of images that contain it, as
    the toolkit does; NaN without any object. The same with "_plain" is the mean over the ten classes, where a class
    without ground truth counts as 0. "AP-NAME" is the AP of a class, NaN if it has no ground truth.
    """
    weights = np.array([result.images for result in classes], dtype=float)
    ap = np.array([result.ap for result in classes]) * 100
    recall = np.array([result.recall for result in classes]) * 100
    by_class = {"AP": ap.mean(axis=1), "AP50": ap[:, 0], "AP75": ap[:, 5]}
    by_class |= {f"AR{k}": recall[:, i].mean(axis=1) for i, k in enumerate(LIMITS)}
    metrics = {
        name: float(np.average(values, weights=weights)) if weights.any() else float("nan")
        for name, values in by_class.items()
    }
    metrics |= {f"{name}_plain": float(values.mean()) for name, values in by_class.items()}
    for name, value, weight in zip(CLASSES, by_class["AP"], weights):
        metrics[f"AP-{name}"] = float(value) if weight else float("nan")
    return metrics
