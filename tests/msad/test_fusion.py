"""C-FF against NumPy and loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec

from msad.modeling.fusion import CrossFeatureLevelFusion, masked_mean


def numpy_gate(fusion, pooled):
    """The formula for one image: softmax(W2 relu(W1 [pool(x_1); ...; pool(x_n)]))."""
    hidden = np.maximum(fusion.squeeze.weight.detach().double().numpy() @ np.concatenate(pooled), 0)
    scores = fusion.excite.weight.detach().double().numpy() @ hidden
    return np.exp(scores) / np.exp(scores).sum()


def uneven(fusion):
    """Larger weights than the initial ones, so that the gates differ visibly."""
    torch.nn.init.normal_(fusion.squeeze.weight)
    torch.nn.init.normal_(fusion.excite.weight, std=2.0)
    return fusion


# --- the pool ---------------------------------------------------------------------------------------------------------


def test_masked_mean_against_a_loop():
    x = torch.randn(3, 5, 6, 7, dtype=torch.float64)
    sizes = [(6, 7), (1, 1), (4, 2)]
    expected = torch.zeros(3, 5, dtype=torch.float64)
    for n, (h, w) in enumerate(sizes):
        for i in range(h):
            for j in range(w):
                expected[n] += x[n, :, i, j] / (h * w)
    torch.testing.assert_close(masked_mean(x, sizes), expected, rtol=0, atol=1e-12)


def test_masked_mean_without_sizes_is_the_plain_mean():
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(masked_mean(x, None), x.flatten(2).mean(-1))
    torch.testing.assert_close(masked_mean(x, [(4, 5)] * 2), x.flatten(2).mean(-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masked_mean_keeps_half_precision(dtype):
    x = torch.ones(1, 2, 100, 168, dtype=dtype)
    mean = masked_mean(x, [(99, 167)])
    assert mean.dtype == dtype and (mean.float() - 1).abs().max() < 0.02


# --- the gate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("branches", [2, 3])
@pytest.mark.parametrize("mask_padding", [True, False])
def test_equals_the_formula(branches, mask_padding):
    fusion = uneven(CrossFeatureLevelFusion(6, branches, reduction=2, mask_padding=mask_padding))
    maps = [torch.randn(2, 6, 4, 5) for _ in range(branches)]
    sizes = [(4, 5), (2, 3)]
    gates, fused = fusion.gates(maps, sizes), fusion(maps, sizes)
    assert gates.shape == (2, branches) and fused.shape == (2, 6, 4, 5)
    for n, (h, w) in enumerate(sizes if mask_padding else [(4, 5)] * 2):
        x = [m[n].double().numpy() for m in maps]
        a = numpy_gate(fusion, [m[:, :h, :w].mean((1, 2)) for m in x])
        np.testing.assert_allclose(gates[n].detach().numpy(), a, rtol=1e-5, atol=1e-6)
        expected = sum(a_i * x_i for a_i, x_i in zip(a, x))
        np.testing.assert_allclose(fused[n].detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_normalized_gate_by_hand_and_whatever_the_scale():
    """Pooled 3 and 4: root mean square sqrt(12.5), so that the gate reads 3 and 4 divided by it."""
    fusion = CrossFeatureLevelFusion(1, 2, reduction=1, normalize=True)
    with torch.no_grad():
        fusion.squeeze.weight.copy_(torch.eye(2))
        fusion.excite.weight.copy_(torch.eye(2))
    maps = [torch.full((1, 1, 2, 2), value) for value in (3.0, 4.0)]
    expected = torch.softmax(torch.tensor([[3.0, 4.0]]) / 12.5**0.5, dim=1)
    for scale in (1.0, 1000.0):
        torch.testing.assert_close(fusion.gates([scale * x for x in maps]), expected)
    fusion.normalize = False
    assert fusion.gates([1000 * x for x in maps]).max() == 1  # saturated
    assert torch.isfinite(fusion.gates([0 * x for x in maps])).all()


def test_layers_of_the_released_gate():
    """512 -> 32 -> 2 without bias for two branches of 256 channels."""
    fusion = CrossFeatureLevelFusion(256, 2)
    assert {name: tuple(p.shape) for name, p in fusion.named_parameters()} == {
        "squeeze.weight": (32, 512),
        "excite.weight": (2, 32),
    }
    assert CrossFeatureLevelFusion(4, 3).squeeze.weight.shape == (1, 12), "at least one hidden unit"


def test_order_of_the_branches_is_that_of_the_weights():
    fusion = CrossFeatureLevelFusion(1, 2, reduction=2)
    with torch.no_grad():
        fusion.squeeze.weight.copy_(torch.tensor([[1.0, 0.0]]))  # hidden = mean of the first map
        fusion.excite.weight.copy_(torch.tensor([[1.0], [0.0]]))  # scores = (hidden, 0)
    first, second = torch.full((1, 1, 2, 2), 2.0), torch.full((1, 1, 2, 2), 10.0)
    a = 1 / (1 + np.exp(-2.0))
    torch.testing.assert_close(fusion.gates([first, second]), torch.tensor([[a, 1 - a]]).float())
    torch.testing.assert_close(fusion([first, second]), torch.full((1, 1, 2, 2), 2 * a + 10 * (1 - a)))


@pytest.mark.parametrize("branches", [1, 2, 3])
def test_gates_sum_to_one(branches):
    fusion = uneven(CrossFeatureLevelFusion(8, branches))
    gates = fusion.gates([5 * torch.randn(4, 8, 3, 3) for _ in range(branches)])
    assert (gates >= 0).all()
    torch.testing.assert_close(gates.sum(dim=1), torch.ones(4))


def test_equal_maps_are_returned_whatever_the_gate():
    fusion = uneven(CrossFeatureLevelFusion(8, 2))
    x = torch.randn(2, 8, 3, 4)
    torch.testing.assert_close(fusion([x, x]), x)


def test_gates_are_per_image_and_per_level():
    fusion = uneven(CrossFeatureLevelFusion(8, 2, reduction=2))
    p3, p4 = ([torch.randn(2, 8, s, s) for _ in range(2)] for s in (8, 4))
    gates = torch.stack([fusion.gates(p3), fusion.gates(p4)])  # (level, image, branch)
    assert (gates[:, 0] - gates[:, 1]).abs().min() > 1e-3, "images"
    assert (gates[0] - gates[1]).abs().min() > 1e-3, "levels"
    # One number per image: the same for every pixel and channel. fused = a x + (1 - a) y gives a back everywhere.
    x, y = p3
    weight = (fusion([x, y]) - y) / (x - y)
    sound = (x - y).abs() > 0.1
    torch.testing.assert_close(weight[sound], gates[0, :, :1, None, None].expand_as(x)[sound], rtol=0, atol=1e-4)


@pytest.mark.parametrize("mask_padding", [True, False])
def test_gate_depends_on_padding_only_if_not_masked(mask_padding):
    """An image alone, and beside a larger one that makes its maps larger by padding (not zero after convolutions)."""
    fusion = uneven(CrossFeatureLevelFusion(8, 2, reduction=2, mask_padding=mask_padding))
    small = [torch.randn(1, 8, 4, 3) for _ in range(2)]
    padded = [torch.randn(2, 8, 6, 9) for _ in range(2)]
    for alone, batch in zip(small, padded):
        batch[:1, :, :4, :3] = alone
    alone = fusion(small, [(4, 3)])
    together = fusion(padded, [(4, 3), (6, 9)])[:1, :, :4, :3]
    difference = (alone - together).abs().max()
    assert (difference < 1e-5) if mask_padding else (difference > 1e-2)


def test_gate_does_not_depend_on_batch_mates():
    """The released code weighed the whole batch by the gate of image 0."""
    fusion = uneven(CrossFeatureLevelFusion(8, 3))
    maps = [torch.randn(3, 8, 4, 4) for _ in range(3)]
    alone = torch.cat([fusion([m[i : i + 1] for m in maps], [(3, 4)]) for i in range(3)])
    torch.testing.assert_close(fusion(maps, [(3, 4)] * 3), alone)
    reordered = fusion([m.flip(0) for m in maps], [(3, 4)] * 3).flip(0)
    torch.testing.assert_close(reordered, alone)


def test_gradients_reach_gate_and_branches():
    fusion = uneven(CrossFeatureLevelFusion(4, 3, reduction=1)).double()
    maps = [torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    sizes = [(3, 2), (2, 1)]
    assert torch.autograd.gradcheck(lambda *x: fusion(list(x), sizes), maps, atol=1e-6)
    fusion(maps, sizes).square().sum().backward()
    for tensor in (fusion.squeeze.weight, fusion.excite.weight, *maps):
        assert tensor.grad.abs().sum() > 0


def test_inputs_are_not_modified():
    fusion = CrossFeatureLevelFusion(4, 2)
    maps = [torch.randn(1, 4, 2, 2) for _ in range(2)]
    copies = [m.clone() for m in maps]
    fusion(maps, [(1, 2)])
    assert all(torch.equal(m, c) for m, c in zip(maps, copies))


def test_half_precision_maps_stay_half():
    fusion = CrossFeatureLevelFusion(8, 2)
    maps = [torch.randn(1, 8, 4, 4) for _ in range(2)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = fusion([m.bfloat16() for m in maps], [(4, 3)])
    assert fused.dtype == torch.bfloat16
    torch.testing.assert_close(fused.float(), fusion(maps, [(4, 3)]), rtol=0.05, atol=0.05)


def test_levels_of_different_width_are_refused():
    shapes = {"p3": ShapeSpec(channels=8), "p4": ShapeSpec(channels=8)}
    assert CrossFeatureLevelFusion.from_shapes(shapes, 2, reduction=4).squeeze.weight.shape == (4, 16)
    with pytest.raises(ValueError, match=r"equal channels.*'p4': 4"):
        CrossFeatureLevelFusion.from_shapes({**shapes, "p4": ShapeSpec(channels=4)}, 2)
