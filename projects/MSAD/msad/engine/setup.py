"""What every command does before it trains or evaluates."""

from __future__ import annotations

import logging
from importlib import metadata

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.modeling import build_model
from detectron2.utils import comm
from torch import nn

from ..data.register import register_datasets
from ..modeling.teacher import MultiScaleTeacher
from .checkpoint import CheckedCheckpointer
from .trainer import DistillTrainer

logger = logging.getLogger(__name__)


def engine_name() -> str:
    """The installed distribution that provides ``detectron2``, with version; for logs and reports only."""
    names = metadata.packages_distributions().get("detectron2", ["detectron2"])
    return f"{names[0]} {detectron2.__version__}"


def load_model(cfg: CfgNode, weights: str = "") -> nn.Module:
    """The model of ``cfg`` in eval mode (for a student: the student alone) with ``weights`` or MODEL.WEIGHTS.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no weights are given, or they do not have all of the model's tensors.
    """
    if not (weights or cfg.MODEL.WEIGHTS):
        raise ValueError("MODEL.WEIGHTS is empty: which checkpoint is to be evaluated?")
    model = build_model(cfg)
    CheckedCheckpointer(model).load_all(weights or cfg.MODEL.WEIGHTS, "this config")
    return model.eval()


def evaluate(cfg: CfgNode, model: nn.Module) -> dict:
    """Evaluate on DATASETS.TEST; prints and returns detectron2's {task: {metric: value}}."""
    results = DistillTrainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def evaluate_branches(cfg: CfgNode, model: MultiScaleTeacher) -> dict[str, dict]:
    """Evaluate a teacher on its fused features and on each resolution alone: branch -> results."""
    results = {}
    chosen = model.eval_branch
    for branch in model.branches:
        model.set_eval_branch(branch)
        logger.info("Teacher, branch %s", branch)
        results[branch] = evaluate(cfg, model)
    model.set_eval_branch(chosen)
    return results


def train(cfg: CfgNode, resume: bool = False) -> dict | None:
    """Train whatever ``cfg`` describes, evaluating by TEST.EVAL_PERIOD and at the end; returns the last results."""
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    return trainer.train()


def prepare(cfg: CfgNode) -> None:
    """Register the yaml's data sets and say which engine runs."""
    register_datasets(cfg)
    logger.info("Engine: %s, torch %s", engine_name(), torch.__version__)


