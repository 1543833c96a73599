"""Evaluation loop, COCO metrics and the printing and checking of results."""

from .coco_evaluation import *  # noqa: F403
from .evaluator import *  # noqa: F403
from .testing import *  # noqa: F403
