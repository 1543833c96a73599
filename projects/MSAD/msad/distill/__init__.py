"""Distillation: context, teachers, assistants, losses; and, called, the whole way from data to a student.

``msad.distill(data, output, ...)`` is :func:`msad.product.pipeline.distill`. A module can be called if its class says
how, and so one name serves for both.
"""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from ..product.pipeline import distill  # late: the pipeline needs all of the package

        return distill(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
