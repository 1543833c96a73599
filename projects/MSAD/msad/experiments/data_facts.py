"""The data of a comparison: what it needs, and what its report says of them."""

from __future__ import annotations

from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..data.register import registered


def check_test_set(cfg: CfgNode, file: Path) -> None:
    """ValueError unless models are tested on one data set: of several, results have no place in the tables.

    Args:
        file: that ``cfg`` is of.
    """
    if len(cfg.DATASETS.TEST) != 1:
        raise ValueError(f"{file}: a comparison needs one data set in DATASETS.TEST, got {list(cfg.DATASETS.TEST)}")


def describe_data(cfg: CfgNode) -> dict:
    """Name and counts of the data sets of a config."""
    with registered(cfg):
        train, val = (DatasetCatalog.get(names[0]) for names in (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST))
        classes = list(MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).thing_classes)
    return {
        "name": cfg.DATASETS.TRAIN[0].removeprefix("data_").removesuffix("_train"),
        "images_train": len(train),
        "images_val": len(val),
        "instances_train": sum(not a.get("iscrowd") for d in train for a in d["annotations"]),
        "classes": classes,
    }
