"""Comparisons: what is run from what, failures that stay alone, equal iterations and equal time."""

import json
from pathlib import Path

import pytest

from msad.experiments.comparison import Comparison, collect, run, unique_names
from msad.experiments.jobs import Slot, Task, make_slots, run_task
from msad.experiments.report.comparison import write_markdown

SMALL = ["SOLVER.IMS_PER_BATCH", 2]


@pytest.fixture
def rows(project, tmp_path):
    """yaml files of a control, of a student with a loss, and of a student whose teacher cannot be built."""
    texts = {
        "control": f"_BASE_: {project}/student.yaml\nDISTILL:\n  LOSSES: []\n"
        f"  TEACHERS: [{{CONFIG: {project}/teacher.yaml, WEIGHTS: x.pth}}]\n",
        "msad": f"_BASE_: {project}/student.yaml\nDISTILL:\n"
        f"  TEACHERS: [{{CONFIG: {project}/teacher.yaml, WEIGHTS: y.pth}}]\n",
        "orphan": f"_BASE_: {project}/student.yaml\nDISTILL:\n"
        f"  TEACHERS: [{{CONFIG: {tmp_path}/broken.yaml, WEIGHTS: z.pth}}]\n",
        "plain": f"_BASE_: {project}/fcos.yaml\n",
        "broken": f"_BASE_: {project}/fcos.yaml\nMODEL: {{BACKBONE: {{NAME: build_no_such_backbone}}}}\n",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return lambda *names: {name: tmp_path / f"{name}.yaml" for name in names}


def finish(comparison, task, **result):
    """Note a result as a run would have."""
    folder = comparison.folder(task)
    folder.mkdir(parents=True, exist_ok=True)
    values = {"fingerprint": "x", "iterations": 6, "seconds": 6.0, "cpu_seconds": 6.0, "steps": 6, **result}
    values.setdefault("results", {task.name: {"bbox": {"AP": 10.0}}})
    (folder / "result.json").write_text(json.dumps(values))


def test_teacher_is_shared_and_trained_once_a_seed(rows, tmp_path, project):
    comparison = Comparison(rows("control", "msad"), tmp_path / "out", seeds=(0, 1))
    assert comparison.teachers == {"teacher": (project / "teacher.yaml").resolve()}
    assert comparison.tasks() == [
        Task(kind, name, seed) for seed in (0, 1)
        for kind, name in (("teacher", "teacher"), ("row", "control"), ("row", "msad"))
    ]  # fmt: skip
    cfg = comparison.config(Task("row", "msad", 1))
    folder = tmp_path / "out/seed1/teachers/teacher"
    assert [
        {"CONFIG": str(folder / "config.yaml"), "WEIGHTS": str(folder / "model_final.pth")}
    ] == cfg.DISTILL.TEACHERS
    assert cfg.SEED == 1 and cfg.OUTPUT_DIR.endswith("out/seed1/msad") and len(cfg.DISTILL.LOSSES) == 1
    assert comparison.reference == "control"


def test_given_teacher_weights_train_no_teacher(rows, tmp_path, project):
    comparison = Comparison(rows("msad"), tmp_path, teacher_weights="runs/{seed}/t.pth", seeds=(4,))
    assert comparison.tasks() == [Task("row", "msad", 4)]
    (entry,) = comparison.config(Task("row", "msad", 4)).DISTILL.TEACHERS
    assert entry["WEIGHTS"] == "runs/4/t.pth" and Path(entry["CONFIG"]) == project / "teacher.yaml"


def test_iterations_scale_the_schedule(rows, tmp_path):
    opts = ["SOLVER.MAX_ITER", 60, "SOLVER.STEPS", (30, 45)]
    comparison = Comparison(rows("msad"), tmp_path, opts, iterations=20, teacher_iterations=120)
    student, teacher = (comparison.config(Task(k, n, 0)).SOLVER for k, n in (("row", "msad"), ("teacher", "teacher")))
    assert student.MAX_ITER == 20 and student.STEPS == (10, 15)
    assert teacher.MAX_ITER == 120 and teacher.STEPS == (60, 90)


def test_equal_time_follows_the_measured_steps(rows, tmp_path):
    comparison = Comparison(rows("control", "msad", "plain"), tmp_path / "out", equal_time=True)
    assert comparison.time_tasks() == []  # nothing is measured yet
    # Two of the control's steps were repeated after an interruption: 8 s for 8 steps are 1 s a step.
    finish(comparison, Task("row", "control", 0), cpu_seconds=8.0, steps=8)
    finish(comparison, Task("row", "msad", 0), cpu_seconds=12.0, seconds=99.0)
    finish(comparison, Task("row", "plain", 0), cpu_seconds=6.1)
    assert comparison.iterations_in_time("msad") == 3  # 6 s at 2 s a step
    assert comparison.time_tasks() == [Task("time", "msad", 0)]
    cfg = comparison.config(Task("time", "msad", 0))
    assert cfg.SOLVER.MAX_ITER == 3 and cfg.OUTPUT_DIR.endswith("msad@time")
    finish(comparison, Task("time", "msad", 0), iterations=3)
    data = collect(comparison)
    timed = {r["row"]: r["iterations"] for r in data["runs"] if r["kind"] == "time"}
    assert timed == {"control": 6, "msad": 3, "plain": 6}


def test_equal_time_with_teachers(rows, tmp_path):
    comparison = Comparison(rows("control", "msad", "plain"), tmp_path, equal_time=True, count_teachers=True)
    finish(comparison, Task("row", "control", 0), cpu_seconds=12.0)
    finish(comparison, Task("row", "msad", 0), cpu_seconds=24.0)
    finish(comparison, Task("row", "plain", 0), cpu_seconds=6.0)
    assert comparison.time_tasks() == []  # the teacher's time is not known yet
    finish(comparison, Task("teacher", "teacher", 0), cpu_seconds=48.0, steps=12, iterations=6)
    # The teacher's 24 s (6 iterations of 4 s) and the control's 12 s are 36 steps of 1 s without a teacher.
    assert {name: comparison.iterations_in_time(name) for name in comparison.files} == {
        "control": 6, "msad": 3, "plain": 36,
    }  # fmt: skip
    finish(comparison, Task("time", "plain", 0), iterations=36)
    write_markdown(collect(comparison), tmp_path / "page.md")
    assert "includes the teachers" in (tmp_path / "page.md").read_text()
    with pytest.raises(ValueError, match="control's teachers take longer than plain"):
        Comparison(comparison.files, tmp_path, reference="plain", equal_time=True, count_teachers=True).time_tasks()
    with pytest.raises(ValueError, match="--count-teachers"):
        Comparison(rows("plain"), tmp_path, teacher_weights="t.pth", count_teachers=True)


def test_names():
    assert unique_names([Path("x/a.yaml"), Path("x/b.yaml")]) == {"a": Path("x/a.yaml"), "b": Path("x/b.yaml")}
    assert set(unique_names([Path("/x/a.yaml"), Path("/y/a.yaml")])) == {"x_a", "y_a"}
    with pytest.raises(ValueError, match="several files are called x_a"):
        unique_names([Path("/x/a.yaml"), Path("/x/a.yaml")])
    with pytest.raises(ValueError, match="--reference nobody"):
        Comparison({"a": Path("a.yaml")}, Path("."), reference="nobody")


def test_slots(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert make_slots(2, 1) == [Slot(0, 1), Slot(1, 1)]
    assert make_slots(devices=["cuda:0", "cuda:3"]) == [Slot(0, 0, "0"), Slot(1, 0, "3")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert make_slots(devices=["cuda:1"]) == [Slot(0, 0, "7")]
    with pytest.raises(ValueError, match="cuda:2"):
        make_slots(devices=["cuda:2"])


def test_runs_in_processes_and_failures_stay_alone(rows, tmp_path):
    comparison = Comparison(rows("plain", "orphan", "broken"), tmp_path / "out", SMALL, iterations=1)
    lines = []
    missing = run(comparison, [Slot(0, 1), Slot(1, 1)], lines.append)
    # The one that can run has run; the teacher and the row that cannot be built are named, and so is who needs them.
    assert set(missing) == {Task("teacher", "broken", 0), Task("row", "orphan", 0), Task("row", "broken", 0)}
    assert comparison.result(Task("row", "plain", 0))["iterations"] == 1
    assert "build_no_such_backbone" in comparison.error(Task("row", "broken", 0))
    assert "(broken, seed 0) failed" in comparison.error(Task("row", "orphan", 0))
    assert sum("FAILED" in line for line in lines) == 2 and any("AP plain" in line for line in lines)
    assert "Traceback" in (comparison.folder(Task("row", "broken", 0)) / "log.txt").read_text()
    errors = {r["row"] for r in collect(comparison)["runs"] if "error" in r}
    assert errors == {"orphan", "broken"}

    # A finished run is kept, and one of another configuration is not passed off as it.
    stamp = (comparison.folder(Task("row", "plain", 0)) / "model_final.pth").stat().st_mtime_ns
    result = run_task(comparison, Task("row", "plain", 0))
    assert result == comparison.result(Task("row", "plain", 0)) and result["steps"] == 1
    assert stamp == (comparison.folder(Task("row", "plain", 0)) / "model_final.pth").stat().st_mtime_ns
    other = Comparison(rows("plain"), tmp_path / "out", SMALL, iterations=2)
    with pytest.raises(ValueError, match="another configuration"):
        run_task(other, Task("row", "plain", 0))
    with pytest.raises(ValueError, match="another configuration"):
        run(other, [Slot(0, 1)], lines.append)
    assert comparison.error(Task("row", "plain", 0)) is None


def test_students_learn_from_the_trained_teacher(rows, tmp_path):
    comparison = Comparison(rows("msad"), tmp_path / "out", SMALL, iterations=1, teacher_iterations=1)
    for task in comparison.tasks():
        run_task(comparison, task)
    data = collect(comparison)
    assert set(data["runs"][0]["results"]) == {"teacher_fused", "teacher_H", "teacher_L"}
    assert set(data["runs"][1]["results"]) == {"msad"}
    log = (comparison.folder(Task("row", "msad", 0)) / "log.txt").read_text()
    assert "teachers/teacher/model_final.pth" in log and "Student initialised from the teacher" in log
