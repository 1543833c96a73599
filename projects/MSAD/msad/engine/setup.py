"""What every command does before it trains or evaluates."""

from __future__ import annotations

import logging
import os
from importlib import metadata

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from torch import nn

from ..config_values import copy_with
from ..data.register import register_datasets
from ..modeling.teacher import MultiScaleTeacher
from .checkpoint import CheckedCheckpointer
from .first_screen import TimeEstimate, first_screen, quiet_console
from .run_folder import write_config
from .stages import train_stages
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
        own = copy_with(cfg, {"MSAD.EVAL_BRANCH": branch})  # which names the folder of its detections
        results[branch] = evaluate(own, model)
    model.set_eval_branch(chosen)
    return results


def train(cfg: CfgNode, resume: bool = False) -> dict | None:
    """Train whatever ``cfg`` describes, evaluating by TEST.EVAL_PERIOD and at the end.

    Returns what detectron2's trainer does: the last results if TEST.EXPECTED_RESULTS is set, else None.

    Before the first iteration, the log says what will happen, see :mod:`msad.engine.first_screen`.
    """
    if cfg.DISTILL.STAGES:
        return train_stages(cfg, resume, train)
    with quiet_console():
        trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    if comm.is_main_process():
        for line in first_screen(trainer.cfg, trainer.checkpointer.model, trainer.start_iter):
            logger.info(line)
        trainer.register_hooks([TimeEstimate()])
    return trainer.train()


def start_process(cfg: CfgNode, command: str, *, training: bool) -> None:
    """What detectron2's default_setup does, with a short screen: folder, loggers, config.yaml, seed, cuDNN.

    Args:
        cfg: frozen or not; its OUTPUT_DIR gets log.txt and config.yaml.
        command: for the log.
        training: whether cuDNN may try out algorithms, which does not pay where every image has another size.
    """
    rank = comm.get_rank()
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    for name in ("fvcore", "detectron2", "msad"):
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name=name)
    with quiet_console():
        engine = logging.getLogger("detectron2")
        engine.info("%s, process %d of %d\nEnvironment:\n%s", command, rank, comm.get_world_size(), collect_env_info())
        engine.info("The full config:\n%s", cfg.dump())
    if comm.is_main_process():
        write_config(cfg)
    seed_all_rng(cfg.SEED + rank if cfg.SEED >= 0 else None)
    if cfg.get("FLOAT32_PRECISION"):
        torch.set_float32_matmul_precision(cfg.FLOAT32_PRECISION)
    if training:
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK


def prepare(cfg: CfgNode) -> None:
    """Register the yaml's data sets and say which engine runs."""
    register_datasets(cfg)
    logger.info("Engine: %s, torch %s", engine_name(), torch.__version__)
