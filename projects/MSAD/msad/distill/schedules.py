"""Weight of distillation over training, as pure functions of the iteration."""

from __future__ import annotations


def distillation_factor(
    iteration: int,
    max_iter: int,
    warmup_iters: int = 0,
    decay_from: float = 1.0,
    decay_to: float = 1.0,
    start_iter: int = 0,
) -> float:
    """Factor in [0, 1] on the distillation losses.

    Is 0 before ``start_iter``, rises linearly to 1 in ``warmup_iters`` (released MSAD code: 500), stays there, and
    falls linearly from 1 at ``decay_from * max_iter`` to 0 at ``decay_to * max_iter``. A function of the iteration
    alone, so a resumed run continues where it was.
    """
    if not 0.0 <= decay_from <= decay_to <= 1.0:
        raise ValueError(f"need 0 <= DISTILL.DECAY_FROM <= DISTILL.DECAY_TO <= 1, got {decay_from}, {decay_to}")
    if iteration < start_iter:
        return 0.0
    factor = min((iteration - start_iter) / warmup_iters, 1.0) if warmup_iters > 0 else 1.0
    start, end = decay_from * max_iter, decay_to * max_iter
    if decay_from < 1.0 and iteration >= start:
        factor *= max((end - iteration) / (end - start), 0.0) if end > start else 0.0
    return factor


def paper_weights(weighting: str, lam: float, gamma: float) -> tuple[float, float, float]:
    """(w_fuse, w_det, w_distill) that the paper's lambda and gamma stand for.

    The main text is not explicit on how they enter. "convex": ``L_teacher = L_H + L_L + lambda L_F`` and
    ``L_student = gamma L_det + (1 - gamma) L_KD``. "additive": ``L_student = gamma L_det + lambda L_KD`` with the
    released 0.4 for the fused branch. L_KD is the sum over levels of the mean absolute difference times T = 3,
    the temperature of the released code.
    """
    temperature = 3.0
    if weighting == "convex":
        return lam, gamma, (1.0 - gamma) * temperature
    if weighting == "additive":
        return 0.4, gamma, lam * temperature
    raise ValueError(f"DISTILL.WEIGHTING must be '', 'convex' or 'additive', not {weighting!r}")
