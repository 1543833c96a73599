"""Scalars, images and histograms of a training run."""

import contextlib
from collections import defaultdict
from typing import Any

import torch
from fvcore.common.history_buffer import HistoryBuffer

_active: list["EventStorage"] = []


def has_event_storage() -> bool:
    """Whether the caller runs inside ``with EventStorage(...)``."""
    return bool(_active)


def get_event_storage() -> "EventStorage":
    """The innermost active storage.

    Raises:
        AssertionError: there is none.
    """
    assert _active, "there is no event storage here: run this inside `with EventStorage(...)`"
    return _active[-1]


class EventStorage:
    """Collects what a run reports, each value with its iteration.

    Args:
        start_iter: the iteration to begin with.
    """

    def __init__(self, start_iter: int = 0):
        self._iter = int(start_iter)
        self._prefix = ""
        self._history: dict[str, HistoryBuffer] = defaultdict(HistoryBuffer)
        self._latest: dict[str, tuple[float, int]] = {}
        self._smooth: dict[str, bool] = {}
        # read by writers, emptied by clear_images and clear_histograms
        self._vis_data: list[tuple[str, Any, int]] = []
        self._histograms: list[dict[str, Any]] = []

    def __enter__(self) -> "EventStorage":
        _active.append(self)
        return self

    def __exit__(self, exc_type, exc_value, traceback) -> None:
        assert _active[-1] is self, "event storages were left in another order than entered"
        _active.pop()

    @property
    def iter(self) -> int:
        """The current iteration; inside the training loop it is the one in progress."""
        return self._iter

    @iter.setter
    def iter(self, value) -> None:
        self._iter = int(value)

    @property
    def iteration(self) -> int:
        """Same as :attr:`iter`."""
        return self._iter

    def step(self) -> None:
        """Go to the next iteration."""
        self._iter += 1

    @contextlib.contextmanager
    def name_scope(self, name: str):
        """Prefix the names of everything put inside by ``name/``; scopes do not nest."""
        outer, self._prefix = self._prefix, name.rstrip("/") + "/"
        try:
            yield
        finally:
            self._prefix = outer

    def put_scalar(self, name: str, value, smoothing_hint: bool = True, cur_iter: int | None = None) -> None:
        """Add a number.

        Args:
            name: its name, to which :meth:`name_scope` adds a prefix.
            value: a number, or a tensor with one element.
            smoothing_hint: whether the value is noisy, so that writers show a median. One answer per name.
            cur_iter: iteration of the value, default: the current one.
        """
        name = self._prefix + name
        value = float(value)
        iteration = self._iter if cur_iter is None else cur_iter
        hint = self._smooth.setdefault(name, smoothing_hint)
        assert hint == smoothing_hint, f"scalar {name!r} came with smoothing_hint={hint} before"
        self._history[name].update(value, iteration)
        self._latest[name] = (value, iteration)

    def put_scalars(self, *, smoothing_hint: bool = True, cur_iter: int | None = None, **kwargs) -> None:
        """Add several numbers: ``put_scalars(loss=1.5, accuracy=0.3)``."""
        for name, value in kwargs.items():
            self.put_scalar(name, value, smoothing_hint=smoothing_hint, cur_iter=cur_iter)

    def put_image(self, img_name: str, img_tensor) -> None:
        """Add an image: (3, H, W) RGB, uint8 in 0..255 or float in 0..1."""
        self._vis_data.append((img_name, img_tensor, self._iter))

    def clear_images(self) -> None:
        """Forget the images; a writer calls it after it has stored them."""
        self._vis_data = []

    def put_histogram(self, hist_name: str, hist_tensor, bins: int = 1000) -> None:
        """Add the histogram of a tensor of any shape, in ``bins`` equal intervals from its minimum to its maximum."""
        values = torch.as_tensor(hist_tensor, dtype=torch.float32)
        low, high = values.min().item(), values.max().item()
        self._histograms.append(
            {
                "tag": hist_name,
                "global_step": self._iter,
                "min": low,
                "max": high,
                "num": values.numel(),
                "sum": float(values.sum()),
                "sum_squares": float(values.square().sum()),
                "bucket_limits": torch.linspace(low, high, bins + 1)[1:].tolist(),
                "bucket_counts": torch.histc(values, bins=bins).tolist(),
            }
        )

    def clear_histograms(self) -> None:
        """Forget the histograms."""
        self._histograms = []

    def history(self, name: str) -> HistoryBuffer:
        """All values of a scalar.

        Raises:
            KeyError: nothing has that name.
        """
        if name not in self._history:
            raise KeyError(f"no scalar named {name!r} has been put")
        return self._history[name]

    def histories(self) -> dict[str, HistoryBuffer]:
        """All scalars by name."""
        return self._history

    def smoothing_hints(self) -> dict[str, bool]:
        """For each scalar whether it was put with ``smoothing_hint``."""
        return self._smooth

    def latest(self) -> dict[str, tuple[float, int]]:
        """For each scalar its last value and the iteration of that."""
        return self._latest

    def latest_with_smoothing_hint(self, window_size: int = 20) -> dict[str, tuple[float, int]]:
        """As :meth:`latest`, with the median over the last ``window_size`` iterations for noisy scalars."""
        result = {}
        for name, (value, iteration) in self._latest.items():
            if self._smooth[name]:
                value = self._history[name].median(self.count_samples(name, window_size))
            result[name] = (value, iteration)
        return result

    def count_samples(self, name: str, window_size: int = 20) -> int:
        """How many values of a scalar fall into its last ``window_size`` iterations."""
        points = self._history[name].values()
        newest = points[-1][1]
        return sum(1 for _, iteration in points if iteration > newest - window_size)
