"""Every yaml file of configs/ builds its model and losses, where possible on the meta device: no weights, no memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from msad import load_config
from msad.distill.losses.registry import compares_heads
from msad.distill.teachers import FrozenTeacher
from msad.engine.build import build_distiller, teacher_entries
from msad.engine.stages import stage_configs

ROOT = Path(__file__).parents[2] / "configs"
YAMLS = sorted(path for path in ROOT.rglob("*.yaml") if not path.name.startswith("Base"))
BUILT: dict[str, nn.Module] = {}  # the latest
SEEN: set[str] = set()


def load(path: Path) -> CfgNode:
    """The config of a file, for the device that its model can be built on."""
    options = ["MODEL.DEVICE", "meta"]
    if "meinst" in path.name:  # the file of the code is made from the data, and reading it needs values
        options = ["MODEL.DEVICE", "cpu", "MODEL.MEINST.CODE", "checkpoint"]
    elif "Swin" in path.name:  # detectron2 reads its drop rates from a tensor, and needs timm for them
        options = ["MODEL.DEVICE", "cpu", "MODEL.SWIN.DROP_PATH_RATE", 0.0]
    return load_config(path, options)


def model_of(cfg: CfgNode) -> nn.Module:
    key = json.dumps([cfg.MODEL, cfg.MSAD], default=str)
    if key not in BUILT:
        if len(BUILT) > 7:
            del BUILT[next(iter(BUILT))]
        with torch.device(cfg.MODEL.DEVICE):
            BUILT[key] = build_model(cfg)
    return BUILT[key]


def is_new(*parts: CfgNode | list) -> bool:
    key = json.dumps(parts, default=str)
    known = key in SEEN
    SEEN.add(key)
    return not known


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: str(path.relative_to(ROOT)))
def test_it_builds(path):
    """Model, teachers, assistants and losses on features; test_head_pairs.py has those between predictions."""
    cfg = load(path)
    stage_configs(cfg)
    teachers = [(entry, load(Path(entry["CONFIG"]))) for entry in teacher_entries(cfg) if "MEAN_OF" not in entry]
    assert all(one.MODEL.META_ARCHITECTURE for _, one in teachers)
    if any("timm" in one.MODEL.FPN.BOTTOM_UP for one in (cfg, *(one for _, one in teachers))):
        pytest.importorskip("timm")
    if is_new(cfg.MODEL, cfg.MSAD):
        assert sum(p.numel() for p in model_of(cfg).parameters()) > 1000
    cfg.DISTILL.LOSSES = [
        entry for entry in cfg.DISTILL.LOSSES
        if not compares_heads(entry["NAME"]) or entry.get("SOURCE") in {a["NAME"] for a in cfg.DISTILL.ASSISTANTS}
    ]  # fmt: skip
    devices = {one.MODEL.DEVICE for one in (cfg, *(one for _, one in teachers))}
    compared = [cfg.DISTILL.LOSSES, cfg.DISTILL.ASSISTANTS, cfg.DISTILL.STUDENT_RESOLUTION]
    if not cfg.DISTILL.LOSSES or not is_new(cfg.MODEL, *compared, [(entry, one.MODEL) for entry, one in teachers]):
        return
    if len(devices) > 1:
        cfg.MODEL.DEVICE = "cpu"
        for _, one in teachers:
            one.MODEL.DEVICE = "cpu"
    frozen = [
        FrozenTeacher(model_of(one), name=entry["NAME"], scale=entry.get("SCALE", 1.0)) for entry, one in teachers
    ]
    with torch.device(cfg.MODEL.DEVICE):
        distiller = build_distiller(cfg, model_of(cfg), frozen)
    assert len(distiller.losses) >= len(cfg.DISTILL.LOSSES) and len(distiller.assistants) == len(cfg.DISTILL.ASSISTANTS)
