"""The gate of a teacher or fusion student that is trained: logged, and a warning where it has settled on one branch."""

from __future__ import annotations

import logging

import torch
from detectron2.engine import HookBase
from torch import nn

from ..modeling.fusion import CrossFeatureLevelFusion
from ..modeling.fusion_student import FusionBackbone
from ..modeling.teacher import MultiScaleTeacher

logger = logging.getLogger(__name__)
SETTLED = 0.98  # mean weight of H


class GateLogger(HookBase):
    """Log the weight of H in the fused maps, the mean over images and levels ("fusion/gate_H").

    It looks at one step in ``period`` and leaves the others as they are. Above SETTLED for ``patience`` readings in a
    row it warns, once.

    Args:
        consequence: what a gate that has settled means.
    """

    def __init__(
        self, fusion: CrossFeatureLevelFusion, consequence: str, period: int = 20, patience: int = 5
    ) -> None:
        self.fusion = fusion
        self.consequence = consequence
        self.period = period
        self.patience = patience
        self._above = 0  # readings in a row
        self._warned = False
        self._seen: list[torch.Tensor] = []

    def before_step(self) -> None:
        if (self.trainer.iter + 1) % self.period == 0:
            self._seen.clear()
            self._handle = self.fusion.excite.register_forward_hook(lambda _m, _x, y: self._seen.append(y.detach()))

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % self.period:
            return
        self._handle.remove()
        if not self._seen:
            return
        weight = torch.cat(self._seen).float().softmax(dim=1)[:, 0].mean().item()
        self.trainer.storage.put_scalar("fusion/gate_H", weight, smoothing_hint=False)
        self._above = self._above + 1 if weight > SETTLED else 0
        if self._above == self.patience and not self._warned:
            self._warned = True
            advice = "" if self.fusion.normalize else ". MSAD.FUSION.NORMALIZE True keeps the gate from it"
            logger.warning(
                "The fused maps have been those of H for %d iterations (its gate is %.3f), so that %s%s",
                self._above * self.period, weight, self.consequence, advice,
            )  # fmt: skip


def gate_loggers(model: nn.Module) -> list[GateLogger]:
    """That of a model with a gate, or none."""
    if isinstance(model, MultiScaleTeacher) and len(model.resolutions) > 1:
        return [GateLogger(model.fusion, "a student learns nothing of the other branches")]
    backbone = getattr(model, "backbone", None)
    if isinstance(backbone, FusionBackbone):
        return [GateLogger(backbone.fusion, "the other branches take time and change nothing")]
    return []
