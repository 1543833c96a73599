"""Boxes as sets of points (RepPoints, ICCV 2019): from points to boxes, and which point stands for which object.

Points are given in units of the stride, relative to a location's centre, as (y1, x1, y2, x2, ...): the order in which a
deformable convolution takes its offsets.
"""

from __future__ import annotations

import torch
from detectron2.structures import Boxes, pairwise_iou
from torch import nn

POINTS = 9  # of a set: one for each tap of the deformable convolutions
# Share of the gradient that reaches the learned scale of the box (RepPoints, Sec. 4.2: it is learned slowly).
SCALE_GRADIENT = 0.01
WAYS = ("moment", "minmax", "partial_minmax")


def base_grid() -> torch.Tensor:
    """Where the taps of a 3x3 convolution lie, (18,): (y, x) of each tap around the centre, row by row."""
    axis = torch.arange(-1.0, 2.0)
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).flatten()


def points_to_boxes(points: torch.Tensor, way: str, scale: torch.Tensor | None = None) -> torch.Tensor:
    """The boxes that point sets stand for, in their units.

    Args:
        points: (..., 2 n).
        way: "moment" (mean and standard deviation, RepPoints, Sec. 4.2), "minmax" (all points) or "partial_minmax"
            (the first four).
        scale: (2,) logarithms by which "moment" multiplies the deviations in x and y.

    Returns:
        (..., 4), left, top, right and bottom.
    """
    if points.numel() == 0:  # of no candidates; torch warns about their deviations
        return points.new_zeros(*points.shape[:-1], 4)
    y, x = points[..., 0::2], points[..., 1::2]
    if way != "moment":
        last = 4 if way == "partial_minmax" else y.shape[-1]
        y, x = y[..., :last], x[..., :last]
        return torch.stack([x.amin(-1), y.amin(-1), x.amax(-1), y.amax(-1)], dim=-1)
    log_scale = scale * SCALE_GRADIENT + scale.detach() * (1 - SCALE_GRADIENT)
    middle = torch.stack([x.mean(-1), y.mean(-1)], dim=-1)
    half = torch.stack([x.std(-1), y.std(-1)], dim=-1) * log_scale.exp()
    return torch.cat([middle - half, middle + half], dim=-1)


class PointSetTransform(nn.Module):
    """From points to boxes in pixels, as detectron2's dense detectors expect of a ``box2box_transform``.

    Args:
        way: one of WAYS. Only "moment" has a parameter.
    """

    def __init__(self, way: str = "moment") -> None:
        super().__init__()
        if way not in WAYS:
            raise ValueError(f"MODEL.REPPOINTS.TRANSFORM must be one of {WAYS}, not {way!r}")
        self.way = way
        self.moment_transfer = nn.Parameter(torch.zeros(2)) if way == "moment" else None

    def apply_deltas(self, points: torch.Tensor, locations: torch.Tensor) -> torch.Tensor:
        """Boxes (..., 4) of points (..., 2 n) at locations (..., 4), squares with the sides of a stride; in float32."""
        return self.decode(self.corners(points), locations.float())

    def corners(self, points: torch.Tensor) -> torch.Tensor:
        """Left, top, right and bottom (..., 4) of points (..., 2 n), in their units."""
        return points_to_boxes(points.float(), self.way, self.moment_transfer)

    def decode(self, corners: torch.Tensor, locations: torch.Tensor) -> torch.Tensor:
        """Boxes (..., 4) of :meth:`corners` at locations (..., 4)."""
        middle, stride = _middle_and_stride(locations)
        return corners * stride + middle

    def get_deltas(self, locations: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """The :meth:`corners` that boxes (..., 4) have at locations (..., 4)."""
        middle, stride = _middle_and_stride(locations)
        return (boxes - middle) / stride


def _middle_and_stride(locations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., 4) each: the centre and the sides of squares (..., 4), twice."""
    low, high = locations[..., :2], locations[..., 2:]
    return ((low + high) / 2).tile(2), (high - low).tile(2)


def nearest_points(locations: torch.Tensor, boxes: torch.Tensor, scale: float = 4.0, count: int = 1) -> torch.Tensor:
    """Objects of the first stage: each takes the ``count`` points nearest to its centre on the level of its size.

    The level's stride is sqrt(w h) / ``scale`` rounded down to a power of two, within what there is. Of several
    objects that want a point the nearest gets it, the first of them if equally near, and an object may end without
    one. Distances are counted in the object's sides.

    Args:
        locations: (R, 4) of all levels, squares with the sides of a stride.
        boxes: (M, 4).

    Returns:
        (R,) int64: index of the object, -1 where there is none.
    """
    if len(boxes) == 0:
        return torch.full((len(locations),), -1, dtype=torch.int64, device=locations.device)
    strides = (locations[:, 2] - locations[:, 0]).log2().round().long()
    sides = boxes[:, 2:] - boxes[:, :2]
    # The least positive number: a box without area goes to the finest level and claims points of its place alone.
    sides = sides.clamp(min=torch.finfo(sides.dtype).tiny)
    level = ((sides / scale).log2().sum(dim=1) / 2).floor().long().clamp(strides.min(), strides.max())
    middle = (locations[:, :2] + locations[:, 2:]) / 2
    away = ((middle[None] - (boxes[:, None, :2] + boxes[:, None, 2:]) / 2) / sides[:, None]).norm(dim=2)
    away = away.masked_fill(strides[None] != level[:, None], float("inf"))
    chosen = away.topk(min(count, len(locations)), dim=1, largest=False)
    claim = torch.full_like(away, float("inf")).scatter_(1, chosen.indices, chosen.values)
    nearest = claim.amin(dim=0)
    number = torch.arange(len(boxes), device=locations.device)[:, None]
    owner = torch.where(claim == nearest, number, len(boxes)).amin(dim=0)
    return torch.where(nearest.isinf(), -1, owner)


def best_overlaps(found: torch.Tensor, boxes: torch.Tensor, foreground: float, background: float) -> torch.Tensor:
    """Objects of the second stage: by the overlap of the boxes ``found`` in the first.

    At an IoU of ``foreground`` or more a box stands for the object that it overlaps most, below ``background`` for
    none. Besides, each object gets all the boxes that overlap it as much as any does, the last object if several
    want one.

    Args:
        found: (R, 4). boxes: (M, 4) of the objects.

    Returns:
        (R,) int64: index of the object, -1 for background, -2 between the thresholds.
    """
    if len(boxes) == 0:
        return torch.full((len(found),), -1, dtype=torch.int64, device=found.device)
    iou = pairwise_iou(Boxes(boxes), Boxes(found))
    value, owner = iou.max(dim=0)
    owner = torch.where(value >= foreground, owner, torch.where(value < background, -1, -2))
    best = iou.amax(dim=1, keepdim=True)
    # Where nothing overlaps an object, every box overlaps it "as much as any does".
    tied = (iou == best) & (best > 0)
    number = torch.arange(len(boxes), device=found.device)[:, None]
    last = torch.where(tied, number, -1).amax(dim=0)
    return torch.where(last >= 0, last, owner)


def inside_image(locations: torch.Tensor, image_size: tuple[int, int], divisibility: int) -> torch.Tensor:
    """Which points (R,) lie in the image of ``image_size`` (h, w) completed to multiples of ``divisibility``."""
    height, width = (-(-side // divisibility) * divisibility for side in image_size)
    middle = (locations[:, :2] + locations[:, 2:]) / 2
    return (middle[:, 0] < width) & (middle[:, 1] < height)
