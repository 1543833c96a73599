#!/usr/bin/env python
"""An exported R-CNN student in plain detectron2: nothing of this project is imported.

    python docs/plain_rcnn.py EXPORTED IMAGE...

EXPORTED is the folder that tools/export_model.py wrote. The half-resolution student reads P1, which is made from C1,
the stem's output before its max-pooling. No yaml of detectron2 gives access to C1; the backbone below does, over
detectron2's own ResNet and FPN. Everything else is in EXPORTED/config.yaml.
"""

import sys

import cv2
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_resnet_backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool


class ResNetWithC1(Backbone):
    """detectron2's ResNet with one more output, "c1" at stride 2."""

    def __init__(self, resnet):
        super().__init__()
        self.stem, self.names = resnet.stem, resnet.stage_names
        for name in self.names:
            setattr(self, name, getattr(resnet, name))
        shapes = {"c1": ShapeSpec(channels=resnet.stem.conv1.out_channels, stride=2), **resnet.output_shape()}
        self._out_features = list(shapes)
        self._out_feature_channels = {name: shape.channels for name, shape in shapes.items()}
        self._out_feature_strides = {name: shape.stride for name, shape in shapes.items()}

    def forward(self, image):
        maps = {"c1": F.relu(self.stem.conv1(image))}
        x = F.max_pool2d(maps["c1"], kernel_size=3, stride=2, padding=1)
        for name in self.names:
            maps[name] = x = getattr(self, name)(x)
        return maps


def build_backbone_with_p1(cfg, input_shape):
    """FPN on the levels that the heads of ``cfg`` read, from P1 where they begin there."""
    levels = cfg.MODEL.RPN.IN_FEATURES
    stages = cfg.clone()
    stages.defrost()
    stages.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    bottom_up = ResNetWithC1(build_resnet_backbone(stages, input_shape))
    sources = ["c1"] * ("p1" in levels) + stages.MODEL.RESNETS.OUT_FEATURES
    top = LastLevelMaxPool() if "p6" in levels else None
    return FPN(bottom_up, sources, cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.FPN.NORM, top)


def build(folder):
    """detectron2's predictor of the model in the exported ``folder``; call it with an image as OpenCV reads it."""
    cfg = get_cfg()
    cfg.merge_from_file(f"{folder}/config.yaml")
    if cfg.MODEL.BACKBONE.NAME not in BACKBONE_REGISTRY:
        BACKBONE_REGISTRY._do_register(cfg.MODEL.BACKBONE.NAME, build_backbone_with_p1)
    return DefaultPredictor(cfg)


if __name__ == "__main__":
    student = build(sys.argv[1])
    for name in sys.argv[2:]:
        print(name, student(cv2.imread(name))["instances"])
