"""The rows of a study: which there are, what each one is, and their numbers."""

from __future__ import annotations

import math
import re
import statistics
from dataclasses import dataclass
from typing import NamedTuple


class Kind(NamedTuple):
    """A known row: pattern of its name, short title, and what it is there for."""

    pattern: str
    title: str
    description: str


KINDS = (
    Kind("baseline_H", "full resolution", "Ordinary training and testing at the full resolution H. It is the accuracy "
         "that the low-resolution models are measured against, and the cost that they save."),
    Kind("baseline_L", "half resolution, usual levels", "Ordinary training at half the resolution with the usual "
         "pyramid levels (P3 and up): what one gets by feeding a stock detector smaller images."),
    Kind("baseline_L_multiscale", "half resolution, several training sizes", "As baseline_L, but trained on images of "
         "several sizes. It shows what resolution augmentation gives without any of our method."),
    Kind("baseline_L_shifted", "half resolution, levels one finer", "Ordinary training at half the resolution with "
         "levels one step finer (P2 and up). The head then looks at as many locations as at full resolution, four "
         "times those of baseline_L, and costs accordingly more. It is the student, trained without a teacher."),
    Kind("baseline_L_2x", "finer levels, iterations of both stages", "As baseline_L_shifted, trained for as many "
         "iterations as teacher and student together. It shows what longer training alone gives."),
    Kind("baseline_L_time", "finer levels, time of both stages", "As baseline_L_shifted, trained for as long as "
         "teacher and student together (of the processor's time; on a GPU by the clock). It is the fairest rival: the "
         "same model with the whole budget."),
    Kind("teacher_H", "teacher, full resolution", "The multi-resolution teacher, one network trained on "
         "both resolutions at once, tested at full resolution only."),
    Kind("teacher_L", "teacher, half resolution", "The same teacher, tested at half the resolution only. Its pyramid "
         "is aligned: level P2 of the small image serves as P3."),
    Kind("teacher_fused", "teacher, both fused", "The same teacher, tested on the fusion of both resolutions. These "
         "fused features are what the student imitates; it costs more than the full-resolution model."),
    Kind("student_L_control", "student without distillation", "The student, initialised from the teacher and trained "
         "on the detection loss alone. The difference to student_L is what distillation itself gives."),
    Kind("student_L", "student (MSAD)", "The result: the half-resolution model, initialised from the teacher and "
         "distilled from its fused features. At inference it is a stock detector without the teacher."),
    Kind("student_L_w.*", "student, other weight", "As student_L with another weight of the distillation loss; the "
         "name says which."),
    Kind("student_L_scratch", "student, not initialised", "Distilled like student_L, but not initialised from the "
         "teacher. The difference to student_L is what the initialisation gives."),
    Kind("student_L_normalized", "student, normalised maps", "As student_L, comparing maps that are brought to zero "
         "mean and unit variance."),
    Kind("student_L_p3", "student, finest level", "As student_L, comparing the finest level alone, where small "
         "objects are."),
    Kind("student_L_scratch_control", "student, neither", "The student by itself, neither initialised nor "
         "distilled. The difference of student_L_scratch to it is what distillation alone gives."),
    Kind("student_L_light", "student, light head", "Distilled like student_L, with a smaller head, which is where "
         "most of the computation at half the resolution is."),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One model of a study; numbers that are missing or not finite are None."""

    name: str
    title: str
    description: str
    result: dict
    cost: dict

    def metric(self, name: str, task: str = "bbox") -> float | None:
        """A COCO metric (0-100), e.g. "AP"; mean over the seeds."""
        return _number((self.result.get(task) or {}).get(name))

    @property
    def ap(self) -> float | None:
        return self.metric("AP")

    @property
    def per_seed(self) -> list[float]:
        """AP of every seed, in the study's order of seeds."""
        values = [_number(v) for v in self.result.get("per_seed") or ()]
        return [] if None in values else values

    @property
    def std(self) -> float | None:
        """Standard deviation of the AP over the seeds; None for one seed."""
        given = self.task_std("bbox")
        if given is None and len(self.per_seed) > 1:
            return statistics.stdev(self.per_seed)
        return given

    def task_std(self, task: str) -> float | None:
        """Standard deviation of a task's AP over the seeds."""
        return _number((self.result.get("std") or {}).get(task))

    @property
    def iterations(self) -> float | None:
        return _number(self.result.get("iterations"))

    @property
    def seconds(self) -> float | None:
        """Training time."""
        return _number(self.result.get("seconds"))

    @property
    def cpu_seconds(self) -> float | None:
        """Processor time of training, which other work on the machine does not lengthen much."""
        return _number(self.result.get("cpu_seconds"))

    @property
    def gmacs(self) -> float | None:
        """Of the whole model."""
        return _number((self.cost.get("gmacs") or {}).get("total"))

    @property
    def ms(self) -> float | None:
        """Latency of the whole model."""
        return _number((self.cost.get("ms") or {}).get("total"))


def _number(value) -> float | None:
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def rows_of(metrics: dict) -> list[Row]:
    """The rows that the study has, known ones first in the order of ``KINDS``, others after them as they come."""
    results, costs = metrics.get("results") or {}, metrics.get("cost") or {}
    order: list[tuple[int, str]] = []
    for name in results:
        # An exact name wins over a pattern.
        exact = [i for i, kind in enumerate(KINDS) if kind.pattern == name]
        similar = [i for i, kind in enumerate(KINDS) if re.fullmatch(kind.pattern, name)]
        order.append(((exact or similar or [len(KINDS)])[0], name))
    rows = []
    for position, name in sorted(order, key=lambda item: item[0]):
        kind = KINDS[position] if position < len(KINDS) else Kind(name, "", "")
        rows.append(Row(name, kind.title, kind.description, results[name] or {}, costs.get(name) or {}))
    return rows


def reference_of(rows: list[Row]) -> Row | None:
    """The full-resolution row that shares and ratios refer to: baseline_H, else teacher_H, else none."""
    by_name = {row.name: row for row in rows if row.ap is not None}
    return by_name.get("baseline_H") or by_name.get("teacher_H")
