"""Optimizers and schedules against hand-computed values. Passes on detectron2 and on detectron2-lite."""

import math

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.solver import (
    LRMultiplier,
    WarmupParamScheduler,
    build_lr_scheduler,
    build_optimizer,
    get_default_optimizer_params,
)
from fvcore.common.param_scheduler import ConstantParamScheduler, CosineParamScheduler, MultiStepParamScheduler
from torch import nn


def solver_cfg(**solver):
    cfg = get_cfg()
    for key, value in {"BASE_LR": 1.0, "MAX_ITER": 10, "WARMUP_ITERS": 0, **solver}.items():
        cfg.SOLVER[key] = value
    return cfg


def rates(cfg, iterations=None):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    scheduler = build_lr_scheduler(cfg, optimizer)
    found = []
    for _ in range(iterations or cfg.SOLVER.MAX_ITER):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_multi_step():
    assert rates(solver_cfg(STEPS=(4, 8))) == pytest.approx([1.0] * 4 + [0.1] * 4 + [0.01] * 2)


def test_linear_and_constant_warmup():
    cfg = solver_cfg(STEPS=(7,), WARMUP_ITERS=4, WARMUP_FACTOR=0.2)
    assert rates(cfg) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 0.1, 0.1, 0.1])
    cfg.SOLVER.WARMUP_METHOD = "constant"
    assert rates(cfg) == pytest.approx([0.2] * 4 + [1.0] * 3 + [0.1] * 3)


def test_cosine_ends_where_it_is_told():
    found = rates(solver_cfg(LR_SCHEDULER_NAME="WarmupCosineLR", BASE_LR_END=0.2))
    assert found == pytest.approx([0.2 + 0.4 * (1 + math.cos(math.pi * i / 10)) for i in range(10)])


def test_rescaled_cosine_begins_after_warmup():
    cfg = solver_cfg(
        LR_SCHEDULER_NAME="WarmupCosineLR", WARMUP_ITERS=2, WARMUP_FACTOR=0.5, RESCALE_INTERVAL=True
    )
    expected = [0.5, 0.75] + [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    assert rates(cfg) == pytest.approx(expected)


def test_equal_steps():
    cfg = solver_cfg(LR_SCHEDULER_NAME="WarmupStepWithFixedGammaLR", NUM_DECAYS=4, GAMMA=0.5)
    # the tenth value needs nine steps
    assert rates(cfg, 9) == pytest.approx([1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.0625])


def test_unknown_schedule_and_warmup_are_named():
    with pytest.raises(ValueError, match="Sawtooth"):
        rates(solver_cfg(LR_SCHEDULER_NAME="Sawtooth"))
    with pytest.raises(ValueError, match="sudden"):
        rates(solver_cfg(STEPS=(4,), WARMUP_METHOD="sudden"))


def test_multiplier_keeps_ratios_of_groups_and_resumes():
    def make():
        groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (2.0, 3.0)]
        optimizer = torch.optim.SGD(groups, lr=1.0)
        schedule = MultiStepParamScheduler([1, 0.1], milestones=[3], num_updates=6)
        return optimizer, LRMultiplier(optimizer, schedule, max_iter=6)

    optimizer, scheduler = make()
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.2, 0.3])
    assert scheduler.state_dict() == {"base_lrs": [2.0, 3.0], "last_epoch": 4}

    optimizer, resumed = make()
    resumed.load_state_dict(scheduler.state_dict())
    optimizer.step()
    resumed.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.2, 0.3])
    assert resumed.last_epoch == 5


def test_multiplier_wants_a_param_scheduler():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match="3"):
        LRMultiplier(optimizer, 3, max_iter=6)


def test_warmup_param_scheduler():
    scheduler = WarmupParamScheduler(ConstantParamScheduler(2.0), warmup_factor=0.25, warmup_length=0.5)
    assert [scheduler(where) for where in (0, 0.25, 0.5, 0.9)] == pytest.approx([0.5, 1.25, 2.0, 2.0])
    meets = WarmupParamScheduler(CosineParamScheduler(1, 0), 0.0, 0.5)
    assert meets(0.25) == pytest.approx(0.25)  # half way to the cosine's value there


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.norm = nn.GroupNorm(1, 2)
        self.again = nn.Conv2d(2, 2, 1, bias=False)
        self.again.weight = self.conv.weight
        self.frozen = nn.Linear(1, 1).requires_grad_(False)


def by_name(model, groups):
    """{parameter name: settings}, and a check that no parameter occurs twice."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for group in groups:
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = {k: v for k, v in group.items() if k != "params"}
    return found


def test_parameter_groups():
    model = Net()
    groups = get_default_optimizer_params(
        model, base_lr=1.0, weight_decay=0.1, weight_decay_norm=0.0, bias_lr_factor=2.0, weight_decay_bias=0.3
    )
    assert by_name(model, groups) == {
        "conv.weight": {"lr": 1.0, "weight_decay": 0.1},
        "conv.bias": {"lr": 2.0, "weight_decay": 0.3},
        "norm.weight": {"lr": 1.0, "weight_decay": 0.0},
        "norm.bias": {"lr": 2.0, "weight_decay": 0.3},
    }
    assert len(groups) == 3


def test_parameter_groups_by_function_and_name():
    model = Net()
    groups = get_default_optimizer_params(
        model,
        base_lr=1.0,
        lr_factor_func=lambda name: 0.5 if name.startswith("conv.") else 1.0,
        overrides={"bias": {"weight_decay": 0.0}},
    )
    found = by_name(model, groups)
    assert found["conv.weight"] == {"lr": 0.5}
    assert found["conv.bias"] == {"lr": 0.5, "weight_decay": 0.0}
    assert found["norm.bias"] == {"lr": 1.0, "weight_decay": 0.0}


@pytest.mark.parametrize(
    "kwargs",
    [
        {"bias_lr_factor": 2.0},
        {"lr_factor_func": len},
        {"base_lr": 1.0, "bias_lr_factor": 2.0, "overrides": {"bias": {"lr": 3.0}}},
        {"weight_decay_bias": 1.0, "overrides": {"bias": {"weight_decay": 3.0}}},
    ],
)
def test_contradictions_are_errors(kwargs):
    with pytest.raises(ValueError):
        get_default_optimizer_params(Net(), **kwargs)


def test_build_optimizer_reads_the_config():
    model = Net()
    optimizer = build_optimizer(solver_cfg(MOMENTUM=0.8, NESTEROV=True, BIAS_LR_FACTOR=2.0), model)
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.defaults["momentum"] == 0.8 and optimizer.defaults["nesterov"]
    found = by_name(model, optimizer.param_groups)
    assert (found["conv.weight"]["lr"], found["conv.weight"]["weight_decay"]) == (1.0, 0.0001)
    assert (found["conv.bias"]["lr"], found["norm.weight"]["weight_decay"]) == (2.0, 0.0)


@pytest.mark.parametrize("kind, expected", [("value", [0.5, -0.5, 0.25]), ("norm", None)])
def test_gradients_are_clipped_before_the_step(kind, expected):
    cfg = solver_cfg(WEIGHT_DECAY=0.0)
    cfg.SOLVER.CLIP_GRADIENTS.update(ENABLED=True, CLIP_TYPE=kind, CLIP_VALUE=0.5)
    model = nn.Linear(3, 1)
    nn.init.zeros_(model.weight)
    model.weight.grad = torch.tensor([[3.0, -4.0, 0.25]])
    model.bias.grad = torch.tensor([0.125])
    build_optimizer(cfg, model).step()
    if kind == "norm":
        expected = (0.5 * torch.tensor([3.0, -4.0, 0.25]) / math.sqrt(25.0625)).tolist()
    assert (-model.weight.data[0]).tolist() == pytest.approx(expected, rel=1e-5)
    assert model.bias.grad.item() == 0.125  # each parameter on its own


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
def test_norms_are_clipped_as_torch_does_for_each_parameter(order):
    cfg = solver_cfg(WEIGHT_DECAY=0.0)
    cfg.SOLVER.CLIP_GRADIENTS.update(ENABLED=True, CLIP_TYPE="norm", CLIP_VALUE=2.0, NORM_TYPE=order)
    model = Net()
    torch.manual_seed(0)
    expected = {}
    for scale, (name, parameter) in zip((0.01, 1.0, 30.0), model.named_parameters()):
        parameter.grad = scale * torch.randn_like(parameter)
        alone = nn.Parameter(parameter.detach().clone())
        alone.grad = parameter.grad.clone()
        nn.utils.clip_grad_norm_(alone, 2.0, order)
        expected[name] = alone.grad
    assert any(p.grad is None for p in model.parameters())  # which are left alone
    build_optimizer(cfg, model).step()
    for name, gradient in expected.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient)


def test_unknown_clip_type_is_named():
    cfg = solver_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.update(ENABLED=True, CLIP_TYPE="full_model")
    with pytest.raises(ValueError, match="full_model"):
        build_optimizer(cfg, Net())
