"""What a metric becomes with the weight of a loss: one line a loss, on a logarithmic axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from .colours import INK, PALETTE
from .intervals import IntervalRow
from .plots import STYLE, save_figure


def plot_weights(
    lines: Mapping[str, Sequence[tuple[float, IntervalRow]]], path: str | Path, label: str, line: float | None = None,
    line_name: str = "",
) -> Path:
    """Write a chart of a metric over the weight of a loss.

    Args:
        lines: loss -> (weight, result) in any order; weights are positive.
        path: image to write.
        label: of the vertical axis.
        line: value at which a dashed horizontal line is drawn, e.g. the mean without the losses.
        line_name: what stands at that line.
    """
    return save_figure(weights_figure(lines, label, line, line_name), path)


def weights_figure(
    lines: Mapping[str, Sequence[tuple[float, IntervalRow]]], label: str, line: float | None = None, line_name: str = ""
) -> Figure:
    """The figure of :func:`plot_weights`."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xscale("log")
        for number, (name, points) in enumerate(lines.items()):
            points = sorted(points, key=lambda point: point[0])
            weights, rows = zip(*points)
            axes.plot(weights, [row.mean for row in rows], "-o", markersize=5, color=PALETTE[number], linewidth=1.6,
                      label=name)  # fmt: skip
            for weight, row in points:
                if len(row.per_seed) > 1:
                    axes.plot([weight] * len(row.per_seed), row.per_seed, ".", color=PALETTE[number], markersize=4)
        if line is not None:
            axes.axhline(line, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            axes.annotate(line_name, (1, line), xycoords=("axes fraction", "data"), xytext=(0, 3), ha="right",
                          textcoords="offset points", color=INK, fontsize=9)  # fmt: skip
        several = any(len(row.per_seed) > 1 for points in lines.values() for _, row in points)
        axes.set_xlabel("weight" + (" (lines: means; small dots: seeds)" if several else ""))
        axes.set_ylabel(label)
        axes.legend(fontsize=9)
    return figure
