"""Where a training run reports what it measures, and the writers that print or store that."""

import datetime
import json
import logging
import time

import torch

from .event_storage import EventStorage, get_event_storage, has_event_storage
from .file_io import PathManager

__all__ = [
    "CommonMetricPrinter",
    "EventStorage",
    "EventWriter",
    "JSONWriter",
    "TensorboardXWriter",
    "get_event_storage",
    "has_event_storage",
]


class EventWriter:
    """Takes values out of the active storage; :meth:`write` is called every few iterations."""

    def write(self) -> None:
        """Write what is new."""
        raise NotImplementedError(f"{type(self).__name__} has no write()")

    def close(self) -> None:
        """Flush and close files."""


class _Unwritten:
    """Hands out each scalar once: those of later iterations than any it handed out before."""

    def __init__(self, window_size: int):
        self._window_size = window_size
        self._newest = -1

    def by_iteration(self, storage: EventStorage) -> dict[int, dict[str, float]]:
        """{iteration: {name: smoothed value}}."""
        table: dict[int, dict[str, float]] = {}
        for name, (value, iteration) in storage.latest_with_smoothing_hint(self._window_size).items():
            if iteration > self._newest:
                table.setdefault(iteration, {})[name] = float(value)
        self._newest = max(table, default=self._newest)
        return table


class JSONWriter(EventWriter):
    """Appends one JSON object per iteration to a file, keys sorted, ``iteration`` among them.

    Args:
        json_file: where to append.
        window_size: over how many iterations noisy scalars are smoothed.
    """

    def __init__(self, json_file: str, window_size: int = 20):
        # Line by line, so that a run which is killed leaves whole lines.
        self._lines = PathManager.open(json_file, "a", buffering=1)
        self._unwritten = _Unwritten(window_size)

    def write(self) -> None:
        for iteration, values in self._unwritten.by_iteration(get_event_storage()).items():
            print(json.dumps({**values, "iteration": iteration}, sort_keys=True), file=self._lines)

    def close(self) -> None:
        self._lines.close()


class TensorboardXWriter(EventWriter):
    """Writes scalars, images and histograms for TensorBoard.

    Args:
        log_dir: folder of the event files.
        window_size: over how many iterations noisy scalars are smoothed.
        kwargs: passed on to ``torch.utils.tensorboard.SummaryWriter``.
    """

    def __init__(self, log_dir: str, window_size: int = 20, **kwargs):
        self._unwritten = _Unwritten(window_size)
        self._options = {"log_dir": log_dir, **kwargs}
        self._board = None

    def write(self) -> None:
        if self._board is None:  # a run that writes nothing needs neither tensorboard nor a file
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(**self._options)
        storage = get_event_storage()
        for iteration, values in self._unwritten.by_iteration(storage).items():
            for name, value in values.items():
                self._board.add_scalar(name, value, iteration)
        for name, image, iteration in storage._vis_data:
            self._board.add_image(name, image, iteration)
        storage.clear_images()
        for histogram in storage._histograms:
            self._board.add_histogram_raw(**histogram)
        storage.clear_histograms()

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


class CommonMetricPrinter(EventWriter):
    """Logs one line with the time left, iteration, losses, times, learning rate and GPU memory.

    Args:
        max_iter: iterations of the run, for the estimate of the time left; None leaves that out.
        window_size: over how many iterations losses and times are smoothed.
    """

    def __init__(self, max_iter: int | None = None, window_size: int = 20):
        self.logger = logging.getLogger(__name__)
        self._max_iter = max_iter
        self._window_size = window_size
        self._last_call: tuple[int, float] | None = None  # iteration, clock in seconds

    def write(self) -> None:
        storage = get_event_storage()
        if storage.iter == self._max_iter:
            return  # called once more after the training, when nothing is new
        fields = {"iter": storage.iter, **self._losses(storage), **self._times(storage)}
        seconds = self._seconds_left(storage)
        if seconds is not None:
            fields = {"eta": datetime.timedelta(seconds=int(seconds)), **fields}
        rate = storage.latest().get("lr")
        fields["lr"] = "N/A" if rate is None else f"{rate[0]:.5g}"
        if torch.cuda.is_available():
            fields["max_mem"] = f"{torch.cuda.max_memory_allocated() / 2**20:.0f}M"
        self.logger.info("  ".join(f"{name}: {value}" for name, value in fields.items()))

    def _losses(self, storage: EventStorage) -> dict[str, str]:
        return {
            name: f"{history.median(storage.count_samples(name, self._window_size)):.4g}"
            for name, history in storage.histories().items()
            if "loss" in name
        }

    def _times(self, storage: EventStorage) -> dict[str, str]:
        """Seconds an iteration takes: the mean of the whole run; for the data, which come in bursts, the window's."""
        found = {}
        for name in ("time", "data_time"):
            history = storage.histories().get(name)
            if history is not None:
                samples = storage.count_samples(name, self._window_size)
                mean = history.global_avg() if name == "time" else history.avg(samples)
                found.update({name: f"{mean:.4f}", f"last_{name}": f"{history.latest():.4f}"})
        return found

    def _seconds_left(self, storage: EventStorage) -> float | None:
        """From the time that iterations take, or, where nobody measures that, that passed since the last call."""
        if self._max_iter is None:
            return None
        to_do = self._max_iter - 1 - storage.iter
        before, self._last_call = self._last_call, (storage.iter, time.perf_counter())
        if "time" in storage.histories():
            seconds = to_do * storage.history("time").median(1000)
            storage.put_scalar("eta_seconds", seconds, smoothing_hint=False)
            return seconds
        if before is None or before[0] >= storage.iter:
            return None
        iterations, passed = (now - then for now, then in zip(self._last_call, before))
        return to_do * passed / iterations
