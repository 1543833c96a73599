"""Accuracy and latency of one model over test sizes (MSAD supplementary, Sec. C, Table 2)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from tabulate import tabulate
from torch import nn

from ..config_values import copy_with
from ..files import finite
from .coco_stats import counted

# Test sizes of Table 2, relative to the size that the student was trained for.
SHARES = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8)
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "mIoU", "fwIoU", "mACC", "pACC")


def default_sizes(cfg: CfgNode) -> list[int]:
    """Short sides in pixels of the model's input: the paper's shares of INPUT.MIN_SIZE_TEST, largest first."""
    return [round(share * short_side_of(cfg)) for share in SHARES]


def short_side_of(cfg: CfgNode) -> int:
    """INPUT.MIN_SIZE_TEST; ValueError if it is 0, which means no resizing to detectron2, so that it has no scale."""
    if not cfg.INPUT.MIN_SIZE_TEST:
        raise ValueError("INPUT.MIN_SIZE_TEST is 0, the size of the files: there is no scale to another short side")
    return cfg.INPUT.MIN_SIZE_TEST


def at_size(cfg: CfgNode, short_side: int) -> CfgNode:
    """A copy of ``cfg`` that tests at this short side; the longest side allowed is scaled alike.

    Raises:
        ValueError: the side is not positive, or INPUT.MIN_SIZE_TEST is 0.
    """
    if short_side < 1:
        raise ValueError(f"a short side must be positive, got {short_side}")
    scale = short_side / short_side_of(cfg)
    longest = round(cfg.INPUT.MAX_SIZE_TEST * scale)
    return copy_with(cfg, {"INPUT.MIN_SIZE_TEST": short_side, "INPUT.MAX_SIZE_TEST": longest})


class _Announced:
    """A loader that calls ``on_batch`` after each of its batches has been dealt with."""

    def __init__(self, loader: Iterable, on_batch: Callable[[], Any]) -> None:
        self.loader, self.on_batch = loader, on_batch

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        for batch in self.loader:
            yield batch
            self.on_batch()


def evaluate_size(
    model: nn.Module, loader: Iterable, evaluator: DatasetEvaluator, on_batch: Callable[[], Any] = lambda: None
) -> dict[str, Any]:
    """Evaluate at the size that ``loader`` gives images of.

    Args:
        model: as detectron2 evaluates it.
        loader: a test loader with a length.
        evaluator: e.g. COCOEvaluator.
        on_batch: called after every batch.

    Returns:
        {"results": {task: {metric: value or None}}, "seconds"}. A metric without ground truth is None, AP 0
        where nothing is detected.
    """
    start = time.perf_counter()
    results = inference_on_dataset(model, _Announced(loader, on_batch), evaluator)
    return {
        "results": {task: {k: finite(v) for k, v in values.items()} for task, values in counted(results).items()},
        "seconds": round(time.perf_counter() - start, 2),
    }


def tasks_of(sizes: Sequence[dict]) -> list[str]:
    """Tasks (bbox, segm, keypoints, sem_seg) with an AP or mIoU at any size, in the order in which they come."""
    names = dict.fromkeys(task for entry in sizes for task in entry["results"])
    return [task for task in names if any({"AP", "mIoU"} & (e["results"].get(task) or {}).keys() for e in sizes)]


def format_sweep(sizes: Sequence[dict]) -> str:
    """A table for each task: a row a size, metrics in percent and, if measured, the padded input and milliseconds.

    ``sizes`` are dicts of :func:`evaluate_size` with "short_side" and "max_size" in pixels, and with "input" (height,
    width) and "milliseconds" of an image, or None. Sizes that are padded alike have one latency, given at the largest.
    """
    tables = []
    for task in tasks_of(sizes):
        metrics = [name for name in METRICS if any(name in e["results"].get(task, {}) for e in sizes)]
        timed = any(e["milliseconds"] is not None for e in sizes)
        rows, before = [], None
        for e in sizes:
            row = [e["short_side"], e["max_size"], *(e["results"].get(task, {}).get(name) for name in metrics)]
            if timed:
                shape = e["input"] and "{} x {}".format(*e["input"])
                row += ['"', '"'] if shape and shape == before else [shape, e["milliseconds"]]
                before = shape
            rows.append(row)
        header = ["short side", "longest", *metrics] + (["padded input", "ms"] if timed else [])
        tables.append(f"{task}\n{tabulate(rows, header, floatfmt='.1f', missingval='-')}")
    return "\n\n".join(tables)
