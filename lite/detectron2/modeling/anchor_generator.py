"""Anchor boxes of dense detectors and of region proposal networks."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes
from detectron2.utils.registry import Registry

__all__ = ["ANCHOR_GENERATOR_REGISTRY", "BufferList", "DefaultAnchorGenerator", "build_anchor_generator"]

ANCHOR_GENERATOR_REGISTRY = Registry("ANCHOR_GENERATOR")
ANCHOR_GENERATOR_REGISTRY.__doc__ = """
Anchor generators by name; each is called as ``constructor(cfg, input_shape)`` with a list of :class:`ShapeSpec`.
"""


class BufferList(nn.Module):
    """A sequence of tensors that follow the module to its device and dtype but stay out of the state_dict."""

    def __init__(self, buffers: Sequence[torch.Tensor]):
        super().__init__()
        for i, tensor in enumerate(buffers):
            self.register_buffer(f"{i}", tensor, persistent=False)

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self._buffers.values())


def _per_level(values: Sequence, num_levels: int, name: str) -> list[Sequence[float]]:
    """Give each level its list: ``values`` is one list for all, a list with one list, or one list a level."""
    if len(values) == 0:
        raise ValueError(f"anchor generator: {name} is empty")
    if not isinstance(values[0], Sequence):
        return [values] * num_levels
    if len(values) == 1:
        return [values[0]] * num_levels
    if len(values) != num_levels:
        raise ValueError(f"anchor generator: {name} has {len(values)} lists for {num_levels} feature maps")
    return list(values)


@ANCHOR_GENERATOR_REGISTRY.register()
class DefaultAnchorGenerator(nn.Module):
    """Boxes of fixed sizes and aspect ratios at every cell of every feature map (Ren et al., arXiv:1506.01497)."""

    box_dim: int = 4
    """Numbers that describe one box."""

    @configurable
    def __init__(self, *, sizes, aspect_ratios, strides: Sequence[int], offset: float = 0.5):
        """
        Args:
            sizes: square roots of the anchor areas in input pixels; a list for all levels or a list of lists.
            aspect_ratios: height / width, given like ``sizes``.
            strides: input pixels per cell of each feature map.
            offset: position of the first anchor centre in units of the stride, in [0, 1).
        """
        super().__init__()
        if not 0.0 <= offset < 1.0:
            raise ValueError(f"anchor generator: offset must lie in [0, 1), not {offset}")
        self.strides, self.num_features, self.offset = strides, len(strides), offset
        self.cell_anchors = self._calculate_anchors(sizes, aspect_ratios)

    @classmethod
    def from_config(cls, cfg, input_shape: list[ShapeSpec]) -> dict:
        node = cfg.MODEL.ANCHOR_GENERATOR
        return {
            "offset": node.OFFSET, "sizes": node.SIZES, "aspect_ratios": node.ASPECT_RATIOS,
            "strides": [shape.stride for shape in input_shape],
        }

    def _calculate_anchors(self, sizes, aspect_ratios) -> BufferList:
        per_level = zip(
            _per_level(sizes, self.num_features, "sizes"),
            _per_level(aspect_ratios, self.num_features, "aspect_ratios"),
        )
        return BufferList([self.generate_cell_anchors(s, a).float() for s, a in per_level])

    @property
    def num_anchors(self) -> list[int]:
        """Anchors per cell of each feature map."""
        return [len(cell) for cell in self.cell_anchors]

    @property
    def num_cell_anchors(self) -> list[int]:
        """Older name of :attr:`num_anchors`."""
        return self.num_anchors

    def generate_cell_anchors(
        self, sizes=(32, 64, 128, 256, 512), aspect_ratios=(0.5, 1, 2)
    ) -> torch.Tensor:
        """Anchors of one cell around (0, 0): (len(sizes) * len(aspect_ratios), 4), XYXY, sizes outermost."""
        half_sizes = []
        for size in sizes:
            for ratio in aspect_ratios:
                width = math.sqrt(size**2.0 / ratio)
                half_sizes.append((width / 2.0, ratio * width / 2.0))
        half = torch.tensor(half_sizes)
        return torch.cat((-half, half), dim=1)

    def _grid_anchors(self, grid_sizes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """(H, W) of each feature map -> (H * W * A, 4) anchors in input pixels, the A of a cell side by side."""
        result = []
        for (height, width), stride, cell in zip(grid_sizes, self.strides, self.cell_anchors):
            first = self.offset * stride
            xs = torch.arange(first, width * stride, step=stride, dtype=torch.float32, device=cell.device)
            ys = torch.arange(first, height * stride, step=stride, dtype=torch.float32, device=cell.device)
            y, x = torch.meshgrid(ys, xs, indexing="ij")
            centers = torch.stack((x, y, x, y), dim=-1).view(-1, 1, 4)
            result.append((centers + cell).view(-1, 4))
        return result

    def forward(self, features: list[torch.Tensor]) -> list[Boxes]:
        """Anchors of each feature map (N, C, H, W): boxes (H * W * A, 4), the same for every image."""
        return [Boxes(anchors) for anchors in self._grid_anchors([f.shape[-2:] for f in features])]


def build_anchor_generator(cfg, input_shape: list[ShapeSpec]) -> nn.Module:
    """Build the anchor generator that ``cfg.MODEL.ANCHOR_GENERATOR.NAME`` names."""
    return ANCHOR_GENERATOR_REGISTRY.get(cfg.MODEL.ANCHOR_GENERATOR.NAME)(cfg, input_shape)
