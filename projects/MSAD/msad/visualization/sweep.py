"""Accuracy over test sizes, and what it costs in time."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure

from .colours import INK, PALETTE
from .plots import STYLE

_MARKERS = ("o", "s", "^")


def sweep_figure(sizes: Sequence[dict], title: str = "") -> Figure:
    """AP or mIoU against the short side, a line a task, and beside it against latency if that was measured.

    Args:
        sizes: dicts with "short_side" (pixels), "results" {task: {"AP" or "mIoU": value}} and "milliseconds" (or None).

    Raises:
        ValueError: there is no such value at any size.
    """
    sizes = sorted(sizes, key=lambda entry: entry["short_side"])
    tasks = dict.fromkeys(task for entry in sizes for task in entry["results"])
    lines = {task: [e for e in sizes if _score(e, task) is not None] for task in tasks}
    lines = {task: entries for task, entries in lines.items() if entries}
    if not lines:
        raise ValueError("nothing to plot: no size has an AP or mIoU")
    timed = any(e["milliseconds"] is not None for entries in lines.values() for e in entries)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2 if timed else 5.2, 3.9), layout="constrained")
        axes = list(figure.subplots(1, 1 + timed, sharey=True, squeeze=False)[0])
        for i, (task, entries) in enumerate(lines.items()):
            style = {
                "color": PALETTE[i % len(PALETTE)], "marker": _MARKERS[i % len(_MARKERS)], "markersize": 5.5,
                "linewidth": 1.6, "label": task,
            }  # fmt: skip
            scores = [_score(e, task) for e in entries]
            axes[0].plot([e["short_side"] for e in entries], scores, **style)
            if timed:
                points = [(e["milliseconds"], y, e["short_side"]) for e, y in zip(entries, scores)]
                points = [point for point in points if point[0] is not None]
                axes[1].plot([p[0] for p in points], [p[1] for p in points], **style)
                for k, (x, y, side) in enumerate(points if i == 0 else ()):
                    falls = k > 0 and points[k - 1][1] > y
                    axes[1].annotate(
                        f"{side}", (x, y), (5 if falls else -5, 4), textcoords="offset points", fontsize=8.5, color=INK,
                        ha="left" if falls else "right",
                    )  # fmt: skip
        axes[0].set_xticks(_apart([e["short_side"] for e in sizes]))
        axes[0].set_xlabel("short side of the test image (px)")
        axes[0].set_ylabel("mIoU" if lines.keys() == {"sem_seg"} else "AP")
        if timed:
            axes[1].set_xlabel("ms an image (labels: short side)")
        for panel in axes:
            panel.margins(x=0.09, y=0.14)
        if len(lines) > 1:
            figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=len(lines))
        if title:
            figure.suptitle(title, x=0.02, ha="left", fontsize=11)
    return figure


def _score(entry: dict, task: str) -> float | None:
    values = entry["results"].get(task) or {}
    return values.get("AP", values.get("mIoU"))


def _apart(sides: Sequence[int]) -> list[int]:
    """Of ascending sides those that are 9 % of the range apart, so that their labels do not touch."""
    kept: list[int] = []
    for side in reversed(sides):
        if not kept or kept[-1] - side >= 0.09 * (sides[-1] - sides[0]):
            kept.append(side)
    return kept[::-1]
