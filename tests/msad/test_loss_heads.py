"""Losses between head predictions, LD and Chen: against NumPy and by hand, and what every loss must do."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform, Box2BoxTransformLinear
from detectron2.structures import Boxes, Instances
from helpers import between, make_context

from msad.distill.context import HeadPair
from msad.distill.losses import chen
from msad.distill.losses.chen import Chen, bounded_regression, soft_binary_cross_entropy, soft_cross_entropy
from msad.distill.losses.ld import LD, mean_kl, mean_per_level
from msad.distill.losses.registry import WeightedLoss
from msad.evaluation.memory import TensorMemory
from msad.modeling.detectors import atss
from msad.modeling.detectors.distribution import DistributionTransform
from msad.modeling.head_outputs import coordinates, decode

K, BINS, SIZE = 3, 9, 3.0
WEIGHTS = (10.0, 10.0, 5.0, 5.0)
BOXES = [[[6.0, 9.0, 40.0, 30.0], [20.0, 4.0, 60.0, 44.0]], [[8.0, 8.0, 30.0, 50.0]]]
TRANSFORMS = {
    "distributions": DistributionTransform(BINS - 1),
    "fcos": Box2BoxTransformLinear(normalize_by_size=True),
    "retinanet": Box2BoxTransform(weights=WEIGHTS),
    "rpn": Box2BoxTransform(weights=WEIGHTS),
    "roi": Box2BoxTransform(weights=WEIGHTS),
}


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def grid(h, w, stride):
    y, x = torch.meshgrid(torch.arange(h) * 1.0, torch.arange(w) * 1.0, indexing="ij")
    return torch.stack([x, y, x + 1, y + 1], dim=-1).reshape(-1, 4) * stride


def make_pair(kind="distributions", boxes=BOXES, seed=0, dtype=torch.float32, identical=False, **changes):
    """A pair of the kind on two levels of a 64x64 image each, ground truth assigned by ATSS; and its batch."""
    generator = torch.Generator().manual_seed(seed)
    n, sizes = len(boxes), [64, 16]
    cells = [grid(8, 8, 8), grid(4, 4, 16)]
    gt = []
    for b in boxes:
        gt.append(Instances((64, 64)))
        gt[-1].gt_boxes = Boxes(torch.tensor(b).view(-1, 4))
    batch = make_context([(64, 64)] * n, gt)
    flat, image = batch.boxes(torch.device("cpu"))
    matched = atss.assign(cells, flat, image, n, size=SIZE)
    labels = torch.where(matched < len(flat), matched % K, K)
    targets = torch.cat([flat, torch.zeros(1, 4)])[matched]
    anchors, classes, name = torch.cat(cells), K, "dense"
    if kind in ("rpn", "retinanet"):
        anchors = atss.anchors_around(anchors, 4.0)
        labels[:, ::7] = -1
    if kind == "rpn":
        classes, name = 1, "rpn"
        labels = torch.where(labels < 0, -1, (labels == K).long())
    if kind == "roi":
        name = "roi"
        labels, targets, anchors = labels.view(1, -1), targets.view(1, -1, 4), (3 + anchors).repeat(n, 1)
    width = {"distributions": 4 * BINS, "roi": 4 * K}.get(kind, 4)
    shapes = [(*labels.shape, classes + (kind == "roi")), (*labels.shape, width)]
    student = [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]
    teacher = [x.clone() if identical else torch.randn(x.shape, generator=generator, dtype=dtype) for x in student]
    pair = HeadPair(
        name, classes, student[0].requires_grad_(), teacher[0], student[1].requires_grad_(), teacher[1], labels,
        targets.to(dtype), anchors.to(dtype), TRANSFORMS[kind].get_deltas, partial(coordinates, TRANSFORMS[kind]),
        partial(decode, TRANSFORMS[kind]), sizes,
        partial(atss.valuable_region, cells, n, topk=9, size=SIZE),
    )  # fmt: skip
    for key, value in changes.items():
        setattr(pair, key, value)
    batch.pair_heads = lambda source: [pair]
    return pair, batch


def call(loss, context):
    """A loss between predictions, built from an entry or not."""
    return loss(context) if isinstance(loss, WeightedLoss) else loss(context.heads("teacher"), context)


def values(loss, batch):
    return {k: v.item() for k, v in call(loss, batch).items()}


def array(x):
    return x.detach().double().numpy()


# --- LD ---------------------------------------------------------------------------------------------------------------


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
UNEVEN = [[[6.3, 9.1, 40.2, 31.0], [20.7, 4.2, 60.0, 45.0]], [[8.1, 8.4, 30.0, 50.9]]]


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


# --- Chen -------------------------------------------------------------------------------------------------------------


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


# --- both -------------------------------------------------------------------------------------------------------------

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


CASES = [("LD", "distributions"), *(("Chen", kind) for kind in sorted(TRANSFORMS))]


def build(name, **options):
    return between([{"NAME": name, **options}], {}, {})[0]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_gradient(name, kind):
    pair, batch = make_pair(kind, dtype=torch.float64, boxes=[UNEVEN[1]])
    loss = build(name, **({"MARGIN": 1000.0} if name == "Chen" else {}))  # the gate is a step
    if name == "LD":  # scores weigh the distributions and get no gradient from them
        loss.loss.w_main = 0.0

    def value(logits, boxes):
        pair.student_logits, pair.student_boxes = logits, boxes
        return sum(call(loss, batch).values())

    # A few anchors suffice: finite differences take two passes an input.
    keep = torch.cat([pair.positives[1][:3], torch.tensor([10, 11, 30, 66])]).unique()
    if kind != "distributions":
        for key in ("student_logits", "teacher_logits", "student_boxes", "teacher_boxes", "labels", "targets"):
            setattr(pair, key, getattr(pair, key).detach()[:, keep])
        pair.anchors = pair.anchors[keep]
        del pair.positives
        inputs = pair.student_logits.requires_grad_(), pair.student_boxes.requires_grad_()
        assert torch.autograd.gradcheck(value, inputs)
    else:
        inputs = pair.student_logits, pair.student_boxes
        assert torch.autograd.gradcheck(value, inputs, fast_mode=True)
    value(*inputs).backward()
    assert all(x.grad.abs().sum() > 0 for x in inputs)
    assert not pair.teacher_logits.requires_grad and not pair.teacher_boxes.requires_grad


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


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_identical_predictions(name, kind):
    """LD is 0. Chen's regression is 0 too, for the student is never worse; its soft cross-entropy is no divergence."""
    pair, batch = make_pair(kind, identical=True)
    found = call(build(name), batch)
    for term, value in found.items():
        if not term.endswith("_cls"):
            assert value.item() == pytest.approx(0, abs=1e-6), term
    if name == "Chen" and kind != "roi":  # with equal weights of the outcomes it is least there
        loss = build(name, W_BG=1.0, FOCUS=0.0, NU=0.0)
        sum(call(loss, batch).values()).backward()
        assert pair.student_logits.grad.abs().max() < 1e-6


def test_soft_classification_is_least_at_the_teacher_if_weights_are_equal():
    z = torch.randn(5, K + 1, dtype=torch.float64)
    at = z.clone().requires_grad_()
    soft_cross_entropy(at, z, w_bg=1.0).sum().backward()
    assert at.grad.abs().max() < 1e-12


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_without_objects(name, kind):
    pair, batch = make_pair(kind, boxes=[[], []])
    found = call(build(name), batch)
    sum(found.values()).backward()
    for term, value in found.items():
        assert value.isfinite() and (value == 0 or term.endswith("_cls")), term
    assert pair.student_logits.grad.isfinite().all() and pair.student_boxes.grad.eq(0).all()


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_two_copies_of_an_image(name, kind):
    """Chen and LD's classes cost what one does; LD's sums over cells double, unless PER_IMAGE."""
    one, one_batch = make_pair(kind, boxes=[BOXES[0]])
    two, two_batch = make_pair(kind, boxes=[BOXES[0]] * 2)
    for key in ("student_logits", "teacher_logits", "student_boxes", "teacher_boxes", "labels"):
        doubled = torch.cat([getattr(one, key)] * 2, dim=1 if kind == "roi" else 0)
        setattr(two, key, doubled)
    for options in ({}, {"PER_IMAGE": True}) if name == "LD" else ({"MARGIN": 1000.0},):
        found, expected = (call(build(name, **options), b) for b in (two_batch, one_batch))
        for term, value in found.items():
            factor = 2 if term.endswith(("main", "vlr")) and "PER_IMAGE" not in options else 1
            assert value.item() == pytest.approx(factor * expected[term].item(), rel=1e-5) and value > 0, term


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(name, kind, dtype):
    pair, batch = make_pair(kind)
    expected = values(build(name), batch)
    for key in ("student_logits", "teacher_logits", "student_boxes", "teacher_boxes"):
        setattr(pair, key, getattr(pair, key).detach().to(dtype).requires_grad_(key.startswith("student")))
    with torch.autocast("cpu", dtype=dtype):
        found = call(build(name), batch)
    sum(found.values()).backward()
    assert all(x.dtype == torch.float32 for x in found.values())
    assert {k: v.item() for k, v in found.items()} == pytest.approx(expected, rel=0.05)
    assert pair.student_logits.grad.isfinite().all() and pair.student_boxes.grad.isfinite().all()


def test_extreme_logits_stay_finite():
    for name, kind in CASES:
        pair, batch = make_pair(kind)
        pair.student_logits, pair.teacher_logits = 1e4 * pair.student_logits, -1e4 * pair.teacher_logits
        assert all(v.isfinite() for v in call(build(name), batch).values()), (name, kind)


# --- from DISTILL.LOSSES ----------------------------------------------------------------------------------------------


def test_entries_of_head_losses():
    loss = build("LD", WEIGHT=2, W_CLS="1e1", TEMPERATURE=4)
    assert loss.heads == ("distributions",) and loss.levels == [] and not list(loss.parameters())
    assert (loss.loss.w_cls, loss.loss.temperature) == (10.0, 4)
    _, batch = make_pair()
    weighted = {k: v.item() for k, v in call(loss, batch).items()}
    plain = {f"loss_distill/LD/{k}": 2 * v for k, v in values(LD(temperature=4), batch).items()}
    assert weighted == pytest.approx(plain)


def test_keys_of_feature_losses_are_refused():
    with pytest.raises(ValueError, match=r"Chen compares predictions and takes no LEVELS, ADAPTATION"):
        build("Chen", ADAPTATION="always", LEVELS=["p3"])


def test_bad_options():
    with pytest.raises(ValueError, match=r"Chen has no option MUU; did you mean MU\?"):
        build("Chen", MUU=0.5)
    with pytest.raises(ValueError, match=r"MU must be in \(0, 1\], not 0"):
        build("Chen", MU=0)


def test_predictions_that_nobody_declared():
    with pytest.raises(RuntimeError, match="needs ``heads``"):
        make_context([]).heads("teacher")


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
