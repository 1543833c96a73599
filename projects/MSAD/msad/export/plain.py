"""A trained model for use without this project: weights alone and a yaml that plain detectron2 reads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import detectron2.modeling
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from fvcore.common.registry import Registry
from torch import nn

from ..config import add_imports, default_config, detector_architecture
from ..config_values import plain
from ..data.low_res import reads_low_res, student_shift
from ..data.names import FILE, dataset_names, write_names
from ..engine.checkpoint import CheckedCheckpointer
from ..files import atomic_write
from ..modeling.detectors.mask_code import IN_CHECKPOINT
from ..modeling.student_config import train_at
from ..resolution import level_of

# Parts that projects/MSAD/plain/plain_backbone.py makes of detectron2's own.
PLAIN_BACKBONE = {"MODEL.BACKBONE.NAME build_level_fpn_backbone", "MODEL.FPN.BOTTOM_UP build_resnet_c1_backbone"}

# Settings of these parts, and of FCOS, that no such file knows.
UNKNOWN_TO_PLAIN = {
    "FPN": ("TOP_SOURCE", "TOP_RELU", "TOP_NORM"),
    "FCOS": ("SCALES", "SCORE_RULE", "CLIP_BEFORE_NMS"),
}


def split_config(cfg: CfgNode, stock: CfgNode) -> tuple[dict, dict]:
    """Nested dicts of (values of ``cfg`` that differ from those of ``stock``, values of keys that ``stock`` lacks)."""
    known: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for key, value in cfg.items():
        if key not in stock:
            own[key] = plain(value)
        elif isinstance(value, CfgNode):
            for target, part in zip((known, own), split_config(value, stock[key])):
                if part:
                    target[key] = part
        elif value != stock[key]:
            known[key] = plain(value)
    return known, own


def foreign_parts(cfg: CfgNode) -> dict[str, str]:
    """"KEY VALUE" of every part of the model that detectron2 itself does not register -> the package that does."""
    registries = [r for r in vars(detectron2.modeling).values() if isinstance(r, Registry)]
    found = {}
    for key, value in _texts(cfg.MODEL, "MODEL."):
        if key == "MODEL.FPN.BOTTOM_UP" and cfg.MODEL.BACKBONE.NAME != "build_level_fpn_backbone":
            continue  # nobody reads it
        for registry in registries:
            package = registry.get(value).__module__.split(".")[0] if value in registry else "detectron2"
            if package != "detectron2":
                found[f"{key} {value}"] = package
    return found


def plain_file(cfg: CfgNode) -> str | None:
    """The file that builds a model with foreign parts in plain detectron2, or None if there is none."""
    levels = sorted(map(level_of, cfg.MODEL.FPN.LEVELS))
    # detectron2's FPN has an output for every level between the finest and P5.
    if levels and levels != list(range(min(levels[0], 5), max(levels[-1], 5) + 1)):
        return None
    stock = default_config(cfg.MSAD.IMPORTS).MODEL
    if any(cfg.MODEL[node][key] != stock[node][key] for node, keys in UNKNOWN_TO_PLAIN.items() for key in keys):
        return None
    names = {(): "plain_rcnn.py", ("MODEL.META_ARCHITECTURE FCOS",): "plain_fcos.py"}
    name = names.get(tuple(part for part in foreign_parts(cfg) if part not in PLAIN_BACKBONE))
    return name and f"projects/MSAD/plain/{name}"


def by_itself(cfg: CfgNode) -> CfgNode:
    """The config of a student without its teacher.

    Training images have the size that the student sees, see :func:`msad.modeling.student_config.train_at`.
    """
    out = cfg.clone()
    out.defrost()
    low_res_files = reads_low_res(cfg) and any("LOW_RES_IMAGES" in entry for entry in cfg.DATASETS.REGISTER)
    if cfg.DISTILL.TEACHERS:
        train_at(out, student_shift(cfg), low_res_files=low_res_files)
    out.DISTILL = default_config().DISTILL
    if low_res_files:
        out.DATASETS.LOW_RES = True
        out.DISTILL.STUDENT_RESOLUTION = cfg.DISTILL.STUDENT_RESOLUTION  # to check the sizes of the files
    return out


def load_by_itself(cfg: CfgNode, weights: str) -> tuple[CfgNode, nn.Module]:
    """The config of :func:`by_itself` and its model on the CPU, with all of its tensors from ``weights``; errors as
    :func:`export` says."""
    cfg = by_itself(cfg)
    if cfg.MODEL.MEINST.CODE:
        cfg.MODEL.MEINST.CODE = IN_CHECKPOINT
    build_cfg = cfg.clone()
    build_cfg.MODEL.DEVICE = "cpu"
    model = build_model(build_cfg)
    CheckedCheckpointer(model).load_all(weights, "this config")
    return cfg, model


def _texts(node: CfgNode, prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from _texts(value, f"{prefix}{key}.")
        elif isinstance(value, str):
            yield prefix + key, value


def needed(own: dict, cfg: CfgNode) -> dict:
    """What of the project's keys is needed to build ``cfg``: those of its detector and neck, and no defaults of others.

    Plain detectron2 knows none of them, so that the detector's own section is whole.
    """
    classes = META_ARCH_REGISTRY.get(detector_architecture(cfg)).__mro__  # LightFCOS has the keys of FCOS too
    parts = {"FPN", *(known.__name__.upper() for known in classes)} if foreign_parts(cfg) else set()
    others = {name.upper() for name, _ in META_ARCH_REGISTRY} - parts
    own = {**own, "MODEL": {key: value for key, value in own["MODEL"].items() if key not in others}}
    return _prune(own, default_config(), {f"MODEL.{part}" for part in parts}, "")


def _prune(tree: dict, defaults: CfgNode, whole: set[str], prefix: str) -> dict:
    out = {}
    for key, value in tree.items():
        if prefix + key not in whole and isinstance(defaults[key], CfgNode):
            value = _prune(value, defaults[key], whole, f"{prefix}{key}.")
            if value:
                out[key] = value
        elif prefix + key in whole or value != plain(defaults[key]):
            out[key] = value
    return out


def export(cfg: CfgNode, weights: str, output: str | os.PathLike) -> str:
    """Write ``output``/model.pth, the model's tensors and nothing else, and ``output``/config.yaml.

    config.yaml has the values that differ from detectron2's defaults, for the keys that detectron2 has; what the
    project's keys add, such as the declaration of data sets, is in ``output``/msad.yaml, which is based on it.
    metadata.json has the names of classes and keypoints where the data sets of the config are there. A student is
    described by itself, see :func:`by_itself`. No other file is needed, and the folder may be moved: MODEL.WEIGHTS is
    relative to it, as :func:`msad.load_config` reads it; plain detectron2 must be told the path.

    Args:
        cfg: of the model; for a student the one it was trained with.
        weights: a checkpoint of it.

    Returns:
        one sentence: how the model is built from these files.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: the checkpoint does not have all tensors of the model, or ``output`` is a folder of the training.
    """
    cfg, model = load_by_itself(cfg, weights)
    output = Path(output)
    files = {name: output / name for name in ("model.pth", "config.yaml", "msad.yaml", FILE)}
    if files["model.pth"].exists() and files["model.pth"].samefile(weights):
        raise ValueError(f"{weights} would be overwritten: choose another output than {output}")
    names = dataset_names(cfg)
    output.mkdir(parents=True, exist_ok=True)
    with atomic_write(files["model.pth"]) as file:
        torch.save({"model": model.state_dict()}, file)
    known, own = split_config(cfg, add_imports(get_cfg(), cfg.MSAD.IMPORTS))
    known.pop("OUTPUT_DIR", None)  # the training's, into which nobody should write
    known["VERSION"] = cfg.VERSION
    known["MODEL"]["WEIGHTS"] = "model.pth"
    files["config.yaml"].write_text(yaml.safe_dump(known))
    write_names(output, names)
    if own := needed(own, cfg):
        files["msad.yaml"].write_text(yaml.safe_dump({"_BASE_": "config.yaml", **own}))
    else:
        files["msad.yaml"].unlink(missing_ok=True)
    foreign = foreign_parts(cfg)
    if not foreign:
        return f"{files['config.yaml']} builds this model in plain detectron2, with MODEL.WEIGHTS {files['model.pth']}."
    by_package = {package: [part for part in foreign if foreign[part] == package] for package in foreign.values()}
    who = " and ".join(f"{package} registers {', '.join(parts)}" for package, parts in by_package.items())
    how = f"msad.load_config({str(files['config.yaml'])!r}), where {who}"
    plain = plain_file(cfg)
    if plain:
        return f"To build this model, {how}; {plain} builds it without msad."
    return f"Plain detectron2 cannot build this model: {how}."
