"""Detectors that detectron2 has no yaml for."""

from . import fcos, gfl, meinst, reppoints  # noqa: F401
