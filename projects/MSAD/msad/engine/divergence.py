"""Training that has diverged, said as such: which losses, in which iteration, and what to lower."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

# What the engines and fvcore raise where a model predicts NaN: their texts blame boxes and scores.
_SYMPTOMS = ("bad box", "Inf/NaN", "not finite", "infinite or NaN")


class LossRecorder:
    """Keeps the last losses of a model, without their graphs; they cost no synchronisation until they are asked for.

    Args:
        model: returns a dict of scalar losses in training.
    """

    def __init__(self, model: nn.Module) -> None:
        self.losses: dict[str, torch.Tensor] = {}
        model.register_forward_hook(self._keep)

    def _keep(self, model: nn.Module, inputs: tuple, outputs: object) -> None:
        if isinstance(outputs, Mapping):
            self.losses = {name: value.detach() for name, value in outputs.items() if isinstance(value, torch.Tensor)}

    def explain(self, error: BaseException, iteration: int, base_lr: float) -> FloatingPointError | None:
        """What to raise instead of ``error`` if it comes from values that are not finite, else None.

        Args:
            error: of a step before which ``losses`` was emptied.
            iteration: the step's.
            base_lr: SOLVER.BASE_LR.
        """
        names = [name for name, value in self.losses.items() if not torch.isfinite(value).all()]
        if not names and not any(text in str(error) for text in _SYMPTOMS):
            return None
        where = ", ".join(names) if names else "the model's predictions"
        also = " or the WEIGHT of these losses" if names and all(n.startswith("loss_distill") for n in names) else ""
        return FloatingPointError(
            f"loss not finite at iteration {iteration} ({where}): training has diverged; lower SOLVER.BASE_LR (now "
            f"{base_lr:g}){also}"
        )
