"""Antialiased drawing on RGB arrays: the few strokes that a picture of detections is made of.

Coordinates are those of the array, continuous: pixel (column 3, row 5) covers [3, 4] x [5, 6]. Colors are
RGB in [0, 1]. Everything draws in place, and only touches the pixels that it covers.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Sequence

import cv2
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

Color = Sequence[float]
Window = tuple[int, int, int, int]
"""Columns and rows x0, y0, x1, y1; the ends are exclusive."""

_SUBPIXEL_BITS = 4


class VisImage:
    """A picture to draw on.

    Attributes:
        canvas: uint8 RGB array (height * scale, width * scale, 3): the picture so far.
        width, height, scale: size of the image in pixels, and the magnification of the picture.
    """

    def __init__(self, img: np.ndarray, scale: float = 1.0):
        """
        Args:
            img: RGB (H, W, 3), values in [0, 255].
            scale: pixels of the picture per pixel of the image.
        """
        self.scale = scale
        self.height, self.width = img.shape[:2]
        self.reset_image(img)

    def reset_image(self, img: np.ndarray) -> None:
        """Start again from an image of the same size."""
        self.img = img
        # astype copies, so that drawing never changes the image.
        self.canvas = np.ascontiguousarray(np.clip(img, 0, 255).astype(np.uint8))
        if self.scale != 1.0:
            size = (max(int(self.width * self.scale + 0.01), 1), max(int(self.height * self.scale + 0.01), 1))
            how = cv2.INTER_AREA if self.scale < 1 else cv2.INTER_CUBIC
            self.canvas = cv2.resize(self.canvas, size, interpolation=how)

    def get_image(self) -> np.ndarray:
        """The picture so far, a copy: uint8 RGB."""
        return self.canvas.copy()

    def save(self, filepath: str) -> None:
        """Write the picture to a file; the ending of its name chooses the format."""
        Image.fromarray(self.canvas).save(filepath)


def blend(
    canvas: np.ndarray, coverage: np.ndarray, corner: tuple[int, int], color: Color, alpha: float
) -> None:
    """Mix a color into the canvas.

    Args:
        canvas: uint8 (H, W, 3).
        coverage: (h, w), bool or uint8 with 255 for full coverage; may reach over the canvas' border.
        corner: column and row of the canvas under the first element of `coverage`.
        alpha: opacity at full coverage.
    """
    x, y = corner
    x0, y0 = max(x, 0), max(y, 0)
    x1, y1 = min(x + coverage.shape[1], canvas.shape[1]), min(y + coverage.shape[0], canvas.shape[0])
    if x0 >= x1 or y0 >= y1:
        return
    coverage = coverage[y0 - y : y1 - y, x0 - x : x1 - x]
    full = 1.0 if coverage.dtype == bool else 255.0
    opacity = (coverage * np.float32(alpha / full))[..., None]
    region = canvas[y0:y1, x0:x1]
    paint = np.asarray(color, dtype=np.float32) * 255
    region[:] = (region + (paint - region) * opacity + 0.5).astype(np.uint8)


def fill_rectangle(canvas: np.ndarray, window: Window, color: Color, alpha: float = 1.0) -> None:
    """Fill whole pixels."""
    x0, y0, x1, y1 = window
    blend(canvas, np.ones((max(y1 - y0, 0), max(x1 - x0, 0)), dtype=bool), (x0, y0), color, alpha)


def frame_rectangle(
    canvas: np.ndarray, box: Sequence[float], color: Color, width: int = 1, alpha: float = 1.0
) -> None:
    """Outline a box with a line of `width` pixels that is centered on its sides.

    The line sits on whole pixels: straight lines look crisper so than antialiased.
    """
    # Lines beyond the canvas are out of sight wherever they are.
    limit = np.asarray(canvas.shape[1::-1]) + 2 * width
    corners = np.clip(np.sort(np.reshape(box, (2, 2)), axis=0), -2 * width, limit)
    (x0, y0), (x1, y1) = np.rint(corners - width / 2).astype(int).tolist()
    frame = np.ones((y1 - y0 + width, x1 - x0 + width), dtype=bool)
    frame[width:-width, width:-width] = False
    blend(canvas, frame, (x0, y0), color, alpha)


def fill_polygons(canvas: np.ndarray, polygons: list[np.ndarray], color: Color, alpha: float = 1.0) -> None:
    """Fill the union of polygons, each (n, 2)."""
    window = _window(canvas, polygons, margin=1)
    if window is not None:
        coverage = _layer(window)
        for points in _fixed_point(polygons, window):
            cv2.fillPoly(coverage, [points], 255, cv2.LINE_AA, _SUBPIXEL_BITS)
        blend(canvas, coverage, window[:2], color, alpha)


def fill_mask(canvas: np.ndarray, mask: np.ndarray, scale: float, color: Color, alpha: float = 1.0) -> None:
    """Fill a bitmap (h, w) with values in [0, 1], magnified by `scale` from the origin of the canvas."""
    x, y, w, h = cv2.boundingRect((mask > 0).astype(np.uint8))
    if w == 0:
        return
    coverage = (mask[y : y + h, x : x + w] * 255).astype(np.uint8)
    corner, end = (round(x * scale), round(y * scale)), (round((x + w) * scale), round((y + h) * scale))
    if scale != 1:
        size = (max(end[0] - corner[0], 1), max(end[1] - corner[1], 1))
        coverage = cv2.resize(coverage, size, interpolation=cv2.INTER_LINEAR if scale > 1 else cv2.INTER_AREA)
    blend(canvas, coverage, corner, color, alpha)


def stroke(
    canvas: np.ndarray,
    lines: list[np.ndarray],
    color: Color,
    width: int = 1,
    alpha: float = 1.0,
    closed: bool = False,
    dash: tuple[float, float] | None = None,
) -> None:
    """Draw polylines, each (n, 2), with `width` pixels; `dash` gives the lengths of marks and gaps."""
    if dash is not None:
        lines = [mark for line in lines for mark in _dashes(line, closed, *dash)]
        closed = False
    window = _window(canvas, lines, margin=width + 1)
    if window is not None:
        coverage = _layer(window)
        points = _fixed_point(lines, window)
        cv2.polylines(coverage, points, closed, 255, max(width, 1), cv2.LINE_AA, _SUBPIXEL_BITS)
        blend(canvas, coverage, window[:2], color, alpha)


def disc(
    canvas: np.ndarray, center: tuple[float, float], radius: float, color: Color, alpha: float = 1.0
) -> None:
    """Fill a circle."""
    angles = np.linspace(0, 2 * np.pi, 8 + 4 * int(radius + 1), endpoint=False)
    rim = np.stack([np.cos(angles), np.sin(angles)], axis=1) * radius + np.asarray(center, dtype=np.float64)
    fill_polygons(canvas, [rim], color, alpha)


def text_mask(text: str, size: int, rotation: float = 0) -> np.ndarray:
    """Coverage (uint8) of a text in a font of `size` pixels; the letters do not change the height."""
    font = _font(size)
    left, _, right, bottom = ImageDraw.Draw(Image.new("L", (1, 1))).textbbox((0, 0), text, font=font)
    left = min(left, 0)
    image = Image.new("L", (max(int(right - left), 1), max(int(bottom), sum(font.getmetrics()))))
    ImageDraw.Draw(image).text((-left, 0), text, fill=255, font=font)
    if rotation:
        image = image.rotate(rotation, resample=Image.BICUBIC, expand=True)
    return np.asarray(image)


def tag(
    canvas: np.ndarray, text: str, size: int, box: Sequence[float], color: Color, taken: list[Window]
) -> None:
    """Write a label on a ground of the given color at a corner of a box, off the places already taken.

    Args:
        size: of the font, in pixels.
        box: the box that is labeled.
        taken: windows of earlier labels; that of the new one is appended.
    """
    mask = text_mask(text, size)
    pad = max(size // 6, 1)
    window = _free_place(canvas, (mask.shape[1] + 2 * pad, mask.shape[0]), box, taken)
    taken.append(window)
    fill_rectangle(canvas, window, color, 0.85)
    # Relative luminance (Rec. 601) decides between black and white letters.
    bright = np.dot(color, (0.299, 0.587, 0.114)) > 0.55
    blend(canvas, mask, (window[0] + pad, window[1]), (0, 0, 0) if bright else (1, 1, 1), 1.0)


def _free_place(
    canvas: np.ndarray, size: tuple[int, int], box: Sequence[float], taken: list[Window]
) -> Window:
    """Where a label goes: the corner of the box, outside before inside, that hides least of others."""
    (width, height), (x0, y0, x1, y1) = size, (round(float(v)) for v in box)
    best, least = None, None
    for x, y in (
        (x0, y0 - height),
        (x0, y0),
        (x1 - width, y0 - height),
        (x0, y1),
        (x1 - width, y1),
        (x0, y1 - height),
    ):
        # A label that would leave the picture is pushed back into it.
        left = min(max(x, 0), max(canvas.shape[1] - width, 0))
        top = min(max(y, 0), max(canvas.shape[0] - height, 0))
        window = (left, top, left + width, top + height)
        cost = sum(_overlap(window, other) for other in taken) + (abs(left - x) + abs(top - y)) * height / 8
        if least is None or cost < least:
            best, least = window, cost
        if cost == 0:
            break
    return best


def _overlap(a: Window, b: Window) -> int:
    """Pixels that two windows share."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


@functools.lru_cache(maxsize=32)
def _font(size: int) -> ImageFont.FreeTypeFont:
    # matplotlib ships this font, hence it is there on every machine, and it covers many scripts.
    return ImageFont.truetype(
        os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size
    )


def _window(canvas: np.ndarray, lines: list[np.ndarray], margin: int) -> Window | None:
    """The part of the canvas that holds the points and `margin` pixels around them; None if there is none."""
    lines = [line for line in lines if len(line)]
    if not lines:
        return None
    points = np.concatenate(lines)
    limit = (canvas.shape[1], canvas.shape[0])
    low = np.clip(np.floor(points.min(axis=0)) - margin, 0, limit).astype(int)
    high = np.clip(np.ceil(points.max(axis=0)) + margin, 0, limit).astype(int)
    return (*low.tolist(), *high.tolist()) if (low < high).all() else None


def _layer(window: Window) -> np.ndarray:
    x0, y0, x1, y1 = window
    return np.zeros((y1 - y0, x1 - x0), dtype=np.uint8)


def _fixed_point(lines: list[np.ndarray], window: Window) -> list[np.ndarray]:
    """Points for OpenCV: relative to the window, pixel centers at integers, with binary fraction."""
    shift = np.asarray(window[:2], dtype=np.float64) + 0.5
    return [np.rint((line - shift) * 2**_SUBPIXEL_BITS).astype(np.int32) for line in lines if len(line)]


def _dashes(line: np.ndarray, closed: bool, mark: float, gap: float) -> list[np.ndarray]:
    """Cut a polyline into marks; a mark around a corner stays one piece per side."""
    line = np.asarray(line, dtype=np.float64)
    if closed:
        line = np.concatenate([line, line[:1]])
    pieces = []
    for start, end in itertools.pairwise(line):
        length = float(np.hypot(*(end - start)))
        direction = (end - start) / max(length, 1e-9)
        for offset in np.arange(0, length, mark + gap):
            stop = min(offset + mark, length)
            pieces.append(np.stack([start + direction * offset, start + direction * stop]))
    return pieces
