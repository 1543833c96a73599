"""From a config to the parts of a distillation: the teacher, the losses and what combines them with a student."""

from __future__ import annotations

import logging
from functools import partial

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from ..config import load_config
from ..distill.balance import GradientBalance
from ..distill.distiller import Distiller, FrozenTeacher, student_shapes
from ..distill.losses import build_losses
from ..distill.schedules import distillation_factor
from ..resolution import get_resolution
from .checkpoint import CheckedCheckpointer

logger = logging.getLogger(__name__)


def load_teacher(entry: dict, student: CfgNode) -> FrozenTeacher:
    """Build and load the teacher of one DISTILL.TEACHERS entry {CONFIG, WEIGHTS}, for the student of a config.

    Raises:
        ValueError: a wrong entry, a checkpoint that does not have all of the teacher's tensors, or a channel order
            that cannot be made of the student's.
        FileNotFoundError: CONFIG or WEIGHTS does not exist.
    """
    if set(entry) - {"CONFIG", "WEIGHTS"} or not entry.get("CONFIG") or not entry.get("WEIGHTS"):
        raise ValueError(f"a DISTILL.TEACHERS entry needs CONFIG and WEIGHTS and nothing else, got {dict(entry)}")
    cfg = load_config(entry["CONFIG"], ["MODEL.DEVICE", student.MODEL.DEVICE])
    reverse = other_channel_order(student, cfg)
    model = build_model(cfg)
    try:
        CheckedCheckpointer(model).load_all(entry["WEIGHTS"], entry["CONFIG"])
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"DISTILL.TEACHERS: {error}") from None
    return FrozenTeacher(model, student.DISTILL.TEACHER_BN, reverse)


def other_channel_order(student: CfgNode, teacher: CfgNode) -> bool:
    """Whether the teacher needs the student's images with RGB and BGR exchanged.

    Raises:
        ValueError: INPUT.FORMAT differ otherwise, or the student starts from weights of the other order.
    """
    ours, theirs = student.INPUT.FORMAT, teacher.INPUT.FORMAT
    if ours == theirs:
        return False
    if {ours, theirs} != {"RGB", "BGR"}:
        raise ValueError(f"INPUT.FORMAT is {ours} for the student and {theirs} for the teacher; images are the same")
    if student.DISTILL.INIT_STUDENT == "full":
        raise ValueError(
            f"INPUT.FORMAT is {ours} for the student and {theirs} for the teacher, whose whole network "
            "DISTILL.INIT_STUDENT full copies: take neck_and_head or none, or one INPUT.FORMAT for both"
        )
    return True


def build_balance(cfg: CfgNode, losses: nn.ModuleList) -> GradientBalance | None:
    """What DISTILL.BALANCE asks for, or None; sets the weights that it replaces to 1.

    Raises:
        ValueError: wrong values, or DISTILL.READING, which sets the weights too.
    """
    balance = cfg.DISTILL.BALANCE
    if balance.RATIO == 0 or not len(losses):
        return None
    if cfg.DISTILL.READING:
        raise ValueError("DISTILL.BALANCE.RATIO and DISTILL.READING both set the weights of the losses: choose one")
    for loss in losses:
        loss.weight = 1.0
    return GradientBalance(balance.RATIO, balance.ITERS, [loss.name for loss in losses]).to(cfg.MODEL.DEVICE)


def build_distiller(cfg: CfgNode, student: nn.Module, teacher: FrozenTeacher) -> Distiller:
    """``student`` under ``teacher`` with the losses, schedule and weights of the config.

    Raises:
        ValueError, TypeError: DISTILL asks for something unknown, or for what these two cannot be compared by.
    """
    resolution = get_resolution(cfg.DISTILL.STUDENT_RESOLUTION)
    factor = partial(
        distillation_factor,
        max_iter=cfg.SOLVER.MAX_ITER,
        warmup_iters=cfg.DISTILL.WARMUP_ITERS,
        decay_from=cfg.DISTILL.DECAY_FROM,
        decay_to=cfg.DISTILL.DECAY_TO,
    )
    factor(0)  # wrong values are an error here and not in the first step
    levels = student_shapes(student, resolution), teacher.shapes()
    if levels[0].keys() != levels[1].keys():
        logger.warning(
            "Student (%s) and teacher (%s) differ in their levels (H frame): is DISTILL.STUDENT_RESOLUTION %s right?",
            *map(", ".join, levels), resolution.name,
        )  # fmt: skip
    losses = build_losses(cfg.DISTILL.LOSSES, *levels, seed=cfg.SEED).to(cfg.MODEL.DEVICE)
    return Distiller(
        student,
        teacher,
        losses,
        resolution,
        w_det=cfg.DISTILL.W_DET,
        factor=factor,
        downsample_mode=cfg.MSAD.DOWNSAMPLE,
        balance=build_balance(cfg, losses),
    )
