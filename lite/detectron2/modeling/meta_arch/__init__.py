"""Complete detectors."""

from .build import META_ARCH_REGISTRY, build_model
from .dense_detector import DenseDetector
from .fcos import FCOS
from .rcnn import GeneralizedRCNN, ProposalNetwork
from .retinanet import RetinaNet
from .semantic_seg import SEM_SEG_HEADS_REGISTRY, SemanticSegmentor, build_sem_seg_head

__all__ = [
    "FCOS", "META_ARCH_REGISTRY", "SEM_SEG_HEADS_REGISTRY", "DenseDetector", "GeneralizedRCNN", "ProposalNetwork",
    "RetinaNet", "SemanticSegmentor", "build_model", "build_sem_seg_head",
]
