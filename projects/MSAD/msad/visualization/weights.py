"""What a metric becomes with a swept parameter, such as the weight of a loss: one line a variant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from .colours import INK, variant_styles
from .intervals import IntervalRow
from .plots import STYLE, save_figure


def plot_sweep_lines(lines: Mapping[str, Sequence[tuple[float, IntervalRow]]], path: str | Path, *args) -> Path:
    """Write the chart of :func:`sweep_lines_figure`."""
    return save_figure(sweep_lines_figure(lines, *args), path)


def sweep_lines_figure(
    lines: Mapping[str, Sequence[tuple[float, IntervalRow]]], key: str, label: str, line: float | None = None,
    line_name: str = "",
) -> Figure:
    """A metric over the values of a parameter, with the interval of each mean and every seed.

    Args:
        lines: variant -> (value, result) in any order. The axis is logarithmic where positive values span a decade.
        key: of the parameter.
        label: of the vertical axis.
        line: value at which a dashed horizontal line is drawn, e.g. the mean without the loss.
        line_name: what stands at that line.
    """
    styles, values = variant_styles(lines), [value for points in lines.values() for value, _ in points]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.add_subplot()
        if min(values) > 0 and max(values) >= 10 * min(values):
            axes.set_xscale("log")
        for name, points in lines.items():
            xs, rows = zip(*sorted(points, key=lambda point: point[0]))
            halves = [row.half or 0.0 for row in rows]
            style = styles[name]
            axes.errorbar(xs, [row.mean for row in rows], halves if any(halves) else None, marker="o", markersize=5,
                          color=style.colour, linestyle=style.line, linewidth=1.6, capsize=3, label=name)  # fmt: skip
            for x, row in zip(xs, rows):
                if len(row.per_seed) > 1:
                    axes.plot([x] * len(row.per_seed), row.per_seed, ".", color=style.colour, markersize=4)
        if line is not None:
            axes.axhline(line, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1, label=line_name)
        several = any(len(row.per_seed) > 1 for points in lines.values() for _, row in points)
        axes.set_xlabel(key + (" (whiskers: 95 % intervals; small dots: seeds)" if several else ""))
        axes.set_ylabel(label)
        axes.legend(fontsize=9)
    return figure
