"""Models: backbones, their parts, and the detectors built from them."""

from detectron2.layers import ShapeSpec

from .anchor_generator import ANCHOR_GENERATOR_REGISTRY, build_anchor_generator
from .backbone import (
    BACKBONE_REGISTRY,
    FPN,
    Backbone,
    ResNet,
    ResNetBlockBase,
    SwinTransformer,
    build_backbone,
    build_resnet_backbone,
    make_stage,
)
from .meta_arch import (
    FCOS,
    META_ARCH_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
    GeneralizedRCNN,
    ProposalNetwork,
    RetinaNet,
    SemanticSegmentor,
    build_model,
    build_sem_seg_head,
)
from .postprocessing import detector_postprocess
from .proposal_generator import (
    PROPOSAL_GENERATOR_REGISTRY,
    RPN_HEAD_REGISTRY,
    build_proposal_generator,
    build_rpn_head,
)
from .roi_heads import (
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    BaseKeypointRCNNHead,
    BaseMaskRCNNHead,
    FastRCNNOutputLayers,
    ROIHeads,
    StandardROIHeads,
    build_box_head,
    build_keypoint_head,
    build_mask_head,
    build_roi_heads,
)

__all__ = [
    "ANCHOR_GENERATOR_REGISTRY", "BACKBONE_REGISTRY", "FCOS", "FPN", "META_ARCH_REGISTRY",
    "PROPOSAL_GENERATOR_REGISTRY", "ROI_BOX_HEAD_REGISTRY", "ROI_HEADS_REGISTRY", "ROI_KEYPOINT_HEAD_REGISTRY",
    "ROI_MASK_HEAD_REGISTRY", "RPN_HEAD_REGISTRY", "SEM_SEG_HEADS_REGISTRY", "Backbone", "BaseKeypointRCNNHead",
    "BaseMaskRCNNHead", "FastRCNNOutputLayers", "GeneralizedRCNN", "ProposalNetwork", "ROIHeads", "ResNet",
    "ResNetBlockBase", "RetinaNet", "SemanticSegmentor", "ShapeSpec", "StandardROIHeads", "SwinTransformer",
    "build_anchor_generator", "build_backbone", "build_box_head", "build_keypoint_head", "build_mask_head",
    "build_model", "build_proposal_generator", "build_resnet_backbone", "build_roi_heads", "build_rpn_head",
    "build_sem_seg_head", "detector_postprocess", "make_stage",
]
