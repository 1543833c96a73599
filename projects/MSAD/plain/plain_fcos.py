#!/usr/bin/env python
"""An exported FCOS student in plain detectron2: nothing of this project is imported.

    python projects/MSAD/plain/plain_fcos.py EXPORTED IMAGE...

EXPORTED is the folder that tools/export_model.py wrote; it may lie anywhere. detectron2 has FCOS as a class but no yaml
for it, so its arguments come from EXPORTED/msad.yaml. Take plain_backbone.py along with this file.
"""

import sys

import cv2
import torch
from detectron2.data import transforms as T
from detectron2.modeling import build_backbone
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from plain_backbone import load, read_config


def build(folder):
    """(model in eval mode, config) from the exported ``folder``."""
    cfg = read_config(folder)
    fcos = cfg.MODEL.FCOS
    backbone = build_backbone(cfg)
    shapes = backbone.output_shape()
    head = FCOSHead(
        input_shape=[shapes[name] for name in fcos.IN_FEATURES],
        num_classes=fcos.NUM_CLASSES,
        conv_dims=fcos.CONV_DIMS,
        norm=fcos.NORM,
    )
    model = FCOS(
        backbone=backbone,
        head=head,
        head_in_features=fcos.IN_FEATURES,
        num_classes=fcos.NUM_CLASSES,
        test_score_thresh=fcos.SCORE_THRESH_TEST,
        test_topk_candidates=fcos.TOPK_CANDIDATES_TEST,
        test_nms_thresh=fcos.NMS_THRESH_TEST,
        max_detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
    )
    load(model, folder)
    return model.to(cfg.MODEL.DEVICE).eval(), cfg


def detect(model, cfg, image):
    """Instances in ``image``, (h, w, 3) in BGR order as OpenCV reads it."""
    height, width = image.shape[:2]
    pixels = image[:, :, ::-1] if cfg.INPUT.FORMAT == "RGB" else image
    resize = T.ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST).get_transform(pixels)
    tensor = torch.as_tensor(resize.apply_image(pixels).astype("float32").transpose(2, 0, 1))
    with torch.no_grad():
        return model([{"image": tensor, "height": height, "width": width}])[0]["instances"]


if __name__ == "__main__":
    student, config = build(sys.argv[1])
    for name in sys.argv[2:]:
        print(name, detect(student, config, cv2.imread(name)))
