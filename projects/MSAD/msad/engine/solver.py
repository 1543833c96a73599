"""The optimizer of a config."""

from __future__ import annotations

import torch
from detectron2 import solver
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn

from ..modeling.backbones.swin import NOT_DECAYED


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
    return optimizer(parameters, lr=options.BASE_LR, weight_decay=options.WEIGHT_DECAY)
