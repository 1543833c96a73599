"""Two global registries: how to load a data set, and what is known about it."""

from __future__ import annotations

import logging
import reprlib
from collections import UserDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from detectron2.utils.logger import log_first_n


class _Catalog(UserDict):
    """A mapping from data set names that prints as the list of them."""

    def list(self) -> list[str]:
        """Names, in the order of registration."""
        return [*self.data]

    def remove(self, name: str) -> None:
        """Forget one entry; unlike ``pop`` it returns nothing."""
        del self.data[name]

    def __repr__(self) -> str:
        return f"{type(self).__name__.lstrip('_')}({', '.join(self.data)})"

    __str__ = __repr__


class _DatasetCatalog(_Catalog):
    """Maps a name to a function that returns the data set as a list of dicts."""

    def register(self, name: str, func: Callable[[], list[dict]]) -> None:
        """Register ``func`` under ``name``. It takes no arguments and must return the same data on each call."""
        if not callable(func):
            raise AssertionError(f"Data set '{name}': expected a function that loads it, got {func!r}.")
        if name in self.data:
            raise AssertionError(f"A data set named '{name}' has been registered before.")
        self.data[name] = func

    def get(self, name: str) -> list[dict]:
        """Load the data set ``name``; KeyError when nobody registered it."""
        if name not in self.data:
            raise KeyError(f"No data set named '{name}'. Registered: {', '.join(self.data) or 'none'}.")
        return self.data[name]()


_RENAMED = {"class_names": "thing_classes"}


def _today(key: str) -> str:
    """The name that an attribute has today; a warning if ``key`` is an older one."""
    if key in _RENAMED:
        log_first_n(logging.WARNING, f"Metadata '{key}' is called '{_RENAMED[key]}' today.", n=10)
    return _RENAMED.get(key, key)


class Metadata(SimpleNamespace):
    """Facts about a data set that are not in its samples, such as ``thing_classes``.

    An attribute can be set once; setting it again is an error unless the value is equal. This keeps two parts
    of a program from silently disagreeing, e.g. about the order of the classes.
    """

    name: str = "N/A"

    def __getattr__(self, key: str) -> Any:
        # Only reached when the attribute does not exist.
        if key in _RENAMED:
            return getattr(self, _today(key))
        known = ", ".join(self.__dict__) or "nothing"
        raise AttributeError(f"Metadata of data set '{self.name}' has no '{key}'; it has: {known}.")

    def __setattr__(self, key: str, val: Any) -> None:
        key = _today(key)
        present = self.__dict__.get(key, val)
        if present != val:
            raise AssertionError(
                f"Metadata '{key}' of data set '{self.name}' is {present!r} and cannot become {val!r}."
            )
        super().__setattr__(key, val)

    def as_dict(self) -> dict[str, Any]:
        """A copy of all attributes, ``name`` included."""
        return dict(self.__dict__)

    def set(self, **kwargs: Any) -> Metadata:
        """Set several attributes; returns self."""
        for key, value in kwargs.items():
            setattr(self, key, value)
        return self

    def get(self, key: str, default: Any = None) -> Any:
        """The attribute, or ``default`` when there is none."""
        return self.__dict__.get(_today(key), default)


class _MetadataCatalog(_Catalog):
    """Maps a name to its one :class:`Metadata`."""

    def get(self, name: str) -> Metadata:
        """The metadata of ``name``, made empty on first use."""
        if not name:
            raise AssertionError("The name of a data set cannot be empty.")
        return self.data.setdefault(name, Metadata(name=name))


DatasetCatalog = _DatasetCatalog()
MetadataCatalog = _MetadataCatalog()


def check_metadata_consistency(key: str, dataset_names: list[str]) -> None:
    """Make sure that data sets which are used together agree on a metadata attribute.

    Raises:
        ValueError: they do not; the message names two that differ.
        AttributeError: one does not have it.
    """
    if not dataset_names:
        return
    first, *others = dataset_names
    expected = getattr(MetadataCatalog.get(first), key)
    for name in others:
        value = getattr(MetadataCatalog.get(name), key)
        if value != expected:
            raise ValueError(
                f"Data sets '{first}' and '{name}' disagree on '{key}': {reprlib.repr(expected)} and "
                f"{reprlib.repr(value)}."
            )


def create_keypoint_hflip_indices(dataset_names: str | list[str]) -> list[int]:
    """For each keypoint of the data sets, the index of the one that it becomes in a mirrored image."""
    dataset_names = [dataset_names] if isinstance(dataset_names, str) else list(dataset_names)
    for key in ("keypoint_names", "keypoint_flip_map"):
        check_metadata_consistency(key, dataset_names)
    metadata = MetadataCatalog.get(dataset_names[0])
    names = list(metadata.keypoint_names)
    partner = {a: b for left, right in metadata.keypoint_flip_map for a, b in ((left, right), (right, left))}
    unknown = partner.keys() - set(names)
    if unknown:
        raise ValueError(
            f"keypoint_flip_map of data set '{dataset_names[0]}' names {sorted(unknown)}, which are not among "
            f"its keypoint_names."
        )
    return [names.index(partner.get(name, name)) for name in names]
