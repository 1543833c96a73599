"""A part of something long that stands for all of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def at_equal_distances(items: Sequence[T], count: int) -> list[T]:
    """``count`` of ``items``, from the first to near the last, in their order; all where there are no more.

    Files keep classes and scenes together: what stands first is not like the rest.
    """
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
