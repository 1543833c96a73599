"""tools/order_teachers.py: from a typed table to stages."""

from __future__ import annotations

import pytest
import yaml
from load_tool import load_tool

TABLE = """
student: S
quality: {I: 38.2, II: 38.7, III: 42.3, IV: 49.1}
costs:
  S: {I: 0.939, II: 0.060, III: 1.568, IV: 1.254}
  I: {II: 0.070, III: 0.934, IV: 0.963}
  II: {I: 1.181, III: 1.940, IV: 1.401}
  III: {I: 0.484, II: 0.082, IV: 0.890}
  IV: {I: 0.767, II: 0.077, III: 1.248}
"""


@pytest.fixture
def call(tmp_path, capsys):
    module = load_tool("order_teachers")
    (tmp_path / "costs.yaml").write_text(TABLE)

    def run(*args):
        return module.main([str(tmp_path / "costs.yaml"), *map(str, args)]), capsys.readouterr()

    return run


def test_the_papers_table_gives_the_papers_path(call, tmp_path):
    status, printed = call("--k", 3, "--output", tmp_path / "new" / "stages.yaml")
    assert status == 0 and "algorithm1: S -> I -> III -> IV" in printed.out
    assert "II -> I -> IV" in printed.out and "2.204" in printed.out  # the shortest path by the sum
    stages = yaml.safe_load((tmp_path / "new" / "stages.yaml").read_text())["DISTILL"]["STAGES"]
    assert stages == [{"TEACHERS": ["I"]}, {"TEACHERS": ["III"]}, {"TEACHERS": ["IV"]}]


def test_another_rule_and_other_performances(call):
    status, printed = call("--rule", "sum", "--k", 2)
    assert status == 0 and "sum: S -> II -> IV" in printed.out
    status, printed = call("--rule", "sum", "--at-most")
    assert status == 0 and "sum: S -> IV\n" in printed.out
    status, printed = call("--k", 1, "--quality", "III=60")
    assert status == 0 and "algorithm1: S -> III" in printed.out


def test_shorter_stages_have_a_shorter_schedule(call, project, tmp_path):
    solver = {"MAX_ITER": 12, "STEPS": [6, 9], "WARMUP_ITERS": 4}
    distill = {"START_ITER": 4, "TEACHERS": []}
    config = {"_BASE_": f"{project}/student.yaml", "SOLVER": solver, "DISTILL": distill}
    (tmp_path / "student.yaml").write_text(yaml.safe_dump(config))
    table = yaml.safe_load(TABLE) | {"config": str(tmp_path / "student.yaml"), "weights": "student.pth"}
    (tmp_path / "costs.yaml").write_text(yaml.safe_dump(table))
    status, printed = call("--max-iter", 3, "--k", 1, "--output", tmp_path / "stages.yaml")
    assert status == 0, printed.err
    (stage,) = yaml.safe_load((tmp_path / "stages.yaml").read_text())["DISTILL"]["STAGES"]
    assert stage["SOLVER"] == {"MAX_ITER": 3, "STEPS": [2, 2], "WARMUP_ITERS": 1}
    assert stage["DISTILL"]["START_ITER"] == 1


def test_without_the_yaml_only_the_number_is_known(call, tmp_path):
    assert call("--max-iter", 3, "--k", 1, "--output", tmp_path / "stages.yaml")[0] == 0
    (stage,) = yaml.safe_load((tmp_path / "stages.yaml").read_text())["DISTILL"]["STAGES"]
    assert stage == {"TEACHERS": ["IV"], "SOLVER": {"MAX_ITER": 3}}


def test_errors_are_one_sentence(call, tmp_path):
    for args, words in (
        (["--normalized"], "no normalized_costs"),
        (["--quality", "IV"], "--quality takes NAME=AP, got 'IV'"),
        (["--quality", "IV=nan"], "--quality takes NAME=AP, got 'IV=nan'"),
        (["--quality", "V=3"], "'V' has a quality but no costs"),
        (["--k", "0"], "at least 1"),
        (["--output", tmp_path / "costs.yaml"], "would overwrite an input"),
    ):
        status, printed = call(*args)
        assert status == 2 and words in printed.err and printed.err.count("\n") == 1
    assert (tmp_path / "costs.yaml").read_text() == TABLE


def test_overrides_have_no_place_here(call, capsys):
    with pytest.raises(SystemExit) as stop:
        call("SOLVER.MAX_ITER", "3")
    assert stop.value.code == 2 and "overrides belong to train_net.py" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        call("--qality", "III=60")
    assert stop.value.code == 2 and "did you mean --quality" in capsys.readouterr().err
