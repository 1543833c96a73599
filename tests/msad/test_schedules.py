"""Weights over training: hand-computed values."""

from __future__ import annotations

import pytest

from msad import load_config
from msad.distill.schedules import distillation_factor, paper_weights


@pytest.mark.parametrize(
    ("iteration", "expected"), [(0, 0.0), (1, 0.002), (250, 0.5), (499, 0.998), (500, 1.0), (501, 1.0), (89999, 1.0)]
)
def test_warmup_of_the_released_code(iteration, expected):
    """min(1, t / 500), kept to the end."""
    assert distillation_factor(iteration, 90000, warmup_iters=500) == pytest.approx(expected, abs=1e-12)


def test_without_warmup_it_starts_at_one():
    assert [distillation_factor(i, 10) for i in range(10)] == [1.0] * 10


@pytest.mark.parametrize(
    ("iteration", "expected"),
    [(0, 0.0), (10, 1.0), (59, 1.0), (60, 1.0), (65, 0.75), (70, 0.5), (79, 0.05), (80, 0.0), (99, 0.0)],
)
def test_decay(iteration, expected):
    """1 until 0.6 * 100, then linearly to 0 at 0.8 * 100."""
    found = distillation_factor(iteration, 100, warmup_iters=10, decay_from=0.6, decay_to=0.8)
    assert found == pytest.approx(expected, abs=1e-12)


def test_decay_to_the_end_and_decay_at_once():
    assert distillation_factor(75, 100, decay_from=0.5) == 0.5
    switched_off = [distillation_factor(i, 100, decay_from=0.5, decay_to=0.5) for i in (49, 50, 99)]
    assert switched_off == [1.0, 0.0, 0.0]
    assert distillation_factor(0, 100, decay_from=0.0, decay_to=0.0) == 0.0


def test_warmup_and_decay_multiply_where_they_overlap():
    assert distillation_factor(40, 100, warmup_iters=80, decay_from=0.2, decay_to=0.6) == pytest.approx(0.5 * 0.5)


@pytest.mark.parametrize(("start", "end"), [(0.8, 0.6), (-0.1, 1.0), (0.5, 1.1)])
def test_impossible_decay_names_the_keys(start, end):
    with pytest.raises(ValueError, match=r"DISTILL\.DECAY_FROM <= DISTILL\.DECAY_TO"):
        distillation_factor(0, 100, decay_from=start, decay_to=end)


def test_convex_weights():
    """L_T = L_H + L_L + lambda L_F; L_S = gamma L_det + (1 - gamma) L_KD. With 0.4 and 0.8 the released weights."""
    w_fuse, w_det, w_distill = paper_weights("convex", 0.4, 0.8)
    assert (w_fuse, w_det) == (0.4, 0.8) and w_distill == pytest.approx(0.2 * 3)
    w_fuse, w_det, w_distill = paper_weights("convex", 0.2, 0.6)  # Mask R-CNN
    assert (w_fuse, w_det) == (0.2, 0.6) and w_distill == pytest.approx(0.4 * 3)


def test_additive_weights():
    """L_S = gamma L_det + lambda L_KD, the fused branch at the released 0.4."""
    w_fuse, w_det, w_distill = paper_weights("additive", 0.2, 0.6)
    assert (w_fuse, w_det) == (0.4, 0.6) and w_distill == pytest.approx(0.2 * 3)


def test_defaults_are_the_released_weights():
    cfg = load_config("")
    assert (cfg.MSAD.W_FUSE, cfg.DISTILL.W_DET, cfg.DISTILL.WARMUP_ITERS, cfg.DISTILL.WEIGHTING) == (0.4, 1.0, 500, "")
    assert (cfg.DISTILL.DECAY_FROM, cfg.DISTILL.DECAY_TO) == (1.0, 1.0)
    assert paper_weights("convex", cfg.DISTILL.LAMBDA, cfg.DISTILL.GAMMA)[0] == cfg.MSAD.W_FUSE


@pytest.mark.parametrize("reading", ["", "C", "A"])
def test_unknown_weighting_names_the_key(reading):
    with pytest.raises(ValueError, match=rf"DISTILL\.WEIGHTING must be .* not '{reading}'"):
        paper_weights(reading, 0.4, 0.8)
