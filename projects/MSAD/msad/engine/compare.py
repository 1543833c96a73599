"""Yaml files compared on equal terms: every file with every seed, in processes of their own, from shared teachers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from tqdm import tqdm

from ..config import load_config
from .runs import read_result, run_config
from .scaling import scale_to_batch

SAME_TIME = 0.05  # a smaller difference in time is within what can be measured, and is not trained for anew


class Task(NamedTuple):
    """One run: a teacher, a row at equal iterations, or ("time") at the time that the reference took."""

    kind: str
    name: str
    seed: int

    def __str__(self) -> str:
        return f"{self.name}{' at equal time' if self.kind == 'time' else ''}, seed {self.seed}"


class Slot(NamedTuple):
    """Where one process runs: its number, CPU threads, and the GPU that it sees ("" for none or all)."""

    number: int
    threads: int = 0
    gpu: str = ""


@dataclass
class Comparison:
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

    def __post_init__(self) -> None:
        self.reference = self.reference or next(iter(self.files))
        if self.reference not in self.files:
            raise ValueError(f"--reference {self.reference} is none of the rows {', '.join(self.files)}")
        needs = {name: [_key(e) for e in self._load(f).DISTILL.TEACHERS] for name, f in self.files.items()}
        paths = [] if self.teacher_weights else dict.fromkeys(path for files in needs.values() for path in files)
        self.teachers = unique_names(list(paths))
        by_path = {path: name for name, path in self.teachers.items()}
        self.needs = {name: [by_path[p] for p in files if p in by_path] for name, files in needs.items()}

    def _load(self, file: Path) -> CfgNode:
        return scale_to_batch(load_config(file, self.opts))

    def folder(self, task: Task) -> Path:
        name = {"teacher": f"teachers/{task.name}", "time": f"{task.name}@time"}.get(task.kind, task.name)
        return self.output / f"seed{task.seed}" / name

    def result(self, task: Task) -> dict | None:
        return read_result(self.folder(task))

    def error(self, task: Task) -> str | None:
        """Why the run failed when it was last tried, or None."""
        file = self.folder(task) / "failed.txt"
        return file.read_text() if file.is_file() else None

    def config(self, task: Task) -> CfgNode:
        """The frozen config of a run; one of equal time needs the finished runs of equal iterations."""
        teacher = task.kind == "teacher"
        cfg = self._load(self.teachers[task.name] if teacher else self.files[task.name])
        cfg.merge_from_list(["SEED", task.seed, "OUTPUT_DIR", str(self.folder(task))])
        _set_iterations(cfg, self.teacher_iterations if teacher else self.iterations)
        if task.kind == "time":
            _set_iterations(cfg, self.iterations_in_time(task.name))
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

    def step_seconds(self, name: str) -> float | None:
        """Mean over the seeds of what a step took in training: of the processors' time, on a GPU of the clock's."""
        clock = "cpu_seconds" if self._load(self.files[name]).MODEL.DEVICE == "cpu" else "seconds"
        runs = [r for r in self.results("row", name).values() if r["steps"]]
        return sum(r[clock] / r["steps"] for r in runs) / len(runs) if runs else None

    def iterations_in_time(self, name: str) -> int | None:
        """How many iterations of a row take the time of the reference; None if that is not known yet."""
        own, reference = self.step_seconds(name), self.step_seconds(self.reference)
        if not own or not reference:
            return None
        return max(1, round(reference * self._iterations(self.reference) / own))

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
        """Rows whose runs of equal iterations took another time than the reference's."""
        if not self.equal_time:
            return []
        counts = {name: self.iterations_in_time(name) for name in self.files}
        return [
            Task("time", name, seed)
            for seed in self.seeds
            for name, count in counts.items()
            if count is not None and abs(count / self._iterations(name) - 1) > SAME_TIME
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


def _set_iterations(cfg: CfgNode, iterations: int | None) -> None:
    if iterations is None:
        return
    cfg.SOLVER.STEPS = tuple(round(step * iterations / cfg.SOLVER.MAX_ITER) for step in cfg.SOLVER.STEPS)
    cfg.SOLVER.MAX_ITER = iterations


def make_slots(jobs: int = 1, threads: int = 0, devices: Sequence[str] = ()) -> list[Slot]:
    """A process a GPU of ``devices`` ("cuda:0", ...), or ``jobs`` on the CPU that share its cores.

    Raises:
        ValueError: a device is neither "cpu" nor "cuda:N".
    """
    if not devices or list(devices) == ["cpu"]:
        return [Slot(number, threads or max(1, (os.cpu_count() or 1) // jobs)) for number in range(jobs)]
    visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    slots = []
    for number, device in enumerate(devices):
        index = device.removeprefix("cuda:")
        if not index.isdigit() or (visible and int(index) >= len(visible)):
            raise ValueError(f"--devices {device}: expected cuda:0, cuda:1, ... of the GPUs that are visible")
        slots.append(Slot(number, threads, visible[int(index)] if visible else index))
    return slots


def run(comparison: Comparison, slots: Sequence[Slot], report: Callable[[str], None] = tqdm.write) -> list[Task]:
    """Run all that is not finished, one task a slot at a time; returns the tasks without a result.

    A run that fails is reported, noted in its folder and tried again by the next call; the others go on.
    """
    tasks = comparison.tasks()
    _run_tasks(comparison, tasks, slots, report)
    timed = comparison.time_tasks()
    _run_tasks(comparison, timed, slots, report)
    return [task for task in [*tasks, *timed] if comparison.result(task) is None]


def _run_tasks(comparison: Comparison, tasks: list[Task], slots: Sequence[Slot], report: Callable[[str], None]) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    lock = context.RLock()
    waiting, running = list(tasks), {}  # process -> (task, slot, start)
    failed: set[Task] = set()
    durations = []  # of what was trained here, in seconds
    try:
        while waiting or running:
            free = [slot for slot in slots if slot not in {slot for _, slot, _ in running.values()}]
            for task in list(waiting):
                needs = [Task("teacher", name, task.seed) for name in comparison.needs.get(task.name, ())]
                needs = [] if task.kind == "teacher" else needs
                if any(need in failed for need in needs):
                    _note(comparison, task, f"not run, because its teacher ({needs[0]}) failed")
                    failed.add(task)
                elif not free:
                    break
                elif any(need in waiting or need in {t for t, *_ in running.values()} for need in needs):
                    continue
                else:
                    slot = free.pop(0)
                    process = context.Process(target=_child, args=(comparison, task, slot, lock))
                    process.start()
                    running[process] = (task, slot, time.time() if comparison.result(task) is None else None)
                waiting.remove(task)
            wait([process.sentinel for process in running])
            for process in [p for p in running if not p.is_alive()]:
                process.join()
                task, _, start = running.pop(process)
                if start is not None:
                    durations.append(time.time() - start)
                status = _status(comparison, task, process.exitcode)
                if comparison.result(task) is None:
                    failed.add(task)
                todo = len(waiting) + len(running)
                left = ""
                if todo and durations:
                    left = f"; about {_duration(sum(durations) / len(durations) * todo / len(slots))} left"
                report(f"[{len(tasks) - todo}/{len(tasks)}] {task}: {status}{left}")
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.join(30)
            process.kill()


def _status(comparison: Comparison, task: Task, exitcode: int) -> str:
    result = comparison.result(task)
    if result is not None:
        scores = ", ".join(f"{name} {v['bbox']['AP']:.1f}" for name, v in result["results"].items())
        return f"AP {scores} ({_duration(result['seconds'])})"
    if comparison.error(task) is None:
        _note(comparison, task, f"its process ended with exit code {exitcode}")
    return f"FAILED: {comparison.error(task)}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def _note(comparison: Comparison, task: Task, error: str) -> None:
    folder = comparison.folder(task)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "failed.txt").write_text(error)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _child(comparison: Comparison, task: Task, slot: Slot, lock: Any) -> None:
    """Run ``task`` in this process; what goes wrong is noted in its folder."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C, and ends its children as below
    signal.signal(signal.SIGTERM, _interrupt)
    if slot.gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = slot.gpu
    if slot.threads:
        torch.set_num_threads(slot.threads)
    tqdm.set_lock(lock)
    try:
        run_task(comparison, task, slot.number)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception:
        raise SystemExit(1) from None


def run_task(comparison: Comparison, task: Task, position: int = 0) -> dict:
    """Run ``task`` in this process; an error is noted in its folder and raised."""
    folder = comparison.folder(task)
    try:
        result = run_config(comparison.config(task), task.name, str(task), same=task.kind != "time", position=position)
    except Exception as error:
        _note(comparison, task, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")
        with open(folder / "log.txt", "a") as file:
            file.write(traceback.format_exc())
        raise
    (folder / "failed.txt").unlink(missing_ok=True)
    return result


def collect(comparison: Comparison) -> dict:
    """All that is known, as plain data for :mod:`msad.report.comparison`.

    {"seeds", "reference", "rows": {row: config file}, "runs": [{"kind", "row", "seed", "iterations", "seconds",
    "cpu_seconds", "steps", "results": {name: {task: {metric: value}}}} or {..., "error"}]}. A row whose time is the
    reference's has its runs of equal iterations as those of equal time too.
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
        "rows": {name: str(file) for name, file in comparison.files.items()},
        "runs": runs,
    }
