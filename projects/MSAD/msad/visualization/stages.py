"""A student over the stages of a curriculum: validation AP or mIoU and detection loss alone, as figure 5 of MTPD."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .colours import GREY, PALETTE
from .plots import STYLE, loss_curve, smooth

L_DETECT = "validation/L_detect"
SCORES = ("/AP", "/mIoU")


@dataclass(frozen=True)
class Stage:
    """What is known of one stage.

    Attributes:
        number: from 1.
        teachers: for people.
        iterations: SOLVER.MAX_ITER.
        records: of :func:`msad.visualization.plots.read_metrics`.
    """

    number: int
    teachers: str
    iterations: int
    records: list[dict]

    def scores(self) -> dict[str, float]:
        """The last value of every "TASK/AP", "sem_seg/mIoU" (of several test sets "SET/TASK/AP")."""
        found = {key: value for record in self.records for key, value in record.items() if key.endswith(SCORES)}
        return {key: value for key, value in found.items() if math.isfinite(value)}

    def curve(self, ending: str | tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        """(iterations of this stage, values), both (n,), of the first metric with this ending.

        An evaluation at the end of training, which is logged one iteration later, counts for the last iteration.
        """
        name = next((key for record in self.records for key in record if key.endswith(ending)), None)
        points = [(min(r["iteration"] + 1, self.iterations), r[name]) for r in self.records if name in r]
        return tuple(np.array([p for p in points if math.isfinite(p[1])], float).reshape(-1, 2).T)

    def training_loss(self) -> tuple[np.ndarray, np.ndarray]:
        """(iterations, detection losses in training), both (n,), smoothed; without distillation losses."""
        iterations, values = loss_curve(self.records)
        return iterations, smooth(values) if len(values) else values

    def validation_loss(self) -> tuple[np.ndarray, np.ndarray]:
        """(iterations, detection losses on the test set), both (n,); empty without TEST.LOSS_IMAGES."""
        return self.curve(L_DETECT)


def stages_figure(stages: Sequence[Stage]) -> Figure:
    """Validation AP or mIoU, and below it the detection loss in training and in validation, a colour a stage."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 5.6), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        start = 0
        for i, stage in enumerate(stages):
            colour = PALETTE[i % len(PALETTE)]
            x, y = stage.curve(SCORES)
            above.plot(start + x, y, marker="o", markersize=4, color=colour, label=f"{stage.number}: {stage.teachers}")
            x, y = stage.training_loss()
            below.plot(start + x, y, color=colour, linewidth=1.4, label="training" if i == 0 else None)
            x, y = stage.validation_loss()
            below.plot(start + x, y, color=colour, linestyle="--", marker="o", markersize=4,
                       label="validation" if i == 0 and len(x) else None)  # fmt: skip
            start += stage.iterations
            for panel in (above, below) if stage is not stages[-1] else ():
                panel.axvline(start, color=GREY, linewidth=0.8, linestyle=":")
        above.set_ylabel(f"validation {next((key for stage in stages for key in stage.scores()), 'AP')}")
        below.set_ylabel("detection loss")
        below.set_xlabel("iteration, over all stages")
        below.set_xlim(left=0)
        below.legend(fontsize=9)
        figure.legend(*above.get_legend_handles_labels(), loc="outside upper right", ncols=max(len(stages), 1))
    return figure
