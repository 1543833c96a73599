"""Models: backbones, their parts, and the detectors built from them."""

from detectron2.layers import ShapeSpec

from .anchor_generator import ANCHOR_GENERATOR_REGISTRY, build_anchor_generator
from .backbone import (
    BACKBONE_REGISTRY,
    FPN,
    Backbone,
    ResNet,
    ResNetBlockBase,
    build_backbone,
    build_resnet_backbone,
    make_stage,
)
from .meta_arch import FCOS, META_ARCH_REGISTRY, RetinaNet, build_model
from .postprocessing import detector_postprocess
from .proposal_generator import (
    PROPOSAL_GENERATOR_REGISTRY,
    RPN_HEAD_REGISTRY,
    build_proposal_generator,
    build_rpn_head,
)

__all__ = [
    "ANCHOR_GENERATOR_REGISTRY", "BACKBONE_REGISTRY", "FCOS", "FPN", "META_ARCH_REGISTRY",
    "PROPOSAL_GENERATOR_REGISTRY", "RPN_HEAD_REGISTRY", "Backbone", "ResNet", "ResNetBlockBase", "RetinaNet",
    "ShapeSpec", "build_anchor_generator", "build_backbone", "build_model", "build_proposal_generator",
    "build_resnet_backbone", "build_rpn_head", "detector_postprocess", "make_stage",
]
