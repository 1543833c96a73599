"""The hooks by themselves, on a trainer that does nothing."""

from __future__ import annotations

import logging
import random

import numpy as np
import pytest
import torch
from detectron2.engine import HookBase
from detectron2.engine.train_loop import TrainerBase
from torch import nn

from msad.engine import hooks
from msad.engine.gates import GateLogger
from msad.engine.hooks import ExactResume, LossRatioLogger, SkippedImages
from msad.modeling.fusion import CrossFeatureLevelFusion


class Idle(TrainerBase):
    """Runs ``step(self)`` as its iteration."""

    def __init__(self, step=lambda trainer: None):
        super().__init__()
        self.step = step

    def run_step(self):
        self.step(self)


class Loader:
    def __init__(self):
        self.seed = 1
        self.skipped = 0


class Values(HookBase):
    """What the storage holds under ``name`` after each step."""

    def __init__(self, name):
        self.name = name
        self.values = []

    def after_step(self):
        self.values.append(self.trainer.storage.latest().get(self.name, (None,))[0])


def run(step, hook_list, iterations, start=0):
    trainer = Idle(step)
    trainer.register_hooks(hook_list)
    trainer.train(start, iterations)
    return trainer


def draws(into):
    return lambda trainer: into.append((random.random(), np.random.rand(), torch.rand(1).item()))


def test_randomness_of_a_step_depends_on_seed_iteration_and_rank(monkeypatch):
    def drawn(seed, start):
        out = []
        run(draws(out), [ExactResume(seed, nn.Module(), Loader(), 10)], 5, start)
        return out

    whole = drawn(1, 0)
    assert len({value for step in whole for value in step}) == 15
    assert drawn(1, 3) == whole[3:]
    assert not set(drawn(2, 0)) & set(whole)
    monkeypatch.setattr(hooks.comm, "get_rank", lambda: 1)
    assert not set(drawn(1, 0)) & set(whole)


@torch.jit.script
def scripted(x: torch.Tensor) -> torch.Tensor:
    p = torch.sigmoid(x)
    return (nn.functional.binary_cross_entropy_with_logits(x, 0.9 * p, reduction="none") * (1 - p) ** 2.0).sum() / 7.3


def test_script_functions_are_run_as_they_are_written_whatever_ran_before():
    logits = torch.randn(333, 6, requires_grad=True)

    def gradient():
        return torch.autograd.grad(scripted(logits), logits)[0]

    first = []
    run(lambda trainer: first.append(gradient()), [ExactResume(1, nn.Module(), Loader(), 10)], 1)
    for _ in range(4):
        optimised = gradient()
    assert not torch.equal(optimised, first[0]), "the optimised function rounds otherwise"
    again = []
    run(lambda trainer: again.append(gradient()), [ExactResume(1, nn.Module(), Loader(), 10)], 4)
    assert len(again) == 4 and all(torch.equal(g, first[0]) for g in again)


def detector_like(count):
    model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Identity()))
    model[1][0].loss_normalizer = count
    return model


def test_running_counts_of_positives_are_saved_for_every_process(monkeypatch):
    model = detector_like(5.0)
    monkeypatch.setattr(hooks.comm, "all_gather", lambda own: [own, {"1.0": 7.0}])

    def count(trainer):
        model[1][0].loss_normalizer += 1

    saved = []

    class Save(HookBase):
        def after_step(self):
            if (self.trainer.iter + 1) % 2 == 0:
                saved.append(self.trainer._hooks[0].state_dict())

    run(count, [ExactResume(1, model, Loader(), 2), Save()], 5)
    assert saved == [{"seed": 1, "scalars": [{"1.0": n}, {"1.0": 7.0}]} for n in (7.0, 9.0)]

    for rank, expected in ((0, 9.0), (1, 7.0), (2, 9.0)):  # the third process was not there before
        monkeypatch.setattr(hooks.comm, "get_rank", lambda rank=rank: rank)
        loader, fresh = Loader(), detector_like(100.0)
        hook = ExactResume(8, fresh, loader, 2)
        hook.load_state_dict(dict(saved[-1], seed=3))
        assert fresh[1][0].loss_normalizer == expected
        assert hook.seed == loader.seed == 3


def test_state_before_the_first_step():
    hook = ExactResume(4, detector_like(2.0), Loader(), 2)
    assert hook.state_dict() == {"seed": 4, "scalars": [{"1.0": 2.0}]}
    assert ExactResume(4, nn.Linear(1, 1), Loader(), 2).state_dict() == {"seed": 4, "scalars": [{}]}


def test_skipped_images_are_logged_summed_and_resumed(caplog):
    loader = Loader()

    def skip(trainer):
        loader.skipped += trainer.iter % 2  # in the second, fourth, ... step

    values, hook = Values("skipped_images"), SkippedImages(loader, (3, 4))
    with caplog.at_level(logging.WARNING, "msad"):
        run(skip, [hook, values], 7)
    # due after 3, 4, 6 and the last iteration
    assert values.values == [None, None, 1, 2, 2, 3, 3]
    assert "3 images could not be used" in caplog.text
    assert hook.state_dict() == {"total": 3}

    loader.skipped = 0
    values, hook = Values("skipped_images"), SkippedImages(loader, (3,))
    hook.load_state_dict({"total": 3})
    run(skip, [hook, values], 10, start=7)
    assert values.values == [None, 4, 5]


def test_skipped_images_of_all_processes_are_added(monkeypatch):
    monkeypatch.setattr(hooks.comm, "all_gather", lambda own: [own, 10])
    loader = Loader()
    values = Values("skipped_images")
    loader.skipped = 1
    run(lambda trainer: None, [SkippedImages(loader, (1,)), values], 2)
    assert values.values == [11, 21]


def test_nothing_is_said_when_nothing_was_skipped(caplog):
    with caplog.at_level(logging.WARNING, "msad"):
        run(lambda trainer: None, [SkippedImages(Loader())], 2)
    assert "could not be used" not in caplog.text


def test_loss_balance_divides_distillation_by_detection_losses():
    def losses(trainer):
        trainer.storage.put_scalars(
            total_loss=99.0, loss_cls=1.5, loss_box=0.5, lr=3.0,
            **{"loss_distill/A": 3.0, "loss_distill/B/x": 1.0, "assistant/A/loss_cls": 50.0},
        )

    values = Values("distill_to_detection")
    run(losses, [LossRatioLogger(2), values], 3)
    assert values.values == [None, pytest.approx(2.0), pytest.approx(2.0)]


def test_loss_balance_without_detection_losses_is_silent():
    values = Values("distill_to_detection")
    run(lambda t: t.storage.put_scalars(**{"loss_cls": 0.0, "loss_distill/A": 3.0}), [LossRatioLogger(1), values], 1)
    assert values.values == [None]


def test_losses_that_have_ended_no_longer_count(caplog):
    """Distillation ended abruptly after iteration 1, whose loss the storage still has."""

    def losses(trainer):
        trainer.storage.put_scalars(loss_cls=1.0, **({"loss_distill/A": 8.0} if trainer.iter < 2 else {}))

    values = Values("distill_to_detection")
    with caplog.at_level(logging.WARNING, "msad"):
        run(losses, [LossRatioLogger(1, patience=3), values], 5)
    assert values.values == [8.0, 8.0, 0.0, 0.0, 0.0] and "times the detection losses" not in caplog.text


@pytest.mark.parametrize(
    ("ratios", "patience", "warnings"),
    [([2, 2, 2, 2, 2, 2, 2, 2], 3, 1), ([2, 2, 0.5, 2, 2, 0.5, 2, 2], 3, 0), ([2] * 8, 0, 0), ([0.9] * 8, 3, 0)],
)
def test_distillation_that_outweighs_detection_is_said_once(caplog, ratios, patience, warnings):
    def losses(trainer):
        trainer.storage.put_scalars(**{"loss_cls": 1.0, "loss_distill/A": ratios[trainer.iter]})

    with caplog.at_level(logging.WARNING, "msad"):
        run(losses, [LossRatioLogger(1, patience)], len(ratios))
    said = [r.getMessage() for r in caplog.records if "times the detection losses" in r.getMessage()]
    assert len(said) == warnings and all("DISTILL.BALANCE.RATIO" in text for text in said)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_gate_is_logged_and_said_once_where_it_stays_at_h(caplog, normalize):
    """By hand: a hidden value x gives H the weight e^x / (e^x + 1), 1/2 of 0 and 3/4 of log 3; of 64 it is 1."""
    fusion = CrossFeatureLevelFusion(1, 2, reduction=2, mask_padding=False)
    with torch.no_grad():
        fusion.squeeze.weight.copy_(torch.tensor([[1.0, 0.0]]))
        fusion.excite.weight.copy_(torch.tensor([[1.0], [0.0]]))
    fusion.normalize = normalize
    sides = [0.0, np.log(3.0)] if not normalize else [0.0, 0.0]

    def step(trainer):
        if trainer.iter == 5:  # back to equal weights
            fusion.excite.weight.data *= 0
        for value in sides:
            fusion([torch.full((3, 1, 2, 2), float(value)), torch.ones(3, 1, 2, 2)])

    values = Values("fusion/gate_H")
    with caplog.at_level(logging.WARNING, "msad"):
        run(step, [GateLogger(fusion, "it is alone", 2, 1), values], 3)
        expected = pytest.approx(0.5 if normalize else 0.625)
        assert values.values == [None, expected, expected] and not fusion.excite._forward_hooks
        sides = [8.0, 8.0]
        fusion.excite.weight.data *= 8
        run(step, [GateLogger(fusion, "it is alone", 1, 2)], 8)
    (said,) = [r.getMessage() for r in caplog.records]
    assert "those of H for 2 iterations" in said and "so that it is alone" in said
    assert ("MSAD.FUSION.NORMALIZE True" in said) != normalize
