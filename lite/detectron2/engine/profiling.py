"""Hooks that look at where time and GPU memory go."""

import logging
import os
from collections.abc import Callable, Iterable

import torch

import detectron2.utils.comm as comm
from detectron2.utils.file_io import PathManager

from .loop import HookBase

logger = logging.getLogger(__name__)


class TorchProfiler(HookBase):
    """Records the iterations that a predicate selects with `torch.profiler`.

    Args:
        enable_predicate: called with the trainer before each step; true means record this step.
        output_dir: the traces go here, under `log` for tensorboard and as `profiler-trace-iter*.json`.
        activities: passed on to `torch.profiler.profile`.
        save_tensorboard: whether to write traces for tensorboard.
    """

    def __init__(
        self,
        enable_predicate: Callable[[object], bool],
        output_dir: str,
        *,
        activities: Iterable | None = None,
        save_tensorboard: bool = True,
    ) -> None:
        self._enable_predicate = enable_predicate
        self._output_dir = output_dir
        self._activities = activities
        self._save_tensorboard = save_tensorboard
        self._profiler = None

    def before_step(self) -> None:
        if not self._enable_predicate(self.trainer):
            return
        on_trace_ready = None
        if self._save_tensorboard:
            on_trace_ready = torch.profiler.tensorboard_trace_handler(
                os.path.join(self._output_dir, "log", f"profiler-iter{self.trainer.iter}"),
                f"worker{comm.get_rank()}",
            )
        self._profiler = torch.profiler.profile(
            activities=self._activities,
            on_trace_ready=on_trace_ready,
            profile_memory=True,
            record_shapes=True,
        )
        self._profiler.__enter__()

    def after_step(self) -> None:
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.__exit__(None, None, None)
        if not self._save_tensorboard:
            PathManager.mkdirs(self._output_dir)
            profiler.export_chrome_trace(
                os.path.join(self._output_dir, f"profiler-trace-iter{self.trainer.iter}.json")
            )


class TorchMemoryStats(HookBase):
    """Logs the GPU memory of this process every `period` iterations, `max_runs` times."""

    def __init__(self, period: int = 20, max_runs: int = 10) -> None:
        self._period = period
        self._runs_left = max_runs

    def after_step(self) -> None:
        due = (self.trainer.iter + 1) % self._period == 0
        if not due or self._runs_left <= 0 or not torch.cuda.is_available():
            return
        self._runs_left -= 1
        mib = 2**20
        logger.info(
            "Iteration %d, GPU memory in MiB: %.0f reserved (at most %.0f), %.0f allocated (at most %.0f)",
            self.trainer.iter,
            torch.cuda.memory_reserved() / mib,
            torch.cuda.max_memory_reserved() / mib,
            torch.cuda.memory_allocated() / mib,
            torch.cuda.max_memory_allocated() / mib,
        )
        torch.cuda.reset_peak_memory_stats()
