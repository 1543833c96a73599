"""Instance masks: as bitmaps, as polygons, and as predictions inside boxes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import torch
from torch import Tensor
from torchvision.ops import roi_align

from .boxes import Boxes


def polygon_area(x: np.ndarray, y: np.ndarray) -> float:
    """Area enclosed by a polygon with vertices (x, y), by the shoelace formula."""
    return 0.5 * np.abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))


def polygons_to_bitmask(polygons: list[np.ndarray], height: int, width: int) -> np.ndarray:
    """Rasterize the union of polygons [x0, y0, x1, y1, ...] (pixels) as COCO does.

    Returns:
        bool array (height, width).
    """
    if len(polygons) == 0:
        return np.zeros((height, width), dtype=bool)
    runs = coco_mask.frPyObjects([np.asarray(p, dtype=np.float64) for p in polygons], height, width)
    return coco_mask.decode(coco_mask.merge(runs)).astype(bool)


class BitMasks:
    """N bitmaps of one image.

    Attributes:
        tensor: bool, shape (N, H, W).
    """

    def __init__(self, tensor: Tensor | np.ndarray):
        """
        Args:
            tensor: (N, H, W); anything but 0 means foreground.
        """
        tensor = torch.as_tensor(tensor).to(torch.bool)
        if tensor.dim() != 3:
            raise ValueError(f"BitMasks needs shape (N, H, W), got {tuple(tensor.shape)}")
        self.tensor = tensor

    @property
    def image_size(self) -> torch.Size:
        """(height, width) in pixels."""
        return self.tensor.shape[1:]

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def to(self, *args: Any, **kwargs: Any) -> "BitMasks":
        """The same masks after `Tensor.to`."""
        return BitMasks(self.tensor.to(*args, **kwargs))

    @staticmethod
    def from_polygon_masks(
        polygon_masks: "PolygonMasks" | list[list[np.ndarray]], height: int, width: int
    ) -> "BitMasks":
        """Rasterize polygons (image pixels) in an image of the given size."""
        polygons = polygon_masks.polygons if isinstance(polygon_masks, PolygonMasks) else polygon_masks
        if len(polygons) == 0:
            return BitMasks(torch.empty(0, height, width, dtype=torch.bool))
        return BitMasks(np.stack([polygons_to_bitmask(p, height, width) for p in polygons]))

    def nonempty(self) -> Tensor:
        """Which masks have foreground; bool, shape (N,)."""
        return self.tensor.flatten(1).any(dim=1)

    def get_bounding_boxes(self) -> Boxes:
        """Tight boxes around the foreground; (0, 0, 0, 0) for an empty mask."""
        cols, rows = self.tensor.any(dim=1), self.tensor.any(dim=2)
        sides = [f(hits) for f in (_first, _end) for hits in (cols, rows)]
        return Boxes(torch.stack(sides, dim=1))

    def crop_and_resize(self, boxes: Tensor, mask_size: int) -> Tensor:
        """Cut mask i at box i and resample it to `mask_size` x `mask_size`.

        Args:
            boxes: (N, 4) in image pixels.

        Returns:
            bool, shape (N, mask_size, mask_size), on the device of `boxes`.
        """
        _check_one_box_each(self, boxes)
        device = boxes.device
        index = torch.arange(len(boxes), device=device, dtype=boxes.dtype)[:, None]
        rois = torch.cat([index, boxes], dim=1)
        maps = self.tensor.to(device=device, dtype=torch.float32)[:, None]
        return roi_align(maps, rois, mask_size, aligned=True)[:, 0] >= 0.5

    @staticmethod
    def cat(bitmasks_list: list["BitMasks"]) -> "BitMasks":
        """One object with the masks of all."""
        if len(bitmasks_list) == 0 or not all(isinstance(m, BitMasks) for m in bitmasks_list):
            raise TypeError("BitMasks.cat takes at least one BitMasks, and nothing else")
        return BitMasks(torch.cat([m.tensor for m in bitmasks_list]))

    def __getitem__(self, item: int | slice | Tensor) -> "BitMasks":
        """The selected masks; always a BitMasks."""
        return BitMasks(_select(self.tensor, item))

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.tensor

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def __repr__(self) -> str:
        return f"BitMasks(num_instances={len(self)})"


class PolygonMasks:
    """N masks, each the union of polygons.

    Attributes:
        polygons: for each instance a list of float64 arrays [x0, y0, x1, y1, ...] in pixels.
    """

    def __init__(self, polygons: list[list[Tensor | np.ndarray]]):
        if not isinstance(polygons, list):
            raise ValueError(f"PolygonMasks needs a list of lists of polygons, not {type(polygons)}")
        self.polygons: list[list[np.ndarray]] = [_as_polygons(p) for p in polygons]

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def to(self, *args: Any, **kwargs: Any) -> "PolygonMasks":
        """Polygons stay on the CPU: returns the object itself."""
        return self

    def area(self) -> Tensor:
        """Area of each instance in square pixels, shape (N,); overlap of polygons counts twice."""
        areas = [sum(polygon_area(p[0::2], p[1::2]) for p in instance) for instance in self.polygons]
        return torch.tensor(areas)

    def nonempty(self) -> Tensor:
        """Which instances have a polygon; bool, shape (N,)."""
        return torch.tensor([len(instance) > 0 for instance in self.polygons], dtype=torch.bool)

    def get_bounding_boxes(self) -> Boxes:
        """Tight boxes around the vertices; (0, 0, 0, 0) for an instance without polygon.

        As with detectron2, the far corner is never below 0, where an image begins.
        """
        boxes = np.zeros((len(self), 4), dtype=np.float32)
        for box, instance in zip(boxes, self.polygons):
            if instance:
                vertices = np.concatenate(instance).reshape(-1, 2)
                box[:2], box[2:] = vertices.min(axis=0), vertices.max(axis=0, initial=0)
        return Boxes(torch.from_numpy(boxes))

    def crop_and_resize(self, boxes: Tensor, mask_size: int) -> Tensor:
        """Rasterize instance i in box i on a grid of `mask_size` x `mask_size`.

        Args:
            boxes: (N, 4) in the pixels of the polygons.

        Returns:
            bool, shape (N, mask_size, mask_size), on the device of `boxes`.
        """
        _check_one_box_each(self, boxes)
        if len(self) == 0:
            return torch.empty(0, mask_size, mask_size, dtype=torch.bool, device=boxes.device)
        crops = np.empty((len(self), mask_size, mask_size), dtype=bool)
        for crop, instance, box in zip(crops, self.polygons, boxes.cpu().float().numpy()):
            # Boxes thinner than a tenth of a pixel would blow the polygon up beyond the rasterizer's range. Single
            # precision, as detectron2's: the rasterizer rounds, and corners on whole pixels lie on its borders.
            scale = np.float32(mask_size) / np.maximum(box[2:] - box[:2], np.float32(0.1))
            moved = [((p.reshape(-1, 2) - box[:2]) * scale).ravel() for p in instance]
            crop[:] = polygons_to_bitmask(moved, mask_size, mask_size)
        return torch.from_numpy(crops).to(boxes.device)

    @staticmethod
    def cat(polymasks_list: list["PolygonMasks"]) -> "PolygonMasks":
        """One object with the instances of all."""
        if len(polymasks_list) == 0 or not all(isinstance(m, PolygonMasks) for m in polymasks_list):
            raise TypeError("PolygonMasks.cat takes at least one PolygonMasks, and nothing else")
        return PolygonMasks([instance for m in polymasks_list for instance in m.polygons])

    def __getitem__(self, item: int | slice | list[int] | Tensor) -> "PolygonMasks":
        """The instances at an index, a slice, indices or a bool mask."""
        if isinstance(item, slice):
            return PolygonMasks(self.polygons[item])
        index = np.asarray(item.cpu() if isinstance(item, Tensor) else item)
        if index.size == 0:
            return PolygonMasks([])
        if index.dtype == bool:
            if index.shape != (len(self),):
                raise IndexError(f"A mask of shape {index.shape} cannot select from {len(self)} instances")
            index = index.nonzero()[0]
        if index.ndim > 1 or not np.issubdtype(index.dtype, np.integer):
            raise IndexError(f"PolygonMasks cannot be indexed with {item!r}")
        return PolygonMasks([self.polygons[i] for i in np.atleast_1d(index)])

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        return iter(self.polygons)

    def __len__(self) -> int:
        return len(self.polygons)

    def __repr__(self) -> str:
        return f"PolygonMasks(num_instances={len(self)})"


class ROIMasks:
    """N soft masks, each of which covers a box that is kept elsewhere.

    Attributes:
        tensor: (N, M, M), foreground probabilities.
    """

    def __init__(self, tensor: Tensor):
        if tensor.dim() != 3:
            raise ValueError(f"ROIMasks needs shape (N, M, M), got {tuple(tensor.shape)}")
        self.tensor = tensor

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def to(self, device: torch.device) -> "ROIMasks":
        """The same masks on `device`."""
        return ROIMasks(self.tensor.to(device))

    def to_bitmasks(self, boxes: Boxes, height: int, width: int, threshold: float = 0.5) -> BitMasks:
        """Paste mask i over box i (image pixels) and cut at `threshold`."""
        from detectron2.layers.mask_ops import paste_masks_in_image  # layers do not import structures

        return BitMasks(paste_masks_in_image(self.tensor, boxes.tensor, (height, width), threshold))

    def __getitem__(self, item: int | slice | Tensor) -> "ROIMasks":
        """The selected masks; always a ROIMasks."""
        return ROIMasks(_select(self.tensor, item))

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def __repr__(self) -> str:
        return f"ROIMasks(num_instances={len(self)})"


def _first(hits: Tensor) -> Tensor:
    """Index of the first True of each row of (N, L); 0 for a row without."""
    return hits.int().argmax(dim=1)


def _end(hits: Tensor) -> Tensor:
    """One past the index of the last True of each row of (N, L); 0 for a row without."""
    last = hits.shape[1] - hits.flip(1).int().argmax(dim=1)
    return last * hits.any(dim=1)


def _select(tensor: Tensor, item: int | slice | Tensor) -> Tensor:
    """Rows of a (N, H, W) tensor; a single one keeps its leading axis."""
    rows = tensor[item].unsqueeze(0) if isinstance(item, int) else tensor[item]
    if rows.dim() != 3:
        raise IndexError(f"Index {item!r} does not select whole masks of shape {tuple(tensor.shape[1:])}")
    return rows


def _check_one_box_each(masks: BitMasks | PolygonMasks, boxes: Tensor) -> None:
    if len(boxes) != len(masks):
        raise ValueError(f"Got {len(boxes)} boxes for {len(masks)} masks")


def _as_polygons(instance: Any) -> list[np.ndarray]:
    """The polygons of one instance as float64 arrays."""
    if not isinstance(instance, list):
        raise ValueError(f"An instance must be a list of polygons, not {type(instance)}")
    polygons = [np.asarray(p.cpu() if isinstance(p, Tensor) else p, dtype=np.float64) for p in instance]
    for p in polygons:
        if p.ndim != 1 or p.size % 2 or p.size < 6:
            raise ValueError(f"A polygon needs x, y of at least three vertices in a row, got shape {p.shape}")
    return polygons
