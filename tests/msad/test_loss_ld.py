"""Localization distillation (LD) against NumPy and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from head_predictions import BINS, SIZE, UNEVEN, K, array, build, call, make_pair, sigmoid, softmax, values

from msad.distill.losses.ld import LD, mean_kl, mean_per_level
from msad.modeling.detectors import atss


def loop_kl(s, t, temperature):
    p, q = softmax(t / temperature), softmax(s / temperature)
    return temperature**2 * np.mean(p * (np.log(p) - np.log(q)))


def loop_region(pair, boxes, lower=0.25):
    """IoU of the best box in whose region a cell is; one image, box and cell at a time. ``boxes``: per image."""
    anchors = array(atss.anchors_around(pair.anchors, SIZE))
    out = np.zeros(pair.labels.shape)
    for n, per_image in enumerate(boxes):
        for box in np.array(per_image, dtype=float).reshape(-1, 4):
            iou, diou, distance = [], [], []
            for a in anchors:
                shared = max(min(a[2], box[2]) - max(a[0], box[0]), 0) * max(min(a[3], box[3]) - max(a[1], box[1]), 0)
                area = (box[2] - box[0]) * (box[3] - box[1]) + (a[2] - a[0]) * (a[3] - a[1])
                apart = (a[:2] + a[2:] - box[:2] - box[2:]) / 2
                hull = np.maximum(a[2:], box[2:]) - np.minimum(a[:2], box[:2])
                iou.append(shared / (area - shared))
                distance.append((apart**2).sum())
                diou.append(iou[-1] - distance[-1] / (hull**2).sum())
            near, first = [], 0
            for size in pair.level_sizes:
                near += sorted(range(first, first + size), key=lambda i: distance[i])[:9]
                first += size
            limit = np.mean([iou[i] for i in near]) + np.std([iou[i] for i in near], ddof=1)
            for r in range(len(anchors)):
                if lower * limit <= diou[r] < limit:
                    out[n, r] = max(out[n, r], iou[r])
    return out


# No two cells are equally far from the centre of a box.


@pytest.mark.parametrize("options", [{}, {"per_image": True, "w_main": 1.0, "temperature": 3.0, "vlr_lower": 0.5}])
def test_ld_equals_numpy(options):
    pair, batch = make_pair(boxes=UNEVEN)
    z, y = array(pair.student_logits), array(pair.teacher_logits)
    s, t = (array(x).reshape(2, -1, 4, BINS) for x in (pair.student_boxes, pair.teacher_boxes))
    temperature = options.get("temperature", 10.0)
    region = loop_region(pair, UNEVEN, options.get("vlr_lower", 0.25))
    main = vlr = positives = 0
    cls = {0: [], 1: []}  # of each level
    for n in range(2):
        for r in range(80):
            kl = sum(loop_kl(s[n, r, i], t[n, r, i], temperature) for i in range(4))
            if pair.labels[n, r] < K:
                positives += 1
                main += sigmoid(z[n, r]).max() * kl / 4
                cls[int(r >= 64)].append(loop_kl(z[n, r], y[n, r], 2.0))
            else:
                vlr += region[n, r] * kl / 16
    assert positives > 4 and vlr > 0 and len(cls[0]) != len(cls[1]) and all(cls.values())
    share = 0.5 if "per_image" in options else 1.0
    expected = {
        "main": options.get("w_main", 0.25) * share * main, "vlr": 0.25 * share * vlr,
        "cls": 10 * sum(np.mean(level) for level in cls.values()),
    }  # fmt: skip
    assert values(LD(**options), batch) == pytest.approx(expected, rel=1e-5)


def test_mean_kl_by_hand():
    """t = (0.8, 0.2), s = (0.5, 0.5) at T 1; with T the logits are divided and the result multiplied by T^2."""
    s, t = torch.zeros(2), torch.tensor([math.log(0.8), math.log(0.2)])
    kl = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    assert mean_kl(s, t, 1.0).item() == pytest.approx(kl / 2, rel=1e-5)
    assert mean_kl(5 * s, 5 * t, 5.0).item() == pytest.approx(25 * kl / 2, rel=1e-5)
    assert mean_kl(t, t, 5.0).item() == 0


def test_mean_per_level_by_hand():
    """Anchors 0 to 3, none, 4, and 5 to 6."""
    values, place = torch.tensor([1.0, 2.0, 6.0, 5.0]), torch.tensor([3, 0, 1, 5])
    assert mean_per_level(values, place, [4, 0, 1, 2]).tolist() == [3, 0, 0, 5]
    assert mean_per_level(values[:0], place[:0], [4, 1]).tolist() == [0, 0]


def test_valuable_region_equals_loops():
    pair, batch = make_pair(boxes=UNEVEN)
    flat, image = batch.boxes(torch.device("cpu"))
    found = pair.region(flat, image, lower=0.25)
    np.testing.assert_allclose(found.numpy(), loop_region(pair, UNEVEN), rtol=1e-5)
    assert 4 < (found > 0).sum() < 100


def test_terms_of_weight_zero_are_left_out():
    _, batch = make_pair()
    assert list(values(LD(w_vlr=0.0, w_cls=0.0), batch)) == ["main"]


def test_a_single_class_has_no_class_distillation():
    logits = torch.randn(2, 80, 1)
    _, batch = make_pair(student_logits=logits, teacher_logits=-logits, classes=K)
    assert values(LD(), batch)["cls"] == 0


def test_gradient_of_the_main_term():
    """Of the distributions; the scores that weigh them have none."""
    pair, batch = make_pair(dtype=torch.float64, boxes=[UNEVEN[1]])
    loss = build("LD", W_VLR=0.0, W_CLS=0.0)

    def value(boxes):
        pair.student_boxes = boxes
        return sum(call(loss, batch).values())

    assert torch.autograd.gradcheck(value, pair.student_boxes, fast_mode=True)


def test_scores_weigh_the_main_term_without_gradient():
    pair, batch = make_pair()
    call(LD(w_vlr=0.0, w_cls=0.0), batch)["main"].backward()
    assert pair.student_logits.grad is None and pair.student_boxes.grad.abs().sum() > 0


def test_the_released_region_divides_by_the_anchor():
    """Overlap / anchor area - (distance / diagonal)^2 in place of DIoU, with loops."""
    pair, context = make_pair(boxes=UNEVEN)
    found = pair.region(*context.boxes(torch.device("cpu")), lower=0.25, distance="released")
    anchors = array(atss.anchors_around(pair.anchors, SIZE))
    flat, image = (x.numpy() for x in context.boxes(torch.device("cpu")))
    cells = list(pair.anchors.split(pair.level_sizes))
    thresholds = atss.find_candidates(cells, torch.tensor(flat), 9, SIZE).threshold.numpy()
    expected = np.zeros((len(UNEVEN), len(anchors)))
    for box, n, threshold in zip(flat, image, thresholds):
        for r, a in enumerate(anchors):
            sides = np.minimum(box[2:], a[2:]) - np.maximum(box[:2], a[:2])
            overlap = np.prod(sides.clip(min=0))
            area, own = np.prod(box[2:] - box[:2]), np.prod(a[2:] - a[:2])
            hull = np.maximum(box[2:], a[2:]) - np.minimum(box[:2], a[:2])
            shift = (box[:2] + box[2:] - a[:2] - a[2:]) / 2
            measure = overlap / own - np.sum(shift**2) / np.sum(hull**2)
            if 0.25 * threshold <= measure < threshold:
                expected[n, r] = max(expected[n, r], overlap / (area + own - overlap))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-6)
    paper = pair.region(*context.boxes(torch.device("cpu")), lower=0.25)
    assert (found > 0).sum() != (paper > 0).sum()
    with pytest.raises(ValueError, match="REGION must be 'paper' or 'released', not 'both'"):
        build("LD", REGION="both")
