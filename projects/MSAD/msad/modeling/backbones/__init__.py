"""Backbones and necks that detectron2 does not have, registered for yaml."""

from . import (  # noqa: F401
    dilated,
    efficientnet_lite,
    fpn,
    mobilenetv2,
    pretrained,
    resnet,
    rfp,
    swin,
    switchable,
    timm_models,
)
