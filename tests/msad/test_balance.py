"""Weights from gradient norms: the formula by hand, in a distiller, over processes and over a resume."""

from __future__ import annotations

import itertools
import logging
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from detectron2.utils.events import EventStorage
from runs import assert_equal_weights, config, left_by_a_killed_run, train

from msad.distill import balance as balance_module
from msad.distill.balance import GradientBalance, squared_gradient
from msad.distill.schedules import distillation_factor
from msad.engine import DistillTrainer
from msad.engine.hooks import BalanceLogger
from msad.modeling.features import tap_neck
from msad.modeling.taps import tap

LOSSES = ({"NAME": "AlignedL1"}, {"NAME": "LAD"})


def test_weights_by_hand():
    balance = GradientBalance(0.5, 2, {"sum": "neck", "none": "neck"})
    for iteration, scale in enumerate((1.0, 3.0, 100.0)):
        maps = [torch.full((1, 1, 2, 2), scale, requires_grad=True), torch.zeros(1, 1, 1, 1, requires_grad=True)]
        detection = 0.5 * maps[0].square().sum() + 3 * maps[1].sum()  # gradient norm sqrt(4 scale^2 + 9)
        distill = [2 * maps[0].sum(), torch.zeros(())]  # gradient norms 4 and 0
        weights = balance(iteration, {"neck": maps}, detection, distill)
        norms = [math.sqrt(4 * s * s + 9) for s in (1.0, 3.0)][: iteration + 1]
        expected = 0.5 * sum(norms) / len(norms) / 4
        # The third iteration is no longer measured.
        torch.testing.assert_close(weights, torch.tensor([expected, 0.0]))


def test_each_loss_is_compared_where_it_reads():
    res5 = torch.tensor([3.0], requires_grad=True)
    p5 = 2 * res5
    detection = p5.square().sum() / 2  # gradient 6 at p5, 12 at res5
    distill = [4 * p5.sum(), 4 * res5.sum(), 3 * res5.sum()]
    frozen = torch.ones(1)
    balance = GradientBalance(0.5, 1, {"a": "neck", "b": "res5", "c": "res5", "d": "frozen"})
    weights = balance(0, {"neck": [p5], "res5": [res5], "frozen": [frozen]}, detection, [*distill, frozen.sum()])
    torch.testing.assert_close(weights, torch.tensor([0.5 * 6 / 4, 0.5 * 12 / 4, 0.5 * 12 / 3, 0.0]))


def test_half_precision_gradients_do_not_vanish():
    maps = torch.ones(4, dtype=torch.float16, requires_grad=True)
    tiny = (maps * 1e-3).sum() * 1e-5  # gradient 1e-8 is 0 in float16
    assert squared_gradient(tiny.float(), [maps]).item() == pytest.approx(4e-16, rel=0.05)


def test_half_precision_gradients_of_sums_do_not_overflow():
    """A sum over a map has gradients as large as the differences in it, which a fixed factor took beyond float16."""
    maps = torch.full((3000,), 40.0, dtype=torch.float16, requires_grad=True)
    total = maps.float().square().sum()
    assert squared_gradient(total, [maps]).item() == pytest.approx(3000 * 80.0**2, rel=1e-3)
    assert squared_gradient(total / 3000, [maps]).item() == pytest.approx(80.0**2 / 3000, rel=1e-3)
    assert squared_gradient(0 * total, [maps]).item() == 0
    assert squared_gradient(total + float("inf"), [maps]).isnan()


def test_a_step_without_numbers_does_not_count():
    balance = GradientBalance(1.0, 5, {"a": "neck"})
    x = torch.ones(2, requires_grad=True)
    before = balance(0, {"neck": [x]}, x.sum(), [2 * x.sum()]).clone()
    after = balance(1, {"neck": [x]}, x.sum(), [x.sum() * float("inf")])
    assert torch.equal(before, after) and before.item() == 0.5


def test_processes_together_find_the_weights_of_the_joint_batch(monkeypatch):
    torch.manual_seed(0)
    maps = torch.randn(4, 3, 2, 2)

    def losses(x, images):  # means over the joint batch, as processes average their losses
        return x.square().mean(dim=(1, 2, 3)).sum() / images, x.abs().mean(dim=(1, 2, 3)).sum() / images

    def weights(x):
        detection, distill = losses(x, 4)
        return GradientBalance(1.0, 1, {"a": "neck"})(0, {"neck": [x]}, detection, [distill])

    expected = weights(maps.clone().requires_grad_())
    parts = [maps[:1].clone().requires_grad_(), maps[1:].clone().requires_grad_()]
    squares = [torch.stack([squared_gradient(v, [x]) for v in losses(x, 4)]) for x in parts]
    monkeypatch.setattr(balance_module.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(balance_module.dist, "all_reduce", lambda tensor: tensor.add_(squares[1]))
    torch.testing.assert_close(weights(parts[0]), expected)


def test_ratio_is_met_in_a_distiller(make_distiller, make_batch):
    balance = GradientBalance(0.25, 1, dict.fromkeys(["AlignedL1", "LAD"], "neck"))
    distiller = make_distiller(losses=LOSSES, balance=balance, w_det=2.0)
    with EventStorage(0), tap_neck(distiller.student) as taken:
        output = distiller(make_batch([(64, 64), (64, 96)]))
    maps = list(taken.values())

    def norm(*names):
        total = sum(v for k, v in output.items() if k.startswith(names))
        gradients = torch.autograd.grad(total, maps, retain_graph=True, allow_unused=True)
        return torch.cat([g.flatten() for g in gradients if g is not None]).norm()

    detection = norm(*[k for k in output if not k.startswith("loss_distill")])
    assert detection > 0
    for name in ("AlignedL1", "LAD"):
        torch.testing.assert_close(norm(f"loss_distill/{name}"), 0.25 * detection, rtol=1e-4, atol=0)
    sum(output.values()).backward()  # the graph is still there for training


def test_ratio_is_met_in_front_of_the_neck(project, teacher_weights, tmp_path, make_batch):
    """SDF compares the backbones' last stages: its gradient is weighed against that of the detection losses there.

    Another loss at the stage before counts at its own maps alone.
    """
    cfg = config(project, teacher_weights, "student", tmp_path / "run", **{"DISTILL.BALANCE.RATIO": 0.25})
    sdf = {"NAME": "SDF", "TAP": "bottom_up", "LEVELS": ["res5"], "MATCH": "by_index"}
    cfg.DISTILL.LOSSES = [{"NAME": "AlignedL1"}, sdf, {**sdf, "NAME": "NaiveL2", "LEVELS": ["res4"]}]
    cfg.DISTILL.WARMUP_ITERS = 0
    distiller = DistillTrainer(cfg).distiller
    assert distiller.balance.places == ("neck", "bottom_up.res5", "bottom_up.res4")
    with EventStorage(0), tap(distiller.student, {"bottom_up": ["res3", "res4", "res5"]}) as taken:
        output = distiller(make_batch([(64, 64), (64, 96)]))
    detection = sum(v for k, v in output.items() if not k.startswith("loss_distill"))
    for name, level in (("SDF", "res5"), ("NaiveL2", "res4")):
        maps = taken["bottom_up"][level]
        ours, theirs = (
            torch.autograd.grad(total, maps, retain_graph=True)[0].norm()
            for total in (output[f"loss_distill/{name}"], detection)
        )
        torch.testing.assert_close(ours, 0.25 * theirs, rtol=1e-4, atol=0)


@pytest.mark.parametrize("losses", [LOSSES[:1], ({"NAME": "MGD"},)], ids=["untrained", "trained"])
def test_measured_where_distillation_begins(make_distiller, make_batch, losses):
    """Before the start nothing counts, whether losses have trained parts and so run, or not; warm-up hides no step."""
    name = losses[0]["NAME"]
    distiller = make_distiller(
        losses=losses, balance=GradientBalance(0.5, 2, {name: "neck"}, start=3), start_iter=3,
        factor=partial(distillation_factor, max_iter=10, warmup_iters=4, start_iter=3),
    )  # fmt: skip
    sums = []
    for iteration in range(7):
        with EventStorage(iteration):
            distiller(make_batch([(64, 64)] * 2))
        sums.append(distiller.balance.sums.clone())
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise([torch.zeros(2), *sums])]
    assert changed == [False] * 3 + [True] * 2 + [False] * 2


def test_no_gradient_is_said(caplog):
    balance = GradientBalance(0.5, 2, {"a": "neck", "b": "neck"}, start=4)
    hook = BalanceLogger(balance)
    hook.trainer = SimpleNamespace(iter=5, start_iter=0, storage=EventStorage(5))
    with pytest.raises(FloatingPointError, match="in iterations 4 to 5 there was no finite gradient of a, b"):
        hook.after_step()
    balance.sums += torch.tensor([1.0, 2.0, 0.0])
    hook.after_step()
    assert "no gradient of b, which has the weight 0" in caplog.text
    assert hook.trainer.storage.latest()["distill_weight/a"][0] == 0.25


def test_a_run_resumed_behind_the_measuring_says_its_weights_at_once(caplog):
    balance = GradientBalance(0.5, 2, {"a": "neck", "b": "neck"}, start=4)
    hook = BalanceLogger(balance)
    for hook.trainer in (SimpleNamespace(start_iter=start) for start in (6, 9)):
        with pytest.raises(FloatingPointError, match="in iterations 4 to 5 there was no finite gradient of a, b"):
            hook.before_train()
    balance.sums += torch.tensor([1.0, 2.0, 4.0])
    with caplog.at_level(logging.INFO, logger="msad"):
        hook.trainer = SimpleNamespace(start_iter=5)
        hook.before_train()
        assert not caplog.messages, "one iteration is still measured"
        hook.trainer = SimpleNamespace(start_iter=6)
        hook.before_train()
    (message,) = caplog.messages
    assert message.endswith("at neck, from 2 iterations: a 0.25, b 0.125")


def test_resumed_run_finds_the_same_weights(project, teacher_weights, tmp_path, caplog):
    # The checkpoint is written after 3 iterations, in the middle of measuring.
    keys = {"DISTILL.BALANCE.RATIO": 0.5, "DISTILL.BALANCE.ITERS": 5, "DISTILL.WARMUP_ITERS": 2}
    with caplog.at_level(logging.INFO, logger="msad"):
        whole, expected, _ = train(config(project, teacher_weights, "student", tmp_path / "whole", **keys))
    assert "from 5 iterations: AlignedL1" in caplog.text
    left_by_a_killed_run(tmp_path / "whole", tmp_path / "killed")
    resumed, trace, _ = train(config(project, teacher_weights, "student", tmp_path / "killed", **keys), resume=True)
    assert trace.steps == expected.steps[3:]
    assert torch.equal(resumed.distiller.balance.sums, whole.distiller.balance.sums)
    assert_equal_weights(resumed.distiller.student.state_dict(), whole.distiller.student.state_dict())
    assert "distill_weight/AlignedL1" in (tmp_path / "whole" / "metrics.json").read_text()


def test_weights_of_the_yaml_are_replaced(project, teacher_weights, tmp_path):
    keys = {"DISTILL.BALANCE.RATIO": 0.5}
    cfg = config(project, teacher_weights, "student", tmp_path / "run", **keys)
    run = DistillTrainer(cfg)
    assert [loss.weight for loss in run.distiller.losses] == [1.0]
    assert run.distiller.balance.names == ("AlignedL1",)
    cfg.merge_from_list(["DISTILL.WEIGHTING", "convex"])
    with pytest.raises(ValueError, match="WEIGHTING both set the weights"):
        DistillTrainer(cfg)
    with pytest.raises(ValueError, match="RATIO > 0"):
        GradientBalance(-1.0, 3, {})
