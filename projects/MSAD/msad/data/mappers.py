"""From dataset dicts to what a model sees in tests."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import build_augmentation


def inference_mapper(cfg: CfgNode) -> DatasetMapper:
    """The mapper of tests: resized images in the config's format, no annotations.

    ``DatasetMapper(cfg, False)`` gives the same, and asks the training sets how keypoints are mirrored, which nobody
    knows before these sets have been read.
    """
    return DatasetMapper(False, augmentations=build_augmentation(cfg, False), image_format=cfg.INPUT.FORMAT)
