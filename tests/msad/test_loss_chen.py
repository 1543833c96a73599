"""Chen's losses of classes and boxes against NumPy and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from head_predictions import BINS, TRANSFORMS, WEIGHTS, K, array, call, make_pair, sigmoid, softmax, values

from msad.distill.losses import chen
from msad.distill.losses.chen import Chen, bounded_regression, soft_binary_cross_entropy, soft_cross_entropy
from msad.evaluation.memory import TensorMemory


def test_soft_cross_entropy_by_hand():
    """P_t = (0.7, 0.2, 0.1), P_s = (0.5, 0.3, 0.2), the first being background: 1.1295."""
    t, s = (torch.tensor([a, b, c]).log() for a, b, c in ((0.2, 0.1, 0.7), (0.3, 0.2, 0.5)))
    expected = -(1.5 * 0.7 * math.log(0.5) + 0.2 * math.log(0.3) + 0.1 * math.log(0.2))
    assert soft_cross_entropy(s, t).item() == pytest.approx(1.1295, abs=1e-4) == pytest.approx(expected, abs=1e-4)


def test_soft_binary_cross_entropy_by_hand():
    """sigmoid(t) = 0.75 and 0.5, s = 0: ln 2 (0.75 + 1.5 * 0.25) + ln 2 (0.5 + 1.5 * 0.5); focus: 1/4 and 0."""
    t, s = torch.tensor([math.log(3), 0.0]), torch.zeros(2)
    assert soft_binary_cross_entropy(s, t).item() == pytest.approx(math.log(2) * (1.125 + 1.25), rel=1e-5)
    assert soft_binary_cross_entropy(s, t, focus=2.0).item() == pytest.approx(math.log(2) * 1.125 / 16, rel=1e-5)


def test_bounded_regression_by_hand():
    """e_s 0.09 and e_t 0.16: free without margin, 0.09 with margin 0.1; with e_t 0.04 always 0.09."""
    y = torch.zeros(2, 4)
    s = torch.tensor([[0.3, 0, 0, 0], [0, 0, 0.3, 0]])
    t = torch.tensor([[0.4, 0, 0, 0], [0, 0.2, 0, 0]])
    torch.testing.assert_close(bounded_regression(s, t, y), torch.tensor([0.0, 0.09]))
    torch.testing.assert_close(bounded_regression(s, t, y, margin=0.1), torch.tensor([0.09, 0.09]))


def loop_deltas(kind, anchor, box):
    (cx, cy), (w, h) = (anchor[:2] + anchor[2:]) / 2, anchor[2:] - anchor[:2]
    if kind in ("distributions", "fcos"):
        d = np.array([cx - box[0], cy - box[1], box[2] - cx, box[3] - cy]) / w
        return d if kind == "fcos" else d.clip(0, BINS - 1.1)
    (bx, by), (bw, bh) = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
    return np.array([(bx - cx) / w, (by - cy) / h, np.log(bw / w), np.log(bh / h)]) * WEIGHTS


def loop_chen(kind, pair, mu=0.5, nu=0.5, margin=0.0, w_bg=1.5, focus=2.0):
    soft = bounded = positives = drawn = 0
    z_s, z_t, b_s, b_t, y = map(
        array, (pair.student_logits, pair.teacher_logits, pair.student_boxes, pair.teacher_boxes, pair.targets)
    )
    for n, r in np.ndindex(*pair.labels.shape):
        label = pair.labels[n, r].item()
        if label < 0:
            continue
        drawn += 1
        if kind == "roi":
            p, q = softmax(z_t[n, r]), softmax(z_s[n, r])
            soft -= sum((w_bg if c == K else 1.0) * p[c] * np.log(q[c]) for c in range(K + 1))
        else:
            for a, b in zip(sigmoid(z_s[n, r]), sigmoid(z_t[n, r])):
                factor = abs(a - b) ** focus if kind != "rpn" else 1.0
                soft -= factor * (b * np.log(a) + w_bg * (1 - b) * np.log(1 - a))
        if label == pair.classes:
            continue
        positives += 1
        own, theirs = b_s[n, r], b_t[n, r]
        if kind == "distributions":
            own, theirs = (softmax(x.reshape(4, BINS)) @ np.arange(BINS) for x in (own, theirs))
        if kind == "fcos":
            own, theirs = own.clip(0), theirs.clip(0)
        if kind == "roi":
            own, theirs = (x.reshape(K, 4)[label] for x in (own, theirs))
        goal = loop_deltas(kind, array(pair.anchors)[r], y[n, r])
        e_s, e_t = ((own - goal) ** 2).sum(), ((theirs - goal) ** 2).sum()
        bounded += e_s * (e_s + margin > e_t)
    assert positives > 3
    count = drawn if kind in ("rpn", "roi") else positives
    return {f"{pair.name}_cls": (1 - mu) / mu * soft / count, f"{pair.name}_reg": nu * bounded / count}


@pytest.mark.parametrize("kind", ["fcos", "retinanet", "roi"])
def test_the_teachers_boxes_move_along_the_diagonal(kind):
    """By 5 sqrt(2) pixels: 5 in x and 5 in y, on positives, and the student's and the targets stay."""
    pair, _ = make_pair(kind)
    transform, (image, anchor) = TRANSFORMS[kind], pair.positives
    near = pair.targets[image, anchor] + torch.tensor([1.0, -1.0, 2.0, 1.0])
    width = pair.teacher_boxes.shape[2] // 4
    said = transform.get_deltas(pair.anchors[anchor], near)
    pair.teacher_boxes[image, anchor] = said.repeat(1, width)
    s, t, target = pair.matched_deltas()
    moved_s, moved, same = pair.matched_deltas(5 * math.sqrt(2))
    assert torch.equal(s, moved_s) and torch.equal(target, same)
    # Of a distance that is not inside, FCOS says 0.
    inside = (said > 0).all(dim=1) if kind == "fcos" else torch.ones(len(said), dtype=torch.bool)
    assert inside.sum() > 3
    boxes = [transform.apply_deltas(x, pair.anchors[anchor])[inside] for x in (t, moved)]
    torch.testing.assert_close(boxes[0], near[inside], rtol=1e-4, atol=1e-3)
    still = (moved > 0).all(dim=1)[inside] if kind == "fcos" else inside[inside]
    torch.testing.assert_close(boxes[1][still], near[inside][still] + 5, rtol=1e-4, atol=1e-3)
    plain, shifted = (Chen(bbox="direct", box_shift=x)([pair], None)[f"{pair.name}_reg"] for x in (0.0, 12.0))
    assert plain != shifted


@pytest.mark.parametrize("kind", sorted(TRANSFORMS))
@pytest.mark.parametrize(
    "options", [{}, {"mu": 0.8, "nu": 2.0, "margin": 5.0, "w_bg": 1.0, "focus": 0.0}], ids=["default", "options"]
)
def test_chen_equals_numpy(kind, options):
    pair, batch = make_pair(kind)
    assert values(Chen(**options), batch) == pytest.approx(loop_chen(kind, pair, **options), rel=1e-5)


def test_class_agnostic_boxes():
    pair, batch = make_pair("roi")
    both = pair.student_boxes, pair.teacher_boxes
    agnostic = [x[..., :4] for x in both]
    pair.student_boxes, pair.teacher_boxes = (x.repeat(1, 1, K) for x in agnostic)
    expected = values(Chen(), batch)
    pair.teacher_boxes = agnostic[1]  # also of one side alone
    assert values(Chen(), batch) == expected


def test_regression_pulls_to_the_ground_truth_and_the_teacher_only_gates():
    pair, batch = make_pair("fcos")
    loss = Chen(mu=1.0)
    call(loss, batch)["dense_reg"].backward()
    first = pair.student_boxes.grad.clone()
    pair.student_boxes.grad = None
    pair.teacher_boxes = pair.teacher_boxes - 1e-4  # errors move, no gate flips
    call(loss, batch)["dense_reg"].backward()
    assert torch.equal(first, pair.student_boxes.grad) and first.abs().sum() > 0


def test_chen_takes_anchors_in_parts(monkeypatch):
    """Values and gradients are those of all anchors at once; between the passes nothing but the loss is kept."""
    found = {}
    for at_once in (10**6, 7):
        monkeypatch.setattr(chen, "ANCHORS_AT_ONCE", at_once)
        pair, _ = make_pair("retinanet")
        pair.student_logits = pair.student_logits.detach().requires_grad_()
        with TensorMemory() as memory:
            loss = Chen()._classification(pair)
            kept = memory.bytes
            loss.sum().backward()
        found[at_once] = loss.detach(), pair.student_logits.grad, kept, memory.peak
    torch.testing.assert_close(found[7][:2], found[10**6][:2])
    assert found[7][2] <= 3 * loss.nbytes < found[10**6][2], "the loss, its labels' mask and itself before that"
    assert found[7][3] < found[10**6][3]


def test_soft_classification_is_least_at_the_teacher_if_weights_are_equal():
    z = torch.randn(5, K + 1, dtype=torch.float64)
    at = z.clone().requires_grad_()
    soft_cross_entropy(at, z, w_bg=1.0).sum().backward()
    assert at.grad.abs().max() < 1e-12
