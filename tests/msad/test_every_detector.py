"""Every detector and task from the first iteration to the exported student, in miniature."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch
import yaml
from detectron2.modeling import build_model
from runs import assert_equal_weights
from test_plain_student import detections

from msad import load_config
from msad.data import register_datasets
from msad.distill.distiller import student_shapes
from msad.engine import DistillTrainer
from msad.engine.setup import evaluate, evaluate_branches, load_model
from msad.export.plain import export

PLAIN_RCNN = Path(__file__).parents[2] / "projects/MSAD/plain/plain_rcnn.py"
FIT = Path(__file__).parents[2] / "tools" / "fit_mask_code.py"
SMALL = {"MIN_SIZE_TEST": 32, "MAX_SIZE_TEST": 32}
BOX_AND_MASK = {"bbox", "segm"}
TASKS = {
    "MaskRCNN": BOX_AND_MASK, "CascadeMaskRCNN": BOX_AND_MASK, "MEInst": BOX_AND_MASK,
    "CascadeMask": BOX_AND_MASK, "HTC": BOX_AND_MASK,
    "KeypointRCNN": {"bbox", "keypoints"},
}  # fmt: skip
DENSE = {  # the first key says which levels are read
    "FCOS": {"MODEL": {"FCOS": {"CONV_DIMS": [32], "NORM": "", "NUM_CLASSES": 6, "SCORE_THRESH_TEST": 0.001}}},
    "MEInst": {
        "MODEL": {
            "FCOS": {"CONV_DIMS": [32], "NORM": "", "NUM_CLASSES": 6, "SCORE_THRESH_TEST": 0.001},
            "MEINST": {"DIM": 8}, "MASK_ON": True,
        }
    },
    "GFL": {"MODEL": {"GFL": {"CONV_DIMS": [32], "NORM": "", "NUM_CLASSES": 6, "SCORE_THRESH_TEST": 0.001}}},
    "RepPoints": {
        "MODEL": {
            "REPPOINTS": {
                "CONV_DIMS": [32], "POINT_DIM": 16, "NORM": "", "NUM_CLASSES": 6, "SCORE_THRESH_TEST": 0.001,
            },
        }
    },
    "RetinaNet": {"MODEL": {"RETINANET": {"NUM_CLASSES": 6, "NUM_CONVS": 1, "SCORE_THRESH_TEST": 0.001}}},
}
NUM_KEYPOINTS = 5  # of the synthetic scenes
RCNN = {
    "FasterRCNN": {},
    "MaskRCNN": {"MASK_ON": True},
    "KeypointRCNN": {"KEYPOINT_ON": True},
    "CascadeRCNN": {"ROI_HEADS": {"NAME": "CascadeROIHeads"}, "ROI_BOX_HEAD": {"CLS_AGNOSTIC_BBOX_REG": True}},
    "CascadeMaskRCNN": {
        "ROI_HEADS": {"NAME": "CascadeROIHeads"}, "ROI_BOX_HEAD": {"CLS_AGNOSTIC_BBOX_REG": True}, "MASK_ON": True,
    },
    "CascadeMask": {
        "ROI_HEADS": {"NAME": "CascadeMaskROIHeads"}, "ROI_BOX_HEAD": {"CLS_AGNOSTIC_BBOX_REG": True}, "MASK_ON": True,
    },
    "HTC": {
        "ROI_HEADS": {"NAME": "HTCROIHeads"}, "ROI_BOX_HEAD": {"CLS_AGNOSTIC_BBOX_REG": True}, "MASK_ON": True,
        "ROI_MASK_HEAD": {"NAME": "HTCMaskHead", "CONV_DIM": 32},
    },
}  # fmt: skip


def merged(*parts: dict) -> dict:
    out: dict = {}
    for part in parts:
        for key, value in part.items():
            out[key] = merged(out.get(key, {}), value) if isinstance(value, dict) else value
    return out


def model_keys(arch: str, finest: int, c1: bool = False) -> dict:
    """yaml of the detector on five levels from P``finest``, with anchors of the size of a few cells.

    ``c1`` gives a dense detector the map C1, which R-CNNs always have.
    """
    levels = [f"p{level}" for level in range(finest, finest + 5)]
    features = [*["c1"] * (c1 or arch in RCNN), "res2", "res3", "res4", "res5"]
    keys = {
        "MODEL": {
            "META_ARCHITECTURE": "GeneralizedRCNN" if arch in RCNN else arch,
            "BACKBONE": {"NAME": "build_level_fpn_backbone"},
            "RESNETS": {"STEM_OUT_CHANNELS": 8, "RES2_OUT_CHANNELS": 8, "OUT_FEATURES": features},
            "FPN": {"BOTTOM_UP": "build_tiny_resnet_backbone", "IN_FEATURES": features, "LEVELS": levels},
            "ANCHOR_GENERATOR": {"SIZES": [[4 * 2**level] for level in range(finest, finest + 5)]},
        },
        "SOLVER": {"CLIP_GRADIENTS": {"ENABLED": True, "CLIP_TYPE": "norm", "CLIP_VALUE": 10.0}},
    }
    if arch not in RCNN:
        reads = {"MODEL": {next(iter(DENSE[arch]["MODEL"])): {"IN_FEATURES": levels}}}
        return merged(keys, DENSE[arch], reads)
    heads = {
        "FPN": {"TOP_BLOCK": "maxpool"},
        "RPN": {"IN_FEATURES": levels, "BATCH_SIZE_PER_IMAGE": 32, "POST_NMS_TOPK_TRAIN": 40, "POST_NMS_TOPK_TEST": 40},
        "ROI_HEADS": {
            "NAME": "StandardROIHeads", "IN_FEATURES": levels[:-1], "NUM_CLASSES": 6, "BATCH_SIZE_PER_IMAGE": 16,
            "SCORE_THRESH_TEST": 0.001,
        },
        "ROI_BOX_HEAD": {"NAME": "FastRCNNConvFCHead", "NUM_FC": 1, "FC_DIM": 16, "POOLER_RESOLUTION": 3},
        "ROI_MASK_HEAD": {
            "NAME": "MaskRCNNConvUpsampleHead", "NUM_CONV": 1, "CONV_DIM": 8, "POOLER_RESOLUTION": 4,
        },
        "ROI_KEYPOINT_HEAD": {"CONV_DIMS": [8], "NUM_KEYPOINTS": NUM_KEYPOINTS, "POOLER_RESOLUTION": 4},
    }  # fmt: skip
    return merged(keys, {"MODEL": merged(heads, RCNN[arch])})


def write(project: Path, folder: Path, name: str, keys: dict):
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"_BASE_": str(project / "base.yaml"), **keys}))
    cfg = load_config(path, ["OUTPUT_DIR", str(folder / name), "SOLVER.MAX_ITER", 2, "SOLVER.CHECKPOINT_PERIOD", 1])
    register_datasets(cfg)
    return cfg


def run(cfg, iterations: int, resume: bool) -> DistillTrainer:
    cfg.SOLVER.MAX_ITER = iterations
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume)
    trainer.train()
    return trainer


def losses_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def fit_code(project: Path, folder: Path) -> dict:
    """Fit MEInst's code to the training set with the tool; returns the key that names it."""
    spec = importlib.util.spec_from_file_location("fit_mask_code", FIT)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    keys = {"MODEL": {"MEINST": {"CODE": str(folder / "code.npz")}}}
    tool.fit(write(project, folder, "code", merged(model_keys("MEInst", 3), keys)))
    return keys


def student_keys(arch: str, kind: str, finest: int) -> dict:
    """yaml of the student of a teacher on levels from P``finest``: at L, at EL, or a fusion student at H."""
    if kind == "fusion":
        narrow = {"RESOLUTION": "H", "MODEL": {"RESNETS": {"STEM_OUT_CHANNELS": 4, "RES2_OUT_CHANNELS": 4}}}
        around = {
            "MODEL": {"META_ARCHITECTURE": "FusionStudent"},
            "MSAD": {"DETECTOR": arch, "FUSION_STUDENT": {"BRANCHES": [narrow, {"RESOLUTION": "L"}]}},
            "DISTILL": {"STUDENT_RESOLUTION": "H"},
        }
        return merged(model_keys(arch, finest), around)
    side = {"L": 32, "EL": 16}[kind]
    around = {"INPUT": {"MIN_SIZE_TEST": side, "MAX_SIZE_TEST": side}, "DISTILL": {"STUDENT_RESOLUTION": kind}}
    return merged(model_keys(arch, finest - {"L": 1, "EL": 2}[kind], c1=kind == "EL"), around)


@pytest.mark.parametrize(
    ("arch", "kind"), [*((arch, "L") for arch in (*DENSE, *RCNN)), ("FCOS", "EL"), ("FCOS", "fusion")]
)
def test_teacher_and_student(project, tmp_path, arch, kind):
    finest = 2 if arch in RCNN else 3
    tasks = TASKS.get(arch, {"bbox"})
    code = fit_code(project, tmp_path) if arch == "MEInst" else {}
    inner = merged(model_keys(arch, finest, c1=kind == "EL"), code)
    resolutions = ["H", "L", "EL"] if kind == "EL" else ["H", "L"]
    around = {"MODEL": {"META_ARCHITECTURE": "MultiScaleTeacher"}}
    around["MSAD"] = {"DETECTOR": inner["MODEL"]["META_ARCHITECTURE"], "RESOLUTIONS": resolutions}
    teacher_cfg = write(project, tmp_path, "teacher", merged(inner, around))
    teacher_cfg.DATASETS.TEST = ()
    run(teacher_cfg, 2, resume=False)
    resumed = run(teacher_cfg, 3, resume=True)
    assert resumed.start_iter == 2
    teacher_weights = f"{teacher_cfg.OUTPUT_DIR}/model_final.pth"
    teacher_cfg.DATASETS.TEST = ("tiny_val",)
    branches = evaluate_branches(teacher_cfg, load_model(teacher_cfg, teacher_weights))
    assert set(branches) == {"fused", *resolutions} and all(set(found) == tasks for found in branches.values())

    cfg = write(project, tmp_path, "student", merged(student_keys(arch, kind, finest), code, {
        "DISTILL": {
            "TEACHERS": [{"CONFIG": "teacher.yaml", "WEIGHTS": teacher_weights}],
            "LOSSES": [{"NAME": "AlignedL1", "WEIGHT": 0.6}], "WARMUP_ITERS": 1,
        },
    }))  # fmt: skip
    cfg.DATASETS.TEST = ()
    run(cfg, 2, resume=False)
    student = run(cfg, 3, resume=True)
    assert student.start_iter == 2
    assert_equal_weights(student.distiller.teacher.model.state_dict(), resumed.model.state_dict())
    assert any("loss_distill/AlignedL1" in line for line in losses_of(Path(cfg.OUTPUT_DIR)))
    levels = student_shapes(student.distiller.student, student.distiller.resolution)
    assert levels == student.distiller.teacher.shapes()  # each of its maps has its own of the teacher's

    weights = f"{cfg.OUTPUT_DIR}/model_final.pth"
    stored = torch.load(weights, weights_only=True)["model"]
    assert_equal_weights(stored, student.distiller.student.state_dict())
    cfg.DATASETS.TEST = ("tiny_val",)
    assert set(evaluate(cfg, load_model(cfg, weights))) == tasks
    export(cfg, weights, tmp_path / "exported")
    again = load_config(tmp_path / "exported" / "config.yaml")
    model = build_model(again)
    model.load_state_dict(torch.load(again.MODEL.WEIGHTS, weights_only=True)["model"])  # strictly
    assert_equal_weights(model.state_dict(), stored)


PLAIN = """
import os, runpy, sys
sys.modules["msad"] = None  # import msad raises an error
import cv2, torch
torch.set_num_threads(1)
example, folder, out, *images = sys.argv[1:]
sys.path.insert(0, os.path.dirname(example))
predictor = runpy.run_path(example)["build"](folder)
found = [predictor(cv2.imread(name))["instances"] for name in images]
torch.save([(x.pred_boxes.tensor, x.scores, x.pred_classes, x.pred_masks) for x in found], out)
"""


def test_rcnn_student_detects_the_same_without_msad(project, tmp_path):
    """Mask R-CNN with P1 of a stock ResNet, built by the documented file."""
    narrow = {
        "FPN": {"BOTTOM_UP": "build_resnet_c1_backbone"},
        "RESNETS": {"DEPTH": 50, "RES2_OUT_CHANNELS": 16, "WIDTH_PER_GROUP": 4, "NORM": "BN"},
    }
    cfg = write(project, tmp_path, "plain", merged(model_keys("MaskRCNN", 1), {"MODEL": narrow, "INPUT": SMALL}))
    cfg.DATASETS.TEST = ()
    run(cfg, 2, resume=False)
    weights = f"{cfg.OUTPUT_DIR}/model_final.pth"
    note = export(cfg, weights, tmp_path / "exported")
    assert note.endswith("projects/MSAD/plain/plain_rcnn.py builds it without msad.")
    files = sorted(map(str, (project / "data" / "images").glob("val_*.jpg")))
    arguments = [PLAIN_RCNN, tmp_path / "exported", tmp_path / "found.pth", *files]
    command = [sys.executable, "-c", PLAIN, *map(str, arguments)]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    expected = detections(cfg, weights, [cv2.imread(file) for file in files])
    for mine, theirs in zip(expected, torch.load(tmp_path / "found.pth")):
        assert len(mine[1]) >= 5 and theirs[3].shape[0] == len(mine[1])
        for a, b in zip(mine, theirs):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
