"""What naive L2 between raw features consists of: magnitudes and the angle between them (WACV 2024, eq. 10)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .losses.shared import at_least_float32


class Decomposition(NamedTuple):
    """Of each image of a batch, all (N,), with F flattened to D = C h w numbers.

    ``|F_t - F_s|^2 / D = magnitude + angular``.

    Attributes:
        m: |F_t|, norm of the teacher's map.
        n: |F_s|, norm of the student's.
        mn: m n / D, on which the weight of the angular term depends.
        angle: between the maps in degrees; 90 where one of them is zero.
        magnitude: (m - n)^2 / D.
        angular: 2 m n (1 - cos angle) / D.
    """

    m: torch.Tensor
    n: torch.Tensor
    mn: torch.Tensor
    angle: torch.Tensor
    magnitude: torch.Tensor
    angular: torch.Tensor


def decompose(student: torch.Tensor, teacher: torch.Tensor) -> Decomposition:
    """Split the mean squared difference of two maps (N, C, h, w) into its parts.

    Raises:
        ValueError: their shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"maps to decompose must have one shape, got {tuple(student.shape)}, {tuple(teacher.shape)}")
    s, t = (at_least_float32(x).flatten(1) for x in (student, teacher))
    size = s.shape[1]
    m, n, dot = t.norm(dim=1), s.norm(dim=1), (s * t).sum(dim=1)
    cosine = torch.where(m * n > 0, dot / (m * n).clamp(min=torch.finfo(m.dtype).tiny), 0.0).clamp(-1, 1)
    return Decomposition(
        m, n, m * n / size, cosine.acos().rad2deg(), (m - n).square() / size, 2 * (m * n - dot) / size
    )
