"""The configs of teacher and student for a data set: detector, backbone, sizes, classes, schedule and method."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from detectron2.config import CfgNode, get_cfg

from ..config import add_msad_config, load_config
from ..engine.scaling import set_iterations
from ..export.plain import split_config
from ..modeling.adapters import num_classes_key
from ..modeling.student_config import LEVEL_KEYS, student_config
from .advice import Objects, finest_anchor, longest_side
from .backbones import choose_backbone, require_weights

DETECTORS = ("fcos", "retinanet", "faster_rcnn", "mask_rcnn", "keypoint_rcnn")
SCALES = {"1/2": "L", "1/4": "EL"}
# Passes over the training images, and the least number of iterations: small sets need more passes.
EPOCHS, LEAST_ITERATIONS = 24, 1500
STUDENT, TEACHER, BASELINE = "student", "teacher", "baseline_H"


@dataclass(frozen=True)
class Choices:
    """What a user chooses; see ``msad distill --help``.

    Attributes:
        detector, backbone: of teacher and student; not used with ``checkpoint``, whose own they are.
        scale, method: keys of SCALES and METHODS.
        checkpoint, config: a trained detectron2 model that teaches.
        short_side: of H in pixels; None: as recommended for the data.
        iterations: of every training; None: EPOCHS.
        controls: also train what the student is to be compared with.
        opts: KEY, VALUE, ... overrides of every config.
    """

    detector: str = "fcos"
    backbone: str = "efficientnet_lite0"
    scale: str = "1/2"
    method: str = "msad"
    checkpoint: str = ""
    config: str = ""
    short_side: int | None = None
    iterations: int | None = None
    controls: bool = False
    opts: tuple = field(default=())

    def check(self) -> None:
        """ValueError or FileNotFoundError if the choices do not go together."""
        for name, value, known in (("detector", self.detector, DETECTORS), ("scale", self.scale, SCALES),
                                   ("method", self.method, METHODS)):  # fmt: skip
            if value not in known:
                raise ValueError(f"--{name} {value}: not known; choose from {', '.join(known)}")
        for name in ("short_side", "iterations"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if bool(self.checkpoint) != bool(self.config):
            raise ValueError("--from CHECKPOINT and --config YAML belong together: weights and what they are of")
        if self.checkpoint and not Path(self.checkpoint).is_file():
            raise FileNotFoundError(f"--from: no such file: {self.checkpoint}")
        if self.checkpoint and self.method == "progressive":
            raise ValueError("--method progressive trains its two teachers; with --from use msad, scalekd or none")
        choice = choose_backbone(self.backbone)
        if not self.checkpoint:
            given = "MODEL.WEIGHTS" in self.opts[::2]
            require_weights(self.backbone, given)
            if self.method == "progressive":
                if not choice.larger:
                    raise ValueError(f"--method progressive: there is no larger backbone than {self.backbone}")
                require_weights(choice.larger, given)
        if self.scale == "1/4" and "rcnn" in self.detector and not self.checkpoint:
            raise ValueError(f"--scale 1/4: a {self.detector} reads P2 at H, and no network makes a map 4 times finer; "
                             "choose --scale 1/2, or --detector fcos or retinanet")  # fmt: skip

    @property
    def resolution(self) -> str:
        return SCALES[self.scale]


# --- the detector at H ------------------------------------------------------------------------------------------------


def detector_config(choices: Choices, entries: list[dict], content: dict, objects: Objects, short: int) -> CfgNode:
    """The detector at H, for the data.

    Args:
        entries: of DATASETS.REGISTER.
        content: from :func:`msad.data.layouts.read_contents`.
        short: short side of H in pixels.

    Raises:
        ValueError: the detector learns masks or keypoints, and there are none.
    """
    return _detector(choices, choices.backbone, entries, content, objects, short)


def _detector(
    choices: Choices, backbone: str, entries: list[dict], content: dict, objects: Objects, short: int
) -> CfgNode:
    lacking = {"mask_rcnn": ("masks", "polygons"), "keypoint_rcnn": ("keypoints", "keypoints")}.get(choices.detector)
    if lacking and not content[lacking[0]]:
        raise ValueError(f"--detector {choices.detector}: the data have no {lacking[1]}; choose faster_rcnn")
    choice = choose_backbone(backbone)
    opts = [item for pair in choice.opts.items() for item in pair]
    cfg = load_config(f"product/{choices.detector}.yaml", [*opts, "MODEL.WEIGHTS", choice.weights])
    _fit_data(cfg, entries, content, objects)
    _fit_sizes(cfg, objects, short)
    iterations = choices.iterations or max(LEAST_ITERATIONS, math.ceil(EPOCHS * len(objects.images)
                                                                       / cfg.SOLVER.IMS_PER_BATCH))  # fmt: skip
    set_iterations(cfg, iterations)
    cfg.SOLVER.CHECKPOINT_PERIOD = max(200, math.ceil(iterations / 5))
    return _override(cfg, choices)


def _override(cfg: CfgNode, choices: Choices) -> CfgNode:
    if choices.opts:
        given = load_config("", list(choices.opts))
        for key in choices.opts[::2]:
            *sections, name = key.split(".")
            source, target = given, cfg
            for section in sections:
                source, target = source[section], target[section]
            target[name] = source[name]
    return cfg


def _fit_data(cfg: CfgNode, entries: list[dict], content: dict, objects: Objects) -> None:
    cfg.DATASETS.REGISTER = entries
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (entries[0]["NAME"],), (entries[1]["NAME"],)
    section, name = num_classes_key(cfg).split(".")[1:]
    cfg.MODEL[section][name] = len(content["classes"])
    if cfg.MODEL.KEYPOINT_ON:
        cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = content["keypoints"]
    cfg.TEST.DETECTIONS_PER_IMAGE = max(cfg.TEST.DETECTIONS_PER_IMAGE, 100 * math.ceil(1.5 * objects.most / 100))


def _fit_sizes(cfg: CfgNode, objects: Objects, short: int) -> None:
    """Sizes of inputs; levels, the coarsest of which has four locations along a short side; anchors."""
    longest = longest_side(short)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (short,), longest
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = short, longest
    keys = LEVEL_KEYS[cfg.MODEL.META_ARCHITECTURE]
    finest = 2 if len(keys) == 2 else 3
    levels = range(finest, max(5, min(7, int(math.log2(short / 4)))) + 1) if finest == 3 else range(2, 7)
    cfg.MODEL.FPN.LEVELS = [f"p{level}" for level in levels]
    for key in keys:
        section, name = key.split(".")
        read = [level for level in levels if (section, level) != ("ROI_HEADS", 6)]
        cfg.MODEL[section][name] = [f"p{level}" for level in read]
    first = finest_anchor(objects, short, 2**finest)
    octaves = (1.0, 2 ** (1 / 3), 2 ** (2 / 3)) if finest == 3 else (1.0,)
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [
        [round(first * 2**index * octave, 3) for octave in octaves] for index in range(len(levels))
    ]


def given_config(choices: Choices, entries: list[dict], content: dict) -> CfgNode:
    """The user's trained detector, on the data; its own sizes stay.

    Raises:
        ValueError: it has another number of classes or keypoints than the data.
    """
    cfg = load_config(choices.config)
    cfg.MODEL.WEIGHTS = str(Path(choices.checkpoint).resolve())
    cfg.DISTILL = add_msad_config(get_cfg()).DISTILL
    section, name = num_classes_key(cfg).split(".")[1:]
    if cfg.MODEL[section][name] != len(content["classes"]):
        raise ValueError(
            f"--from: the model has {cfg.MODEL[section][name]} classes, the data have {len(content['classes'])} "
            f"({', '.join(content['classes'][:9])}); a student learns its teacher's classes"
        )
    if cfg.MODEL.KEYPOINT_ON and content["keypoints"] != cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS:
        raise ValueError(f"--from: the model has {cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS} keypoints, the data "
                         f"have {content['keypoints']}")  # fmt: skip
    if cfg.MODEL.MASK_ON and not content["masks"]:
        raise ValueError("--from: the model learns masks, and the data have none: add MODEL.MASK_ON False")
    cfg.DATASETS.REGISTER = entries
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (entries[0]["NAME"],), (entries[1]["NAME"],)
    if choices.short_side:
        cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (choices.short_side,), longest_side(choices.short_side)
        cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = choices.short_side, longest_side(choices.short_side)
    set_iterations(cfg, choices.iterations)
    return _override(cfg, choices)


# --- methods ----------------------------------------------------------------------------------------------------------

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


def _msad(base: CfgNode, choices: Choices, larger: Callable[[], CfgNode]) -> Configs:
    """Sun et al., CVPR 2021: a multi-resolution teacher and aligned features; a given teacher is taken as it is."""
    if choices.checkpoint:
        student = _student(base, choices, [_entry(BASELINE, choices)], [{"NAME": "AlignedL1"}])
        # The scale of a given teacher's features is unknown, so the weight is found by gradients.
        student.DISTILL.BALANCE.RATIO = 0.5
        student.DISTILL.BALANCE.ITERS = min(student.DISTILL.BALANCE.ITERS, max(student.SOLVER.MAX_ITER // 10, 1))
        return {BASELINE: base, STUDENT: student}
    student = _student(base, choices, [_entry(TEACHER, choices)], [{"NAME": "AlignedL1", "WEIGHT": 0.3}])
    student.DISTILL.DECAY_FROM, student.DISTILL.DECAY_TO = 0.3, 0.8
    several = base.clone()
    several.MSAD.DETECTOR = base.MODEL.META_ARCHITECTURE
    several.MODEL.META_ARCHITECTURE = "MultiScaleTeacher"
    several.MSAD.RESOLUTIONS = ["H", "L"] if choices.resolution == "L" else ["H", "L", "EL"]
    return {TEACHER: several, STUDENT: student}


def _scalekd(base: CfgNode, choices: Choices, larger: Callable[[], CfgNode]) -> Configs:
    """Zhu et al., CVPR 2023: the teacher sees the image at twice the student's size or more."""
    two_stage = len(LEVEL_KEYS[base.MODEL.META_ARCHITECTURE]) == 2
    sdf, beta, nu = (0.07, 0.5, 0.4) if two_stage else (0.01, 0.2, 0.25)
    losses = [
        {"NAME": "SDF", "SOURCE": "teacher", "TAP": "bottom_up", "MATCH": "by_index", "LEVELS": ["res5"],
         "WEIGHT": sdf},
        {"NAME": "Chen", "SOURCE": "CrossScaleAssistant", "BBOX": "direct", "WEIGHT": beta, "NU": nu},
    ]  # fmt: skip
    student = _student(base, choices, [_entry(BASELINE, choices)], losses)
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
        student = student_config(base, choices.resolution)
        student.INPUT.MIN_SIZE_TRAIN = (student.INPUT.MIN_SIZE_TEST,)
        student.INPUT.MAX_SIZE_TRAIN = student.INPUT.MAX_SIZE_TEST
        student.MODEL.WEIGHTS = base.MODEL.WEIGHTS
        return {STUDENT: student}
    return {BASELINE: base, STUDENT: _student(base, choices, [_entry(BASELINE, choices)], [])}


METHODS: dict[str, Callable[[CfgNode, Choices, Callable[[], CfgNode]], Configs]] = {
    "msad": _msad, "scalekd": _scalekd, "progressive": _progressive, "none": _none,
}  # fmt: skip


def make_configs(choices: Choices, entries: list[dict], content: dict, objects: Objects, short: int) -> Configs:
    """The configs of all that is trained, by name; the student is the last of those that are not controls.

    Raises:
        ValueError: see :func:`detector_config`, :func:`given_config`, and
            :func:`msad.modeling.student_config.student_config`.
    """
    data = entries, content, objects, short
    if choices.checkpoint:
        base = given_config(choices, entries, content)
    else:
        base = detector_config(choices, *data)
    larger = choose_backbone(choices.backbone).larger
    configs = METHODS[choices.method](base, choices, lambda: _detector(choices, larger, *data))
    if choices.controls:
        low = base.clone()
        for key in ("MIN_SIZE_TEST", "MAX_SIZE_TEST"):
            low.INPUT[key] = configs[STUDENT].INPUT[key]
        low.INPUT.MIN_SIZE_TRAIN, low.INPUT.MAX_SIZE_TRAIN = (low.INPUT.MIN_SIZE_TEST,), low.INPUT.MAX_SIZE_TEST
        configs = {**({} if choices.checkpoint else {BASELINE: base}), "baseline_L": low, **configs}
    return configs


def write_configs(configs: Configs, folder: Path) -> dict[str, Path]:
    """Write what differs from the defaults into ``folder``/NAME.yaml, with the student's teachers beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.yaml" for name in configs}
    for name, cfg in configs.items():
        tree = split_config(cfg, add_msad_config(get_cfg()))[0]
        tree.pop("OUTPUT_DIR", None)
        files[name].write_text(yaml.safe_dump({"VERSION": cfg.VERSION, **tree}, sort_keys=False))
    return files
