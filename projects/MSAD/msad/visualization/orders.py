"""All orders of teachers and what the rules suggest among them, as the right half of MTPD's table 2."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .colours import GREY, INK, PALETTE
from .plots import STYLE

# Rule -> colour and marker; where rules agree, the first is drawn on top.
_RULES = {
    "algorithm1": (PALETTE[1], "o"), "sum": (PALETTE[0], "s"), "max": (PALETTE[2], "^"), "forward": (PALETTE[3], "D"),
}  # fmt: skip


def orders_figure(data: Mapping) -> Figure:
    """A panel a seed: the students of all orders by the number of teachers, and those of the suggested orders.

    Args:
        data: of :meth:`msad.experiments.orders.OrderStudy.collect`.

    Raises:
        ValueError: there is no result.
    """
    seeds = {seed: found for seed, found in data["seeds"].items() if found["orders"]}
    if not seeds:
        raise ValueError("nothing to plot: no order of teachers has a result")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.6 + 3.9 * len(seeds), 4.0), layout="constrained")
        panels = np.atleast_1d(figure.subplots(1, len(seeds), sharey=True))
        for panel, (seed, found) in zip(panels, seeds.items()):
            _draw(panel, found)
            panel.set_title(f"seed {seed}", fontsize=10)
            panel.set_xlabel("number of teachers (orders of this length)")
            panel.grid(False, axis="x")
        panels[0].set_ylabel(f"student's {data['metric'].replace('/', ' ')}")
        handles = dict(zip(*panels[0].get_legend_handles_labels()[::-1]))
        figure.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=len(handles), fontsize=9)
    return figure


def _draw(panel, found: Mapping) -> None:
    lengths = sorted({len(order) for order, _ in found["orders"]})
    place = {}
    for length in lengths:
        values = [(tuple(order), value) for order, value in found["orders"] if len(order) == length]
        spread = np.linspace(-0.28, 0.28, len(values)) if len(values) > 1 else [0.0]
        place |= {order: (length + dx, value) for (order, value), dx in zip(values, spread)}
    panel.plot(*zip(*place.values()), "o", color=INK, markersize=3, alpha=0.55, label="all orders")
    panel.axhline(found["student"], color=GREY, linestyle="--", linewidth=1, label="off the shelf")
    for rule, (colour, marker) in reversed(_RULES.items()):
        picked = {tuple(e["order"]) for e in found["rules"] if e["rule"] == rule} & place.keys()
        if picked:
            points = [place[order] for order in sorted(picked)]
            size = 8 + 2.2 * list(_RULES).index(rule)
            panel.plot(*zip(*points), marker, color=colour, markersize=size, fillstyle="none", markeredgewidth=1.6,
                       label=rule, linestyle="none")  # fmt: skip
    panel.set_xticks(lengths)
