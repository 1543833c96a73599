"""Accuracy against what an inference costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .colours import GREY, INK, VariantStyle
from .intervals import IntervalRow, pale
from .plots import STYLE, save_figure

CURVE = "the same network at\nother input sizes (padded)"


class CostRow(NamedTuple):
    """A model, its costs by the label of their axis, and what it is by which models at several input sizes are known.

    Models of one ``network`` (any text; "" stands for none) differ in nothing but weights and input; ``side`` is the
    short side of the input in pixels.
    """

    row: IntervalRow
    costs: Mapping[str, float]
    network: str = ""
    side: int = 0


def plot_ap_vs_cost(rows: Sequence[CostRow], path: str | Path, *args) -> Path:
    """Write the chart of :func:`ap_vs_cost_figure`."""
    return save_figure(ap_vs_cost_figure(rows, *args), path)


def ap_vs_cost_figure(
    rows: Sequence[CostRow], styles: Mapping[str, VariantStyle], label: str = "validation AP"
) -> Figure:
    """The metric against each cost, a panel a cost: a dot a model with its interval, named from best to worst.

    A line joins models that are one network at several input sizes, so that what lies above it is better than the
    choice of another input size; of models with the same size it takes the best.

    Raises:
        ValueError: no row has a metric and a cost.
    """
    rows = [row for row in rows if math.isfinite(row.row.mean)]
    costs = list(dict.fromkeys(cost for row in rows for cost in row.costs))
    if not costs:
        raise ValueError("nothing to plot: no model has a result and a cost")
    rows.sort(key=lambda row: -row.row.mean)
    with matplotlib.rc_context(STYLE):
        height = max(4.4, 0.21 * len(rows) + 0.4)  # of the legend
        figure = Figure(figsize=(4.2 * len(costs) + 2.2, height), layout="constrained")
        panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
        for axes, cost in zip(panels, costs):
            known = [row for row in rows if cost in row.costs]
            curves, dots = _draw_curves(axes, known, cost), _draw_dots(axes, known, cost, styles)
            axes.set_xlabel(cost)
            axes.set_xlim(0, 1.1 * max([*(row.costs[cost] for row in known), 1e-9]))
            axes.margins(y=0.12)
            if cost == costs[0]:
                figure.legend(handles=[*dots, *curves[:1]], loc="outside right upper", fontsize=9)
        panels[0].set_ylabel(label)
    return figure


def _draw_dots(axes: Axes, rows: Sequence[CostRow], cost: str, styles: Mapping[str, VariantStyle]) -> list:
    seen: dict[str, int] = {}
    drawn = []
    for row, costs, *_ in rows:
        variant = row.variant or row.name
        style, again = styles[variant], seen.get(variant, 0)
        seen[variant] = again + 1
        # Further branches of one teacher: the same colour, other fillings.
        drawn.append(axes.errorbar(
            costs[cost], row.mean, row.half, color=style.colour, marker=style.marker, markersize=8, capsize=3,
            linewidth=1.2, linestyle="none", label=row.name, zorder=3,
            markerfacecolor=(style.colour, "white", pale(style.colour))[again % 3],
        ))  # fmt: skip
    return drawn


def _draw_curves(axes: Axes, rows: Sequence[CostRow], cost: str) -> list:
    """``rows`` come from best to worst."""
    best: dict[str, dict[int, CostRow]] = {}
    for row in rows:
        if row.network:
            best.setdefault(row.network, {}).setdefault(row.side, row)
    drawn = []
    for sizes in best.values():
        points = sorted((row.costs[cost], row.row.mean, side) for side, row in sizes.items())
        if len(points) < 2:
            continue
        x, y, _ = zip(*points)
        drawn += axes.plot(x, y, color=GREY, linewidth=1.4, linestyle=(0, (4, 3)), label=CURVE, zorder=2)
        for *point, side in points:
            axes.annotate(f"{side} px", point, (7, -11), textcoords="offset points", fontsize=8.5, color=INK)
    return drawn
