"""Training curves of runs, and the style of all charts."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .colours import FAINT, GREY, INK, VariantStyle, variant_styles

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
    "savefig.dpi": 160,
}


def read_metrics(path: str | Path) -> list[dict]:
    """Records of a detectron2 metrics.json (JSON lines) by iteration.

    Of an iteration that a resumed run wrote twice the later values count. A line that a killed run did not finish is
    passed over; a resumed one goes on in the same line.

    Raises:
        ValueError: not a single line is a record.
    """
    by_iteration: dict[int, dict] = {}
    lines = list(filter(str.strip, Path(path).read_text(errors="replace").splitlines()))
    records = list(filter(None, map(_record, lines)))
    if lines and not records:
        raise ValueError(f"{path} is no metrics.json: no line of it is a JSON object")
    for record in records:
        if "iteration" in record:
            by_iteration.setdefault(record["iteration"], {}).update(record)
    return [by_iteration[i] for i in sorted(by_iteration)]


def _record(line: str) -> dict:
    """The record of a line, or the one that begins within it; {} if there is none."""
    for begin in (0, *(found.start() for found in re.finditer(r'(?<=.)\{"', line))):
        with contextlib.suppress(ValueError):
            found = json.loads(line[begin:])
            if isinstance(found, dict) and (begin == 0 or "iteration" in found):
                return found
    return {}


def ap_curve(records: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """(iterations, validation AP of boxes), both (n,); with several test sets that of the first."""
    names = dict.fromkeys(k for r in records for k in r if k == "bbox/AP" or k.endswith("/bbox/AP"))
    name = next(iter(names), None)
    points = [(r["iteration"] + 1, r[name]) for r in records if name in r and math.isfinite(r[name])]
    return _columns(points)


def loss_curve(records: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """(iterations, sum of the detection losses), both (n,), without distillation losses and those of assistants.

    Of a teacher with several branches it is the loss of its first branch: the sum over the branches would not compare
    with a single model.
    """
    points = []
    for record in records:
        losses = {k: v for k, v in record.items() if "loss" in k and k != "total_loss" and "loss_distill" not in k
                  and not k.startswith("assistant/")}  # fmt: skip
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


def plot_curves(
    runs: Mapping[str, str | Path], path: str | Path, styles: Mapping[str, VariantStyle] | None = None
) -> Path:
    """Write the training curves of several runs: name of the run -> its detectron2 metrics.json.

    Shows the validation AP over the iterations if a run was evaluated more than once, otherwise the smoothed sum of
    the detection losses.

    Raises:
        ValueError: no run has anything to show.
    """
    return save_figure(curves_figure(runs, styles), path)


def curves_figure(runs: Mapping[str, str | Path], styles: Mapping[str, VariantStyle] | None = None) -> Figure:
    """The figure of :func:`plot_curves`."""
    records = {name: read_metrics(file) for name, file in runs.items()}
    curves = {name: ap_curve(r) for name, r in records.items()}
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
        styles = {**variant_styles(curves), **(styles or {})}
        for name, (x, y) in curves.items():
            marker = "o" if show_ap or len(x) == 1 else ""
            axes.plot(
                x, y if show_ap else smooth(y), marker=marker, markersize=4, linewidth=1.8, label=name,
                color=styles[name].colour, linestyle=styles[name].line,
            )  # fmt: skip
        axes.set_xlabel("iteration")
        axes.set_ylabel("validation bbox AP" if show_ap else "detection loss (smoothed)")
        axes.set_xlim(left=0)
        if show_ap:
            axes.set_ylim(bottom=0)
        figure.legend(loc="outside right upper", fontsize=10, handlelength=2.8)
    return figure


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write ``figure`` in the style of all charts, making the folder; returns ``path``."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure.savefig(path)
    return path
