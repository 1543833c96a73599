"""Detectors that detectron2 has no yaml for."""

from . import cascade, fcos, gfl, htc, light_heads, meinst, reppoints, retinanet  # noqa: F401
