"""Which locations of a pyramid are positive for which box: adaptive selection (ATSS, CVPR 2020, Algorithm 1).

All boxes of a batch are handled at once: nearest locations are sought for the boxes of all images together, because the
images of a batch share one grid, and boxes of one image that claim the same location compete in a scatter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from detectron2.structures import Boxes
from detectron2.structures.boxes import matched_pairwise_iou
from torchvision.ops import box_area, box_iou, distance_box_iou


class Candidates(NamedTuple):
    """Cells near each of K boxes.

    Attributes:
        index: (K, C) in the locations of all levels.
        iou: (K, C) of the box with the anchor around the location.
        threshold: (K,) mean plus standard deviation of ``iou``.
    """

    index: torch.Tensor
    iou: torch.Tensor
    threshold: torch.Tensor


def centres(boxes: torch.Tensor) -> torch.Tensor:
    """(..., 4) -> (..., 2)."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def anchors_around(locations: torch.Tensor, size: float) -> torch.Tensor:
    """Boxes (..., 4) with the centres of ``locations`` and ``size`` times their sides."""
    middle = centres(locations)
    half = (locations[..., 2:] - locations[..., :2]) * (size / 2)
    return torch.cat([middle - half, middle + half], dim=-1)


def contains(boxes: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Whether points (..., 2) lie inside boxes (..., 4), their edges excluded."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1).amin(dim=-1) > 0


def find_candidates(locations: list[torch.Tensor], boxes: torch.Tensor, topk: int = 9, size: float = 8.0) -> Candidates:
    """The ``topk`` locations of every level whose centres are nearest to each box's centre.

    Args:
        locations: (R_l, 4) of each level, squares with the sides of a stride.
        boxes: (K, 4) in the pixels of ``locations``.
        topk: locations of each level; a level with fewer gives all.
        size: sides of the anchors with which IoU is taken, in strides.
    """
    middle = centres(boxes)
    found, first = [], 0
    for level in locations:
        distance = (centres(level) - middle[:, None]).square().sum(dim=-1)
        found.append(first + distance.topk(min(topk, len(level)), dim=1, largest=False).indices)
        first += len(level)
    index = torch.cat(found, dim=1)
    anchors = anchors_around(torch.cat(locations)[index], size)
    paired = boxes[:, None].expand_as(anchors)
    iou = matched_pairwise_iou(Boxes(anchors.reshape(-1, 4)), Boxes(paired.reshape(-1, 4))).view(index.shape)
    mean = iou.mean(dim=1)
    variance = (iou - mean[:, None]).square().sum(dim=1) / max(iou.shape[1] - 1, 1)
    return Candidates(index, iou, mean + variance.sqrt())


def assign(
    locations: list[torch.Tensor], boxes: torch.Tensor, image: torch.Tensor, num_images: int, topk: int = 9,
    size: float = 8.0,
) -> torch.Tensor:  # fmt: skip
    """Match every location of every image to a box.

    A candidate is positive if its IoU reaches the box's threshold and its centre lies inside the box. Of several
    boxes the one of largest IoU gets the location, and the first of them if they are equal.

    Args:
        locations, topk, size: see :func:`find_candidates`.
        boxes: (K, 4) of the whole batch.
        image: (K,) index of the box's image.

    Returns:
        (num_images, R) int64 over all levels: index of the box, K where there is none.
    """
    flat = torch.cat(locations)
    index, iou, threshold = find_candidates(locations, boxes, topk, size)
    positive = (iou >= threshold[:, None]) & contains(boxes[:, None], centres(flat)[index])
    slot = (image[:, None] * len(flat) + index).flatten()
    claim = iou.masked_fill(~positive, -1.0).flatten()
    best = claim.new_full((num_images * len(flat),), -1.0).scatter_reduce(0, slot, claim, "amax")
    number = torch.arange(len(boxes), device=boxes.device)[:, None].expand_as(index).flatten()
    number = number.masked_fill(~positive.flatten() | (claim < best[slot]), len(boxes))
    nobody = number.new_full(best.shape, len(boxes))
    return nobody.scatter_reduce(0, slot, number, "amin").view(num_images, len(flat))


def valuable_region(
    locations: list[torch.Tensor], num_images: int, boxes: torch.Tensor, image: torch.Tensor, *, topk: int = 9,
    size: float = 8.0, lower: float = 0.25, distance: str = "paper",
) -> torch.Tensor:  # fmt: skip
    """Locations whose anchors nearly match a box (LD, Algorithm 1): lower thr <= DIoU < thr, thr being that of ATSS.

    Needs memory for K R values.

    Args:
        locations, topk, size: see :func:`find_candidates`.
        boxes: (K, 4) of the whole batch, in the pixels of ``locations``; ``image``: (K,).
        lower: fraction of the threshold at which the region begins.
        distance: "paper": DIoU. "released": the same with the anchor's area in place of the union.

    Returns:
        (num_images, R), the largest IoU with a box in whose region the location is, 0 outside of all.
    """
    anchors = anchors_around(torch.cat(locations), size)
    threshold = find_candidates(locations, boxes, topk, size).threshold[:, None]
    iou, measure = box_iou(boxes, anchors), distance_box_iou(boxes, anchors)
    if distance == "released":
        areas, anchor_areas = box_area(boxes)[:, None], box_area(anchors)
        overlap = iou * (areas + anchor_areas) / (1 + iou)
        measure = measure - iou + overlap / anchor_areas
    iou = iou * ((measure >= lower * threshold) & (measure < threshold))
    canvas = iou.new_zeros(num_images, len(anchors))
    return canvas.scatter_reduce(0, image[:, None].expand_as(iou), iou, "amax")
