"""Yaml files compared on equal terms: every file with every seed, in processes of their own, from shared teachers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from detectron2.config import CfgNode
from tqdm import tqdm

from ..config import load_config
from ..distill.losses.registry import lower_keys
from ..engine.scaling import scale_to_batch, set_iterations
from .jobs import SAME_TIME, Plan, Slot, Task, run_tasks


@dataclass
class Comparison(Plan):
    """What is compared, and where the runs live: OUTPUT/seed0/{row, row@time, teachers/name}.

    Attributes:
        files: row -> yaml file.
        output: folder of the results.
        opts: KEY VALUE overrides of every row and teacher.
        seeds: every row and teacher runs once with each.
        iterations: of every row, with SOLVER.STEPS scaled alike; None: as its yaml says.
        teacher_iterations: the same of every teacher.
        teacher_weights: checkpoint that takes the place of training a teacher; "{seed}" in it becomes the seed.
        reference: row to which differences and times refer.
        equal_time: every row also runs for the time of the reference.
        count_teachers: that time includes the training of the teachers that a row names.
    """

    files: dict[str, Path]
    output: Path
    opts: list = field(default_factory=list)
    seeds: tuple[int, ...] = (0,)
    iterations: int | None = None
    teacher_iterations: int | None = None
    teacher_weights: str = ""
    reference: str = ""
    equal_time: bool = False
    count_teachers: bool = False

    def __post_init__(self) -> None:
        if self.count_teachers and self.teacher_weights:
            raise ValueError("--count-teachers: what the teacher of --teacher-weights took to train is not known")
        self.reference = self.reference or next(iter(self.files))
        if self.reference not in self.files:
            raise ValueError(f"--reference {self.reference} is none of the rows {', '.join(self.files)}")
        configs = {name: self._load(file) for name, file in self.files.items()}
        used = {name: [_key(e) for e in cfg.DISTILL.TEACHERS] for name, cfg in configs.items()}
        paths = [] if self.teacher_weights else dict.fromkeys(path for files in used.values() for path in files)
        self.teachers = unique_names(list(paths))
        self.losses = {name: [lower_keys(e) for e in cfg.DISTILL.LOSSES] for name, cfg in configs.items()}
        by_path = {path: name for name, path in self.teachers.items()}
        self.row_teachers = {name: [by_path[p] for p in files if p in by_path] for name, files in used.items()}

    def _load(self, file: Path) -> CfgNode:
        return scale_to_batch(load_config(file, self.opts))

    def folder(self, task: Task) -> Path:
        name = {"teacher": f"teachers/{task.name}", "time": f"{task.name}@time"}.get(task.kind, task.name)
        return self.output / f"seed{task.seed}" / name

    def needs(self, task: Task) -> list[Task]:
        if task.kind == "teacher":
            return []
        return [Task("teacher", name, task.seed) for name in self.row_teachers[task.name]]

    def config(self, task: Task) -> CfgNode:
        """The frozen config of a run; one of equal time needs the finished runs of equal iterations."""
        teacher = task.kind == "teacher"
        cfg = self._load(self.teachers[task.name] if teacher else self.files[task.name])
        cfg.merge_from_list(["SEED", task.seed, "OUTPUT_DIR", str(self.folder(task))])
        set_iterations(cfg, self.teacher_iterations if teacher else self.iterations)
        if task.kind == "time":
            set_iterations(cfg, self.iterations_in_time(task.name))
        if not teacher:
            cfg.DISTILL.TEACHERS = [self._teacher(dict(e), task.seed) for e in cfg.DISTILL.TEACHERS]
        cfg.freeze()
        return cfg

    def _teacher(self, entry: dict, seed: int) -> dict:
        if self.teacher_weights:
            return dict(entry, WEIGHTS=self.teacher_weights.replace("{seed}", str(seed)))
        name = next(name for name, path in self.teachers.items() if path == _key(entry))
        folder = self.folder(Task("teacher", name, seed))
        return dict(entry, CONFIG=str(folder / "config.yaml"), WEIGHTS=str(folder / "model_final.pth"))

    def results(self, kind: str, name: str) -> dict[int, dict]:
        """seed -> result of the runs that are finished."""
        found = {seed: self.result(Task(kind, name, seed)) for seed in self.seeds}
        return {seed: result for seed, result in found.items() if result is not None}

    def step_seconds(self, kind: str, name: str) -> float | None:
        """Mean over the seeds of what a step took in training: of the processors' time, on a GPU of the clock's."""
        file = self.teachers[name] if kind == "teacher" else self.files[name]
        clock = "cpu_seconds" if self._load(file).MODEL.DEVICE == "cpu" else "seconds"
        runs = [r for r in self.results(kind, name).values() if r["steps"]]
        return sum(r[clock] / r["steps"] for r in runs) / len(runs) if runs else None

    def _teacher_seconds(self, row: str) -> float | None:
        """Mean over the seeds of the training time of a row's teachers, as far as it counts."""
        total = 0.0
        for name in self.row_teachers[row] if self.count_teachers else []:
            step, runs = self.step_seconds("teacher", name), self.results("teacher", name)
            if step is None:
                return None
            total += step * next(iter(runs.values()))["iterations"]
        return total

    def iterations_in_time(self, name: str) -> int | None:
        """How many iterations of a row take the time of the reference; None if that is not known yet.

        Raises:
            ValueError: the row's teachers alone take longer.
        """
        own, reference = self.step_seconds("row", name), self.step_seconds("row", self.reference)
        before, given = self._teacher_seconds(name), self._teacher_seconds(self.reference)
        if not own or not reference or before is None or given is None:
            return None
        left = given + reference * self._iterations(self.reference) - before
        if left <= 0:
            raise ValueError(f"--count-teachers: {name}'s teachers take longer than {self.reference} with its own")
        return max(1, round(left / own))

    def _iterations(self, name: str) -> int:
        return self.iterations or self._load(self.files[name]).SOLVER.MAX_ITER

    def tasks(self) -> list[Task]:
        """Teachers and rows, seed by seed, each after what it needs."""
        out = []
        for seed in self.seeds:
            out += [Task("teacher", name, seed) for name in self.teachers]
            out += [Task("row", name, seed) for name in self.files]
        return out

    def time_tasks(self) -> list[Task]:
        """Finished rows whose runs of equal iterations took another time than the reference's."""
        if not self.equal_time:
            return []
        counts = {name: self.iterations_in_time(name) for name in self.files}
        return [
            Task("time", name, seed)
            for seed in self.seeds
            for name, count in counts.items()
            if count is not None and abs(count / self._iterations(name) - 1) > SAME_TIME
            if self.result(Task("row", name, seed)) is not None
        ]


def _key(entry: dict) -> Path:
    return Path(entry.get("CONFIG", "")).resolve()


def unique_names(files: Sequence[Path]) -> dict[str, Path]:
    """name -> file: names without their ending, with the folder's where several files are called the same.

    Raises:
        ValueError: a file is named twice, or that is not enough to tell two apart.
    """
    stems = [file.stem for file in files]
    names = [stem if stems.count(stem) == 1 else f"{f.resolve().parent.name}_{stem}" for f, stem in zip(files, stems)]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"several files are called {name}: {', '.join(str(f) for f in files if f.stem in name)}")
    return dict(zip(names, files))


def run(comparison: Comparison, slots: Sequence[Slot], report: Callable[[str], None] = tqdm.write) -> list[Task]:
    """Run all that is not finished, see :func:`msad.experiments.jobs.run_tasks`; returns the tasks that failed."""
    failed = run_tasks(comparison, comparison.tasks(), slots, report)
    return failed + run_tasks(comparison, comparison.time_tasks(), slots, report)


def collect(comparison: Comparison) -> dict:
    """All that is known, as plain data for :mod:`msad.experiments.report.comparison`.

    {"seeds", "reference", "count_teachers", "rows": {row: config file}, "losses": {row: [entry of DISTILL.LOSSES]},
    "runs": [{"kind", "row", "seed", "iterations", "seconds", "cpu_seconds", "steps",
    "results": {name: {task: {metric: value}}}} or {..., "error"}]}. A row whose time is the reference's has its runs of
    equal iterations as those of equal time too.
    """
    tasks, timed = comparison.tasks(), comparison.time_tasks()
    runs = []
    for task in [*tasks, *timed]:
        result, error = comparison.result(task), comparison.error(task)
        entry = {"kind": task.kind, "row": task.name, "seed": task.seed}
        if result is not None:
            runs.append({**entry, **{k: v for k, v in result.items() if k != "fingerprint"}})
        elif error is not None:
            runs.append({**entry, "error": error})
    if comparison.equal_time:
        others = {task.name for task in timed}
        same = [r for r in runs if r["kind"] == "row" and r["row"] not in others and "results" in r]
        runs += [dict(r, kind="time") for r in same if comparison.iterations_in_time(r["row"]) is not None]
    return {
        "seeds": list(comparison.seeds),
        "reference": comparison.reference,
        "count_teachers": comparison.count_teachers,
        "rows": {name: str(file) for name, file in comparison.files.items()},
        "losses": comparison.losses,
        "runs": runs,
    }
