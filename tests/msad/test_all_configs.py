"""Every yaml file of configs/ builds its model, where possible on the meta device: no weights, no memory."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from msad import load_config
from msad.engine.build import teacher_entries
from msad.engine.stages import stage_configs

ROOT = Path(__file__).parents[2] / "configs"
YAMLS = sorted(path for path in ROOT.rglob("*.yaml") if not path.name.startswith("Base"))
BUILT: set[str] = set()


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: str(path.relative_to(ROOT)))
def test_it_builds(path):
    device, options = "meta", []
    if "meinst" in path.name:  # the file of the code is made from the data, and reading it needs values
        device, options = "cpu", ["MODEL.MEINST.CODE", "checkpoint"]
    elif "Swin" in path.name:  # detectron2 reads its drop rates from a tensor, and needs timm for them
        device, options = "cpu", ["MODEL.SWIN.DROP_PATH_RATE", 0.0]
    cfg = load_config(path, ["MODEL.DEVICE", device, *options])
    for entry in teacher_entries(cfg):
        assert "MEAN_OF" in entry or load_config(entry["CONFIG"]).MODEL.META_ARCHITECTURE
    stage_configs(cfg)
    if "timm" in cfg.MODEL.FPN.BOTTOM_UP and importlib.util.find_spec("timm") is None:
        pytest.skip("needs timm")
    key = json.dumps([cfg.MODEL, cfg.MSAD], default=str)
    if key in BUILT:
        return  # the same model as another file's
    with torch.device(device):
        model = build_model(cfg)
    assert sum(p.numel() for p in model.parameters()) > 1000
    BUILT.add(key)
