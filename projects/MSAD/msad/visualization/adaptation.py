"""Adaptation costs between networks: a table of colours, and a graph with the suggested order of teachers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .colours import FAINT, GREY, INK, PALETTE
from .plots import STYLE

Costs = Mapping[str, Mapping[str, float]]


def heat_map_figure(tables: Mapping[str, Costs], names: Sequence[str]) -> Figure:
    """A panel for each table of costs {from: {to: cost}}, rows from, columns to.

    Colours compare within a column: only costs to one network are in the same units.

    Args:
        tables: title -> costs.
        names: of the networks, in order.
    """
    with matplotlib.rc_context(STYLE):
        size = 1.4 + (1.1 + 0.85 * len(names)) * len(tables), 1.6 + 0.6 * len(names)
        figure = Figure(figsize=size, layout="constrained")
        panels = np.atleast_1d(figure.subplots(1, len(tables), sharey=True))
        for panel, (title, costs) in zip(panels, tables.items()):
            values = np.array([[costs.get(a, {}).get(b, math.nan) for b in names] for a in names], float)
            known = np.ma.masked_invalid(values)
            largest = known.max(axis=0).filled(1.0).clip(min=1e-12)
            panel.imshow(known / largest, cmap="Blues", vmin=0, vmax=1.25, aspect="auto")
            for (i, j), value in np.ndenumerate(values):
                text = f"{value:.3g}" if math.isfinite(value) else "-"
                dark = math.isfinite(value) and value > 0.7 * largest[j]
                panel.text(j, i, text, ha="center", va="center", fontsize=9, color="white" if dark else INK)
            panel.set_xticks(range(len(names)), names, rotation=30, ha="right")
            panel.set_yticks(range(len(names)), names)
            panel.set_xlabel("to")
            panel.set_title(f"{title} (colours: by column)", fontsize=10)
            panel.grid(False)
            panel.tick_params(length=0)
        panels[0].set_ylabel("from")
    return figure


def graph_figure(costs: Costs, names: Sequence[str], order: Sequence[str] = ()) -> Figure:
    """Networks on a circle and the costs on the arrows between them, as figure 3 of the paper.

    Args:
        names: the student first.
        order: teachers of the suggested path from the student, drawn red.
    """
    angles = np.pi / 2 - 2 * np.pi * np.arange(len(names)) / len(names)
    places = dict(zip(names, np.stack([np.cos(angles), np.sin(angles)], axis=1)))
    path = set(itertools.pairwise([names[0], *order]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 6.0), layout="constrained")
        axes = figure.add_subplot()
        for a, b in itertools.permutations(names, 2):
            cost = costs.get(a, {}).get(b)
            if cost is None or not math.isfinite(cost):
                continue
            colour = PALETTE[1] if (a, b) in path else GREY
            width = 2.4 if (a, b) in path else 0.8
            arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": width, "shrinkA": 24, "shrinkB": 24,
                     "connectionstyle": "arc3,rad=0.12"}  # fmt: skip
            axes.annotate("", places[b], places[a], arrowprops=arrow, zorder=3 if (a, b) in path else 1)
            along = places[b] - places[a]
            # On the arc, nearer to where the arrow begins, so that the labels of both directions stay apart.
            middle = places[a] + 0.36 * along + 0.055 * np.array([along[1], -along[0]])
            axes.text(*middle, f"{cost:.3g}", ha="center", va="center", fontsize=8.5, zorder=4,
                      color=colour if (a, b) in path else INK,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8})  # fmt: skip
        for name, place in places.items():
            face = FAINT if name == names[0] else "white"
            axes.text(*place, name, ha="center", va="center", fontsize=10, zorder=5,
                      bbox={"boxstyle": "round,pad=0.5", "facecolor": face, "edgecolor": INK})  # fmt: skip
        axes.set_xlim(-1.35, 1.35)
        axes.set_ylim(-1.25, 1.25)
        axes.axis("off")
        if order:
            axes.set_title(" → ".join([names[0], *order]), fontsize=11, color=PALETTE[1])
    return figure
