"""Names of classes and keypoints: of a config's data sets, and in a file beside an exported model."""

from __future__ import annotations

import json
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from .register import register_datasets

FILE = "metadata.json"
KEYS = ("thing_classes", "stuff_classes", "keypoint_names", "keypoint_flip_map", "keypoint_connection_rules")


def dataset_names(cfg: CfgNode) -> dict[str, list]:
    """detectron2's metadata under ``KEYS``, of the first data set of DATASETS.TEST or TRAIN that can be read; or {}."""
    register_datasets(cfg)
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        if name not in DatasetCatalog.list():
            continue
        metadata = MetadataCatalog.get(name)
        if not (metadata.get("thing_classes") or metadata.get("stuff_classes")) or cfg.MODEL.KEYPOINT_ON:
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
