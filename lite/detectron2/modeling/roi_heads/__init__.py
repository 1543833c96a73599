"""Second stages of R-CNNs: classes, boxes, masks and keypoints of the proposals."""

from .box_head import ROI_BOX_HEAD_REGISTRY, FastRCNNConvFCHead, build_box_head
from .cascade_rcnn import CascadeROIHeads
from .fast_rcnn import FastRCNNOutputLayers
from .keypoint_head import (
    ROI_KEYPOINT_HEAD_REGISTRY,
    BaseKeypointRCNNHead,
    KRCNNConvDeconvUpsampleHead,
    build_keypoint_head,
)
from .mask_head import ROI_MASK_HEAD_REGISTRY, BaseMaskRCNNHead, MaskRCNNConvUpsampleHead, build_mask_head
from .roi_heads import (
    ROI_HEADS_REGISTRY,
    Res5ROIHeads,
    ROIHeads,
    StandardROIHeads,
    build_roi_heads,
    select_foreground_proposals,
)

__all__ = [
    "ROI_BOX_HEAD_REGISTRY", "ROI_HEADS_REGISTRY", "ROI_KEYPOINT_HEAD_REGISTRY", "ROI_MASK_HEAD_REGISTRY",
    "BaseKeypointRCNNHead", "BaseMaskRCNNHead", "CascadeROIHeads", "FastRCNNConvFCHead", "FastRCNNOutputLayers",
    "KRCNNConvDeconvUpsampleHead", "MaskRCNNConvUpsampleHead", "ROIHeads", "Res5ROIHeads", "StandardROIHeads",
    "build_box_head", "build_keypoint_head", "build_mask_head", "build_roi_heads", "select_foreground_proposals",
]
