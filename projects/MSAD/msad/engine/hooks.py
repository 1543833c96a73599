"""Hooks of DistillTrainer: exact resume and the balance of the losses."""

from __future__ import annotations

import random

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn


class ExactResume(HookBase):
    """Make an interrupted and resumed run repeat the uninterrupted one.

    Randomness of a step is a function of (seed, iteration, rank), so no generator state has to be saved. What dense
    detectors keep outside their state_dict, the running count of positives that normalises their losses, is saved.

    Args:
        seed: of the run; a resumed run takes the saved one.
        model: whose modules may have a ``loss_normalizer``.
        loader: training loader with a ``seed`` attribute.
    """

    _scalar = "loss_normalizer"

    def __init__(self, seed: int, model: nn.Module, loader) -> None:
        self.seed = seed
        self.model = model
        self.loader = loader

    def before_step(self) -> None:
        entropy = (self.seed, self.trainer.iter, comm.get_rank())
        step_seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        random.seed(step_seed)
        np.random.seed(step_seed)
        torch.manual_seed(step_seed)

    def state_dict(self) -> dict:
        scalars = {
            name: float(getattr(module, self._scalar))
            for name, module in self.model.named_modules()
            if hasattr(module, self._scalar)
        }
        return {"seed": self.seed, "scalars": scalars}

    def load_state_dict(self, state_dict: dict) -> None:
        self.seed = self.loader.seed = state_dict["seed"]
        modules = dict(self.model.named_modules())
        for name, value in state_dict["scalars"].items():
            setattr(modules[name], self._scalar, value)


class LossBalance(HookBase):
    """Log distillation losses as a fraction of detection losses ("distill_to_detection").

    The released weight outweighs the detection loss where features are large; this is the number to look at first.
    Reads what the trainer has already put into the event storage, so it costs no synchronisation.
    """

    def __init__(self, period: int = 20) -> None:
        self.period = period

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % self.period:
            return
        latest = {k: v[0] for k, v in self.trainer.storage.latest().items() if "loss" in k and k != "total_loss"}
        distill = sum(v for k, v in latest.items() if k.startswith("loss_distill"))
        detection = sum(v for k, v in latest.items() if not k.startswith("loss_distill"))
        if detection > 0:
            self.trainer.storage.put_scalar("distill_to_detection", distill / detection, smoothing_hint=False)
