"""A study: every row of a comparison trained and evaluated under equal terms, over several seeds.

A folder of yaml files describes the models (baseline_H.yaml, teacher.yaml, student_L.yaml, ...); ROWS says which rows
of the table are trained from which file, under which control. Finished rows are kept, an interrupted row resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from tqdm import tqdm

from ..config import load_config
from ..engine.scaling import scale_to_batch, set_iterations
from .jobs import Plan, Slot, Task, run_tasks


@dataclass(frozen=True)
class Row:
    """One training run of the comparison.

    Attributes:
        config: yaml file in the study's folder.
        opts: overrides of it.
        needs: rows that must be finished first.
        budget: "same" iterations as in the yaml; "iterations" or "seconds" (of the processor where there is no GPU):
            as many as teacher and student together.
    """

    config: str
    opts: tuple = ()
    needs: tuple[str, ...] = ()
    budget: str = "same"


def _loss(weight: float = 0.3, **options: Any) -> tuple:
    """The paper's loss with other options."""
    return "DISTILL.LOSSES", [{"NAME": "AlignedL1", "WEIGHT": weight, **options}]


def _constant_weight(value: float) -> tuple:
    """The paper's loss at a fixed weight to the end of training."""
    return *_loss(value), "DISTILL.DECAY_FROM", 1.0, "DISTILL.DECAY_TO", 1.0


_STUDENT = ("teacher",)
_SCRATCH = ("DISTILL.INIT_STUDENT", "none")
ROWS: dict[str, Row] = {
    "baseline_H": Row("baseline_H.yaml"),
    "baseline_L": Row("baseline_L.yaml"),
    "baseline_L_multiscale": Row("baseline_L_multiscale.yaml"),
    "baseline_L_shifted": Row("baseline_L_shifted.yaml"),
    "teacher": Row("teacher.yaml"),
    "student_L_control": Row("student_L.yaml", ("DISTILL.LOSSES", []), _STUDENT),
    "student_L": Row("student_L.yaml", (), _STUDENT),
    "student_L_w0.6": Row("student_L.yaml", _constant_weight(0.6), _STUDENT),
    "student_L_w2": Row("student_L.yaml", _constant_weight(2.0), _STUDENT),
    "student_L_normalized": Row("student_L.yaml", _loss(NORMALIZE=True), _STUDENT),
    "student_L_p3": Row("student_L.yaml", _loss(LEVELS=["p3"]), _STUDENT),
    "student_L_scratch": Row("student_L.yaml", _SCRATCH, _STUDENT),
    "student_L_scratch_control": Row("student_L.yaml", ("DISTILL.LOSSES", [], *_SCRATCH), _STUDENT),
    "student_L_light": Row("student_L_light.yaml", (), _STUDENT),
    "baseline_L_2x": Row("baseline_L_shifted.yaml", (), (), "iterations"),
    "baseline_L_time": Row("baseline_L_shifted.yaml", (), ("teacher", "student_L", "baseline_L_shifted"), "seconds"),
}


@dataclass
class Study(Plan):
    """Where a study lives and what it runs.

    Attributes:
        configs: folder of the yaml files.
        output: results; one folder a seed, one below it a row.
        opts: overrides for every row, e.g. of the data set.
        seeds: SOLVER seeds; every row runs once with each.
        rows: names in ROWS.
        short_side: of H in pixels; scales all input sizes of the yaml files alike. None: as they are.
        iterations: of every stage. None: as the yaml files say.
    """

    configs: Path
    output: Path
    opts: list = field(default_factory=list)
    seeds: tuple[int, ...] = (0,)
    rows: tuple[str, ...] = tuple(ROWS)
    short_side: int | None = None
    iterations: int | None = None

    def task(self, name: str, seed: int) -> Task:
        return Task("time" if ROWS[name].budget == "seconds" else "row", name, seed)

    def tasks(self) -> list[Task]:
        """All rows of all seeds."""
        return [self.task(name, seed) for seed in self.seeds for name in self.ordered()]

    def needs(self, task: Task) -> list[Task]:
        return [self.task(name, task.seed) for name in ROWS[task.name].needs]

    def config(self, task: Task) -> CfgNode:
        """The frozen config of a row; budgets that depend on other rows are read from their results."""
        name, seed = task.name, task.seed
        row = ROWS[name]
        own = ["SEED", seed, "OUTPUT_DIR", str(self.folder(task))]
        cfg = load_config(self.configs / row.config, [*self.opts, *row.opts, *own])
        cfg = scale_to_batch(cfg)  # here, so that budgets count the iterations that are run
        set_iterations(cfg, self.iterations)
        if self.short_side:
            _scale_inputs(cfg, self.short_side / load_config(self.configs / "Base.yaml").INPUT.MIN_SIZE_TEST)
        if cfg.DISTILL.TEACHERS:
            teacher = self.folder(self.task("teacher", seed))
            cfg.DISTILL.TEACHERS = [
                {"CONFIG": str(teacher / "config.yaml"), "WEIGHTS": str(teacher / "model_final.pth")}
            ]
        stages = [self.task(stage, seed) for stage in ("teacher", "student_L")]
        if row.budget == "iterations":
            set_iterations(cfg, sum(self.config(stage).SOLVER.MAX_ITER for stage in stages))
        elif row.budget == "seconds":
            clock = "cpu_seconds" if cfg.MODEL.DEVICE == "cpu" else "seconds"
            step = {name: _step_seconds(self.result(self.task(name, seed)), clock) for name in row.needs}
            seconds = sum(self.config(stage).SOLVER.MAX_ITER * step[stage.name] for stage in stages)
            set_iterations(cfg, round(seconds / step["baseline_L_shifted"]))
        cfg.freeze()
        return cfg

    def folder(self, task: Task) -> Path:
        return self.output / f"seed{task.seed}" / task.name

    def complete(self) -> list[str]:
        """Rows that are finished with every seed."""
        return [n for n in self.ordered() if all(self.result(self.task(n, seed)) is not None for seed in self.seeds)]

    def ordered(self) -> list[str]:
        """Rows in an order in which nothing waits for a later one, including what they need."""
        out: list[str] = []

        def add(name: str) -> None:
            if name not in ROWS:
                raise ValueError(f"unknown row {name!r}; known: {', '.join(ROWS)}")
            for needed in ROWS[name].needs:
                add(needed)
            if name not in out:
                out.append(name)

        for name in self.rows:
            add(name)
        return out


def _step_seconds(result: dict, clock: str) -> float:
    """Steps that an interruption cost were done twice, and so count twice on both sides."""
    return result[clock] / result["steps"]


def _scale_inputs(cfg: CfgNode, factor: float) -> None:
    sizes = cfg.INPUT
    sizes.MIN_SIZE_TRAIN = tuple(round(size * factor) for size in sizes.MIN_SIZE_TRAIN)
    for key in ("MAX_SIZE_TRAIN", "MIN_SIZE_TEST", "MAX_SIZE_TEST"):
        sizes[key] = round(sizes[key] * factor)


def run(study: Study, slots: Sequence[Slot], report: Callable[[str], None] = tqdm.write) -> list[Task]:
    """Run all rows for all seeds, see :func:`msad.experiments.jobs.run_tasks`; returns the tasks that failed."""
    return run_tasks(study, study.tasks(), slots, report)


def collect(study: Study) -> dict[str, dict]:
    """Means over the seeds, for rows that are finished with all: row -> {task: {metric: mean}, "std", "per_seed", ...}.

    "std" is the sample standard deviation of each task's AP, task -> value (absent for a single seed), "per_seed" the
    box AP of every seed.
    """
    table: dict[str, dict] = {}
    for name in study.complete():
        runs = [study.result(study.task(name, seed)) for seed in study.seeds]
        for evaluated in runs[0]["results"]:
            per_seed = [r["results"][evaluated] for r in runs]
            entry: dict = {
                task: {metric: float(np.mean([p[task][metric] for p in per_seed])) for metric in values}
                for task, values in per_seed[0].items()
            }
            entry["per_seed"] = [p["bbox"]["AP"] for p in per_seed]
            if len(runs) > 1:
                entry["std"] = {t: float(np.std([p[t]["AP"] for p in per_seed], ddof=1)) for t in per_seed[0]}
            for clock in ("seconds", "cpu_seconds"):
                entry[clock] = round(float(np.mean([r[clock] for r in runs])), 1)
            entry["iterations"] = int(np.mean([r["iterations"] for r in runs]))
            table[evaluated] = entry
    return table
