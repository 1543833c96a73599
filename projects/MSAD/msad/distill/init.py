"""Start a student from its teacher's weights."""

from __future__ import annotations

import logging
import re

import torch
from torch import nn

logger = logging.getLogger(__name__)
MODES = ("full", "neck_and_head", "none")
_BRANCH = re.compile(r"^backbone\.branches\.\w+\.")


def _teacher_tensors(teacher: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors of a detector, or of that inside a multi-resolution teacher, whose gate is then "backbone.fusion."."""
    if not hasattr(teacher, "detector"):
        return teacher.state_dict()
    gate = {f"backbone.fusion.{name}": value for name, value in teacher.fusion.state_dict().items()}
    return {**teacher.detector.state_dict(), **gate}


def _is_bottom_up(name: str) -> bool:
    return name.startswith("backbone.") and not name.startswith(
        ("backbone.fpn_", "backbone.top_block.", "backbone.fusion.")
    )


def copies(student: nn.Module, teacher: nn.Module, mode: str) -> list[str]:
    """Names of the student's tensors that :func:`init_student` fills from the teacher."""
    if mode == "none":
        return []
    source, output = _teacher_tensors(teacher), []
    for own_name, value in student.state_dict().items():
        name = _BRANCH.sub("backbone.", own_name)
        skipped = mode == "neck_and_head" and _is_bottom_up(name)
        if not skipped and name in source and source[name].shape == value.shape:
            output.append(own_name)
    return output


@torch.no_grad()
def init_student(student: nn.Module, teacher: nn.Module, mode: str) -> dict[str, int]:
    """Copy parameters and buffers of equal name and shape from ``teacher`` to ``student``.

    Names of pyramid convolutions belong to the levels of a network's own input, so an L student takes those that the
    teacher uses in its L branch. Every branch of a fusion student takes from the teacher's one backbone what fits its
    width, and its gate that of a teacher on the same number of resolutions.

    Args:
        student: a detector.
        teacher: a multi-resolution teacher, or a detector.
        mode: "full" (everything, as in the released code), "neck_and_head" (all but the bottom-up network) or "none".

    Returns:
        counts {"copied", "shape", "absent"} of the student's tensors that ``mode`` asks for.

    Raises:
        ValueError: unknown mode, or nothing could be copied.
    """
    if mode not in MODES:
        raise ValueError(f"DISTILL.INIT_STUDENT must be one of {MODES}, not {mode!r}")
    counts = {"copied": 0, "shape": 0, "absent": 0}
    if mode == "none":
        return counts
    source = _teacher_tensors(teacher)
    differing = []
    for own_name, value in student.state_dict().items():
        name = _BRANCH.sub("backbone.", own_name)
        if mode == "neck_and_head" and _is_bottom_up(name):
            continue
        if name not in source:
            counts["absent"] += 1
        elif source[name].shape != value.shape:
            counts["shape"] += 1
            differing.append(f"{own_name} {tuple(value.shape)} (teacher {tuple(source[name].shape)})")
        else:
            value.copy_(source[name])
            counts["copied"] += 1
    if not counts["copied"]:
        raise ValueError(
            f"DISTILL.INIT_STUDENT '{mode}': no tensor of the teacher fits the student "
            f"({counts['shape']} differ in shape, {counts['absent']} are absent)"
        )
    logger.info(
        "Student initialised from the teacher (%s): %d tensors copied, %d kept their own initialisation",
        mode, counts["copied"], counts["shape"] + counts["absent"],
    )  # fmt: skip
    if differing:
        logger.warning(
            "Teacher and student differ in shape (a narrower or wider student?) in %d tensors, e.g. %s",
            len(differing), "; ".join(differing[:3]),
        )  # fmt: skip
    return counts
