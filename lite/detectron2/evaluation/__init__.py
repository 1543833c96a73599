"""Evaluation loop, metrics of COCO and of semantic segmentation, and the printing and checking of results."""

from .coco_evaluation import *  # noqa: F403
from .evaluator import *  # noqa: F403
from .sem_seg_evaluation import SemSegEvaluator  # noqa: F401
from .testing import *  # noqa: F403
