"""Build the optimizer and the learning-rate schedule that ``cfg.SOLVER`` describes."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from fvcore.common.config import CfgNode
from fvcore.common.param_scheduler import (
    CosineParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)
from torch import nn
from torch.optim import Optimizer

from .lr_scheduler import LRMultiplier, LRScheduler, WarmupParamScheduler

logger = logging.getLogger(__name__)

_NORM_LAYERS = (
    nn.modules.batchnorm._BatchNorm,  # SyncBatchNorm included
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """SGD over the trainable parameters, clipped gradients if ``SOLVER.CLIP_GRADIENTS`` says so."""
    solver = cfg.SOLVER
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
    )
    sgd = maybe_add_gradient_clipping(cfg, torch.optim.SGD)
    return sgd(
        groups,
        lr=solver.BASE_LR,
        momentum=solver.MOMENTUM,
        nesterov=solver.NESTEROV,
        weight_decay=solver.WEIGHT_DECAY,
        foreach=True,
    )


def get_default_optimizer_params(
    model: nn.Module,
    base_lr: float | None = None,
    weight_decay: float | None = None,
    weight_decay_norm: float | None = None,
    bias_lr_factor: float | None = 1.0,
    weight_decay_bias: float | None = None,
    lr_factor_func: Callable[[str], float] | None = None,
    overrides: dict[str, dict[str, float]] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: each trainable parameter once, equal settings in one group.

    Args:
        model: whose parameters to list.
        base_lr: learning rate; None leaves it to the optimizer, as with the other settings.
        weight_decay: weight decay.
        weight_decay_norm: weight decay of normalization layers.
        bias_lr_factor: multiplies the learning rate of parameters named "bias".
        weight_decay_bias: weight decay of parameters named "bias".
        lr_factor_func: takes "module.path.parameter", returns what to multiply the learning rate by.
        overrides: settings by the last part of the parameter's name, stronger than all others:
            ``{"embedding": {"lr": 0.01, "weight_decay": 0.0}}``.

    Raises:
        ValueError: a factor is given without ``base_lr``, or two arguments speak about biases.
    """
    by_name = dict(overrides or {})
    bias = _bias_settings(base_lr, bias_lr_factor, weight_decay_bias)
    if bias:
        if "bias" in by_name:
            raise ValueError("overrides['bias'] conflicts with bias_lr_factor or weight_decay_bias")
        by_name["bias"] = bias
    if lr_factor_func is not None and base_lr is None:
        raise ValueError("lr_factor_func needs base_lr")

    merged: dict[tuple, dict[str, Any]] = {}
    seen: set[nn.Parameter] = set()  # tied parameters occur in several modules
    for path, module in model.named_modules():
        decay = weight_decay
        if weight_decay_norm is not None and isinstance(module, _NORM_LAYERS):
            decay = weight_decay_norm
        common = _without_none(lr=base_lr, weight_decay=decay)
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            settings = dict(common)
            if lr_factor_func is not None:
                settings["lr"] *= lr_factor_func(f"{path}.{name}")
            settings.update(by_name.get(name, {}))
            group = merged.setdefault(tuple(sorted(settings.items())), {"params": [], **settings})
            group["params"].append(parameter)
    return list(merged.values())


def _without_none(**settings: float | None) -> dict[str, float]:
    return {name: value for name, value in settings.items() if value is not None}


def _bias_settings(
    base_lr: float | None, bias_lr_factor: float | None, weight_decay_bias: float | None
) -> dict[str, float]:
    rate = None
    if bias_lr_factor is not None and bias_lr_factor != 1.0:
        if base_lr is None:
            raise ValueError("bias_lr_factor needs base_lr")
        rate = base_lr * bias_lr_factor
    return _without_none(lr=rate, weight_decay=weight_decay_bias)


def maybe_add_gradient_clipping(cfg: CfgNode, optimizer: type[Optimizer] | Optimizer):
    """Let an optimizer (a class, or an object in place) clip the gradient of each parameter before it steps.

    ``SOLVER.CLIP_GRADIENTS.CLIP_TYPE`` is "value" (each component to +-CLIP_VALUE) or "norm" (the NORM_TYPE norm
    of each parameter's gradient to CLIP_VALUE).

    Returns:
        ``optimizer`` itself if clipping is off or it is an object, else a subclass.

    Raises:
        ValueError: unknown CLIP_TYPE.
    """
    settings = cfg.SOLVER.CLIP_GRADIENTS
    if not settings.ENABLED:
        return optimizer
    clip = _clip_function(settings)
    if isinstance(optimizer, Optimizer):
        optimizer.__class__ = _clipping_subclass(type(optimizer), clip)
        return optimizer
    return _clipping_subclass(optimizer, clip)


def _clip_function(settings: CfgNode) -> Callable[[list[torch.Tensor]], Any]:
    limit, order, kind = settings.CLIP_VALUE, settings.NORM_TYPE, settings.CLIP_TYPE
    if kind == "value":
        return lambda parameters: nn.utils.clip_grad_value_(parameters, limit)
    if kind == "norm":
        return lambda parameters: _clip_norms(parameters, limit, order)
    raise ValueError(f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {kind!r}, expected 'value' or 'norm'")


def _clip_norms(parameters: list[torch.Tensor], limit: float, order: float) -> None:
    """``nn.utils.clip_grad_norm_`` of each parameter alone, for all of them at once."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients:
        norms = torch.stack(torch._foreach_norm(gradients, order))
        torch._foreach_mul_(gradients, list((limit / (norms + 1e-6)).clamp(max=1.0)))


def _clipping_subclass(base: type[Optimizer], clip: Callable[[list[torch.Tensor]], Any]) -> type[Optimizer]:
    def step(self, closure=None):
        for group in self.param_groups:
            clip(group["params"])
        # not super(): the torch profiler wraps step of the class that it finds
        return base.step(self, closure)

    return type(f"{base.__name__}WithGradientClip", (base,), {"step": step})


def build_lr_scheduler(cfg: CfgNode, optimizer: Optimizer) -> LRScheduler:
    """The schedule ``SOLVER.LR_SCHEDULER_NAME`` with its warm-up; call ``step()`` once an iteration.

    Raises:
        ValueError: unknown name.
    """
    solver = cfg.SOLVER
    build = {
        "WarmupMultiStepLR": _multi_step,
        "WarmupCosineLR": _cosine,
        "WarmupStepWithFixedGammaLR": _equal_steps,
    }.get(solver.LR_SCHEDULER_NAME)
    if build is None:
        raise ValueError(f"SOLVER.LR_SCHEDULER_NAME is {solver.LR_SCHEDULER_NAME!r}, which is no known schedule")
    schedule = WarmupParamScheduler(
        build(solver),
        solver.WARMUP_FACTOR,
        min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0),
        solver.WARMUP_METHOD,
        solver.RESCALE_INTERVAL,
    )
    return LRMultiplier(optimizer, multiplier=schedule, max_iter=solver.MAX_ITER)


def _multi_step(solver: CfgNode) -> ParamScheduler:
    steps = [step for step in solver.STEPS if step < solver.MAX_ITER]
    if len(steps) < len(solver.STEPS):
        logger.warning("SOLVER.STEPS %s: those not below MAX_ITER=%d do nothing", solver.STEPS, solver.MAX_ITER)
    return _decays(solver.GAMMA, steps, solver.MAX_ITER)


def _cosine(solver: CfgNode) -> ParamScheduler:
    end = solver.BASE_LR_END / solver.BASE_LR
    if not 0 <= end <= 1:
        raise ValueError(f"SOLVER.BASE_LR_END={solver.BASE_LR_END} is not within 0 .. BASE_LR={solver.BASE_LR}")
    return CosineParamScheduler(1, end)


def _equal_steps(solver: CfgNode) -> ParamScheduler:
    # fvcore's StepWithFixedGammaParamScheduler has no value for the step after the last iteration
    count = solver.NUM_DECAYS + 1
    return _decays(solver.GAMMA, list(range(1, count)), count)


def _decays(gamma: float, milestones: list[int], length: int) -> ParamScheduler:
    """1, then one more factor ``gamma`` from each milestone on; ``length`` is the training in the same unit."""
    values = [gamma**k for k in range(len(milestones) + 1)]
    return MultiStepParamScheduler(values, milestones=milestones, num_updates=length)
