"""Streaming AP against input size and latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure

from .colours import GREY, INK, PALETTE
from .plots import STYLE

_MARKERS = ("o", "s", "^", "D", "v", "P")


def streaming_figure(models: Mapping[str, Sequence[dict]], fps: float, title: str = "") -> Figure:
    """AP against the short side of the input, a colour a model: of the stream, and of single frames (dashed); beside it
    AP of the stream against latency, with a line at each frame.

    Args:
        models: name -> entries {"short_side": pixels, "offline": {"AP"}, "streaming": {"AP"}, "milliseconds": mean};
            "offline" and an AP that is None are left out.
        fps: frames per second of the videos.

    Raises:
        ValueError: there is nothing to plot.
    """
    models = {name: sorted(entries, key=lambda e: e["short_side"]) for name, entries in models.items() if entries}
    if not any(entry["streaming"]["AP"] is not None for entries in models.values() for entry in entries):
        raise ValueError("nothing to plot: no model has a streaming AP")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 3.9), layout="constrained")
        sizes, latencies = figure.subplots(1, 2, sharey=True)
        for i, (name, entries) in enumerate(models.items()):
            style = {"color": PALETTE[i % len(PALETTE)], "marker": _MARKERS[i % len(_MARKERS)], "markersize": 5.5}
            stream = [(e["short_side"], e["milliseconds"], e["streaming"]["AP"]) for e in entries]
            stream = [point for point in stream if point[2] is not None]
            sides, times, values = zip(*stream) if stream else ((), (), ())
            sizes.plot(sides, values, linewidth=1.6, label=name, **style)
            single = [(e["short_side"], (e.get("offline") or {}).get("AP")) for e in entries]
            single = [point for point in single if point[1] is not None]
            if single:
                sizes.plot(*zip(*single), linewidth=1.2, linestyle=(0, (4, 3)), alpha=0.7, **style)
            latencies.plot(times, values, linewidth=1.6, **style)
            for side, x, y in stream:
                latencies.annotate(f"{side}", (x, y), (5, 4), textcoords="offset points", fontsize=8.5, color=INK)
        longest = max(e["milliseconds"] for entries in models.values() for e in entries)
        frames = int(longest * fps / 1000) + 1
        for number in range(1, min(frames, 20) + 1):
            latencies.axvline(1000 * number / fps, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
        latencies.set_xlim(left=0)
        sizes.set_xlabel("short side of the input (px)")
        sizes.set_ylabel("AP")
        latencies.set_xlabel("mean ms a frame (dotted: frames of the video)")
        for panel in (sizes, latencies):
            panel.margins(x=0.09, y=0.14)
        handles, labels = sizes.get_legend_handles_labels()
        handles.append(matplotlib.lines.Line2D([], [], color=GREY, linestyle=(0, (4, 3))))
        figure.legend(handles, [*labels, "single frames"], loc="outside upper right", ncols=4)
        if title:
            figure.suptitle(title, x=0.02, ha="left", fontsize=11)
    return figure
