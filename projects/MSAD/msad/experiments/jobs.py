"""Runs of training that depend on one another, several at a time: each in a process of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from tqdm import tqdm

from .run import check_result, read_result, run_config

SAME_TIME = 0.05  # a smaller difference in time is within what can be measured


class Task(NamedTuple):
    """One run: a "teacher", a "row", or a row whose iterations follow from measured "time"."""

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


class Plan(ABC):
    """What is to be run: where each task lives, what it needs and its config."""

    @abstractmethod
    def folder(self, task: Task) -> Path:
        """Where the task leaves its results."""

    @abstractmethod
    def needs(self, task: Task) -> list[Task]:
        """Tasks that must be finished before this one's config can be made."""

    @abstractmethod
    def config(self, task: Task) -> CfgNode:
        """The frozen config of the task."""

    def result(self, task: Task) -> dict | None:
        """What the finished run left, see :func:`msad.experiments.run.run_config`, or None."""
        return read_result(self.folder(task))

    def error(self, task: Task) -> str | None:
        """Why the run failed when it was last tried, or None."""
        file = self.folder(task) / "failed.txt"
        return file.read_text() if file.is_file() else None


def count_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_opts(devices: Sequence[str]) -> list[str]:
    """KEY VALUE overrides for runs on ``devices``, "cuda:0", ... or "cpu"; none for none."""
    return ["MODEL.DEVICE", "cpu" if list(devices) == ["cpu"] else "cuda"] if devices else []


def make_slots(jobs: int = 1, threads: int = 0, devices: Sequence[str] = ()) -> list[Slot]:
    """A process a GPU of ``devices`` ("cuda:0", ...), or ``jobs`` on the CPU that share its cores.

    Raises:
        ValueError: a device is neither "cpu" nor "cuda:N", or there are no jobs.
    """
    if jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {jobs}")
    if not devices or list(devices) == ["cpu"]:
        return [Slot(number, threads or max(1, count_cores() // jobs)) for number in range(jobs)]
    visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    slots = []
    for number, device in enumerate(devices):
        index = device.removeprefix("cuda:")
        if not index.isdigit() or (visible and int(index) >= len(visible)):
            raise ValueError(f"--devices {device}: expected cuda:0, cuda:1, ... of the GPUs that are visible")
        slots.append(Slot(number, threads, visible[int(index)] if visible else index))
    return slots


def run_tasks(
    plan: Plan, tasks: Sequence[Task], slots: Sequence[Slot], report: Callable[[str], None] = tqdm.write
) -> list[Task]:
    """Run what is not finished, one task a slot at a time; returns the tasks that failed.

    A run that fails is reported, noted in its folder and tried again by the next call; those that need it are not run,
    the others go on. Runs end with this process, however it ends.

    Raises:
        KeyError, ValueError: a config is wrong (found before anything runs), or a folder holds a finished run of
            another one.
    """
    for task in dict.fromkeys(task._replace(seed=tasks[0].seed) for task in tasks if task.kind != "time"):
        plan.config(task)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    lock = context.RLock()
    waiting, running = list(tasks), {}  # process -> (task, slot, start)
    failed: list[Task] = []
    durations = []  # of what was trained here, in seconds
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        while waiting or running:
            busy = {slot for _, slot, _ in running.values()}
            free = [slot for slot in slots if slot not in busy]
            for task in list(waiting):
                needs = plan.needs(task)
                culprit = next((need for need in needs if need in failed), None)
                if culprit is not None:
                    _note(plan, task, f"not run, because what it needs ({culprit}) failed")
                    failed.append(task)
                elif any(need in waiting or need in {t for t, *_ in running.values()} for need in needs):
                    continue
                elif plan.result(task) is not None:
                    _check(plan, task)
                elif not free:
                    continue
                else:
                    slot = free.pop(0)
                    (plan.folder(task) / "failed.txt").unlink(missing_ok=True)
                    process = context.Process(target=_child, args=(plan, task, slot, lock))
                    with _deaf_to_interrupts():
                        process.start()
                    running[process] = (task, slot, time.time())
                waiting.remove(task)
            if running:
                wait([process.sentinel for process in running])
            for process in [p for p in running if not p.is_alive()]:
                process.join()
                task, _, start = running.pop(process)
                durations.append(time.time() - start)
                if plan.result(task) is None:
                    failed.append(task)
                todo = len(waiting) + len(running)
                left = f"; about {_duration(sum(durations) / len(durations) * todo / len(slots))} left" if todo else ""
                report(f"[{len(tasks) - todo}/{len(tasks)}] {task}: {_status(plan, task, process.exitcode)}{left}")
    finally:
        signal.signal(signal.SIGTERM, before)
        with _deaf_to_interrupts():
            for process in running:
                process.terminate()
            for process in running:
                process.join(30)
                process.kill()
    return failed


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Hold Ctrl-C back inside. Processes that are started in it never hear it: their parent does, and ends them."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def run_task(plan: Plan, task: Task, position: int = 0) -> dict:
    """Run ``task`` in this process and return its result; an error is noted in its folder and raised."""
    if plan.result(task) is not None:
        return _check(plan, task)
    folder = plan.folder(task)
    try:
        result = run_config(plan.config(task), task.name, str(task), position=position)
    except Exception as error:
        _note(plan, task, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")
        with open(folder / "log.txt", "a") as file:
            file.write(traceback.format_exc())
        raise
    (folder / "failed.txt").unlink(missing_ok=True)
    return result


def _check(plan: Plan, task: Task) -> dict:
    """The result of a finished task; ValueError if it is that of another config."""
    cfg = plan.config(task)
    if task.kind != "time":
        return check_result(cfg)
    # How many iterations fit into a time moves a little with every run that it is measured in.
    result, wanted = plan.result(task), cfg.SOLVER.MAX_ITER
    if abs(result["iterations"] / wanted - 1) > SAME_TIME:
        raise ValueError(
            f"{cfg.OUTPUT_DIR} was trained for {result['iterations']} iterations, but {wanted} are the same time now; "
            "choose another --output or delete it"
        )
    return result


def _status(plan: Plan, task: Task, exitcode: int) -> str:
    result = plan.result(task)
    if result is not None:
        scores = ", ".join(f"{name} {v['bbox']['AP']:.1f}" for name, v in result["results"].items())
        return f"AP {scores} ({_duration(result['seconds'])})"
    if plan.error(task) is None:
        _note(plan, task, f"its process ended with exit code {exitcode}")
    return f"FAILED: {plan.error(task)}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def _note(plan: Plan, task: Task, error: str) -> None:
    folder = plan.folder(task)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "failed.txt").write_text(error)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _child(plan: Plan, task: Task, slot: Slot, lock: Any) -> None:
    """Run ``task`` in this process; what goes wrong is noted in its folder."""
    signal.signal(signal.SIGTERM, _interrupt)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if slot.gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = slot.gpu
    if slot.threads:
        torch.set_num_threads(slot.threads)
    tqdm.set_lock(lock)
    try:
        run_task(plan, task, slot.number)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception:
        raise SystemExit(1) from None
