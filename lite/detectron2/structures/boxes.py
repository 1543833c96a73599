"""Axis-aligned boxes and the pairwise measures that detectors need."""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_area, clip_boxes_to_image

RawBoxes = list[float] | tuple[float, ...] | Tensor | np.ndarray


class BoxMode(IntEnum):
    """How the numbers of a box are to be read. The values are those stored in data-set dicts."""

    XYXY_ABS = 0
    """Left, top, right, bottom, in pixels."""
    XYWH_ABS = 1
    """Left, top, width, height, in pixels: COCO's convention."""
    XYXY_REL = 2
    """XYXY_ABS divided by the image size; a name only, `convert` refuses it."""
    XYWH_REL = 3
    """XYWH_ABS divided by the image size; a name only, `convert` refuses it."""
    XYWHA_ABS = 4
    """Rotated boxes (center, size, angle); a name only, `convert` refuses it."""

    @staticmethod
    def convert(box: RawBoxes, from_mode: "BoxMode", to_mode: "BoxMode") -> RawBoxes:
        """Re-express boxes in another mode.

        Args:
            box: four numbers as list, tuple, array or tensor, or an (N, 4) array or tensor.
            from_mode: mode of `box`.
            to_mode: mode of the result.

        Returns:
            The converted boxes in a container of the same type (and dtype); `box` itself when
            both modes are equal. The input is never changed.
        """
        if from_mode == to_mode:
            return box
        from_mode, to_mode = BoxMode(from_mode), BoxMode(to_mode)
        if {from_mode, to_mode} != {BoxMode.XYXY_ABS, BoxMode.XYWH_ABS}:
            raise NotImplementedError(f"No conversion of boxes from {from_mode.name} to {to_mode.name}")
        # Far corner and extent differ by the near corner, so the two directions differ in sign only.
        sign = 1 if from_mode == BoxMode.XYWH_ABS else -1
        if isinstance(box, (list, tuple)):
            if len(box) != 4:
                raise ValueError(f"A box has 4 numbers, got {len(box)}: {box!r}")
            x, y, a, b = box
            return type(box)((x, y, a + sign * x, b + sign * y))
        if box.shape[-1:] != (4,):
            raise ValueError(f"Boxes must have 4 columns, got shape {tuple(box.shape)}")
        out = box.clone() if isinstance(box, Tensor) else np.array(box)
        out[..., 2:] += sign * out[..., :2]
        return out


class Boxes:
    """N boxes in pixels, as corners (x0, y0, x1, y1).

    Attributes:
        tensor: float32 tensor of shape (N, 4).
    """

    def __init__(self, tensor: Tensor):
        """
        Args:
            tensor: (N, 4) tensor, or anything `torch.as_tensor` takes. Other dtypes become float32;
                an empty input of any shape becomes (0, 4).
        """
        tensor = torch.as_tensor(tensor, dtype=torch.float32)
        if tensor.numel() == 0:
            # A reshape (not a new tensor) keeps the result connected to the graph.
            tensor = tensor.reshape(0, 4)
        if tensor.dim() != 2 or tensor.shape[1] != 4:
            raise ValueError(f"Boxes needs a tensor of shape (N, 4), got {tuple(tensor.shape)}")
        self.tensor = tensor

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def clone(self) -> "Boxes":
        """A copy with its own memory."""
        return Boxes(self.tensor.clone())

    def to(self, device: torch.device) -> "Boxes":
        """The same boxes on `device`."""
        return Boxes(self.tensor.to(device=device))

    def area(self) -> Tensor:
        """Area of each box in square pixels, shape (N,)."""
        return box_area(self.tensor)

    def clip(self, box_size: tuple[int, int]) -> None:
        """Move every corner into the image of `box_size` (height, width), in place.

        Raises:
            FloatingPointError: a coordinate is infinite or NaN.
        """
        if not torch.isfinite(self.tensor).all():
            raise FloatingPointError("Boxes to clip hold infinite or NaN coordinates")
        self.tensor = clip_boxes_to_image(self.tensor, box_size)

    def nonempty(self, threshold: float = 0.0) -> Tensor:
        """Which boxes are wider and higher than `threshold` pixels; bool, shape (N,)."""
        extent = self.tensor[:, 2:] - self.tensor[:, :2]
        return (extent[:, 0] > threshold) & (extent[:, 1] > threshold)

    def inside_box(self, box_size: tuple[int, int], boundary_threshold: int = 0) -> Tensor:
        """Which boxes lie in the image of `box_size` (height, width) grown by `boundary_threshold` pixels
        on each side; bool, shape (N,). The far border is exclusive."""
        height, width = box_size
        x0, y0, x1, y1 = self.tensor.unbind(dim=1)
        near = (x0 >= -boundary_threshold) & (y0 >= -boundary_threshold)
        far = (x1 < width + boundary_threshold) & (y1 < height + boundary_threshold)
        return near & far

    def get_centers(self) -> Tensor:
        """Centers (x, y), shape (N, 2)."""
        return (self.tensor[:, :2] + self.tensor[:, 2:]) / 2

    def scale(self, scale_x: float, scale_y: float) -> None:
        """Multiply the x and y coordinates, in place."""
        self.tensor[:, 0::2] *= scale_x
        self.tensor[:, 1::2] *= scale_y

    @classmethod
    def cat(cls, boxes_list: list["Boxes"]) -> "Boxes":
        """One Boxes with the rows of all. An empty list gives zero boxes."""
        if not isinstance(boxes_list, (list, tuple)) or not all(isinstance(b, Boxes) for b in boxes_list):
            raise TypeError("Boxes.cat takes a list of Boxes")
        if len(boxes_list) == 0:
            return cls(torch.empty(0))
        return cls(torch.cat([b.tensor for b in boxes_list]))

    def __getitem__(self, item: int | slice | Tensor) -> "Boxes":
        """The boxes at an index, a slice, a bool mask or indices; always a Boxes."""
        if isinstance(item, int):
            return Boxes(self.tensor[item].unsqueeze(0))
        rows = self.tensor[item]
        if rows.dim() != 2:
            raise IndexError(f"Index {item!r} does not select rows of {len(self)} boxes")
        return Boxes(rows)

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.tensor

    def __repr__(self) -> str:
        return f"Boxes({self.tensor})"


def pairwise_intersection(boxes1: Boxes, boxes2: Boxes) -> Tensor:
    """Area shared by each pair, shape (N, M)."""
    a, b = boxes1.tensor, boxes2.tensor
    low = torch.maximum(a[:, None, :2], b[:, :2])
    high = torch.minimum(a[:, None, 2:], b[:, 2:])
    shared = (high - low).clamp(min=0)
    return shared[..., 0] * shared[..., 1]


def _ratio(shared: Tensor, whole: Tensor) -> Tensor:
    """shared / whole, and 0 where nothing is shared (also where `whole` is 0)."""
    return torch.where(shared > 0, shared / whole, shared.new_zeros(()))


def pairwise_iou(boxes1: Boxes, boxes2: Boxes) -> Tensor:
    """Intersection over union of each pair, shape (N, M); 0 for pairs without overlap."""
    shared = pairwise_intersection(boxes1, boxes2)
    return _ratio(shared, boxes1.area()[:, None] + boxes2.area() - shared)


def pairwise_ioa(boxes1: Boxes, boxes2: Boxes) -> Tensor:
    """Intersection over the area of the box in `boxes2`, shape (N, M)."""
    shared = pairwise_intersection(boxes1, boxes2)
    return _ratio(shared, boxes2.area().expand_as(shared))


def pairwise_point_box_distance(points: Tensor, boxes: Boxes) -> Tensor:
    """Signed distances from points (N, 2) to the left, top, right and bottom side of M boxes.

    Returns:
        (N, M, 4); all four are positive where the point is inside the box.
    """
    near = points[:, None] - boxes.tensor[:, :2]
    far = boxes.tensor[:, 2:] - points[:, None]
    return torch.cat([near, far], dim=2)


def matched_pairwise_iou(boxes1: Boxes, boxes2: Boxes) -> Tensor:
    """Intersection over union of the i-th box of each, shape (N,)."""
    if len(boxes1) != len(boxes2):
        raise ValueError(f"Matched boxes must be equally many, got {len(boxes1)} and {len(boxes2)}")
    a, b = boxes1.tensor, boxes2.tensor
    low, high = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])
    width, height = (high - low).clamp(min=0).unbind(dim=1)
    shared = width * height
    return shared / (boxes1.area() + boxes2.area() - shared)
