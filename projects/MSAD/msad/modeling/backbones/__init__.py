"""Backbones and necks that detectron2 does not have, registered for yaml."""

from . import efficientnet_lite, fpn, mobilenetv2, pretrained, resnet, swin, timm_models  # noqa: F401
