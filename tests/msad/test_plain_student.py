"""A student leaves the project: exported, or straight from training, it runs where msad cannot be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from runs import assert_equal_weights, train
from test_distributed import student_config

from msad import load_config
from msad.data import register_datasets
from msad.engine.setup import load_model
from msad.export.plain import by_itself, export, foreign_parts, split_config

EXAMPLE = Path(__file__).parents[2] / "projects/MSAD/plain/plain_fcos.py"

# Detections of the exported RetinaNet student, of its training checkpoint, and of FCOS students by plain_fcos.py.
PLAIN = """
import os, runpy, sys
sys.modules["msad"] = None  # import msad raises an error
import cv2, torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
torch.set_num_threads(1)
retinanet, yaml, weights, example, out, *rest = sys.argv[1:]
fcos, images = rest[:2], [cv2.imread(name) for name in rest[2:]]

def config(file):
    cfg = get_cfg()
    cfg.merge_from_file(file)
    return cfg

exported = config(retinanet + "/config.yaml")
exported.MODEL.WEIGHTS = f"{retinanet}/{exported.MODEL.WEIGHTS}"
build_model(exported).load_state_dict(torch.load(exported.MODEL.WEIGHTS, weights_only=True)["model"])  # strictly
predictors = {"exported": DefaultPredictor(exported)}
cfg = config(yaml)
cfg.MODEL.WEIGHTS = weights
predictors["training"] = DefaultPredictor(cfg)
found = {name: [p(image)["instances"] for image in images] for name, p in predictors.items()}
sys.path.insert(0, os.path.dirname(example))
plain = runpy.run_path(example)
for folder in fcos:
    model, cfg = plain["build"](folder)
    found[folder] = [plain["detect"](model, cfg, image) for image in images]
assert not [name for name in sys.modules if name.split(".")[0] == "msad" and sys.modules[name] is not None]
torch.save({k: [(i.pred_boxes.tensor, i.scores, i.pred_classes) for i in v] for k, v in found.items()}, out)
"""


def detections(cfg, weights, images):
    """What the project itself detects, with the resizing of detectron2's predictor."""
    model = load_model(cfg, weights)
    found = []
    for image in images:
        resize = T.ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST).get_transform(image)
        tensor = torch.as_tensor(resize.apply_image(image).astype("float32").transpose(2, 0, 1))
        with torch.no_grad():
            result = model([{"image": tensor, "height": image.shape[0], "width": image.shape[1]}])[0]["instances"]
        found.append((result.pred_boxes.tensor, result.scores, result.pred_classes))
    return found


def trained_checkpoint(cfg):
    """A run of a few iterations: every tensor has moved, BatchNorm has statistics."""
    register_datasets(cfg)
    Path(cfg.OUTPUT_DIR).mkdir()
    train(cfg)
    return f"{cfg.OUTPUT_DIR}/model_final.pth"


def fcos_student(project, output, *opts):
    """An FCOS student on a stock ResNet, as large models are; its head normalises over groups of two channels."""
    cfg = load_config(project / "student.yaml", [
        "MODEL.FPN.BOTTOM_UP", "build_resnet_backbone", "MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.WIDTH_PER_GROUP", 4,
        "MODEL.RESNETS.RES2_OUT_CHANNELS", 16, "MODEL.FCOS.CONV_DIMS", [64], "MODEL.FCOS.NORM", "GN",
        "SOLVER.MAX_ITER", 2, "DATASETS.TEST", (), "OUTPUT_DIR", str(output), *opts,
    ])  # fmt: skip
    cfg.DISTILL.TEACHERS[0]["WEIGHTS"] = str(project / "teacher.pth")
    return cfg


def test_students_detect_the_same_without_msad(project, teacher_weights, tmp_path):
    files = sorted(map(str, (project / "data" / "images").glob("val_*.jpg")))
    images = [cv2.imread(file) for file in files]
    expected = {}

    cfg = student_config(project, "stock_student", tmp_path / "run")
    cfg.DATASETS.TEST = ()
    weights = trained_checkpoint(cfg)
    note = export(cfg, weights, tmp_path / "retinanet")
    assert note.startswith(f"{tmp_path}/retinanet/config.yaml builds this model in plain detectron2, ")
    expected["exported"] = expected["training"] = detections(cfg, weights, images)

    # on the project's neck, and on detectron2's own, which has a P7 that this head does not read
    folders = [str(tmp_path / name) for name in ("level_fpn", "stock_fpn")]
    for folder, builder in zip(folders, ("build_level_fpn_backbone", "build_retinanet_resnet_fpn_backbone")):
        fcos = fcos_student(project, f"{folder}_run", "MODEL.BACKBONE.NAME", builder)
        fcos_weights = trained_checkpoint(fcos)
        export(fcos, fcos_weights, folder)
        expected[folder] = detections(fcos, fcos_weights, images)

    arguments = [tmp_path / "retinanet", project / "stock_student.yaml", weights, EXAMPLE, tmp_path / "found.pth"]
    command = [sys.executable, "-c", PLAIN, *arguments, *folders, *files]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pth")
    assert found.keys() == expected.keys()
    for name, per_image in expected.items():
        assert all(len(scores) >= 5 for _, scores, _ in per_image)
        for mine, theirs in zip(per_image, found[name]):
            for a, b in zip(mine, theirs):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_exported_files(project, teacher_weights, tmp_path):
    cfg = fcos_student(project, tmp_path / "run")
    torch.manual_seed(0)
    model = build_model(cfg)
    torch.save({"model": model.state_dict(), "optimizer": {"large": torch.zeros(9)}}, tmp_path / "trained.pth")
    note = export(cfg, str(tmp_path / "trained.pth"), tmp_path / "out")
    assert note.startswith("To build this model, msad.load_config(") and "MODEL.META_ARCHITECTURE FCOS, " in note
    assert "MODEL.BACKBONE.NAME build_level_fpn_backbone" in note and "build_resnet_backbone" not in note
    assert note.endswith("projects/MSAD/plain/plain_fcos.py builds it without msad.") and "\n" not in note

    content = torch.load(tmp_path / "out" / "model.pth", weights_only=True)
    assert set(content) == {"model"}
    assert_equal_weights(content["model"], model.state_dict())

    plain = get_cfg()
    plain.merge_from_file(str(tmp_path / "out" / "config.yaml"))  # an unknown key is an error
    assert plain.MODEL.WEIGHTS == "model.pth"
    assert plain.MODEL.RESNETS.WIDTH_PER_GROUP == 4
    assert plain.INPUT.MIN_SIZE_TEST == 32 and plain.INPUT.MIN_SIZE_TRAIN == (32,)
    text = (tmp_path / "out" / "config.yaml").read_text()
    for own in ("MSAD", "DISTILL", "REGISTER", "OPTIMIZER", "BOTTOM_UP", "LEVELS", "BLOCKS", "COMPILE"):
        assert own not in text
    # with msad, the two files give back everything but the teacher
    whole = load_config(tmp_path / "out" / "config.yaml")
    whole.MODEL.WEIGHTS, whole.OUTPUT_DIR = cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR
    assert whole.dump() == by_itself(cfg).dump()


def test_exporting_again_leaves_no_stale_file(project, teacher_weights, tmp_path):
    stale = [tmp_path / name for name in ("msad.yaml", "metadata.json")]
    for file in stale:
        file.write_text("old")
    cfg = load_config(project / "stock_student.yaml", ["DATASETS.TRAIN", (), "DATASETS.TEST", ()])
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "trained.pth")
    export(cfg, str(tmp_path / "trained.pth"), tmp_path)
    assert not any(file.exists() for file in stale)


def test_teacher_can_be_exported_too(project, teacher_weights, tmp_path):
    cfg = load_config(project / "teacher.yaml")
    note = export(cfg, teacher_weights["teacher"], tmp_path)
    assert "MODEL.META_ARCHITECTURE MultiScaleTeacher" in note and "plain_fcos" not in note


def test_only_a_complete_checkpoint_is_exported(project, teacher_weights, tmp_path):
    cfg = load_config(project / "teacher.yaml")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint absent.pth"):
        export(cfg, "absent.pth", tmp_path / "out")
    weights = torch.load(teacher_weights["teacher"], weights_only=True)["model"]
    weights.pop("detector.head.cls_score.bias")
    torch.save({"model": weights}, tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"part.pth is not a checkpoint of this config: 1 tensors .*cls_score.bias"):
        export(cfg, str(tmp_path / "part.pth"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_config_is_split_by_the_keys_that_detectron2_has(project):
    cfg = load_config(project / "stock_student.yaml", ["SOLVER.OPTIMIZER", "AdamW", "SOLVER.MAX_ITER", 9])
    known, own = split_config(cfg, get_cfg())
    assert known["SOLVER"] == {
        "IMS_PER_BATCH": 2, "MAX_ITER": 9, "STEPS": [], "WARMUP_ITERS": 0,
    }  # fmt: skip
    assert own["SOLVER"].pop("OPTIMIZER") == "AdamW" and "REFERENCE_BATCH_SIZE" in own["SOLVER"]
    assert not set(own["SOLVER"]) & set(get_cfg().SOLVER)
    assert yaml.safe_load(yaml.safe_dump(known)) == known and "MSAD" in own
    assert not foreign_parts(cfg)
