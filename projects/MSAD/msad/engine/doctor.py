"""What is wrong with a distillation before it has cost a night: checks of config, data, models and checkpoints.

Every check is a function that returns findings. Training makes the cheap ones (:func:`preflight`) and stops at errors;
``tools/doctor.py`` makes all of them (:func:`examine`).
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, build_detection_test_loader
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.modeling import GeneralizedRCNN, build_model
from torch import nn

from ..config import load_config
from ..data.loader import load_train_dicts
from ..data.register import register_datasets
from ..distill.distiller import FrozenTeacher, student_shapes
from ..distill.init import copies
from ..distill.losses.registry import compares_heads, lower_keys
from ..resolution import get_resolution
from .build import build_distiller
from .checkpoint import CheckedCheckpointer, load_branches
from .findings import (
    ERROR,
    OK,
    WARNING,
    Finding,
    check_anchors,
    check_classes,
    check_levels,
    check_pixels,
    check_schedule,
    check_sizes,
    check_two_stage,
)

logger = logging.getLogger(__name__)
_MIN_AP = 5.0
# Bytes of an annotation file that is read for its class names when training starts: about a second.
_SMALL_FILE = 32 * 2**20


def check_start(student: nn.Module, teacher: nn.Module, mode: str, loaded: set[str]) -> list[Finding]:
    """Whether the student's bottom-up network starts from trained weights.

    Args:
        student, teacher: detectors.
        mode: DISTILL.INIT_STUDENT.
        loaded: names of the student's tensors that MODEL.WEIGHTS has.
    """
    known = loaded | set(copies(student, teacher, mode))
    backbone = {name: p for name, p in student.named_parameters() if name.startswith("backbone.")}
    ours = {name: p for name, p in backbone.items() if ".bottom_up." in name} or backbone
    random = [name for name in ours if name not in known]
    if not random:
        return [Finding(OK, "student's start", f"all {len(ours)} parameters of its bottom-up network are initialised")]
    fix = "set MODEL.WEIGHTS to a pretrained network, or DISTILL.INIT_STUDENT full with a teacher of the same network"
    frozen = [name for name in random if not ours[name].requires_grad]
    if frozen:
        return [
            Finding(
                ERROR,
                "student's start",
                f"{len(frozen)} parameters of its bottom-up network are random and frozen, e.g. {frozen[0]}",
                f"{fix}; or set MODEL.BACKBONE.FREEZE_AT 0",
            )
        ]
    return [
        Finding(
            WARNING,
            "student's start",
            f"{len(random)} of the {len(ours)} parameters of its bottom-up network "
            f"start from random values, e.g. {random[0]}",
            fix,
        )
    ]


def check_checkpoint(who: str, model: nn.Module, weights: str) -> tuple[list[Finding], set[str]]:
    """Load ``weights`` into ``model``; findings and the names of the tensors that were loaded."""
    if "://" not in weights and not os.path.isfile(weights):
        return [Finding(ERROR, f"{who}'s weights", f"no file {weights}", "train it first, or correct the path")], set()
    checkpointer = CheckedCheckpointer(model)
    try:
        checkpointer.load(weights)
    except Exception as error:  # whatever torch or pickle make of a broken file
        return [Finding(ERROR, f"{who}'s weights", f"{weights}: {error}", "give the checkpoint of this config")], set()
    out = []
    loaded = set(model.state_dict()) - set(checkpointer.missing_or_mismatched)
    if checkpointer.missing_or_mismatched:
        level = ERROR if who == "teacher" else WARNING
        out.append(
            Finding(
                level,
                f"{who}'s weights",
                f"{len(checkpointer.missing_or_mismatched)} tensors are not in {weights} or of "
                f"another shape, e.g. {checkpointer.missing_or_mismatched[0]}",
                "give the checkpoint of this very config",
            )
        )
    if checkpointer.unexpected:
        out.append(
            Finding(
                WARNING,
                f"{who}'s weights",
                f"{len(checkpointer.unexpected)} keys of {weights} match nothing, e.g. {checkpointer.unexpected[0]}",
                "correct if the file has another head; otherwise the names differ: convert it",
            )
        )
    return out or [Finding(OK, f"{who}'s weights", f"all {len(loaded)} tensors are in {weights}")], loaded


def check_teacher_ap(cfg: CfgNode, teacher: CfgNode, model: nn.Module, images: int) -> list[Finding]:
    """Box AP of the teacher on ``images`` images of the student's DATASETS.TEST, taken at equal distances."""
    if not cfg.DATASETS.TEST:
        return [Finding(WARNING, "teacher's AP", "not measured: DATASETS.TEST is empty", "name a validation set")]
    name = cfg.DATASETS.TEST[0]
    everything = DatasetCatalog.get(name)  # in the order of the file, where a class or a scene may come in one piece
    count = min(images, len(everything))
    dicts = [everything[i * len(everything) // count] for i in range(count)]
    # The evaluator asks for tasks that the teacher may not have, so it is told the one that all have.
    evaluator = COCOEvaluator(
        name, tasks=("bbox",), distributed=False, max_dets_per_image=teacher.TEST.DETECTIONS_PER_IMAGE
    )
    evaluator.evaluate = partial(evaluator.evaluate, img_ids=[record["image_id"] for record in dicts])
    loader = build_detection_test_loader(dicts, mapper=DatasetMapper(teacher, is_train=False), num_workers=0)
    ap = inference_on_dataset(model.eval(), loader, evaluator).get("bbox", {}).get("AP", 0.0)
    text = f"{ap:.1f} box AP on {len(dicts)} images of {name}"
    if ap >= _MIN_AP:
        return [Finding(OK, "teacher's AP", text)]
    return [
        Finding(
            ERROR if not ap >= 1.0 else WARNING,
            "teacher's AP",
            f"{text}: nothing to be learnt from it",
            "train it longer; if it was good elsewhere, compare INPUT.FORMAT, PIXEL_MEAN and classes",
        )
    ]


def check_training_sets(cfg: CfgNode, teacher: CfgNode) -> list[Finding]:
    """:func:`check_classes` of the training sets, as far as names are known by now.

    Classes must be equal where heads are copied (INIT_STUDENT) or compared (LD, Chen).
    """
    names = [c.DATASETS.TRAIN[0] if c.DATASETS.TRAIN else "" for c in (cfg, teacher)]
    if names[0] == names[1]:
        return [Finding(OK, "classes", f"student and teacher train on {names[0]}")]
    classes = [MetadataCatalog.get(n).get("thing_classes") if n in DatasetCatalog.list() else None for n in names]
    compared = any(compares_heads(entry.get("name")) for entry in map(lower_keys, cfg.DISTILL.LOSSES))
    return check_classes(*classes, shared=compared or cfg.DISTILL.INIT_STUDENT != "none")


def preflight_checks(
    cfg: CfgNode, student: nn.Module, teacher: FrozenTeacher, loaded: set[str]
) -> dict[str, Callable[[], list[Finding]]]:
    """The checks that need nothing but the config and the models, by name.

    Args:
        loaded: names of the student's tensors that MODEL.WEIGHTS has.
    """
    resolution = get_resolution(cfg.DISTILL.STUDENT_RESOLUTION)
    config = load_config(cfg.DISTILL.TEACHERS[0]["CONFIG"])
    entries = [lower_keys(entry) for entry in cfg.DISTILL.LOSSES]
    matches = {entry.get("match", "by_stride") for entry in entries if not compares_heads(entry.get("name"))}
    weighted = not (cfg.DISTILL.READING or cfg.DISTILL.BALANCE.RATIO)
    two_stage = isinstance(student, GeneralizedRCNN)
    return {
        "classes": lambda: check_training_sets(cfg, config),
        "pixels": lambda: check_pixels(cfg, config),
        "sizes": lambda: check_sizes(cfg, config, resolution),
        "levels": lambda: check_levels(student_shapes(student, resolution), teacher.shapes(), matches),
        "anchors": lambda: check_anchors(cfg, config, resolution.shift),
        "student's start": lambda: check_start(student, teacher.model, cfg.DISTILL.INIT_STUDENT, loaded),
        "two-stage values": lambda: check_two_stage(entries, weighted) if two_stage else [],
        "schedule": lambda: check_schedule(cfg),
    }


def preflight(cfg: CfgNode, student: nn.Module, teacher: FrozenTeacher, loaded: set[str]) -> list[Finding]:
    """All findings of :func:`preflight_checks`.

    Class names of the teacher's data set are read if its yaml lists them or the annotation file is here and small.
    """
    with contextlib.suppress(FileNotFoundError, ValueError):  # its data need not be usable here: names are not known
        _read_classes(load_config(cfg.DISTILL.TEACHERS[0]["CONFIG"]), _SMALL_FILE)
    return [finding for check in preflight_checks(cfg, student, teacher, loaded).values() for finding in check()]


def examine(cfg: CfgNode, images: int = 200) -> list[Finding]:
    """All checks of a student's config; the teacher detects on ``images`` images, 0: on none."""
    if not cfg.DISTILL.TEACHERS:
        return [Finding(ERROR, "teacher", "DISTILL.TEACHERS is empty", "name the teacher's CONFIG and WEIGHTS")]
    out: list[Finding] = []

    def attempt(check: str, fix: str, function: Callable[[], Any]) -> Any:
        """What ``function`` returns; what it says is wrong becomes a finding."""
        try:
            return function()
        except (AssertionError, FileNotFoundError, LookupError, RuntimeError, TypeError, ValueError) as error:
            text = str(error.args[0]) if error.args else type(error).__name__
            out.append(Finding(ERROR, check, " ".join(text.split()), fix))
            return None

    entry = cfg.DISTILL.TEACHERS[0]
    attempt("data", "correct DATASETS.REGISTER", lambda: register_datasets(cfg))
    if dicts := attempt("data", "correct the data set or the classes of the config", lambda: load_train_dicts(cfg)):
        out.append(Finding(OK, "data", f"{len(dicts)} images for training"))
    config = attempt(
        "teacher",
        "correct DISTILL.TEACHERS[0].CONFIG",
        lambda: load_config(entry["CONFIG"], ["MODEL.DEVICE", cfg.MODEL.DEVICE]),
    )
    if config is None:
        return out
    attempt("data", "correct DATASETS.REGISTER of the teacher", lambda: _read_classes(config))
    student = attempt("student", "correct the student's config", lambda: build_model(cfg))
    teacher = attempt("teacher", "correct the teacher's config", lambda: build_model(config))
    if student is None or teacher is None:
        return out
    loaded: set[str] = set()
    if cfg.MODEL.WEIGHTS:
        found, loaded = check_checkpoint("student", student, cfg.MODEL.WEIGHTS)
        out += found
    elif cfg.MODEL.META_ARCHITECTURE == "FusionStudent":
        branches = cfg.MSAD.FUSION_STUDENT.BRANCHES
        fix = "correct WEIGHTS of MSAD.FUSION_STUDENT.BRANCHES"
        loaded = attempt("student's weights", fix, lambda: load_branches(student, branches)) or set()
    found, trained = check_checkpoint("teacher", teacher, entry.get("WEIGHTS", ""))
    out += found
    frozen = FrozenTeacher(teacher, cfg.DISTILL.TEACHER_BN)
    checks = attempt(
        "student", "correct DISTILL.STUDENT_RESOLUTION", lambda: preflight_checks(cfg, student, frozen, loaded)
    )
    for name, check in (checks or {}).items():
        out += attempt(name, "correct the student's config, or DISTILL.STUDENT_RESOLUTION", check) or []
    distiller = attempt("losses", "correct DISTILL", lambda: build_distiller(cfg, student, frozen))
    if distiller is not None:
        none = "none: this is the control, which is not distilled"
        names = ", ".join(loss.name for loss in distiller.losses) or none
        out.append(Finding(OK, "losses", names))
    if images and trained:
        out += (
            attempt("teacher's AP", "correct DATASETS.TEST", lambda: check_teacher_ap(cfg, config, teacher, images))
            or []
        )
    return out


def _read_classes(teacher: CfgNode, limit: float = math.inf) -> None:
    """Make the class names of the teacher's training set known, if the set is on this machine.

    An annotation file of more than ``limit`` bytes is not read.
    """
    register_datasets(teacher)
    name = teacher.DATASETS.TRAIN[0] if teacher.DATASETS.TRAIN else ""
    if name not in DatasetCatalog.list() or MetadataCatalog.get(name).get("thing_classes"):
        return
    file = MetadataCatalog.get(name).get("json_file", "")
    if limit == math.inf or (os.path.isfile(file) and os.path.getsize(file) <= limit):
        with contextlib.suppress(FileNotFoundError):
            DatasetCatalog.get(name)


def report(findings: Sequence[Finding]) -> None:
    """Log findings, errors last.

    Raises:
        ValueError: there is an error; the message has all of them with their fixes.
    """
    for finding in findings:
        if finding.level == OK:
            logger.info("Pre-flight, %s: %s", finding.check, finding.text)
        elif finding.level == WARNING:
            logger.warning("Pre-flight, %s: %s. To mend it: %s", finding.check, finding.text, finding.fix)
    errors = [f"{f.check}: {f.text}. To mend it: {f.fix}" for f in findings if f.level == ERROR]
    if errors:
        raise ValueError("pre-flight: " + "; ".join(errors))
