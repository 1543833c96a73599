#!/usr/bin/env python
"""An exported FCOS student in plain detectron2: nothing of this project is imported.

    python docs/plain_fcos.py EXPORTED IMAGE...

EXPORTED is the folder that tools/export_model.py wrote. detectron2 has FCOS as a class but no yaml for it, so its
arguments come from EXPORTED/msad.yaml. The checkpoint has no P7 where the head reads only up to P6, whereas
detectron2's own LastLevelP6P7 always makes both; ``TopLevels`` makes those that are there.
"""

import sys

import cv2
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.data import transforms as T
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone, build_resnet_backbone
from detectron2.modeling.backbone.fpn import FPN
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from torch import nn


class TopLevels(nn.Module):
    """P6, and P7 if two levels are wanted, from C5."""

    in_feature = "res5"

    def __init__(self, in_channels, channels, num_levels):
        super().__init__()
        self.num_levels = num_levels
        for level in range(6, 6 + num_levels):
            self.add_module(f"p{level}", nn.Conv2d(in_channels if level == 6 else channels, channels, 3, 2, 1))

    def forward(self, c5):
        p6 = self.p6(c5)
        return [p6] if self.num_levels == 1 else [p6, self.p7(p6.relu())]


def build(folder):
    """(model in eval mode, config) from the exported ``folder``."""
    cfg = get_cfg()
    cfg.merge_from_file(f"{folder}/config.yaml")
    with open(f"{folder}/msad.yaml") as file:
        fcos = yaml.safe_load(file)["MODEL"]["FCOS"]
    levels = fcos["IN_FEATURES"]
    if cfg.MODEL.BACKBONE.NAME in BACKBONE_REGISTRY:
        backbone = build_backbone(cfg)
    else:
        bottom_up = build_resnet_backbone(cfg, ShapeSpec(channels=3))
        sources = [name for name in cfg.MODEL.FPN.IN_FEATURES if int(name[-1]) >= int(levels[0][-1])]
        channels = cfg.MODEL.FPN.OUT_CHANNELS
        top = TopLevels(bottom_up.output_shape()["res5"].channels, channels, int(levels[-1][-1]) - 5)
        backbone = FPN(bottom_up, sources, channels, cfg.MODEL.FPN.NORM, top)
    shapes = backbone.output_shape()
    head = FCOSHead(
        input_shape=[shapes[name] for name in levels],
        num_classes=fcos["NUM_CLASSES"],
        conv_dims=fcos["CONV_DIMS"],
        norm=fcos["NORM"],
    )
    model = FCOS(
        backbone=backbone,
        head=head,
        head_in_features=levels,
        num_classes=fcos["NUM_CLASSES"],
        test_score_thresh=fcos["SCORE_THRESH_TEST"],
        test_topk_candidates=fcos["TOPK_CANDIDATES_TEST"],
        test_nms_thresh=fcos["NMS_THRESH_TEST"],
        max_detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
    )
    model.load_state_dict(torch.load(f"{folder}/model.pth", weights_only=True)["model"])
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
