"""Which student map is compared with which teacher map, and how the student's is brought to the teacher's shape."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec, get_norm
from torch import nn

MATCHES = ("by_stride", "by_index")
ADAPTORS = ("auto", "always", "none")


class LevelPair(NamedTuple):
    """Two levels to compare, H-frame names. ``teacher`` also names the pair: its grid is where they are compared."""

    student: str
    teacher: str


def pair_levels(
    student: dict[str, ShapeSpec], teacher: dict[str, ShapeSpec], match: str, levels: list[str] | None
) -> list[LevelPair]:
    """Pair the levels of two pyramids; pairs are in order of the teacher's strides, finest first.

    Args:
        student, teacher: H-frame names, strides in H pixels, finest first.
        match: "by_stride": levels of equal name, and so of equal grid. "by_index": the i-th of the student with the
            i-th of the teacher, whatever their strides.
        levels: the teacher's levels that take part, in any order; None: all that have a partner.

    Raises:
        ValueError: a level without a partner, or of another stride under by_stride; names it.
    """
    if match not in MATCHES:
        raise ValueError(f"DISTILL.LOSSES: MATCH must be one of {', '.join(MATCHES)}, not {match!r}")
    by_index = match == "by_index"
    partner = dict(zip(teacher, student)) if by_index else {name: name for name in student if name in teacher}
    levels = list(levels) if levels else [name for name in teacher if name in partner]
    if not levels:
        raise ValueError(f"student levels {sorted(student)} and teacher levels {sorted(teacher)} have none in common")
    for name in levels:
        if name not in teacher or name not in partner:
            lacking = name in teacher if by_index else name not in student
            side, shapes = ("student", student) if lacking else ("teacher", teacher)
            raise ValueError(
                f"distillation level {name} (H frame) does not exist in the {side}, which has {sorted(shapes)}; "
                "check DISTILL.STUDENT_RESOLUTION, DISTILL.LOSSES[].LEVELS and the IN_FEATURES of both models"
                + ("" if by_index else "; MATCH: by_index pairs levels of different strides")
            )
        if not by_index and student[name].stride != teacher[name].stride:
            raise ValueError(
                f"distillation level {name} (H frame): student has stride {student[name].stride}, teacher "
                f"{teacher[name].stride}; MATCH: by_index pairs levels of different strides"
            )
    return [LevelPair(partner[name], name) for name in sorted(levels, key=lambda name: teacher[name].stride)]


def build_adaptation(
    pairs: list[LevelPair],
    student: dict[str, ShapeSpec],
    teacher: dict[str, ShapeSpec],
    adaptor: str = "auto",
    norm: str = "",
) -> nn.ModuleDict:
    """A 1x1 convolution from the student's to the teacher's channels for each pair that needs one, by pair name.

    Args:
        adaptor: "auto": where channels differ; "always"; "none": differing channels are an error.
        norm: normalisation after the convolution, by detectron2's names ("BN", ...); "": none.

    Raises:
        ValueError: an unknown mode, or channels that differ under "none"; names the level.
    """
    if adaptor not in ADAPTORS:
        raise ValueError(f"DISTILL.LOSSES: ADAPTOR must be one of {', '.join(ADAPTORS)}, not {adaptor!r}")
    adaptors = nn.ModuleDict()
    for pair in pairs:
        s, t = student[pair.student].channels, teacher[pair.teacher].channels
        if adaptor == "none" and s != t:
            raise ValueError(
                f"distillation level {pair.teacher} (H frame): student has {s} channels, teacher {t}; "
                "ADAPTOR: auto adds a 1x1 convolution"
            )
        if adaptor == "always" or s != t:
            convolution = nn.Conv2d(s, t, 1, bias=not norm)
            adaptors[pair.teacher] = nn.Sequential(convolution, get_norm(norm, t)) if norm else convolution
    return adaptors


def resize_to(x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """``x`` (N, C, h, w), bilinearly resized to the height and width of ``grid`` if it has others."""
    size = grid.shape[-2:]
    return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)
