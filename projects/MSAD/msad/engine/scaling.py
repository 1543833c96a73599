"""One schedule for any batch size and any number of processes."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from ..config_values import copy_with, plain, set_value, value_at

logger = logging.getLogger(__name__)

# Counts of iterations that shrink when the batch grows; a period of 0 or less means never and stays.
ITERATIONS = (
    "SOLVER.MAX_ITER",
    "SOLVER.WARMUP_ITERS",
    "SOLVER.CHECKPOINT_PERIOD",
    "DISTILL.START_ITER",
    "DISTILL.FREEZE_BACKBONE_ITERS",
    "DISTILL.WARMUP_ITERS",
    "DISTILL.BALANCE.ITERS",
    "DISTILL.ANALYSIS_PERIOD",
    "TEST.EVAL_PERIOD",
)
RATES = ("SOLVER.BASE_LR", "SOLVER.BASE_LR_END", "SOLVER.POLY_LR_END")
WARMUPS = ("SOLVER.WARMUP_ITERS", "DISTILL.WARMUP_ITERS")
PHASES = ("DISTILL.START_ITER", "DISTILL.FREEZE_BACKBONE_ITERS")
# What the length of a training changes.
SCHEDULE = ("SOLVER.MAX_ITER", "SOLVER.STEPS", *WARMUPS, *PHASES)
SCALED = ("SOLVER.IMS_PER_BATCH", *RATES, "SOLVER.STEPS", *ITERATIONS)


def scale_to_batch(cfg: CfgNode) -> CfgNode:
    """Fit the schedule of a config that was written for batches of SOLVER.REFERENCE_BATCH_SIZE to its IMS_PER_BATCH.

    The linear rule (Goyal et al., 2017): with k times the images a step, k times the learning rate, that at the end of
    a schedule too, and 1/k of all numbers of iterations, so that as many images are seen. What changed is logged, old
    -> new.

    Returns:
        ``cfg`` itself if REFERENCE_BATCH_SIZE is 0 or equals IMS_PER_BATCH, otherwise a copy in which both are equal,
        so that scaling it again changes nothing.

    Raises:
        ValueError: REFERENCE_BATCH_SIZE is negative.
    """
    reference, batch = cfg.SOLVER.REFERENCE_BATCH_SIZE, cfg.SOLVER.IMS_PER_BATCH
    if reference < 0:
        raise ValueError(f"SOLVER.REFERENCE_BATCH_SIZE is a batch size, or 0 for no scaling; got {reference}")
    if reference in (0, batch):
        return cfg
    factor = batch / reference
    new = {key: value_at(cfg, key) * factor for key in RATES}
    new["SOLVER.STEPS"] = tuple(_shrink(step, factor) for step in cfg.SOLVER.STEPS)
    new.update((key, _shrink(value_at(cfg, key), factor)) for key in ITERATIONS)
    scaled = copy_with(cfg, {**new, "SOLVER.REFERENCE_BATCH_SIZE": batch})
    logger.info("Schedule scaled from batches of %d to batches of %d: %s", reference, batch, _changes(cfg, scaled))
    return scaled


def scale_to_processes(cfg: CfgNode, num_processes: int) -> CfgNode:
    """Fit batch and schedule of a config for SOLVER.REFERENCE_WORLD_SIZE processes to ``num_processes``.

    detectron2's rule (DefaultTrainer.auto_scale_workers), which leaves the images of a process as they are and scales
    the learning rate with the number of processes and the iterations against it; and the same for the learning rate at
    the end and for the keys of this project that count iterations. No period becomes 0. What changed is logged, old
    -> new.

    Returns:
        ``cfg`` itself if REFERENCE_WORLD_SIZE is 0 or ``num_processes``, otherwise a copy whose REFERENCE_WORLD_SIZE is
        ``num_processes``, so that scaling it again changes nothing.

    Raises:
        ValueError: IMS_PER_BATCH is no multiple of REFERENCE_WORLD_SIZE.
    """
    reference, batch = cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.IMS_PER_BATCH
    if reference in (0, num_processes):
        return cfg
    if batch % reference:
        raise ValueError(f"SOLVER.IMS_PER_BATCH {batch} is no multiple of SOLVER.REFERENCE_WORLD_SIZE {reference}")
    factor = num_processes / reference
    new = {key: _shrink(value_at(cfg, key), factor) for key in ITERATIONS}
    new.update((key, value_at(cfg, key) * factor) for key in RATES)
    scaled = copy_with(DefaultTrainer.auto_scale_workers(cfg, num_processes), new)
    if cfg.SOLVER.REFERENCE_BATCH_SIZE:
        scaled = copy_with(scaled, {"SOLVER.REFERENCE_BATCH_SIZE": scaled.SOLVER.IMS_PER_BATCH})
    logger.info("Schedule scaled from %d to %d processes: %s", reference, num_processes, _changes(cfg, scaled))
    return scaled


def set_iterations(cfg: CfgNode, iterations: int | None, keep: Sequence[str] = ()) -> None:
    """Train ``cfg`` for so many iterations, with SOLVER.STEPS moved alike; None: as it is.

    So are the iterations without distillation and those of a frozen backbone. A shorter run also has shorter warm-ups,
    so that it does not end before its learning rate has risen.

    Args:
        keep: warm-ups and phases that stay as they are.
    """
    if iterations is None:
        return
    factor = iterations / cfg.SOLVER.MAX_ITER
    cfg.SOLVER.STEPS = tuple(round(step * factor) for step in cfg.SOLVER.STEPS)
    for key in (*(WARMUPS if factor < 1 else ()), *PHASES):
        if key not in keep:
            set_value(cfg, key, _shrink(value_at(cfg, key), 1 / factor))
    cfg.SOLVER.MAX_ITER = iterations


def schedule_overrides(cfg: CfgNode, before: CfgNode | None = None) -> dict[str, dict]:
    """SCHEDULE of a config as a stage of a curriculum overrides it; with ``before`` what differs from that alone."""
    overrides: dict[str, dict] = {}
    for key in SCHEDULE:
        value, (section, name) = value_at(cfg, key), key.split(".")
        if before is None or value != value_at(before, key):
            overrides.setdefault(section, {})[name] = plain(value)
    return overrides


def _changes(before: CfgNode, after: CfgNode) -> str:
    """The scaled keys as ``KEY old -> new, ...``."""
    pairs = [(key, value_at(before, key), value_at(after, key)) for key in SCALED]
    return ", ".join(f"{key} {old} -> {new}" for key, old, new in pairs if old != new)


def _shrink(iterations: int, factor: float) -> int:
    """At least 1, if it was above 0; what is not means never, or none, and stays."""
    return max(round(iterations / factor), 1) if iterations > 0 else iterations
