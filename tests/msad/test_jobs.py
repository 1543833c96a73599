"""Runs in processes of their own: crashes, interruptions, order. The processes do what a file in their folder says."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from msad.experiments import jobs
from msad.experiments.jobs import Run, Slot, error_of, make_slots, run_all, take_devices

CHILD = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
what = (folder / "what").read_text()
if what == "watch":
    from msad.experiments.run import end_with_parent
    end_with_parent()
(folder / "pid.part").write_text(str(os.getpid()))
os.replace(folder / "pid.part", folder / "pid")
if what == "crash":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "fail":
    (folder / "failed.txt").write_text("KeyError: 'no such thing'")
    sys.exit(1)
if what in ("sleep", "watch"):
    time.sleep(3600)
(folder / "result.json").write_text(json.dumps({"seconds": 1.0, "results": {folder.name: {"bbox": {"AP": 12.34}}}}))
"""
FIRST, SECOND, THIRD = (Run(name, 0) for name in ("first", "second", "third"))


class Script:
    """A plan of runs that do ``what``; the second needs the first."""

    def __init__(self, root: Path, **what: str) -> None:
        self.root, self.what, self.prepared = root, what, []
        (root / "child.py").write_text(CHILD)
        self.command = [sys.executable, str(root / "child.py")]

    def folder(self, run):
        return self.root / run.name

    def needs(self, run):
        return [FIRST] if run == SECOND else []

    def prepare(self, run):
        self.prepared.append(run)
        if self.what[run.name] == "wrong":
            raise ValueError(f"{run.name} is wrong")
        if self.what[run.name] == "mistyped":
            raise TypeError(f"{run.name} is no number")
        if self.what[run.name] == "homeless":  # its process cannot be started
            return True
        self.folder(run).mkdir(exist_ok=True)
        (self.folder(run) / "failed.txt").unlink(missing_ok=True)
        (self.folder(run) / "what").write_text(self.what[run.name])
        return self.what[run.name] != "finished"


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has waited for does not."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


def test_a_failure_stays_alone_and_a_crash_is_not_taken_for_an_earlier_error(tmp_path):
    lines = []
    plan = Script(tmp_path, first="fail", second="work", third="work")
    assert run_all(plan, [FIRST, SECOND, THIRD], [Slot(1)], lines.append, plan.command) == [FIRST, SECOND]
    assert error_of(tmp_path / "second") == "not run, because what it needs (first, seed 0) failed"
    assert any("first, seed 0: FAILED: KeyError: 'no such thing'" in line for line in lines)
    assert any(line.startswith("[3/3] third, seed 0: AP third 12.3") for line in lines)
    plan = Script(tmp_path, first="crash", second="work", third="wrong")
    failed = run_all(plan, [FIRST, SECOND, THIRD], [Slot(1)] * 2, lines.append, plan.command)
    assert set(failed) == {FIRST, SECOND, THIRD}
    assert error_of(tmp_path / "first") == "its process ended with exit code -9"
    assert error_of(tmp_path / "third") == "third is wrong" and not (tmp_path / "second/pid").exists()


def test_a_run_that_cannot_start_gives_its_slot_back(tmp_path):
    plan = Script(tmp_path, first="homeless", second="mistyped", third="work")
    plan.needs = lambda run: []
    assert run_all(plan, [FIRST, SECOND, THIRD], [Slot(1)], lambda _: None, plan.command) == [FIRST, SECOND]
    assert "log.txt" in error_of(tmp_path / "first") and error_of(tmp_path / "second") == "second is no number"
    assert (tmp_path / "third/result.json").exists()


def test_a_run_is_reported_by_its_scores():
    results = {"teacher_H": {"bbox": {"AP": 40.12}}, "teacher_L": {"bbox": {"AP": 30.0}, "segm": {"AP": 25.0}}}
    said = "AP teacher_H 40.1, teacher_L 30.0; mask AP teacher_L 25.0 (90 s)"
    assert jobs._scores({"seconds": 90.0, "results": results}) == said
    assert jobs._scores({"seconds": 1.0, "results": {"x": {"sem_seg": {"mIoU": 41.04}}}}) == "mIoU x 41.0 (1 s)"
    assert jobs._scores({"seconds": 1.0, "results": {"x": {}}}) == "no score (1 s)"
    silent = {"x": {"bbox": {"AP": float("nan"), "AP50": float("nan")}}}
    assert jobs._scores({"seconds": 1.0, "results": silent}) == "AP x 0.0 (1 s)"


def test_without_processes_runs_are_done_here(tmp_path, monkeypatch):
    def train(folder):
        if folder.name == "first":
            raise KeyError("no such thing")
        assert torch.get_num_threads() == 1
        (folder / "result.json").write_text("{}")
        return {"seconds": 1.0, "results": {"x": {"bbox": {"AP": 12.34}}}}

    monkeypatch.setattr("msad.experiments.jobs.train_and_evaluate", train)
    lines, plan = [], Script(tmp_path, first="work", second="work", third="work")
    assert run_all(plan, [FIRST, SECOND, THIRD], [Slot(1, here=True)], lines.append) == [FIRST, SECOND]
    assert [error_of(tmp_path / name) for name in ("first", "second", "third")] == [
        "no such thing", "not run, because what it needs (first, seed 0) failed", None
    ]  # fmt: skip
    assert lines[-1] == "[3/3] third, seed 0: AP x 12.3 (1 s)"
    assert plan.prepared == [FIRST, THIRD]


def test_what_is_needed_comes_first_and_finished_runs_are_kept(tmp_path):
    plan = Script(tmp_path, first="work", second="work", third="finished")
    assert run_all(plan, [SECOND, THIRD, FIRST], [Slot(1)] * 2, lambda _: None, plan.command) == []
    assert plan.prepared == [THIRD, FIRST, SECOND]
    assert not (tmp_path / "third/pid").exists() and (tmp_path / "second/result.json").exists()


def test_a_run_that_watches_its_parent_ends_well():
    script = "import time; from msad.experiments.run import end_with_parent; end_with_parent(); time.sleep(1)"
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    text = process.stderr.read()
    assert process.wait() == 0 and b"Fatal" not in text, text


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_runs_end_with_their_parent(tmp_path, how, wait_for):
    """However it ends: by Ctrl-C, by a scheduler, or without a word, where the runs watch their standard input."""
    what = {"first": "watch"} if how == signal.SIGKILL else {"first": "sleep", "third": "sleep"}
    plan = Script(tmp_path, **what)

    def parent():
        with contextlib.suppress(KeyboardInterrupt):
            run_all(plan, [Run(name, 0) for name in what], [Slot(1)] * 2, print, plan.command)
        os._exit(130)

    process = multiprocessing.get_context("fork").Process(target=parent)
    process.start()
    files = [tmp_path / name / "pid" for name in what]
    wait_for(lambda: all(file.exists() for file in files))
    pids = [int(file.read_text()) for file in files]
    assert all(map(alive, pids))
    os.kill(process.pid, how)
    process.join()
    wait_for(lambda: not any(map(alive, pids)))
    assert process.exitcode == (-how if how == signal.SIGKILL else 130)


def test_slots(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert make_slots(2, 1) == [Slot(1), Slot(1)]
    assert make_slots(devices=["cuda:0", "cuda:3"]) == [Slot(0, "0"), Slot(0, "3")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert make_slots(devices=["cuda:1"]) == [Slot(0, "7")]
    with pytest.raises(ValueError, match="cuda:2"):
        make_slots(devices=["cuda:2"])
    assert make_slots(0, 2) == [Slot(2, here=True)]
    with pytest.raises(ValueError, match="--jobs must be at least 0"):
        make_slots(-1)


def test_this_process_takes_the_first_gpu(monkeypatch):
    taken = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.set_device", taken.append)
    assert take_devices([]) == [] and take_devices(["cpu"]) == ["MODEL.DEVICE", "cpu"]
    assert take_devices(["cuda:1", "cuda:3"]) == ["MODEL.DEVICE", "cuda"]
    assert taken == ["cuda:1"]
