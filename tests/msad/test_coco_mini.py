"""Every task on real COCO images, where the folder coco_mini is below DETECTRON2_DATASETS."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from test_every_detector import TASKS, merged, model_keys, run, write

from msad.engine.setup import evaluate, evaluate_branches, load_model

DATA = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).absolute() / "coco_mini"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data set in {DATA}")
PERSON_POINTS = 17


def data_keys(folder: Path, arch: str) -> dict:
    """The data set as it is; for keypoints only the category that has them, as in COCO's own keypoint files."""
    entries = []
    for split in ("train", "val"):
        source = DATA / f"annotations_{split}.json"
        if arch == "KeypointRCNN":
            content = json.loads(source.read_text())
            content["categories"] = [c for c in content["categories"] if c.get("keypoints")]
            kept = {c["id"] for c in content["categories"]}
            content["annotations"] = [a for a in content["annotations"] if a["category_id"] in kept]
            source = folder / f"persons_{split}.json"
            source.write_text(json.dumps(content))
        name = f"coco_mini_{split}" + ("_persons" if arch == "KeypointRCNN" else "")
        entries.append({"NAME": name, "JSON": str(source), "IMAGES": str(DATA / "images")})
    # One definition a name: the files of different runs lie in different folders.
    names = [f"{entry['NAME']}_{folder.name}" for entry in entries]
    entries = [dict(entry, NAME=name) for entry, name in zip(entries, names)]
    return {"DATASETS": {"REGISTER": entries, "TRAIN": names[:1], "TEST": names[1:]}}


@pytest.mark.parametrize("arch", ["FCOS", "MaskRCNN", "KeypointRCNN"])
def test_teacher_and_student_on_coco(project, tmp_path, arch):
    torch.set_num_threads(1)
    finest = 2 if arch in TASKS else 3
    classes = 1 if arch == "KeypointRCNN" else 80
    heads = {"FCOS": {"NUM_CLASSES": classes}, "ROI_HEADS": {"NUM_CLASSES": classes}}
    heads["ROI_KEYPOINT_HEAD"] = {"NUM_KEYPOINTS": PERSON_POINTS}
    sizes = {"MIN_SIZE_TRAIN": [128], "MAX_SIZE_TRAIN": 192, "MIN_SIZE_TEST": 128, "MAX_SIZE_TEST": 192}
    common = merged({"MODEL": heads, "INPUT": sizes}, data_keys(tmp_path, arch))
    teacher_keys = merged(model_keys(arch, finest), common)
    teacher_keys["MSAD"] = {"DETECTOR": teacher_keys["MODEL"]["META_ARCHITECTURE"]}
    teacher_keys["MODEL"]["META_ARCHITECTURE"] = "MultiScaleTeacher"
    teacher = write(project, tmp_path, "teacher", teacher_keys)
    tests = teacher.DATASETS.TEST
    teacher.DATASETS.TEST = ()
    run(teacher, 2, resume=False)
    weights = f"{teacher.OUTPUT_DIR}/model_final.pth"
    teacher.DATASETS.TEST = tests
    found = evaluate_branches(teacher, load_model(teacher, weights))

    student = write(project, tmp_path, "student", merged(model_keys(arch, finest - 1), common, {
        "INPUT": {"MIN_SIZE_TEST": 64, "MAX_SIZE_TEST": 96},
        "DISTILL": {
            "TEACHERS": [{"CONFIG": "teacher.yaml", "WEIGHTS": weights}],
            "LOSSES": [{"NAME": "AlignedL1", "WEIGHT": 0.6}], "WARMUP_ITERS": 1,
        },
    }))  # fmt: skip
    student.DATASETS.TEST = ()
    run(student, 2, resume=False)
    student.DATASETS.TEST = tests
    found["student"] = evaluate(student, load_model(student, f"{student.OUTPUT_DIR}/model_final.pth"))
    for results in found.values():
        assert set(results) == TASKS.get(arch, {"bbox"})
        assert all(math.isfinite(task["AP"]) for task in results.values())
