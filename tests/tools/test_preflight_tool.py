"""tools/preflight.py: its exit status, its text and its JSON."""

import json

import pytest
from load_tool import load_tool


@pytest.fixture
def call(capsys):
    module = load_tool("preflight")

    def run(*args):
        return module.main([*map(str, args)]), capsys.readouterr()

    return run


def test_findings_and_exit_status(call, project, teacher_weights):
    teachers = [{"CONFIG": "teacher.yaml", "WEIGHTS": teacher_weights["teacher"]}]
    opts = ["DISTILL.TEACHERS", teachers, "DISTILL.WARMUP_ITERS", 2]
    status, printed = call(project / "student.yaml", "--images", 0, *opts)
    assert status == 0 and "0 errors" in printed.out and "ok       levels:" in printed.out
    status, _ = call(project / "student.yaml", "--images", 0, "--strict", *opts, "INPUT.MIN_SIZE_TEST", 64)
    assert status == 1

    status, printed = call(project / "student.yaml", "--json")  # whose teacher has not been trained
    found = json.loads(printed.out)
    (error,) = [f for f in found if f["level"] == "error"]
    assert status == 1 and error["check"] == "teacher's weights" and error["fix"]
    status, printed = call(project / "nothing.yaml")
    assert status == 2 and "no config file" in printed.err


def test_every_stage_of_a_curriculum_is_looked_at(call, project, teacher_weights, tmp_path):
    """As the run that it will be, from the student of the stage before; nothing is trained."""
    teachers = [{"NAME": "a", "CONFIG": "teacher.yaml", "WEIGHTS": teacher_weights["teacher"]}]
    stages = [{"TEACHERS": ["a"]}, {"TEACHERS": ["a"], "DISTILL": {"LOSSES": [{"NAME": "NoSuchLoss"}]}}]
    arguments = [project / "student.yaml", "--images", 0, "OUTPUT_DIR", tmp_path / "run", "DISTILL.TEACHERS", teachers]
    status, printed = call(*arguments, "DISTILL.STAGES", stages)
    first, second = printed.out.split("stage2:")
    assert status == 1 and first.startswith("stage1:") and " 0 errors" in first.replace("\n", " ")
    assert "unknown loss 'NoSuchLoss'" in second and "1 errors" in second

    status, printed = call(*arguments, "--json", "DISTILL.STAGES", [stages[0], stages[0]])
    found = json.loads(printed.out)
    assert status == 0 and {f["stage"] for f in found} == {"stage1", "stage2"}
    (start,) = [f for f in found if f["stage"] == "stage2" and f["check"] == "student's weights"]
    assert start["text"] == f"{tmp_path}/run/stage1/model_final.pth will be written by the stage before"
    assert not (tmp_path / "run").exists()
    status, printed = call(*arguments, "DISTILL.STAGES", [{"TEACHERS": ["b"]}])
    assert status == 2 and "no teacher is named 'b'" in printed.err
