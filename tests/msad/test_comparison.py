"""Comparisons: what is run from what, budgets, and what a finished run is recognised by."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from msad import load_config
from msad.engine.stages import stage_configs
from msad.experiments.comparison import Comparison
from msad.experiments.identity import check_same, is_finished
from msad.experiments.jobs import Run, Slot, error_of
from msad.experiments.run import Warnings, exclusive_lock, train_and_evaluate
from msad.experiments.variants import Variant, at_equal_time, sweep

SMALL = ["SOLVER.IMS_PER_BATCH", 2]


@pytest.fixture
def files(project, tmp_path):
    """Variants of a student without a loss, one with, one whose teacher cannot be built, and a plain detector."""
    student = f"_BASE_: {project}/student.yaml\nDISTILL:\n"
    texts = {
        "no_kd": f"{student}  LOSSES: []\n  TEACHERS: [{{CONFIG: {project}/teacher.yaml, WEIGHTS: x.pth}}]\n",
        "msad": f"{student}  TEACHERS: [{{CONFIG: {project}/teacher.yaml, WEIGHTS: y.pth}}]\n",
        "orphan": f"{student}  TEACHERS: [{{CONFIG: {tmp_path}/broken.yaml, WEIGHTS: z.pth}}]\n",
        "pupil": f"{student}  TEACHERS: [{{CONFIG: {tmp_path}/msad.yaml, WEIGHTS: z.pth}}]\n",
        "loop": f"{student}  TEACHERS: [{{CONFIG: {tmp_path}/loop.yaml, WEIGHTS: z.pth}}]\n",
        "plain": f"_BASE_: {project}/fcos.yaml\n",
        "broken": f"_BASE_: {project}/fcos.yaml\nMODEL: {{BACKBONE: {{NAME: build_no_such_backbone}}}}\n",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return lambda *names: {name: Variant(tmp_path / f"{name}.yaml") for name in names}


def finish(comparison, name, seed=0, **result):
    """Note a result as a run would have."""
    folder = comparison.folder(Run(name, seed))
    folder.mkdir(parents=True, exist_ok=True)
    values = {"iterations": 6, "warmup": 0, "seconds": 6.0, "cpu_seconds": 6.0, "steps": 6, **result}
    (folder / "result.json").write_text(json.dumps({"results": {name: {"bbox": {"AP": 10.0}}}, **values}))


def test_a_teacher_is_shared_and_trained_once_a_seed(files, tmp_path, project):
    comparison = Comparison(files("no_kd", "msad"), tmp_path / "out", seeds=(0, 1))
    teacher = Variant((project / "teacher.yaml").resolve(), title="teacher", teacher=True)
    assert comparison.variants["teacher"] == teacher
    assert comparison.runs() == [Run(n, seed) for seed in (0, 1) for n in ("teacher", "no_kd", "msad")]
    cfg = comparison.config(Run("msad", 1))
    folder = tmp_path / "out/seed1/teacher"
    expected = [{"CONFIG": str(folder / "config.yaml"), "WEIGHTS": str(folder / "model_final.pth")}]
    assert expected == cfg.DISTILL.TEACHERS
    assert cfg.SEED == 1 and cfg.OUTPUT_DIR.endswith("out/seed1/msad") and len(cfg.DISTILL.LOSSES) == 1


def test_the_longest_runs_follow_the_teachers(files, tmp_path):
    variants = files("plain", "msad")
    variants["longer"] = replace(variants["plain"], budget="equal_iterations", reference="msad")
    assert [run.name for run in Comparison(variants, tmp_path).runs()] == ["teacher", "msad", "longer", "plain"]


def test_a_teacher_may_be_a_student(files, tmp_path):
    comparison = Comparison(files("pupil"), tmp_path / "out")
    assert comparison.runs() == [Run("teacher", 0), Run("msad", 0), Run("pupil", 0)]
    (entry,) = comparison.config(Run("msad", 0)).DISTILL.TEACHERS
    assert entry["WEIGHTS"] == str(tmp_path / "out/seed0/teacher/model_final.pth")
    assert comparison.all_teachers("pupil") == ["teacher", "msad"]
    found = {name: variant["teachers"] for name, variant in comparison.collect()["variants"].items()}
    assert found == {"pupil": ["msad"], "msad": ["teacher"], "teacher": []}
    # A variant that is the teacher's very file serves as the teacher.
    assert set(Comparison(files("pupil", "msad"), tmp_path).variants) == {"pupil", "msad", "teacher"}
    with pytest.raises(ValueError, match=r"loop\.yaml is its own teacher"):
        Comparison(files("loop"), tmp_path)


def test_given_teacher_weights_train_no_teacher(files, tmp_path, project):
    comparison = Comparison(files("msad"), tmp_path, teacher_weights="runs/{seed}/t.pth", seeds=(4,))
    assert comparison.runs() == [Run("msad", 4)]
    (entry,) = comparison.config(Run("msad", 4)).DISTILL.TEACHERS
    assert entry["WEIGHTS"] == "runs/4/t.pth" and Path(entry["CONFIG"]) == project / "teacher.yaml"
    timed = at_equal_time("msad", files("msad")["msad"], "plain", True)
    with pytest.raises(ValueError, match="--count-teachers"):
        Comparison({**files("plain", "msad"), **timed}, tmp_path, teacher_weights="t.pth")


def test_iterations_scale_the_schedule_and_the_warm_up(files, tmp_path):
    opts = ["SOLVER.MAX_ITER", 60, "SOLVER.STEPS", (30, 45), "SOLVER.WARMUP_ITERS", 9]
    comparison = Comparison(files("msad"), tmp_path, opts, iterations=20, teacher_iterations=120)
    student, teacher = (comparison.config(Run(n, 0)) for n in ("msad", "teacher"))
    assert student.SOLVER.MAX_ITER == 20 and student.SOLVER.STEPS == (10, 15)
    assert teacher.SOLVER.MAX_ITER == 120 and teacher.SOLVER.STEPS == (60, 90)
    # What the user has set stays; what the yaml says (8 of 60) shrinks with the run, and never grows.
    assert student.SOLVER.WARMUP_ITERS == 9 and student.DISTILL.WARMUP_ITERS == 3
    assert Comparison(files("plain"), tmp_path, iterations=2).config(Run("plain", 0)).SOLVER.WARMUP_ITERS == 1
    assert Comparison(files("plain"), tmp_path, iterations=60).config(Run("plain", 0)).SOLVER.WARMUP_ITERS == 3


@pytest.mark.parametrize("key", ["SOLVER.WARMUP_ITERS", "DISTILL.WARMUP_ITERS", "DISTILL.START_ITER"])
def test_what_is_swept_is_not_scaled(files, tmp_path, key):
    variants = sweep(files("msad"), f"{key}=10,40")
    comparison = Comparison(variants, tmp_path, ["SOLVER.MAX_ITER", 60], iterations=30)
    section, name = key.split(".")
    assert [comparison.config(Run(variant, 0))[section][name] for variant in variants] == [10, 40]


@pytest.mark.parametrize("assignment", ["SOLVER.MAX_ITER=20,60", "SOLVER.STEPS.0=10,20", "SEED=1,2"])
def test_what_the_comparison_sets_is_not_swept(files, tmp_path, assignment):
    opts = ["SOLVER.MAX_ITER", 60, "SOLVER.STEPS", (30, 45)]
    variants = sweep({"plain": Variant(tmp_path / "plain.yaml", tuple(opts))}, assignment)
    key = assignment.partition("=")[0]
    with pytest.raises(ValueError, match=f"--sweep {key}: the comparison itself sets it"):
        Comparison(variants, tmp_path / "out", opts, iterations=30).run([Slot(1)])
    assert not (tmp_path / "out").exists()


def test_equal_iterations_are_those_of_student_and_teachers(files, tmp_path):
    longer = Variant(tmp_path / "plain.yaml", budget="equal_iterations", reference="pupil")
    comparison = Comparison({**files("pupil"), "longer": longer}, tmp_path, iterations=20, teacher_iterations=7)
    assert comparison.config(Run("longer", 0)).SOLVER.MAX_ITER == 20 + 7 + 7
    assert comparison.needs(Run("longer", 0)) == []  # nothing is measured for it


def timed(files, *names, reference="no_kd", count_teachers=False):
    variants = files("no_kd", "msad", "plain")
    for name in names:
        variants |= at_equal_time(name, variants[name], reference, count_teachers)
    return variants


def test_equal_time_follows_the_measured_steps(files, tmp_path):
    comparison = Comparison(timed(files, "msad", "plain"), tmp_path / "out")
    run = Run("msad@equal_time", 0)
    assert comparison.needs(run) == [Run("teacher", 0), Run("msad", 0), Run("no_kd", 0)]
    with pytest.raises(ValueError, match="is not known"):
        comparison.config(run)
    # Two of the steps were repeated after an interruption: 8 s for 8 steps are 1 s a step.
    finish(comparison, "no_kd", cpu_seconds=8.0, steps=8)
    finish(comparison, "msad", cpu_seconds=12.0, seconds=99.0)
    finish(comparison, "plain", cpu_seconds=6.1)
    finish(comparison, "teacher")
    cfg = comparison.config(run)
    assert cfg.SOLVER.MAX_ITER == 3 and cfg.OUTPUT_DIR.endswith("msad@equal_time")  # 6 s at 2 s a step
    assert comparison.prepare(Run("plain@equal_time", 0)) is False  # as the run of equal iterations
    finish(comparison, run.name, iterations=3)
    runs = {r["variant"]: r for r in comparison.collect()["runs"]}
    assert runs["msad@equal_time"]["iterations"] == 3 and runs["plain@equal_time"]["iterations"] == 6
    assert set(runs["plain@equal_time"]["results"]) == {"plain@equal_time"}
    assert runs["plain@equal_time"]["same_as"] == "plain" and "same_as" not in runs["msad@equal_time"]


def test_a_failure_that_no_longer_exists_is_forgotten(files, tmp_path):
    """Of equal time, because what it needed had failed; now it is the run without a budget."""
    comparison = Comparison(timed(files, "plain"), tmp_path)
    run = Run("plain@equal_time", 0)
    comparison.folder(run).mkdir(parents=True)
    (comparison.folder(run) / "failed.txt").write_text("not run, because what it needs (plain, seed 0) failed")
    for name in ("no_kd", "plain", "teacher"):
        finish(comparison, name)
    assert comparison.prepare(run) is False
    (found,) = [r for r in comparison.collect()["runs"] if r["variant"] == run.name]
    assert "error" not in found and found["results"]


def test_what_stands_for_a_run_of_equal_time_counts_for_more_than_an_earlier_run(files, tmp_path):
    """After labels were corrected; its folder has the model of the time before."""
    comparison = Comparison(timed(files, "plain"), tmp_path)
    run = Run("plain@equal_time", 0)
    for name, seconds in (("no_kd", 12.0), ("plain", 6.0), ("teacher", 6.0)):
        finish(comparison, name, cpu_seconds=seconds)
    finish(comparison, run.name, iterations=12)
    assert run.name in comparison.finished()
    found = {r["variant"]: r for r in comparison.collect()["runs"]}
    assert found[run.name]["iterations"] == 12
    finish(comparison, "no_kd", cpu_seconds=6.1)
    found = {r["variant"]: r for r in comparison.collect()["runs"]}
    assert found[run.name]["iterations"] == 6 and set(found[run.name]["results"]) == {run.name}
    assert run.name not in comparison.finished() and "plain" in comparison.finished()
    (comparison.folder(Run("no_kd", 0)) / "result.json").unlink()  # its time is to be measured again
    assert run.name not in {r["variant"] for r in comparison.collect()["runs"]}


def test_a_result_from_before_a_failure_is_not_reported(files, tmp_path):
    """What it learns from could not be trained again; it may be another one by now."""
    comparison = Comparison(files("plain"), tmp_path)
    run, cfg = Run("plain", 0), comparison.config(Run("plain", 0))
    assert not is_finished(cfg)
    finish(comparison, "plain")
    (comparison.folder(run) / "failed.txt").write_text("not run, because what it needs (teacher, seed 0) failed")
    (found,) = comparison.collect()["runs"]
    assert "results" not in found and "teacher, seed 0" in found["error"] and not comparison.finished()
    assert not comparison.prepare(run)
    (found,) = comparison.collect()["runs"]
    assert "results" in found and comparison.finished() == ["plain"]


def test_other_times_make_another_run_of_equal_time(files, tmp_path):
    """After labels were corrected and the reference trained again; the earlier run is kept under another name."""
    comparison, said = Comparison(timed(files, "msad"), tmp_path), []
    run = Run("msad@equal_time", 0)
    for name, seconds in (("no_kd", 600.0), ("msad", 12.0), ("teacher", 1.0)):
        finish(comparison, name, cpu_seconds=seconds)
    assert comparison.prepare(run)
    finish(comparison, run.name, iterations=300)
    assert not comparison.prepare(run)
    finish(comparison, "no_kd", cpu_seconds=700.0)
    cfg = comparison.config(run)
    with pytest.raises(ValueError, match=r"another configuration \(SOLVER.MAX_ITER 300, now 350"):
        is_finished(cfg)  # of any other run that would be another one
    assert comparison.config(run).SOLVER.MAX_ITER == 350 and not is_finished(cfg, said.append, timed=True)
    assert "the measured times or the reference have changed, it is trained again; the earlier run is" in said[0]
    assert said[0].endswith("msad@equal_time~1")
    assert (tmp_path / "seed0/msad@equal_time~1/result.json").is_file()
    with pytest.raises(ValueError, match=r"another configuration \(SOLVER.BASE_LR"):
        cfg.defrost()
        finish(comparison, run.name)
        cfg.SOLVER.BASE_LR *= 2
        is_finished(cfg, timed=True)


def test_equal_time_of_another_reference_is_not_reported(files, tmp_path):
    def study(reference):
        return Comparison(timed(files, "plain", reference=reference), tmp_path)

    run, comparison = Run("plain@equal_time", 0), study("no_kd")
    for name, seconds in (("teacher", 6.0), ("no_kd", 12.0), ("msad", 18.0), ("plain", 6.0)):
        assert not is_finished(comparison.config(Run(name, 0)))
        finish(comparison, name, cpu_seconds=seconds)
    assert not is_finished(comparison.config(run), timed=True)
    finish(comparison, run.name, iterations=12)
    comparison.check(report_only=True)
    finish(comparison, "no_kd", cpu_seconds=12.2)  # within what can be measured
    comparison.check(report_only=True)
    study("msad").check()
    with pytest.raises(ValueError, match=r"plain@equal_time: the measured times or the reference have changed since"):
        study("msad").check(report_only=True)
    (comparison.folder(Run("msad", 0)) / "result.json").unlink()  # nothing of that time is known or reported
    study("msad").check(report_only=True)
    assert run.name not in {found["variant"] for found in study("msad").collect()["runs"]}


def test_a_student_of_another_teacher_is_not_reported(files, tmp_path):
    comparison = Comparison(files("msad"), tmp_path)
    teacher = comparison.weights(Run("teacher", 0))
    assert not is_finished(comparison.config(Run("teacher", 0)))
    teacher.write_bytes(b"first")
    assert not is_finished(comparison.config(Run("msad", 0)))
    comparison.check(report_only=True)
    finish(comparison, "msad")
    teacher.write_bytes(b"another")
    with pytest.raises(ValueError, match="seed0/msad: the weights of its teacher or its start have changed since"):
        Comparison(files("msad"), tmp_path).check(report_only=True)
    teacher.unlink()  # which changes nothing
    comparison.check(report_only=True)


def test_a_measured_time_that_moves_a_little_does_not_make_another_run(files, tmp_path):
    comparison = Comparison(timed(files, "msad"), tmp_path)
    run = Run("msad@equal_time", 0)
    for name, seconds in (("no_kd", 600.0), ("msad", 12.0), ("teacher", 1.0)):
        finish(comparison, name, cpu_seconds=seconds)
    cfg = comparison.config(run)
    assert cfg.SOLVER.MAX_ITER == 300
    comparison.folder(run).mkdir()
    (comparison.folder(run) / "config.yaml").write_text(cfg.dump())
    finish(comparison, "no_kd", cpu_seconds=610.0)
    assert comparison.config(run).SOLVER.MAX_ITER == 300
    finish(comparison, "no_kd", cpu_seconds=700.0)
    assert comparison.config(run).SOLVER.MAX_ITER == 350


def test_equal_time_with_teachers(files, tmp_path):
    comparison = Comparison(timed(files, "msad", "plain", count_teachers=True), tmp_path)
    for name, result in {
        "no_kd": {"cpu_seconds": 12.0}, "msad": {"cpu_seconds": 24.0}, "plain": {"cpu_seconds": 6.0},
        "teacher": {"cpu_seconds": 48.0, "steps": 12},
    }.items():  # fmt: skip
        finish(comparison, name, **result)
    # The teacher's 24 s (6 iterations of 4 s) and the student's 12 s are 36 steps of 1 s without a teacher.
    counts = {name: comparison.iterations_in_time(Run(f"{name}@equal_time", 0)) for name in ("msad", "plain")}
    assert counts == {"msad": 3, "plain": 36}
    other = Comparison(timed(files, "msad", reference="plain", count_teachers=True), tmp_path)
    with pytest.raises(ValueError, match="the teachers of msad take longer than plain"):
        other.config(Run("msad@equal_time", 0))


def test_reference_must_be_there(files, tmp_path):
    with pytest.raises(ValueError, match="--reference nobody is none of the variants plain"):
        Comparison(files("plain"), tmp_path, reference="nobody")


@pytest.mark.parametrize("sets", [("tiny_val", "tiny_train"), ()])
def test_several_test_sets_are_refused_before_training(files, tmp_path, sets):
    opts = ["DATASETS.TEST", sets]
    with pytest.raises(ValueError, match=r"msad\.yaml: a comparison needs one data set in DATASETS\.TEST, got \["):
        Comparison(files("msad"), tmp_path / "out", opts)
    given = Comparison(files("msad"), tmp_path / "out", opts, teacher_weights="t.pth")
    for ask in (given.runs, given.check):
        with pytest.raises(ValueError, match="needs one data set"):
            ask()


def test_one_process_a_folder(tmp_path):
    with exclusive_lock(tmp_path), pytest.raises(ValueError, match="another process is training in"):
        exclusive_lock(tmp_path).__enter__()
    with exclusive_lock(tmp_path):
        pass


def test_runs_in_processes_and_failures_stay_alone(files, tmp_path):
    comparison = Comparison(files("plain", "orphan"), tmp_path / "out", SMALL, iterations=1)
    lines = []
    failed = comparison.run([Slot(1), Slot(1)], lines.append)
    # The one that can run has run; the teacher that cannot be built is named, and so is who needs it.
    assert failed == [Run("broken", 0), Run("orphan", 0)]
    plain, broken = (comparison.folder(Run(name, 0)) for name in ("plain", "broken"))
    assert comparison.result(Run("plain", 0))["iterations"] == 1
    assert "build_no_such_backbone" in error_of(broken) and "Traceback" in (broken / "log.txt").read_text()
    assert "(broken, seed 0) failed" in error_of(comparison.folder(Run("orphan", 0)))
    assert {r["variant"] for r in comparison.collect()["runs"] if "error" in r} == {"orphan", "broken"}
    assert comparison.finished() == ["plain"]

    # A finished run is kept, and one of another configuration is neither passed off as it nor touched.
    before = (plain / "model_final.pth").stat().st_mtime_ns
    assert comparison.prepare(Run("plain", 0)) is False
    other = Comparison(files("plain"), tmp_path / "out", SMALL, iterations=2)
    with pytest.raises(ValueError, match=r"another configuration \(SOLVER.MAX_ITER 1, now 2"):
        other.run([Slot(1)], lines.append)
    assert error_of(plain) is None and (plain / "model_final.pth").stat().st_mtime_ns == before


def test_students_learn_from_the_trained_teacher(files, tmp_path):
    comparison = Comparison(files("msad"), tmp_path / "out", SMALL, iterations=1, teacher_iterations=1)
    for run in comparison.runs():
        assert comparison.prepare(run)
        train_and_evaluate(comparison.folder(run))
    teacher, student = comparison.collect()["runs"]
    assert set(teacher["results"]) == {"teacher_fused", "teacher_H", "teacher_L"}
    assert set(student["results"]) == {"msad"}
    log = (comparison.folder(Run("msad", 0)) / "log.txt").read_text()
    assert "teacher/model_final.pth" in log and "Student initialised from the teacher" in log
    # A folder that was moved holds the same runs: places differ, contents do not.
    shutil.copytree(tmp_path / "out", tmp_path / "moved")
    moved = Comparison(files("msad"), tmp_path / "moved", SMALL, iterations=1, teacher_iterations=1)
    assert not any(moved.prepare(run) for run in moved.runs())
    other = moved.config(Run("msad", 0)).clone()
    other.defrost()
    other.DISTILL.TEACHERS = [{**other.DISTILL.TEACHERS[0], "CONFIG": str(tmp_path / "other.yaml")}]
    with pytest.raises(ValueError, match=r"another configuration \(DISTILL\.TEACHERS"):
        check_same(other)
    # Another teacher under the same name is another student.
    shutil.copy(tmp_path / "out/seed0/msad/model_final.pth", tmp_path / "out/seed0/teacher/model_final.pth")
    assert comparison.prepare(Run("msad", 0)) and (tmp_path / "out/seed0/msad~1/result.json").is_file()


def test_what_a_run_does_not_know_yet_is_no_difference(project, tmp_path):
    """Keys that a later version adds, at their defaults, leave runs of the earlier one what they are."""
    cfg = load_config(project / "fcos.yaml", ["OUTPUT_DIR", str(tmp_path / "run")])
    cfg.freeze()
    assert not is_finished(cfg)
    (tmp_path / "run" / "result.json").write_text("{}")
    file, known = tmp_path / "run" / "config.yaml", json.loads((tmp_path / "run" / "identity.json").read_text())
    text = file.read_text()
    assert "  W_DET: 1.0\n" in text
    file.write_text(text.replace("  W_DET: 1.0\n", ""))
    (tmp_path / "run" / "identity.json").write_text(json.dumps({**known, "config": "of that text"}))
    assert is_finished(cfg)
    other = load_config(project / "fcos.yaml", ["OUTPUT_DIR", str(tmp_path / "run"), "DISTILL.W_DET", 2.0])
    with pytest.raises(ValueError, match=r"another configuration \(DISTILL.W_DET 1.0, now 2.0\)"):
        check_same(other)
    file.unlink()
    with pytest.raises(ValueError, match=r"its config\.yaml is gone"):
        check_same(other)
    (tmp_path / "run" / "identity.json").unlink()
    with pytest.raises(ValueError, match=r"has no identity\.json"):
        check_same(cfg)


def test_warnings_of_a_run_are_kept_over_resumes(tmp_path):
    log, file = logging.getLogger("msad.anything"), tmp_path / "warnings.json"
    with Warnings(file):
        log.info("nothing")
        for text in ("a", "b", "a"):
            log.warning("it is %s", text)
    log.warning("later")
    with Warnings(file) as kept:
        log.error("c")
    assert kept.texts == json.loads(file.read_text()) == ["it is a", "it is b", "c"]


def test_what_a_run_warns_of_is_in_its_result(files, project, tmp_path):
    distill = "{LOSSES: [{NAME: CWD}], WARMUP_ITERS: 9}"
    (tmp_path / "hasty.yaml").write_text(f"_BASE_: {tmp_path}/msad.yaml\nDISTILL: {distill}\n")
    comparison = Comparison({"hasty": Variant(tmp_path / "hasty.yaml")}, tmp_path / "out", SMALL, teacher_iterations=1)
    for name in ("teacher", "hasty"):
        assert comparison.prepare(Run(name, 0))
        found = train_and_evaluate(comparison.folder(Run(name, 0)))["warnings"]
    assert any("DISTILL.WARMUP_ITERS 9 is not below SOLVER.MAX_ITER" in text for text in found)
    assert found in [run["warnings"] for run in comparison.collect()["runs"] if run["variant"] == "hasty"]


def test_what_an_attempt_without_a_checkpoint_has_left_is_not_of_the_next(project, tmp_path):
    """Its time would be counted for the steps of another config, and reported are faults that are corrected."""
    cfgs = [load_config(project / "fcos.yaml", ["OUTPUT_DIR", str(tmp_path), "SOLVER.MAX_ITER", n]) for n in (6, 7)]
    assert not is_finished(cfgs[0])
    for name in ("clock.json", "warnings.json", "model_0000002.pth"):
        (tmp_path / name).write_text("[]")
    assert not is_finished(cfgs[0]) and (tmp_path / "clock.json").is_file()
    (tmp_path / "model_0000002.pth").unlink()
    assert not is_finished(cfgs[1]) and not list(tmp_path.glob("[cw][la]*.json"))


def test_a_curriculum_is_one_run(files, project, tmp_path):
    entry = f"{{NAME: big, CONFIG: {project}/teacher.yaml, WEIGHTS: x.pth}}"
    stages = "[{SOLVER: {MAX_ITER: 1}}, {SOLVER: {MAX_ITER: 2}}]"
    text = f"_BASE_: {project}/student.yaml\nDISTILL: {{TEACHERS: [{entry}], STAGES: {stages}}}\n"
    (tmp_path / "staged.yaml").write_text(text)
    staged = {"staged": Variant(tmp_path / "staged.yaml")}
    longer = Variant(tmp_path / "plain.yaml", budget="equal_iterations", reference="staged")
    comparison = Comparison({**staged, "longer": longer}, tmp_path / "out", SMALL, teacher_iterations=1)
    assert comparison.config(Run("longer", 0)).SOLVER.MAX_ITER == 1 + 3
    for name in ("teacher", "staged"):
        assert comparison.prepare(Run(name, 0))
        result = train_and_evaluate(comparison.folder(Run(name, 0)))
    assert result["iterations"] == result["steps"] == 3 and set(result["results"]) == {"staged"}
    last, folder = (comparison.folder(Run("staged", 0)) / sub for sub in ("stage2", ""))
    assert (last / "model_final.pth").read_bytes() == (folder / "model_final.pth").read_bytes()
    scaled = Comparison(staged, tmp_path, SMALL, iterations=30).config(Run("staged", 0))
    assert [stage.SOLVER.MAX_ITER for stage in stage_configs(scaled)] == [10, 20], "stages keep their shares"


def test_changed_data_are_another_run(project, tmp_path):
    for name in ("train", "val"):
        shutil.copy(project / f"data/annotations_{name}.json", tmp_path)
    paths = {n: {"JSON": str(tmp_path / f"annotations_{n}.json")} for n in ("train", "val")}
    entries = [{"NAME": f"own_{n}", "IMAGES": str(project / "data/images"), **path} for n, path in paths.items()]
    opts = ["DATASETS.REGISTER", entries, "DATASETS.TRAIN", ("own_train",), "DATASETS.TEST", ("own_val",)]
    cfg = load_config(project / "fcos.yaml", [*opts, "OUTPUT_DIR", str(tmp_path / "run")])
    cfg.freeze()
    assert not is_finished(cfg)
    for name in ("result.json", "last_checkpoint"):
        (tmp_path / "run" / name).write_text("{}")
    assert is_finished(cfg)

    study = Comparison({"run": Variant(project / "fcos.yaml")}, tmp_path / "out", opts)

    def correct(name):
        """As in a new process: what the data were is looked at once a process."""
        from msad.experiments import identity

        file = tmp_path / f"annotations_{name}.json"
        content = json.loads(file.read_text())
        content["annotations"][0]["bbox"][0] += 1
        file.write_text(json.dumps(content))
        identity._data.cache_clear()

    assert not is_finished(study.config(Run("run", 0)))
    finish(study, "run")
    study.check(report_only=True)
    said = []
    correct("val")  # the model stays, its result does not
    assert not is_finished(cfg, said.append) and (tmp_path / "run/last_checkpoint").is_file()
    (tmp_path / "run/result.json").write_text("{}")
    assert is_finished(cfg, said.append)
    with pytest.raises(ValueError, match=r"seed0/run: the test data have changed since its run; .* evaluates it again"):
        study.check(report_only=True)
    study.check()
    correct("train")
    with pytest.raises(ValueError, match="seed0/run: the training data have changed since its run"):
        study.check(report_only=True)
    assert not is_finished(cfg, said.append) and not (tmp_path / "run/last_checkpoint").is_file()
    assert (tmp_path / "run~1/last_checkpoint").is_file()
    assert "test data have changed" in said[0] and "training data have changed" in said[1] and len(said) == 2
