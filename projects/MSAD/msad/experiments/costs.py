"""Inference costs of the models of a comparison, and the input size at which a detector costs as much as another."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.modeling import GeneralizedRCNN, build_model
from torch import nn

from ..config_values import copy_with
from ..data.mappers import inference_mapper
from ..data.register import registered
from ..engine.setup import load_model
from ..evaluation.cost import TOTAL, count_macs, count_parameters, random_inputs, time_parts
from ..evaluation.region_limits import fill_regions
from ..evaluation.sweep import short_side_of
from ..modeling.adapters import detector_of
from ..modeling.teacher import MultiScaleTeacher

LARGEST = 8  # times its own input size, at which a detector may be compared; its cost goes with the square


def scale_inputs(cfg: CfgNode, factor: float) -> None:
    """Multiply all training and test sizes of ``cfg`` by ``factor``, in place."""
    sizes = cfg.INPUT
    sizes.MIN_SIZE_TRAIN = tuple(round(size * factor) for size in sizes.MIN_SIZE_TRAIN)
    for key in ("MAX_SIZE_TRAIN", "MIN_SIZE_TEST", "MAX_SIZE_TEST"):
        sizes[key] = round(sizes[key] * factor)


# --- equal cost -------------------------------------------------------------------------------------------------------


def nearest_size(cost: Callable[[int], float], target: float, highest: int) -> int:
    """The size from 1 to ``highest`` whose cost is nearest to ``target``; of those that cost the same the largest.

    Args:
        cost: of a size; does not fall with it. Inputs are padded, so it is a staircase.
    """

    def largest(limit: float) -> int:
        """The largest size that costs at most ``limit``, by bisection; 0 if there is none."""
        low, high = 0, highest + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if cost(middle) <= limit else (low, middle)
        return low

    below = largest(target)
    if below == highest:
        return below
    above = largest(cost(below + 1))
    return above if below == 0 or cost(above) - target < target - cost(below) else below


def set_equal_cost(cfg: CfgNode, reference: CfgNode) -> None:
    """Scale the input sizes of ``cfg`` so that its whole model costs the multiply-adds of ``reference``, in place.

    Costs are those of an image of the test set's most common size, in R-CNNs with as many regions as their limits allow
    (:func:`msad.evaluation.region_limits.fill_regions`). Found by bisection over the short side
    INPUT.MIN_SIZE_TEST; the training sizes are scaled alike.

    Raises:
        ValueError: no size up to LARGEST times its own costs as much, or none as little, or INPUT.MIN_SIZE_TEST is 0.
    """
    was = short_side_of(cfg)
    size = _equal_cost_size(*map(_without_seed, (cfg, reference)))
    scale_inputs(cfg, size / was)
    cfg.INPUT.MIN_SIZE_TEST = size


def _without_seed(cfg: CfgNode) -> str:
    """The config's text, but for what differs between seeds and has no influence on costs."""
    return copy_with(cfg, {"OUTPUT_DIR": "", "SEED": 0, "DISTILL.TEACHERS": []}).dump()


@functools.lru_cache
def _equal_cost_size(text: str, reference_text: str) -> int:
    configs = [CfgNode.load_cfg(part) for part in (text, reference_text)]
    record = typical_record(configs[0])
    models = [fill_regions(build_model(cfg).eval()) for cfg in configs]

    padded_macs = functools.cache(_macs)  # sizes that are padded alike cost the same

    def macs(model: nn.Module, short: int, longest: int) -> float:
        return padded_macs(model, *_input_size(model, (record["height"], record["width"]), short, longest))

    cfg, reference = configs
    target = macs(models[1], reference.INPUT.MIN_SIZE_TEST, reference.INPUT.MAX_SIZE_TEST)
    ratio = cfg.INPUT.MAX_SIZE_TEST / cfg.INPUT.MIN_SIZE_TEST

    def cost(short: int) -> float:
        return macs(models[0], short, round(short * ratio))

    highest = 2 * cfg.INPUT.MIN_SIZE_TEST
    while cost(highest) <= target and highest < LARGEST * cfg.INPUT.MIN_SIZE_TEST:
        highest *= 2
    size = nearest_size(cost, target, highest)
    if cost(highest) < target or cost(1) > 2 * target:  # what padding adds to the least input is not to be helped
        raise ValueError(f"equal cost: the reference takes {target:.3g} GMACs, and the conventional detector "
                         f"{cost(size):.3g} at {size} px, the nearest of its sizes up to {highest} px")  # fmt: skip
    return size


def _input_size(model: nn.Module, shape: tuple[int, int], short: int, longest: int) -> tuple[int, int]:
    """Height, width of the padded input that a file of this shape gives."""
    if short:  # 0: as the files are
        shape = T.ResizeShortestEdge.get_output_shape(*shape, short, longest)
    step = max(detector_of(model).backbone.size_divisibility, 1)
    height, width = (-(-side // step) * step for side in shape)
    return height, width


def _macs(model: nn.Module, height: int, width: int) -> float:
    try:
        return count_macs(model, random_inputs(height, width))[TOTAL]
    except ValueError:  # one pixel is too little for a norm of one channel a group, in a single image
        return count_macs(model, random_inputs(height, width, batch=2))[TOTAL] / 2


def macs_of_file(cfg: CfgNode, shape: tuple[int, int]) -> float:
    """GMACs of a config's model, with random weights, for a file of ``shape``, (height, width), at its test size.

    R-CNNs have as many regions as their limits allow (:func:`msad.evaluation.region_limits.fill_regions`).
    """
    model = fill_regions(build_model(cfg).eval())
    return _macs(model, *_input_size(model, shape, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST))


def typical_record(cfg: CfgNode) -> dict:
    """The first dataset dict of the test set whose image has the most common size."""
    with registered(cfg):
        records = DatasetCatalog.get(cfg.DATASETS.TEST[0])
    sizes = [(record.get("height"), record.get("width")) for record in records]
    return records[sizes.index(Counter(sizes).most_common(1)[0][0])]


# --- measuring --------------------------------------------------------------------------------------------------------


def measure_costs(models: dict[str, tuple[CfgNode, nn.Module]], rounds: int = 15) -> dict[str, dict]:
    """Costs of each model on a test image of the most common size; of a teacher those of each branch, NAME_BRANCH.

    Networks that are built alike and get inputs that are padded to the same size are measured once, but for R-CNNs, the
    regions of which depend on their weights. Latencies are the least of ``rounds`` rounds in which the networks take
    turns, so that other work on the machine hits all alike.

    Args:
        models: name -> (config, model in eval mode).

    Returns:
        name -> {"network": a text that models share which differ in weights and input alone, "input": padded
        (height, width), "parameters", "parameters_by_part", "gmacs" and "ms" by part and "total"}.
    """
    same: dict[tuple, list[str]] = {}
    passes: dict[tuple, tuple] = {}
    costs: dict[tuple, dict] = {}
    records: dict[str, dict] = {}
    for name, (cfg, model) in models.items():
        data = cfg.DATASETS.dump()
        records[data] = records.get(data) or typical_record(cfg)
        inputs = [inference_mapper(cfg)(records[data])]
        backbone = detector_of(model).backbone
        for branch in model.branches if isinstance(model, MultiScaleTeacher) else [None]:
            select = functools.partial(_select, model, branch)
            select()
            sizes: list[tuple[int, int]] = []  # (height, width) of what the network gets at every pass
            with backbone.register_forward_pre_hook(lambda _, args, sizes=sizes: sizes.append(args[0].shape[-2:])):
                macs = count_macs(model, inputs)
            size = max(sizes)
            key = (_architecture(cfg), size, branch, id(model) if _has_regions(model) else None)
            same.setdefault(key, []).append(name if branch is None else f"{name}_{branch}")
            if key not in costs:
                passes[key] = (select, model, inputs)
                costs[key] = {
                    "network": _digest(cfg, branch), "input": list(size),
                    "parameters": sum(p.numel() for p in model.parameters()),
                    "parameters_by_part": count_parameters(model), "gmacs": _rounded(macs),
                }  # fmt: skip
    times: dict[tuple, list[dict]] = {key: [] for key in passes}
    for _ in range(rounds + 1):
        for key, (select, model, inputs) in passes.items():
            select()
            times[key].append(time_parts(model, inputs))
    for key, found in times.items():
        costs[key]["ms"] = _rounded(min(found[1:], key=lambda one: one[TOTAL]))  # the first is for warming up
    return {name: costs[key] for key, names in same.items() for name in names}


def costs_of_trained(models: Mapping[str, tuple[CfgNode, Path]]) -> dict[str, dict]:
    """:func:`measure_costs` of name -> (config, weights)."""
    return measure_costs({name: (cfg, load_model(cfg, str(weights))) for name, (cfg, weights) in models.items()})


def _select(model: nn.Module, branch: str | None) -> None:
    if branch is not None:
        model.set_eval_branch(branch)


def _has_regions(model: nn.Module) -> bool:
    return isinstance(detector_of(model), GeneralizedRCNN)


def _architecture(cfg: CfgNode) -> str:
    """What decides on a network's cost for an input of given size."""
    model = copy_with(cfg.MODEL, {"WEIGHTS": ""})
    return f"{model.dump()}{cfg.MSAD.dump()}{cfg.TEST.DETECTIONS_PER_IMAGE}"


def _digest(cfg: CfgNode, branch: str | None) -> str:
    return hashlib.sha1(f"{_architecture(cfg)}{branch or ''}".encode()).hexdigest()[:12]


def _rounded(parts: dict[str, float]) -> dict[str, float]:
    return {part: float(f"{value:.4g}") for part, value in parts.items()}
