"""Parameters that are left as they are in some iterations: a frozen backbone, parts of losses that do not count."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from detectron2.engine import HookBase
from torch import nn

from ..distill.distiller import Distiller
from ..modeling.taps import before_neck


class RestingParameters(HookBase):
    """Leave parameters as they are in some iterations.

    Their gradients are dropped before the optimizer sees them, and what has no gradient neither decays nor counts as a
    step. They are computed, because DistributedDataParallel waits for all that it knows of.

    Args:
        rest: whether they rest in an iteration, counted from 0.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], rest: Callable[[int], bool]) -> None:
        self.parameters = list(parameters)
        self.rest = rest

    def before_train(self) -> None:
        # detectron2 calls after_backward of an inner trainer, which has no hooks.
        self.trainer.optimizer.register_step_pre_hook(self._drop_gradients)

    def _drop_gradients(self, *_args) -> None:
        if self.rest(self.trainer.iter):
            for parameter in self.parameters:
                parameter.grad = None


def frozen_backbone(student: nn.Module, iterations: int) -> RestingParameters:
    """The backbone in front of the neck stays as it is in the first iterations (ScaleKD, Sec. 3.2).

    Running statistics of a BatchNorm go on.

    Args:
        student: a detector.
        iterations: the first in which it is trained, counted from 0.
    """
    networks = before_neck(student)
    return RestingParameters((p for network in networks for p in network.parameters()), lambda n: n < iterations)


def resting_losses(distiller: Distiller) -> RestingParameters:
    """What the losses train stays as it is while they do not count, so that an Adam does not get used to zeros."""
    return RestingParameters(distiller.losses.parameters(), lambda n: not distiller.factor(n))
