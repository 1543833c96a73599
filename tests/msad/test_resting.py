"""Parts of losses are trained while their losses count, and rest otherwise."""

from __future__ import annotations

import pytest
import torch
from detectron2.engine import HookBase
from runs import config

from msad.engine import DistillTrainer


class Steps(HookBase):
    """Whether the parameters of the losses have moved in each iteration."""

    def __init__(self, losses):
        self.parameters, self.moved = list(losses.parameters()), []

    def before_step(self):
        self.before = [p.detach().clone() for p in self.parameters]

    def after_step(self):
        self.moved.append(any(not torch.equal(p, q) for p, q in zip(self.parameters, self.before)))


@pytest.mark.parametrize("phases, moved", [
    ({"START_ITER": 3}, [False, False, False, True, True, True]),
    ({"START_ITER": 2, "WARMUP_ITERS": 2}, [False, False, False, True, True, True]),  # with a factor of 0 at first
    ({"DECAY_FROM": 0.4, "DECAY_TO": 0.5}, [True, True, True, False, False, False]),
])  # fmt: skip
def test_what_losses_train_rests_with_them(project, teacher_weights, tmp_path, phases, moved):
    """AdamW would decay it, and after many zeros its first real steps would be several times the learning rate."""
    phases = {f"DISTILL.{key}": value for key, value in ({"WARMUP_ITERS": 0} | phases).items()}
    solver = {"SOLVER.OPTIMIZER": "AdamW", "SOLVER.MAX_ITER": 6, "SOLVER.WEIGHT_DECAY": 0.1}
    losses = {"DISTILL.LOSSES": [{"NAME": "MGD"}]}
    cfg = config(project, teacher_weights, "student", tmp_path, **solver, **phases, **losses)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(False)
    steps = Steps(trainer.distiller.losses)
    trainer.register_hooks([steps])
    trainer.train()
    assert steps.moved == moved and len(steps.parameters) > 0
    assert {float(trainer.optimizer.state[p]["step"]) for p in steps.parameters} == {sum(moved)}
