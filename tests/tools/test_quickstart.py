"""tools/quickstart.py from drawing scenes to the report, with a handful of iterations."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from load_tool import load_tool
from yolo_data import write_yolo

from msad import cli, load_config
from msad.data.synthetic import make_dataset

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "tools" / "quickstart.py"
VARIANTS = ["baseline_L", "teacher", "student_L", "baseline_equal_cost"]
SCENES = {"num_train": 8, "num_val": 4, "size": (96, 96), "objects": (3, 5), "min_size": 16.0, "seed": 0}


@pytest.fixture(scope="module")
def quickstart():
    module = load_tool("quickstart")
    module.SYNTHETIC = SCENES
    return module


def test_from_scenes_to_report(quickstart, tmp_path, capsys):
    args = ["--output", str(tmp_path), "SOLVER.IMS_PER_BATCH", "2", "--iterations", "4", "--variants", *VARIANTS]
    assert quickstart.main(args) == 0
    data = json.loads((tmp_path / "report.json").read_text())
    results = {name: run for run in data["runs"] for name in run["results"]}
    evaluated = {*VARIANTS, "teacher_H", "teacher_L", "teacher_fused"} - {"teacher"}
    assert set(results) == evaluated == set(data["cost"])
    assert all("AP" in r["results"][name]["bbox"] and r["iterations"] == 4 for name, r in results.items())
    assert {run["warmup"] for run in data["runs"]} == {1}  # of 50 in 800 iterations
    assert data["engine"].startswith("detectron2") and data["seconds"] > 0
    # The L branch alone costs what the student costs, and the fusion more than both branches.
    macs = {row: cost["gmacs"]["total"] for row, cost in data["cost"].items()}
    assert macs["teacher_L"] == pytest.approx(macs["student_L"], rel=1e-6)
    assert macs["teacher_fused"] > macs["teacher_H"] > macs["student_L"] > macs["baseline_L"]
    assert macs["baseline_equal_cost"] == pytest.approx(macs["student_L"], rel=0.1)
    for file in ("report.html", "report.md", "panels.jpg", "gallery.json", "gallery/000.jpg", "results.png",
                 "student_L/config.yaml", "student_L/model.pth"):  # fmt: skip
        assert (tmp_path / file).stat().st_size > 0
    assert "baseline_equal_cost" in capsys.readouterr().out

    # Finished runs are kept, whatever else is repeated.
    files = [tmp_path / "seed0" / name / "model_final.pth" for name in VARIANTS]
    stamps = [file.stat().st_mtime_ns for file in files]
    assert quickstart.main(args) == 0
    assert stamps == [file.stat().st_mtime_ns for file in files]
    again = json.loads((tmp_path / "report.json").read_text())
    assert again["runs"] == data["runs"] and again["seconds"] > data["seconds"]

    # Nor is another choice of variants hindered by what earlier ones left.
    assert quickstart.main([*args[:-len(VARIANTS)], "baseline_L"]) == 0

    # Results of another configuration are not mixed in.
    assert quickstart.main(["--output", str(tmp_path), "--iterations", "5", "--rows", "baseline_L"]) == 2
    assert "another configuration" in capsys.readouterr().err


def test_the_longest_control_is_left_out_on_the_scenes_alone(quickstart, tmp_path):
    def names(*options):
        argv = ["--output", str(tmp_path / "out"), *options]
        return set(quickstart.make_study(cli.parse(quickstart.make_parser(), argv)).variants)

    make_dataset(tmp_path / "own", **SCENES)
    longest = {"baseline_L_shifted@equal_iterations"}
    assert names() | longest == names("--data", str(tmp_path / "own")) != names()
    assert longest < names("--variants", "all")


def test_failures_are_named(quickstart, tmp_path, capsys):
    args = ["--output", str(tmp_path), "--iterations", "1", "--variants", "student_L", "SOLVER.IMS_PER_BATCH", "2"]
    assert quickstart.main([*args, "SOLVER.LR_SCHEDULER_NAME", "NoSuch"]) == 1
    error = capsys.readouterr().err
    assert "teacher, seed 0: " in error and "NoSuch" in error
    assert "student_L, seed 0: not run, because what it needs (teacher, seed 0) failed" in error
    assert not (tmp_path / "report.html").exists()


def test_bad_command_lines_are_one_sentence(quickstart, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    assert quickstart.main(["--data", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "annotations_train.json" in capsys.readouterr().err
    for value in ("0", "-5", "many"):
        with pytest.raises(SystemExit, match="2"):
            quickstart.main(["--iterations", value])
        assert f"--iterations: must be at least 1, got {value}" in capsys.readouterr().err


def test_data_fit_any_detector(quickstart, tmp_path, capsys):
    make_dataset(tmp_path / "coco_2017", **{**SCENES, "num_train": 1, "num_val": 1, "classes": ("disc", "ring")})
    files = [REPOSITORY / "configs/quickstart/baseline_H.yaml", REPOSITORY / "configs/nuclei/gfl/student_L.yaml",
             REPOSITORY / "configs/quickstart/Base-RCNN.yaml"]  # fmt: skip
    opts = quickstart.data_opts(tmp_path / "coco_2017", tmp_path / "out", files, [])
    assert "masks are ignored" in (error := capsys.readouterr().err) and "keypoints are ignored" in error
    cfg = load_config(files[0], opts)
    assert (cfg.MODEL.FCOS.NUM_CLASSES, cfg.MODEL.GFL.NUM_CLASSES, cfg.MODEL.ROI_HEADS.NUM_CLASSES) == (2, 2, 2)
    assert cfg.DATASETS.TRAIN == ("data_coco_2017_train",)  # not detectron2's own coco_2017_train
    quickstart.data_opts(tmp_path / "coco_2017", tmp_path / "out", files, ["MODEL.MASK_ON", True])
    assert "masks" not in capsys.readouterr().err


def test_converted_data_lie_in_the_output(quickstart, tmp_path):
    """Which the runs' configs name, and not in the cache."""
    write_yolo(tmp_path / "mine", ["cat", "dog"])
    argv = ["--data", str(tmp_path / "mine"), "--output", str(tmp_path / "out"), "--variants", "baseline_L"]
    study = quickstart.make_study(cli.parse(quickstart.make_parser(), argv))
    entries = study.config(study.runs()[0]).DATASETS.REGISTER
    files = [tmp_path / "out/data" / f"annotations_{split}.json" for split in ("train", "val")]
    assert [entry["JSON"] for entry in entries] == [str(file) for file in files] and all(f.is_file() for f in files)


@pytest.mark.slow
def test_corrected_labels_are_trained_again(tmp_path):
    """In processes of its own, as a user repeats a command."""
    make_dataset(tmp_path / "data", **SCENES)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    args = ["--data", tmp_path / "data", "--output", tmp_path / "out", "--iterations", "2", "--variants", "baseline_L"]
    command = [sys.executable, SCRIPT, *args, "SOLVER.IMS_PER_BATCH", "2"]
    run = tmp_path / "out/seed0/baseline_L"
    assert subprocess.run(command, env=env).returncode == 0
    first = (run / "result.json").stat().st_ino
    file = tmp_path / "data/annotations_train.json"
    content = json.loads(file.read_text())
    for annotation in content["annotations"]:
        annotation["category_id"] = 3 - annotation["category_id"] if annotation["category_id"] < 3 else 3
    file.write_text(json.dumps(content))
    said = subprocess.run(command, env=env, capture_output=True, text=True)
    assert said.returncode == 0 and "training data have changed" in said.stdout
    assert (run.with_name("baseline_L~1") / "result.json").stat().st_ino == first
