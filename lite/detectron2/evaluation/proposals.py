"""Recall of class-agnostic proposals on COCO annotations (Hosang et al., arXiv:1502.05082)."""

import pickle

import numpy as np
import torch
from pycocotools.coco import COCO
from torch import Tensor

from detectron2.structures import Boxes, BoxMode, pairwise_iou
from detectron2.utils.file_io import PathManager

LIMITS = (100, 1000)
AREAS = {"": (0.0, 1e10), "s": (0.0, 32.0**2), "m": (32.0**2, 96.0**2), "l": (96.0**2, 1e10)}  # square pixels
IOU_THRESHOLDS = torch.arange(0.5, 0.96, 0.05)


def save_proposals(predictions: list[dict], path: str) -> None:
    """Write proposals to a pickle file that `load_proposals_into_dataset` reads; arguments as for `proposal_recall`."""
    found = [prediction["proposals"] for prediction in predictions]
    content = {
        "boxes": [x.proposal_boxes.tensor.numpy() for x in found],
        "objectness_logits": [x.objectness_logits.numpy() for x in found],
        "ids": [prediction["image_id"] for prediction in predictions],
        "bbox_mode": BoxMode.XYXY_ABS.value,
    }
    with PathManager.open(path, "wb") as f:
        pickle.dump(content, f)


def proposal_recall(ground_truth: COCO, predictions: list[dict]) -> dict[str, float]:
    """Average recall at IoU 0.50:0.95, in percent, of objects that are no crowds; NaN where there are none.

    Args:
        predictions: a dict an image with "image_id" and "proposals", Instances on the CPU with `proposal_boxes` in
            pixels of the annotations and `objectness_logits`. As with detectron2, images without any do not count.

    Returns:
        "AR@100", "ARs@100", "ARm@100", "ARl@100" by the area of the objects, and the same @1000 proposals an image.
    """
    images = []
    for prediction in predictions:
        found = prediction["proposals"]
        annotations = ground_truth.imgToAnns[prediction["image_id"]]
        objects = [a for a in annotations if not a.get("iscrowd", 0)]
        if objects and len(found):
            corners = BoxMode.convert(np.array([a["bbox"] for a in objects]), BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
            best_first = found.proposal_boxes[found.objectness_logits.argsort(descending=True, stable=True)]
            iou = pairwise_iou(Boxes(torch.as_tensor(corners, dtype=torch.float32)), best_first)
            images.append((iou, torch.tensor([float(a["area"]) for a in objects])))
    return {f"AR{size}@{n}": _recall(images, n, *area) for n in LIMITS for size, area in AREAS.items()}


def _recall(images: list[tuple[Tensor, Tensor]], limit: int, smallest: float, largest: float) -> float:
    """Percent; `images` has overlaps (objects, proposals), best proposal first, and the areas of the objects."""
    covered = [torch.zeros(0)]
    for iou, areas in images:
        covered.append(_match_greedily(iou[(areas >= smallest) & (areas <= largest), :limit]))
    return (torch.cat(covered)[:, None] >= IOU_THRESHOLDS).float().mean(dim=0).mean().item() * 100


def _match_greedily(iou: Tensor) -> Tensor:
    """Give each object at most one proposal, by falling overlap; the overlap of each object, 0 without proposal."""
    left, overlaps = iou.clone(), torch.zeros(len(iou))
    for _ in range(min(iou.shape)):
        row, column = divmod(left.argmax().item(), left.shape[1])
        overlaps[row] = left[row, column]
        left[row], left[:, column] = -1, -1
    return overlaps
