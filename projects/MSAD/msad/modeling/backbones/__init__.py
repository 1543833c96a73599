"""Backbones and necks that detectron2 does not have, registered for yaml."""

from . import fpn, mobilenetv2, resnet  # noqa: F401
