"""What TEST.PRECISE_BN needs of a model, found in the first step and not when the training ends."""

from __future__ import annotations

from collections import Counter

from detectron2.engine import HookBase
from torch import nn

from ..modeling.features import batch_norms


class NormsRunOnce(HookBase):
    """ValueError after the first step if a BatchNorm of ``model`` ran more than once in it.

    fvcore's precise statistics are for layers that run once; those of a multi-resolution teacher run once a resolution.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._runs: Counter[str] = Counter()
        self._handles = [norm.register_forward_pre_hook(self._count) for norm in batch_norms(model)]

    def _count(self, norm: nn.Module, _inputs: tuple) -> None:
        if norm.training:
            self._runs[self._names[norm]] += 1

    def after_step(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        name, runs = max(self._runs.items(), key=lambda item: item[1], default=("", 1))
        if runs > 1:
            raise ValueError(
                f"TEST.PRECISE_BN.ENABLED: {name} runs {runs} times in a step, and precise statistics are for layers "
                "that run once; disable it"
            )
