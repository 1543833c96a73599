"""Start a student from its teacher's weights."""

from __future__ import annotations

import logging
import re

import torch
from torch import nn

from ..modeling.adapters import detector_of
from ..modeling.backbones.switchable import ConvAWS, SwitchableAtrousConv

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


def _group(name: str) -> str:
    """What is copied as a whole or not at all: outside the backbone a part of a head, as "head.cls_subnet"."""
    return name if name.startswith("backbone.") else ".".join(name.split(".")[:2])


def _match(student: nn.Module, teacher: nn.Module, mode: str) -> tuple[dict[str, str], dict[str, str]]:
    """The student's tensors that ``mode`` asks for: name -> name in the teacher, and name -> why it is not copied.

    In a head, equal names and shapes do not mean equal tasks: convolutions of towers with and without normalisation
    are numbered differently, and the box output of one class of heads means something else in another. Heads of
    different classes share nothing, and a part of a head is copied only if all of its tensors fit.
    """
    source, own = _teacher_tensors(teacher), student.state_dict()
    names = {name: _BRANCH.sub("backbone.", name) for name in own}
    if mode == "neck_and_head":
        names = {own_name: name for own_name, name in names.items() if not _is_bottom_up(name)}
    detector = detector_of(teacher)
    different: dict[str, str] = {}
    for own_name, name in names.items():
        part = name.split(".")[0]
        types = [type(getattr(model, part, None)).__name__ for model in (student, detector)]
        if name not in source:
            different[own_name] = "absent"
        elif source[name].shape != own[own_name].shape:
            different[own_name] = f"{tuple(own[own_name].shape)} (teacher {tuple(source[name].shape)})"
        elif part != "backbone" and types[0] != types[1]:
            different[own_name] = f"of a {types[0]} (teacher {types[1]})"
        elif isinstance(_owner(detector, name), SwitchableAtrousConv) and not isinstance(
            _owner(student, own_name), SwitchableAtrousConv
        ):
            different[own_name] = "of a convolution (teacher: a switchable one)"
    incomplete = {_group(own_name) for own_name in different}
    for own_name in names:
        if _group(own_name) in incomplete and own_name not in different:
            different[own_name] = f"in {_group(own_name)}, of which other tensors do not fit"
    return {own_name: name for own_name, name in names.items() if own_name not in different}, different


def _owner(model: nn.Module, tensor: str) -> nn.Module | None:
    """The module that has a tensor; None if ``model`` has no such module."""
    try:
        return model.get_submodule(tensor.rpartition(".")[0])
    except AttributeError:
        return None


def _copy_filters(student: nn.Module, teacher: nn.Module, matching: dict[str, str]) -> None:
    """Let convolutions with copied weights have the teacher's filters where one of the two standardises its weights."""
    weights = {own_name: name for own_name, name in matching.items() if own_name.endswith(".weight")}
    for own_name, name in weights.items():
        own, other = _owner(student, own_name), _owner(teacher, name)
        if isinstance(other, ConvAWS) and not isinstance(own, ConvAWS):
            own.weight.copy_(other.filters())
        elif isinstance(own, ConvAWS) and not isinstance(other, ConvAWS):
            own.keep_filters()


def copies(student: nn.Module, teacher: nn.Module, mode: str) -> list[str]:
    """Names of the student's tensors that :func:`init_student` fills from the teacher."""
    return [] if mode == "none" else list(_match(student, teacher, mode)[0])


@torch.no_grad()
def init_student(student: nn.Module, teacher: nn.Module, mode: str) -> dict[str, int]:
    """Copy parameters and buffers of equal name and shape from ``teacher`` to ``student``.

    Names of pyramid convolutions belong to the levels of a network's own input, so an L student takes those that the
    teacher uses in its L branch. Every branch of a fusion student takes from the teacher's one backbone what fits its
    width, and its gate that of a teacher on the same number of resolutions. Of heads, only whole parts (a tower, an
    output) are taken, and only between heads of one class. Convolutions compute what the teacher's do, also where one
    of the two standardises its weights (ConvAWS); switchable ones give nothing to others.

    Args:
        student: a detector.
        teacher: a multi-resolution teacher, or a detector.
        mode: "full" (everything, as in the released code), "neck_and_head" (all but the bottom-up network) or "none".

    Returns:
        counts {"copied", "kept"} of the student's tensors that ``mode`` asks for.

    Raises:
        ValueError: unknown mode, or nothing could be copied.
    """
    if mode not in MODES:
        raise ValueError(f"DISTILL.INIT_STUDENT must be one of {MODES}, not {mode!r}")
    if mode == "none":
        return {"copied": 0, "kept": 0}
    matching, different = _match(student, teacher, mode)
    parts = {".".join(name.split(".")[:2]): f"{name} {why}" for name, why in reversed(different.items())}
    examples = "; ".join(list(parts.values())[::-1][:4])  # the first of each part
    if not matching:
        raise ValueError(
            f"DISTILL.INIT_STUDENT '{mode}': no tensor of the teacher fits the student; "
            f"{len(different)} differ: {examples}"
        )
    source, own = _teacher_tensors(teacher), student.state_dict()
    for own_name, name in matching.items():
        own[own_name].copy_(source[name])
    _copy_filters(student, detector_of(teacher), matching)
    logger.info(
        "Student initialised from the teacher (%s): %d tensors copied, %d kept their own initialisation",
        mode, len(matching), len(different),
    )  # fmt: skip
    if different:
        logger.warning("%d tensors of the student do not fit the teacher, e.g. %s", len(different), examples)
    return {"copied": len(matching), "kept": len(different)}
