"""Which student map is compared with which teacher map, and how the student's is brought to the teacher's shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.layers import ShapeSpec, get_norm
from torch import nn

from ...finding import error_text

MATCHES = ("by_stride", "by_index")
ADAPTATIONS = ("auto", "always", "none")


class LevelPair(NamedTuple):
    """Two levels to compare. ``teacher`` also names the pair: its grid is where they are compared.

    ``strides`` are those of the student's and of the teacher's level, in H pixels.
    """

    student: str
    teacher: str
    strides: tuple[float, float]


def pair_levels(
    student: dict[str, ShapeSpec],
    teacher: dict[str, ShapeSpec],
    match: str,
    levels: Sequence[str] = (),
    from_last: bool = False,
) -> list[LevelPair]:
    """Pair the levels of two pyramids; pairs are in order of the teacher's strides, finest first.

    Args:
        student, teacher: channels and strides (H pixels) by name, finest first.
        match: "by_stride": levels of equal stride, and so of equal grid; those of equal name where there are several.
            "by_index": the i-th of the student with the i-th of the teacher, whatever their strides.
        levels: the teacher's levels that take part, in any order; none: all that have a partner.
        from_last: by_index counts from the coarsest, as is right for the stages of networks: they end in the last one,
            and may or may not show their stem.

    Raises:
        ValueError: a level without a partner, or of another stride under by_stride; names it.
    """
    if match not in MATCHES:
        raise ValueError(f"DISTILL.LOSSES: MATCH must be one of {', '.join(MATCHES)}, not {match!r}")
    for side, shapes in (("student", student), ("teacher", teacher)):
        if not shapes:
            raise ValueError(
                f"the {side} has no pyramid whose levels could be compared; of a segmentor, losses compare what TAP "
                "names: bottom_up, decoder or scores"
            )
    by_index = match == "by_index"
    partner = _by_index(student, teacher, from_last) if by_index else _by_stride(student, teacher)
    if not levels:
        # Stages of networks are called alike at every resolution; levels of one name must have one stride.
        named_alike = from_last and not by_index
        levels = [
            name for name in teacher if name in partner
            and not (named_alike and student[partner[name]].stride != teacher[name].stride)
        ]  # fmt: skip
    levels = list(levels)
    if not levels:
        raise ValueError(
            f"student levels {_strides(student)} and teacher levels {_strides(teacher)} (strides in H pixels) have "
            "none in common; MATCH: by_index pairs levels of different strides and resizes the student's"
        )
    for name in levels:
        if name not in teacher or name not in partner:
            lacking = name in teacher if by_index else name not in student
            side, shapes = ("student", student) if lacking else ("teacher", teacher)
            raise ValueError(
                f"distillation level {name} (H frame) does not exist in the {side}, which has {sorted(shapes)}; "
                "check DISTILL.STUDENT_RESOLUTION, DISTILL.LOSSES[].LEVELS and the IN_FEATURES of both models"
                + ("" if by_index else "; MATCH: by_index pairs levels of different strides")
            )
        if not by_index and student[partner[name]].stride != teacher[name].stride:
            raise ValueError(
                f"distillation level {name} (H frame): student has stride {student[name].stride:g}, teacher "
                f"{teacher[name].stride:g}; MATCH: by_index pairs levels of different strides"
            )
    pairs = [LevelPair(partner[t], t, (student[partner[t]].stride, teacher[t].stride)) for t in levels]
    return sorted(pairs, key=lambda pair: pair.strides[1])


def _by_index(student: dict[str, ShapeSpec], teacher: dict[str, ShapeSpec], from_last: bool) -> dict[str, str]:
    order = reversed if from_last else iter
    return dict(zip(order(teacher), order(student)))


def _by_stride(student: dict[str, ShapeSpec], teacher: dict[str, ShapeSpec]) -> dict[str, str]:
    partner = {name: name for name in student if name in teacher}
    for name, shape in teacher.items():
        equal = [own for own in student if student[own].stride == shape.stride]
        if equal and (name not in partner or name not in equal):
            partner[name] = equal[0]
    return partner


def _strides(shapes: dict[str, ShapeSpec]) -> dict[str, float]:
    return {name: round(shape.stride, 2) for name, shape in shapes.items()}


def build_adaptation(
    pairs: list[LevelPair],
    student: dict[str, ShapeSpec],
    teacher: dict[str, ShapeSpec],
    adaptation: str = "auto",
    norm: str = "",
) -> nn.ModuleDict:
    """A 1x1 convolution from the student's to the teacher's channels for each pair that needs one, by pair name.

    Args:
        adaptation: "auto": where channels differ; "always"; "none": differing channels are an error.
        norm: normalisation after the convolution, by detectron2's names ("BN", ...); "": none.

    Raises:
        ValueError: an unknown mode, channels that differ under "none" or do not fit ``norm``; names the level.
    """
    if adaptation not in ADAPTATIONS:
        raise ValueError(f"DISTILL.LOSSES: ADAPTATION must be one of {', '.join(ADAPTATIONS)}, not {adaptation!r}")
    layers = nn.ModuleDict()
    for pair in pairs:
        s, t = student[pair.student].channels, teacher[pair.teacher].channels
        if adaptation == "none" and s != t:
            raise ValueError(
                f"distillation level {pair.teacher} (H frame): student has {s} channels, teacher {t}; "
                "ADAPTATION: auto adds a 1x1 convolution"
            )
        if adaptation == "always" or s != t:
            convolution = nn.Conv2d(s, t, 1, bias=not norm)
            try:
                layers[pair.teacher] = nn.Sequential(convolution, get_norm(norm, t)) if norm else convolution
            except (KeyError, ValueError) as error:  # an unknown name, channels that make no groups
                where = f"distillation level {pair.teacher} (H frame): ADAPTATION_NORM {norm} of {t} channels"
                raise ValueError(f"DISTILL.LOSSES: {where}: {error_text(error)}") from None
    return layers


def crop_to_common(
    student: torch.Tensor, teacher: torch.Tensor, strides: tuple[float, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both maps (N, C, h, w), cut to the area that both cover; both begin at the image's corner.

    Args:
        strides: of the student's and of the teacher's map, in H pixels.
    """
    sides = zip(student.shape[-2:], teacher.shape[-2:])
    h, w = (min(s * strides[0], t * strides[1]) for s, t in sides)  # H pixels
    student, teacher = (
        x[..., : math.ceil(h / stride - 1e-6), : math.ceil(w / stride - 1e-6)]
        for x, stride in zip((student, teacher), strides)
    )
    return student, teacher
