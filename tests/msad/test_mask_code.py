"""The mask code against NumPy's SVD, and round trips of shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from msad.modeling.detectors.mask_code import MASK_SIZE, MaskCode, MaskStatistics


def shapes(count, seed=0, size=MASK_SIZE):
    """(count, size, size) bool: tilted ellipses and boxes with a corner cut off, as they lie in their boxes."""
    rng = np.random.default_rng(seed)
    y, x = (np.mgrid[:size, :size] + 0.5) / size * 2 - 1
    masks = []
    for i in range(count):
        if i % 2:
            tilt = rng.uniform(-0.7, 0.7)
            masks.append(x**2 + y**2 + 2 * tilt * x * y <= 1 - tilt**2)  # touches all four sides of the box
        else:
            sx, sy = rng.choice([-1, 1], 2)
            masks.append(sx * x + sy * y <= rng.uniform(0.2, 1.6))
    return torch.from_numpy(np.stack(masks))


def fit(masks, dim, portions=1):
    statistics = MaskStatistics(masks.shape[1])
    for part in masks.chunk(portions):
        statistics.add(part)
    assert statistics.count == len(masks)
    return statistics.fit(dim)


def iou(a, b):
    return (a & b).sum((1, 2)) / (a | b).sum((1, 2))


def test_components_are_those_of_numpys_svd():
    masks = torch.rand(200, 6, 6, generator=torch.Generator().manual_seed(0)) > torch.linspace(0.1, 0.9, 36).view(6, 6)
    code, kept = fit(masks, 10, portions=7)
    flat = masks.numpy().reshape(200, 36).astype(float)
    centred = flat - flat.mean(axis=0)
    _, singular, rows = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(code.mean, flat.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(code.variance, singular[:10] ** 2 / 200, rtol=1e-5)
    np.testing.assert_allclose(np.abs(code.components.numpy() @ rows[:10].T), np.eye(10), atol=1e-4)
    assert kept == pytest.approx((singular[:10] ** 2).sum() / (singular**2).sum(), rel=1e-9)

    codes = code.encode(masks)
    assert codes.shape == (200, 10)
    np.testing.assert_allclose(codes.mean(0), np.zeros(10), atol=1e-5)
    np.testing.assert_allclose(codes.T @ codes / 200, np.eye(10), atol=1e-4)  # white
    projected = flat.mean(axis=0) + centred @ rows[:10].T @ rows[:10]
    np.testing.assert_allclose(code.decode(codes).view(200, 36), projected.clip(0, 1), atol=1e-4)


def test_by_hand():
    """Of the masks 1000 and 0111, as 2 x 2, the mean is a half everywhere and the component (1, -1, -1, -1) / 2."""
    masks = torch.tensor([[[1, 0], [0, 0]], [[0, 1], [1, 1]]], dtype=torch.bool)
    code, kept = fit(masks, 1)
    assert kept == pytest.approx(1.0)
    torch.testing.assert_close(code.mean, torch.full((4,), 0.5))
    assert code.components[0].abs().tolist() == pytest.approx([0.5] * 4)
    torch.testing.assert_close(code.variance, torch.tensor([1.0]))  # each mask is 4 * 0.5^2 = 1 from the mean
    assert sorted(code.encode(masks).flatten().tolist()) == pytest.approx([-1.0, 1.0])
    torch.testing.assert_close(code.decode(code.encode(masks)), masks.float())
    torch.testing.assert_close(code.decode(torch.zeros(1, 1)), torch.full((1, 2, 2), 0.5))


def test_distance_is_that_of_the_decoded_masks():
    code, _ = fit(shapes(400), 12)
    a, b = torch.randn(5, 12), torch.randn(5, 12)
    scaled = [(z.numpy() * np.sqrt(code.variance.numpy())) @ code.components.numpy() for z in (a, b)]
    expected = ((scaled[0] - scaled[1]) ** 2).sum(axis=1) / code.variance.numpy().sum()
    np.testing.assert_allclose(code.distance(a, b), expected, rtol=1e-4)
    codes = code.encode(shapes(400))
    assert float(code.distance(torch.zeros_like(codes), codes).mean()) == pytest.approx(1.0, rel=1e-4)


def test_round_trip_of_shapes_it_was_not_fitted_on():
    code, kept = fit(shapes(3000, seed=1), 60)
    assert kept > 0.97
    new = shapes(200, seed=2)
    decoded = code.decode(code.encode(new)) >= 0.5
    assert float(iou(decoded, new).mean()) > 0.97 and float(iou(decoded, new).min()) > 0.9
    # fewer numbers keep less
    coarse, less = fit(shapes(3000, seed=1), 4)
    assert less < kept
    assert iou(coarse.decode(coarse.encode(new)) >= 0.5, new).mean() < iou(decoded, new).mean() - 0.03


def test_files(tmp_path):
    code, _ = fit(shapes(100), 5)
    code.save(tmp_path / "new" / "code.npz")
    loaded = MaskCode.load(str(tmp_path / "new" / "code.npz"))
    assert loaded.dim == 5 and loaded.mask_size == 28
    for name, value in code.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert list(code.state_dict()) == ["mean", "components", "variance"] and not list(code.parameters())


def test_errors_name_key_and_tool(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"MODEL\.MEINST\.CODE is empty.*tools/fit_mask_code\.py"):
        MaskCode.load("")
    with pytest.raises(FileNotFoundError, match=r"no file nowhere\.npz; tools/fit_mask_code\.py"):
        MaskCode.load("nowhere.npz")
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "other.npz", mean=np.zeros(4))
    np.save(tmp_path / "array.npy", np.zeros(4))
    np.savez(tmp_path / "odd.npz", mean=np.zeros(5), components=np.zeros((1, 5)), variance=np.ones(1))
    for name in ("text.npz", "other.npz", "array.npy", "odd.npz"):
        with pytest.raises(ValueError, match=rf"\.CODE: .*{name} is not a file of tools/fit_mask_code\.py"):
            MaskCode.load(tmp_path / name)
    for masks in (shapes(12), torch.zeros(0, 28, 28), torch.ones(9, 28, 28)):
        with pytest.raises(ValueError, match=rf"DIM is 60, but {len(masks)} masks vary in \d+ directions"):
            fit(masks, 60)
