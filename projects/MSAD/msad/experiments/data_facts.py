"""What a report says of the data of a comparison."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..data.register import registered


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
