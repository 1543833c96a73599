"""Readers of annotation files and the data sets that are registered by default."""

from . import builtin  # registers them
from .coco import convert_to_coco_json, load_coco_json, load_sem_seg, register_coco_instances

__all__ = ["builtin", "convert_to_coco_json", "load_coco_json", "load_sem_seg", "register_coco_instances"]
