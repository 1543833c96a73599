"""Rows of a comparison as dots with their confidence intervals, every seed visible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure

from .colours import FAINT, GREY, INK, PALETTE
from .plots import STYLE, save_figure


class IntervalRow(NamedTuple):
    """One row: name, mean, half the width of its confidence interval (None for one seed), the value of each seed."""

    name: str
    mean: float
    half: float | None
    per_seed: Sequence[float]


def plot_intervals(
    series: Mapping[str, Sequence[IntervalRow]], path: str | Path, label: str, line: float | None = None,
    highlight: str = "",
) -> Path:
    """Write a chart of rows, best first by the first series.

    Args:
        series: title (e.g. "equal iterations") -> rows.
        path: image to write.
        label: of the horizontal axis.
        line: value at which a dashed vertical line is drawn.
        highlight: row whose name is printed bold, e.g. the reference.

    Raises:
        ValueError: there are no rows.
    """
    return save_figure(intervals_figure(series, label, line, highlight), path)


def intervals_figure(
    series: Mapping[str, Sequence[IntervalRow]], label: str, line: float | None = None, highlight: str = ""
) -> Figure:
    """The figure of :func:`plot_intervals`."""
    best: dict[str, float] = {}
    for rows in series.values():
        for row in rows:
            best.setdefault(row.name, row.mean)
    if not best:
        raise ValueError("nothing to plot: no row has a result")
    names = sorted(best, key=best.__getitem__, reverse=True)
    step = 0.22  # between the series of one row
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 1.2 + (0.26 + 0.16 * len(series)) * len(names)), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(False, axis="y")
        for y in range(0, len(names), 2):
            axes.axhspan(y - 0.5, y + 0.5, color=FAINT, alpha=0.3, linewidth=0)
        for number, (title, rows) in enumerate(series.items()):
            colour, offset = PALETTE[number], (number - (len(series) - 1) / 2) * step
            for row in rows:
                y = names.index(row.name) + offset
                axes.plot(row.per_seed, [y] * len(row.per_seed), "o", color=colour, markersize=4.5,
                          markeredgecolor="white", markeredgewidth=0.6, zorder=5)  # fmt: skip
                axes.errorbar(row.mean, y, xerr=row.half, fmt="|", color=colour, markersize=11, markeredgewidth=2.2,
                              capsize=3, linewidth=1.4, zorder=4,
                              label=title if row is rows[0] else None)  # fmt: skip
        if line is not None:
            axes.axvline(line, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.set_yticks(range(len(names)), names)
        for text in axes.get_yticklabels():
            text.set_fontweight("bold" if text.get_text() == highlight else "normal")
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel(label)
        if any(row.half is not None for rows in series.values() for row in rows):
            axes.text(1, 1.01, "bars: 95 % interval of the mean; dots: seeds", transform=axes.transAxes, ha="right",
                      va="bottom", fontsize=8.5, color=GREY)  # fmt: skip
        if len(series) > 1:
            figure.legend(loc="outside lower center", ncols=len(series), fontsize=9)
    return figure
