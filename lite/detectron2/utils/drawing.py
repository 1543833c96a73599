"""Single shapes over an image, in image coordinates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib.colors as mplc
import numpy as np
import torch

from detectron2.structures import BitMasks, Boxes, Keypoints

from . import canvas as draw
from .canvas import VisImage
from .colormap import random_color
from .generic_mask import GenericMask

_DASHES = {"-": None, "--": (4.0, 3.0), ":": (1.0, 1.5)}
"""Line styles as the lengths of marks and gaps, in line widths."""


class Drawing:
    """Draws boxes, lines, masks and text over an image.

    All coordinates are in pixels of the image; the picture is `scale` times as large. Colors are whatever
    matplotlib takes for a color, for example "g" or RGB in [0, 1]. The draw methods return the picture.

    Attributes:
        img: uint8 RGB (H, W, 3), the image without drawings.
        output: the picture so far.
    """

    def __init__(self, img_rgb: np.ndarray, scale: float = 1.0, font_size_scale: float = 1.0):
        """
        Args:
            img_rgb: RGB (H, W, 3), values in [0, 255].
            scale: pixels of the picture per pixel of the image.
            font_size_scale: factor for the size of text, which otherwise follows that of the image.
        """
        img_rgb = np.asarray(img_rgb)
        if img_rgb.ndim != 3 or img_rgb.shape[2] != 3:
            raise ValueError(f"The image to draw on must have shape (H, W, 3), got {img_rgb.shape}")
        self.img = np.clip(img_rgb, 0, 255).astype(np.uint8)
        self.output = VisImage(self.img, scale)
        # In pixels of the image; at least 11 pixels of the picture, below which text is hard to read.
        side = np.sqrt(self.output.height * self.output.width)
        self._default_font_size = max(side / 55, 11 / scale) * font_size_scale
        self._line_width = max(side / 300, 1 / scale)

    def get_output(self) -> VisImage:
        """The picture so far."""
        return self.output

    def draw_text(
        self,
        text: str,
        position: tuple[float, float],
        *,
        font_size: float | None = None,
        color: Any = "g",
        horizontal_alignment: str = "center",
        rotation: float = 0,
    ) -> VisImage:
        """Write on a dark ground.

        Args:
            position: x and y of the text's upper edge, at its left, center or right.
            font_size: height of a line in pixels of the image.
            horizontal_alignment: "left", "center" or "right".
            rotation: degrees, counterclockwise.
        """
        scale = self.output.scale
        mask = draw.text_mask(text, self._font_pixels(font_size), rotation)
        height, width = mask.shape
        share = {"left": 0.0, "center": 0.5, "right": 1.0}[horizontal_alignment]
        x, y = round(position[0] * scale - share * width), round(position[1] * scale)
        draw.fill_rectangle(self.output.canvas, (x - 2, y, x + width + 2, y + height), (0, 0, 0), 0.7)
        draw.blend(self.output.canvas, mask, (x, y), _lighten(mplc.to_rgb(color)), 1.0)
        return self.output

    def draw_box(
        self, box_coord: Iterable[float], alpha: float = 0.5, edge_color: Any = "g", line_style: str = "-"
    ) -> VisImage:
        """Outline a box (x0, y0, x1, y1). `line_style` is "-", "--" or ":"."""
        box = np.asarray([float(v) for v in box_coord]) * self.output.scale
        width, color = self._stroke_width(None), mplc.to_rgb(edge_color)
        if line_style == "-":
            draw.frame_rectangle(self.output.canvas, box, color, width, alpha)
        else:
            corners = box[[[0, 1], [2, 1], [2, 3], [0, 3]]]
            self._stroke(corners, color, width, alpha, closed=True, line_style=line_style)
        return self.output

    def draw_circle(self, circle_coord: tuple[float, float], color: Any, radius: float = 3) -> VisImage:
        """Fill a circle around (x, y)."""
        scale = self.output.scale
        center = (float(circle_coord[0]) * scale, float(circle_coord[1]) * scale)
        draw.disc(self.output.canvas, center, radius * scale, mplc.to_rgb(color))
        return self.output

    def draw_line(
        self,
        x_data: Sequence[float],
        y_data: Sequence[float],
        color: Any,
        linestyle: str = "-",
        linewidth: float | None = None,
    ) -> VisImage:
        """Connect points. `linewidth` is in pixels of the image."""
        points = np.stack([to_array(x_data), to_array(y_data)], axis=1) * self.output.scale
        self._stroke(points, mplc.to_rgb(color), self._stroke_width(linewidth), 1.0, False, linestyle)
        return self.output

    def draw_polygon(self, segment: Any, color: Any, edge_color: Any = None, alpha: float = 0.5) -> VisImage:
        """Fill a polygon of vertices (n, 2) and outline it."""
        points = to_array(segment).reshape(-1, 2) * self.output.scale
        draw.fill_polygons(self.output.canvas, [points], mplc.to_rgb(color), alpha)
        edge = mplc.to_rgb(color if edge_color is None else edge_color)
        self._stroke(points, edge, self._stroke_width(None), 1.0, closed=True)
        return self.output

    def draw_binary_mask(
        self,
        binary_mask: np.ndarray,
        color: Any = None,
        *,
        edge_color: Any = None,
        text: str | None = None,
        alpha: float = 0.5,
        area_threshold: int = 10,
    ) -> VisImage:
        """Fill a bitmap (H, W), outline it with `edge_color` if given, and write `text` on it.

        Masks of fewer than `area_threshold` pixels are left out.
        """
        color = mplc.to_rgb(random_color(rgb=True, maximum=1) if color is None else color)
        mask = GenericMask(np.asarray(binary_mask), self.output.height, self.output.width)
        if mask.area() >= area_threshold:
            self._draw_mask(mask, color, None if edge_color is None else mplc.to_rgb(edge_color), alpha)
            if text is not None:
                self._draw_label(text, mask.bbox(), color, [])
        return self.output

    def _draw_mask(self, mask: GenericMask, color: draw.Color, edge: draw.Color | None, alpha: float) -> None:
        """Fill a mask; outline it in `edge` unless that is None."""
        picture, scale = self.output.canvas, self.output.scale
        outline = [p.reshape(-1, 2) * scale for p in mask.polygons]
        if mask.is_vector:
            draw.fill_polygons(picture, outline, color, alpha)
        else:
            draw.fill_mask(picture, mask.mask, scale, color, alpha)
        if edge is not None:
            draw.stroke(picture, outline, edge, self._stroke_width(self._line_width / 2), 0.9, closed=True)

    def _draw_label(self, text: str, box: np.ndarray, color: draw.Color, taken: list[draw.Window]) -> None:
        draw.tag(self.output.canvas, text, self._font_pixels(None), box * self.output.scale, color, taken)

    def _stroke(
        self,
        points: np.ndarray,
        color: draw.Color,
        width: int,
        alpha: float,
        closed: bool,
        line_style: str = "-",
    ) -> None:
        if line_style not in _DASHES:
            raise ValueError(f"Unknown line style {line_style!r}; known: {', '.join(_DASHES)}")
        dash = _DASHES[line_style] and tuple(length * width for length in _DASHES[line_style])
        draw.stroke(self.output.canvas, [points], color, width, alpha, closed, dash)

    def _stroke_width(self, width: float | None) -> int:
        """Pixels of the picture for a line of `width` pixels of the image."""
        return max(round((self._line_width if width is None else width) * self.output.scale), 1)

    def _font_pixels(self, font_size: float | None) -> int:
        # Callers give points; the canvas has 100 dots per inch.
        pixels = self._default_font_size if font_size is None else font_size * 100 / 72
        return max(round(pixels * self.output.scale), 1)


def to_array(value: Any) -> np.ndarray:
    """Structures, tensors on any device, and lists as numpy arrays."""
    if isinstance(value, (Boxes, BitMasks, Keypoints)):
        value = value.tensor
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    return np.asarray(value)


def _lighten(color: draw.Color) -> draw.Color:
    """The color, bright enough to be read on black."""
    peak = max(*color, 1e-3)
    return tuple(0.2 + 0.8 * channel / peak for channel in color)
