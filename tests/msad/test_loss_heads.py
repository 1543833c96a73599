"""What every loss between head predictions, LD and Chen, must do."""

from __future__ import annotations

import pytest
import torch
from head_predictions import BOXES, TRANSFORMS, UNEVEN, build, call, make_pair, values
from helpers import make_context

from msad.distill.losses.ld import LD

CASES = [("LD", "distributions"), *(("Chen", kind) for kind in sorted(TRANSFORMS))]


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
