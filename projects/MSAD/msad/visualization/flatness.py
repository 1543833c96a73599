"""Loss around trained weights: lines of several models in one chart, and surfaces side by side."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .colours import PALETTE
from .plots import STYLE


def lines_figure(models: Mapping[str, dict]) -> Figure:
    """Rise of the training loss along random directions, mean and range, and training and validation loss.

    Args:
        models: name -> {"steps": [...], "lines": [[loss by step] by direction], "train": loss, "val": loss or None}.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 3.9), layout="constrained")
        along, gap = figure.subplots(1, 2, width_ratios=(1.7, 1))
        for i, (name, found) in enumerate(models.items()):
            colour, steps = PALETTE[i % len(PALETTE)], np.array(found["steps"], float)
            order = np.argsort(steps)
            lines = np.array(found["lines"], float)[:, order]
            rise = lines - lines[:, steps[order] == 0]
            along.plot(steps[order], rise.mean(axis=0), color=colour, marker="o", markersize=4, label=name)
            along.fill_between(steps[order], rise.min(axis=0), rise.max(axis=0), color=colour, alpha=0.15, linewidth=0)
            bars = [(j, found[key]) for j, key in enumerate(("train", "val")) if found[key] is not None]
            width = 0.8 / len(models)
            for j, value in bars:
                x = j + (i - (len(models) - 1) / 2) * width
                gap.bar(x, value, width=0.9 * width, color=colour)
                gap.annotate(f"{value:.3f}", (x, value), (0, 2), textcoords="offset points", ha="center", fontsize=8.5)
        along.set_yscale("symlog", linthresh=0.1)
        along.set_xlabel("step along filter-normalised directions (band: all directions)")
        along.set_ylabel("rise of the training detection loss")
        gap.set_xticks([0, 1], ["training", "validation"])
        gap.grid(False, axis="x")
        gap.set_ylabel("detection loss")
        figure.legend(*along.get_legend_handles_labels(), loc="outside upper right", ncols=len(models))
    return figure


def surfaces_figure(models: Mapping[str, dict]) -> Figure:
    """log10 of the training loss on a plane of two directions, a panel a model, one scale of colours.

    Args:
        models: name -> {"grid": [steps], "surface": [[loss by step along the first] by step along the second]}.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.2 + 3.6 * len(models), 3.9), layout="constrained")
        panels = np.atleast_1d(figure.subplots(1, len(models), sharex=True, sharey=True))
        values = {name: np.log10(np.clip(np.array(m["surface"], float), 1e-12, None)) for name, m in models.items()}
        finite = np.concatenate([v[np.isfinite(v)] for v in values.values()])
        if not len(finite):
            raise ValueError("nothing to plot: no loss of the surfaces is finite")
        low, high = float(finite.min()), float(finite.max())
        levels = np.linspace(low, max(high, low + 1e-6), 21)
        for panel, (name, found) in zip(panels, models.items()):
            shown = panel.contourf(found["grid"], found["grid"], np.ma.masked_invalid(values[name]), levels=levels)
            panel.plot(0, 0, "+", color="white", markersize=9)
            panel.set_title(name, fontsize=10)
            panel.grid(False)
            panel.set_xlabel("first direction")
        panels[0].set_ylabel("second direction")
        figure.colorbar(shown, ax=list(panels), label="log10 of the detection loss", ticks=levels[::5], format="%.2f")
    return figure
