"""What the model of a config needs of its data."""

from __future__ import annotations

from typing import NamedTuple

from detectron2.config import CfgNode

from ..config_values import value_at
from ..modeling.adapters import num_classes_key


class Needs(NamedTuple):
    """What a model needs of its data.

    Attributes:
        classes, config_key: number of classes of the model, None if it does not say; where that comes from.
        keypoints: number of keypoints, None for a model without.
        masks, mask_format: whether it learns masks; INPUT.MASK_FORMAT.
        flips: images are mirrored in training.
        sigmas: OKS sigmas of the config.
        training, testing: the data are trained on, evaluated on; they may be both.
        losses: TEST.LOSS_IMAGES: detection losses are computed on the data, which are tested on.
        ignored: label of the pixels that a segmentor's losses leave out.
    """

    classes: int | None = None
    config_key: str = "MODEL.ROI_HEADS.NUM_CLASSES"
    keypoints: int | None = None
    masks: bool = False
    mask_format: str = "polygon"
    flips: bool = False
    sigmas: tuple[float, ...] = ()
    training: bool = True
    testing: bool = False
    losses: bool = False
    ignored: int = 255


def needs_of(cfg: CfgNode, name: str) -> Needs:
    """What the model of a config needs of a data set of DATASETS.TRAIN, DATASETS.TEST or both."""
    testing = name in cfg.DATASETS.TEST
    try:
        key = num_classes_key(cfg)
        classes = value_at(cfg, key)
    except KeyError:
        key, classes = "", None
    return Needs(
        classes=classes,
        config_key=key,
        keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if cfg.MODEL.KEYPOINT_ON else None,
        masks=cfg.MODEL.MASK_ON,
        mask_format=cfg.INPUT.MASK_FORMAT,
        flips=cfg.INPUT.RANDOM_FLIP != "none",
        sigmas=tuple(cfg.TEST.KEYPOINT_OKS_SIGMAS),
        training=name in cfg.DATASETS.TRAIN,
        testing=testing,
        losses=testing and cfg.TEST.LOSS_IMAGES > 0,
        ignored=cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
    )
