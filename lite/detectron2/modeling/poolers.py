"""Pool a feature pyramid inside boxes, each box from the level that fits its size."""

import itertools
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import RoIPool

from detectron2.layers import ROIAlign
from detectron2.structures import Boxes

__all__ = ["ROIPooler", "assign_boxes_to_levels", "convert_boxes_to_pooler_format"]

_POOLERS = {
    "ROIAlign": partial(ROIAlign, aligned=False),
    "ROIAlignV2": partial(ROIAlign, aligned=True),
    "ROIPool": lambda size, spatial_scale, sampling_ratio: RoIPool(size, spatial_scale),
}


def assign_boxes_to_levels(
    box_lists: list[Boxes], min_level: int, max_level: int, canonical_box_size: int, canonical_level: int
) -> torch.Tensor:
    """Level of every box, floor(canonical_level + log2(sqrt(area) / canonical_box_size)) within the two limits
    (Lin et al., arXiv:1612.03144, eq. 1).

    Returns:
        (M,) int64 for the M boxes of all images, counted from ``min_level``.
    """
    sizes = torch.cat([boxes.area() for boxes in box_lists]).sqrt()
    # A box of exactly a canonical size must not fall below it by rounding; one without area has a finite level.
    octave = torch.log2(sizes / canonical_box_size + 1e-8)
    return (canonical_level + octave).floor().clamp(min_level, max_level).long() - min_level


def convert_boxes_to_pooler_format(box_lists: list[Boxes]) -> torch.Tensor:
    """The M boxes of all images as (M, 5): index of the image, then the corners."""
    return torch.cat([F.pad(boxes.tensor, (1, 0), value=i) for i, boxes in enumerate(box_lists)])


class ROIPooler(nn.Module):
    """Fixed-size features of boxes from a list of feature maps.

    Args:
        output_size: height and width of the result in cells, or one number for both.
        scales: 1 / stride of every map, from fine to coarse; strides are powers of two that double each time.
        sampling_ratio: see :class:`ROIAlign`.
        pooler_type: "ROIAlignV2", "ROIAlign" (without the shift by half a cell) or "ROIPool".
        canonical_box_size, canonical_level: a box with an area of the square of this size (pixels of the network's
            input) goes to this level, that is, the map of stride ``2**canonical_level``.
    """

    def __init__(
        self, output_size: int | tuple[int, int], scales: list[float], sampling_ratio: int, pooler_type: str,
        canonical_box_size: int = 224, canonical_level: int = 4,
    ):
        super().__init__()
        self.output_size = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
        if len(self.output_size) != 2:
            raise ValueError(f"ROIPooler: output_size must be one or two numbers, not {output_size}")
        if canonical_box_size <= 0:
            raise ValueError(f"ROIPooler: canonical_box_size must be positive, not {canonical_box_size}")
        if pooler_type not in _POOLERS:
            raise ValueError(f"ROIPooler: unknown pooler_type '{pooler_type}'; choose from {', '.join(_POOLERS)}")
        levels = _levels(scales)
        self.level_poolers = nn.ModuleList(
            _POOLERS[pooler_type](self.output_size, spatial_scale=scale, sampling_ratio=sampling_ratio)
            for scale in scales
        )
        self.min_level, self.max_level = levels[0], levels[-1]
        self.canonical_box_size, self.canonical_level = canonical_box_size, canonical_level

    def forward(self, x: list[torch.Tensor], box_lists: list[Boxes]) -> torch.Tensor:
        """
        Args:
            x: maps (N, C, H_l, W_l), as many as there are scales.
            box_lists: boxes of each of the N images, in pixels of the network's input.

        Returns:
            (M, C, *output_size) for the M boxes of all images, image by image.
        """
        if len(x) != len(self.level_poolers):
            raise ValueError(f"ROIPooler: got {len(x)} feature maps for {len(self.level_poolers)} scales")
        if len(x[0]) != len(box_lists):
            raise ValueError(f"ROIPooler: got boxes of {len(box_lists)} images for a batch of {len(x[0])}")
        if not any(len(boxes) for boxes in box_lists):
            return x[0].new_zeros(0, x[0].shape[1], *self.output_size)
        rois = convert_boxes_to_pooler_format(box_lists)
        if len(x) == 1:
            return self.level_poolers[0](x[0], rois.to(x[0].dtype))

        levels = assign_boxes_to_levels(
            box_lists, self.min_level, self.max_level, self.canonical_box_size, self.canonical_level
        )
        # Boxes are pooled sorted by level and put back: one wait for the device, not one a level.
        order = levels.argsort(stable=True)
        counts = levels.bincount(minlength=len(x)).tolist()
        parts = rois[order].split(counts)
        pooled = torch.cat([
            pool(features, part.to(features.dtype)) for pool, features, part in zip(self.level_poolers, x, parts)
        ])
        return torch.empty_like(pooled).index_copy_(0, order, pooled)


def _levels(scales: list[float]) -> list[int]:
    """log2 of the strides; ValueError unless they are consecutive whole numbers."""
    exact = [-math.log2(scale) for scale in scales]
    levels = [round(level) for level in exact]
    whole = all(math.isclose(a, b, abs_tol=1e-9) for a, b in zip(exact, levels))
    if not levels or not whole or levels[0] < 0 or any(b != a + 1 for a, b in itertools.pairwise(levels)):
        strides = ", ".join(f"{1 / scale:g}" for scale in scales)
        raise ValueError(f"ROIPooler: strides must be powers of two that double each time, not {strides or 'none'}")
    return levels
