"""tools/compare.py: its command line and what it writes, from runs that are finished."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "compare.py"


@pytest.fixture
def call(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("compare_tool", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, args)])
        return module.main(), capsys.readouterr()

    return run


@pytest.fixture
def finished(project, tmp_path):
    """Results of two rows over three seeds, and the third row's failure."""
    for row, offset in (("fcos", 0.0), ("gfl", 2.0)):
        for seed in range(3):
            folder = tmp_path / f"seed{seed}" / row
            folder.mkdir(parents=True)
            results = {row: {"bbox": {"AP": 20.0 + seed + offset * (1 + seed / 10), "AP50": 40.0}}}
            clock = {"iterations": 6, "seconds": 3.0, "cpu_seconds": 3.0, "steps": 6}
            (folder / "result.json").write_text(json.dumps({"fingerprint": "x", **clock, "results": results}))
    (tmp_path / "seed0/retinanet").mkdir()
    (tmp_path / "seed0/retinanet/failed.txt").write_text("ValueError: no GPU")
    return tmp_path


def test_report_of_finished_runs(call, project, finished):
    files = [project / f"{name}.yaml" for name in ("fcos", "gfl", "retinanet")]
    args = ["--output", finished, "--report-only", "--equal-time"]
    status, printed = call(*files, *args, "--", "SOLVER.IMS_PER_BATCH", 1)
    assert status == 0 and "+2.20 ± 0.50 *" in printed.out and "retinanet, seed 0: ValueError: no GPU" in printed.out
    data = json.loads((finished / "compare.json").read_text())
    assert data["reference"] == "fcos" and len([r for r in data["runs"] if r["kind"] == "row"]) == 7
    for name in ("compare.md", "compare.png", "differences.png"):
        assert (finished / name).stat().st_size > 500


def test_bad_command_lines_are_one_sentence(call, project, tmp_path):
    status, printed = call(project / "fcos.yaml", "--reference", "gfl", "--report-only", "--output", tmp_path)
    assert status == 2 and printed.err == "error: --reference gfl is none of the rows fcos\n"
    status, printed = call(tmp_path / "none.yaml", "--report-only", "--output", tmp_path)
    assert status == 2 and "no config file" in printed.err
    status, printed = call(tmp_path / "Base.yaml", "--report-only")
    assert status == 2 and "no yaml file to compare" in printed.err
    status, printed = call(project / "fcos.yaml", "--devices", "gpu0", "--output", tmp_path)
    assert status == 2 and "cuda:0" in printed.err
