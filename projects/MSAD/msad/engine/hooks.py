"""Hooks of DistillTrainer: exact resume, balance of the losses, analysis of features, count of skipped images."""

from __future__ import annotations

import contextlib
import json
import logging
import random
from pathlib import Path

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from ..distill.analysis import decompose
from ..distill.balance import GradientBalance
from ..distill.context import DistillContext, Features
from ..distill.distiller import Distiller

logger = logging.getLogger(__name__)
Levels = dict[str, dict[str, float]]  # by name: the parts by name


class ExactResume(HookBase):
    """Make an interrupted and resumed run repeat the uninterrupted one.

    Randomness of a step is a function of (seed, iteration, rank), so no generator state has to be saved. What dense
    detectors keep outside their state_dict, the running count of positives that normalises their losses, is saved for
    every process: each counts for itself. Register it before the hook that writes checkpoints.

    TorchScript functions, which detectron2's losses are made of, are run as they are written: after a few calls they
    would be optimised, and a process that has just resumed would round otherwise than one that has been running. What
    was optimised before in this process is forgotten.

    Args:
        seed: of the run; a resumed run takes the saved one.
        model: whose modules may have a ``loss_normalizer``.
        loader: training loader whose ``seed`` can be set; None: another one, which a resumed run begins anew.
        period: iterations from one checkpoint to the next.
    """

    _scalar = "loss_normalizer"

    def __init__(self, seed: int, model: nn.Module, loader, period: int) -> None:
        self.seed = seed
        self.model = model
        self.loader = loader
        self.period = period
        self._of_ranks: list[dict[str, float]] = []
        self._settings = contextlib.ExitStack()

    def before_train(self) -> None:
        self._settings.enter_context(torch.jit.optimized_execution(False))
        # The setting does not reach functions that have been optimised already.
        for function in torch.jit._state._python_cu.get_functions():
            function._debug_flush_compilation_cache()

    def after_train(self) -> None:
        self._settings.close()

    def before_step(self) -> None:
        entropy = (self.seed, self.trainer.iter, comm.get_rank())
        step_seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        random.seed(step_seed)
        np.random.seed(step_seed)
        torch.manual_seed(step_seed)

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self.period == 0 or done == self.trainer.max_iter:
            # Here, because state_dict() is called in the main process only.
            self._of_ranks = comm.all_gather(self._scalars())

    def _scalars(self) -> dict[str, float]:
        found = {name: getattr(module, self._scalar, None) for name, module in self.model.named_modules()}
        # Keypoint heads have a setting of this name, which is a word.
        return {name: float(value) for name, value in found.items() if value is not None and not isinstance(value, str)}

    def state_dict(self) -> dict:
        return {"seed": self.seed, "scalars": self._of_ranks or [self._scalars()]}

    def load_state_dict(self, state_dict: dict) -> None:
        self.seed = state_dict["seed"]
        if self.loader is not None:
            self.loader.seed = self.seed
        of_ranks = state_dict["scalars"]
        modules = dict(self.model.named_modules())
        # Resumed with more processes than before, the new ones start from the first one's.
        for name, value in of_ranks[comm.get_rank() if comm.get_rank() < len(of_ranks) else 0].items():
            setattr(modules[name], self._scalar, value)


class SkippedImages(HookBase):
    """Log how many images of the training loader were unusable since the run began ("skipped_images").

    Register it before the hook that writes checkpoints.

    Args:
        loader: training loader that counts in its ``skipped``, in every process for itself.
        periods: the processes' counts are summed and logged whenever one of these numbers of iterations is over.
    """

    def __init__(self, loader, periods: tuple[int, ...] = (20,)) -> None:
        self.loader = loader
        self.periods = periods
        self.total = 0  # over all processes, of this run and of those that it resumes
        self._counted = 0  # how much of the loader's count is in the total

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done != self.trainer.max_iter and all(done % period for period in self.periods):
            return
        self.total += sum(comm.all_gather(self.loader.skipped - self._counted))
        self._counted = self.loader.skipped
        self.trainer.storage.put_scalar("skipped_images", self.total, smoothing_hint=False)

    def after_train(self) -> None:
        if self.total:
            logger.warning("%d images could not be used in training; others took their places", self.total)

    def state_dict(self) -> dict:
        return {"total": self.total}

    def load_state_dict(self, state_dict: dict) -> None:
        self.total = state_dict["total"]


class LossRatioLogger(HookBase):
    """Log distillation losses as a fraction of detection losses ("distill_to_detection").

    The released weight outweighs the detection loss where features are large; this is the number to look at first.
    Reads what the trainer has already put into the event storage, so it costs no synchronisation. Above 1 for
    ``patience`` readings in a row it warns, once (0: never).
    """

    def __init__(self, period: int = 20, patience: int = 3) -> None:
        self.period = period
        self.patience = patience
        self._above = 0  # readings in a row

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % self.period:
            return
        known = {k: v for k, v in self.trainer.storage.latest().items() if k.startswith("loss")}
        newest = max((iteration for _, iteration in known.values()), default=-1)
        latest = {k: value for k, (value, iteration) in known.items() if iteration == newest}  # older ones have ended
        distill = sum(v for k, v in latest.items() if k.startswith("loss_distill"))
        detection = sum(v for k, v in latest.items() if not k.startswith("loss_distill"))
        if detection <= 0:
            return
        ratio = distill / detection
        self.trainer.storage.put_scalar("distill_to_detection", ratio, smoothing_hint=False)
        self._above = self._above + 1 if ratio > 1 else 0
        if 0 < self.patience == self._above:
            self.patience = 0  # never again
            logger.warning(
                "The distillation losses are %.1f times the detection losses, for %d iterations now: the student "
                "learns the teacher's features rather than to detect. Lower WEIGHT in DISTILL.LOSSES, or set "
                "DISTILL.BALANCE.RATIO 0.5 to have it found", ratio, self._above * self.period,
            )  # fmt: skip


class BalanceLogger(HookBase):
    """Log the weights that DISTILL.BALANCE finds: as "distill_weight/NAME" while it measures, then once for all.

    FloatingPointError after the last of its iterations if no loss has got a weight: nothing would be distilled.
    """

    def __init__(self, balance: GradientBalance, period: int = 20) -> None:
        self.balance = balance
        self.period = period
        self.end = balance.start + balance.iters

    def before_train(self) -> None:
        if self.trainer.start_iter >= self.end:
            self._say()

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self.balance.measures(self.trainer.iter) and (done % self.period == 0 or done == self.end):
            for name, weight in zip(self.balance.names, self.balance.weights.tolist()):
                self.trainer.storage.put_scalar(f"distill_weight/{name}", weight, smoothing_hint=False)
        if done == self.end:
            self._say()

    def _say(self) -> None:
        found = dict(zip(self.balance.names, self.balance.weights.tolist()))
        without = ", ".join(name for name, weight in found.items() if weight == 0)
        where = f"DISTILL.BALANCE: in iterations {self.balance.start} to {self.end - 1}"
        if not any(found.values()):
            raise FloatingPointError(f"{where} there was no finite gradient of {without}: nothing would be distilled")
        if without:
            logger.warning("%s there was no gradient of %s, which has the weight 0", where, without)
        logger.info(
            "Weights for a gradient of %g times the detection losses' at %s, from %d iterations: %s",
            self.balance.ratio, " and ".join(self.balance.places), self.balance.iters,
            ", ".join(f"{name} {w:.4g}" for name, w in found.items()),
        )  # fmt: skip


class FeatureAnalysis(HookBase):
    """Append the means over a batch of what :func:`msad.distill.analysis.decompose` finds to features.jsonl.

    A line is {"iteration": i, "levels": {name: {"m", "n", "mn", "angle", "magnitude", "angular"}}}. Names are those of
    the teacher's levels, in the H frame at the neck. The maps are those that the first loss with this level compares,
    after its adaptation layer; without one, the neck's as they are, if they have one shape.

    Args:
        distiller: whose student is compared with its first teacher.
        period: iterations from one line to the next, beginning with the first.
        output: folder of the file.
    """

    def __init__(self, distiller: Distiller, period: int, output: str) -> None:
        self.distiller = distiller
        self.period = period
        self.file = Path(output) / "features.jsonl"
        self._warned = False
        self._neck: Levels = {}
        self._compared: Levels = {}
        self._handles: list = []

    def before_step(self) -> None:
        # In every process: the teacher runs for it, and its synchronised normalisation needs them all.
        if self.trainer.iter % self.period == 0:
            self.distiller.on_context.append(self._see_neck)
            for loss in self.distiller.losses:
                if loss.source == self.distiller.teacher.name and not loss.heads:
                    self._handles.append(loss.loss.register_forward_pre_hook(self._see_loss))

    def after_step(self) -> None:
        if self._see_neck not in self.distiller.on_context:
            return
        self.distiller.on_context.remove(self._see_neck)
        while self._handles:
            self._handles.pop().remove()
        levels, self._compared = {**self._neck, **self._compared}, {}
        if not comm.is_main_process():
            return
        if not levels and not self._warned:
            logger.warning("DISTILL.ANALYSIS_PERIOD: student and teacher have no level of equal shape to compare")
            self._warned = True
        with open(self.file, "a") as file:
            file.write(json.dumps({"iteration": self.trainer.iter, "levels": levels}) + "\n")

    def _see_neck(self, context: DistillContext) -> None:
        self._neck = _parts(context.student, context.sources[self.distiller.teacher.name])

    def _see_loss(self, _loss: nn.Module, args: tuple) -> None:
        self._compared = {**_parts(*args[:2]), **self._compared}


@torch.no_grad()
def _parts(student: Features, teacher: Features) -> Levels:
    """Of each level that both have in one shape."""
    found: Levels = {}
    for name, s in student.items():
        if name in teacher and s.shape == teacher[name].shape:
            parts = decompose(s, teacher[name])._asdict()
            found[name] = {key: float(f"{values.mean().item():.6g}") for key, values in parts.items()}
    return found
