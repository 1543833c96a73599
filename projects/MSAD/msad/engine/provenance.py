"""What measured numbers are of: a fingerprint of config, weights and data, and the machine."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode

from ..config_values import copy_with
from ..data.cache import checkpoint_id
from ..data.fingerprint import dataset_fingerprint
from ..files import write_json
from .setup import engine_name


def fingerprint(cfg: CfgNode, weights: str | os.PathLike, *more: Any) -> str:
    """Twelve digits that change with the config (without OUTPUT_DIR), the weights, the data, or ``more`` (JSON)."""
    cfg = copy_with(cfg, {"OUTPUT_DIR": ""})
    key = [cfg.dump(), checkpoint_id(weights), dataset_fingerprint(cfg), *more]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]


def command_line() -> str:
    """The command that is running, as a shell takes it."""
    program, *args = sys.argv
    return shlex.join([*(program.split() if program.startswith("msad ") else ["python", program]), *args])


def about_report() -> dict[str, Any]:
    """Command, engine and versions, as a report shows them."""
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {"command": command_line(), "engine": engine_name(), "versions": versions}


def machine(device: str) -> dict[str, Any]:
    """Engine, torch, device and number of threads, for reports."""
    return {
        "engine": engine_name(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
    }


def write_measurements(
    file: Path, results: dict[str, Any], models: Mapping[str, tuple[CfgNode, str]], **about: Any
) -> None:
    """Write what was measured of several models, with the machine and their weights, as JSON.

    Args:
        results: name of the model -> its numbers.
        models: name -> config and weights; all on one device.
        about: what else the numbers depend on.
    """
    device = next(cfg for cfg, _ in models.values()).MODEL.DEVICE
    weights = {name: weights for name, (_, weights) in models.items()}
    write_json(file, {**machine(device), **about, "weights": weights, "models": results})
