"""Accuracy against cost of models that could be shipped."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure

from .colours import INK, PALETTE
from .plots import STYLE

_MARKERS = ("o", "s", "^")


def pareto_figure(rows: Sequence[dict]) -> Figure:
    """AP against multiply-adds, and beside it against latency, a colour an engine; a line joins what nothing beats.

    Args:
        rows: of :func:`msad.export.pareto.measure`; the latency is that of the first number of threads.
    """
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    threads = next(iter(rows[0]["milliseconds"]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 3.9), layout="constrained")
        cost, time = figure.subplots(1, 2, sharey=True)
        for i, engine in enumerate(engines):
            mine = sorted((r for r in rows if r["engine"] == engine), key=lambda r: r["milliseconds"][threads])
            style = {"color": PALETTE[i % len(PALETTE)], "marker": _MARKERS[i % len(_MARKERS)], "markersize": 5.5}
            cost.plot([r["gmacs"] for r in mine], [r["AP"] for r in mine], linestyle="", label=engine, **style)
            time.plot([r["milliseconds"][threads] for r in mine], [r["AP"] for r in mine], linestyle="", **style)
            best = [r for r in mine if r["best"]]
            time.plot([r["milliseconds"][threads] for r in best], [r["AP"] for r in best], color=style["color"])
        for row in rows:
            if row["engine"] == engines[0]:
                cost.annotate(
                    row["name"], (row["gmacs"], row["AP"]), (4, 4), textcoords="offset points", fontsize=8, color=INK
                )
        cost.set_xlabel("GMACs of one image")
        cost.set_ylabel("AP")
        time.set_xlabel(f"ms of one image, threads: {threads}")
        cost.legend()
    return figure
