"""From a config to a distillation: teachers, assistants, losses and what combines them with a student."""

from __future__ import annotations

from functools import partial

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from torch import nn

from ..config import load_config
from ..config_values import nearest
from ..distill.assistants import build_assistants
from ..distill.balance import GradientBalance
from ..distill.distiller import Distiller, student_shapes
from ..distill.losses import build_losses
from ..distill.losses.registry import ShapesAt
from ..distill.options import check_options
from ..distill.schedules import distillation_factor
from ..distill.teachers import Ensemble, FrozenTeacher
from ..files import require_checkpoint
from ..modeling.adapters import adapt
from ..modeling.taps import NECK, before_neck
from ..resolution import get_resolution
from .assistants import AssistantStep
from .checkpoint import CheckedCheckpointer

# With values of the kind that is asked for.
TEACHER_KEYS = {"NAME": "", "CONFIG": "", "WEIGHTS": "", "SCALE": 1.0}
ENSEMBLE_KEYS = {"NAME": "", "MEAN_OF": ("",), "WEIGHTS_OF": (1.0,)}


def teacher_entries(cfg: CfgNode) -> list[dict]:
    """DISTILL.TEACHERS with all names: "teacher", or "teacher_1", "teacher_2", ... where an entry of several has none.

    Raises:
        ValueError: an entry that is neither {NAME, CONFIG, WEIGHTS, SCALE} nor {NAME, MEAN_OF, WEIGHTS_OF}, a value of
            another kind, a name twice, or a mean of unknown teachers; says which.
    """
    several, entries = len(cfg.DISTILL.TEACHERS) > 1, []
    for number, entry in enumerate(cfg.DISTILL.TEACHERS, start=1):
        keys = ENSEMBLE_KEYS if "MEAN_OF" in entry else TEACHER_KEYS
        wrong = [key for key in entry if key not in keys]
        lacking = [] if "MEAN_OF" in entry else [key for key in ("CONFIG", "WEIGHTS") if not entry.get(key)]
        if wrong or lacking:
            what = f"no key {wrong[0]}{nearest(wrong[0], list(keys))}" if wrong else f"no {' and no '.join(lacking)}"
            form = f"{{{', '.join(keys)}}}"
            raise ValueError(f"DISTILL.TEACHERS[{number - 1}] has {what}; an entry is {form}, not {dict(entry)}")
        entry = check_options(f"DISTILL.TEACHERS[{number - 1}]", entry, keys)
        entries.append({"NAME": f"teacher_{number}" if several else "teacher", **entry})
    names = [entry["NAME"] for entry in entries]
    for entry in entries:
        if names.count(entry["NAME"]) > 1 or entry["NAME"] == "student":
            raise ValueError(f"DISTILL.TEACHERS: the name {entry['NAME']} is taken")
        for member in entry.get("MEAN_OF", []):
            if member not in names or "MEAN_OF" in entries[names.index(member)]:
                raise ValueError(f"DISTILL.TEACHERS: {entry['NAME']} is a mean of {member!r}, which is none of them")
    return entries


def first_teacher(cfg: CfgNode) -> str | None:
    """Name of the teacher that initialises the student: the first that is no mean of others."""
    return next((entry["NAME"] for entry in teacher_entries(cfg) if "MEAN_OF" not in entry), None)


def build_teacher(entry: dict, student: CfgNode) -> FrozenTeacher:
    """The teacher of one entry of :func:`teacher_entries` for the student of a config, before its weights are loaded.

    Raises:
        ValueError: a channel order that cannot be made of the student's.
        FileNotFoundError: CONFIG or WEIGHTS does not exist.
    """
    cfg = load_config(entry["CONFIG"], ["MODEL.DEVICE", student.MODEL.DEVICE])
    reverse = other_channel_order(student, cfg, initialises=entry.get("NAME") in (None, first_teacher(student)))
    try:
        require_checkpoint(entry["WEIGHTS"])
    except FileNotFoundError as error:
        raise FileNotFoundError(f"DISTILL.TEACHERS: {error}") from None
    return FrozenTeacher(
        build_model(cfg),
        student.DISTILL.TEACHER_BN,
        reverse,
        name=entry.get("NAME", "teacher"),
        scale=float(entry.get("SCALE", 1.0)),
        downsample_mode=cfg.MSAD.DOWNSAMPLE,
    )


def load_teacher(entry: dict, student: CfgNode) -> FrozenTeacher:
    """:func:`build_teacher` with its weights.

    Raises:
        ValueError: also a checkpoint that does not have all of the teacher's tensors.
    """
    teacher = build_teacher(entry, student)
    try:
        CheckedCheckpointer(teacher.model).load_all(entry["WEIGHTS"], entry["CONFIG"])
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"DISTILL.TEACHERS: {error}") from None
    return teacher


def check_distillation(cfg: CfgNode) -> None:
    """Build all that a run will train, without any weights, and forget it.

    Raises:
        what the run would raise before its first iteration: see :func:`build_distillation`.
    """
    with torch.random.fork_rng(devices=[]):
        student = build_model(cfg)
        teachers = [build_teacher(entry, cfg) for entry in teacher_entries(cfg) if "MEAN_OF" not in entry]
        if teachers:
            build_distiller(cfg, student, teachers)


def other_channel_order(student: CfgNode, teacher: CfgNode, initialises: bool = True) -> bool:
    """Whether the teacher needs the student's images with RGB and BGR exchanged.

    Args:
        initialises: whether it is the first teacher, from which the student starts.

    Raises:
        ValueError: INPUT.FORMAT differ otherwise, or the student starts from weights of the other order.
    """
    ours, theirs = student.INPUT.FORMAT, teacher.INPUT.FORMAT
    if ours == theirs:
        return False
    if {ours, theirs} != {"RGB", "BGR"}:
        raise ValueError(f"INPUT.FORMAT is {ours} for the student and {theirs} for the teacher; images are the same")
    if initialises and student.DISTILL.INIT_STUDENT == "full":
        raise ValueError(
            f"INPUT.FORMAT is {ours} for the student and {theirs} for the teacher, whose whole network "
            "DISTILL.INIT_STUDENT full copies: take neck_and_head or none, or one INPUT.FORMAT for both"
        )
    return True


def build_balance(cfg: CfgNode, losses: nn.ModuleList) -> GradientBalance | None:
    """What DISTILL.BALANCE asks for, or None; sets the weights that it replaces to 1.

    Raises:
        ValueError: wrong values, or DISTILL.WEIGHTING, which sets the weights too.
    """
    balance = cfg.DISTILL.BALANCE
    if balance.RATIO == 0 or not len(losses):
        return None
    if cfg.DISTILL.WEIGHTING:
        raise ValueError("DISTILL.BALANCE.RATIO and DISTILL.WEIGHTING both set the weights of the losses: choose one")
    for loss in losses:
        loss.weight = 1.0
    places = {loss.name: loss.place for loss in losses}
    return GradientBalance(balance.RATIO, balance.ITERS, places, cfg.DISTILL.START_ITER).to(cfg.MODEL.DEVICE)


def compile_backbone(detector: nn.Module) -> None:
    """torch.compile what ``detector.backbone`` computes, in place; compilation happens at the first calls.

    The method is compiled and not the module: the hooks by which distillation reads the pyramid stay outside the
    compiled code, and parameter names do not change.
    """
    # All backbones share the code of one method, which is specialised by network, resolution, mode and kind of size:
    # more often than the 8 times after which torch silently stops compiling.
    config = torch._dynamo.config
    config.cache_size_limit = max(config.cache_size_limit, 64)
    branches = getattr(detector.backbone, "branches", None)  # of a fusion student, compiled one by one
    for network in [detector.backbone] if branches is None else branches.values():
        network.forward = torch.compile(network.forward)


def build_distillation(cfg: CfgNode, student: nn.Module) -> Distiller:
    """``student`` under the teachers of DISTILL.TEACHERS, with everything that the config says of them.

    Raises:
        ValueError, FileNotFoundError: DISTILL asks for something unknown, or for what these networks cannot be compared
            by.
    """
    teachers = [load_teacher(entry, cfg) for entry in teacher_entries(cfg) if "MEAN_OF" not in entry]
    for teacher in teachers:
        if cfg.SOLVER.CHANNELS_LAST:
            teacher.model.to(memory_format=torch.channels_last)
        if cfg.SOLVER.COMPILE:
            compile_backbone(teacher.detector)
    return build_distiller(cfg, student, teachers)


def build_distiller(cfg: CfgNode, student: nn.Module, teachers: list[FrozenTeacher]) -> Distiller:
    """``student`` under loaded teachers with the losses, assistants, schedule and weights of the config.

    Raises:
        ValueError: DISTILL asks for something unknown, or for what these networks cannot be compared by.
    """
    resolution = get_resolution(cfg.DISTILL.STUDENT_RESOLUTION)
    factor = partial(
        distillation_factor,
        max_iter=cfg.SOLVER.MAX_ITER,
        warmup_iters=cfg.DISTILL.WARMUP_ITERS,
        decay_from=cfg.DISTILL.DECAY_FROM,
        decay_to=cfg.DISTILL.DECAY_TO,
        start_iter=cfg.DISTILL.START_ITER,
    )
    factor(0)  # wrong values are an error here and not in the first step
    ensembles = [
        Ensemble(entry["NAME"], entry["MEAN_OF"], entry.get("WEIGHTS_OF"))
        for entry in teacher_entries(cfg)
        if "MEAN_OF" in entry
    ]
    ours, shapes = student_shapes(student, resolution), {teacher.name: teacher.shapes() for teacher in teachers}
    sources: dict[str, ShapesAt] = {teacher.name: teacher.shapes for teacher in teachers}
    sources |= {ensemble.name: _at_neck(ensemble.name, ensemble.shapes(shapes)) for ensemble in ensembles}
    if cfg.DISTILL.FREEZE_BACKBONE_ITERS > 0:
        before_neck(student)  # which is an error here and not in the trainer's hook
    if cfg.DISTILL.ASSISTANTS:
        adapt(student).check_whole()
    assistants = build_assistants(cfg.DISTILL.ASSISTANTS, ours, shapes, seed=cfg.SEED)
    sources |= {name: _at_neck(name, assistant.shapes()) for name, assistant in assistants.items()}
    members = {member for ensemble in ensembles for member in ensemble.members}
    default = [name for name in sources if name not in members and name not in assistants]
    losses = build_losses(
        cfg.DISTILL.LOSSES, partial(student_shapes, student, resolution), sources, seed=cfg.SEED, default=default
    ).to(cfg.MODEL.DEVICE)
    distiller = Distiller(
        student,
        teachers,
        losses,
        resolution,
        ensembles=ensembles,
        w_det=cfg.DISTILL.W_DET,
        factor=factor,
        start_iter=cfg.DISTILL.START_ITER,
        downsample_mode=cfg.MSAD.DOWNSAMPLE,
        balance=build_balance(cfg, losses),
    )
    entries = {entry["NAME"]: entry for entry in cfg.DISTILL.ASSISTANTS}
    distiller.assistants = [
        AssistantStep(name, assistant.to(cfg.MODEL.DEVICE), cfg, entries[name], student)
        for name, assistant in assistants.items()
    ]
    return distiller


def _at_neck(name: str, shapes: dict[str, ShapeSpec]) -> ShapesAt:
    def at(tap: str) -> dict[str, ShapeSpec]:
        if tap != NECK:
            raise ValueError(f"DISTILL.LOSSES: {name} has features at the neck alone, not at TAP {tap}")
        return shapes

    return at
