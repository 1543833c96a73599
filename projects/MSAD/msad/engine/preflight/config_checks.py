"""Checks of a student's config against its teacher's. They need no model and no data."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec

from ...config import detector_architecture
from ...distill.losses.registry import loss_class
from ...finding import ERROR, OK, WARNING, Finding, check
from ...modeling.student_config import WITH_ANCHORS
from ...resolution import Resolution
from ..build import other_channel_order

_IMAGENET_RED = 120.0  # the mean of red in the usual statistics is above, that of blue (103 to 104) below


@check("classes")
def check_classes(student: Sequence[str] | None, teacher: Sequence[str] | None, shared: bool) -> Generator:
    """Names and order of the data sets' classes; ``shared``: heads are copied or compared, so they must be equal."""
    if student is None or teacher is None:
        fix = "name them: DATASETS.REGISTER[].CLASSES, or DATASETS.TRAIN in the teacher's yaml"
        yield WARNING, "the class names of student or teacher are not known", fix
        return None
    if list(student) == list(teacher):
        return f"{len(student)} classes, equal in student and teacher"
    if sorted(student) == sorted(teacher):
        place = next(i for i, (a, b) in enumerate(zip(student, teacher)) if a != b)
        differ = f"class {place} is {student[place]!r} for the student and {teacher[place]!r} for the teacher"
        fix = "list DATASETS.REGISTER[].CLASSES, or number the categories of the JSON files, alike"
        yield ERROR if shared else WARNING, f"equal classes in another order: {differ}", fix
        return None
    differing = ", ".join(sorted(set(student) ^ set(teacher))[:3])
    # Other classes are a choice (features can be distilled all the same), unless heads have equally many by accident.
    level = ERROR if shared and len(student) == len(teacher) else WARNING
    text = f"{len(student)} classes of the student and {len(teacher)} of the teacher differ, e.g. in {differing}"
    fix = "train the teacher on the student's classes, or set DISTILL.INIT_STUDENT none and compare features only"
    yield level, text, fix


@check("pixels")
def check_pixels(cfg: CfgNode, teacher: CfgNode, initialises: bool = True) -> Generator:
    """Channel order, and mean and standard deviation of pixels; the student starts from a teacher that initialises."""
    try:
        if other_channel_order(cfg, teacher, initialises):
            formats = f"{cfg.INPUT.FORMAT} for the student, {teacher.INPUT.FORMAT} for the teacher"
            yield Finding(OK, "channel order", f"{formats}, which gets the channels reversed")
    except ValueError as error:
        fix = f"set INPUT.FORMAT {teacher.INPUT.FORMAT} for both, or DISTILL.INIT_STUDENT neck_and_head or none"
        yield Finding(ERROR, "channel order", str(error), fix)
    for side, config in (("student", cfg), ("teacher", teacher)):
        mean, order = list(config.MODEL.PIXEL_MEAN), config.INPUT.FORMAT
        red_first = mean[0] > _IMAGENET_RED > mean[-1] and max(mean) > 2
        blue_first = mean[-1] > _IMAGENET_RED > mean[0]
        if (red_first and order == "BGR") or (blue_first and order == "RGB"):
            text = f"{side}: PIXEL_MEAN {mean} looks as if channels were in the other order than INPUT.FORMAT {order}"
            yield Finding(WARNING, "channel order", text, "reverse PIXEL_MEAN and PIXEL_STD, or change INPUT.FORMAT")
    direction = 1 if cfg.INPUT.FORMAT == teacher.INPUT.FORMAT else -1
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        ours, theirs = list(cfg.MODEL[key]), list(teacher.MODEL[key])[::direction]
        if ours != theirs:
            fix = "use one normalisation, unless the student's own pretrained weights need theirs"
            yield WARNING, f"MODEL.{key} is {ours} for the student and {theirs} for the teacher", fix
    return f"{cfg.INPUT.FORMAT}, equal mean and standard deviation"


@check("image size")
def check_sizes(cfg: CfgNode, teacher: CfgNode, resolution: Resolution) -> Generator:
    """Training images are H for both; the student is tested on images that are as much smaller as it is."""
    ours, theirs = tuple(cfg.INPUT.MIN_SIZE_TRAIN), tuple(teacher.INPUT.MIN_SIZE_TRAIN)
    if ours != theirs:
        fix = "give both the sizes of H: the student's images are downsampled on the device"
        yield WARNING, f"INPUT.MIN_SIZE_TRAIN is {ours} for the student and {theirs} for the teacher", fix
    factor = 2**resolution.shift
    wanted, given = teacher.INPUT.MIN_SIZE_TEST / factor, cfg.INPUT.MIN_SIZE_TEST
    if given and wanted and abs(given / wanted - 1) > 0.1:
        text = f"INPUT.MIN_SIZE_TEST of the student is {given}; the teacher's over {factor} is {wanted:g}"
        yield WARNING, text, f"set INPUT.MIN_SIZE_TEST {wanted:g}"
    return f"trained on H, tested at {given or 'the size of the files'}"


@check("levels")
def check_levels(
    student: dict[str, ShapeSpec], teacher: dict[str, ShapeSpec], matches: Collection[str] = ("by_stride",)
) -> Generator:
    """Levels by H-frame names, strides in H pixels, channels.

    Args:
        student, teacher: levels that heads read, finest first.
        matches: MATCH of the losses between features; without any, only weights are copied or predictions compared.
    """
    if matches and "by_stride" not in matches:
        pairs = ", ".join(f"{ours} with {theirs}" for ours, theirs in zip(student, teacher))
        return f"paired by index: {pairs} of the teacher (names of the H frame)"
    serious = ERROR if "by_stride" in matches else WARNING
    common = [name for name in student if name in teacher]
    sides = f"student {', '.join(student)}; teacher {', '.join(teacher)} (names of the H frame)"
    fix = "check DISTILL.STUDENT_RESOLUTION and IN_FEATURES of both"
    if not common:
        more = "at L the student reads p2 where the teacher reads p3; or pair levels of different strides: MATCH: "
        yield serious, f"no level in common: {sides}", f"{fix}: {more}by_index"
        return None
    if len(common) < max(len(student), len(teacher)):
        yield WARNING, f"only {', '.join(common)} are in both: {sides}", fix
    for name in common:
        s, t = student[name], teacher[name]
        if s.stride != t.stride:
            text = f"{name} has stride {s.stride} for the student and {t.stride} for the teacher, in pixels of H"
            fix = "give both pyramids levels of equal strides, or pair them with MATCH: by_index"
            yield Finding(serious, "strides", text, fix)
    other = [name for name in common if student[name].channels != teacher[name].channels]
    if other:
        yield Finding(OK, "channels", f"differ at {', '.join(other)}: losses get 1x1 adaptation layers")
    return f"{', '.join(common)} pair with equal strides and channels"


@check("anchors")
def check_anchors(cfg: CfgNode, teacher: CfgNode, shift: int) -> Generator:
    """Anchors of the student, times 2^shift, are the teacher's; for detectors that have any."""
    detector = detector_architecture(cfg)
    if detector != detector_architecture(teacher) or detector not in WITH_ANCHORS:
        return None
    ours = [[side * 2**shift for side in level] for level in cfg.MODEL.ANCHOR_GENERATOR.SIZES]
    theirs = [list(level) for level in teacher.MODEL.ANCHOR_GENERATOR.SIZES]
    same = len(ours) == len(theirs) and all(
        len(a) == len(b) and all(abs(x / y - 1) < 0.02 for x, y in zip(a, b)) for a, b in zip(ours, theirs)
    )
    if not same:
        key = "MODEL.ANCHOR_GENERATOR.SIZES"
        text = f"{key} of the student, in pixels of H, are {ours}; the teacher's are {theirs}"
        yield WARNING, text, f"divide the teacher's sizes by {2**shift} for the student"
    return "those of the student cover the same objects as the teacher's"


@check("two-stage values")
def check_two_stage(entries: Sequence[Mapping[str, Any]], weighted: bool) -> Generator:
    """Losses of an R-CNN that are left at defaults for dense detectors though two-stage values are published.

    Args:
        entries: of DISTILL.LOSSES, keys in lower case.
        weighted: whether WEIGHT counts, which DISTILL.WEIGHTING and BALANCE replace.
    """
    for entry in entries:
        published = getattr(loss_class(entry.get("name")), "two_stage", {})
        unset = {k.upper(): v for k, v in published.items() if k not in entry and (weighted or k != "weight")}
        if unset:
            text = f"{entry['name']} has its defaults for dense detectors, but this is an R-CNN: {', '.join(unset)}"
            said = {key: str(value) if isinstance(value, bool) else f"{value:g}" for key, value in unset.items()}
            values = ", ".join(map(" ".join, said.items()))
            fix = f"set what is published for two-stage detectors, {values}, or other values of your own"
            yield WARNING, text, fix


@check("schedule")
def check_schedule(cfg: CfgNode) -> Generator:
    """Start, warm-up and balance of distillation, and warm-up of the learning rate, against the length of training."""
    last, distills, start = cfg.SOLVER.MAX_ITER, bool(cfg.DISTILL.TEACHERS), cfg.DISTILL.START_ITER
    for key, value in (("WARMUP_ITERS", cfg.DISTILL.WARMUP_ITERS), ("BALANCE.ITERS", cfg.DISTILL.BALANCE.ITERS)):
        if distills and start + value >= last and (key == "WARMUP_ITERS" or cfg.DISTILL.BALANCE.RATIO):
            after = f"DISTILL.START_ITER {start} and " if start else ""
            text = f"{after}DISTILL.{key} {value} {'are' if after else 'is'} not below SOLVER.MAX_ITER {last}"
            yield WARNING, text, f"lower DISTILL.{'START_ITER' if start >= last else key}"
    end = cfg.DISTILL.DECAY_TO * last if cfg.DISTILL.DECAY_FROM < 1 else last
    if distills and cfg.DISTILL.LOSSES and last > start >= end:
        text = f"distillation begins at DISTILL.START_ITER {start} and ends at iteration {end:.0f}: it never counts"
        yield WARNING, text, "lower DISTILL.START_ITER, or raise DISTILL.DECAY_TO"
    # As many updates at a small learning rate are most of a short run.
    if last < 2 * cfg.SOLVER.WARMUP_ITERS:
        text = f"SOLVER.WARMUP_ITERS {cfg.SOLVER.WARMUP_ITERS} is more than half of SOLVER.MAX_ITER {last}"
        yield WARNING, text, f"set SOLVER.WARMUP_ITERS {max(last // 10, 1)}, a tenth"
    return f"{last} iterations, {cfg.SOLVER.WARMUP_ITERS} of warm-up"
