"""Runs in processes of their own: crashes, interruptions, order, and what is never mixed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from msad.experiments.jobs import Plan, Slot, Task, device_opts, make_slots, run_task, run_tasks
from msad.experiments.run import _alone

HERE = Path(__file__).parent


class Broken(Plan):
    """Runs that never get as far as training: ``what`` happens when their process asks for the config."""

    def __init__(self, root: Path, what: str) -> None:
        self.root, self.what, self.parent = root, what, os.getpid()

    def folder(self, task):
        return self.root / task.name

    def needs(self, task):
        return [Task("row", "first", task.seed)] if task.name == "second" else []

    def config(self, task):
        if os.getpid() == self.parent:
            return None
        self.folder(task).mkdir(parents=True, exist_ok=True)
        (self.folder(task) / "pid").write_text(str(os.getpid()))
        if self.what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "raise":
            raise KeyError("no such thing")
        time.sleep(600)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has waited for does not."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "it did not happen in time"
        time.sleep(0.05)


FIRST, SECOND, THIRD = (Task("row", name, 0) for name in ("first", "second", "third"))


def test_a_crash_is_not_taken_for_an_earlier_error(tmp_path):
    lines = []
    assert run_tasks(Broken(tmp_path, "raise"), [FIRST, SECOND], [Slot(0, 1)], lines.append) == [FIRST, SECOND]
    assert "FAILED: KeyError: 'no such thing'" in lines[0]
    plan = Broken(tmp_path, "die")
    assert run_tasks(plan, [FIRST, SECOND, THIRD], [Slot(0, 1), Slot(1, 1)], lines.append) == [FIRST, SECOND, THIRD]
    assert "its process ended with exit code -9" in plan.error(FIRST)
    assert plan.error(SECOND) == "not run, because what it needs (first, seed 0) failed"
    assert "exit code -9" in plan.error(THIRD) and not (plan.folder(SECOND) / "pid").exists()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_runs_end_with_their_parent(tmp_path, how):
    """However it ends: by Ctrl-C (which goes to all processes of the group), by a scheduler, or without a word."""
    code = (
        "import sys, pathlib; from test_schedule import *\n"
        f"if __name__ == '__main__': run_tasks(Broken(pathlib.Path({str(tmp_path)!r}), 'sleep'), [FIRST, THIRD], "
        "[Slot(0, 1), Slot(1, 1)])"
    )
    script = tmp_path / "main.py"
    script.write_text(code)
    paths = os.pathsep.join([str(HERE), *filter(None, sys.path)])
    parent = subprocess.Popen(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": paths}, stderr=subprocess.PIPE,
        start_new_session=True, text=True,
    )  # fmt: skip
    files = [tmp_path / name / "pid" for name in ("first", "third")]
    wait_for(lambda: all(file.exists() and file.read_text() for file in files))
    pids = [int(file.read_text()) for file in files]
    assert all(map(alive, pids))
    if how == signal.SIGINT:
        os.killpg(parent.pid, how)
    else:
        parent.send_signal(how)
    _, error = parent.communicate(timeout=60)
    wait_for(lambda: not any(map(alive, pids)))
    assert error.count("Traceback") == (0 if how == signal.SIGKILL else 1), error  # that of the parent
    assert parent.returncode == (-how if how == signal.SIGKILL else -signal.SIGINT)


def test_wrong_configs_are_found_before_anything_runs(tmp_path):
    class Wrong(Broken):
        def config(self, task):
            raise ValueError(f"{task.name} is wrong")

    with pytest.raises(ValueError, match="third is wrong"):
        run_tasks(Wrong(tmp_path, ""), [THIRD], [Slot(0, 1)])
    assert not list(tmp_path.iterdir())


def test_a_time_that_has_changed_is_not_passed_off(tmp_path):
    class Timed(Broken):
        def config(self, task):
            from msad import load_config

            return load_config("", ["SOLVER.MAX_ITER", 200, "OUTPUT_DIR", str(self.folder(task))])

    plan, task = Timed(tmp_path, ""), Task("time", "row", 0)
    plan.folder(task).mkdir()
    for iterations in (100, 205):
        (plan.folder(task) / "result.json").write_text(json.dumps({"iterations": iterations, "fingerprint": "x"}))
        if iterations == 205:
            assert run_task(plan, task)["iterations"] == 205
        else:
            with pytest.raises(ValueError, match="100 iterations, but 200 are the same time"):
                run_tasks(plan, [task], [Slot(0, 1)])


def test_one_process_a_folder(tmp_path):
    with _alone(tmp_path), pytest.raises(ValueError, match="another process is training in"), _alone(tmp_path):
        pass
    with _alone(tmp_path):
        pass


def test_devices():
    assert device_opts([]) == [] and device_opts(["cpu"]) == ["MODEL.DEVICE", "cpu"]
    assert device_opts(["cuda:0", "cuda:1"]) == ["MODEL.DEVICE", "cuda"]
    with pytest.raises(ValueError, match="--jobs must be at least 1"):
        make_slots(0)
