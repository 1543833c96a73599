"""Detectors that detectron2 has no yaml for."""

from . import cascade, fcos, gfl, htc, light_fcos, meinst, reppoints, retinanet  # noqa: F401
