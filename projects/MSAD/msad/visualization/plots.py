"""Charts of runs: curves over iterations, accuracy by row, accuracy against cost."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from .colours import FAINT, GREY, INK, PALETTE, group_colour
from .labels import LABEL_SIZE, OFFSET, label_dots, make_room

STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    # One resolution for layout and file, so that offsets in pixels are right in both.
    "figure.dpi": 160,
    "savefig.dpi": "figure",
}
_LINES = ("-", "--", ":")


class RowPoint(NamedTuple):
    """One model in a chart: mean AP (0-100), cost (any unit; None if not known), spread and values over seeds."""

    name: str
    ap: float
    cost: float | None = None
    std: float | None = None
    per_seed: Sequence[float] = ()


def read_metrics(path: str | Path) -> list[dict]:
    """Records of a detectron2 metrics.json (JSON lines) by iteration.

    Of an iteration that a resumed run wrote twice the later values count; a last line that was cut off is passed over.

    Raises:
        ValueError: another line is not JSON; names file and line.
    """
    by_iteration: dict[int, dict] = {}
    lines = Path(path).read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            raise ValueError(f"{path}: line {number} is not JSON") from None
        if "iteration" in record:
            by_iteration.setdefault(record["iteration"], {}).update(record)
    return [by_iteration[i] for i in sorted(by_iteration)]


def ap_curve(records: list[dict], task: str = "bbox") -> tuple[np.ndarray, np.ndarray]:
    """(iterations, validation AP), both (n,); with several test sets that of the first."""
    names = dict.fromkeys(k for r in records for k in r if k == f"{task}/AP" or k.endswith(f"/{task}/AP"))
    name = next(iter(names), None)
    points = [(r["iteration"] + 1, r[name]) for r in records if name in r and math.isfinite(r[name])]
    return _columns(points)


def loss_curve(records: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """(iterations, sum of the detection losses), both (n,), without distillation losses.

    Of a teacher with several branches it is the loss of its first branch: the sum over the branches would not compare
    with a single model.
    """
    points = []
    for record in records:
        losses = {k: v for k, v in record.items() if "loss" in k and k != "total_loss" and "loss_distill" not in k}
        branch = next((k.split("/")[0] for k in losses if "/" in k), None)
        values = [v for k, v in losses.items() if branch is None or k.startswith(f"{branch}/")]
        if values and all(map(math.isfinite, values)):
            points.append((record["iteration"] + 1, sum(values)))
    return _columns(points)


def _columns(points: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    iterations, values = np.array(points, float).reshape(-1, 2).T
    return iterations, values


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving mean over about a tenth of the curve; (n,) to (n,)."""
    half = -(-len(values) // 20)
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def plot_curves(runs: Mapping[str, str | Path], path: str | Path, task: str = "bbox") -> Path:
    """Write the training curves of several runs: name of the run -> its detectron2 metrics.json.

    Shows the validation AP over the iterations if a run was evaluated more than once, otherwise the smoothed sum of
    the detection losses.

    Raises:
        ValueError: no run has anything to show.
    """
    return save_figure(curves_figure(runs, task), path)


def curves_figure(runs: Mapping[str, str | Path], task: str = "bbox") -> Figure:
    """The figure of :func:`plot_curves`."""
    records = {name: read_metrics(file) for name, file in runs.items()}
    curves = {name: ap_curve(r, task) for name, r in records.items()}
    show_ap = any(len(x) > 1 for x, _ in curves.values())
    if not show_ap:
        curves = {name: loss_curve(r) for name, r in records.items()}
    curves = {name: curve for name, curve in curves.items() if len(curve[0])}
    if not curves:
        files = ", ".join(map(str, runs.values()))
        raise ValueError(f"no evaluation and no loss to plot in the metrics of {files or 'no run'}")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 4.4), layout="constrained")
        axes = figure.add_subplot()
        for i, (name, (x, y)) in enumerate(curves.items()):
            colour, line = PALETTE[i % len(PALETTE)], _LINES[i // len(PALETTE) % len(_LINES)]
            style = {"color": colour, "linestyle": line, "linewidth": 1.8, "label": name}
            if show_ap:
                axes.plot(x, y, marker="o", markersize=4, **style)
            else:
                axes.plot(x, smooth(y), **style)
        axes.set_xlabel("iteration")
        axes.set_ylabel(f"validation {task} AP" if show_ap else "detection loss (smoothed)")
        axes.set_xlim(left=0)
        if show_ap:
            axes.set_ylim(bottom=0)
        figure.legend(loc="outside right upper", fontsize=10, handlelength=2.8)
    return figure


def plot_results(points: Sequence[RowPoint], path: str | Path, reference: str | None = None) -> Path:
    """Write a chart of AP by row, in the given order, with the spread over seeds and a line at row ``reference``."""
    return save_figure(results_figure(points, reference), path)


def results_figure(points: Sequence[RowPoint], reference: str | None = None) -> Figure:
    """The figure of :func:`plot_results`."""
    points = _drawable(points)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.6, 1.1 + 0.32 * len(points)), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(False, axis="y")
        annotations = []
        for y, point in enumerate(points):
            colour = group_colour(point.name)
            axes.barh(y, point.ap, height=0.62, color=_pale(colour), linewidth=0)
            if point.std:
                axes.errorbar(point.ap, y, xerr=point.std, color=colour, capsize=4, linewidth=1.5)
            axes.plot(point.per_seed, [y] * len(point.per_seed), "o", color=colour, markersize=3.5)
            right = max([point.ap + (point.std or 0), *point.per_seed])
            spread = f" ± {point.std:.1f}" if point.std is not None else ""
            annotations.append((f"{point.ap:.1f}{spread}", right, y))
        level = next((point.ap for point in points if point.name == reference), None)
        if level is not None:
            axes.axvline(level, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        axes.set_yticks(range(len(points)), [point.name for point in points])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(points) - 0.4, -0.6)
        axes.set_xlabel("validation AP" + (f" (dashed: {reference})" if level is not None else ""))
        make_room(figure, axes, [(text, right) for text, right, _ in annotations])
        for text, right, y in annotations:
            axes.annotate(text, (right, y), (OFFSET, 0), textcoords="offset pixels", va="center", fontsize=LABEL_SIZE,
                          bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip
    return figure


def plot_ap_vs_cost(points: Sequence[RowPoint], path: str | Path, cost_label: str = "GMACs of the whole model") -> Path:
    """Write a chart of AP against cost, a labelled dot per row, with error bars where there are several seeds.

    Raises:
        ValueError: no row has both AP and cost.
    """
    return save_figure(ap_vs_cost_figure(points, cost_label), path)


def ap_vs_cost_figure(points: Sequence[RowPoint], cost_label: str = "GMACs of the whole model") -> Figure:
    """The figure of :func:`plot_ap_vs_cost`."""
    points = _drawable([p for p in points if p.cost is not None])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.6, 4.6), layout="constrained")
        axes = figure.add_subplot()
        for point in points:
            colour = group_colour(point.name)
            axes.errorbar(
                point.cost, point.ap, point.std, color=colour, marker="o", markersize=7, capsize=3, linewidth=1.2
            )
        axes.set_xlabel(cost_label)
        axes.set_ylabel("validation AP")
        low, high = min(p.ap - (p.std or 0) for p in points), max(p.ap + (p.std or 0) for p in points)
        margin = 0.12 * (high - low) or 1.0
        axes.set_ylim(low - margin, high + margin)
        make_room(figure, axes, [(p.name, p.cost) for p in points])
        label_dots(figure, axes, [(p.name, p.cost, p.ap, p.std) for p in points])
    return figure


def _pale(colour: str) -> tuple[float, ...]:
    return tuple(1 - 0.4 * (1 - v) for v in to_rgb(colour))


def _drawable(points: Sequence[RowPoint]) -> list[RowPoint]:
    points = [point for point in points if point.ap is not None and math.isfinite(point.ap)]
    if not points:
        raise ValueError("nothing to plot: no row has both values")
    return points


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write ``figure`` in the style of all charts, making the folder; returns ``path``."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure.savefig(path)
    return path
