"""Localisation distillation (LD, Zheng et al., CVPR 2022) for detectors whose box sides are distributions (GFL)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..context import DistillContext, HeadPair
from .registry import DISTILL_LOSS_REGISTRY
from .shared import at_least_float32


def mean_kl(s: torch.Tensor, t: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 times the mean over the last dimension of the terms of KL(softmax(t / T) || softmax(s / T)).

    Args:
        s, t: logits (..., n) of student and teacher.

    Returns:
        (...). The mean over n bins instead of their sum is that of the released code; weights belong to it.
    """
    log_s, log_t = ((at_least_float32(x) / temperature).log_softmax(dim=-1) for x in (s, t))
    return temperature**2 * F.kl_div(log_s, log_t, reduction="none", log_target=True).mean(dim=-1)


def mean_per_level(values: torch.Tensor, anchor: torch.Tensor, level_sizes: list[int]) -> torch.Tensor:
    """Mean of ``values`` (P,) at indices ``anchor`` (P,) over each level, (number of levels,); 0 for one without."""
    last = torch.tensor(level_sizes, device=anchor.device).cumsum(0)
    level = torch.bucketize(anchor, last, right=True)
    total, count = (values.new_zeros(len(last)).index_add(0, level, x) for x in (values, torch.ones_like(values)))
    return total / count.clamp(min=1)


@DISTILL_LOSS_REGISTRY.register()
class LD(nn.Module):
    """Distillation of box distributions on positives and around them, and of class scores on positives.

    Positives are those of the student's own assignment. The valuable region leaves them out.

    - "main": w_main sum over positives and sides of max-score mean_kl(T) / 4, the student's largest class score as
      weight, as its own box losses have.
    - "vlr": w_vlr sum over the region and sides of IoU mean_kl(T) / 16.
    - "cls": w_cls sum over levels of the mean over the level's positives of mean_kl(T_cls) of the class logits, read as
      a softmax. Nothing with a single class.

    "main" and "vlr" are sums over the batch, as in the released code, where they go with two images a process;
    PER_IMAGE divides them by the number of images.

    Args:
        w_main, w_vlr, w_cls: weights; 0 leaves a term out.
        temperature, cls_temperature: T and T_cls.
        vlr_lower: where the region begins, as a fraction of the threshold.
        region: "paper", by DIoU, or "released", by what the released code has in its place: overlap / anchor area -
            (distance of centres / diagonal of the enclosing box)^2. The published weights were used with the latter,
            whose region is much larger around large boxes.
        per_image: means over images instead of sums.
    """

    heads = ("distributions",)
    positive = ("temperature", "cls_temperature")
    not_negative = ("w_main", "w_vlr", "w_cls")

    def __init__(
        self, w_main: float = 0.25, w_vlr: float = 0.25, w_cls: float = 10.0, temperature: float = 10.0,
        cls_temperature: float = 2.0, vlr_lower: float = 0.25, region: str = "paper", per_image: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if region not in ("paper", "released"):
            raise ValueError(f"DISTILL.LOSSES: LD: REGION must be 'paper' or 'released', not {region!r}")
        self.region = region
        self.w_main, self.w_vlr, self.w_cls = w_main, w_vlr, w_cls
        self.temperature, self.cls_temperature = temperature, cls_temperature
        self.vlr_lower, self.per_image = vlr_lower, per_image

    def forward(self, pairs: list[HeadPair], context: DistillContext) -> dict[str, torch.Tensor]:
        (pair,) = pairs
        share = 1 / len(pair.labels) if self.per_image else 1.0
        terms = {}
        if self.w_main:
            score = at_least_float32(pair.student_logits[pair.positives].detach()).sigmoid().amax(dim=1)
            terms["main"] = self.w_main * share * (score[:, None] * self._sides(pair, pair.positives)).sum() / 4
        if self.w_vlr:
            boxes = context.boxes(pair.labels.device)
            region = pair.region(*boxes, lower=self.vlr_lower, distance=self.region) * (pair.labels == pair.classes)
            inside = region.nonzero(as_tuple=True)
            terms["vlr"] = self.w_vlr * share * (region[inside][:, None] * self._sides(pair, inside)).sum() / 16
        if self.w_cls:
            s, t = pair.student_logits[pair.positives], pair.teacher_logits[pair.positives]
            divergence = mean_kl(s, t, self.cls_temperature)
            terms["cls"] = self.w_cls * mean_per_level(divergence, pair.positives[1], pair.level_sizes).sum()
        return terms

    def _sides(self, pair: HeadPair, where: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """(P, 4) divergences at P locations."""
        s, t = (x[where].unflatten(1, (4, -1)) for x in (pair.student_boxes, pair.teacher_boxes))
        return mean_kl(s, t, self.temperature)
