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
