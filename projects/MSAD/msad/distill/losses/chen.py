"""Weighted soft classification and teacher-bounded regression (Chen et al., NIPS 2017)."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..context import DistillContext, HeadPair
from .registry import DISTILL_LOSS_REGISTRY
from .shared import at_least_float32

ANCHORS_AT_ONCE = 16384  # of each image, in the loss of dense heads


def soft_cross_entropy(s: torch.Tensor, t: torch.Tensor, w_bg: float = 1.5) -> torch.Tensor:
    """-sum_c w_c P_t^c log P_s^c with w = w_bg for the background, the last class, and 1 for others; eq. (3).

    Args:
        s, t: logits (..., K + 1) of a softmax.

    Returns:
        (...). Unless w_bg is 1, it is least where the student's background is above the teacher's.
    """
    terms = -at_least_float32(t).softmax(dim=-1) * at_least_float32(s).log_softmax(dim=-1)
    return terms[..., :-1].sum(dim=-1) + w_bg * terms[..., -1]


def soft_binary_cross_entropy(s: torch.Tensor, t: torch.Tensor, w_bg: float = 1.5, focus: float = 0.0) -> torch.Tensor:
    """The same of K sigmoids: each is a problem of two outcomes, object (weight 1) and background (w_bg).

    Args:
        s, t: logits (..., K).
        focus: exponent of a factor |sigmoid(s) - sigmoid(t)|, which gives locations on which the two agree no weight,
            as focal loss does for hard labels.

    Returns:
        (...), summed over classes.
    """
    s, t = at_least_float32(s), at_least_float32(t)
    p = t.sigmoid()
    terms = -p * F.logsigmoid(s) - w_bg * (1 - p) * F.logsigmoid(-s)
    if focus:
        terms = terms * (s.sigmoid() - p).abs() ** focus
    return terms.sum(dim=-1)


def bounded_regression(
    s: torch.Tensor, t: torch.Tensor, target: torch.Tensor, margin: float = 0.0
) -> torch.Tensor:
    """|R_s - y|^2 where |R_s - y|^2 + margin > |R_t - y|^2, else 0; eq. (4).

    It pulls to the ground truth and never to the teacher, which only decides where.

    Args:
        s, t, target: encoded boxes (P, 4) of student, teacher and ground truth.

    Returns:
        (P,).
    """
    ours, bound = ((x - target).square().sum(dim=-1) for x in (s, t))
    return torch.where(ours + margin > bound, ours, 0.0)


def direct_regression(s: torch.Tensor, t: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Smooth L1 distance (beta 1) of encoded boxes (P, 4) from the teacher's, (P,); eq. (2) of ScaleKD (CVPR 2023)."""
    return F.smooth_l1_loss(s, t, reduction="none").sum(dim=-1)


@DISTILL_LOSS_REGISTRY.register()
class Chen(nn.Module):
    """The two losses on predictions of Chen et al.; the hint is ``FitNet`` or ``AlignedL1`` with ADAPTATION: always.

    The teacher's heads are evaluated on the student's anchors and on the proposals that the student drew. Of each head
    there is a term "cls", (1 - mu) / mu times the soft classification loss (the hard one stays in the detection loss
    with weight 1; the ratio is that of mu L_hard + (1 - mu) L_soft), and a term "reg", nu times the bounded regression
    of positives. They are divided by what the head's detection losses are divided by: the number of positives of a
    dense head, as its detector counts them, of drawn anchors or proposals in an R-CNN (of a process's batch).

    Args:
        mu: share of the hard labels in classification, in (0, 1].
        nu: weight of the bounded regression.
        margin: by how much the student must beat the teacher to be let go.
        w_bg: weight of the background.
        focus: of dense heads, see :func:`soft_binary_cross_entropy`; heads that draw anchors need none.
        bbox: "bounded", or "direct": smooth L1 to the teacher's boxes in its place, as ScaleKD has it.
        box_shift: H pixels by which the teacher's boxes are moved along the diagonal (ScaleKD, Table 1: 0, 6, 12).
    """

    heads = ("dense", "distributions", "rcnn")
    not_negative = ("nu", "margin", "w_bg", "focus")

    def __init__(
        self, mu: float = 0.5, nu: float = 0.5, margin: float = 0.0, w_bg: float = 1.5, focus: float = 2.0,
        bbox: str = "bounded", box_shift: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if bbox not in ("bounded", "direct"):
            raise ValueError(f"DISTILL.LOSSES: Chen: BBOX must be 'bounded' or 'direct', not {bbox!r}")
        self.bbox, self.box_shift = bbox, box_shift
        if not 0 < mu <= 1:
            raise ValueError(f"Chen: MU must be in (0, 1], not {mu}")
        self.mu, self.nu, self.margin, self.w_bg, self.focus = mu, nu, margin, w_bg, focus

    def forward(self, pairs: list[HeadPair], context: DistillContext) -> dict[str, torch.Tensor]:
        terms = {}
        for pair in pairs:
            soft = self._classification(pair).sum() / pair.normalizer
            deltas = pair.matched_deltas(self.box_shift)
            boxes = direct_regression(*deltas) if self.bbox == "direct" else bounded_regression(*deltas, self.margin)
            terms[f"{pair.name}_cls"] = (1 - self.mu) / self.mu * soft
            terms[f"{pair.name}_reg"] = self.nu * boxes.sum() / pair.normalizer
        return terms

    def _classification(self, pair: HeadPair) -> torch.Tensor:
        """(N, R), 0 where the step leaves an anchor out."""
        logits = pair.student_logits, pair.teacher_logits
        if pair.softmax:
            loss = soft_cross_entropy(*logits, self.w_bg)
        else:
            focus = self.focus if pair.name == "dense" else 0.0
            # Some ten maps of all anchors and classes lie between logits and loss. Where there are many anchors they
            # are computed again for the gradient, a part at a time: the student's whole graph waits beside them.
            parts = [*zip(*(x.split(ANCHORS_AT_ONCE, dim=1) for x in logits))]
            of_part = soft_binary_cross_entropy
            if len(parts) > 1:
                of_part = partial(checkpoint, of_part, use_reentrant=False, preserve_rng_state=False)
            loss = torch.cat([of_part(*part, self.w_bg, focus) for part in parts], dim=1)
        return torch.where(pair.labels >= 0, loss, 0.0)
