"""The TASK/METRIC that a comparison is about, and whether its evaluators can give it."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ..config_values import nearest
from ..data.register import registered
from ..engine.predictor import is_segmentor
from ..evaluation.evaluators import METRICS
from .comparison import Comparison
from .jobs import Run
from .rows import AP, MIOU, refuse_losses


def choose_metric(study: Comparison, asked: str | None = None) -> str:
    """``asked``, or without one that of the first variant's task: mIoU of segmentors, AP of boxes of all else.

    Raises:
        ValueError: it is a loss, or no variant is evaluated by it, as far as the configs tell; names what there is.
    """
    names = [name for name, variant in study.variants.items() if variant.budget != "equal_time"]
    if asked is None:
        return MIOU if is_segmentor(study.config(Run(names[0], study.seeds[0]))) else AP
    refuse_losses(asked)
    known = [metrics_of(study.config(Run(name, study.seeds[0]))) for name in names]
    if "/" in asked and None in known:
        return asked
    metrics = dict.fromkeys(metric for found in known for metric in found or ())
    of_classes = tuple(metric for metric in metrics if metric.endswith("-"))
    wholes = [metric for metric in metrics if metric not in of_classes]
    if asked in wholes or (asked.startswith(of_classes) and asked not in of_classes):
        return asked
    there = ", ".join(wholes) or "TASK/METRIC"
    raise ValueError(f"--metric {asked}{nearest(asked, wholes) or ':'} the models are evaluated by {there}")


def metrics_of(cfg: CfgNode) -> list[str] | None:
    """TASK/METRIC by which a config's model is evaluated, of single classes what they begin with ("bbox/AP-").

    None where they are not known: a data set has an evaluator that is not in METRICS.
    """
    with registered(cfg):
        kinds = [MetadataCatalog.get(name).get("evaluator_type", "coco") for name in cfg.DATASETS.TEST]
    if not all(kind in METRICS for kind in kinds):
        return None
    absent = {"segm"} if not cfg.MODEL.MASK_ON else set()
    absent |= {"keypoints"} if not cfg.MODEL.KEYPOINT_ON else set()
    absent |= {"bbox"} if is_segmentor(cfg) else {"sem_seg"}
    found = {task: names for kind in kinds for task, names in METRICS[kind].items() if task not in absent}
    return [f"{task}/{name}" for task, names in found.items() for name in names]
