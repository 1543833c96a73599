"""Heads of semantic segmentation that detectron2 does not have, and how segmentors are run from features."""

from . import adapter, psp_head, uper_head  # noqa: F401
