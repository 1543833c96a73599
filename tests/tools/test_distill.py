"""``msad distill`` from data to what ships, interrupted after every step, and from an installed package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from load_tool import load_tool

import msad
from msad import load_config
from msad.data.synthetic import make_dataset
from msad.product import results

ROOT = Path(__file__).parents[2]
TINY = {"backbone": "tiny", "iterations": 2, "short_side": 64, "threads": 1, "opts": ("SOLVER.IMS_PER_BATCH", "2")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "shapes"
    make_dataset(folder, num_train=4, num_val=2, size=(64, 64), seed=1, objects=(2, 3), min_size=12)
    return folder


@pytest.fixture(scope="module")
def tool():
    return load_tool("distill")


def test_interrupted_after_every_step(data, tmp_path, monkeypatch):
    out, said, asked = tmp_path / "out", [], []

    def call(answer=True):
        def confirm(plan):
            asked.append(plan)
            return answer

        return msad.distill(data, out, **TINY, confirm=confirm, say=said.append, steps=1)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    # The plan is shown, and no is an answer.
    assert call(answer=False) is None and not (out / "runs").exists()
    assert "student_L: 2 iterations of" in said[0] and "4 images (median short side 64 px)" in said[0]
    stamps = {"plan": (out / "measured.json").stat().st_mtime_ns}

    # Trained, and stopped before the report.
    with monkeypatch.context() as patch:
        patch.setattr(results, "costs_of_trained", stop)
        with pytest.raises(KeyboardInterrupt):
            call()
    assert len(asked) == 2 and asked[0].runs == asked[1].runs  # measured once
    runs = {name: out / "runs/seed0" / name / "model_final.pth" for name in ("teacher", "student_L")}
    stamps |= {name: file.stat().st_mtime_ns for name, file in runs.items()}

    # Reported, and stopped in the export.
    with monkeypatch.context() as patch:
        patch.setattr(results, "export_onnx", stop)
        with pytest.raises(KeyboardInterrupt):
            call()
    stamps["panels"] = (out / "report/panels.jpg").stat().st_mtime_ns

    result = call()
    assert len(asked) == 2  # nothing was left to train
    assert stamps == {
        "plan": (out / "measured.json").stat().st_mtime_ns,
        **{name: file.stat().st_mtime_ns for name, file in runs.items()},
        "panels": (out / "report/panels.jpg").stat().st_mtime_ns,
    }
    assert list(result.metrics) == ["student_L", "teacher_fused", "teacher_H", "teacher_L"]
    assert result.cost["student_L"]["gmacs"]["total"] == result.cost["teacher_L"]["gmacs"]["total"]
    assert load_config(result.config).INPUT.MIN_SIZE_TEST == 32 and result.weights.is_file()
    assert result.report.is_file() and "student_L" in result.report.read_text()
    written = json.loads(result.report.with_name("report.json").read_text())
    assert {name for run in written["runs"] for name in run["results"]} == set(result.metrics) == set(written["cost"])
    card = result.card.read_text()
    assert str(tmp_path) not in card.split("## Made with")[0]  # it may be moved
    assert "fcos on tiny" in card and "short side of 32 px: 1/2 of the 64 px" in card and "licence: none used" in card
    assert f"{result.cost['student_L']['gmacs']['total']:.3f}" in card
    if result.onnx is not None:  # onnx and onnxruntime are optional
        image = next((data / "images").glob("*"))
        command = [sys.executable, result.runner, result.onnx, "--input", image, "--output", tmp_path / "found"]
        subprocess.run(command, check=True, capture_output=True)
        assert (tmp_path / "found/detections.json").is_file()

    exported = result.weights.stat().st_mtime_ns
    call()
    assert result.weights.stat().st_mtime_ns == exported
    result.weights.unlink()  # what is gone is made again
    with monkeypatch.context() as patch:
        patch.setattr(results, "export_onnx", lambda *args: (_ for _ in ()).throw(ValueError("no such form")))
        again = call()
    assert again.weights.is_file() and again.onnx is None and "no such form" in again.card.read_text()
    assert runs["student_L"].stat().st_mtime_ns == stamps["student_L"]

    with pytest.raises(ValueError, match="holds a run of another configuration"):
        msad.distill(data, out, **{**TINY, "iterations": 3}, say=said.append, steps=1)


SCRIPT = """
import json, sys
import msad
assert "site" in msad.__file__
result = msad.distill(sys.argv[1], "out", backbone="tiny", detector="faster_rcnn", method="none", iterations=1,
                      short_side=64, threads=1, steps=1, opts=("SOLVER.IMS_PER_BATCH", 2))
print(json.dumps({"metrics": result.metrics, "weights": str(result.weights), "card": str(result.card)}))
"""


def yolo_of(data, folder):
    """The same data as a YOLO folder, and a line that is no label."""
    for split in ("train", "val"):
        content = json.loads((data / f"annotations_{split}.json").read_text())
        (folder / split / "images").mkdir(parents=True)
        (folder / split / "labels").mkdir()
        for image in content["images"]:
            stem, size = Path(image["file_name"]).stem, (image["width"], image["height"])
            pixels = cv2.imread(str(data / "images" / image["file_name"]))
            cv2.imwrite(str(folder / split / f"images/{stem}.png"), pixels)
            lines = ["no label"] if split == "train" else []
            for a in (a for a in content["annotations"] if a["image_id"] == image["id"]):
                x, y, w, h = (v / size[i % 2] for i, v in enumerate(a["bbox"]))
                lines.append(f"{a['category_id'] - 1} {x + w / 2} {y + h / 2} {w} {h}")
            (folder / split / f"labels/{stem}.txt").write_text("\n".join(lines))
    names = [c["name"] for c in content["categories"]]
    (folder / "data.yaml").write_text(json.dumps({"train": "train/images", "val": "val/images", "names": names}))


def test_an_installed_package_and_a_yolo_folder(data, tmp_path):
    import detectron2

    site = tmp_path / "site"
    shutil.copytree(ROOT / "projects/MSAD/msad", site / "msad", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tools", site / "msad/tools")
    shutil.copytree(ROOT / "configs", site / "msad/configs")
    yolo_of(data, tmp_path / "yolo")
    engine = str(Path(detectron2.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), engine])}
    (tmp_path / "call.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "call.py", "yolo"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "is no label: not all are numbers, left out (4 in all)" in done.stdout
    result = json.loads(done.stdout.splitlines()[-1])
    assert list(result["metrics"]) == ["student_L"] and "AP" in result["metrics"]["student_L"]["bbox"]
    assert (tmp_path / result["weights"]).is_file()
    assert "yolo" in (tmp_path / result["card"]).read_text()
    assert json.loads((tmp_path / "out/data/annotations_train.json").read_text())["categories"]


def test_bad_input_is_one_sentence(tool, data, tmp_path, capsys, monkeypatch):
    def without_objects(split):
        """A YOLO folder whose labels of a split are in pixels, which are left out."""
        for part in ("train", "val"):
            file = tmp_path / f"no_{split}/labels/{part}/a.txt"
            file.parent.mkdir(parents=True)
            file.write_text("0 50 50 20 20\n" if part == split else "0 0.5 0.5 0.2 0.2\n")
            image = tmp_path / f"no_{split}/images/{part}/a.png"
            image.parent.mkdir(parents=True)
            cv2.imwrite(str(image), np.zeros((100, 100, 3), np.uint8))
        file = tmp_path / f"no_{split}/data.yaml"
        file.write_text("{train: images/train, val: images/val, names: [wren]}")
        return file

    for argv, said in (
        ([tmp_path / "nowhere"], "no such folder"),
        ([tmp_path], "in none of the layouts"),
        ([data, "--from", "x.pth"], "--from CHECKPOINT and --config YAML belong together"),
        ([data, "--backbone", "resnet18"], "no package has its ImageNet weights"),
        ([data, "--short-side", "0"], "--short-side must be at least 1"),
        ([data, "SOLVER.MAX_ITR", "3"], "did you mean SOLVER.MAX_ITER"),
        ([data, "--devices", "gpu"], "gpu"),
        ([without_objects("train")], "the training images have no object; "),
        ([without_objects("val")], "the validation images have no object; "),
    ):
        out, backbone = tmp_path / "out", [] if "--backbone" in argv else ["--backbone", "tiny"]
        assert tool.main([*map(str, argv), "--output", str(out), *backbone]) == 2
        error = capsys.readouterr().err
        assert said in error and error.startswith("distill: error: ")
        assert not (out / "runs").exists()
    assert tool.main([str(data), "--output", str(data), "--backbone", "tiny"]) == 2
    assert "would write into the data" in capsys.readouterr().err
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    with pytest.raises(ValueError, match="add --yes"):
        tool.ask(None)
