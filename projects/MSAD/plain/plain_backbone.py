"""What plain_fcos.py and plain_rcnn.py, beside this file, share: the backbone, the yaml files and strict loading.

No yaml of detectron2 gives access to C1, the stem's output before its max-pooling, of which P1 is made, or makes P6
without P7 by convolutions. The backbone below does, over detectron2's own ResNet and FPN.
"""

import os

import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_resnet_backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from torch import nn

STAGES = ["res2", "res3", "res4", "res5"]


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


def build_level_fpn(cfg, input_shape):
    """FPN with the levels MODEL.FPN.LEVELS and no other."""
    options = cfg.MODEL.FPN
    levels = sorted(int(name[1:]) for name in options.LEVELS)
    stages = cfg.clone()
    stages.defrost()
    stages.MODEL.RESNETS.OUT_FEATURES = STAGES
    bottom_up = ResNetWithC1(build_resnet_backbone(stages, input_shape))
    top = None
    if levels[-1] > 5 and options.TOP_BLOCK == "maxpool":
        top = LastLevelMaxPool()
    elif levels[-1] > 5:
        top = TopLevels(bottom_up.output_shape()["res5"].channels, options.OUT_CHANNELS, levels[-1] - 5)
    sources = ["c1", *STAGES][levels[0] - 1 :]
    return FPN(bottom_up, sources, options.OUT_CHANNELS, options.NORM, top)


def read_config(folder):
    """The values of config.yaml and msad.yaml in the exported ``folder``; registers the backbone that they name."""
    cfg = get_cfg()
    cfg.merge_from_file(f"{folder}/config.yaml")
    if os.path.exists(f"{folder}/msad.yaml"):
        cfg.set_new_allowed(True)
        cfg.merge_from_file(f"{folder}/msad.yaml")
    if cfg.MODEL.BACKBONE.NAME not in BACKBONE_REGISTRY:
        BACKBONE_REGISTRY._do_register(cfg.MODEL.BACKBONE.NAME, build_level_fpn)
    return cfg


def load(model, folder):
    """Load model.pth of the exported ``folder``; ValueError unless its tensors are exactly those of ``model``."""
    file = f"{folder}/model.pth"
    stored, own = torch.load(file, map_location="cpu", weights_only=True)["model"], model.state_dict()
    faults = {
        "not in the file": [name for name in own if name not in stored],
        "not in the model": [name for name in stored if name not in own],
        "of another shape": [name for name in own if name in stored and own[name].shape != stored[name].shape],
    }
    if any(faults.values()):
        found = (f"{len(names)} {fault} ({', '.join(names[:3])})" for fault, names in faults.items() if names)
        raise ValueError(
            f"{file} does not fit what plain detectron2 builds from the yaml files beside it; tensors: "
            f"{', '.join(found)}. To build this model, import msad."
        )
    model.load_state_dict(stored)
