"""Distinct colors for instances and classes."""

from __future__ import annotations

import colorsys
import random

import numpy as np

__all__ = ["colormap", "random_color", "random_colors"]


def _palette(size: int = 72) -> np.ndarray:
    """(size, 3) RGB in [0, 1]; neighbors are apart in hue (golden angle), saturation and brightness."""
    styles = [(0.75, 1.0), (0.9, 0.8), (0.5, 0.95)]
    colors = []
    for i in range(size):
        saturation, value = styles[i % len(styles)]
        colors.append(colorsys.hsv_to_rgb((0.58 + i * 0.381966) % 1.0, saturation, value))
    return np.asarray(colors, dtype=np.float32)


_COLORS = _palette()


def colormap(rgb: bool = False, maximum: int = 255) -> np.ndarray:
    """The whole palette.

    Args:
        rgb: order of the channels: RGB, or BGR if False.
        maximum: 255 or 1, the value of full intensity.

    Returns:
        float32 array (N, 3).
    """
    if maximum not in (1, 255):
        raise ValueError(f"maximum must be 1 or 255, got {maximum}")
    return (_COLORS if rgb else _COLORS[:, ::-1]) * maximum


def random_color(rgb: bool = False, maximum: int = 255) -> np.ndarray:
    """One color of the palette, drawn at random: float32 array (3,). Arguments as for `colormap`."""
    return random_colors(1, rgb, maximum)[0]


def random_colors(N: int, rgb: bool = False, maximum: int = 255) -> list[np.ndarray]:
    """N colors of the palette, without repetition while it lasts. Arguments as for `colormap`."""
    palette = colormap(rgb, maximum)
    picks: list[int] = []
    while len(picks) < N:
        picks += random.sample(range(len(palette)), min(N - len(picks), len(palette)))
    return [palette[i] for i in picks]
