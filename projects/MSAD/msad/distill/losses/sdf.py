"""Scale-decoupled features (SDF) of ScaleKD (Zhu et al., CVPR 2023, Sec. 3.1)."""

from __future__ import annotations

import logging
import math

import torch
import torch.nn.functional as F
from torch import nn

from ..context import DistillContext, Features
from .registry import DISTILL_LOSS_REGISTRY
from .shared import at_least_float32

logger = logging.getLogger(__name__)
TEACHER_SIDES = ("frozen", "shared", "trainable")
MONITOR_PERIOD = 200


def _norm(channels: int) -> nn.GroupNorm:
    # Statistics of a batch would differ between dilations that share their weights.
    return nn.GroupNorm(math.gcd(32, max(channels // 2, 1)), channels)


class ScaleDecoupled(nn.Module):
    """Parallel residual bottlenecks of different dilation, each flattened to an embedding at every location.

    Args:
        channels: C of the map.
        embedding: d, channels of a branch's embedding.
        dilations: of the 3x3 convolutions, one branch each.
        share: the branches have one set of weights and differ in dilation alone.
    """

    def __init__(self, channels: int, embedding: int, dilations: tuple[int, ...], share: bool) -> None:
        super().__init__()
        self.dilations = dilations
        hidden = max(channels // 4, 2)
        count = 1 if share else len(dilations)
        self.reduce = nn.ModuleList(nn.Conv2d(channels, hidden, 1, bias=False) for _ in range(count))
        self.spread = nn.ModuleList(nn.Conv2d(hidden, hidden, 3, bias=False) for _ in range(count))
        self.expand = nn.ModuleList(nn.Conv2d(hidden, channels, 1, bias=False) for _ in range(count))
        self.norms = nn.ModuleList(nn.ModuleList(map(_norm, (hidden, hidden, channels))) for _ in range(count))
        self.flatten = nn.ModuleList(nn.Conv2d(channels, embedding, 1) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, h, w) -> (N, branches * d, h, w)."""
        embeddings = []
        for branch, dilation in enumerate(self.dilations):
            i = branch if len(self.reduce) > 1 else 0
            norms = self.norms[i]
            y = norms[0](self.reduce[i](x)).relu()
            y = F.conv2d(y, self.spread[i].weight, padding=dilation, dilation=dilation)
            y = norms[2](self.expand[i](norms[1](y).relu()))
            embeddings.append(self.flatten[i]((x + y).relu()))
        return torch.cat(embeddings, dim=1)


@DISTILL_LOSS_REGISTRY.register()
class SDF(nn.Module):
    """Squared difference of the scale-decoupled embeddings of both sides; one loss for all branches.

    Meant for the last stage of both backbones: TAP: bottom_up, LEVELS: [res5], MATCH: by_index. A teacher's map that is
    larger (input at twice the size) is averaged on the student's grid. The student's map first passes an
    MLP to the teacher's channels.

    The paper does not say who trains the teacher's side; trained by this loss alone, equal constants would be its
    optimum. Where it is trained, the standard deviation of each level's embedding over locations is logged every 200
    iterations, with a warning where it falls below a hundredth of the run's first.

    Args:
        embedding: channels of a branch's embedding.
        dilations: of the branches.
        share_weights: of the branches of a side.
        teacher_side: "frozen" (random weights that stay), "shared" (the student's module, without gradient) or
            "trainable" (a module of its own, trained by this loss).
        reduction: of the squared differences of an image, "mean" or "sum" over channels and locations; the mean over
            images either way.
    """

    default_weight = 0.01  # one-stage detectors
    two_stage = {"weight": 0.07}
    pools_teacher = True
    positive = ("embedding", "dilations")

    def __init__(
        self,
        levels: list[str],
        channels: dict[str, int],
        student_channels: dict[str, int],
        embedding: int = 256,
        dilations: tuple[int, ...] = (1, 2, 3),
        share_weights: bool = True,
        teacher_side: str = "frozen",
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum"):
            raise ValueError(f"DISTILL.LOSSES: SDF: REDUCTION must be mean or sum, not {reduction!r}")
        if teacher_side not in TEACHER_SIDES:
            raise ValueError(
                f"DISTILL.LOSSES: SDF: TEACHER_SIDE must be one of {', '.join(TEACHER_SIDES)}, not {teacher_side!r}"
            )
        self.teacher_side, self.levels, self.reduction = teacher_side, levels, reduction
        self.adapt, self.student, self.teacher = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for name in levels:
            s, t = student_channels[name], channels[name]
            self.adapt[name] = nn.Sequential(nn.Conv2d(s, t, 1), nn.ReLU(), nn.Conv2d(t, t, 1))
            self.student[name] = ScaleDecoupled(t, embedding, dilations, share_weights)
            if teacher_side != "shared":
                self.teacher[name] = ScaleDecoupled(t, embedding, dilations, share_weights)
                self.teacher[name].requires_grad_(teacher_side == "trainable")
        if teacher_side != "frozen":
            self.register_buffer("first_spread", torch.full((len(levels),), torch.nan))

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args) -> None:
        if self.teacher_side != "frozen":  # checkpoints that lack it are resumed: what comes next is the first
            state_dict.setdefault(f"{prefix}first_spread", self.first_spread)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _teacher_embedding(self, name: str, t: torch.Tensor) -> torch.Tensor:
        if self.teacher_side == "trainable":
            return self.teacher[name](t)
        with torch.no_grad():
            return (self.student if self.teacher_side == "shared" else self.teacher)[name](t)

    def forward(self, student: Features, teacher: Features, context: DistillContext) -> dict[str, torch.Tensor]:
        total = 0.0
        for name, s in student.items():
            # In this order: what autocast casts without gradient it would use again, without gradient, in older torch.
            found = self.student[name](self.adapt[name](s))
            target = self._teacher_embedding(name, teacher[name])
            found, target = at_least_float32(found), at_least_float32(target)
            whole = F.mse_loss(found, target, reduction=self.reduction)
            total = total + (whole / len(s) if self.reduction == "sum" else whole)
            if self.teacher_side != "frozen" and context.iteration % MONITOR_PERIOD == 0:
                self._monitor(name, target.detach())
        return {"l2": total}

    def _monitor(self, level: str, embedding: torch.Tensor) -> None:
        spread = embedding.transpose(0, 1).flatten(1).std(dim=1).mean()
        first = self.first_spread[self.levels.index(level)]  # a view
        logger.info("SDF: standard deviation of the teacher's embedding over locations of %s: %.3g", level, spread)
        if first.isnan():
            first.copy_(spread)
        elif spread < first / 100:
            logger.warning(
                "SDF: the teacher's embedding of %s has collapsed: its standard deviation is %.3g, at first it was "
                "%.3g; TEACHER_SIDE frozen cannot collapse", level, spread, first,
            )  # fmt: skip
