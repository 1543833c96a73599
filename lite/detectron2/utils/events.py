"""Where a training run reports what it measures, and the writers that print or store that."""

import contextlib
import datetime
import json
import logging
import os
import time
from collections import defaultdict

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
        raise NotImplementedError

    def close(self) -> None:
        """Flush and close files."""


class _News:
    """Tells a writer which scalars were put since it last asked."""

    def __init__(self, window_size: int):
        self._window = window_size
        self._known_up_to = -1

    def take(self, storage: EventStorage) -> list[tuple[str, float, int]]:
        """(name, smoothed value, iteration) of each scalar of a later iteration than any taken before."""
        scalars = storage.latest_with_smoothing_hint(self._window).items()
        news = [(name, value, iteration) for name, (value, iteration) in scalars if iteration > self._known_up_to]
        self._known_up_to = max((iteration for _, _, iteration in news), default=self._known_up_to)
        return news


class JSONWriter(EventWriter):
    """Appends one JSON object per iteration to a file, keys sorted, ``iteration`` among them.

    Args:
        json_file: where to append.
        window_size: over how many iterations noisy scalars are smoothed.
    """

    def __init__(self, json_file: str, window_size: int = 20):
        self._file = PathManager.open(json_file, "a")
        self._news = _News(window_size)

    def write(self) -> None:
        storage = get_event_storage()
        rows: dict[int, dict[str, float]] = defaultdict(dict)
        for name, value, iteration in self._news.take(storage):
            rows[iteration][name] = float(value)
        if not rows:
            return
        for iteration, row in rows.items():
            self._file.write(json.dumps({**row, "iteration": iteration}, sort_keys=True) + "\n")
        self._file.flush()
        with contextlib.suppress(AttributeError, OSError):  # not a file of the operating system
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class TensorboardXWriter(EventWriter):
    """Writes scalars, images and histograms for TensorBoard.

    Args:
        log_dir: folder of the event files.
        window_size: over how many iterations noisy scalars are smoothed.
        kwargs: passed on to ``torch.utils.tensorboard.SummaryWriter``.
    """

    def __init__(self, log_dir: str, window_size: int = 20, **kwargs):
        self._news = _News(window_size)
        self._arguments = {"log_dir": log_dir, **kwargs}
        self._summary = None

    @property
    def _writer(self):
        if self._summary is None:  # a run that never logs leaves no file and needs no tensorboard
            from torch.utils.tensorboard import SummaryWriter

            self._summary = SummaryWriter(**self._arguments)
        return self._summary

    def write(self) -> None:
        storage = get_event_storage()
        for name, value, iteration in self._news.take(storage):
            self._writer.add_scalar(name, value, iteration)
        for image in storage._vis_data:
            self._writer.add_image(*image)
        storage.clear_images()
        for histogram in storage._histograms:
            self._writer.add_histogram_raw(**histogram)
        storage.clear_histograms()

    def close(self) -> None:
        if self._summary is not None:
            self._summary.close()


def _mean_of_all(storage: EventStorage, name: str) -> float:
    return storage.history(name).global_avg()


class CommonMetricPrinter(EventWriter):
    """Logs one line with the time left, iteration, losses, times, learning rate and GPU memory.

    Args:
        max_iter: iterations of the run, for the estimate of the time left; None leaves that out.
        window_size: over how many iterations losses and times are smoothed.
    """

    def __init__(self, max_iter: int | None = None, window_size: int = 20):
        self._logger = logging.getLogger(__name__)
        self._max_iter = max_iter
        self._window = window_size
        self._previous: tuple[int, float] | None = None  # iteration and clock at the last write

    def _get_eta(self, storage: EventStorage) -> str | None:
        if self._max_iter is None:
            return None
        left = self._max_iter - storage.iter - 1
        if "time" in storage.histories():
            seconds = storage.history("time").median(1000) * left
            storage.put_scalar("eta_seconds", seconds, smoothing_hint=False)
            return str(datetime.timedelta(seconds=int(seconds)))
        eta = None
        now = time.perf_counter()
        if self._previous is not None:
            iteration, clock = self._previous
            per_iteration = (now - clock) / max(storage.iter - iteration, 1)
            eta = str(datetime.timedelta(seconds=int(per_iteration * left)))
        self._previous = (storage.iter, now)
        return eta

    def write(self) -> None:
        storage = get_event_storage()
        if storage.iter == self._max_iter:
            # hooks may write once more after the last iteration, when there is nothing to estimate
            return
        self._logger.info(" " + "  ".join(self._fields(storage)))

    def _mean_of_window(self, storage: EventStorage, name: str) -> float:
        return storage.history(name).avg(storage.count_samples(name, self._window))

    def _fields(self, storage: EventStorage) -> list[str]:
        fields = []
        eta = self._get_eta(storage)
        if eta is not None:
            fields.append(f"eta: {eta}")
        fields.append(f"iter: {storage.iter}")
        for name, history in storage.histories().items():
            if "loss" in name:
                fields.append(f"{name}: {history.median(storage.count_samples(name, self._window)):.4g}")
        for name, mean in (("time", _mean_of_all), ("data_time", self._mean_of_window)):
            if name in storage.histories():
                latest = storage.history(name).latest()
                fields.append(f"{name}: {mean(storage, name):.4f}  last_{name}: {latest:.4f}")
        lr = f"{storage.history('lr').latest():.5g}" if "lr" in storage.histories() else "N/A"
        fields.append(f"lr: {lr}")
        if torch.cuda.is_available():
            fields.append(f"max_mem: {torch.cuda.max_memory_allocated() / 2**20:.0f}M")
        return fields
