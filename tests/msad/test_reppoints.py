"""RepPoints: boxes of points by hand, assignments by hand and against loops, losses, frames, mixed precision."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage

from msad import load_config
from msad.evaluation.cost import count_macs
from msad.modeling.deformable import deform_conv
from msad.modeling.detectors.candidates import clip_and_drop_empty
from msad.modeling.detectors.point_sets import (
    PointSetTransform,
    base_grid,
    best_overlaps,
    inside_image,
    nearest_points,
    points_to_boxes,
)
from msad.modeling.detectors.reppoints import RepPoints

COS30 = math.sqrt(3) / 2
CONFIGS = Path(__file__).parents[2] / "configs"


def cells_of(strides, sides=(8, 8)):
    """Cells of levels that cover ``sides`` cells of the first stride, around points at the strides' multiples."""
    levels = []
    for stride in strides:
        h, w = (side * strides[0] // stride for side in sides)
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        middle = torch.stack([x, y], dim=-1).reshape(-1, 2).float() * stride
        levels.append(torch.cat([middle - stride / 2, middle + stride / 2], dim=1))
    return torch.cat(levels)


def owned(cells, owner):
    """{point (x, y): object} of an assignment."""
    middle = (cells[:, :2] + cells[:, 2:]) / 2
    return {tuple(middle[i].tolist()): owner[i].item() for i in (owner >= 0).nonzero().squeeze(1)}


# --- points and boxes -------------------------------------------------------------------------------------------------


def test_moment_by_hand():
    grid, zero = base_grid(), torch.zeros(2)
    assert grid.tolist() == [-1, -1, -1, 0, -1, 1, 0, -1, 0, 0, 0, 1, 1, -1, 1, 0, 1, 1]
    torch.testing.assert_close(points_to_boxes(grid, "moment", zero), torch.tensor([-COS30, -COS30, COS30, COS30]))
    wide = points_to_boxes(grid, "moment", torch.tensor([math.log(2), 0.0]))
    torch.testing.assert_close(wide, torch.tensor([-2 * COS30, -COS30, 2 * COS30, COS30]))
    line = torch.stack([torch.zeros(9), torch.arange(9.0)], dim=1).flatten()
    torch.testing.assert_close(
        points_to_boxes(line, "moment", zero), torch.tensor([1.26139, 0, 6.73861, 0]), atol=1e-5, rtol=0
    )


def test_the_scale_learns_at_a_hundredth():
    scale = torch.zeros(2, requires_grad=True)
    points_to_boxes(base_grid(), "moment", scale)[2].backward()
    torch.testing.assert_close(scale.grad, torch.tensor([0.01 * COS30, 0.0]))


def test_boxes_in_pixels_by_hand():
    cell = torch.tensor([[12.0, 20.0, 20.0, 28.0]])  # stride 8 around (16, 24)
    found = PointSetTransform().apply_deltas(base_grid()[None], cell)
    torch.testing.assert_close(found, torch.tensor([[9.0718, 17.0718, 22.9282, 30.9282]]), atol=1e-4, rtol=0)


def test_minmax_by_hand():
    points = torch.tensor([3.0, -1, 0, 5, -2, 0, 1, 1, 9, 9, 0, 0, 0, 0, 0, 0, 0, -7])  # (y, x) of nine points
    assert points_to_boxes(points, "minmax").tolist() == [-7, -2, 9, 9]
    assert points_to_boxes(points, "partial_minmax").tolist() == [-1, -2, 5, 3]
    with pytest.raises(ValueError, match=r"MODEL.REPPOINTS.TRANSFORM.*'mean'"):
        PointSetTransform("mean")


# --- assignment -------------------------------------------------------------------------------------------------------

A, B, C = [0, 0, 32, 32], [8, 8, 72, 40], [2, 2, 34, 34]


@pytest.mark.parametrize(
    ("boxes", "count", "expected"),
    [
        ([A, C], 1, {(16, 16): 0}),
        ([C, A], 1, {(16, 16): 1}),  # A is nearer, C gets none
        ([A, A], 1, {(16, 16): 0}),  # equally near: the first
        ([A, B], 1, {(16, 16): 0, (40, 24): 1}),  # level (4 + 3) / 2, rounded down
        ([[0, 0, 64, 64]], 1, {(32, 32): 0}),
        ([[31, 31, 33, 33]], 1, {(32, 32): 0}),  # level -1, on the finest
        ([[0, 0, 34, 30]], 3, {(16, 16): 0, (24, 16): 0, (16, 8): 0}),
        ([], 1, {}),
    ],
)
def test_nearest_points_by_hand(boxes, count, expected):
    cells = cells_of((8, 16))
    assert owned(cells, nearest_points(cells, torch.tensor(boxes).view(-1, 4).float(), count=count)) == expected


def test_the_level_of_an_object():
    """64 x 64 belongs to stride 16: its point is not the one of stride 8 at the same place."""
    owner = nearest_points(cells_of((8, 16)), torch.tensor([[0.0, 0, 64, 64]]))
    assert owner.argmax().item() >= 64  # the first level has 64 points


def one_after_another(cells, boxes, count):
    """The same in words: objects in turn; a later one takes a point only if it is strictly nearer."""
    strides = np.rint(np.log2(cells[:, 2] - cells[:, 0]))
    middle = (cells[:, :2] + cells[:, 2:]) / 2
    owner, distance = np.full(len(cells), -1), np.full(len(cells), np.inf)
    for number, (x0, y0, x1, y1) in enumerate(boxes):
        w, h = x1 - x0, y1 - y0
        level = np.clip(int((np.log2(w / 4) + np.log2(h / 4)) / 2), strides.min(), strides.max())
        away = np.hypot((middle[:, 0] - (x0 + x1) / 2) / w, (middle[:, 1] - (y0 + y1) / 2) / h)
        away[strides != level] = np.inf
        for point in np.argsort(away, kind="stable")[:count]:
            if away[point] < distance[point]:
                owner[point], distance[point] = number, away[point]
    return owner


@pytest.mark.parametrize("count", [1, 4])
def test_nearest_points_equal_a_loop(count):
    generator = torch.Generator().manual_seed(2)
    cells = cells_of((8, 16, 32), sides=(16, 16))
    for _ in range(20):
        corner = torch.rand(12, 2, generator=generator) * 90
        boxes = torch.cat([corner, corner + 2 + torch.rand(12, 2, generator=generator) ** 3 * 150], dim=1)
        expected = one_after_another(cells.double().numpy(), boxes.double().numpy(), count)
        assert nearest_points(cells, boxes, count=count).tolist() == expected.tolist()


def test_best_overlaps_by_hand():
    found = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 4.5], [20, 20, 30, 30], [0, 0, 4, 4]])
    boxes = torch.tensor([[0.0, 0, 10, 10], [21, 21, 24, 24]])
    assert best_overlaps(found, boxes, 0.5, 0.4).tolist() == [0, 0, -2, 1, -1]
    # Both boxes overlap the object as much as any does; an object that nothing overlaps gets none.
    twins = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 4], [50, 50, 60, 60]])
    objects = torch.tensor([[0.0, 0, 10, 10], [100, 100, 110, 110]])
    assert best_overlaps(twins, objects, 0.5, 0.4).tolist() == [0, 0, -1]
    # Two objects want one box: the last.
    assert best_overlaps(twins[:1], torch.tensor([[0.0, 0, 9, 9], [0, 0, 10, 10]]), 0.5, 0.4).tolist() == [1]
    assert best_overlaps(found, boxes[:0], 0.5, 0.4).tolist() == [-1] * 5


def test_points_in_the_padding_of_batch_mates_do_not_count():
    cells = cells_of((8,), sides=(8, 12))
    inside = inside_image(cells, (33, 20), 32).view(8, 12)
    assert inside[:, :4].all() and not inside[:, 4:].any()  # 64 x 32 pixels: 8 rows, 4 columns
    assert not inside_image(cells, (33, 20), 1).view(8, 12)[5:].any()


def test_clipping_drops_what_is_left_without_area():
    boxes = Boxes(torch.tensor([[-5.0, -5, 5, 5], [-9, 0, -1, 5], [90, 40, 120, 60]]))
    found = Instances((50, 100), pred_boxes=boxes, scores=torch.arange(3.0))
    kept = clip_and_drop_empty(found)
    assert kept.pred_boxes.tensor.tolist() == [[0, 0, 5, 5], [90, 40, 100, 50]] and kept.scores.tolist() == [0, 2]
    assert boxes.tensor[0, 0] == -5


# --- deformable convolution -------------------------------------------------------------------------------------------


def test_deformable_convolution_by_hand():
    x = torch.arange(25.0).view(1, 1, 5, 5)
    weight = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    all_at_centre = -base_grid().view(1, -1, 1, 1).expand(1, -1, 5, 5)
    assert deform_conv(x, all_at_centre, weight)[0, 0, 2, 2] == 540  # 12 * 45
    still = torch.zeros(1, 18, 5, 5)
    plain = F.conv2d(x, weight, padding=1)
    torch.testing.assert_close(deform_conv(x, still, weight), plain)
    assert plain[0, 0, 2, 2] == 636
    right = still.clone()
    right[:, 1::2] = 0.5
    assert deform_conv(x, right, weight)[0, 0, 2, 2] == 658.5
    down = still.clone()
    down[:, 0::2] = 1
    assert deform_conv(x, down, weight)[0, 0, 1, 2] == 636


def test_deformable_convolution_under_mixed_precision_and_of_nan():
    x, offset = torch.randn(2, 4, 6, 6), torch.randn(2, 18, 6, 6)
    weight = torch.randn(5, 4, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = deform_conv(x.bfloat16(), offset, weight)
    assert found.dtype == torch.bfloat16
    expected = deform_conv(x.bfloat16().float(), offset, weight)
    torch.testing.assert_close(found, expected.bfloat16())
    offset[1, 3, 2, 2] = float("nan")
    with pytest.raises(FloatingPointError, match="offsets"):
        deform_conv(x, offset, weight)


def test_deformable_convolutions_are_counted(tiny_model, make_batch):
    """Their multiply-adds are those of ordinary convolutions."""
    model = detector(tiny_model, levels=[3])
    found = count_macs(model.eval(), make_batch([(64, 96)]))["head"] * 1e9
    towers, deformable, first, last = 2 * 8 * 8 * 9, 2 * 8 * 8 * 9, 8 * 8 * 9, 8 * (3 + 18 + 18)
    assert found == (64 // 8) * (96 // 8) * (towers + deformable + first + last)


# --- the detector -----------------------------------------------------------------------------------------------------


def detector(tiny_model, levels=range(3, 8), **options) -> RepPoints:
    return tiny_model("RepPoints", levels=levels, **options)


def test_box_loss_by_hand(tiny_model):
    """Stride 8, box [0, 0, 30, 32] against [0, 0, 32, 32]: 2/32 in one coordinate; the first stage counts half."""
    model = detector(tiny_model, levels=[3])
    gt = Instances((8, 8), gt_boxes=Boxes(torch.tensor([[0.0, 0, 32, 32]])), gt_classes=torch.tensor([1]))
    cells = Boxes(torch.tensor([[12.0, 12, 20, 20]]))  # around (16, 16)
    y = torch.tensor([-2.0, 2] * 2 + [0] * 5)
    x = torch.tensor([-2.0, 1.75] * 2 + [0] * 5)
    points = torch.stack([y, x], dim=1).flatten()[None, None]
    model.head.transform = PointSetTransform("minmax")
    logits = torch.full((1, 1, 3), -50.0)
    logits[0, 0, 1] = 50
    with EventStorage():
        losses = model.losses(
            [cells], logits, points, points, [torch.tensor([0])], [torch.tensor([True])], [gt]
        )  # fmt: skip
    assert losses["loss_points_refine"].item() == pytest.approx(0.0177557, rel=1e-5)
    assert losses["loss_points_init"].item() == pytest.approx(0.0088778, rel=1e-5)
    assert losses["loss_cls"].item() == pytest.approx(0, abs=1e-6)


def test_losses_equal_a_slow_computation(tiny_model, make_batch):
    """Two images of different size, written out image by image and point by point."""
    model = detector(tiny_model).train()
    batch = make_batch([(96, 64), (64, 128)], boxes=[3, 2])
    with EventStorage():
        losses = model(batch)
    images = model.preprocess_image(batch)
    maps = model.backbone(images.tensor)
    logits, first, second = model.head([maps[name] for name in model.head_in_features])
    cells = torch.cat([level.tensor for level in model.anchor_generator(list(logits))])

    def rows(levels):
        return torch.cat([x.flatten(2).transpose(1, 2) for x in levels], dim=1)

    logits, first, second = rows(logits), rows(first), rows(second)
    sums, counts = torch.zeros(3), torch.zeros(2)
    for n, item in enumerate(batch):
        gt = item["instances"]
        h, w = (math.ceil(side / 32) * 32 for side in gt.image_size)
        boxes = [model.head.transform.apply_deltas(x[n], cells) for x in (first, second)]
        stages = [
            nearest_points(cells, gt.gt_boxes.tensor).tolist(),
            best_overlaps(boxes[0], gt.gt_boxes.tensor, 0.5, 0.4).tolist(),
        ]
        for i, cell in enumerate(cells):
            x, y, stride = (cell[0] + cell[2]) / 2, (cell[1] + cell[3]) / 2, cell[2] - cell[0]
            if x >= w or y >= h:
                continue
            for stage, owner in enumerate(stage[i] for stage in stages):
                if owner >= 0:
                    counts[stage] += 1
                    d = (boxes[stage][i] - gt.gt_boxes.tensor[owner]).abs() / (4 * stride)
                    sums[stage] += torch.where(d < 0.11, d * d / 0.22, d - 0.055).sum()
            if stages[1][i] > -2:
                for k in range(3):
                    p = logits[n, i, k].sigmoid()
                    hit = stages[1][i] >= 0 and gt.gt_classes[stages[1][i]] == k
                    sums[2] -= 0.25 * (1 - p) ** 2 * p.log() if hit else 0.75 * p**2 * (1 - p).log()
    assert (counts >= 2).all()
    expected = {
        "loss_points_init": 0.5 * sums[0] / counts[0], "loss_points_refine": sums[1] / counts[1],
        "loss_cls": sums[2] / counts[1],
    }  # fmt: skip
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-4, atol=1e-6)


def test_what_is_reported_is_no_tensor(tiny_model, make_batch, monkeypatch):
    """The storage makes a number of it, for which a device would have to be waited for."""
    reported = {}
    monkeypatch.setattr(EventStorage, "put_scalar", lambda self, name, value, **_: reported.update({name: value}))
    with EventStorage():
        tiny_model("RepPoints").train()(make_batch([(64, 96), (64, 96)]))
    assert isinstance(reported["num_pos_anchors"], float)


def test_gradients_of_the_stages(tiny_model, make_batch):
    """The second stage's loss reaches the first stage's points through the offsets alone, at a tenth."""
    model = detector(tiny_model, levels=[3])
    model.head.pts_init_out.weight.data.mul_(0.1)
    x = torch.randn(1, 8, 6, 6)
    bias, grads = model.head.pts_init_out.bias, []
    for whole in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if whole:
                patch.setattr("msad.modeling.detectors.reppoints.OFFSET_GRADIENT", 1.0)
            _, _, second = model.head([x])
        grads.append(torch.autograd.grad(second[0].square().sum(), bias)[0])
    assert grads[1].abs().max() > 1e-4
    torch.testing.assert_close(grads[0], 0.1 * grads[1])


def test_the_frame_of_l_needs_no_other_setting(tiny_model):
    """Levels moved down by one and boxes of half the size: the same points for the same objects."""
    high, low = detector(tiny_model), detector(tiny_model, levels=range(2, 7))
    sizes, boxes = {"h": (128, 192), "l": (64, 96)}, torch.tensor([[8.0, 4, 60, 90], [100, 30, 180, 50]])
    owners = []
    for model, size, scale in ((high, sizes["h"], 1.0), (low, sizes["l"], 0.5)):
        maps = [torch.zeros(1, 1, 128 // 2**level, 192 // 2**level) for level in range(3, 8)]
        gt = Instances(size, gt_boxes=Boxes(boxes * scale), gt_classes=torch.tensor([0, 1]))
        owners.append(model.label_anchors(model.anchor_generator(maps), [gt])[0][0])
    assert torch.equal(*owners) and (owners[0] >= 0).sum() == 2


def test_batches_equal_single_images_and_images_without_objects(
    tiny_model, make_batch, same_detections, monkeypatch
):  # fmt: skip
    """Losses are means over positives, of which an image without objects counts as one."""
    model, counts = detector(tiny_model), []
    model.backbone.eval()  # statistics of a batch are none of an image
    monkeypatch.setattr(
        "msad.modeling.detectors.reppoints.mean_of_processes", lambda x: counts.append(x.tolist()) or x
    )
    batch = make_batch([(64, 96), (64, 96)], boxes=[2, 0])
    with EventStorage():
        losses, *single = [model(items) for items in (batch, batch[:1], batch[1:])]
    of_first, of_second = counts[1:]
    assert min(of_first) > 1 and of_second == [1, 1]
    for name, stage in (("loss_cls", 1), ("loss_points_init", 0), ("loss_points_refine", 1)):
        a, b = of_first[stage], of_second[stage]
        torch.testing.assert_close(losses[name], (a * single[0][name] + b * single[1][name]) / (a + b))
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval()
    with torch.no_grad():
        same_detections(model(batch), [model([item])[0] for item in batch])


def test_detections_are_clipped_and_equal_a_slow_computation(tiny_model, make_batch):
    model = detector(tiny_model).eval()
    batch = make_batch([(64, 96)])
    with torch.no_grad():
        found = model(batch)[0]["instances"]
        maps = model.backbone(model.preprocess_image(batch).tensor)
        features = [maps[name] for name in model.head_in_features]
        logits, _, points = model.head(features)
        candidates = []
        for cells, scores, sets in zip(model.anchor_generator(features), logits, points):
            boxes = model.head.transform.apply_deltas(sets[0].flatten(1).t(), cells.tensor)
            boxes[:, 0::2].clamp_(0, 96)
            boxes[:, 1::2].clamp_(0, 64)
            for box, row in zip(boxes, scores[0].flatten(1).t().sigmoid()):
                if box[2] > box[0] and box[3] > box[1]:
                    candidates += [(s.item(), k, box) for k, s in enumerate(row) if s > model.test_score_thresh]
    kept = []
    for score, label, box in sorted(candidates, key=lambda item: -item[0]):
        def overlap(other, box=box):
            sides = (torch.minimum(box[2:], other[2:]) - torch.maximum(box[:2], other[:2])).clamp(min=0)
            return sides.prod() / ((box[2:] - box[:2]).prod() + (other[2:] - other[:2]).prod() - sides.prod())

        if all(k != label or overlap(b) <= 0.5 for _, k, b in kept):
            kept.append((score, label, box))
    kept = kept[:100]
    assert len(found) == len(kept) > 5
    torch.testing.assert_close(found.scores, torch.tensor([s for s, _, _ in kept]))
    torch.testing.assert_close(found.pred_boxes.tensor, torch.stack([b for _, _, b in kept]), rtol=1e-5, atol=1e-4)


def test_mixed_precision_trains_and_detects(tiny_model, make_batch):
    model = detector(tiny_model)
    batch = make_batch([(64, 96)])
    with EventStorage():
        exact = model(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = model(batch)
    assert losses.keys() == exact.keys()
    for name, value in losses.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact[name], rtol=0.2, atol=0.02)
    sum(losses.values()).backward()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert len(model.eval()(batch)[0]["instances"]) > 0


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({}, 36849078),
        ({"MODEL.FPN.NORM": "", "MODEL.FPN.TOP_NORM": "", "MODEL.REPPOINTS.NORM": ""}, None),
    ],
)
def test_number_of_parameters(options, parameters):
    cfg = load_config(CONFIGS / "Base-RepPoints-R50.yaml", ["MODEL.DEVICE", "meta", "MODEL.RESNETS.NORM", "BN"])
    for key, value in options.items():
        cfg.merge_from_list([key, value])
    with torch.device("meta"):
        model = build_model(cfg)
    count = sum(p.numel() for p in model.parameters())
    if parameters is None:  # without GN, each normalised convolution has a bias in its place
        gn = 2 * 256 * (3 + 3 + 2 + 6)
        assert count == 36849078 - gn + gn // 2
    else:
        assert count == parameters


def test_absent_levels_are_named(tiny_cfg):
    cfg = tiny_cfg("RepPoints")
    cfg.MODEL.REPPOINTS.IN_FEATURES = ["p2", "p3"]
    with pytest.raises(ValueError, match=r"MODEL.REPPOINTS.IN_FEATURES: \['p2'\]"):
        build_model(cfg)


def test_predictions_only_depend_on_their_level(tiny_model):
    model = detector(tiny_model).eval()
    maps = [torch.randn(1, 8, 2 ** (6 - k), 2 ** (6 - k)) for k in range(5)]
    images = ImageList(torch.zeros(1, 3, 512, 512), [(512, 512)])
    with torch.no_grad():
        together = model.head(maps)
        alone = [model.head([x]) for x in maps]
        assert model.forward_inference(images, maps, together)[0].image_size == (512, 512)
    for level, outputs in enumerate(alone):
        for whole, single in zip(together, outputs):
            assert torch.equal(whole[level], single[0])
