"""Numbers of parameters of the zoo's detectors with 80 classes, as counted in mmdetection.

A missing layer, a bias too much or a wrong width would load converted checkpoints only in part, or not at all.
"""

from __future__ import annotations

from pathlib import Path

import detectron2
import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone

from msad import load_config

TEACHERS = Path(__file__).parents[2] / "configs" / "Teachers"


@pytest.mark.parametrize(
    "file, options, parameters",
    [
        ("Base-RCNN", {}, 44396336),
        ("mask_rcnn_R_50_DCN", {}, 44977178),
        ("mask_rcnn_R_50_DCN", {"MODEL.RESNETS.DEFORM_MODULATED": True}, 45267599),
        ("mask_rcnn_Swin-T", {}, 47794602),
        ("mask_rcnn_Swin-S_3x", {}, 69112506),
        ("retinanet_Swin-T", {}, 38458606),
        ("retinanet_X_101_32x4d", {"MODEL.RESNETS.DEPTH": 50, "MODEL.RESNETS.NUM_GROUPS": 1,
                                   "MODEL.RESNETS.WIDTH_PER_GROUP": 64}, 37968692),
        ("retinanet_X_101_32x4d", {}, 56589364),
        ("retinanet_X_101_32x4d", {"MODEL.RESNETS.NUM_GROUPS": 64}, 95866932),
    ],
)
def test_numbers_of_parameters(file, options, parameters):
    cfg = load_config(TEACHERS / f"{file}.yaml")
    # Of detectron2's frozen norms nothing is a parameter; and its Swin needs timm to drop paths.
    cfg.merge_from_list([x for item in options.items() for x in item])
    cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.RESNETS.NORM, cfg.MODEL.SWIN.DROP_PATH_RATE = 0, "BN", 0.0
    real_swin = "Swin" in file and "lite" not in detectron2.__version__
    with torch.device("cpu" if real_swin else "meta"):  # the real detectron2's Swin cannot be built on "meta"
        model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    "file, parameters",
    [
        ("mask_rcnn_R_50", 3344384), ("retinanet_R_50", 7997440), ("fcos_R_50_caffe", 3868672), ("gfl_R_50", 3868672),
        ("reppoints_R_50", 7999488), ("detectors_htc_R_50", 42971170),
    ],
)  # fmt: skip
def test_necks(file, parameters):
    cfg = load_config(TEACHERS / f"{file}.yaml", ["MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.RESNETS.NORM", "BN"])
    with torch.device("meta"):
        backbone = build_backbone(cfg)
    of_all, of_body = (sum(p.numel() for p in module.parameters()) for module in (backbone, backbone.bottom_up))
    assert of_all - of_body == parameters


@pytest.mark.parametrize(
    "file, parameters",
    [
        ("mask_rcnn_R_50", 23508032), ("mask_rcnn_R_50_DCN", 24088874), ("mask_rcnn_R_50_DCNv2", 24379295),
        ("retinanet_X_101_32x4d", 42128704), ("retinanet_X_101_64x4d", 81406272),
    ],
)
def test_networks(file, parameters):
    cfg = load_config(TEACHERS / f"{file}.yaml", ["MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.RESNETS.NORM", "BN"])
    with torch.device("meta"):
        assert sum(p.numel() for p in build_backbone(cfg).bottom_up.parameters()) == parameters
