"""Tables of a comparison: mean, spread and interval of each row, and its paired difference to a reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from tabulate import tabulate

from .statistics import Estimate, estimate

MAX_CLASSES = 6  # with more, AP of each class is no table for people
MISSING = "-"
TITLES = {"row": "Equal iterations", "time": "Equal training time"}
_OTHERS = ("AP50", "AP75", "APs", "APm", "APl")


@dataclass(frozen=True)
class Entry:
    """One row of a table.

    Attributes:
        name: of the row; of a teacher with its branch.
        values: seed -> metric (0-100).
        difference: to the reference over the seeds that both have; None for the reference and where there is none.
        wins: seeds in which it is above the reference.
        others: further COCO metrics, means over the seeds.
        classes: class -> AP, mean over the seeds, if there are few classes.
        iterations, seconds, cpu_seconds: means; seconds are those of training.
    """

    name: str
    values: dict[int, float]
    difference: Estimate | None
    wins: int
    others: dict[str, float]
    classes: dict[str, float]
    iterations: int
    seconds: float
    cpu_seconds: float

    @property
    def ap(self) -> Estimate:
        return estimate(list(self.values.values()))


def entries(data: dict, kind: str, metric: str = "bbox/AP") -> list[Entry]:
    """The rows of kind "row" (equal iterations), "time" or "teacher" that have a result, in the given order.

    Args:
        data: from :func:`msad.experiments.comparison.collect`.
        metric: TASK/METRIC.

    Raises:
        ValueError: nothing was evaluated by this metric.
    """
    task, name = metric.split("/")
    runs = [r for r in data["runs"] if r["kind"] == kind and "results" in r]
    seeds_of: dict[str, dict[int, tuple[dict, dict]]] = {}  # evaluated name -> seed -> (run, metrics)
    for run in runs:
        for evaluated, results in run["results"].items():
            if name not in results.get(task, {}):
                known = [f"{t}/{m}" for t, metrics in results.items() for m in metrics]
                raise ValueError(f"--metric {metric}: {evaluated} was evaluated by {', '.join(known)}")
            seeds_of.setdefault(evaluated, {})[run["seed"]] = (run, results[task])
    order = list(data["rows"]) if kind != "teacher" else [r["row"] for r in runs]
    names = sorted(seeds_of, key=lambda n: order.index(next(iter(seeds_of[n].values()))[0]["row"]))
    reference = {seed: m[name] for seed, (_, m) in seeds_of.get(data["reference"], {}).items()}
    out = []
    for evaluated in names:
        found = [seeds_of[evaluated][seed] for seed in data["seeds"] if seed in seeds_of[evaluated]]
        values = {run["seed"]: metrics[name] for run, metrics in found if math.isfinite(metrics[name])}
        if not values:
            continue
        differences = [v - reference[s] for s, v in values.items() if s in reference and evaluated != data["reference"]]
        per_class = [key for key in found[0][1] if key.startswith(f"{name}-")]
        out.append(
            Entry(
                evaluated,
                values,
                estimate(differences) if differences else None,
                sum(d > 0 for d in differences),
                _means(found, [key for key in _OTHERS if key != name]),
                {k.split("-", 1)[1]: v for k, v in _means(found, per_class).items()}
                if len(per_class) <= MAX_CLASSES
                else {},
                round(fmean(run["iterations"] for run, _ in found)),
                fmean(run["seconds"] for run, _ in found),
                fmean(run["cpu_seconds"] for run, _ in found),
            )
        )
    return out


def _means(found: list[tuple[dict, dict]], keys: list[str]) -> dict[str, float]:
    """Means over the runs of those metrics that are numbers in all of them."""
    out = {}
    for key in keys:
        values = [metrics.get(key, math.nan) for _, metrics in found]
        if all(map(math.isfinite, values)):
            out[key] = fmean(values)
    return out


def table(rows: list[Entry], reference: str, metric: str = "AP") -> tuple[list[str], list[list[str]]]:
    """Headers and cells."""
    others = [key for key in _OTHERS if any(key in row.others for row in rows)]
    headers = ["row", "seeds", metric, "std", "95 % interval", f"minus {reference}", "higher in", *others,
               "iterations", "train s", "CPU s"]  # fmt: skip
    cells = []
    for row in rows:
        ap, change = row.ap, row.difference
        interval = MISSING if ap.half is None else f"{ap.mean - ap.half:.1f} to {ap.mean + ap.half:.1f}"
        cells.append([
            row.name, str(ap.n), f"{ap.mean:.2f}", MISSING if ap.std is None else f"{ap.std:.2f}", interval,
            _difference(change), MISSING if change is None else f"{row.wins} of {change.n}",
            *(f"{row.others[key]:.1f}" if key in row.others else MISSING for key in others),
            str(row.iterations), f"{row.seconds:.0f}", f"{row.cpu_seconds:.0f}",
        ])  # fmt: skip
    return headers, cells


def _difference(change: Estimate | None) -> str:
    if change is None:
        return MISSING
    if change.half is None:
        return f"{change.mean:+.2f}"
    return f"{change.mean:+.2f} ± {change.half:.2f}" + (" *" if change.excludes_zero else "")


def class_table(rows: list[Entry]) -> tuple[list[str], list[list[str]]] | None:
    """AP of each class, means over the seeds; None if there is one class or many."""
    classes = list(dict.fromkeys(name for row in rows for name in row.classes))
    if not classes:
        return None
    cells = [[r.name, *(f"{r.classes[c]:.1f}" if c in r.classes else MISSING for c in classes)] for r in rows]
    return ["row", *classes], cells


def _format(headers: list[str], cells: list[list[str]], style: str) -> str:
    align = ["left"] + ["right"] * (len(headers) - 1)
    return tabulate(cells, headers, tablefmt=style, colalign=align if cells else None, disable_numparse=True)


def failures(data: dict) -> list[str]:
    """A line for each run that has failed."""
    kinds = {"row": "", "time": " at equal time", "teacher": " (teacher)"}
    return [f"{r['row']}{kinds[r['kind']]}, seed {r['seed']}: {r['error']}" for r in data["runs"] if "error" in r]


def format_comparison(data: dict, metric: str = "bbox/AP", style: str = "simple") -> str:
    """All tables for a terminal (style "simple") or as the body of a Markdown page ("github")."""
    heading = "## " if style == "github" else ""
    reference, parts = data["reference"], []
    for kind, title in TITLES.items():
        rows = entries(data, kind, metric)
        if not rows:
            continue
        parts.append(f"{heading}{title}: {metric}")
        parts.append(_format(*table(rows, reference, metric.split("/")[1]), style))
        if per_class := class_table(rows):
            parts += [f"{heading}{title}: AP of each class", _format(*per_class, style)]
    teachers = entries(data, "teacher", metric)
    if teachers:
        headers, cells = table(teachers, reference, metric.split("/")[1])
        keep = [i for i, title in enumerate(headers) if not title.startswith(("minus", "higher"))]
        parts.append(f"{heading}Teachers")
        parts.append(_format([headers[i] for i in keep], [[row[i] for i in keep] for row in cells], style))
    if failed := failures(data):
        parts += [f"{heading}Runs that failed", "\n".join(f"- {line}" for line in failed)]
    return "\n\n".join(parts) or "No run has finished yet."


def write_markdown(data: dict, path: Path, metric: str = "bbox/AP", pictures: tuple[str, ...] = ()) -> None:
    """The page of a comparison, with how to read it."""
    count = sum(e.difference is not None for e in entries(data, "row", metric))
    text = [
        "# Comparison",
        f"Seeds {', '.join(map(str, data['seeds']))}. Intervals are 95 % confidence intervals of the mean by Student's "
        f"t distribution; differences to `{data['reference']}` are taken seed by seed, and a star says that their "
        f"interval excludes zero. Of {count} rows without any effect about one in twenty gets a star by chance. "
        + (
            "Equal training time includes the teachers; the columns have that of the row alone."
            if data["count_teachers"]
            else "Training time is that of the row alone, without its teacher."
        ),
        format_comparison(data, metric, "github"),
        *(f"![{picture}]({picture})" for picture in pictures),
        "## Files",
        "\n".join(f"- `{name}`: `{file}`" for name, file in data["rows"].items()),
        f"Command: `{data['command']}`; engine {data['engine']}, torch {data['torch']}." if "command" in data else "",
    ]
    path.write_text("\n\n".join(part for part in text if part) + "\n")
