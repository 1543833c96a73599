"""What each method trains: the configs of its teachers and of the student, from that of the detector at H."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from detectron2.config import CfgNode

from ..modeling.student_config import TWO_STAGE, student_config, train_at
from ..resolution import get_resolution
from .choices import Choices

STUDENT, TEACHER, BASELINE = "student", "teacher", "baseline_H"
Configs = dict[str, CfgNode]


def _entry(file: str, choices: Choices, name: str = "teacher") -> dict:
    """Of DISTILL.TEACHERS; the weights of a teacher that is still to be trained are set when it is."""
    weights = str(Path(choices.checkpoint).resolve()) if choices.checkpoint else f"{file}.pth"
    return {"NAME": name, "CONFIG": f"{file}.yaml", "WEIGHTS": weights}


def _student(base: CfgNode, choices: Choices, teachers: list[dict], losses: list[dict]) -> CfgNode:
    cfg = student_config(base, choices.resolution)
    cfg.DISTILL.TEACHERS, cfg.DISTILL.LOSSES = teachers, losses
    cfg.DISTILL.WARMUP_ITERS = min(50, max(cfg.SOLVER.MAX_ITER // 10, 1))
    return cfg


def trained_alone(base: CfgNode, choices: Choices) -> CfgNode:
    """The student's architecture without a teacher, from the weights of ``base``, on images as the student sees."""
    cfg = student_config(base, choices.resolution)
    train_at(cfg, get_resolution(choices.resolution).shift)
    cfg.MODEL.WEIGHTS = base.MODEL.WEIGHTS
    return cfg


def distil_aligned(cfg: CfgNode, teacher: dict, ratio: float) -> None:
    """Let a student's config distil aligned features from one teacher, at a weight that is found by gradients.

    What weight serves depends on the teacher's features and on the data. Warm-up and measuring take at most a tenth
    of the training each.

    Args:
        cfg: edited in place.
        teacher: entry of DISTILL.TEACHERS.
        ratio: of the gradients, DISTILL.BALANCE.RATIO.
    """
    cfg.DISTILL.TEACHERS, cfg.DISTILL.LOSSES = [teacher], [{"NAME": "AlignedL1"}]
    cfg.DISTILL.BALANCE.RATIO = ratio
    for node, key in ((cfg.DISTILL, "WARMUP_ITERS"), (cfg.DISTILL.BALANCE, "ITERS")):
        node[key] = min(node[key], max(cfg.SOLVER.MAX_ITER // 10, 1))


def _aligned(base: CfgNode, choices: Choices, file: str, ratio: float) -> CfgNode:
    student = _student(base, choices, [], [])
    distil_aligned(student, _entry(file, choices), ratio)
    return student


def _msad(base: CfgNode, choices: Choices, larger: Callable[[], CfgNode]) -> Configs:
    """Qi et al., CVPR 2021: a multi-resolution teacher and aligned features; a given teacher is taken as it is."""
    if choices.checkpoint:
        return {BASELINE: base, STUDENT: _aligned(base, choices, BASELINE, 0.5)}
    student = _aligned(base, choices, TEACHER, 2.0)
    student.DISTILL.DECAY_FROM, student.DISTILL.DECAY_TO = 0.3, 0.8
    several = base.clone()
    several.MSAD.DETECTOR = base.MODEL.META_ARCHITECTURE
    several.MODEL.META_ARCHITECTURE = "MultiScaleTeacher"
    several.MSAD.RESOLUTIONS = ["H", "L"] if choices.resolution == "L" else ["H", "L", "EL"]
    return {TEACHER: several, STUDENT: student}


def _scalekd(base: CfgNode, choices: Choices, larger: Callable[[], CfgNode]) -> Configs:
    """Zhu et al., CVPR 2023: the teacher sees the image at twice the student's size or more."""
    student = _student(base, choices, [_entry(BASELINE, choices)], [])
    two_stage = student.MODEL.META_ARCHITECTURE in TWO_STAGE
    sdf, beta, nu = (0.07, 0.5, 0.4) if two_stage else (0.01, 0.2, 0.25)
    student.DISTILL.LOSSES = [
        {"NAME": "SDF", "SOURCE": "teacher", "TAP": "bottom_up", "MATCH": "by_index", "LEVELS": ["res5"],
         "WEIGHT": sdf},
        {"NAME": "Chen", "SOURCE": "CrossScaleAssistant", "BBOX": "direct", "WEIGHT": beta, "NU": nu},
    ]  # fmt: skip
    student.DISTILL.ASSISTANTS = [{
        "NAME": "CrossScaleAssistant", "OPTIMIZER": "Adam", "BASE_LR": 3.0e-4, "WEIGHT_DECAY": 1.0e-4,
        "SCHEDULE": "constant", "RATIO": 16 if two_stage else 8, "MATCH": "by_stride",
    }]  # fmt: skip
    student.DISTILL.START_ITER = student.SOLVER.MAX_ITER // 3  # as 30k of 90k
    return {BASELINE: base, STUDENT: student}


def _progressive(base: CfgNode, choices: Choices, larger: Callable[[], CfgNode]) -> Configs:
    """Cao et al., ICML 2023: a teacher near to the student first, then a stronger one, half of the time each."""
    names = {"near": BASELINE, "far": "teacher_far"}
    entries = [_entry(file, choices, name) for name, file in names.items()]
    student = _student(base, choices, entries, [{"NAME": "AlignedL1", "WEIGHT": 0.3}])
    half = max(student.SOLVER.MAX_ITER // 2, 1)
    student.DISTILL.STAGES = [{"TEACHERS": [name], "SOLVER": {"MAX_ITER": half}} for name in names]
    return {BASELINE: base, "teacher_far": larger(), STUDENT: student}


def _none(base: CfgNode, choices: Choices, larger: Callable[[], CfgNode]) -> Configs:
    """The student's architecture without distillation; a given model is only where it starts."""
    if not choices.checkpoint:
        return {STUDENT: trained_alone(base, choices)}
    return {BASELINE: base, STUDENT: _student(base, choices, [_entry(BASELINE, choices)], [])}


BUILDERS: dict[str, Callable[[CfgNode, Choices, Callable[[], CfgNode]], Configs]] = {
    "msad": _msad, "scalekd": _scalekd, "progressive": _progressive, "none": _none,
}  # fmt: skip
