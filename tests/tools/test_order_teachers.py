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


def test_errors_are_one_sentence(call, tmp_path):
    for args, words in (
        (["--normalized"], "no normalized_costs"),
        (["--quality", "IV"], "--quality takes NAME=AP, got 'IV'"),
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
