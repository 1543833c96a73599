"""Labels beside the dots and bars of a chart, placed so that none is clipped and none hides a dot."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .colours import FAINT, group_colour

LABEL_SIZE = 9.5  # points
OFFSET = 20  # pixels between a value and its label


def label_dots(figure: Figure, axes: Axes, points: Sequence[tuple[str, float, float, float | None]]) -> None:
    """Write the names beside the dots; those of dots with nearly the same cost are spread so that none overlap.

    ``points`` are (name, x, y, half length of the error bar or None) in data coordinates.
    """
    at = axes.transData.transform([point[1:3] for point in points])
    line = 1.25 * LABEL_SIZE * figure.dpi / 72  # height of a line of text in pixels
    whiskers = [axes.bbox.height * (p[3] or 0.0) / float(np.ptp(axes.get_ylim())) for p in points]
    taken = [(x - 10, y - w - 6, x + 10, y + w + 6) for (x, y), w in zip(at, whiskers)]
    for column in _columns(at[:, 0]):
        column.sort(key=lambda i: at[i, 1])
        heights = _spread(at[column, 1], line, *axes.bbox.intervaly)
        first, last = at[column, 0].min(), at[column, 0].max()
        for i, height in zip(column, heights):
            x, y = at[i]
            extent = _text_width(figure, points[i][0])
            reach = whiskers[i] + line
            # (text's left edge, height): right of the column, left of it, above the dot, below it, and further left
            places = [(last + OFFSET, height), (first - OFFSET - extent, height)]
            for share in (0.5, 0.8):
                places += [(x - share * extent, y + reach), (x - share * extent, y - reach)]
            # A little lower than a line: neighbours that _spread has put a line apart do not overlap.
            boxes = [(left, mid - 0.45 * line, left + extent, mid + 0.45 * line) for left, mid in places]
            fits = [box[0] > axes.bbox.x0 and not any(_overlap(box, other) for other in taken) for box in boxes]
            best = fits.index(True) if True in fits else 0
            taken.append(boxes[best])
            left, height = places[best]
            side = 0.0 if left > x else 1.0
            leader = {"arrowstyle": "-", "color": FAINT, "shrinkA": 0, "shrinkB": 5, "relpos": (side, 0.5)}
            axes.annotate(
                points[i][0], points[i][1:3], (left - x, height - y), textcoords="offset pixels",
                va="center", fontsize=LABEL_SIZE, color=group_colour(points[i][0]),
                arrowprops=leader if best < 2 else None,
            )  # fmt: skip


def _columns(xs: np.ndarray) -> list[list[int]]:
    """Indices of dots grouped by nearly equal place along the horizontal axis, from right to left."""
    columns: list[list[int]] = []
    for i in np.argsort(-xs):
        if columns and xs[columns[-1][0]] - xs[i] < 3 * OFFSET:
            columns[-1].append(i)
        else:
            columns.append([i])
    return columns


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    """Whether two boxes (x0, y0, x1, y1) have a common area."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _spread(wanted: np.ndarray, gap: float, low: float, high: float) -> np.ndarray:
    """Heights in ascending order at least ``gap`` apart, inside [low, high] if they fit, near the ascending wanted."""
    merged: list[tuple[float, int]] = []  # (centre, number of labels) of stacks of labels that touch
    for centre in wanted:
        merged.append((centre, 1))
        while len(merged) > 1 and merged[-1][0] - merged[-2][0] < gap * (merged[-1][1] + merged[-2][1]) / 2:
            c2, n2 = merged.pop()
            c1, n1 = merged.pop()
            merged.append(((c1 * n1 + c2 * n2) / (n1 + n2), n1 + n2))
    heights = np.concatenate([c + gap * (np.arange(n) - (n - 1) / 2) for c, n in merged])
    for i in range(len(heights)):  # pushed in from below, then from above
        heights[i] = max(heights[i], low + gap / 2 + i * gap)
    for i in range(len(heights)):
        heights[-1 - i] = min(heights[-1 - i], high - gap / 2 - i * gap)
    return heights


def make_room(figure: Figure, axes: Axes, labels: Sequence[tuple[str, float]]) -> None:
    """End the horizontal axis, which begins at 0, so that each text fits right of its value."""
    figure.draw_without_rendering()  # the layout settles the width of the axes
    width = axes.bbox.width
    ends = [value * width / max(width - 2 * OFFSET - _text_width(figure, text), width / 4) for text, value in labels]
    axes.set_xlim(0, max(*ends, 1.05 * max(value for _, value in labels), 1e-9))
    figure.draw_without_rendering()


def _text_width(figure: Figure, text: str) -> float:
    """Estimated width of a label in pixels."""
    return 0.58 * LABEL_SIZE * figure.dpi / 72 * len(text)
