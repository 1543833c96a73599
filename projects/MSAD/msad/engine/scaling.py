"""One schedule for any batch size."""

from __future__ import annotations

import logging
from functools import reduce
from operator import getitem

from detectron2.config import CfgNode

logger = logging.getLogger(__name__)

# Counts of iterations that shrink when the batch grows; a period of 0 means never and stays.
ITERATIONS = (
    "SOLVER.MAX_ITER",
    "SOLVER.WARMUP_ITERS",
    "SOLVER.CHECKPOINT_PERIOD",
    "DISTILL.WARMUP_ITERS",
    "DISTILL.BALANCE.ITERS",
    "DISTILL.ANALYSIS_PERIOD",
    "TEST.EVAL_PERIOD",
)


def scale_to_batch(cfg: CfgNode) -> CfgNode:
    """Fit the schedule of a config that was written for batches of SOLVER.SCALE_TO_BATCH to its IMS_PER_BATCH.

    The linear rule (Goyal et al., 2017): with k times the images a step, k times the learning rate and 1/k of all
    numbers of iterations, so that as many images are seen. What changed is logged, old -> new.

    Returns:
        ``cfg`` itself if SCALE_TO_BATCH is 0 or equals IMS_PER_BATCH, otherwise a copy whose SCALE_TO_BATCH is its
        IMS_PER_BATCH, so that scaling it again changes nothing.

    Raises:
        ValueError: SCALE_TO_BATCH is negative.
    """
    reference, batch = cfg.SOLVER.SCALE_TO_BATCH, cfg.SOLVER.IMS_PER_BATCH
    if reference < 0:
        raise ValueError(f"SOLVER.SCALE_TO_BATCH is a batch size, or 0 for no scaling; got {reference}")
    if reference in (0, batch):
        return cfg
    factor = batch / reference
    new = {"SOLVER.BASE_LR": cfg.SOLVER.BASE_LR * factor}
    new["SOLVER.STEPS"] = tuple(_shrink(step, factor) for step in cfg.SOLVER.STEPS)
    new.update((key, _shrink(_value(cfg, key), factor)) for key in ITERATIONS)
    changes = [f"{key} {_value(cfg, key)} -> {value}" for key, value in new.items() if value != _value(cfg, key)]
    scaled = cfg.clone()
    scaled.defrost()
    for key, value in [*new.items(), ("SOLVER.SCALE_TO_BATCH", batch)]:
        *sections, name = key.split(".")
        reduce(getitem, sections, scaled)[name] = value
    if cfg.is_frozen():
        scaled.freeze()
    logger.info("Schedule scaled from batches of %d to batches of %d: %s", reference, batch, ", ".join(changes))
    return scaled


def set_iterations(cfg: CfgNode, iterations: int | None) -> None:
    """Train ``cfg`` for so many iterations, with SOLVER.STEPS moved alike; None: as it is."""
    if iterations is not None:
        cfg.SOLVER.STEPS = tuple(round(step * iterations / cfg.SOLVER.MAX_ITER) for step in cfg.SOLVER.STEPS)
        cfg.SOLVER.MAX_ITER = iterations


def _value(cfg: CfgNode, key: str) -> float | tuple[int, ...]:
    return reduce(getitem, key.split("."), cfg)


def _shrink(iterations: int, factor: float) -> int:
    """At least 1, if it was not 0 (never, or none)."""
    return max(round(iterations / factor), 1) if iterations else 0
