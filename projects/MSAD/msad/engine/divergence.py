"""Training that has diverged, said as such: which losses, in which iteration, and what to lower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .assistants import AssistantStep

# What the engines and fvcore raise where a model predicts NaN: their texts blame boxes and scores.
_SYMPTOMS = ("bad box", "Inf/NaN", "not finite", "infinite or NaN")


class LossRecorder:
    """Keeps the last losses of a model, without their graphs; they cost no synchronisation until they are asked for.

    Args:
        model: returns a dict of scalar losses in training.
    """

    def __init__(self, model: nn.Module) -> None:
        self.losses: dict[str, torch.Tensor] = {}
        self.called = False
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._keep)

    def forget(self) -> None:
        """Before a step: what is raised before the model is called, by the loader, says nothing of training."""
        self.losses, self.called = {}, False

    def _begin(self, model: nn.Module, inputs: tuple) -> None:
        self.called = True

    def _keep(self, model: nn.Module, inputs: tuple, outputs: object) -> None:
        if isinstance(outputs, Mapping):
            self.losses = {name: value.detach() for name, value in outputs.items() if isinstance(value, torch.Tensor)}

    def explain(
        self, error: BaseException, iteration: int, base_lr: float, assistants: Sequence[AssistantStep] = ()
    ) -> FloatingPointError | None:
        """What to raise instead of ``error`` if it comes from values that are not finite, else None.

        Args:
            error: of a step before which :meth:`forget` was called.
            iteration: the step's.
            base_lr: SOLVER.BASE_LR.
            assistants: which may have diverged by themselves.
        """
        if not self.called:
            return None
        names = [name for name, value in self.losses.items() if not torch.isfinite(value).all()]
        if not names and not any(text in str(error) for text in _SYMPTOMS):
            return None
        where = ", ".join(names) if names else "the model's predictions"
        distilled = all(name.startswith("loss_distill") for name in names)  # of the student's own none is known wrong
        also = " or the WEIGHT of these losses" if names and distilled else ""
        for step in assistants:
            if distilled and not step.is_finite():
                where = f"assistant {step.name}"
                also = f" or BASE_LR of its DISTILL.ASSISTANTS entry (now {step.optimizer.defaults['lr']:g})"
        return FloatingPointError(
            f"loss not finite at iteration {iteration} ({where}): training has diverged; lower SOLVER.BASE_LR (now "
            f"{base_lr:g}){also}"
        )
