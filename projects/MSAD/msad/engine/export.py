"""A trained model for use without this project: weights alone and a yaml that plain detectron2 reads."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import detectron2.modeling
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from fvcore.common.registry import Registry

from .checkpoint import CheckedCheckpointer, replacing

logger = logging.getLogger(__name__)
# Short files that build exported models of these meta-architectures without msad.
PLAIN = {"FCOS": "docs/plain_fcos.py", "GeneralizedRCNN": "docs/plain_rcnn.py"}


def split_config(cfg: CfgNode, stock: CfgNode) -> tuple[dict, dict]:
    """Nested dicts of (values of ``cfg`` that differ from those of ``stock``, values of keys that ``stock`` lacks)."""
    known: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for key, value in cfg.items():
        if key not in stock:
            own[key] = _plain(value)
        elif isinstance(value, CfgNode):
            for target, part in zip((known, own), split_config(value, stock[key])):
                if part:
                    target[key] = part
        elif value != stock[key]:
            known[key] = _plain(value)
    return known, own


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def foreign_parts(cfg: CfgNode) -> list[str]:
    """"KEY VALUE" of every part of the model that detectron2 itself does not register."""
    registries = [r for r in vars(detectron2.modeling).values() if isinstance(r, Registry)]
    found = []
    for key, value in _texts(cfg.MODEL, "MODEL."):
        for registry in registries:
            if value in registry and registry.get(value).__module__.split(".")[0] != "detectron2":
                found.append(f"{key} {value}")
    return found


def _texts(node: CfgNode, prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from _texts(value, f"{prefix}{key}.")
        elif isinstance(value, str):
            yield prefix + key, value


def export(cfg: CfgNode, weights: str, output: str | os.PathLike) -> str:
    """Write ``output``/model.pth, the model's tensors and nothing else, and ``output``/config.yaml.

    config.yaml has the values that differ from detectron2's defaults, for the keys that detectron2 has. Where that
    does not suffice to build the model, the project's keys go to ``output``/msad.yaml.

    Args:
        cfg: of the model; for a student the one it was trained with.
        weights: a checkpoint of it.

    Returns:
        one sentence: how the model is built from these files.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: the checkpoint does not have all tensors of the model.
    """
    if not os.path.isfile(weights) and "://" not in weights:
        raise FileNotFoundError(f"no checkpoint {weights}")
    build_cfg = cfg.clone()
    build_cfg.defrost()
    build_cfg.MODEL.DEVICE = "cpu"
    model = build_model(build_cfg)
    checkpointer = CheckedCheckpointer(model)
    checkpointer.load(weights)
    if checkpointer.unfit:
        raise ValueError(
            f"{weights} is not a checkpoint of this config: {len(checkpointer.unfit)} tensors are absent or of another "
            f"shape, e.g. {', '.join(checkpointer.unfit[:3])}"
        )

    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    with replacing(str(output / "model.pth")) as file:
        torch.save({"model": model.state_dict()}, file)
    known, own = split_config(cfg, get_cfg())
    known["VERSION"] = cfg.VERSION
    known["MODEL"]["WEIGHTS"] = str(output / "model.pth")
    (output / "config.yaml").write_text(yaml.safe_dump(known))
    foreign = foreign_parts(cfg)
    if not foreign:
        (output / "msad.yaml").unlink(missing_ok=True)
        return f"{output / 'config.yaml'} builds this model in plain detectron2."
    (output / "msad.yaml").write_text(yaml.safe_dump({"VERSION": cfg.VERSION, **own}))
    plain = PLAIN.get(cfg.MODEL.META_ARCHITECTURE)
    return (
        f"To build this model, import msad, which registers {', '.join(foreign)}, and merge config.yaml and msad.yaml "
        "into msad.add_msad_config(get_cfg())"
        + (f"; {plain} builds it without msad." if plain else ".")
    )
