"""One table and one curve over the stages of a curriculum, from what each stage has left in its folder."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.utils import comm
from tabulate import tabulate

from ..files import atomic_write
from ..visualization.plots import read_metrics, save_figure
from ..visualization.stages import Stage, stages_figure
from .scaling import scale_to_batch, scale_to_processes

logger = logging.getLogger(__name__)
TABLE, CURVE = "stages.md", "stages.png"


def read_stages(configs: Sequence[CfgNode]) -> list[Stage]:
    """The stages that have begun, with their metrics."""
    stages = []
    for number, written in enumerate(configs, start=1):
        config = scale_to_processes(scale_to_batch(written), comm.get_world_size())  # as its trainer does
        file = Path(config.OUTPUT_DIR) / "metrics.json"
        if file.is_file():
            names = [entry["NAME"] for entry in config.DISTILL.TEACHERS] if config.DISTILL.LOSSES else []
            stages.append(Stage(number, ", ".join(names) or "no teacher", config.SOLVER.MAX_ITER, read_metrics(file)))
    return stages


def stage_table(stages: Sequence[Stage]) -> str:
    """A Markdown table with a row a stage: teachers, iterations, AP (or mIoU) of each task and losses at its end."""
    tasks = dict.fromkeys(key for stage in stages for key in stage.scores())
    rows = []
    for stage in stages:
        scores = stage.scores()
        losses = (stage.training_loss()[1], stage.validation_loss()[1])
        last = [float(values[-1]) if len(values) else math.nan for values in losses]
        rows.append([stage.number, stage.teachers, stage.iterations, *(scores.get(task) for task in tasks), *last])
    header = ["stage", "teachers", "iterations", *tasks, "training L_detect", "validation L_detect"]
    cells = [[None if isinstance(cell, float) and math.isnan(cell) else cell for cell in row] for row in rows]
    digits = ("", "", "", *[".2f"] * len(tasks), ".4f", ".4f")
    return tabulate(cells, header, tablefmt="github", floatfmt=digits, missingval="-")


def write_summary(folder: str, configs: Sequence[CfgNode]) -> None:
    """Write ``folder``/stages.md and, where there is a curve, stages.png, and log the table.

    Args:
        configs: of all stages, see :func:`msad.engine.stages.stage_configs`.
    """
    stages = read_stages(configs)
    if not stages:
        return
    table = stage_table(stages)
    with atomic_write(Path(folder) / TABLE, "w") as file:
        file.write(f"{table}\n")
    save_figure(stages_figure(stages), Path(folder) / CURVE)
    logger.info("Stages so far, also in %s with %s:\n%s", Path(folder) / TABLE, CURVE, table)
