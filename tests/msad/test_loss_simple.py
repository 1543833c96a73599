"""FitNet, CWD, PKD and MGD against NumPy and values worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances
from helpers import between, evaluate, make_context

from msad.distill.losses.cwd import channel_kl
from msad.distill.losses.mgd import mask_locations
from msad.distill.losses.pkd import unit_deviation


def build(name, maps, **options):
    shapes = {k: ShapeSpec(channels=v.shape[1], stride=2 ** int(k[1:])) for k, v in maps.items()}
    return between([{"NAME": name, **options}], shapes, shapes)[0]


def value(name, student, teacher, batch=None, **options):
    (found,) = evaluate(build(name, teacher, **options), student, teacher, batch).values()
    return found.item()


def pair(n=3, c=5, sizes=((4, 6), (2, 3))):
    student = {f"p{3 + i}": torch.randn(n, c, *size) for i, size in enumerate(sizes)}
    return student, {k: 2 * torch.randn_like(v) + 0.5 for k, v in student.items()}


def arrays(maps):
    return [x.double().numpy() for x in maps.values()]


# --- FitNet -----------------------------------------------------------------------------------------------------------


def test_fitnet_equals_numpy():
    student, teacher = pair()
    gaps = [(s - t) ** 2 for s, t in zip(arrays(student), arrays(teacher))]
    assert value("FitNet", student, teacher) == pytest.approx(sum(g.mean() for g in gaps), rel=1e-5)
    expected = sum(g.sum() / 3 for g in gaps)
    assert value("FitNet", student, teacher, REDUCTION="sum") == pytest.approx(expected, rel=1e-5)


def ground_truth(*per_image):
    out = []
    for boxes in per_image:
        gt = Instances((32, 48))
        gt.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).view(-1, 4))
        out.append(gt)
    return make_context([(32, 48)] * len(out), out)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_fitnet_inside_ground_truth(reduction):
    student, teacher = pair()
    batch = ground_truth([[0, 0, 17, 9], [10, 3, 30, 20]], [], [[40, 20, 48, 32]])
    expected = 0.0
    for (name, s), t in zip(student.items(), teacher.values()):
        stride, total, cells = 2 ** int(name[1:]), 0.0, 0
        for i, gt in enumerate(item["instances"] for item in batch.inputs):
            for y, x in np.ndindex(*s.shape[-2:]):
                cx, cy = (x + 0.5) * stride, (y + 0.5) * stride
                if any(x0 < cx < x1 and y0 < cy < y1 for x0, y0, x1, y1 in gt.gt_boxes.tensor.tolist()):
                    total += ((s[i, :, y, x] - t[i, :, y, x]) ** 2).sum().item()
                    cells += 1
        assert cells >= 2
        expected += total / (cells * s.shape[1]) if reduction == "mean" else total / 3
    found = value("FitNet", student, teacher, batch, GT_ONLY=True, REDUCTION=reduction)
    assert found == pytest.approx(expected, rel=1e-5)


def test_fitnet_without_ground_truth():
    student, teacher = pair()
    for x in student.values():
        x.requires_grad_()
    loss = build("FitNet", teacher, GT_ONLY=True)
    (found,) = evaluate(loss, student, teacher, ground_truth([], [], [])).values()
    found.backward()
    assert found.item() == 0 and all(x.grad.abs().max() == 0 for x in student.values())


def test_fitnet_unknown_reduction():
    with pytest.raises(ValueError, match="REDUCTION must be one of mean, sum, not 'max'"):
        build("FitNet", pair()[1], REDUCTION="max")


# --- CWD --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tau", "expected"), [(1, 0.1142), (4, 0.1115)])
def test_cwd_by_hand(tau, expected):
    t, s = torch.tensor([2.0, 0, 0, 0]).view(1, 1, 2, 2), torch.tensor([1.0, 0, 0, 0]).view(1, 1, 2, 2)
    assert channel_kl(s, t, tau).item() == pytest.approx(expected, abs=1e-4)
    assert value("CWD", {"p3": s}, {"p3": t}, TAU=tau) == pytest.approx(5 * expected, abs=5e-4), "default weight"


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_cwd_equals_numpy(tau):
    student, teacher = pair()
    expected = 0.0
    for s, t in zip(arrays(student), arrays(teacher)):
        for n, c in np.ndindex(*s.shape[:2]):
            p, q = (np.exp(x[n, c] / tau) / np.exp(x[n, c] / tau).sum() for x in (t, s))
            expected += tau**2 * (p * np.log(p / q)).sum() / (s.shape[0] * s.shape[1])
    assert value("CWD", student, teacher, TAU=tau, WEIGHT=1) == pytest.approx(expected, rel=1e-5)


def test_cwd_ignores_offsets_of_channels():
    student, teacher = pair()
    moved = {k: v + torch.randn(3, 5, 1, 1) for k, v in student.items()}
    assert value("CWD", moved, teacher) == pytest.approx(value("CWD", student, teacher), rel=1e-5)


# --- PKD --------------------------------------------------------------------------------------------------------------


def test_pkd_by_hand():
    """r = 0.9827 of n = 4 cells: (1 - r) 3 / 4."""
    t = torch.tensor([1.0, 2, 3, 4]).view(1, 1, 2, 2)
    s = torch.tensor([10.0, 20, 30, 50]).view(1, 1, 2, 2)
    assert value("PKD", {"p3": s}, {"p3": t}, WEIGHT=1) == pytest.approx(0.0130, abs=1e-4)
    r = np.corrcoef([1, 2, 3, 4], [10, 20, 30, 50])[0, 1]
    assert value("PKD", {"p3": s}, {"p3": t}) == pytest.approx(10 * (1 - r) * 3 / 4, rel=1e-5)


def test_pkd_equals_numpy():
    student, teacher = pair()
    expected = 0.0
    for s, t in zip(arrays(student), arrays(teacher)):
        n = s[:, 0].size
        expected += np.mean([1 - np.corrcoef(s[:, c].ravel(), t[:, c].ravel())[0, 1] for c in range(5)]) * (n - 1) / n
    assert value("PKD", student, teacher, WEIGHT=1) == pytest.approx(expected, rel=1e-5)


def test_pkd_ignores_scale_and_offset_of_channels():
    student, teacher = pair()
    moved = {k: v * (1 + 9 * torch.rand(1, 5, 1, 1)) + torch.randn(1, 5, 1, 1) for k, v in student.items()}
    assert value("PKD", moved, teacher) == pytest.approx(value("PKD", student, teacher), rel=1e-4)


def test_pkd_survives_a_constant_channel():
    s = torch.full((2, 3, 4, 4), 0.7, requires_grad=True)
    unit_deviation(s).square().sum().backward()
    assert s.grad.isfinite().all() and unit_deviation(s).abs().max() == 0


# --- MGD --------------------------------------------------------------------------------------------------------------


def convolve(x, weight, bias):
    """3x3, zero padding; x (C, h, w)."""
    h, w = x.shape[1:]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    out = np.zeros((len(weight), h, w)) + bias[:, None, None]
    for y, x0 in np.ndindex(h, w):
        out[:, y, x0] += np.tensordot(weight, padded[:, y : y + 3, x0 : x0 + 3], axes=3)
    return out


@pytest.mark.parametrize("ratio", [0.0, 0.65, 1.0])
def test_mgd_equals_numpy(ratio):
    student, teacher = pair()
    loss = build("MGD", teacher, MASK_RATIO=ratio, WEIGHT=1)
    torch.manual_seed(5)
    (found,) = evaluate(loss, student, teacher).values()
    torch.manual_seed(5)
    expected = 0.0
    for (name, s), t in zip(student.items(), arrays(teacher)):
        keep = (torch.rand(3, 1, *s.shape[-2:]) >= ratio).numpy()
        first, _, second = loss.loss.generators[name]
        w1, b1, w2, b2 = (p.detach().double().numpy() for p in (*first.parameters(), *second.parameters()))
        for i in range(3):
            hidden = np.maximum(convolve(s[i].double().numpy() * keep[i], w1, b1), 0)
            expected += ((convolve(hidden, w2, b2) - t[i]) ** 2).sum() / 3
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_mgd_masks():
    """Cells are hidden in all channels at once, a fraction of them, without rescaling the others; anew every time."""
    x = torch.rand(2, 4, 64, 64) + 1
    masked = mask_locations(x, 0.65)
    hidden = masked == 0
    assert torch.equal(hidden.any(1), hidden.all(1)) and torch.equal(masked[~hidden], x[~hidden])
    assert hidden.float().mean().item() == pytest.approx(0.65, abs=0.02)
    assert not torch.equal(mask_locations(x, 0.65), masked)
    assert not torch.equal(hidden[0], hidden[1])
    assert torch.equal(mask_locations(x, 0.0), x) and mask_locations(x, 1.0).abs().max() == 0


def test_mgd_default_weight_and_range():
    teacher = pair()[1]
    loss = build("MGD", teacher)
    assert loss.weight == 2e-5 and loss.loss.mask_ratio == 0.65
    with pytest.raises(ValueError, match=r"MASK_RATIO must be in \[0, 1\], got 65"):
        build("MGD", teacher, MASK_RATIO=65)
