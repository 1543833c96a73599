"""Complete detectors."""

from .build import META_ARCH_REGISTRY, build_model
from .dense_detector import DenseDetector
from .fcos import FCOS
from .retinanet import RetinaNet

__all__ = ["FCOS", "META_ARCH_REGISTRY", "DenseDetector", "RetinaNet", "build_model"]
