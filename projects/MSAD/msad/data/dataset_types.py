"""Registry of the kinds of data sets that ``DATASETS.REGISTER`` can declare, and what they share.

A TYPE is a function of a name and a yaml entry that makes the data set known to detectron2's catalogs:

.. code-block:: python

    @DATASET_TYPE_REGISTRY.register()
    def my_type(name: str, entry: dict) -> None:
        entry = check_entry(entry, {"JSON": PATH, "IMAGES": PATH, "CLASSES": NAMES.optional()})
        add_dataset(name, entry, functools.partial(load, name, entry), evaluator_type="coco")

Its name is the value of TYPE. The module is imported by ``register.py``.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from fvcore.common.registry import Registry

from .tally import Tally

DATASET_TYPE_REGISTRY = Registry("DATASET_TYPE")
DATASET_TYPE_REGISTRY.__doc__ = "Functions ``(name, entry) -> None`` by the value of ``DATASETS.REGISTER[].TYPE``."


class Key(NamedTuple):
    """What a key of an entry may hold.

    Attributes:
        test: whether a value is right.
        wanted: what is right, for the message.
        required: an entry without the key is an error.
        path: relative paths are looked up below the folder of data sets.
    """

    test: Callable[[Any], bool]
    wanted: str
    required: bool = True
    path: bool = False

    def optional(self) -> Key:
        """The same for a key that may be left out."""
        return self._replace(required=False)


def is_text(value: Any) -> bool:
    """Whether ``value`` is a string that is not empty."""
    return isinstance(value, str) and value != ""


def is_names(value: Any) -> bool:
    """Whether ``value`` is a list of strings, none of them empty."""
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(is_text, value))


TEXT = Key(is_text, "a non-empty string")
PATH = Key(is_text, "a non-empty string", path=True)
NAMES = Key(is_names, "a list of category names")
# Every entry has these; TYPE is "coco" if it is left out.
COMMON = {"NAME": TEXT, "TYPE": TEXT.optional()}


def check_entry(entry: Mapping[str, Any], keys: Mapping[str, Key]) -> dict[str, Any]:
    """The entry with resolved paths.

    Args:
        entry: of ``DATASETS.REGISTER``.
        keys: what the TYPE knows beside NAME and TYPE.

    Raises:
        ValueError: an unknown (with the nearest known one), missing or ill-typed key.
    """
    known = {**COMMON, **keys}
    missing = [key for key, rule in known.items() if rule.required and key not in entry]
    for key in entry:
        if key not in known:
            spellings = {k: k for k in known} | {k.removeprefix("KEYPOINT_"): k for k in known}
            # Nearest in any case: a key that resembles nothing likely stands for one that is still missing.
            near = difflib.get_close_matches(str(key).upper(), spellings, n=1, cutoff=0.3) or [*missing, *known]
            hint = f"did you mean {spellings[near[0]]!r}? Valid keys: {', '.join(known)}"
            raise ValueError(f"unknown key {key!r}; {hint}")
    if missing:
        required = ", ".join(key for key, rule in known.items() if rule.required)
        raise ValueError(f"missing key {missing[0]!r}; required are {required}")
    for key, value in entry.items():
        if not known[key].test(value):
            raise ValueError(f"{key} must be {known[key].wanted}, got {value!r}")
    return {key: resolve(value) if known[key].path else value for key, value in entry.items()}


def resolve(path: str) -> str:
    """A path of an entry: absolute, a URL, or relative to $DETECTRON2_DATASETS (default: ``datasets``)."""
    if "://" in path:
        return path
    # expanduser first: "~" would not count as absolute
    return os.path.join(os.getenv("DETECTRON2_DATASETS", "datasets"), os.path.expanduser(path))


def add_dataset(name: str, entry: Mapping[str, Any], load: Callable[[], list[dict]], **metadata: Any) -> None:
    """Register a data set with detectron2's catalogs; nothing is read before it is used.

    Args:
        entry: as :func:`check_entry` returns it; kept in the metadata as ``definition``.
        load: returns detectron2's dataset dicts.
        metadata: further metadata: ``evaluator_type``, which says what metrics are computed, paths, classes.

    Raises:
        ValueError: the name belongs to another definition. The same definition again is fine.
    """
    if name in DatasetCatalog.list():
        present = MetadataCatalog.get(name).get("definition")
        if present == entry:
            return
        if present is None:
            raise ValueError(f"the name {name!r} is already taken by a data set defined elsewhere")
        key = next(k for k in [*present, *entry] if present.get(k) != entry.get(k))
        raise ValueError(
            f"{name!r} is already registered with another {key}: {present.get(key)!r}, now {entry.get(key)!r}"
        )
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(definition=dict(entry), **metadata)


def set_metadata(name: str, **values: Any) -> None:
    """Set metadata of a data set, also where it has another value already, which detectron2 refuses."""
    metadata = MetadataCatalog.get(name)
    for key, value in values.items():
        if metadata.get(key) != value:
            metadata.__dict__.pop(key, None)
            setattr(metadata, key, value)


def keep_findings(name: str, tally: Tally) -> None:
    """Keep what is found while a data set is loaded in its metadata, where the checks before training look for it."""
    set_metadata(name, findings=[finding._replace(check=f"data set {name!r}") for finding in tally.findings()])
