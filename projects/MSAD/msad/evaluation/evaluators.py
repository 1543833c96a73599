"""Evaluators by the ``evaluator_type`` of a data set, as detectron2's own training script chooses them.

A further type is one function ``(cfg, name of the data set, output folder) -> DatasetEvaluator``, registered under the
name of the type; with its metrics in METRICS, a wrong ``--metric`` is told before a training. If it refuses some data
sets, what tells them is in CHECKS, which is asked before a training.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, SemSegEvaluator
from fvcore.common.registry import Registry

from ..data.argoverse_hd import read_content
from ..files import write_json
from ..finding import ERROR, Finding
from .visdrone import LIMITS
from .visdrone_evaluator import VisDroneEvaluator, require_whole_images

EVALUATOR_REGISTRY = Registry("EVALUATOR")
_OWN = "register one in msad.evaluation.evaluators.EVALUATOR_REGISTRY, or override build_evaluator of DistillTrainer"
# By type: a function of a data set's name and dicts that raises ValueError for what the evaluator cannot judge.
CHECKS: dict[str, Callable[[str, list[dict]], None]] = {"visdrone": require_whole_images}
_COCO = {
    "bbox": ["AP", "AP50", "AP75", "APs", "APm", "APl", "AP-"],
    "segm": ["AP", "AP50", "AP75", "APs", "APm", "APl", "AP-"],
    "keypoints": ["AP", "AP50", "AP75", "APm", "APl", "AP-"],
}
_VISDRONE = ["AP", "AP50", "AP75", *(f"AR{count}" for count in LIMITS)]
# By type: {task: its metrics}; one that ends with "-" stands for those of single classes, before their names.
METRICS: dict[str, dict[str, list[str]]] = {
    "coco": _COCO,
    "argoverse_hd": _COCO,
    "visdrone": {"bbox": [*_VISDRONE, *(f"{name}_plain" for name in _VISDRONE), "AP-"]},
    "sem_seg": {"sem_seg": ["mIoU", "fwIoU", "mACC", "pACC", "IoU-", "ACC-", "BoundaryIoU-", "min(IoU, B-Iou)-"]},
}


def build_evaluator(cfg: CfgNode, dataset_name: str, output_folder: str) -> DatasetEvaluator:
    """The evaluator of a registered data set; a set that names no type gets COCO's.

    Raises:
        ValueError: no evaluator is registered for its type; says which there are.
    """
    return EVALUATOR_REGISTRY.get(_kind(dataset_name))(cfg, dataset_name, output_folder)


def _kind(dataset_name: str) -> str:
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    if kind not in EVALUATOR_REGISTRY:
        known = ", ".join(sorted(name for name, _ in EVALUATOR_REGISTRY))
        raise ValueError(f"data set {dataset_name!r} has evaluator_type {kind!r}; there are evaluators for {known}")
    return kind


def check_evaluators(cfg: CfgNode) -> list[Finding]:
    """An error for each of DATASETS.TEST that its evaluator would refuse; sets that cannot be loaded are left out."""
    found = []
    for name in cfg.DATASETS.TEST:
        fix = _OWN
        try:
            check = CHECKS.get(_kind(name))
            fix = "correct DATASETS.TEST"
            if check:
                check(name, loadable_records(name))
        except ValueError as error:
            found.append(Finding(ERROR, "evaluation", str(error), fix))
    return found


def loadable_records(dataset_name: str) -> list[dict]:
    """Dataset dicts of a set; none if it cannot be loaded, which :mod:`msad.data.checks` tells."""
    try:
        return DatasetCatalog.get(dataset_name)
    except (AssertionError, LookupError, OSError, TypeError, ValueError):
        return []


@EVALUATOR_REGISTRY.register()
def coco(cfg: CfgNode, dataset_name: str, output_folder: str) -> DatasetEvaluator:
    """COCO metrics; TEST.DETECTIONS_PER_IMAGE also bounds what the evaluator counts.

    Without TEST.KEYPOINT_OKS_SIGMAS the data set's own sigmas are used, if it has any.
    """
    sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS or MetadataCatalog.get(dataset_name).get("keypoint_oks_sigmas", [])
    return COCOEvaluator(
        dataset_name,
        output_dir=output_folder,
        max_dets_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        kpt_oks_sigmas=sigmas,
    )


@EVALUATOR_REGISTRY.register()
def visdrone(cfg: CfgNode, dataset_name: str, output_folder: str) -> DatasetEvaluator:
    """The metric of VisDrone-DET, and the challenge's result files in the output folder."""
    return VisDroneEvaluator(dataset_name, output_folder)


@EVALUATOR_REGISTRY.register()
def sem_seg(cfg: CfgNode, dataset_name: str, output_folder: str) -> DatasetEvaluator:
    """detectron2's metrics of semantic segmentation: mIoU, accuracies."""
    return SemSegEvaluator(dataset_name, output_dir=output_folder)


@EVALUATOR_REGISTRY.register()
def argoverse_hd(cfg: CfgNode, dataset_name: str, output_folder: str) -> DatasetEvaluator:
    """COCO metrics of single frames; the annotations are written in COCO's own format into the output folder."""
    metadata = MetadataCatalog.get(dataset_name)
    os.makedirs(output_folder, exist_ok=True)
    file = os.path.join(output_folder, f"{dataset_name}_coco.json")
    # by every process, which then reads it
    write_json(file, read_content(metadata.definition["JSON"]), indent=None, shared=True)
    if hasattr(metadata, "json_file"):
        del metadata.json_file  # of an earlier evaluation; metadata cannot be changed
    metadata.json_file = file
    return coco(cfg, dataset_name, output_folder)
