"""Learning-rate traces, parameter groups, and the parameters after steps with clipped gradients."""

import itertools

import torch
from detectron2.config import get_cfg
from detectron2.solver import build_lr_scheduler, build_optimizer, get_default_optimizer_params
from torch import nn

TOLERANCE = 1e-12


class Model(nn.Module):
    """All kinds of parameters: tied, frozen, of norms, bare."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norms = nn.ModuleList(
            [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.InstanceNorm2d(4, affine=True)]
        )
        self.sync = nn.SyncBatchNorm(4)
        self.fc = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.fc.weight
        self.frozen = nn.Linear(2, 2)
        self.frozen.weight.requires_grad_(False)
        self.embedding = nn.Embedding(2, 3)
        self.scale = nn.Parameter(torch.zeros(1))
        self.bias = nn.Parameter(torch.zeros(2))


def groups(model, param_groups):
    """[[settings, parameter names], ...] in order."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = []
    for group in param_groups:
        settings = {key: value for key, value in sorted(group.items()) if key != "params"}
        found.append([settings, [names[id(p)] for p in group["params"]]])
    return found


def param_groups():
    model = Model()
    seen_names = []

    def factor(name):
        seen_names.append(name)
        return 0.5 if "conv" in name else 1.0

    arguments = {
        "nothing": {},
        "decay of norms": {"base_lr": 1.0, "weight_decay": 0.1, "weight_decay_norm": 0.0},
        "biases": {"base_lr": 1.0, "weight_decay": 0.1, "bias_lr_factor": 2.0, "weight_decay_bias": 0.5},
        "only decay of biases": {"weight_decay_bias": 0.0},
        "overrides": {
            "base_lr": 1.0,
            "lr_factor_func": factor,
            "overrides": {"scale": {"lr": 9.0, "weight_decay": 8.0}, "bias": {"lr": 7.0}},
        },
    }
    values = {
        f"groups, {name}": groups(model, get_default_optimizer_params(model, **kwargs))
        for name, kwargs in arguments.items()
    }
    values["names given to lr_factor_func"] = seen_names
    return values


def config(**solver):
    cfg = get_cfg()
    for key, value in solver.items():
        cfg.SOLVER[key] = value
    return cfg


def built_groups():
    model = Model()
    values = {}
    for name, solver in {
        "default": {},
        "norms": {"WEIGHT_DECAY_NORM": 0.01, "NESTEROV": True},
        "biases": {"BIAS_LR_FACTOR": 2.0, "WEIGHT_DECAY_BIAS": 0.0},
    }.items():
        optimizer = build_optimizer(config(**solver), model)
        values[f"built, {name}"] = groups(model, optimizer.param_groups)
        values[f"class, {name}"] = [base.__name__ for base in type(optimizer).__mro__]
    return values


def clipped_steps():
    values = {}
    for kind, order in (("value", 2.0), ("norm", 2.0), ("norm", 1.0), ("norm", float("inf"))):
        cfg = config(BASE_LR=0.1)
        cfg.SOLVER.CLIP_GRADIENTS.update(ENABLED=True, CLIP_TYPE=kind, CLIP_VALUE=0.3, NORM_TYPE=order)
        generator = torch.Generator().manual_seed(3)
        model = nn.Linear(5, 4)
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        optimizer = build_optimizer(cfg, model)
        for scale in (3.0, 0.01):
            for parameter in model.parameters():
                parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        values[f"clipped by {kind} {order}"] = [model.weight, model.bias]
        values[f"class, clipped by {kind} {order}"] = type(optimizer).__name__
    return values


def trace(cfg):
    """Learning rates of two groups before each iteration."""
    rates = [cfg.SOLVER.BASE_LR, 3 * cfg.SOLVER.BASE_LR]
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates], lr=1.0)
    scheduler = build_lr_scheduler(cfg, optimizer)
    found = []
    for iteration in range(cfg.SOLVER.MAX_ITER):
        if iteration:
            optimizer.step()
            scheduler.step()
        found.append([group["lr"] for group in optimizer.param_groups])
    return torch.tensor(found, dtype=torch.float64), dict(sorted(scheduler.state_dict().items()))


def traces():
    schedules = {
        "steps": {"LR_SCHEDULER_NAME": "WarmupMultiStepLR", "STEPS": (23, 31), "GAMMA": 0.2},
        "no steps": {"LR_SCHEDULER_NAME": "WarmupMultiStepLR", "STEPS": ()},
        "steps beyond the end": {"LR_SCHEDULER_NAME": "WarmupMultiStepLR", "STEPS": (20, 50, 60)},
        "cosine": {"LR_SCHEDULER_NAME": "WarmupCosineLR"},
        "cosine to 0.1": {"LR_SCHEDULER_NAME": "WarmupCosineLR", "BASE_LR_END": 0.1},
        "equal steps": {"LR_SCHEDULER_NAME": "WarmupStepWithFixedGammaLR", "NUM_DECAYS": 3, "GAMMA": 0.5},
        "7 equal steps": {"LR_SCHEDULER_NAME": "WarmupStepWithFixedGammaLR", "NUM_DECAYS": 6, "GAMMA": 0.9},
    }
    warmups = {
        "linear": {"WARMUP_ITERS": 9, "WARMUP_FACTOR": 0.1},
        "constant": {"WARMUP_ITERS": 9, "WARMUP_FACTOR": 0.1, "WARMUP_METHOD": "constant"},
        "linear, rescaled": {"WARMUP_ITERS": 9, "WARMUP_FACTOR": 0.1, "RESCALE_INTERVAL": True},
        "constant, rescaled": {
            "WARMUP_ITERS": 9,
            "WARMUP_FACTOR": 0.1,
            "WARMUP_METHOD": "constant",
            "RESCALE_INTERVAL": True,
        },
        "no warm-up": {"WARMUP_ITERS": 0},
        "warm-up past the first step": {"WARMUP_ITERS": 28, "WARMUP_FACTOR": 0.01},
        "warm-up longer than training": {"WARMUP_ITERS": 100},
    }
    values = {}
    for (name, schedule), (warmup_name, warmup) in itertools.product(schedules.items(), warmups.items()):
        if "equal steps" in name and warmup["WARMUP_ITERS"] > 41:
            continue  # detectron2 fails with an IndexError
        cfg = config(MAX_ITER=41, BASE_LR=0.5, **schedule, **warmup)
        values[f"{name}; {warmup_name}"], state = trace(cfg)
        values[f"{name}; {warmup_name}; state"] = state
    values["cfg default"], _ = trace(config(MAX_ITER=1500, STEPS=(1200,)))
    return values


def probe(workdir):
    return {**param_groups(), **built_groups(), **clipped_steps(), **traces()}
