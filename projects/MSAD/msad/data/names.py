"""Names of classes and keypoints: of a config's data sets, and in a file beside an exported model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata

from .register import register_datasets

FILE = "metadata.json"
KEYS = ("thing_classes", "stuff_classes", "keypoint_names", "keypoint_flip_map", "keypoint_connection_rules")


def class_names(metadata: Metadata | Mapping[str, list]) -> list[str]:
    """Names of a detector's or a segmentor's classes in detectron2's metadata; none where they are not known."""
    return list(metadata.get("thing_classes") or metadata.get("stuff_classes") or ())


def skeleton(metadata: Metadata | Mapping[str, list]) -> list[list[int]]:
    """Pairs of the numbers of connected keypoints."""
    names = list(metadata.get("keypoint_names") or ())
    return [[names.index(a), names.index(b)] for a, b, _ in metadata.get("keypoint_connection_rules") or ()]


def dataset_names(cfg: CfgNode) -> dict[str, list]:
    """detectron2's metadata under ``KEYS``, of the first data set of DATASETS.TEST or TRAIN that can be read; or {}."""
    register_datasets(cfg)
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        if name not in DatasetCatalog.list():
            continue
        metadata = MetadataCatalog.get(name)
        if not class_names(metadata) or cfg.MODEL.KEYPOINT_ON:
            try:
                DatasetCatalog.get(name)  # the file knows its names
            except (OSError, ValueError):
                continue
        found = {key: metadata.get(key) for key in KEYS if metadata.get(key)}
        if found:
            return found
    return {}


def write_names(folder: Path, names: dict[str, list]) -> None:
    """Write ``names`` into ``folder``; without any, a file of an earlier export is removed."""
    if names:
        (folder / FILE).write_text(json.dumps(names, indent=1) + "\n")
    else:
        (folder / FILE).unlink(missing_ok=True)


def read_names(config_file: str) -> dict[str, list]:
    """What :func:`write_names` left beside a config file, or {}.

    Raises:
        ValueError: the file is damaged; names it.
    """
    file = Path(config_file).parent / FILE
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text())
        # json has no tuples, by which detectron2 tells pairs from lists
        return {key: [tuple(x) if isinstance(x, list) else x for x in found[key]] for key in KEYS if key in found}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None
