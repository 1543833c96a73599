"""Scalars that heads report while they run more than once in a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.utils.events import EventStorage, get_event_storage


@contextmanager
def scalars_under(name: str) -> Iterator[None]:
    """Inside, the names of all reported scalars get the prefix ``name/``, so that two runs of a head stay apart.

    ``name_scope`` would not do: the heads of a cascade set scopes of their own, which replace it.
    """
    outer = get_event_storage()
    with EventStorage(outer.iter) as own:
        yield
    for key, (value, _) in own.latest().items():
        outer.put_scalar(f"{name}/{key}", value, smoothing_hint=own.smoothing_hints()[key])
