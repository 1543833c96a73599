"""What R-CNNs do with the features of a box: classify it, move it, and find its mask and keypoints."""

from .keypoint_head import (
    ROI_KEYPOINT_HEAD_REGISTRY,
    BaseKeypointRCNNHead,
    KRCNNConvDeconvUpsampleHead,
    build_keypoint_head,
)
from .mask_head import ROI_MASK_HEAD_REGISTRY, BaseMaskRCNNHead, MaskRCNNConvUpsampleHead, build_mask_head

__all__ = [
    "ROI_KEYPOINT_HEAD_REGISTRY", "ROI_MASK_HEAD_REGISTRY", "BaseKeypointRCNNHead", "BaseMaskRCNNHead",
    "KRCNNConvDeconvUpsampleHead", "MaskRCNNConvUpsampleHead", "build_keypoint_head", "build_mask_head",
]
