"""GFL: formulas against NumPy and by hand, assignment against loops, the frames of H and L, training and inference."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from head_predictions import grid
from runs import assert_equal_weights, config, train

from msad import load_config
from msad.engine.setup import evaluate, load_model
from msad.evaluation import cost
from msad.export.plain import export, foreign_parts
from msad.modeling.adapters import adapt
from msad.modeling.detectors import atss
from msad.modeling.detectors.distribution import (
    DistributionTransform,
    distribution_focal_loss,
    integral,
    quality_focal_loss,
)
from msad.modeling.detectors.gfl import GFL

CLASSES, STRIDES = 3, (8, 16, 32, 64, 128)
H_LEVELS, L_LEVELS = range(3, 8), range(2, 7)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# --- formulas ---------------------------------------------------------------------------------------------------------


def test_integral_by_hand():
    logits = torch.full((3, 17), -50.0)
    logits[0, 3] = logits[0, 4] = 0.0
    logits[1, 16] = 0.0
    logits[2] = 7.0
    torch.testing.assert_close(integral(logits), torch.tensor([3.5, 16.0, 8.0]))


def test_integral_equals_numpy_and_its_gradient():
    z = torch.randn(5, 4, 9, dtype=torch.float64, requires_grad=True)
    expected = (softmax(z.detach().numpy()) * np.arange(9)).sum(-1)
    np.testing.assert_allclose(integral(z).detach().numpy(), expected, rtol=1e-12)
    assert torch.autograd.gradcheck(integral, z)


def test_distribution_focal_loss_by_hand():
    """Uniform: ln 17 for every target. Half of the mass each on bins 2 and 3: ln 2. All on bin 2, target 2: 0."""
    logits = torch.full((4, 17), -50.0)
    logits[0] = 1.0
    logits[1, 2] = logits[1, 3] = 0.0
    logits[2, 2] = 0.0
    logits[3, 2], logits[3, 3] = math.log(0.75), math.log(0.25)
    found = distribution_focal_loss(logits, torch.tensor([7.3, 2.6, 2.0, 2.25]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    torch.testing.assert_close(found, torch.tensor([math.log(17), math.log(2), 0.0, entropy]))


def test_distribution_focal_loss_equals_numpy():
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(20, 4, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.rand(20, 4, generator=generator, dtype=torch.float64) * 7.9
    p, expected = softmax(z.detach().numpy()), np.zeros((20, 4))
    for i in range(20):
        for side in range(4):
            target = y[i, side].item()
            low = int(target)
            expected[i, side] = -(low + 1 - target) * np.log(p[i, side, low])
            expected[i, side] -= (target - low) * np.log(p[i, side, low + 1])
    np.testing.assert_allclose(distribution_focal_loss(z, y).detach().numpy(), expected, rtol=1e-10)
    assert torch.autograd.gradcheck(lambda x: distribution_focal_loss(x, y), z)


def test_quality_focal_loss_by_hand():
    """sigmoid 0.5: quality 1 costs 0.25 ln 2, quality 0.5 nothing, quality 0 the same as 1."""
    found = quality_focal_loss(torch.zeros(3), torch.tensor([1.0, 0.5, 0.0]))
    torch.testing.assert_close(found, torch.tensor([0.25 * math.log(2), 0.0, 0.25 * math.log(2)]))


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_quality_focal_loss_equals_numpy(beta):
    z = torch.linspace(-4, 4, 33, dtype=torch.float64, requires_grad=True)
    y = torch.linspace(0, 1, 33, dtype=torch.float64).roll(7)
    p, q = 1 / (1 + np.exp(-z.detach().numpy())), y.numpy()
    expected = -np.abs(q - p) ** beta * (q * np.log(p) + (1 - q) * np.log(1 - p))
    np.testing.assert_allclose(quality_focal_loss(z, y, beta).detach().numpy(), expected, rtol=1e-10)
    assert torch.autograd.gradcheck(lambda x: quality_focal_loss(x, y, beta), z)


def test_transform_by_hand():
    """Stride 8, centre (12, 20): a side i strides away for all mass on bin i; targets end at n - 0.1."""
    transform = DistributionTransform(4)
    cells = torch.tensor([[8.0, 16.0, 16.0, 24.0]])
    logits = torch.full((1, 4, 5), -50.0)
    for side, bin_ in enumerate((0, 1, 2, 4)):
        logits[0, side, bin_] = 0.0
    boxes = transform.apply_deltas(logits.flatten(1), cells)
    torch.testing.assert_close(boxes, torch.tensor([[12.0, 12.0, 28.0, 52.0]]))
    torch.testing.assert_close(transform.get_deltas(cells, boxes), torch.tensor([[0.0, 1.0, 2.0, 3.9]]))
    with pytest.raises(ValueError, match=r"MODEL\.GFL\.REG_MAX must be at least 1, not 0"):
        DistributionTransform(0)


# --- assignment -------------------------------------------------------------------------------------------------------


def loop_assign(cells, boxes, image, num_images, topk, size):
    """ATSS, one box, level and cell at a time, in float64."""
    flat = np.concatenate([c.double().numpy() for c in cells])
    bounds = np.cumsum([0] + [len(c) for c in cells])
    owner = np.full((num_images, len(flat)), len(boxes))
    owner_iou = np.full((num_images, len(flat)), -1.0)
    centre = np.stack([(flat[:, 0] + flat[:, 2]) / 2, (flat[:, 1] + flat[:, 3]) / 2], 1)
    for k, box in enumerate(boxes.double().numpy()):
        middle = np.array([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2])
        candidates = []
        for a, b in pairwise(bounds):
            order = sorted(range(a, b), key=lambda i: np.sum((centre[i] - middle) ** 2))
            candidates += order[:topk]
        overlaps = []
        for i in candidates:
            half = (flat[i, 2] - flat[i, 0]) * size / 2
            x0, y0 = centre[i] - half
            x1, y1 = centre[i] + half
            shared = max(min(x1, box[2]) - max(x0, box[0]), 0) * max(min(y1, box[3]) - max(y0, box[1]), 0)
            area = (box[2] - box[0]) * (box[3] - box[1])
            overlaps.append(shared / (area + (2 * half) ** 2 - shared))
        limit = np.mean(overlaps) + np.std(overlaps, ddof=1)
        for i, overlap in zip(candidates, overlaps):
            inside = box[0] < centre[i, 0] < box[2] and box[1] < centre[i, 1] < box[3]
            if overlap >= limit and inside and overlap > owner_iou[image[k], i]:
                owner[image[k], i], owner_iou[image[k], i] = k, overlap
    return owner


@pytest.mark.parametrize("seed", range(3))
def test_assignment_equals_loops(seed):
    generator = torch.Generator().manual_seed(seed)
    cells = [grid(128 // s, 160 // s, s) for s in (8, 16, 32)]
    extent = 6 + torch.rand(14, 2, generator=generator) * torch.tensor([90.0, 70.0])
    corner = torch.rand(14, 2, generator=generator) * (torch.tensor([160.0, 128.0]) - extent)
    boxes, image = torch.cat([corner, corner + extent], 1), torch.tensor([0] * 9 + [2] * 5)
    for topk, size in ((9, 8.0), (4, 4.0)):
        found = atss.assign(cells, boxes, image, 3, topk, size)
        expected = loop_assign(cells, boxes, image.tolist(), 3, topk, size)
        assert np.array_equal(found.numpy(), expected)
        assert (expected[1] == 14).all() and len(np.unique(expected)) > 8


def test_assignment_by_hand():
    """One level of stride 8 with anchors of 16, one box that is the anchor of cell (1, 1).

    Its 9 candidates have IoU 1 (itself), 1/3 (4 neighbours, half of the area shared) and 1/7 (4 corners).
    """
    cells = [grid(3, 3, 8)]
    box = torch.tensor([[4.0, 4.0, 20.0, 20.0]])
    index, iou, threshold = atss.find_candidates(cells, box, 9, 2.0)
    by_cell = dict(zip(index[0].tolist(), iou[0].tolist()))
    neighbours, corners = (1, 3, 5, 7), (0, 2, 6, 8)
    assert by_cell == pytest.approx({4: 1.0, **dict.fromkeys(neighbours, 1 / 3), **dict.fromkeys(corners, 1 / 7)})
    assert threshold.item() == pytest.approx(np.mean(iou.numpy()) + np.std(iou.numpy(), ddof=1))
    assert atss.assign(cells, box, torch.tensor([0]), 1, 9, 2.0).tolist() == [[1, 1, 1, 1, 0, 1, 1, 1, 1]]


def test_of_two_boxes_the_better_gets_the_cell_and_the_first_of_equals():
    cells = [grid(3, 3, 8)]
    boxes = torch.tensor([[2.0, 2.0, 22.0, 22.0], [4.0, 4.0, 20.0, 20.0], [4.0, 4.0, 20.0, 20.0]])
    found = atss.assign(cells, boxes, torch.tensor([0, 0, 0]), 1, 9, 2.0)
    assert found[0, 4] == 1
    apart = atss.assign(cells, boxes, torch.tensor([0, 1, 2]), 3, 9, 2.0)
    assert apart[:, 4].tolist() == [0, 1, 2]


def test_assignment_without_boxes():
    found = atss.assign([grid(3, 3, 8)], torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 2)
    assert found.tolist() == [[0] * 9] * 2


# --- the detector -----------------------------------------------------------------------------------------------------


def test_every_option_arrives(tiny_cfg):
    cfg = tiny_cfg("GFL")
    options = {
        "NUM_CLASSES": 7, "ANCHOR_SIZE": 6.0, "ATSS_TOPK": 5, "QFL_BETA": 1.5, "SCORE_THRESH_TEST": 0.3,
        "TOPK_CANDIDATES_TEST": 11, "NMS_THRESH_TEST": 0.4, "QFL_WEIGHT": 3.0, "DFL_WEIGHT": 4.0, "GIOU_WEIGHT": 5.0,
        "REG_MAX": 9, "PRIOR_PROB": 0.2, "NORM": "GN", "CONV_DIMS": [32, 64],
    }  # fmt: skip
    for key, value in options.items():
        cfg.MODEL.GFL[key] = value
    cfg.TEST.DETECTIONS_PER_IMAGE = 5
    model = build_model(cfg)
    found = [
        model.num_classes, model.anchor_size, model.atss_topk, model.qfl_beta, model.test_score_thresh,
        model.test_topk_candidates, model.test_nms_thresh, *model.loss_weights, model.box2box_transform.reg_max,
    ]  # fmt: skip
    assert type(model) is GFL and found == list(options.values())[:-3]
    assert model.max_detections_per_image == 5
    weights = {k: tuple(v.shape) for k, v in model.head.named_parameters() if v.dim() == 4}
    assert weights["cls_score.weight"] == (7, 64, 3, 3) and weights["bbox_pred.weight"] == (40, 64, 3, 3)
    assert [shape for name, shape in weights.items() if "cls_subnet" in name] == [(32, 8, 3, 3), (64, 32, 3, 3)]
    assert sum(isinstance(m, torch.nn.GroupNorm) for m in model.head.modules()) > 0
    torch.testing.assert_close(model.head.cls_score.bias.sigmoid(), torch.full((7,), 0.2))
    assert model.head.scales.tolist() == [1.0] * 5


def test_defaults_are_those_of_the_paper():
    options = load_config("").MODEL.GFL
    assert (options.CONV_DIMS, options.NORM, options.NUM_CLASSES, options.REG_MAX) == ([256] * 4, "GN", 80, 16)
    assert (options.QFL_BETA, options.QFL_WEIGHT, options.DFL_WEIGHT, options.GIOU_WEIGHT) == (2.0, 1.0, 0.25, 2.0)
    assert (options.ATSS_TOPK, options.ANCHOR_SIZE, options.NMS_THRESH_TEST) == (9, 8.0, 0.6)


def test_missing_level_names_the_key(tiny_cfg):
    cfg = tiny_cfg("GFL")
    cfg.MODEL.GFL.IN_FEATURES = ["p2", "p3", "p9"]
    with pytest.raises(ValueError, match=r"MODEL\.GFL\.IN_FEATURES: \['p2', 'p9'\]"):
        build_model(cfg)


def test_scales_multiply_the_box_logits_of_their_level(tiny_model):
    head = tiny_model("GFL").head
    maps = grids(1, 64, 64)
    before = head(maps)
    with torch.no_grad():
        head.scales[1] = 3.0
    after = head(maps)
    for level in range(5):
        torch.testing.assert_close(after[0][level], before[0][level])
        torch.testing.assert_close(after[1][level], before[1][level] * (3.0 if level == 1 else 1.0))


def grids(n, h, w):
    """Maps (n, 8, ., .) of P3-P7 of an H image (h, w), the grids of P2-P6 at L too."""
    return [torch.randn(n, 8, -(-h // s), -(-w // s)) for s in STRIDES]


def ground_truth(boxes, scale, size):
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4) * scale)
    instances.gt_classes = torch.arange(len(boxes)) % CLASSES
    return instances


def random_boxes(count, h, w):
    extent = torch.exp(torch.rand(count, 2) * torch.tensor([w / 8, h / 8]).log()) * 8
    corner = torch.rand(count, 2) * (torch.tensor([w, h]) - extent)
    return (torch.cat([corner, corner + extent], dim=1) * 8).round() / 8


def numpy_losses(detector, anchors, predictions, gt):
    """The three losses with loops over images and positives."""
    cells = torch.cat([a.tensor for a in anchors]).double().numpy()
    logits, sides = (
        torch.cat([x.detach().flatten(2) for x in levels], 2).transpose(1, 2).double().numpy()
        for levels in predictions
    )
    qfl, dfl, giou, weights, positives = 0.0, 0.0, 0.0, 0.0, 0
    for n, instances in enumerate(gt):
        boxes = instances.gt_boxes.tensor
        owner = loop_assign([a.tensor for a in anchors], boxes, [0] * len(boxes), 1, 9, 8.0)[0]
        quality = np.zeros_like(logits[n])
        for r in np.flatnonzero(owner < len(boxes)):
            stride = cells[r, 2] - cells[r, 0]
            cx, cy = (cells[r, 0] + cells[r, 2]) / 2, (cells[r, 1] + cells[r, 3]) / 2
            p = softmax(sides[n, r].reshape(4, 17))
            d = (p * np.arange(17)).sum(1) * stride
            a = np.array([cx - d[0], cy - d[1], cx + d[2], cy + d[3]])
            b = boxes[owner[r]].double().numpy()
            shared = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
            union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
            hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
            quality[r, instances.gt_classes[owner[r]]] = shared / union
            weight = 1 / (1 + np.exp(-logits[n, r].max()))
            giou += weight * (1 - shared / union + (hull - union) / hull)
            for side, t in enumerate(np.array([cx - b[0], cy - b[1], b[2] - cx, b[3] - cy]) / stride):
                t = min(max(t, 0), 15.9)
                low = int(t)
                dfl -= weight / 4 * ((low + 1 - t) * np.log(p[side, low]) + (t - low) * np.log(p[side, low + 1]))
            weights, positives = weights + weight, positives + 1
        s = 1 / (1 + np.exp(-logits[n]))
        qfl -= (np.abs(quality - s) ** 2 * (quality * np.log(s) + (1 - quality) * np.log(1 - s))).sum()
    positives, weights = max(positives, 1), max(weights, 1e-6)
    return {"loss_gfl_qfl": qfl / positives, "loss_gfl_dfl": 0.25 * dfl / weights, "loss_gfl_giou": 2 * giou / weights}


@pytest.mark.parametrize("counts", [(6, 2), (3, 0), (0, 0)])
def test_losses_equal_numpy(tiny_model, counts):
    detector = tiny_model("GFL")
    h, w = 128, 192
    maps = grids(2, h, w)
    gt = [ground_truth(random_boxes(count, h, w), 1.0, (h, w)) for count in counts]
    predictions = detector.head(maps)
    with EventStorage(0) as storage:
        found = detector.forward_training(ImageList(torch.zeros(2, 3, h, w), [(h, w)] * 2), maps, predictions, gt)
        assert storage.latest()["num_pos_anchors"][0] > 0 or counts == (0, 0)
    expected = numpy_losses(detector, detector.anchor_generator(maps), predictions, gt)
    assert {k: v.item() for k, v in found.items()} == pytest.approx(expected, rel=1e-4)
    assert (found["loss_gfl_giou"] > 0) == (counts != (0, 0))
    # The quality is a target: scores are not raised by moving boxes.
    of_boxes = torch.autograd.grad(found["loss_gfl_qfl"], predictions[1], allow_unused=True)
    assert all(g is None or g.abs().max() == 0 for g in of_boxes)


def test_without_objects_everything_still_has_a_gradient(tiny_model, make_batch):
    detector = tiny_model("GFL")
    with EventStorage(0):
        losses = detector(make_batch([(64, 64)], boxes=0))
    assert losses["loss_gfl_dfl"] == losses["loss_gfl_giou"] == 0 < losses["loss_gfl_qfl"]
    sum(losses.values()).backward()
    assert [name for name, p in detector.named_parameters() if p.grad is None] == []


def test_losses_are_means_over_processes_count(tiny_model, make_batch, monkeypatch):
    """Two processes that each hold the batch have the loss of one; divisors are means, not sums."""
    from msad.modeling.detectors import dense

    batch = make_batch([(64, 96)])
    with EventStorage(0):
        alone = tiny_model("GFL")(batch)
    monkeypatch.setattr(dense.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: x.mul_(2))
    with EventStorage(0):
        torch.testing.assert_close(tiny_model("GFL")(batch), alone)


def test_half_precision_predictions(tiny_model, make_batch):
    detector, batch = tiny_model("GFL"), make_batch([(64, 96), (64, 96)])
    with EventStorage(0):
        expected = copy.deepcopy(detector)(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = detector(batch)
    for name, value in found.items():
        assert value.dtype == torch.float32 and value.item() == pytest.approx(expected[name].item(), rel=0.05)


# --- frames -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_frames(tiny_model):
    """An H-frame and an L-frame detector with one head's weights."""
    in_h, in_l = tiny_model("GFL", levels=H_LEVELS), tiny_model("GFL", levels=L_LEVELS, seed=1)
    in_l.head.load_state_dict(in_h.head.state_dict(), strict=True)
    return in_h, in_l


@pytest.mark.parametrize("seed", range(3))
def test_targets_losses_and_boxes_of_l_are_those_of_h(two_frames, seed):
    torch.manual_seed(seed)
    h, w = 256, 384
    maps, boxes = grids(2, h, w), [random_boxes(12, h, w), random_boxes(3, h, w)]
    gt = [[ground_truth(b, s, (int(h * s), int(w * s))) for b in boxes] for s in (1.0, 0.5)]
    targets = [d.label_anchors(d.anchor_generator(maps), g) for d, g in zip(two_frames, gt)]
    for i in range(2):
        assert torch.equal(targets[0][0][i], targets[1][0][i])
        assert (targets[0][0][i] != CLASSES).sum() > 5
        assert torch.equal(targets[0][1][i], 2 * targets[1][1][i])
    images = [ImageList(torch.zeros(2, 3, int(h * s), int(w * s)), [(int(h * s), int(w * s))] * 2) for s in (1, 0.5)]
    with EventStorage(0):
        losses = [d.forward_training(i, maps, d.head(maps), g) for d, i, g in zip(two_frames, images, gt)]
    torch.testing.assert_close(losses[0], losses[1])
    found = [d.eval().forward_inference(i, maps, d.head(maps)) for d, i in zip(two_frames, images)]
    for x, y in zip(*found):
        assert len(x) == len(y) > 3
        torch.testing.assert_close(x.pred_boxes.tensor, 2 * y.pred_boxes.tensor)
        torch.testing.assert_close(x.scores, y.scores)


# --- inference and the rest of the project ----------------------------------------------------------------------------


def test_batch_equals_single_images(tiny_model, make_batch, same_detections):
    detector = tiny_model("GFL").eval()
    batch = make_batch([(96, 64), (96, 64), (96, 64)])
    with torch.no_grad():
        together = detector(batch)
        same_detections(together, [detector([item])[0] for item in batch])
    best = together[0]["instances"]
    assert best.scores.diff().le(0).all() and best.scores.min() > 0.05


def test_inference_by_hand(tiny_model):
    """Logits that see one cell: its box is decoded from the modes of the distributions, its score from its class."""
    detector = tiny_model("GFL").eval()
    maps = grids(1, 64, 64)
    logits, sides = ([torch.full_like(x, -30.0) for x in levels] for levels in detector.head(maps))
    logits[1][0, 2, 1, 2] = 2.0  # P4, row 1, column 2: centre (40, 24), stride 16
    for side, bin_ in enumerate((2, 1, 1, 2)):
        sides[1][0, side * 17 + bin_, 1, 2] = 30.0
    (found,) = detector.forward_inference(ImageList(torch.zeros(1, 3, 64, 64), [(64, 64)]), maps, [logits, sides])
    torch.testing.assert_close(found.pred_boxes.tensor, torch.tensor([[8.0, 8.0, 56.0, 56.0]]))
    assert found.pred_classes.tolist() == [2] and found.scores.item() == pytest.approx(1 / (1 + math.exp(-2)))


@pytest.mark.parametrize("resolutions", [["H", "L"], ["H", "L", "EL"]])
def test_inside_the_teacher_targets_are_assigned_once(tiny_model, make_batch, monkeypatch, resolutions):
    teacher = tiny_model("GFL", resolutions=resolutions)
    calls, original = [], GFL.label_anchors
    monkeypatch.setattr(GFL, "label_anchors", lambda self, *a: calls.append(1) or original(self, *a))
    with EventStorage(0):
        losses = teacher(make_batch([(64, 96), (50, 127)]))
    assert len(calls) == 1 and len(losses) == 3 * (len(resolutions) + 1)
    sum(losses.values()).backward()
    assert [name for name, p in teacher.named_parameters() if p.grad is None] == []
    with torch.no_grad():
        assert len(teacher.eval()(make_batch([(64, 96)]))[0]["instances"]) > 0


def test_student_of_its_teacher(tiny_model, make_batch, make_distiller):
    distiller = make_distiller(
        "L", teacher=tiny_model("GFL", resolutions=["H", "L"]), student=tiny_model("GFL", levels=L_LEVELS, seed=1)
    )
    assert adapt(distiller.student).levels == ["p2", "p3", "p4", "p5", "p6"]
    with EventStorage(0):
        losses = distiller(make_batch([(64, 96), (60, 90)]))
    assert set(losses) == {"loss_gfl_qfl", "loss_gfl_dfl", "loss_gfl_giou", "loss_distill/AlignedL1"}
    assert all(torch.isfinite(x) and x > 0 for x in losses.values())


def test_training_lowers_the_loss_and_evaluates(project, teacher_weights, tmp_path):
    options = {"MAX_ITER": 80, "CHECKPOINT_PERIOD": 80, "OPTIMIZER": "AdamW", "BASE_LR": 0.003}
    solver = {f"SOLVER.{key}": value for key, value in options.items()}
    cfg = config(project, teacher_weights, "gfl", tmp_path / "run", **solver)
    run, trace, _ = train(cfg)
    total = [step["losses"]["total_loss"] for step in trace.steps]
    assert np.median(total[-9:]) < 0.8 * np.median(total[:5])  # single steps of batches of two spring up
    results = evaluate(cfg, run.model)
    assert np.isfinite(results["bbox"]["AP"])

    hint = export(cfg, f"{cfg.OUTPUT_DIR}/model_final.pth", tmp_path / "exported")
    assert "MODEL.META_ARCHITECTURE GFL" in foreign_parts(cfg) and "META_ARCHITECTURE GFL" in hint
    exported = load_model(cfg, str(tmp_path / "exported" / "model.pth"))
    assert_equal_weights(exported.state_dict(), run.model.state_dict())


def test_cost_of_the_head(tiny_model):
    """One 3x3 convolution of 8 channels a tower, 3 classes and 68 box logits at every cell of 5 levels."""
    cells = sum((64 // s) ** 2 for s in STRIDES[:3]) + 2
    macs = cost.count_macs(tiny_model("GFL").eval(), cost.random_inputs(64, 64))["head"]
    assert macs * 1e9 == pytest.approx(cells * 72 * (8 + 8 + 3 + 68), rel=0.01)
