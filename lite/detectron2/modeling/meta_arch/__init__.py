"""Complete detectors."""

from .build import META_ARCH_REGISTRY, build_model
from .dense_detector import DenseDetector
from .fcos import FCOS
from .rcnn import GeneralizedRCNN, ProposalNetwork
from .retinanet import RetinaNet

__all__ = [
    "FCOS", "META_ARCH_REGISTRY", "DenseDetector", "GeneralizedRCNN", "ProposalNetwork", "RetinaNet", "build_model",
]
