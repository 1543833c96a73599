"""Checks of a student's config against its teacher's: functions of plain data that return findings."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec

from ..config import detector_architecture
from ..distill.losses.registry import loss_class
from ..resolution import Resolution
from .build import other_channel_order

OK, WARNING, ERROR = "ok", "warning", "error"
_IMAGENET_RED = 120.0  # the mean of red in the usual statistics is above, that of blue (103 to 104) below


class Finding(NamedTuple):
    """``level`` is "ok", "warning" or "error"; ``check`` what was looked at; ``fix`` what to do, empty for "ok"."""

    level: str
    check: str
    text: str
    fix: str = ""


def check_classes(student: Sequence[str] | None, teacher: Sequence[str] | None, shared: bool) -> list[Finding]:
    """Names and order of the data sets' classes; ``shared``: heads are copied or compared, so they must be equal."""
    if student is None or teacher is None:
        return [
            Finding(
                WARNING,
                "classes",
                "the class names of student or teacher are not known",
                "name them: DATASETS.REGISTER[].CLASSES, or DATASETS.TRAIN in the teacher's yaml",
            )
        ]
    if list(student) == list(teacher):
        return [Finding(OK, "classes", f"{len(student)} classes, equal in student and teacher")]
    level = ERROR if shared else WARNING
    if sorted(student) == sorted(teacher):
        place = next(i for i, (a, b) in enumerate(zip(student, teacher)) if a != b)
        return [
            Finding(
                level,
                "classes",
                f"equal classes in another order: class {place} is {student[place]!r} for the "
                f"student and {teacher[place]!r} for the teacher",
                "list DATASETS.REGISTER[].CLASSES, or number the categories of the JSON files, alike",
            )
        ]
    differing = sorted(set(student) ^ set(teacher))
    # Other classes are a choice (features can be imitated all the same), unless heads have equally many by accident.
    level = ERROR if shared and len(student) == len(teacher) else WARNING
    return [
        Finding(
            level,
            "classes",
            f"{len(student)} classes of the student and {len(teacher)} of the teacher differ, "
            f"e.g. in {', '.join(differing[:3])}",
            "train the teacher on the student's classes, or set DISTILL.INIT_STUDENT none and compare features only",
        )
    ]


def check_pixels(cfg: CfgNode, teacher: CfgNode) -> list[Finding]:
    """Channel order, and mean and standard deviation of pixels."""
    out = []
    try:
        if other_channel_order(cfg, teacher):
            formats = f"{cfg.INPUT.FORMAT} for the student, {teacher.INPUT.FORMAT} for the teacher"
            out.append(Finding(OK, "channel order", f"{formats}, which gets the channels reversed"))
    except ValueError as error:
        fix = f"set INPUT.FORMAT {teacher.INPUT.FORMAT} for both, or DISTILL.INIT_STUDENT neck_and_head or none"
        out.append(Finding(ERROR, "channel order", str(error), fix))
    for side, config in (("student", cfg), ("teacher", teacher)):
        mean = list(config.MODEL.PIXEL_MEAN)
        red_first = mean[0] > _IMAGENET_RED > mean[-1] and max(mean) > 2
        blue_first = mean[-1] > _IMAGENET_RED > mean[0]
        if (red_first and config.INPUT.FORMAT == "BGR") or (blue_first and config.INPUT.FORMAT == "RGB"):
            out.append(
                Finding(
                    WARNING,
                    "channel order",
                    f"{side}: PIXEL_MEAN {mean} looks as if channels were in the "
                    f"other order than INPUT.FORMAT {config.INPUT.FORMAT}",
                    "turn PIXEL_MEAN and PIXEL_STD round, or change INPUT.FORMAT",
                )
            )
    direction = 1 if cfg.INPUT.FORMAT == teacher.INPUT.FORMAT else -1
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        ours, theirs = list(cfg.MODEL[key]), list(teacher.MODEL[key])[::direction]
        if ours != theirs:
            out.append(
                Finding(
                    WARNING,
                    "pixels",
                    f"MODEL.{key} is {ours} for the student and {theirs} for the teacher",
                    "use one normalisation, unless the student's own pretrained weights need theirs",
                )
            )
    return out or [Finding(OK, "pixels", f"{cfg.INPUT.FORMAT}, equal mean and standard deviation")]


def check_sizes(cfg: CfgNode, teacher: CfgNode, resolution: Resolution) -> list[Finding]:
    """Training images are H for both; the student is tested on images that are as much smaller as it is."""
    out, share = [], 2**resolution.shift
    if tuple(cfg.INPUT.MIN_SIZE_TRAIN) != tuple(teacher.INPUT.MIN_SIZE_TRAIN):
        out.append(
            Finding(
                WARNING,
                "image size",
                f"INPUT.MIN_SIZE_TRAIN is {tuple(cfg.INPUT.MIN_SIZE_TRAIN)} for the "
                f"student and {tuple(teacher.INPUT.MIN_SIZE_TRAIN)} for the teacher",
                "give both the sizes of H: the student's images are reduced on the device",
            )
        )
    wanted, given = teacher.INPUT.MIN_SIZE_TEST / share, cfg.INPUT.MIN_SIZE_TEST
    if given and abs(given / wanted - 1) > 0.1:
        out.append(
            Finding(
                WARNING,
                "image size",
                f"INPUT.MIN_SIZE_TEST of the student is {given}; the teacher's over {share} is {wanted:g}",
                f"set INPUT.MIN_SIZE_TEST {wanted:g}",
            )
        )
    return out or [Finding(OK, "image size", f"trained on H, tested at {given or 'the size of the files'}")]


def check_levels(
    student: dict[str, ShapeSpec], teacher: dict[str, ShapeSpec], matches: Collection[str] = ("by_stride",)
) -> list[Finding]:
    """Levels by H-frame names, strides in H pixels, channels.

    Args:
        student, teacher: levels that heads read, finest first.
        matches: MATCH of the losses between features; without any, only weights are copied or predictions compared.
    """
    if matches and "by_stride" not in matches:
        pairs = ", ".join(f"{ours} with {theirs}" for ours, theirs in zip(student, teacher))
        return [Finding(OK, "levels", f"paired by index: {pairs} of the teacher (names of the H frame)")]
    serious = ERROR if "by_stride" in matches else WARNING
    common = [name for name in student if name in teacher]
    sides = f"student {', '.join(student)}; teacher {', '.join(teacher)} (names of the H frame)"
    if not common:
        return [
            Finding(
                serious,
                "levels",
                f"no level in common: {sides}",
                "check DISTILL.STUDENT_RESOLUTION and IN_FEATURES of both: at L the student reads p2 where the "
                "teacher reads p3; or pair levels of different strides: MATCH: by_index",
            )
        ]
    out = []
    if len(common) < max(len(student), len(teacher)):
        out.append(
            Finding(
                WARNING,
                "levels",
                f"only {', '.join(common)} are in both: {sides}",
                "check DISTILL.STUDENT_RESOLUTION and IN_FEATURES of both",
            )
        )
    for name in common:
        s, t = student[name], teacher[name]
        if s.stride != t.stride:
            out.append(
                Finding(
                    serious,
                    "strides",
                    f"{name} has stride {s.stride} for the student and {t.stride} for the teacher, in pixels of H",
                    "give both pyramids levels of equal strides, or pair them with MATCH: by_index",
                )
            )
    other = [name for name in common if student[name].channels != teacher[name].channels]
    if other:
        out.append(Finding(OK, "channels", f"differ at {', '.join(other)}: losses get 1x1 adaptors"))
    return out or [Finding(OK, "levels", f"{', '.join(common)} pair with equal strides and channels")]


def check_anchors(cfg: CfgNode, teacher: CfgNode, shift: int) -> list[Finding]:
    """Anchors of the student, times 2^shift, are the teacher's; for detectors that have any."""
    detector = detector_architecture(cfg)
    if detector != detector_architecture(teacher) or detector not in ("RetinaNet", "GeneralizedRCNN"):
        return []
    ours = [[side * 2**shift for side in level] for level in cfg.MODEL.ANCHOR_GENERATOR.SIZES]
    theirs = [list(level) for level in teacher.MODEL.ANCHOR_GENERATOR.SIZES]
    same = len(ours) == len(theirs) and all(
        len(a) == len(b) and all(abs(x / y - 1) < 0.02 for x, y in zip(a, b)) for a, b in zip(ours, theirs)
    )
    if same:
        return [Finding(OK, "anchors", "those of the student cover the same objects as the teacher's")]
    return [
        Finding(
            WARNING,
            "anchors",
            f"MODEL.ANCHOR_GENERATOR.SIZES of the student, in pixels of H, are {ours}; the teacher's are {theirs}",
            f"divide the teacher's sizes by {2**shift} for the student",
        )
    ]


def check_two_stage(entries: Sequence[Mapping[str, Any]], weighted: bool) -> list[Finding]:
    """Losses of an R-CNN that are left at defaults for dense detectors though two-stage values are published.

    Args:
        entries: of DISTILL.LOSSES, keys in lower case.
        weighted: whether WEIGHT counts, which DISTILL.READING and BALANCE replace.
    """
    out = []
    for entry in entries:
        published = getattr(loss_class(entry.get("name")), "two_stage", {})
        unset = {k: v for k, v in published.items() if k not in entry and (weighted or k != "weight")}
        if unset:
            keys, values = ", ".join(map(str.upper, unset)), ", ".join(f"{k.upper()} {v:g}" for k, v in unset.items())
            out.append(
                Finding(
                    WARNING,
                    "two-stage values",
                    f"{entry['name']} has its defaults for dense detectors, but this is an R-CNN: {keys}",
                    f"set what is published for two-stage detectors, {values}, or other values of your own",
                )
            )
    return out


def check_schedule(cfg: CfgNode) -> list[Finding]:
    """Warm-up, decay and balance against the length of training."""
    out, last = [], cfg.SOLVER.MAX_ITER
    for key, value in (("WARMUP_ITERS", cfg.DISTILL.WARMUP_ITERS), ("BALANCE.ITERS", cfg.DISTILL.BALANCE.ITERS)):
        if value >= last and (key == "WARMUP_ITERS" or cfg.DISTILL.BALANCE.RATIO):
            out.append(
                Finding(
                    WARNING,
                    "schedule",
                    f"DISTILL.{key} {value} is not below SOLVER.MAX_ITER {last}",
                    f"lower DISTILL.{key}",
                )
            )
    return out or [Finding(OK, "schedule", f"{last} iterations, {cfg.DISTILL.WARMUP_ITERS} of warm-up")]
