"""Models of a comparison with their confidence intervals and every seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from .colours import FAINT, GREY, INK, VariantStyle
from .plots import STYLE, save_figure


class IntervalRow(NamedTuple):
    """One model: name, mean, half the width of its confidence interval (None for one seed), the value of each seed.

    ``variant`` is the name whose style it has.
    """

    name: str
    mean: float
    half: float | None = None
    per_seed: Sequence[float] = ()
    variant: str = ""


def plot_intervals(rows: Sequence[IntervalRow], path: str | Path, *args, **options) -> Path:
    """Write the chart of :func:`intervals_figure`."""
    return save_figure(intervals_figure(rows, *args, **options), path)


def intervals_figure(
    rows: Sequence[IntervalRow], label: str, styles: Mapping[str, VariantStyle], line: float | None = None,
    line_name: str = "", bars: bool = False,
) -> Figure:
    """A line a model, in the given order.

    Args:
        label: of the horizontal axis.
        styles: by variant.
        line: value at which a dashed vertical line is drawn.
        line_name: what stands at that line.
        bars: draw bars from zero, with the mean written beside them.

    Raises:
        ValueError: there are no rows.
    """
    rows = _drawable(rows)
    with matplotlib.rc_context(STYLE):
        longest = max(len(row.name) for row in rows)
        figure = Figure(figsize=(max(7.2, 3.6 + 0.09 * longest), 1.1 + 0.34 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(False, axis="y")
        for y, row in enumerate(rows):
            style = styles[row.variant or row.name]
            if bars:
                axes.barh(y, row.mean, height=0.62, color=pale(style.colour), edgecolor=style.colour, linewidth=0.8,
                          hatch=style.hatch)  # fmt: skip
                right = max([row.mean + (row.half or 0.0), *row.per_seed])
                spread = f" ± {row.half:.1f}" if row.half is not None else ""
                axes.annotate(f"{row.mean:.1f}{spread}", (right, y), (6, 0), textcoords="offset points", va="center",
                              bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip
            elif y % 2 == 0:
                axes.axhspan(y - 0.5, y + 0.5, color=FAINT, alpha=0.3, linewidth=0)
            axes.errorbar(row.mean, y, xerr=row.half, fmt="|", color=style.colour, markersize=10, markeredgewidth=2,
                          capsize=3, linewidth=1.4, zorder=4)  # fmt: skip
            if len(row.per_seed) > 1:
                axes.plot(row.per_seed, [y] * len(row.per_seed), style.marker, color=style.colour, markersize=4.5,
                          markeredgecolor="white", markeredgewidth=0.6, zorder=5)  # fmt: skip
        if line is not None:
            axes.axvline(line, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        if bars:
            ends = [max([row.mean + (row.half or 0.0), *row.per_seed]) for row in rows]
            axes.set_xlim(0, 1.35 * max([*ends, 1e-9]))
        axes.set_yticks(range(len(rows)), [row.name for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(label + (f" (dashed: {line_name})" if line is not None and line_name else ""))
        if any(row.half is not None for row in rows):
            axes.text(1, 1.01, "whiskers: 95 % interval of the mean; dots: seeds", transform=axes.transAxes, ha="right",
                      va="bottom", fontsize=8.5, color=GREY)  # fmt: skip
    return figure


def pale(colour: str) -> tuple[float, ...]:
    """RGB of a colour that is nearer to white."""
    return tuple(1 - 0.4 * (1 - v) for v in to_rgb(colour))


def _drawable(rows: Sequence[IntervalRow]) -> list[IntervalRow]:
    rows = [row for row in rows if math.isfinite(row.mean)]
    if not rows:
        raise ValueError("nothing to plot: no model has a result")
    return rows
