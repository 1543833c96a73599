"""configs/Progressive: the rows of the paper's tables are files, and students and teachers can be compared."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from msad import load_config
from msad.distill.distiller import student_shapes
from msad.distill.losses import build_losses
from msad.distill.teachers import Ensemble, FrozenTeacher
from msad.engine.build import teacher_entries
from msad.engine.stages import stage_configs, total_iterations
from msad.resolution import get_resolution

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "Progressive"
PAGE = (ROOT / "docs" / "PROGRESSIVE.md").read_text()


def curriculum(name):
    return load_config(FOLDER / f"{name}.yaml", ["MODEL.DEVICE", "meta"])


@functools.cache
def shapes_of(config, scale):
    device, options = "meta", []
    if "Swin" in str(config):  # detectron2 reads its drop rates from a tensor, and needs timm for them
        device, options = "cpu", ["MODEL.SWIN.DROP_PATH_RATE", 0.0]
    with torch.device(device):
        model = build_model(load_config(config, ["MODEL.DEVICE", device, *options]))
    return FrozenTeacher(model, scale=scale).shapes()


def test_the_page_names_every_file_and_no_other():
    files = {file.stem for file in FOLDER.glob("*.yaml") if not file.name.startswith("Base")}
    named = set(re.findall(r"`((?:retinanet|mask_rcnn|reppoints|argoverse|teacher)_[\w+-]+)`", PAGE))
    teachers = {file.stem for file in (ROOT / "configs" / "Teachers").glob("*.yaml")}
    assert files <= named and named <= files | teachers, (files - named, named - files - teachers)


# A file of each kind, and how many levels of each teacher it compares.
@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("retinanet_R_50_III_IV", [[4], [4]]),  # P3-P7 with P2-P6
        ("mask_rcnn_R_50_V_IV", [[5], [5]]),
        ("mask_rcnn_R_50_mean_IV+V_2x", [[5]]),
        ("mask_rcnn_R_18_I+III+IV+V", [[5, 5, 5, 5]]),
        ("mask_rcnn_R_50_quarter_distilled", [[5], [5], [5]]),
        ("mask_rcnn_R_50_MGD_Swin-T_Swin-S", [[4], [4]]),
        ("retinanet_R_50_MGD_Swin-T_Swin-S", [[5], [5]]),
        ("reppoints_R_50_MGD_R101_X101", [[5], [5]]),
        ("reppoints_R_50_CWD_X101_2x", [[4]]),
        ("argoverse_faster_rcnn_R_18_A_B_C_D", [[5], [5], [5], [5]]),
    ],
)
def test_levels_of_students_and_teachers_pair(name, pairs):
    cfg = curriculum(name)
    with torch.device("meta"):
        student = build_model(cfg)
    found = []
    for stage in stage_configs(cfg):
        shapes, sources = functools.partial(student_shapes, student, get_resolution(cfg.DISTILL.STUDENT_RESOLUTION)), {}
        for entry in teacher_entries(stage):
            if "MEAN_OF" in entry:
                sources = {entry["NAME"]: Ensemble(entry["NAME"], entry["MEAN_OF"]).shapes(sources)}
            else:
                sources[entry["NAME"]] = shapes_of(entry["CONFIG"], entry.get("SCALE", 1.0))
        at = {source: functools.partial(lambda found, tap: found, made) for source, made in sources.items()}
        with torch.device("meta"):
            losses = build_losses(stage.DISTILL.LOSSES, shapes, at)
        found.append([len(loss.pairs) for loss in losses])
    assert found == pairs


def test_totals_are_equal_where_the_paper_compares():
    """Directly and progressively 24 epochs; in table 12 longer schedules as curricula of one to three teachers."""
    epochs = {12: 90000, 24: 180000, 36: 270000}
    for length, names in {
        12: ("mask_rcnn_R_50_IV_1x", "mask_rcnn_R_18_longer_12", "mask_rcnn_R_18_I+IV+V", "retinanet_R_50_MGD_R101_1x"),
        24: (
            "retinanet_R_50_longer_3x", "retinanet_R_50_IV_2x", "retinanet_R_50_III_IV", "mask_rcnn_R_50_IV_2x",
            "mask_rcnn_R_50_V_IV", "mask_rcnn_R_50_IV+V_2x", "mask_rcnn_R_50_mean_IV+V_2x", "mask_rcnn_R_18_longer_24",
            "retinanet_R_50_none_2x", "retinanet_R_50_MGD_X101_2x", "retinanet_R_50_MGD_R101_X101",
            "reppoints_R_50_none_2x", "reppoints_R_50_MGD_R101_X101", "mask_rcnn_R_50_MGD_Swin-T_Swin-S",
        ),
        36: ("mask_rcnn_R_18_longer_36", "mask_rcnn_R_18_I_V_IV", "mask_rcnn_R_50_quarter_distilled"),
    }.items():  # fmt: skip
        assert {name: total_iterations(curriculum(name)) for name in names} == dict.fromkeys(names, epochs[length])


def test_the_first_teacher_alone_is_inherited():
    first, second = stage_configs(curriculum("retinanet_R_50_MGD_R101_X101"))
    assert (first.DISTILL.INIT_STUDENT, second.DISTILL.INIT_STUDENT) == ("neck_and_head", "none")
    first, second = stage_configs(curriculum("retinanet_R_50_III_IV"))
    assert (first.DISTILL.INIT_STUDENT, first.MODEL.WEIGHTS) == ("none", "teachers/retinanet_R_50/model.pth")
