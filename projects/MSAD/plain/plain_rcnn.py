#!/usr/bin/env python
"""An exported R-CNN or RetinaNet student in plain detectron2: nothing of this project is imported.

    python projects/MSAD/plain/plain_rcnn.py EXPORTED IMAGE...

EXPORTED is the folder that tools/export_model.py wrote; it may lie anywhere. The half-resolution R-CNN reads P1, which
no yaml of detectron2 makes; plain_backbone.py does, take it along with this file. All else is in EXPORTED/config.yaml.
"""

import sys

import cv2
from detectron2.engine import DefaultPredictor
from plain_backbone import load, read_config


def build(folder):
    """detectron2's predictor of the model in the exported ``folder``; call it with an image as OpenCV reads it."""
    cfg = read_config(folder)
    cfg.MODEL.WEIGHTS = ""  # the predictor would pass over tensors that do not fit
    predictor = DefaultPredictor(cfg)
    load(predictor.model, folder)
    return predictor


if __name__ == "__main__":
    student = build(sys.argv[1])
    for name in sys.argv[2:]:
        print(name, student(cv2.imread(name))["instances"])
