"""Naive L2, magnitude and angle of raw features against NumPy and the decomposition of eq. (10)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from helpers import between, evaluate

from msad.distill.losses.raw_features import angular_loss, magnitude_loss, unit_vectors

# One image, two channels (rows), two cells (columns).
T = torch.tensor([[3.0, 1.0], [0.0, 4.0]]).view(1, 2, 1, 2)
S = torch.tensor([[3.0, 0.0], [4.0, 2.0]]).view(1, 2, 1, 2)


def value(name, student, teacher, **options):
    shapes = {k: ShapeSpec(channels=v.shape[1], stride=8) for k, v in teacher.items()}
    (loss,) = between([{"NAME": name, **options}], shapes, shapes)
    (found,) = evaluate(loss, student, teacher).values()
    return found.item()


def test_hand_values():
    """m^2 = 26, n^2 = 29, dot 17: naive 5.25 = 0.0205 (magnitude) + 5.2295 (angle)."""
    student, teacher = {"p3": S}, {"p3": T}
    cos = 17 / np.sqrt(26 * 29)
    assert value("NaiveL2", student, teacher, WEIGHT=1) == pytest.approx(5.25)
    assert value("MagnitudeMD", student, teacher, WEIGHT=1) == pytest.approx(0.0205, abs=1e-4)
    assert value("LAD", student, teacher, WEIGHT=1) == pytest.approx(2 * (1 - cos), rel=1e-5)
    assert value("LAD", student, teacher, WEIGHT=1) == pytest.approx(0.7618, abs=1e-4)
    assert value("PAD", student, teacher, WEIGHT=1) == pytest.approx(0.4299, abs=1e-4)
    assert value("CAD", student, teacher, WEIGHT=1) == pytest.approx(0.6041, abs=1e-4)


@pytest.mark.parametrize("name", ["NaiveL2", "MagnitudeMD", "LAD", "PAD", "CAD", "Angular"])
def test_one_weight_for_all(name):
    one = value(name, {"p3": S}, {"p3": T}, WEIGHT=1)
    assert value(name, {"p3": S}, {"p3": T}) == pytest.approx(3 * one)


def reference(name, s, t):
    """Loops over vectors; s and t (N, C, h, w)."""
    n, c, h, w = s.shape
    costs = []
    for i in range(n):
        a, b = s[i], t[i]
        if name in ("NaiveL2", "MagnitudeMD"):
            gap = np.linalg.norm(a - b) if name == "NaiveL2" else np.linalg.norm(a) - np.linalg.norm(b)
            costs.append(gap**2 / a.size)
            continue
        vectors = {
            "LAD": [(a.ravel(), b.ravel())],
            "PAD": [(a[:, y, x], b[:, y, x]) for y in range(h) for x in range(w)],
            "CAD": [(a[k].ravel(), b[k].ravel()) for k in range(c)],
        }[name]
        cosines = [u @ v / np.linalg.norm(u) / np.linalg.norm(v) for u, v in vectors]
        costs.append(np.mean([2 * (1 - cos) for cos in cosines]))
    return np.mean(costs)


@pytest.mark.parametrize("name", ["NaiveL2", "MagnitudeMD", "LAD", "PAD", "CAD"])
def test_equals_numpy(name):
    student = {k: torch.randn(3, 5, *size) for k, size in (("p3", (4, 6)), ("p4", (2, 3)))}
    teacher = {k: 2 * torch.randn_like(v) + 0.5 for k, v in student.items()}
    expected = sum(reference(name, student[k].double().numpy(), teacher[k].double().numpy()) for k in student)
    assert value(name, student, teacher, WEIGHT=1) == pytest.approx(expected, rel=1e-5)


def test_units_have_names():
    for unit, name in {"layer": "LAD", "pixel": "PAD", "channel": "CAD"}.items():
        assert value("Angular", {"p3": S}, {"p3": T}, UNIT=unit) == value(name, {"p3": S}, {"p3": T})


def test_unknown_unit():
    with pytest.raises(ValueError, match="UNIT must be one of layer, pixel, channel, not 'image'"):
        value("Angular", {"p3": S}, {"p3": T}, UNIT="image")


def test_naive_is_magnitude_plus_weighted_angle():
    """Eq. (10): |F_t - F_s|^2 / D = (m - n)^2 / D + (m n / D) 2 (1 - cos), for every image."""
    s, t = torch.randn(1, 4, 5, 6, dtype=torch.float64), 3 * torch.randn(1, 4, 5, 6, dtype=torch.float64)
    naive = (s - t).square().mean()
    angle = s.norm() * t.norm() / s.numel() * angular_loss(s, t, "layer")
    torch.testing.assert_close(magnitude_loss(s, t) + angle, naive)


def test_angles_ignore_magnitudes():
    s, t = torch.randn(2, 4, 5, 6), torch.randn(2, 4, 5, 6)
    scales = {"layer": (2, 1, 1, 1), "pixel": (2, 1, 5, 6), "channel": (2, 4, 1, 1)}
    for unit, shape in scales.items():
        expected = angular_loss(s, t, unit)
        torch.testing.assert_close(angular_loss(s * (0.1 + 9 * torch.rand(shape)), t, unit), expected)
        torch.testing.assert_close(angular_loss(-t, t, unit), torch.tensor(4.0))
        assert 0 < expected < 4


@pytest.mark.parametrize("unit", ["layer", "pixel", "channel"])
def test_zero_vectors(unit):
    """Finite, without gradient where there is no direction, and 0 if both sides are 0."""
    s = torch.randn(1, 3, 2, 2)
    t = torch.randn(1, 3, 2, 2)
    s[:, :, 0, 0] = s[:, 1] = 0
    s.requires_grad_()
    angular_loss(s, t, unit).backward()
    assert s.grad.isfinite().all() and s.grad.abs().max() < 10
    zero = torch.zeros(1, 3, 2, 2, requires_grad=True)
    loss = angular_loss(zero, t, unit)
    loss.backward()
    assert loss.item() == pytest.approx(1.0) and zero.grad.abs().max() == 0
    assert angular_loss(zero, torch.zeros(1, 3, 2, 2), unit).item() == 0
    assert unit_vectors(torch.full((1, 2, 1, 1), 1e-6), (1,)).norm().item() == pytest.approx(1.0)
