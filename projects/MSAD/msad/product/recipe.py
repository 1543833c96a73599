"""The configs of teacher and student for a data set: detector, backbone, sizes, classes and schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import yaml
from detectron2.config import CfgNode

from ..config import default_config, load_config
from ..config_values import set_value, value_at
from ..engine.scaling import set_iterations
from ..export.plain import split_config
from ..modeling.adapters import num_classes_key
from ..modeling.student_config import LEVEL_KEYS, TWO_STAGE, train_at
from ..resolution import get_resolution
from .advice import Objects, finest_anchor, longest_side
from .backbones import choose_backbone
from .choices import Choices
from .methods import BASELINE, BUILDERS, STUDENT, Configs, trained_alone

# Passes over the training images, and the least number of iterations at the batch of the yaml, which small sets need:
# from weights of any kind (more cost 100 images accuracy, docs/results/nuclei_pretrained.md), and from scratch.
EPOCHS, LEAST_ITERATIONS, LEAST_FROM_SCRATCH = 24, 600, 1500


def detector_config(
    choices: Choices, backbone: str, entries: list[dict], content: dict, objects: Objects, short: int
) -> CfgNode:
    """The detector at H on a backbone, for the data.

    Args:
        entries: of DATASETS.REGISTER.
        content: from :func:`msad.data.layouts.read_contents`.
        short: short side of H in pixels.

    Raises:
        ValueError: the detector learns masks or keypoints, and there are none.
    """
    lacking = {"mask_rcnn": ("masks", "polygons"), "keypoint_rcnn": ("keypoints", "keypoints")}.get(choices.detector)
    if lacking and not content[lacking[0]]:
        raise ValueError(f"--detector {choices.detector}: the data have no {lacking[1]}; choose faster_rcnn")
    choice = choose_backbone(backbone)
    opts = [item for pair in choice.opts.items() for item in pair]
    cfg = load_config(f"product/{choices.detector}.yaml", [*opts, "MODEL.WEIGHTS", choice.weights])
    _fit_data(cfg, entries, content, objects)
    _fit_sizes(cfg, objects, short)
    _fit_iterations(cfg, choices, objects)
    return _override(cfg, choices, lambda key: not _is_of_method(key))


def _fit_iterations(cfg: CfgNode, choices: Choices, objects: Objects) -> None:
    batch = cfg.SOLVER.IMS_PER_BATCH
    _override(cfg, choices, lambda key: key in ("SOLVER.IMS_PER_BATCH", "MODEL.WEIGHTS"))
    least = LEAST_ITERATIONS if cfg.MODEL.WEIGHTS else LEAST_FROM_SCRATCH
    images = max(EPOCHS * len(objects.images), least * batch)
    set_iterations(cfg, choices.iterations or math.ceil(images / max(cfg.SOLVER.IMS_PER_BATCH, 1)))
    cfg.SOLVER.CHECKPOINT_PERIOD = max(200, math.ceil(cfg.SOLVER.MAX_ITER / 5))


def _override(cfg: CfgNode, choices: Choices, wanted: Callable[[str], bool]) -> CfgNode:
    """Give ``cfg`` the user's values of the keys that are ``wanted``, in place."""
    given = load_config("", list(choices.opts))
    for key in filter(wanted, choices.opts[::2]):
        set_value(cfg, key, value_at(given, key))
    return cfg


def _is_of_method(key: str) -> bool:
    return key.startswith("DISTILL.")


def _override_method(configs: Configs, choices: Choices) -> None:
    """Give teachers and students the user's values of the sections that a method fills, MSAD and DISTILL.

    Raises:
        ValueError: another choice decides a key, or no config would read it.
    """
    chosen = {"DISTILL.STUDENT_RESOLUTION": "--scale", "DISTILL.TEACHERS": "--method", "MSAD.DETECTOR": "--detector"}
    for key in choices.opts[::2]:
        if key in chosen:
            raise ValueError(f"{key}: {chosen[key]} decides it")
        if _is_of_method(key) and not any(cfg.DISTILL.TEACHERS for cfg in configs.values()):
            raise ValueError(f"{key} has no effect: --method {choices.method} trains without a teacher")
        of_teacher = key.startswith("MSAD.") and key != "MSAD.DOWNSAMPLE"
        if of_teacher and not any(map(_is_multi_scale, configs.values())):
            raise ValueError(f"{key} has no effect: --method {choices.method} trains no multi-resolution teacher")
    for cfg in configs.values():
        if cfg.DISTILL.TEACHERS:
            _override(cfg, choices, _is_of_method)
        if _is_multi_scale(cfg):
            _override(cfg, choices, lambda key: key.startswith("MSAD."))


def _is_multi_scale(cfg: CfgNode) -> bool:
    return cfg.MODEL.META_ARCHITECTURE == "MultiScaleTeacher"


def _fit_data(cfg: CfgNode, entries: list[dict], content: dict, objects: Objects) -> None:
    cfg.DATASETS.REGISTER = entries
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (entries[0]["NAME"],), (entries[1]["NAME"],)
    set_value(cfg, num_classes_key(cfg), len(content["classes"]))
    if cfg.MODEL.KEYPOINT_ON:
        cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = content["keypoints"]
    cfg.TEST.DETECTIONS_PER_IMAGE = max(cfg.TEST.DETECTIONS_PER_IMAGE, 100 * math.ceil(1.5 * objects.most / 100))


def _fit_sizes(cfg: CfgNode, objects: Objects, short: int) -> None:
    """Sizes of inputs; levels, the coarsest of which has four locations along a short side; anchors."""
    longest = longest_side(short)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (short,), longest
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = short, longest
    two_stage = cfg.MODEL.META_ARCHITECTURE in TWO_STAGE
    levels = range(2, 7) if two_stage else range(3, max(5, min(7, int(math.log2(short / 4)))) + 1)
    cfg.MODEL.FPN.LEVELS = [f"p{level}" for level in levels]
    for key in LEVEL_KEYS[cfg.MODEL.META_ARCHITECTURE]:
        section, name = key.split(".")
        read = [level for level in levels if (section, level) != ("ROI_HEADS", 6)]
        cfg.MODEL[section][name] = [f"p{level}" for level in read]
    first = finest_anchor(objects, short, 2 ** levels[0])
    octaves = (1.0,) if two_stage else (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [
        [round(first * 2**index * octave, 3) for octave in octaves] for index in range(len(levels))
    ]


def given_config(choices: Choices, entries: list[dict], content: dict, objects: Objects) -> CfgNode:
    """The user's trained detector with the overrides, on the data; its own sizes stay.

    Raises:
        ValueError: it has another number of classes or keypoints than the data, or masks where they have none.
    """
    cfg = load_config(choices.config)
    cfg.MODEL.WEIGHTS = str(Path(choices.checkpoint).resolve())
    cfg.DISTILL = default_config().DISTILL
    cfg.DATASETS.REGISTER = entries
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (entries[0]["NAME"],), (entries[1]["NAME"],)
    if choices.short_side:
        cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (choices.short_side,), longest_side(choices.short_side)
        cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "choice"
        cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = choices.short_side, longest_side(choices.short_side)
    _fit_iterations(cfg, choices, objects)
    _override(cfg, choices, lambda key: not _is_of_method(key))
    classes = value_at(cfg, num_classes_key(cfg))
    if classes != len(content["classes"]):
        raise ValueError(
            f"--from: the model has {classes} classes, the data have {len(content['classes'])} "
            f"({', '.join(content['classes'][:9])}); a student learns its teacher's classes"
        )
    if cfg.MODEL.KEYPOINT_ON and content["keypoints"] != cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS:
        raise ValueError(f"--from: the model has {cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS} keypoints, the data "
                         f"have {content['keypoints']}")  # fmt: skip
    if cfg.MODEL.MASK_ON and not content["masks"]:
        raise ValueError("--from: the model learns masks, and the data have none: add MODEL.MASK_ON False")
    return cfg


def base_config(choices: Choices, entries: list[dict], content: dict, objects: Objects, short: int) -> CfgNode:
    """The detector at H from which all others follow, the user's or that of the choices; ``short`` is of the latter."""
    if choices.checkpoint:
        return given_config(choices, entries, content, objects)
    return detector_config(choices, choices.backbone, entries, content, objects, short)


def make_configs(choices: Choices, entries: list[dict], content: dict, objects: Objects, short: int) -> Configs:
    """The configs of all that is trained, by name; the student is the last of those that are not controls.

    Raises:
        ValueError: see :func:`detector_config`, :func:`given_config`, and
            :func:`msad.modeling.student_config.student_config`; an override that another choice decides.
    """
    data = entries, content, objects, short
    base = base_config(choices, *data)
    larger = choose_backbone(choices.backbone).larger
    configs = BUILDERS[choices.method](base, choices, lambda: detector_config(choices, larger, *data))
    _override_method(configs, choices)
    if choices.controls:
        low = base.clone()
        for key in ("MIN_SIZE_TEST", "MAX_SIZE_TEST"):
            low.INPUT[key] = configs[STUDENT].INPUT[key]
        train_at(low, get_resolution(choices.resolution).shift)
        controls = {} if choices.checkpoint else {BASELINE: base}
        controls[choices.conventional] = low
        if not choices.checkpoint and configs[STUDENT].DISTILL.TEACHERS:  # else it is the student
            controls[choices.alone] = trained_alone(base, choices)
        configs = controls | configs
    return configs


def write_configs(configs: Configs, folder: Path) -> dict[str, Path]:
    """Write what differs from the defaults into ``folder``/NAME.yaml, with the student's teachers beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.yaml" for name in configs}
    for name, cfg in configs.items():
        tree = split_config(cfg, default_config(cfg.MSAD.IMPORTS))[0]
        tree.pop("OUTPUT_DIR", None)
        files[name].write_text(yaml.safe_dump({"VERSION": cfg.VERSION, **tree}, sort_keys=False))
    return files
