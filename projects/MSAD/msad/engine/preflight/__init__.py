"""Preflight: what is wrong with a training is said before it has cost a night.

Every check is a function that returns findings. Training makes the cheap ones (:func:`preflight`) and stops at errors;
``tools/preflight.py`` makes all of them (:func:`examine`), of every stage of a curriculum (:func:`examine_stages`).
"""

from .model_checks import check_frozen, check_test_size
from .run import examine, preflight, preflight_checks, report
from .stages import examine_stages

__all__ = [
    "check_frozen",
    "check_test_size",
    "examine",
    "examine_stages",
    "preflight",
    "preflight_checks",
    "report",
]
