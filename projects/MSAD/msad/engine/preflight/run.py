"""The checks in the order in which they can be made, and what is done with their findings."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from torch import nn

from ...config import load_config
from ...config_values import copy_with
from ...data.checks import check_data
from ...data.register import register_datasets, registered
from ...distill.distiller import student_shapes
from ...distill.init import copies
from ...distill.losses.registry import compares_heads, compares_necks, lower_keys
from ...distill.teachers import FrozenTeacher
from ...evaluation.evaluators import check_evaluators
from ...finding import ERROR, OK, WARNING, Finding, error_text, log_findings
from ...modeling.adapters import adapt
from ...resolution import get_resolution
from ..build import build_distiller, first_teacher, teacher_entries
from ..checkpoint import load_branches
from .config_checks import (
    check_anchors,
    check_classes,
    check_levels,
    check_pixels,
    check_schedule,
    check_sizes,
    check_two_stage,
)
from .model_checks import (
    box_ap,
    check_checkpoint,
    check_device,
    check_frozen,
    check_start,
    check_teacher_ap,
    check_test_size,
)

# Bytes of an annotation file that is read for its class names when training starts: about a second.
_SMALL_FILE = 32 * 2**20


def check_training_sets(cfg: CfgNode, teacher: CfgNode, teacher_classes: Sequence[str] | None) -> list[Finding]:
    """:func:`check_classes` of the training sets, as far as names are known by now.

    Classes must be equal where heads are copied (INIT_STUDENT) or compared (LD, Chen).
    """
    if _training_set(cfg) == _training_set(teacher):
        return [Finding(OK, "classes", f"student and teacher train on {_training_set(cfg)['NAME']}")]
    compared = any(compares_heads(entry.get("name")) for entry in map(lower_keys, cfg.DISTILL.LOSSES))
    classes = _known_classes(_training_set(cfg)["NAME"], limit=0)
    return check_classes(classes, teacher_classes, shared=compared or cfg.DISTILL.INIT_STUDENT != "none")


def preflight_checks(
    cfg: CfgNode, student: nn.Module, teacher: FrozenTeacher, loaded: set[str], classes: Sequence[str] | None
) -> dict[str, Callable[[], list[Finding]]]:
    """The checks of one teacher that need nothing but the config and the models, by name.

    Args:
        loaded: names of the student's tensors that MODEL.WEIGHTS has.
        classes: of the teacher's training set, where they are known.
    """
    resolution = get_resolution(cfg.DISTILL.STUDENT_RESOLUTION)
    teachers = {entry["NAME"]: entry for entry in teacher_entries(cfg)}
    config = load_config(teachers[teacher.name]["CONFIG"])
    first, whole = teacher.name == first_teacher(cfg), teacher.scale == 1
    initialised = cfg.DISTILL.INIT_STUDENT != "none"
    entries = [lower_keys(entry) for entry in cfg.DISTILL.LOSSES]
    at_neck = filter(compares_necks, entries)
    matches = {entry.get("match", "by_stride") for entry in at_neck if _reads(entry, teacher.name, teachers.values())}
    weighted = not (cfg.DISTILL.WEIGHTING or cfg.DISTILL.BALANCE.RATIO)
    known = loaded | set(copies(student, teacher.model, cfg.DISTILL.INIT_STUDENT)) if first else loaded
    return {
        "classes": lambda: check_training_sets(cfg, config, classes),
        "pixels": lambda: check_pixels(cfg, config, first),
        "sizes": lambda: check_sizes(cfg, config, resolution) if whole else [],
        "levels": lambda: (
            check_levels(student_shapes(student, resolution), teacher.shapes(), matches)
            if matches or (whole and initialised and adapt(student).levels)  # segmentors have none
            else []
        ),
        "anchors": lambda: check_anchors(cfg, config, resolution.shift) if whole else [],
        "student's start": lambda: check_start(student, known) if first else [],
        "frozen layers": lambda: check_frozen(student, known, cfg.MODEL.BACKBONE.FREEZE_AT) if first else [],
        "two-stage values": lambda: check_two_stage(entries, weighted) if adapt(student).two_stage else [],
        "schedule": lambda: check_schedule(cfg),
    }


def preflight(cfg: CfgNode, student: nn.Module, teachers: Sequence[FrozenTeacher], loaded: set[str]) -> list[Finding]:
    """All findings of :func:`preflight_checks`, each once.

    Class names of a teacher's data set are read if its yaml lists them or the annotation file is here and small.
    """
    configs, found = {entry["NAME"]: entry.get("CONFIG") for entry in teacher_entries(cfg)}, []
    for teacher in teachers:
        classes = None
        with contextlib.suppress(FileNotFoundError, ValueError):  # its data need not be usable: names are not known
            classes = training_classes(load_config(configs[teacher.name]), _SMALL_FILE)
        for check in preflight_checks(cfg, student, teacher, loaded, classes).values():
            found += [finding for finding in check() if finding not in found]
    return found


class _Findings(list[Finding]):
    """What is found, and what fails while it is looked for."""

    def attempt(self, check: str, fix: str, function: Callable[..., Any], *args: Any) -> Any:
        """What ``function`` returns; what it says is wrong becomes a finding, and the result None."""
        try:
            return function(*args)
        except (AssertionError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
            self.append(Finding(ERROR, check, error_text(error), fix))
            return None


def examine(cfg: CfgNode, images: int = 200, no_kd_weights: str = "", coming: str = "") -> list[Finding]:
    """All checks of the config of one run; of a curriculum see :func:`.stages.examine_stages`.

    Args:
        images: on which a student's teacher detects; 0: on none.
        no_kd_weights: checkpoint of the same student trained without distillation, to compare the teacher with.
        coming: checkpoint that need not be there yet: an earlier run will write all tensors of the model into it.
    """
    if cfg.DISTILL.STAGES:
        raise ValueError("DISTILL.STAGES has several runs: call msad.engine.preflight.examine_stages")
    out = _Findings(check_device(cfg))
    if out[-1].level == ERROR:  # all else can be looked at on a CPU
        cfg = copy_with(cfg, {"MODEL.DEVICE": "cpu"})
    out.attempt("data", "correct DATASETS.REGISTER", register_datasets, cfg)
    out += check_data(cfg)[1] or [Finding(WARNING, "data", "DATASETS.TRAIN and DATASETS.TEST are empty", "name sets")]
    out += check_evaluators(cfg)
    who = "student" if cfg.DISTILL.TEACHERS else "model"
    fix = "correct the student's config" if cfg.DISTILL.TEACHERS else "correct the config"
    model = out.attempt(who, fix, build_model, cfg)
    loaded = _load(out, cfg, model, coming) if model is not None else set()
    if model is not None:
        out += out.attempt("test size", fix, check_test_size, cfg, model) or []
    if not cfg.DISTILL.TEACHERS:
        out += check_frozen(model, loaded, cfg.MODEL.BACKBONE.FREEZE_AT) if model is not None else []
        return out + check_schedule(cfg)
    entries = out.attempt("teacher", "correct DISTILL.TEACHERS", teacher_entries, cfg) or []
    entries = [entry for entry in entries if "MEAN_OF" not in entry]
    teachers = [_examine_teacher(out, cfg, entry, model, loaded, images, no_kd_weights) for entry in entries]
    if teachers and None not in teachers:
        distiller = out.attempt("losses", "correct DISTILL", build_distiller, cfg, model, teachers)
        if distiller is not None:
            none = "none: this is the no-KD baseline"
            out.append(Finding(OK, "losses", ", ".join(loss.name for loss in distiller.losses) or none))
    return out


def _load(out: _Findings, cfg: CfgNode, model: nn.Module, coming: str) -> set[str]:
    """Names of the tensors that the weights from which the model begins have, or will have."""
    if coming and coming == cfg.MODEL.WEIGHTS and not os.path.isfile(coming):
        out.append(Finding(OK, "student's weights", f"{coming} will be written by the stage before"))
        return set(model.state_dict())
    if cfg.MODEL.WEIGHTS:
        found, loaded = check_checkpoint("student", model, cfg.MODEL.WEIGHTS)
        out += found
        return loaded
    branches = cfg.MSAD.FUSION_STUDENT.BRANCHES if cfg.MODEL.META_ARCHITECTURE == "FusionStudent" else []
    fix = "correct WEIGHTS of MSAD.FUSION_STUDENT.BRANCHES"
    return out.attempt("student's weights", fix, load_branches, model, branches) or set()


def _examine_teacher(
    out: _Findings, cfg: CfgNode, entry: dict, student: nn.Module | None, loaded: set[str], images: int,
    no_kd_weights: str,
) -> FrozenTeacher | None:  # fmt: skip
    """The checks of one teacher, which is returned if it and the student could be built; see :func:`examine`."""
    options = ["MODEL.DEVICE", cfg.MODEL.DEVICE]
    config = out.attempt("teacher", f"correct the CONFIG of {entry['NAME']}", load_config, entry["CONFIG"], options)
    if config is None:
        return None
    classes = out.attempt("data", "correct DATASETS.REGISTER of the teacher", training_classes, config)
    model = out.attempt("teacher", "correct the teacher's config", build_model, config)
    if student is None or model is None:
        return None
    found, trained = check_checkpoint("teacher", model, entry["WEIGHTS"])
    out += found
    scale = float(entry.get("SCALE", 1.0))
    make = partial(FrozenTeacher, model, cfg.DISTILL.TEACHER_BN, name=entry["NAME"], scale=scale)
    teacher = out.attempt("teacher", "take another teacher, or another value of DISTILL", make)
    if teacher is None:
        return None
    fix = "correct the student's config, or DISTILL.STUDENT_RESOLUTION"
    checks = out.attempt("student", fix, preflight_checks, cfg, student, teacher, loaded, classes)
    for name, check in (checks or {}).items():
        out += [finding for finding in out.attempt(name, fix, check) or [] if finding not in out]
    if images and trained and scale == 1:
        name, no_kd = "teacher's AP", None
        if no_kd_weights:
            no_kd = out.attempt(name, "give the student's checkpoint", _student_ap, cfg, no_kd_weights, images)
        out += out.attempt(name, "correct DATASETS.TEST", check_teacher_ap, cfg, config, model, images, no_kd) or []
    return teacher


def _student_ap(cfg: CfgNode, weights: str, images: int) -> float | None:
    from ..setup import load_model  # which imports the trainer, and that the preflight

    return box_ap(cfg, load_model(cfg, weights), cfg.DATASETS.TEST[0], images) if cfg.DATASETS.TEST else None


def _reads(loss: dict[str, Any], teacher: str, entries: Iterable[dict]) -> bool:
    """Whether a loss compares the student with a teacher, or with a mean that it is part of."""
    source = loss.get("source")
    if source is None:  # every source
        return True
    means = {entry["NAME"] for entry in entries if teacher in entry.get("MEAN_OF", ())}
    return not {teacher, *means}.isdisjoint([source] if isinstance(source, str) else source)


def _training_set(cfg: CfgNode) -> dict[str, Any]:
    """The entry of DATASETS.REGISTER of the first training set; {NAME: ""} or its name alone if there is none."""
    name = cfg.DATASETS.TRAIN[0] if cfg.DATASETS.TRAIN else ""
    return next((dict(e) for e in cfg.DATASETS.REGISTER if e.get("NAME") == name), {"NAME": name})


def training_classes(cfg: CfgNode, limit: float = math.inf) -> list[str] | None:
    """Class names of the first training set of a config, if the set is on this machine.

    They are those of the config's own definition, also where another set has the same name in this process.

    Args:
        limit: bytes of an annotation file; larger ones are not read.
    """
    entry = _training_set(cfg)
    if len(entry) == 1:
        return _known_classes(entry["NAME"], limit)
    name = f"{entry['NAME']} (the teacher's)"
    sets = {"DATASETS.TRAIN": (name,), "DATASETS.TEST": (), "DATASETS.REGISTER": [{**entry, "NAME": name}]}
    with registered(copy_with(cfg, sets)):
        return _known_classes(name, limit)


def _known_classes(name: str, limit: float) -> list[str] | None:
    if name not in DatasetCatalog.list():
        return None
    metadata = MetadataCatalog.get(name)
    file = metadata.get("json_file", "")
    readable = limit == math.inf or (os.path.isfile(file) and os.path.getsize(file) <= limit)
    if readable and not metadata.get("thing_classes"):
        with contextlib.suppress(FileNotFoundError):
            DatasetCatalog.get(name)
    return metadata.get("thing_classes")


def report(findings: Sequence[Finding]) -> None:
    """Log findings, errors last.

    Raises:
        ValueError: there is an error; the message has all of them with their fixes.
    """
    log_findings(finding for finding in findings if finding.level != ERROR)
    errors = [str(finding) for finding in findings if finding.level == ERROR]
    if errors:
        raise ValueError("preflight: " + "; ".join(errors))
