"""Feature extractors: residual networks and the feature pyramid on top of them."""

from .backbone import Backbone
from .build import BACKBONE_REGISTRY, build_backbone
from .fpn import FPN
from .resnet import BasicStem, BottleneckBlock, ResNet, ResNetBlockBase, build_resnet_backbone, make_stage
from .swin import SwinTransformer

__all__ = [
    "BACKBONE_REGISTRY", "FPN", "Backbone", "BasicStem", "BottleneckBlock", "ResNet", "ResNetBlockBase",
    "SwinTransformer", "build_backbone", "build_resnet_backbone", "make_stage",
]
