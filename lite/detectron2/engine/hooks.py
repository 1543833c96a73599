"""Hooks for a training loop: timing, writers, checkpoints, learning rate, evaluation, batch norm."""

import datetime
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import torch
from fvcore.common import checkpoint
from fvcore.common.param_scheduler import ParamScheduler
from fvcore.common.timer import Timer
from fvcore.nn.precise_bn import get_bn_modules, update_bn_stats

from detectron2.evaluation.testing import flatten_results_dict
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, EventWriter

from .loop import HookBase
from .profiling import TorchMemoryStats, TorchProfiler

__all__ = ["BestCheckpointer", "CallbackHook", "EvalHook", "IterationTimer"]
__all__ += ["LRScheduler", "PeriodicCheckpointer", "PeriodicWriter", "PreciseBN", "TorchMemoryStats"]
__all__ += ["TorchProfiler"]

logger = logging.getLogger(__name__)


def _is_due(iteration: int, period: int) -> bool:
    """Whether `iteration` (from 0) is the last one of a period; never for a period of 0."""
    return period > 0 and (iteration + 1) % period == 0


class CallbackHook(HookBase):
    """A hook from functions; each is called with the trainer."""

    def __init__(
        self,
        *,
        before_train: Callable | None = None,
        after_train: Callable | None = None,
        before_step: Callable | None = None,
        after_step: Callable | None = None,
    ) -> None:
        self._callbacks = {
            "before_train": before_train,
            "after_train": after_train,
            "before_step": before_step,
            "after_step": after_step,
        }

    def _call(self, event: str) -> None:
        callback = self._callbacks[event]
        if callback is not None:
            callback(self.trainer)

    def before_train(self) -> None:
        self._call("before_train")

    def before_step(self) -> None:
        self._call("before_step")

    def after_step(self) -> None:
        self._call("after_step")

    def after_train(self) -> None:
        self._call("after_train")
        # Closures often hold the trainer: let go of them, or the two keep each other alive.
        self._callbacks = dict.fromkeys(self._callbacks)


class IterationTimer(HookBase):
    """Writes the seconds of each step as `time` and logs a summary; register it first.

    Steps are timed up to the end of `run_step` and of the hooks before this one; what the later hooks
    take is the difference to the total time.

    Args:
        warmup_iter: the first iterations, slow for reasons of their own, that are left out.
    """

    def __init__(self, warmup_iter: int = 3) -> None:
        self._warmup_iter = warmup_iter

    def before_train(self) -> None:
        self._begin = time.perf_counter()
        self._wall = Timer()
        self._wall.pause()
        self._step = Timer()

    def before_step(self) -> None:
        self._step.reset()
        self._wall.resume()

    def after_step(self) -> None:
        done = self.trainer.storage.iter - self.trainer.start_iter + 1
        if done >= self._warmup_iter:
            self.trainer.storage.put_scalars(time=self._step.seconds())
        else:
            # Count from the end of the warm-up on.
            self._begin = time.perf_counter()
            self._wall.reset()
        self._wall.pause()

    def after_train(self) -> None:
        in_steps = self._wall.seconds()
        timed = self.trainer.storage.iter - self.trainer.start_iter - max(self._warmup_iter - 1, 0)
        if timed <= 0 or in_steps <= 0:
            return
        total = time.perf_counter() - self._begin
        logger.info("%d iterations took %s (%.4f s each)", timed, _clock(in_steps), in_steps / timed)
        logger.info("Training took %s in all, %s of it in hooks", _clock(total), _clock(total - in_steps))


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=int(seconds)))


class PeriodicWriter(HookBase):
    """Calls `EventWriter.write` every `period` iterations and at the end, and closes the writers."""

    def __init__(self, writers: Iterable[EventWriter], period: int = 20) -> None:
        self._writers = list(writers)
        for writer in self._writers:
            if not isinstance(writer, EventWriter):
                raise TypeError(f"PeriodicWriter needs EventWriters, got {type(writer).__name__}.")
        self._period = period

    def after_step(self) -> None:
        trainer = self.trainer
        if _is_due(trainer.iter, self._period) or trainer.iter == trainer.max_iter - 1:
            for writer in self._writers:
                writer.write()

    def after_train(self) -> None:
        # Hooks before this one may have written results in their own after_train.
        for writer in self._writers:
            writer.write()
            writer.close()


class PeriodicCheckpointer(checkpoint.PeriodicCheckpointer, HookBase):
    """fvcore's periodic checkpointer as a hook; `max_iter` comes from the trainer."""

    def before_train(self) -> None:
        self.max_iter = self.trainer.max_iter

    def after_step(self) -> None:
        self.step(self.trainer.iter)


class LRScheduler(HookBase):
    """Writes the learning rate as `lr` and steps the scheduler once an iteration.

    Args:
        optimizer: by default that of the trainer.
        scheduler: a torch scheduler or a fvcore `ParamScheduler`, which multiplies the base rate and runs
            from 0 to 1 over the training; by default that of the trainer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None = None, scheduler=None) -> None:
        self._given_optimizer, self._given_scheduler = optimizer, scheduler

    @property
    def scheduler(self):
        return self._given_scheduler or self.trainer.scheduler

    def before_train(self) -> None:
        optimizer = self._given_optimizer or self.trainer.optimizer
        if isinstance(self.scheduler, ParamScheduler):
            start, end = self.trainer.iter, self.trainer.max_iter
            self._given_scheduler = LRMultiplier(optimizer, self.scheduler, end, last_iter=start - 1)
        self._optimizer, self._logged_group = optimizer, self.get_best_param_group_id(optimizer)

    @staticmethod
    def get_best_param_group_id(optimizer: torch.optim.Optimizer) -> int:
        """The group whose rate is worth logging: the largest, or one with the commonest rate if each
        group has a single parameter."""
        groups = optimizer.param_groups
        sizes = [len(group["params"]) for group in groups]
        if max(sizes) > 1:
            return sizes.index(max(sizes))
        rates = [group["lr"] for group in groups]
        return rates.index(Counter(rates).most_common(1)[0][0])

    def after_step(self) -> None:
        rate = self._optimizer.param_groups[self._logged_group]["lr"]
        self.trainer.storage.put_scalar("lr", rate, smoothing_hint=False)
        self.scheduler.step()

    def state_dict(self) -> dict:
        return self.scheduler.state_dict() if self._has_state() else {}

    def load_state_dict(self, state_dict: Mapping) -> None:
        if self._has_state():
            self.scheduler.load_state_dict(state_dict)

    def _has_state(self) -> bool:
        # A ParamScheduler has none, its position is the iteration.
        return isinstance(self.scheduler, torch.optim.lr_scheduler.LRScheduler)


class EvalHook(HookBase):
    """Calls an evaluation function every `eval_period` iterations and at the end of a complete training.

    Every process calls it, so that it may use collective operations.

    Args:
        eval_period: 0 means only at the end.
        eval_function: without arguments; returns a (nested) dict of numbers, written to the event storage
            with names joined by "/", or None.
        eval_after_train: whether to evaluate at the end.
    """

    def __init__(self, eval_period: int, eval_function: Callable, eval_after_train: bool = True) -> None:
        self._period = eval_period
        self._evaluate = eval_function
        self._eval_after_train = eval_after_train

    def _do_eval(self) -> None:
        results = self._evaluate()
        if results:
            if not isinstance(results, Mapping):
                raise TypeError(f"The evaluation function must return a dict, got {type(results).__name__}.")
            self.trainer.storage.put_scalars(**_as_scalars(results), smoothing_hint=False)
        # Training goes on only when the slowest process (the one that computes metrics) is ready.
        comm.synchronize()

    def after_step(self) -> None:
        if _is_due(self.trainer.iter, self._period) and self.trainer.iter + 1 != self.trainer.max_iter:
            self._do_eval()

    def after_train(self) -> None:
        # Not after an error: then iter has not reached max_iter.
        if self._eval_after_train and self.trainer.iter + 1 >= self.trainer.max_iter:
            self._do_eval()
        # The function often is a closure over the trainer.
        del self._evaluate


def _as_scalars(results: Mapping) -> dict[str, float]:
    scalars = {}
    for name, value in flatten_results_dict(results).items():
        try:
            scalars[name] = float(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"Evaluation result {name!r} is not a number: {value!r}") from error
    return scalars


class BestCheckpointer(HookBase):
    """Saves `<file_prefix>.pth` whenever a metric in the event storage is better than before.

    Register it after the `EvalHook` that writes the metric.

    Args:
        eval_period: the period of that `EvalHook`.
        checkpointer: a fvcore `Checkpointer`, saves the model.
        val_metric: name in the event storage, for instance "bbox/AP50".
        mode: "max" or "min", which direction is better.
        file_prefix: name of the file without its ending.
    """

    best_metric: float | None = None
    best_iter: int | None = None

    def __init__(
        self,
        eval_period: int,
        checkpointer,
        val_metric: str,
        mode: str = "max",
        file_prefix: str = "model_best",
    ) -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"BestCheckpointer: mode is 'max' or 'min', got {mode!r}.")
        self._period = eval_period
        self._checkpointer = checkpointer
        self._val_metric = val_metric
        self._sign = 1 if mode == "max" else -1
        self._file_prefix = file_prefix

    def _save_if_better(self) -> None:
        latest = self.trainer.storage.latest().get(self._val_metric)
        if latest is None:
            logger.warning("No metric %r has been written; the best checkpoint stays.", self._val_metric)
            return
        value, iteration = latest
        if not math.isfinite(value):
            return
        if self.best_metric is not None and self._sign * (value - self.best_metric) <= 0:
            return
        previous, self.best_metric, self.best_iter = self.best_metric, value, iteration
        self._checkpointer.save(self._file_prefix, iteration=iteration)
        logger.info(
            f"Saved {self._file_prefix}.pth: {self._val_metric} is {value:.5f} after iteration {iteration} "
            f"(before: {previous})"
        )

    def after_step(self) -> None:
        # The evaluation of the last iteration happens in after_train.
        if _is_due(self.trainer.iter, self._period) and self.trainer.iter + 1 != self.trainer.max_iter:
            self._save_if_better()

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            self._save_if_better()


class PreciseBN(HookBase):
    """Replaces the running statistics of batch norm by true averages over `num_iter` batches.

    Register it before the hooks that evaluate and save.

    Args:
        period: every this many iterations and after the last one; 0 means only then.
        model: its batch norm layers in training mode are updated; nothing happens if there are none.
        data_loader: makes training batches; an iterator of its own is kept.
        num_iter: how many batches.
    """

    def __init__(self, period: int, model: torch.nn.Module, data_loader, num_iter: int) -> None:
        self._period = period
        self._model = model
        self._data_loader = data_loader
        self._num_iter = num_iter
        self._enabled = bool(get_bn_modules(model))
        if not self._enabled:
            logger.info("PreciseBN has nothing to do: no batch norm layer is in training mode.")
        self._batches = None

    def after_step(self) -> None:
        if _is_due(self.trainer.iter, self._period) or self.trainer.iter + 1 == self.trainer.max_iter:
            self.update_stats()

    def update_stats(self) -> None:
        """Run the model over the next `num_iter` batches and update the statistics."""
        if not self._enabled:
            return
        if self._batches is None:
            self._batches = iter(self._data_loader)
        # The losses of these forward passes must not end up among those of the training.
        with EventStorage():
            logger.info("PreciseBN: averaging batch norm statistics over %d batches", self._num_iter)
            update_bn_stats(self._model, self._batches, self._num_iter)
