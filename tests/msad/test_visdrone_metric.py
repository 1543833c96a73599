"""The metric of VisDrone-DET against a slow restatement of its rules, and cases counted by hand."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest

from msad.evaluation.visdrone import (
    LIMITS,
    THRESHOLDS,
    ClassResult,
    average_precision,
    evaluate_classes,
    match,
    outside_regions,
    summarize,
)

SIZE = (60, 80)


# --- the rules again, one pixel and one pair at a time ---------------------------------------------------------------


@functools.cache
def covered_pixels(regions, size) -> set:
    """(column, row) pairs counted from 1."""
    height, width = size
    covered = set()
    for x, y, w, h in (tuple(max(1, math.floor(v + 0.5)) for v in region) for region in regions):
        covered |= {(i, j) for i in range(x, x + w + 1) for j in range(y, y + h + 1) if i <= width and j <= height}
    return covered


@functools.cache
def slow_keeps(box, regions, size) -> bool:
    covered = covered_pixels(regions, size)
    x, y, w, h = (max(1, math.floor(v + 0.5)) for v in box)
    inside = sum((i, j) in covered for i in range(x + 1, x + w + 1) for j in range(y + 1, y + h + 1))
    return inside / (w * h) < 0.5


def slow_overlap(a, b, ignored) -> float:
    across = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    down = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    if across <= 0 or down <= 0:
        return 0.0
    shared = across * down
    return shared / (a[2] * a[3] if ignored else a[2] * a[3] + b[2] * b[3] - shared)


def slow_class(ground_truth, detections, sizes, category, threshold, limit) -> tuple[float, float, int]:
    """AP, recall and the number of images with the class."""
    entries, total, images = [], 0, 0
    for rows, found, size in zip(ground_truth, detections, sizes):
        rows, found = [tuple(row) for row in rows.tolist()], [tuple(row) for row in found.tolist()]
        regions = tuple(row[:4] for row in rows if row[5] == 0)
        objects = [row for row in rows if row[5] != 0 and slow_keeps(row[:4], regions, size)]
        objects = [row for row in objects if row[5] == category]
        objects.sort(key=lambda row: row[4] == 0)  # evaluated ones first
        total += len(objects)
        images += bool(objects)
        kept = [row for row in found if slow_keeps(row[:4], regions, size)]
        kept = sorted(kept, key=lambda row: -row[4])[:limit]
        taken = set()
        for row in (row for row in kept if row[5] == category):
            best, chosen = threshold, None
            for number, thing in enumerate(objects):
                if number in taken:
                    continue
                if chosen is not None and objects[chosen][4] != 0 and thing[4] == 0:
                    break
                overlap = slow_overlap(row, thing, thing[4] == 0)
                if overlap >= best:
                    best, chosen = overlap, number
            if chosen is None:
                entries.append((row[4], 0))
            elif objects[chosen][4] == 0:
                continue  # absorbed
            else:
                taken.add(chosen)
                entries.append((row[4], 1))
    entries.sort(key=lambda entry: -entry[0])
    hits, curve = 0, []
    for number, (_, hit) in enumerate(entries, start=1):
        hits += hit
        curve.append((hits / max(total, 1), hits / number))
    area, before = 0.0, 0.0
    for number, (recall, _) in enumerate(curve):
        area += (recall - before) * max(precision for _, precision in curve[number:])
        before = recall
    return area, hits / max(total, 1), images


def slow_metrics(ground_truth, detections, sizes) -> dict[str, float]:
    ap = [[slow_class(ground_truth, detections, sizes, c, t, 500)[0] for t in THRESHOLDS] for c in range(1, 11)]
    images = [slow_class(ground_truth, detections, sizes, c, 0.5, 500)[2] for c in range(1, 11)]
    listed = [c for c in range(10) for _ in range(images[c])]  # one entry an image and class
    values = {"AP": [sum(row) / 10 for row in ap], "AP50": [row[0] for row in ap], "AP75": [row[5] for row in ap]}
    for k in LIMITS:
        values[f"AR{k}"] = [
            sum(slow_class(ground_truth, detections, sizes, c, t, k)[1] for t in THRESHOLDS) / 10 for c in range(1, 11)
        ]
    out = {name: 100 * sum(row[c] for c in listed) / len(listed) for name, row in values.items()}
    return out | {f"{name}_plain": 100 * sum(row) / 10 for name, row in values.items()}


def random_images(seed, images=4, objects=9, found=30):
    rng = np.random.default_rng(seed)
    ground_truth, detections = [], []
    for _ in range(images):
        n = rng.integers(0, objects)
        corner, sides = rng.integers(0, 55, (n, 2)), rng.integers(0, 25, (n, 2))
        category = rng.choice([0, 1, 1, 4, 4, 4, 9, 11], n)
        score = (rng.random(n) > 0.3) * (category > 0)
        rows = np.column_stack([corner, sides, score, category, np.zeros((n, 2))]).astype(float)
        rows = rows[(rows[:, 2] > 0) & (rows[:, 3] > 0)]
        near = rows[rng.integers(0, len(rows), found // 2), :4] if len(rows) else np.zeros((0, 4))
        near = near + rng.integers(-2, 3, near.shape)
        far = np.column_stack([rng.uniform(-3, 70, (found // 2, 2)), rng.uniform(1, 20, (found // 2, 2))])
        boxes = np.maximum(np.concatenate([near, far]), [-3, -3, 1, 1])
        scores = rng.choice(np.linspace(0.05, 0.95, 400), len(boxes), replace=False)  # ties would have no order
        category = rng.choice([1, 4, 4, 9, 2], len(boxes))
        ground_truth.append(rows)
        detections.append(np.column_stack([boxes, scores, category, -np.ones((len(boxes), 2))]))
    return ground_truth, detections, [SIZE] * images


@pytest.mark.parametrize("seed", range(6))
def test_equals_the_slow_restatement(seed):
    ground_truth, detections, sizes = random_images(seed)
    found = summarize(evaluate_classes(ground_truth, detections, sizes))
    expected = slow_metrics(ground_truth, detections, sizes)
    assert expected["AP50"] > 0
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-9), name


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_a_class_counts_once_for_every_image_that_has_it():
    """Class A in 3 images with AP 60, class B in 1 image with AP 20: toolkit 50, plain mean of two 40."""
    of_a = ClassResult(np.full(10, 0.6), np.full((4, 10), 0.6), 3)
    of_b = ClassResult(np.full(10, 0.2), np.full((4, 10), 0.2), 1)
    nothing = ClassResult(np.zeros(10), np.zeros((4, 10)), 0)
    metrics = summarize([of_a, of_b] + [nothing] * 8)
    assert metrics["AP"] == pytest.approx(50) and metrics["AR10"] == pytest.approx(50)
    assert metrics["AP_plain"] == pytest.approx(40 * 2 / 10)  # the other eight classes count as 0
    assert metrics["AP-pedestrian"] == pytest.approx(60) and math.isnan(metrics["AP-bicycle"])


def test_no_objects_at_all():
    metrics = summarize(evaluate_classes([np.zeros((0, 8))], [np.array([[1, 1, 5, 5, 0.9, 4, -1, -1.0]])], [SIZE]))
    assert math.isnan(metrics["AP"]) and metrics["AP_plain"] == 0.0
    assert math.isnan(summarize(evaluate_classes([], [], []))["AP"])


def test_the_limit_is_one_for_all_classes_of_an_image():
    rows = np.array([[0, 0, 10, 10, 1, 1, 0, 0], [20, 0, 10, 10, 1, 4, 0, 0]], float)
    found = np.array([[0, 0, 10, 10, 0.9, 1, -1, -1], [20, 0, 10, 10, 0.8, 4, -1, -1]], float)
    metrics = summarize(evaluate_classes([rows], [found], [SIZE]))
    assert metrics["AR1"] == pytest.approx(50) and metrics["AR10"] == pytest.approx(100)
    assert metrics["AP"] == pytest.approx(100)


def test_ap_counts_500_detections_of_an_image():
    rows = np.array([[0, 0, 10, 10, 1, 4, 0, 0]], float)
    better = np.column_stack([np.full((500, 4), 30.0), np.linspace(0.9, 0.5, 500), np.full(500, 2), -np.ones((500, 2))])
    hit = np.array([[0, 0, 10, 10, 0.4, 4, -1, -1]])
    for others, ap in ((better, 0.0), (better[1:], 100.0)):
        found = np.concatenate([hit, others])
        assert summarize(evaluate_classes([rows], [found], [SIZE]))["AP-car"] == pytest.approx(ap)


def test_detections_are_sorted():
    rows = np.array([[0, 0, 10, 10, 1, 4, 0, 0]], float)
    found = np.array([[40, 40, 10, 10, 0.1, 4, -1, -1], [0, 0, 10, 10, 0.9, 4, -1, -1]], float)
    assert summarize(evaluate_classes([rows], [found], [SIZE]))["AR1"] == pytest.approx(100)


def test_area_under_all_points():
    # hit, miss, hit of 3 objects: precision 1, 1/2, 2/3 at recall 1/3, 1/3, 2/3; the envelope is 1, 2/3, 2/3.
    area = average_precision(np.array([0.7, 0.9, 0.8]), np.array([1, 1, 0]), 3)
    assert area == pytest.approx(1 / 3 * 1 + 1 / 3 * 2 / 3)
    # An absorbed detection is neither: without it the order is hit, hit.
    assert average_precision(np.array([0.9, 0.8, 0.7]), np.array([1, -1, 1]), 2) == pytest.approx(1.0)
    assert average_precision(np.zeros(0), np.zeros(0), 5) == 0.0


def test_ignored_objects_absorb_and_stay_in_the_denominator():
    rows = np.array([[0, 0, 10, 10, 1, 4, 0, 0], [30, 0, 20, 20, 0, 4, 0, 0]], float)
    # One hit, and two small boxes within the ignored object: intersection / detection area is 1.
    found = np.array([[0, 0, 10, 10, 0.5, 4, -1, -1], [30, 0, 5, 5, 0.9, 4, -1, -1], [40, 0, 5, 5, 0.8, 4, -1, -1]])
    metrics = summarize(evaluate_classes([rows], [found], [SIZE]))
    assert metrics["AP-car"] == pytest.approx(50)  # recall 1/2 at precision 1
    assert metrics["AR500"] == pytest.approx(50)


def test_equality_matches_and_of_equal_overlaps_the_last_wins():
    detection = np.array([[0.0, 0, 10, 10]])
    assert match(detection, np.array([[0.0, 0, 10, 5]]), np.array([False]))[:, 0].tolist() == [1] + [0] * 9
    three_fifths = match(detection, np.array([[0.0, 0, 10, 6]]), np.array([False]))[:, 0]
    assert three_fifths.tolist() == [1, 1, 1] + [0] * 7
    # Two objects of equal overlap: the last is used up, so the second detection, which fits it alone, is a miss.
    objects = np.array([[0.0, 0, 10, 5], [0, 5, 10, 5]])
    verdicts = match(np.array([[0.0, 0, 10, 10], [0, 5, 10, 5]]), objects, np.array([False, False]))
    assert verdicts[0].tolist() == [1, 0]
    verdicts = match(np.array([[0.0, 0, 10, 10], [0, 0, 10, 5]]), objects, np.array([False, False]))
    assert verdicts[0].tolist() == [1, 1]


def test_a_real_object_is_preferred_to_an_ignored_one_of_larger_overlap():
    objects, ignored = np.array([[0.0, 0, 10, 6], [0, 0, 10, 10]]), np.array([False, True])
    verdicts = match(np.array([[0.0, 0, 10, 10], [0, 0, 10, 10]]), objects, ignored)
    assert verdicts[:, 0].tolist() == [1] * 3 + [-1] * 7
    assert verdicts[:, 1].tolist() == [-1] * 10


def test_half_inside_a_region_is_out():
    # Region of columns 11 to 21 (left 11, width 10, both ends); a box of left x covers x + 1 to x + w.
    region = np.array([[11.0, 1, 10, 30]])
    boxes = np.array([[6.0, 5, 8, 8], [5, 5, 8, 8], [13, 5, 8, 8], [16, 5, 10, 8], [17, 5, 10, 8]])
    # columns 7-14: 4 of 8 inside; 6-13: 3 of 8; all; 17-26: 5 of 10; 18-27: 4 of 10
    assert outside_regions(boxes, region, SIZE).tolist() == [False, True, False, False, True]


def test_a_box_over_the_border_is_measured_whole():
    # Everything inside the image is ignored, but that is only 4 of the 10 columns.
    region = np.array([[1.0, 1, 200, 200]])
    assert outside_regions(np.array([[76.0, 5, 10, 5], [74.0, 5, 10, 5]]), region, SIZE).tolist() == [True, False]


def test_objects_inside_a_region_do_not_count_for_their_class():
    rows = np.array([[1, 1, 40, 40, 0, 0, 0, 0], [5, 5, 10, 10, 1, 4, 0, 0], [60, 5, 10, 10, 1, 4, 0, 0]], float)
    found = np.array([[60, 5, 10, 10, 0.3, 4, -1, -1], [5, 5, 10, 10, 0.9, 4, -1, -1]], float)
    assert summarize(evaluate_classes([rows], [found], [SIZE]))["AP-car"] == pytest.approx(100)
    none_left = summarize(evaluate_classes([rows[:2]], [found[1:]], [SIZE]))
    assert math.isnan(none_left["AP"])


def test_others_are_neither_evaluated_nor_absorbing():
    rows = np.array([[0, 0, 10, 10, 1, 11, 0, 0], [30, 0, 10, 10, 1, 4, 0, 0]], float)
    found = np.array([[0, 0, 10, 10, 0.9, 4, -1, -1], [30, 0, 10, 10, 0.8, 4, -1, -1]], float)
    assert summarize(evaluate_classes([rows], [found], [SIZE]))["AP-car"] == pytest.approx(50)
