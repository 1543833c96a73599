"""The optimizer and the learning-rate schedule of a config."""

from __future__ import annotations

import torch
from detectron2 import solver
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier, WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from fvcore.common.param_scheduler import ParamScheduler
from torch import nn

from ..modeling.backbones.swin import NOT_DECAYED

# Keys of the learning rate at the end, by schedule.
_ENDS = {"WarmupCosineLR": "BASE_LR_END", "WarmupPolyLR": "POLY_LR_END"}


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """detectron2's SGD, or AdamW on the same parameter groups and with the same gradient clipping.

    AdamW does not decay Swin's position parameters; norms are not decayed with SOLVER.WEIGHT_DECAY_NORM 0.

    Raises:
        ValueError: another SOLVER.OPTIMIZER.
    """
    if cfg.SOLVER.OPTIMIZER == "SGD":
        return solver.build_optimizer(cfg, model)
    if cfg.SOLVER.OPTIMIZER != "AdamW":
        raise ValueError(f"SOLVER.OPTIMIZER must be 'SGD' or 'AdamW', not {cfg.SOLVER.OPTIMIZER!r}")
    options = cfg.SOLVER
    groups = {"base_lr": options.BASE_LR, "bias_lr_factor": options.BIAS_LR_FACTOR}
    decay = {"weight_decay_norm": options.WEIGHT_DECAY_NORM, "weight_decay_bias": options.WEIGHT_DECAY_BIAS}
    overrides = {name: {"weight_decay": 0.0} for name in NOT_DECAYED}
    parameters = get_default_optimizer_params(model, **groups, **decay, overrides=overrides)
    optimizer = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
    # One kernel in place of a dozen calls a parameter; on GPUs torch groups the calls by itself. Not in mixed
    # precision: a fused step unscales the gradients, after they have been clipped.
    fused = True if cfg.MODEL.DEVICE == "cpu" and not cfg.SOLVER.AMP.ENABLED else None
    return optimizer(parameters, lr=options.BASE_LR, weight_decay=options.WEIGHT_DECAY, fused=fused)


class PolySchedule(ParamScheduler):
    """(1 - floor) (1 - t)^power + floor, of training progress t from 0 to 1: DeepLab's "poly" with a lower end."""

    def __init__(self, power: float, floor: float = 0.0) -> None:
        self.power, self.floor = power, floor

    def __call__(self, where: float) -> float:
        return (1 - self.floor) * max(1 - where, 0.0) ** self.power + self.floor


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """detectron2's schedules, and WarmupPolyLR with SOLVER.POLY_LR_POWER and POLY_LR_END.

    Raises:
        ValueError: the learning rate at the end is negative or above BASE_LR.
    """
    options = cfg.SOLVER
    end = _ENDS.get(options.LR_SCHEDULER_NAME)
    if end and not 0 <= options[end] <= options.BASE_LR:
        raise ValueError(f"SOLVER.{end} is {options[end]:g}; it must be from 0 to SOLVER.BASE_LR, {options.BASE_LR:g}")
    if options.LR_SCHEDULER_NAME != "WarmupPolyLR":
        return solver.build_lr_scheduler(cfg, optimizer)
    schedule = WarmupParamScheduler(
        PolySchedule(options.POLY_LR_POWER, options.POLY_LR_END / options.BASE_LR),
        options.WARMUP_FACTOR,
        min(options.WARMUP_ITERS / options.MAX_ITER, 1.0),
        options.WARMUP_METHOD,
        options.RESCALE_INTERVAL,
    )
    return LRMultiplier(optimizer, schedule, options.MAX_ITER)
