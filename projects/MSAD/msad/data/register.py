"""Data sets declared in yaml: ``DATASETS.REGISTER``, a list of data sets beside detectron2's own names.

.. code-block:: yaml

    DATASETS:
      REGISTER:
        - {NAME: drones_train, JSON: drones/train.json, IMAGES: drones/images}
        - {NAME: drones_val, JSON: drones/val.json, IMAGES: drones/images, CLASSES: [car, bus]}
      TRAIN: ("drones_train",)

An entry's TYPE (default: coco) says in which format the data set is. Paths are absolute, URLs, or relative to the
environment variable DETECTRON2_DATASETS (default: ``datasets``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..config import nearest
from . import argoverse_hd, coco, coco_sem_seg, sem_seg, visdrone  # noqa: F401  (modules of types register themselves)
from .dataset_types import DATASET_TYPE_REGISTRY, is_text


def register_datasets(cfg: CfgNode) -> list[str]:
    """Register every entry of ``cfg.DATASETS.REGISTER``, all or none, and return the names.

    Nothing is read from disk before a data set is used.

    Raises:
        ValueError: an entry has an unknown, missing or ill-typed key, an unknown TYPE, or its name is taken by another
            definition. Registering the same definition again is fine.
    """
    entries = cfg.DATASETS.get("REGISTER", ())
    if not isinstance(entries, (list, tuple)):
        raise ValueError(f"DATASETS.REGISTER must be a list of entries, got {type(entries).__name__}: {entries!r}")
    before = set(DatasetCatalog.list())
    try:
        names = [_register(entry, position) for position, entry in enumerate(entries)]
        _follow_training_set(cfg, names)
        return names
    except ValueError:
        for name in set(DatasetCatalog.list()) - before:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        raise


def _follow_training_set(cfg: CfgNode, names: list[str]) -> None:
    """Let all sets of a config number their classes as its first training set does.

    A set that follows another one already, for another config, stays with it.
    """
    first = next(iter(cfg.DATASETS.get("TRAIN", ())), None)
    for name in (*cfg.DATASETS.get("TRAIN", ()), *cfg.DATASETS.get("TEST", ())):
        if first in DatasetCatalog.list() and name in names and name != first:
            metadata = MetadataCatalog.get(name)
            if metadata.get("classes_like") is None and MetadataCatalog.get(first).get("classes_like") != name:
                metadata.classes_like = first


@contextlib.contextmanager
def registered(cfg: CfgNode) -> Iterator[None]:
    """The data sets of ``cfg`` are known inside; configs of one process may mean other data by the same name."""
    before = set(DatasetCatalog.list())
    try:
        register_datasets(cfg)
        yield
    finally:
        for name in set(DatasetCatalog.list()) - before:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def _register(entry: Any, position: int) -> str:
    where = f"DATASETS.REGISTER[{position}]"
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} must be a mapping with the key NAME and those of its TYPE, got {entry!r}")
    name, kind = entry.get("NAME"), entry.get("TYPE", "coco")
    if is_text(name):
        where += f" ({name!r})"
    if kind not in DATASET_TYPE_REGISTRY:
        types = sorted(key for key, _ in DATASET_TYPE_REGISTRY)
        hint = nearest(str(kind), types) or "."
        raise ValueError(f"{where}: unknown TYPE {kind!r}{hint} Known are {', '.join(types)}")
    try:
        DATASET_TYPE_REGISTRY.get(kind)(name, dict(entry))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return name
