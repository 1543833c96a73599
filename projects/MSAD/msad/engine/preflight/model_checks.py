"""Checks of devices, checkpoints and detections: they build, load or run models."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import nullcontext
from functools import partial

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from torch import nn

from ...data.low_res import build_test_mapper, sees_low_res, student_shift
from ...data.sampling import at_equal_distances
from ...evaluation.evaluators import loadable_records
from ...files import local_file
from ...finding import ERROR, OK, WARNING, Finding, check, error_text
from ...modeling.adapters import detector_of
from ...modeling.features import tap_neck
from ...modeling.teacher import MultiScaleTeacher
from ...resolution import downsampled_size
from ..checkpoint import CheckedCheckpointer

_MIN_AP = 5.0


@check("device")
def check_device(cfg: CfgNode) -> Generator:
    """Whether MODEL.DEVICE exists here."""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        yield ERROR, f"MODEL.DEVICE is {cfg.MODEL.DEVICE}, but there is no NVIDIA GPU or driver", "add MODEL.DEVICE cpu"
    return cfg.MODEL.DEVICE


def _bottom_up(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of a detector's bottom-up networks by name, also inside a multi-resolution teacher."""
    named = model.named_parameters()
    backbone = {name: p for name, p in named if name.removeprefix("detector.").startswith("backbone.")}
    return {name: p for name, p in backbone.items() if ".bottom_up." in name or ".rfp_bottom_up." in name} or backbone


@check("frozen layers")
def check_frozen(model: nn.Module, known: set[str], freeze_at: int) -> Generator:
    """Whether what the bottom-up network does not train is trained already.

    Args:
        known: names of the model's tensors that do not start from random values.
        freeze_at: MODEL.BACKBONE.FREEZE_AT; at 0 it is the network's own doing, and may be meant.
    """
    frozen = [name for name, parameter in _bottom_up(model).items() if not parameter.requires_grad]
    random = [name for name in frozen if name not in known]
    if random:
        text = f"{len(random)} parameters of the bottom-up network are random and frozen, e.g. {random[0]}"
        fix = "set MODEL.WEIGHTS to a pretrained network, or of a student DISTILL.INIT_STUDENT full"
        yield ERROR if freeze_at > 0 else WARNING, text, f"{fix}, or MODEL.BACKBONE.FREEZE_AT 0"
    return f"{len(frozen)} parameters of the bottom-up network are not trained and have weights" if frozen else None


@check("test size")
def check_test_size(cfg: CfgNode, model: nn.Module) -> Generator:
    """Whether norms of one channel a group get more than one pixel where the model is tested; torch refuses one.

    A model that has such norms is run on a blank image of the size of the smallest of DATASETS.TEST.
    """
    if not any(isinstance(m, nn.GroupNorm) and m.num_groups == m.num_channels for m in model.modules()):
        return None
    sides, sizes = (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST), set()
    for name in cfg.DATASETS.TEST:
        whole = {(record["height"], record["width"]) for record in loadable_records(name) if "height" in record}
        shift = student_shift(cfg) if sees_low_res(cfg, name) else 0
        sizes |= {downsampled_size(size, shift) for size in whole}
    if sides[0]:
        sizes = {ResizeShortestEdge.get_output_shape(*size, *sides) for size in sizes}
    if not sizes:
        return None
    height, width = min(sizes, key=max)
    blank = {"image": torch.zeros(3, height, width, dtype=torch.uint8), "height": height, "width": width}
    detector = detector_of(model)
    training, branch = model.training, model.eval_branch if isinstance(model, MultiScaleTeacher) else ""
    model.eval()
    try:
        with torch.no_grad(), tap_neck(detector) if hasattr(detector, "backbone") else nullcontext({}) as maps:
            for each in model.branches if branch else [""]:
                if each:
                    model.set_eval_branch(each)
                model([blank])
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        levels = ", ".join(name for name, level in maps.items() if level.shape[-2:] == (1, 1))
        text = f"an image of {width} x {height} pixels has a map of one pixel{levels and f' ({levels})'}, which norms"
        fix = "enlarge INPUT.MIN_SIZE_TEST, leave out the coarsest level, or take more channels or another norm"
        yield ERROR, f"{text} of one channel a group cannot normalise", fix
    finally:
        model.train(training)
        if branch:
            model.set_eval_branch(branch)
    return f"an image of {width} x {height} pixels passes through all norms"


@check("student's start")
def check_start(student: nn.Module, known: set[str]) -> Generator:
    """Whether the student's bottom-up network starts from trained weights; ``known`` as of :func:`check_frozen`."""
    ours = _bottom_up(student)
    random = [name for name in ours if name not in known]
    if random:
        share = f"{len(random)} of the {len(ours)} parameters of its bottom-up network"
        fix = "set MODEL.WEIGHTS to a pretrained network, or DISTILL.INIT_STUDENT full with a teacher of the same one"
        yield WARNING, f"{share} start from random values, e.g. {random[0]}", fix
    return f"all {len(ours)} parameters of its bottom-up network are initialised"


def check_checkpoint(who: str, model: nn.Module, weights: str) -> tuple[list[Finding], set[str]]:
    """Load ``weights`` into ``model``; findings and the names of the tensors that were loaded."""
    name = f"{who}'s weights"
    if (file := local_file(weights)) and not os.path.isfile(file):
        return [Finding(ERROR, name, f"no file {weights}", "train it first, or correct the path")], set()
    checkpointer = CheckedCheckpointer(model)
    try:
        checkpointer.load(weights)
    except Exception as error:  # whatever torch or pickle make of a broken file
        return [Finding(ERROR, name, f"{weights}: {error_text(error)}", "give the checkpoint of this config")], set()
    out, absent, unused = [], checkpointer.missing_or_mismatched, checkpointer.unexpected
    loaded = set(model.state_dict()) - set(absent)
    if absent:
        level = ERROR if who == "teacher" else WARNING
        text = f"{len(absent)} tensors are not in {weights} or of another shape, e.g. {absent[0]}"
        out.append(Finding(level, name, text, "give the checkpoint of this very config"))
    if unused:
        text = f"{len(unused)} keys of {weights} match nothing, e.g. {unused[0]}"
        fix = "correct if the file has another head; otherwise the names differ: convert it"
        out.append(Finding(WARNING, name, text, fix))
    return out or [Finding(OK, name, f"all {len(loaded)} tensors are in {weights}")], loaded


def box_ap(cfg: CfgNode, model: nn.Module, name: str, images: int) -> float | None:
    """Box AP of ``model``, of config ``cfg``, on ``images`` images of data set ``name``, taken at equal distances.

    None if the set is not evaluated by COCO's metrics.
    """
    if MetadataCatalog.get(name).get("evaluator_type", "coco") != "coco":
        return None
    dicts = at_equal_distances(DatasetCatalog.get(name), images)
    # The evaluator asks for tasks that the model may not have, so it is told the one that all have.
    evaluator = COCOEvaluator(
        name, tasks=("bbox",), distributed=False, max_dets_per_image=cfg.TEST.DETECTIONS_PER_IMAGE
    )
    evaluator.evaluate = partial(evaluator.evaluate, img_ids=[record["image_id"] for record in dicts])
    loader = build_detection_test_loader(dicts, mapper=build_test_mapper(cfg, name), num_workers=0)
    return inference_on_dataset(model.eval(), loader, evaluator).get("bbox", {}).get("AP", 0.0)


@check("teacher's AP")
def check_teacher_ap(
    cfg: CfgNode, teacher: CfgNode, model: nn.Module, images: int, no_kd: float | None = None
) -> Generator:
    """Box AP of the teacher on ``images`` images of the student's DATASETS.TEST.

    Args:
        no_kd: AP of the student trained without distillation on the same images, which the teacher has to exceed.
    """
    if not cfg.DATASETS.TEST:
        yield WARNING, "not measured: DATASETS.TEST is empty", "name a validation set"
        return None
    name = cfg.DATASETS.TEST[0]
    ap = box_ap(teacher, model, name, images)
    if ap is None:
        fix = "evaluate the teacher by itself: tools/train_net.py --eval-only"
        yield WARNING, f"not measured: {name} is not evaluated by COCO's metrics", fix
        return None
    text = f"{ap:.1f} box AP on {min(images, len(DatasetCatalog.get(name)))} images of {name}"
    if not ap >= _MIN_AP:
        fix = "train it longer; if it was good elsewhere, compare INPUT.FORMAT, PIXEL_MEAN and classes"
        yield ERROR if not ap >= 1.0 else WARNING, f"{text}: nothing to be learnt from it", fix
    elif no_kd is not None and not ap > no_kd:
        text = f"{text}, no more than the {no_kd:.1f} that the student reaches without distillation"
        yield WARNING, text, "train the teacher longer or take a stronger one"
    return text if no_kd is None else f"{text}, {ap - no_kd:.1f} above the student without distillation"
