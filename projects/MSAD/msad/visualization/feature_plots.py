"""Magnitudes and angles of raw features over training (WACV 2024, supplementary figure 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from .colours import GREY, PALETTE
from .plots import STYLE, read_metrics

_ROWS = ("m n / N", "magnitude", "angle (degrees)")
Levels = dict[str, dict[str, np.ndarray]]


def read_features(path: str | Path) -> Levels:
    """level -> {"iteration", "m", "n", "mn", "angle", ...}, all (records,), of a features.jsonl.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it has no record with a level.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no {path}: the run was made without DISTILL.ANALYSIS_PERIOD")
    columns: dict[str, dict[str, list[float]]] = {}
    for record in read_metrics(path):
        for level, values in record["levels"].items():
            column = columns.setdefault(level, {})
            for key, value in {"iteration": record["iteration"], **values}.items():
                column.setdefault(key, []).append(value)
    if not columns:
        raise ValueError(f"{path} has no level: student and teacher have no maps of equal shape")
    return {level: {key: np.array(v) for key, v in column.items()} for level, column in columns.items()}


def features_figure(runs: Mapping[str, Levels], levels: Sequence[str] | None = None) -> Figure:
    """A grid of charts, a column a level and a colour a run; see :func:`read_features`.

    Raises:
        ValueError: a level that no run has.
    """
    known = list(dict.fromkeys(level for run in runs.values() for level in run))
    for level in levels or ():
        if level not in known:
            raise ValueError(f"--levels {level}: the runs have {', '.join(known)}")
    levels = list(levels or known)
    with matplotlib.rc_context(STYLE):
        width = max(1.2 + 2.5 * len(levels), 5.0)
        figure = Figure(figsize=(width, 6.6), layout="constrained")
        axes = figure.subplots(3, len(levels), sharex=True, sharey="row", squeeze=False)
        for column, level in zip(axes.T, levels):
            teacher = False  # is the same in all runs but for the images drawn
            for (_, run), colour in zip(runs.items(), PALETTE * len(runs)):
                if level not in run:
                    continue
                values = run[level]
                if not teacher:
                    column[1].plot(values["iteration"], values["m"], color=GREY, linestyle="--", linewidth=1.2)
                    teacher = True
                for ax, key in zip(column, ("mn", "n", "angle")):
                    ax.plot(values["iteration"], values[key], color=colour, linewidth=1.5)
            column[0].set_title(level, fontsize=11)
            for ax in column[:2]:
                ax.set_yscale("log")
                ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                ax.yaxis.set_major_formatter("{x:g}")
                ax.yaxis.set_minor_locator(NullLocator())
            column[2].set_ylim(0, 120)
            column[2].set_yticks([0, 30, 60, 90, 120])
            column[2].set_xlabel("iteration")
        for ax, title in zip(axes[:, 0], _ROWS):
            ax.set_ylabel(title)
        axes[1, -1].plot([], [], color=GREY, linestyle="--", linewidth=1.2, label="m: teacher")
        for name, colour in zip(runs, PALETTE * len(runs)):
            axes[1, -1].plot([], [], color=colour, linewidth=1.5, label=f"n: student, {name}")
        figure.legend(loc="outside lower center", ncols=min(int(width / 2.2), 1 + len(runs)), fontsize=9)
    return figure
