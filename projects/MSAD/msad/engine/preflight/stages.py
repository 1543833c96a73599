"""Preflight of a curriculum: every stage is examined as the run that it is."""

from __future__ import annotations

import os

from detectron2.config import CfgNode

from ...files import FINAL
from ...finding import Finding
from ..stages import stage_configs
from .run import examine


def examine_stages(cfg: CfgNode, images: int = 200, no_kd_weights: str = "") -> dict[str, list[Finding]]:
    """:func:`.run.examine` of every stage of DISTILL.STAGES by the name of its folder, or of a single run under "".

    Raises:
        KeyError, ValueError: as :func:`msad.engine.stages.stage_configs`, for what is no stage.
    """
    if not cfg.DISTILL.STAGES:
        return {"": examine(cfg, images, no_kd_weights)}
    found, before = {}, ""
    for config in stage_configs(cfg):
        found[os.path.basename(config.OUTPUT_DIR)] = examine(config, images, no_kd_weights, before)
        before = os.path.join(config.OUTPUT_DIR, FINAL)
    return found
