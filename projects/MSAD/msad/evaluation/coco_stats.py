"""COCO's twelve numbers for boxes, from annotations and results in memory; AP of models that find nothing."""

from __future__ import annotations

import contextlib
import copy
import io
import math
from collections.abc import Collection
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
_EMPTY = ("AP", "AP50", "AP75")


def box_stats(content: dict[str, Any], results: list[dict]) -> dict[str, float]:
    """AP and AR in percent by their names in STATS; NaN where there is no ground truth.

    Args:
        content: annotations in COCO's format.
        results: of {image_id, category_id, bbox (left, top, width, height), score}.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = content
        truth.createIndex()
        if results:
            found = truth.loadRes(copy.deepcopy(results))
        else:  # loadRes takes no empty list
            found = COCO()
            found.dataset = {"images": content["images"], "categories": content["categories"], "annotations": []}
            found.createIndex()
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    values = np.where(evaluation.stats < 0, np.nan, evaluation.stats * 100)
    return dict(zip(STATS, map(float, values)))


def counted(metrics: dict, present: Collection[tuple[str, str]] = ()) -> dict:
    """``metrics`` with 0 where a model has detected nothing.

    Of a size or class there may be no objects: these count if (task, name) is among ``present``, what other models have
    numbers of on the same data.
    """
    return {
        task: {name: 0.0 if detects_nothing(values) and (name in _EMPTY or (task, name) in present) else value
               for name, value in (values or {}).items()}
        for task, values in metrics.items()
    }  # fmt: skip


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def detects_nothing(values: dict | None) -> bool:
    """Whether a task's AP is NaN, as both engines say then, or null, as JSON does."""
    return "AP" in (values or {}) and not is_number(values["AP"])
