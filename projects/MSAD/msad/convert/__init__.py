"""Checkpoints of mmdetection's model zoo as detectron2 checkpoints, with the yaml that gives the same detections."""

from .mmdet import Converted, convert

__all__ = ["Converted", "convert"]
