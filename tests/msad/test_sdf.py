"""Scale-decoupled features of ScaleKD: weights, sides, collapse."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
from helpers import make_context

from msad.distill.losses.sdf import SDF, ScaleDecoupled


def sdf(**options):
    torch.manual_seed(0)
    return SDF(["res5"], {"res5": 16}, {"res5": 8}, embedding=4, **options)


def test_branches_share_weights():
    count = {share: sum(p.numel() for p in ScaleDecoupled(16, 4, (1, 2, 3), share).parameters()) for share in (0, 1)}
    assert count[0] == 3 * count[1]
    # Of equal dilations, shared branches say the same; of others they do not.
    x = torch.randn(2, 16, 9, 9)
    same = ScaleDecoupled(16, 4, (1, 1), True)(x).chunk(2, dim=1)
    assert torch.equal(*same)
    other = ScaleDecoupled(16, 4, (1, 2), True)(x).chunk(2, dim=1)
    assert not torch.allclose(*other)


def test_a_branch_is_a_residual_bottleneck():
    """Dilation 1 against torch's own layers in a row."""
    module, x = ScaleDecoupled(16, 4, (1,), True), torch.randn(2, 16, 5, 6)
    a, b, c = module.norms[0]
    y = a(module.reduce[0](x)).relu()
    y = b(torch.nn.functional.conv2d(y, module.spread[0].weight, padding=1)).relu()
    expected = module.flatten[0]((x + c(module.expand[0](y))).relu())
    torch.testing.assert_close(module(x), expected)


def dilated(x, weight, dilation):
    """A 3x3 convolution location by location: nine neighbours, ``dilation`` apart, zeros beyond the border."""
    n, _, h, w = x.shape
    out = torch.zeros(n, weight.shape[0], h, w)
    for row, column in itertools.product(range(h), range(w)):
        for i, j in itertools.product(range(3), range(3)):
            y, z = row + (i - 1) * dilation, column + (j - 1) * dilation
            if 0 <= y < h and 0 <= z < w:
                out[:, :, row, column] += x[:, :, y, z] @ weight[:, :, i, j].T
    return out


def embedding(module, x, dilations):
    """All branches of shared weights, one after the other."""
    a, b, c = module.norms[0]
    found = []
    for dilation in dilations:
        y = dilated(a(module.reduce[0](x)).relu(), module.spread[0].weight, dilation)
        found.append(module.flatten[0]((x + c(module.expand[0](b(y).relu()))).relu()))
    return torch.stack(found)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_by_hand(reduction):
    """Student -> MLP -> embeddings of dilations 1, 2, 3, against the teacher's; one loss for all of them."""
    loss = sdf(reduction=reduction)
    s, t = torch.randn(2, 8, 5, 4), torch.randn(2, 16, 5, 4)
    first, _, second = loss.adapt["res5"]
    adapted = second(first(s).clamp(min=0))
    difference = embedding(loss.student["res5"], adapted, (1, 2, 3)) - embedding(loss.teacher["res5"], t, (1, 2, 3))
    assert difference.shape == (3, 2, 4, 5, 4)
    expected = (difference**2).sum() / 2  # images
    if reduction == "mean":
        expected = expected / (3 * 4 * 5 * 4)
    torch.testing.assert_close(loss({"res5": s}, {"res5": t}, make_context([], iteration=1))["l2"], expected)


def test_unknown_reduction():
    with pytest.raises(ValueError, match="REDUCTION must be mean or sum, not 'none'"):
        sdf(reduction="none")


@pytest.mark.parametrize(("side", "trained"), [("frozen", False), ("shared", None), ("trainable", True)])
def test_the_teachers_side(side, trained):
    loss = sdf(teacher_side=side)
    s, t = torch.randn(2, 8, 4, 4), torch.randn(2, 16, 4, 4)
    loss({"res5": s}, {"res5": t}, make_context([], iteration=1))["l2"].backward()
    assert all(p.grad is not None for p in (*loss.adapt.parameters(), *loss.student.parameters()))
    of_teacher = list(loss.teacher.parameters())
    if trained is None:
        assert not of_teacher
        student, wanted = loss.student["res5"], list(loss.student.parameters())
        fixed = torch.nn.functional.mse_loss(student(loss.adapt["res5"](s)), student(t).detach())
        torch.testing.assert_close([p.grad for p in wanted], list(torch.autograd.grad(fixed, wanted)))
    else:
        assert of_teacher and all((p.grad is not None) == trained == p.requires_grad for p in of_teacher)


def test_unknown_side():
    with pytest.raises(ValueError, match="TEACHER_SIDE must be one of frozen, shared, trainable, not 'both'"):
        sdf(teacher_side="both")


def two_levels(side):
    """A loss on two levels, of which the teacher's second has the smaller embedding, and its maps."""
    loss = SDF(["res4", "res5"], dict.fromkeys(["res4", "res5"], 8), dict.fromkeys(["res4", "res5"], 8), 4,
               teacher_side=side)  # fmt: skip
    for parameter in (loss.student if side == "shared" else loss.teacher)["res5"].flatten.parameters():
        parameter.data.mul_(1e-3)
    return loss, [{name: torch.randn(2, 8, 4, 4) for name in ("res4", "res5")} for _ in range(2)]


@pytest.mark.parametrize("side", ["shared", "trainable"])
def test_collapse_is_noticed_by_level_and_over_a_resume(caplog, side):
    first, maps = two_levels(side)
    older, _ = two_levels(side)
    with caplog.at_level(logging.WARNING):
        first(*maps, make_context([], iteration=0))
        loss, _ = two_levels(side)
        loss.load_state_dict(first.state_dict())
        loss(*maps, make_context([], iteration=200))
        assert not caplog.messages
        watched = (loss.student if side == "shared" else loss.teacher)["res5"]
        for parameter in watched.flatten.parameters():  # the last layer, to which the spread is proportional
            parameter.data.mul_(0.02)
        loss(*maps, make_context([], iteration=200))
        assert not caplog.messages, "a fiftieth is not yet a collapse"
        for parameter in watched.flatten.parameters():
            parameter.data.mul_(0.005 / 0.02)
        loss(*maps, make_context([], iteration=300))
        assert not caplog.messages, "looked at every 200 iterations"
        loss(*maps, make_context([], iteration=400))
        # A run folder that knows no first value: the next one counts as such.
        for parameter in watched.parameters():
            parameter.data.zero_()
        older.load_state_dict({k: v for k, v in loss.state_dict().items() if k != "first_spread"})
        older(*maps, make_context([], iteration=600))
    (message,) = caplog.messages
    assert message.startswith("SDF: the teacher's embedding of res5 has collapsed")


def test_a_frozen_side_is_not_watched(caplog):
    loss, maps = two_levels("frozen")
    with caplog.at_level(logging.INFO):
        loss(*maps, make_context([], iteration=0))
    assert not caplog.messages and not list(loss.buffers())
