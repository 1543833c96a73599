"""configs/Teachers: each builds the network that mmdetection publishes, counted there, and can be a teacher.

HTC, DetectoRS and Cascade Mask R-CNN are counted beside their other tests.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from msad import load_config
from msad.modeling.adapters import adapt

TEACHERS = Path(__file__).parents[2] / "configs" / "Teachers"
GN_BIASES = 2 * 4 * 256  # detectron2's towers have a bias in front of each normalisation
# Parameters of mmdetection 3.3.0's models of the same name in the zoo. The last has none there: Mask R-CNN's 44396336,
# with the networks of DetectoRS (134754552) instead of HTC's (80258293).
PARAMETERS = {
    "retinanet_R_50": 37968692,
    "retinanet_X_101_64x4d": 95866932,
    "fcos_R_50_caffe": 32297370,
    "gfl_R_50": 32440537 + GN_BIASES,
    "reppoints_R_50": 36849078,
    "reppoints_X_101_32x4d_DCN": 58041554,
    "faster_rcnn_R_50": 41753056,
    "mask_rcnn_R_50": 44396336,
    "mask_rcnn_R_50_DCN": 44977178,
    "mask_rcnn_R_50_DCNv2": 45267599,
    "cascade_rcnn_R_50": 69394766,
    "cascade_mask_rcnn_X_101_32x4d_DCN": 98517082,
    "detectors_cascade_rcnn_R_50": 123891025,
    "detectors_mask_rcnn_R_50": 44396336 + 134754552 - 80258293,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_teacher(name):
    # Frozen normalisation has no parameters; the counts are of networks that train it.
    cfg = load_config(TEACHERS / f"{name}.yaml", ["MODEL.DEVICE", "meta", "MODEL.BACKBONE.FREEZE_AT", 0])
    cfg.MODEL.RESNETS.NORM = "BN"
    with torch.device("meta"):
        model = build_model(cfg)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    made = model.backbone.output_shape()
    first = 2 if "rcnn" in name or "htc" in name else 3
    assert adapt(model).levels == [f"p{level}" for level in range(first, first + 5)]
    assert all(made[level].channels == 256 for level in adapt(model).levels)
