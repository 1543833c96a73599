"""SOLVER.REFERENCE_BATCH_SIZE and REFERENCE_WORLD_SIZE: the linear rule by hand, in the log and in training."""

from __future__ import annotations

import logging

import pytest

from msad import load_config
from msad.engine import DistillTrainer
from msad.engine.scaling import scale_to_batch, scale_to_processes, set_iterations
from msad.engine.setup import prepare
from msad.experiments.comparison import Comparison
from msad.experiments.jobs import Run
from msad.experiments.variants import Variant


@pytest.fixture
def cfg():
    """A schedule of 90k iterations of 16 images."""
    cfg = load_config("")
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_BATCH_SIZE = 16, 16
    cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 0.01, 90000, (60000, 80000)
    cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.CHECKPOINT_PERIOD = 500, 5000
    cfg.DISTILL.WARMUP_ITERS, cfg.TEST.EVAL_PERIOD = 400, 0
    cfg.DISTILL.BALANCE.ITERS, cfg.DISTILL.ANALYSIS_PERIOD = 100, 20
    cfg.SOLVER.BASE_LR_END, cfg.SOLVER.POLY_LR_END = 1e-3, 1e-4
    return cfg


def test_periods_that_mean_never_stay(cfg):
    cfg.TEST.EVAL_PERIOD, cfg.DISTILL.ANALYSIS_PERIOD, cfg.SOLVER.IMS_PER_BATCH = -1, -1, 4
    scaled = scale_to_batch(cfg)
    assert (scaled.TEST.EVAL_PERIOD, scaled.DISTILL.ANALYSIS_PERIOD) == (-1, -1)


def test_linear_rule_and_log(cfg, caplog):
    cfg.SOLVER.IMS_PER_BATCH = 4
    before = cfg.dump()
    with caplog.at_level(logging.INFO, logger="msad.engine.scaling"):
        scaled = scale_to_batch(cfg)
    solver = scaled.SOLVER
    assert (solver.BASE_LR, solver.MAX_ITER, solver.STEPS) == (0.0025, 360000, (240000, 320000))
    assert (solver.BASE_LR_END, solver.POLY_LR_END) == (2.5e-4, 2.5e-5)
    assert (solver.WARMUP_ITERS, solver.CHECKPOINT_PERIOD) == (2000, 20000)
    assert (scaled.DISTILL.WARMUP_ITERS, scaled.TEST.EVAL_PERIOD) == (1600, 0)
    assert solver.IMS_PER_BATCH == 4 and cfg.dump() == before
    # Nothing else has changed, and as many images are seen.
    changed = [line for line in scaled.dump().splitlines() if line not in before.splitlines()]
    assert len(changed) == 12, changed
    assert solver.MAX_ITER * 4 == cfg.SOLVER.MAX_ITER * 16
    (said,) = caplog.messages
    assert said.startswith("Schedule scaled from batches of 16 to batches of 4: ")
    for change in (
        "SOLVER.BASE_LR 0.01 -> 0.0025",
        "SOLVER.BASE_LR_END 0.001 -> 0.00025",
        "SOLVER.STEPS (60000, 80000) -> (240000, 320000)",
        "SOLVER.MAX_ITER 90000 -> 360000",
        "SOLVER.WARMUP_ITERS 500 -> 2000",
        "DISTILL.WARMUP_ITERS 400 -> 1600",
        "SOLVER.CHECKPOINT_PERIOD 5000 -> 20000",
        "DISTILL.BALANCE.ITERS 100 -> 400",
        "DISTILL.ANALYSIS_PERIOD 20 -> 80",
    ):
        assert change in said
    assert "EVAL_PERIOD" not in said
    assert scale_to_batch(scaled) is scaled


@pytest.mark.parametrize(("reference", "batch"), [(0, 4), (16, 16)])
def test_off_and_nothing_to_do(cfg, caplog, reference, batch):
    cfg.SOLVER.REFERENCE_BATCH_SIZE, cfg.SOLVER.IMS_PER_BATCH = reference, batch
    with caplog.at_level(logging.INFO, logger="msad.engine.scaling"):
        assert scale_to_batch(cfg) is cfg
    assert not caplog.messages


def test_a_large_batch_keeps_short_warmups_and_periods(cfg):
    cfg.SOLVER.IMS_PER_BATCH = 1600
    cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.WARMUP_ITERS, cfg.DISTILL.WARMUP_ITERS = 10, 20, 0
    cfg.freeze()
    scaled = scale_to_batch(cfg)
    assert scaled.is_frozen()
    assert (scaled.SOLVER.CHECKPOINT_PERIOD, scaled.SOLVER.WARMUP_ITERS, scaled.DISTILL.WARMUP_ITERS) == (1, 1, 0)


def test_negative_is_an_error(cfg):
    cfg.SOLVER.REFERENCE_BATCH_SIZE = -1
    with pytest.raises(ValueError, match=r"SOLVER\.REFERENCE_BATCH_SIZE is a batch size.*-1"):
        scale_to_batch(cfg)


def test_fewer_processes(cfg, caplog):
    """Written for 8 GPUs with two images each, run on two: every count of iterations grows, the project's too."""
    cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.REFERENCE_BATCH_SIZE = 8, 0
    cfg.TEST.EVAL_PERIOD, cfg.DISTILL.DECAY_FROM = 1000, 0.5
    before = cfg.dump()
    with caplog.at_level(logging.INFO, logger="msad.engine.scaling"):
        scaled = scale_to_processes(cfg, 2)
    assert cfg.dump() == before
    expected = {
        "SOLVER.IMS_PER_BATCH": (16, 4),
        "SOLVER.BASE_LR": (0.01, 0.0025),
        "SOLVER.BASE_LR_END": (1e-3, 2.5e-4),
        "SOLVER.POLY_LR_END": (1e-4, 2.5e-5),
        "SOLVER.STEPS": ((60000, 80000), (240000, 320000)),
        "SOLVER.MAX_ITER": (90000, 360000),
        "SOLVER.WARMUP_ITERS": (500, 2000),
        "SOLVER.CHECKPOINT_PERIOD": (5000, 20000),
        "DISTILL.WARMUP_ITERS": (400, 1600),
        "DISTILL.BALANCE.ITERS": (100, 400),
        "DISTILL.ANALYSIS_PERIOD": (20, 80),
        "TEST.EVAL_PERIOD": (1000, 4000),
    }
    changes = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in expected.items())
    assert f"Schedule scaled from 8 to 2 processes: {changes}" in caplog.messages
    # That is all that has changed, but for the number of processes itself.
    cfg.merge_from_list([item for key, (_, new) in expected.items() for item in (key, new)])
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 2
    assert scaled == cfg
    caplog.clear()
    assert scale_to_processes(scaled, 2) is scaled and not caplog.messages


def test_processes_as_written_or_not_given(cfg, caplog):
    for cfg.SOLVER.REFERENCE_WORLD_SIZE in (0, 4):
        assert scale_to_processes(cfg, 4) is cfg
    assert not caplog.messages
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 3
    with pytest.raises(ValueError, match=r"IMS_PER_BATCH 16 is no multiple of SOLVER\.REFERENCE_WORLD_SIZE 3"):
        scale_to_processes(cfg, 1)


def test_more_processes_keep_short_periods(cfg):
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE = 1, 1
    cfg.DISTILL.BALANCE.ITERS, cfg.DISTILL.ANALYSIS_PERIOD, cfg.DISTILL.WARMUP_ITERS = 3, 20, 0
    cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD = 30, 20
    cfg.freeze()
    scaled = scale_to_processes(cfg, 64)
    assert (scaled.SOLVER.CHECKPOINT_PERIOD, scaled.TEST.EVAL_PERIOD) == (1, 1)
    assert scaled.is_frozen()
    found = scaled.DISTILL
    assert (found.BALANCE.ITERS, found.ANALYSIS_PERIOD, found.WARMUP_ITERS) == (1, 1, 0)


def test_batch_and_then_processes(cfg):
    """16 images on 8 GPUs; the user halves the batch on 8 and then runs on 4: a quarter of the images."""
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE = 8, 8
    both = scale_to_processes(scale_to_batch(cfg), 4)
    assert both.SOLVER.IMS_PER_BATCH == 4
    assert pytest.approx(0.0025) == both.SOLVER.BASE_LR
    assert (both.SOLVER.MAX_ITER, both.DISTILL.WARMUP_ITERS) == (360000, 1600)
    assert scale_to_processes(scale_to_batch(both), 4) is both


def test_training_scales_to_its_processes(project, tmp_path):
    options = ["SOLVER.REFERENCE_WORLD_SIZE", 2, "SOLVER.MAX_ITER", 3, "OUTPUT_DIR", str(tmp_path)]
    cfg = load_config(project / "fcos.yaml", [*options, "DISTILL.ANALYSIS_PERIOD", 5])
    prepare(cfg)
    run = DistillTrainer(cfg)
    assert run.max_iter == 6 and run.cfg.SOLVER.IMS_PER_BATCH == cfg.SOLVER.IMS_PER_BATCH // 2
    assert run.cfg.DISTILL.ANALYSIS_PERIOD == 10


@pytest.mark.parametrize(("iterations", "start", "frozen"), [(9000, 3000, 1000), (180000, 60000, 20000)])
def test_phases_follow_the_length_of_the_schedule(cfg, iterations, start, frozen):
    """ScaleKD's 30k iterations of warm-up; the backbone is frozen for 10k of 1x and 20k of 2x."""
    cfg.DISTILL.START_ITER, cfg.DISTILL.FREEZE_BACKBONE_ITERS = 30000, 10000
    kept = cfg.clone()
    set_iterations(cfg, iterations)
    assert start == cfg.DISTILL.START_ITER and frozen == cfg.DISTILL.FREEZE_BACKBONE_ITERS
    set_iterations(kept, iterations, keep=["DISTILL.START_ITER"])
    assert kept.DISTILL.START_ITER == 30000 and frozen == kept.DISTILL.FREEZE_BACKBONE_ITERS
    cfg.SOLVER.IMS_PER_BATCH = 8  # half the images a step
    scaled = scale_to_batch(cfg)
    assert 2 * frozen == scaled.DISTILL.FREEZE_BACKBONE_ITERS


def test_training_and_comparisons_use_it(project, tmp_path):
    options = ["SOLVER.REFERENCE_BATCH_SIZE", 4, "SOLVER.MAX_ITER", 3, "OUTPUT_DIR", str(tmp_path)]
    cfg = load_config(project / "fcos.yaml", options)
    prepare(cfg)
    run = DistillTrainer(cfg)
    assert run.max_iter == 6
    assert run.optimizer.param_groups[0]["initial_lr"] == pytest.approx(0.001)
    comparison = Comparison({"fcos": Variant(project / "fcos.yaml")}, tmp_path / "out", options[:4])
    assert comparison.config(Run("fcos", 0)).SOLVER.MAX_ITER == 6
