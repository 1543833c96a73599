"""Scalars, images and histograms of a training run."""

import contextlib
from itertools import takewhile
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
    if not _active:
        raise AssertionError("nothing collects events here: run this inside `with EventStorage(...):`")
    return _active[-1]


class EventStorage:
    """Collects what a run reports, each value with its iteration.

    Args:
        start_iter: the iteration to begin with.
    """

    def __init__(self, start_iter: int = 0):
        self.iter = start_iter
        self._prefix = ""
        self._scalars: dict[str, HistoryBuffer] = {}
        self._noisy: dict[str, bool] = {}
        self._vis_data: list[tuple[str, Any, int]] = []
        self._histograms: list[dict[str, Any]] = []

    def __enter__(self) -> "EventStorage":
        _active.append(self)
        return self

    def __exit__(self, exc_type, exc_value, traceback) -> None:
        ended = _active.pop()
        assert ended is self, "event storages have to be left in the reverse order of entering"

    @property
    def iter(self) -> int:
        """The current iteration; inside the training loop it is the one in progress."""
        return self._now

    @iter.setter
    def iter(self, value) -> None:
        self._now = int(value)

    @property
    def iteration(self) -> int:
        """Same as :attr:`iter`."""
        return self._now

    def step(self) -> None:
        """Go to the next iteration."""
        self._now += 1

    @contextlib.contextmanager
    def name_scope(self, name: str):
        """Prefix the names of the scalars put inside by ``name/``; an inner scope replaces the outer one."""
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
        full = self._prefix + name
        if self._noisy.setdefault(full, smoothing_hint) != smoothing_hint:
            raise AssertionError(f"{full} was put with smoothing_hint={not smoothing_hint} before")
        buffer = self._scalars.setdefault(full, HistoryBuffer())
        buffer.update(float(value), self._now if cur_iter is None else cur_iter)

    def put_scalars(self, *, smoothing_hint: bool = True, cur_iter: int | None = None, **kwargs) -> None:
        """Add several numbers: ``put_scalars(loss=1.5, accuracy=0.3)``."""
        for name in kwargs:
            self.put_scalar(name, kwargs[name], smoothing_hint, cur_iter)

    def put_image(self, img_name: str, img_tensor) -> None:
        """Add an image: (3, H, W) RGB, uint8 in 0..255 or float in 0..1."""
        self._vis_data.append((img_name, img_tensor, self._now))

    def clear_images(self) -> None:
        """Forget the images; a writer calls it after it has stored them."""
        self._vis_data.clear()

    def put_histogram(self, hist_name: str, hist_tensor, bins: int = 1000) -> None:
        """Add the histogram of a tensor of any shape, in ``bins`` equal intervals from its minimum to its maximum."""
        values = torch.as_tensor(hist_tensor).detach().float().flatten()
        low, high = (bound.item() for bound in values.aminmax())
        self._histograms.append(
            {
                "tag": hist_name,
                "global_step": self._now,
                "num": values.numel(),
                "min": low,
                "max": high,
                "sum": values.sum().item(),
                "sum_squares": values.square().sum().item(),
                "bucket_counts": values.histc(bins).tolist(),
                "bucket_limits": torch.linspace(low, high, bins + 1)[1:].tolist(),
            }
        )

    def clear_histograms(self) -> None:
        """Forget the histograms."""
        self._histograms.clear()

    def history(self, name: str) -> HistoryBuffer:
        """All values of a scalar.

        Raises:
            KeyError: nothing has that name.
        """
        if name not in self._scalars:
            raise KeyError(f"no scalar {name!r} was put; there are {', '.join(self._scalars) or 'none'}")
        return self._scalars[name]

    def histories(self) -> dict[str, HistoryBuffer]:
        """All scalars by name."""
        return self._scalars

    def smoothing_hints(self) -> dict[str, bool]:
        """For each scalar whether it was put with ``smoothing_hint``."""
        return self._noisy

    def latest(self) -> dict[str, tuple[float, int]]:
        """For each scalar its last value and the iteration of that."""
        return {name: buffer.values()[-1] for name, buffer in self._scalars.items()}

    def latest_with_smoothing_hint(self, window_size: int = 20) -> dict[str, tuple[float, int]]:
        """As :meth:`latest`, with the median over the last ``window_size`` iterations for noisy scalars."""
        found = self.latest()
        for name in filter(self._noisy.get, self._scalars):
            samples = self.count_samples(name, window_size)
            found[name] = (self._scalars[name].median(samples), found[name][1])
        return found

    def count_samples(self, name: str, window_size: int = 20) -> int:
        """How many of the latest values of a scalar are of its last ``window_size`` iterations."""
        values = self.history(name).values()
        oldest = values[-1][1] - window_size
        return sum(1 for _ in takewhile(lambda put: put[1] > oldest, reversed(values)))
