"""Run training jobs that depend on one another, several at a time, each in a process of its own, or here."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from tqdm import tqdm

from ..evaluation.coco_stats import counted, is_number
from ..files import read_json
from ..finding import error_text
from .run import train_and_evaluate

# What ends one run and leaves the others alone.
FAILURES = (AssertionError, ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError)
COMMAND = (sys.executable, "-m", "msad.experiments.run", "--end-with-stdin")


class Run(NamedTuple):
    """One training run: a variant with a seed."""

    name: str
    seed: int

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"


class Slot(NamedTuple):
    """Where one process runs: its CPU threads (0: torch's choice), and the GPU that it sees ("" for none or all)."""

    threads: int = 0
    gpu: str = ""
    here: bool = False  # no process is started, runs are done in this one


class RunPlan(Protocol):
    """What :func:`run_all` asks about runs."""

    def folder(self, run: Run) -> Path:
        """Where the run leaves its results."""

    def needs(self, run: Run) -> list[Run]:
        """Runs that must be finished before this one can be prepared."""

    def prepare(self, run: Run) -> bool:
        """Make the folder ready for the run's process; False if there is nothing left to do.

        Raises:
            KeyError, ValueError: the run cannot be done.
        """


def count_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def take_devices(devices: Sequence[str]) -> list[str]:
    """KEY VALUE overrides for runs on ``devices``, "cuda:0", ... or "cpu"; none for none.

    This process, which measures, evaluates and draws beside its runs, takes the first GPU of them.
    """
    if not devices:
        return []
    if list(devices) == ["cpu"]:
        return ["MODEL.DEVICE", "cpu"]
    if devices[0].removeprefix("cuda:").isdigit() and torch.cuda.is_available():
        torch.cuda.set_device(devices[0])
    return ["MODEL.DEVICE", "cuda"]


def make_slots(jobs: int = 1, threads: int = 0, devices: Sequence[str] = ()) -> list[Slot]:
    """A process a GPU of ``devices`` ("cuda:0", ...), or ``jobs`` on the CPU that share its cores; 0: here.

    Raises:
        ValueError: a device is neither "cpu" nor "cuda:N", or jobs are negative.
    """
    if jobs < 0:
        raise ValueError(f"--jobs must be at least 0, got {jobs}")
    if jobs == 0:
        return [Slot(threads, here=True)]
    if not devices or list(devices) == ["cpu"]:
        return [Slot(threads or max(1, count_cores() // jobs))] * jobs
    visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    slots = []
    for device in devices:
        index = device.removeprefix("cuda:")
        if not index.isdigit() or (visible and int(index) >= len(visible)):
            raise ValueError(f"--devices {device}: expected cuda:0, cuda:1, ... of the GPUs that are visible")
        slots.append(Slot(threads, visible[int(index)] if visible else index))
    return slots


def error_of(folder: Path) -> str | None:
    """Why the run in ``folder`` failed when it was last tried, or None."""
    file = folder / "failed.txt"
    return file.read_text() if file.is_file() else None


def run_all(
    plan: RunPlan, runs: Sequence[Run], slots: Sequence[Slot], say: Callable[[str], None] = tqdm.write,
    command: Sequence[str] = COMMAND,
) -> list[Run]:  # fmt: skip
    """Run what is not finished, one run a slot at a time; returns the runs that failed.

    A run that fails is reported, noted in its folder and tried again by the next call; those that need it are not run,
    the others go on. Processes end with this one, however it ends.

    Args:
        runs: with all that they need.
        slots: where processes run; one that is here: all runs are done in this process, one after the other.
        say: is told of every run that ends.
        command: of a process, to which the folder and the threads of the run are added; its standard input is closed
            when this process ends.
    """
    if any(slot.here for slot in slots):
        return _run_here(plan, runs, slots[0].threads, say)
    waiting = {run: plan.needs(run) for run in runs}
    running: dict[subprocess.Popen, tuple[Run, Slot, float]] = {}
    failed: list[Run] = []
    free, seconds = list(slots), []

    def launch(run: Run) -> None:
        process = _start(command, plan.folder(run), free[-1])
        running[process] = run, free.pop(), time.time()

    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with tqdm(total=len(runs), unit="run", disable=None) as bar:
            while waiting or running:
                for run, needs in list(waiting.items()):
                    unfinished = waiting.keys() | {other for other, *_ in running.values()}
                    if not set(needs).intersection(failed) and (unfinished.intersection(needs) or not free):
                        continue
                    del waiting[run]
                    if not _begin(plan, run, failed, say, launch):
                        bar.update()
                for process in _wait(running, bar, plan):
                    run, slot, start = running.pop(process)
                    free.append(slot)
                    seconds.append(time.time() - start)
                    folder, todo = plan.folder(run), len(waiting) + len(running)
                    if (folder / "result.json").is_file():
                        status = _scores(read_json(folder / "result.json"))
                    else:
                        failed.append(run)
                        if error_of(folder) is None:
                            _note(folder, f"its process ended with exit code {process.returncode}")
                        status = f"FAILED: {error_of(folder)}"
                    left = format_seconds(sum(seconds) / len(seconds) * todo / len(slots))
                    say(f"[{len(runs) - todo}/{len(runs)}] {run}: {status}{f'; about {left} left' if todo else ''}")
                    bar.update()
    finally:
        signal.signal(signal.SIGTERM, before)
        with _sigint_blocked():
            for process in running:
                process.terminate()
            for process in running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(30)
                process.kill()
    return failed


def _run_here(plan: RunPlan, runs: Sequence[Run], threads: int, say: Callable[[str], None]) -> list[Run]:
    """:func:`run_all` without processes, whose start would take longer than a very short run."""
    if threads:
        torch.set_num_threads(threads)
    failed: list[Run] = []

    def train(run: Run) -> None:
        say(f"[{runs.index(run) + 1}/{len(runs)}] {run}: {_scores(train_and_evaluate(plan.folder(run)))}")

    for run in tqdm(runs, unit="run", disable=None):
        _begin(plan, run, failed, say, train)
    return failed


def _begin(plan: RunPlan, run: Run, failed: list[Run], say: Callable[[str], None], work: Callable[[Run], None]) -> bool:
    """Do ``work`` for a run unless there is nothing left to do or it fails, which is told and noted; whether it did."""
    try:
        if culprit := next((need for need in plan.needs(run) if need in failed), None):
            raise ValueError(f"not run, because what it needs ({culprit}) failed")
        if not plan.prepare(run):
            return False
        work(run)
    except FAILURES as error:
        failed.append(run)
        _note(plan.folder(run), error_text(error))
        say(f"{run}: FAILED: {error_text(error)}")
        return False
    return True


def _start(command: Sequence[str], folder: Path, slot: Slot) -> subprocess.Popen:
    """A process for one run, in a session of its own: Ctrl-C reaches this process alone, which then ends the others."""
    gpu = {"CUDA_VISIBLE_DEVICES": slot.gpu} if slot.gpu else {}
    paths = os.pathsep.join(path for path in sys.path if path)
    with open(folder / "log.txt", "a") as log:
        return subprocess.Popen(
            [*command, str(folder), "--threads", str(slot.threads)], env={**os.environ, **gpu, "PYTHONPATH": paths},
            stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Hold Ctrl-C back inside."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _interrupt(*_) -> None:
    raise KeyboardInterrupt


def _wait(running: dict[subprocess.Popen, tuple], bar: tqdm, plan: RunPlan) -> list[subprocess.Popen]:
    """Processes that have ended, as soon as there are any; shows how far the others are."""
    while running:
        if ended := [process for process in running if process.poll() is not None]:
            return ended
        if not bar.disable:
            clocks = {run: read_json(plan.folder(run) / "clock.json") or {} for run, *_ in running.values()}
            bar.set_postfix_str(", ".join(f"{run} {clock.get('steps', 0)}" for run, clock in clocks.items()))
        time.sleep(0.2)
    return []


def _scores(result: dict) -> str:
    """AP of boxes, masks and keypoints, or mIoU, of every model of a run, and its time."""
    parts = []
    for title, task in (("AP", "bbox"), ("mask AP", "segm"), ("keypoint AP", "keypoints"), ("mIoU", "sem_seg")):
        metric = title.split()[-1]
        found = {name: counted(metrics).get(task, {}) for name, metrics in result["results"].items()}
        scores = [f"{name} {values[metric]:.1f}" for name, values in found.items() if is_number(values.get(metric))]
        parts += [f"{title} {', '.join(scores)}"] if scores else []
    return f"{'; '.join(parts) or 'no score'} ({format_seconds(result['seconds'])})"


def format_seconds(seconds: float) -> str:
    """As "59 s", "7 min" or "2 h 05 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def _note(folder: Path, error: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "failed.txt").write_text(error)
