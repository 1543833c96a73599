"""How a distillation loss is named, configured and called.

A loss is an ``nn.Module`` registered by class name. It is built as ``Loss(levels=[...], **options)`` from an entry of
DISTILL.LOSSES, and called as ``loss(student, teacher, batch)`` with H-frame feature dicts of equal names and shapes
(N, C, h, w) per level; it returns a dict of scalar tensors. Losses know tensors, not models.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import Instances
from fvcore.common.registry import Registry
from torch import nn

from ...config import nearest

DISTILL_LOSS_REGISTRY = Registry("DISTILL_LOSS")


@dataclass
class DistillBatch:
    """What a loss may know of the batch besides features.

    Attributes:
        image_sizes: (h, w) of each image in H pixels, without padding.
        gt: ground truth in H pixels.
    """

    image_sizes: list[tuple[int, int]]
    gt: list[Instances]


class WeightedLoss(nn.Module):
    """A registered loss with the name, weight and levels of its DISTILL.LOSSES entry."""

    def __init__(self, name: str, weight: float, levels: list[str], loss: nn.Module) -> None:
        super().__init__()
        self.name, self.weight, self.levels, self.loss = name, weight, levels, loss

    def forward(
        self, student: dict[str, torch.Tensor], teacher: dict[str, torch.Tensor], batch: DistillBatch
    ) -> dict[str, torch.Tensor]:
        """Weighted terms, named ``loss_distill/{NAME}`` plus the term's own name if the loss has several."""
        terms = self.loss({k: student[k] for k in self.levels}, {k: teacher[k] for k in self.levels}, batch)
        return {
            f"loss_distill/{self.name}" + (f"/{term}" if len(terms) > 1 else ""): self.weight * value
            for term, value in terms.items()
        }


def check_levels(student: dict[str, ShapeSpec], teacher: dict[str, ShapeSpec], levels: list[str]) -> None:
    """ValueError naming level and sides if a level is missing, or strides or channels differ (H frame)."""
    for name in levels:
        for side, shapes in (("student", student), ("teacher", teacher)):
            if name not in shapes:
                raise ValueError(
                    f"distillation level {name} (H frame) does not exist in the {side}, which has {sorted(shapes)}; "
                    "check DISTILL.STUDENT_RESOLUTION, DISTILL.LOSSES[].LEVELS and the IN_FEATURES of both models"
                )
        s, t = student[name], teacher[name]
        if (s.stride, s.channels) != (t.stride, t.channels):
            raise ValueError(
                f"distillation level {name} (H frame): student has stride {s.stride} and {s.channels} channels, "
                f"teacher stride {t.stride} and {t.channels} channels"
            )


def build_losses(
    entries: list[dict], student: dict[str, ShapeSpec], teacher: dict[str, ShapeSpec]
) -> nn.ModuleList:
    """Build DISTILL.LOSSES.

    Args:
        entries: {NAME, WEIGHT, LEVELS (default: all that both sides have), further options of the loss}.
        student, teacher: H-frame shapes; strides in H pixels.

    Raises:
        ValueError: unknown loss, option or level; says which, and the nearest valid name.
    """
    built = nn.ModuleList()
    names: list[str] = []
    for entry in entries:
        options = {key.lower(): value for key, value in entry.items()}
        kind = options.pop("name", None)
        known = [name for name, _ in DISTILL_LOSS_REGISTRY]
        if kind not in known:
            raise ValueError(f"DISTILL.LOSSES: unknown loss {kind!r}{nearest(str(kind), known)} (known: {known})")
        weight = float(options.pop("weight", 1.0))
        levels = options.pop("levels", None) or [name for name in student if name in teacher]
        if not levels:
            raise ValueError(
                f"student levels {sorted(student)} and teacher levels {sorted(teacher)} have none in common"
            )
        check_levels(student, teacher, levels)
        cls = DISTILL_LOSS_REGISTRY.get(kind)
        parameters = inspect.signature(cls.__init__).parameters
        valid = ["WEIGHT", "LEVELS", *(p.upper() for p in parameters if p not in ("self", "levels"))]
        for key in options:
            if key.upper() not in valid:
                raise ValueError(
                    f"DISTILL.LOSSES: {kind} has no option {key.upper()}{nearest(key.upper(), valid)} "
                    f"(options: {', '.join(valid)})"
                )
        label = kind if kind not in names else f"{kind}_{names.count(kind) + 1}"
        names.append(kind)
        built.append(WeightedLoss(label, weight, list(levels), cls(levels=list(levels), **options)))
    return built
