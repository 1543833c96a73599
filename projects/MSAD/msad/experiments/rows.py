"""The rows of a comparison's tables and charts: a model with its results over seeds and its costs."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from ..evaluation.coco_stats import counted, detects_nothing, is_number
from ..resolution import RESOLUTIONS
from .statistics import Estimate, estimate

AP, MIOU = "bbox/AP", "sem_seg/mIoU"


@dataclass(frozen=True)
class Row:
    """One evaluated model; numbers that are missing or not finite are None.

    Attributes:
        name: of the variant; of a teacher with its branch.
        variant: its entry in the data, see :meth:`msad.experiments.comparison.Comparison.collect`, with its "name".
        runs: seed -> run, whose "metrics" are {task: {metric: value}}.
        cost: see :func:`msad.experiments.costs.measure_costs`.
    """

    name: str
    variant: dict
    runs: dict[int, dict]
    cost: dict

    @property
    def title(self) -> str:
        branch = self.name.removeprefix(self.variant["name"]).strip("_")
        return f"{self.variant.get('title') or 'teacher'}, {branch}" if branch else self.variant.get("title", "")

    def values(self, metric: str = AP) -> dict[int, float]:
        """seed -> value of TASK/METRIC, for those runs that have one."""
        task, name = metric.split("/", 1)
        found = {seed: (run["metrics"].get(task) or {}).get(name) for seed, run in self.runs.items()}
        return {seed: value for seed, value in found.items() if is_number(value)}

    def estimate(self, metric: str = AP) -> Estimate | None:
        """Over the seeds; None without a value."""
        values = self.values(metric)
        return estimate(list(values.values())) if values else None

    def mean(self, key: str) -> float | None:
        """Of "iterations", "warmup", "seconds", "cpu_seconds" or a TASK/METRIC, over the seeds that all have it."""
        values = list(self.values(key).values()) if "/" in key else [r.get(key) for r in self.runs.values()]
        return fmean(values) if len(values) == len(self.runs) and all(map(is_number, values)) else None

    def total(self, key: str) -> float | None:
        """Cost of the whole model: "gmacs" or "ms"."""
        value = (self.cost.get(key) or {}).get("total")
        return value if is_number(value) else None

    def minus(self, other: Row, metric: str = AP) -> Estimate | None:
        """The difference, seed by seed, over the seeds that both have; None if there are none."""
        base = other.values(metric)
        pairs = [value - base[seed] for seed, value in self.values(metric).items() if seed in base]
        return estimate(pairs) if pairs and self.name != other.name else None


def without_detections(data: dict) -> list[str]:
    """Names, with their seeds, of models that detect nothing: their AP is NaN and counts as 0."""
    return [
        f"{name} (seed {run['seed']})" for run in data.get("runs") or ()
        for name, metrics in run.get("results", {}).items()
        if any(detects_nothing(values) for values in (metrics or {}).values())
    ]  # fmt: skip


def rows_of(data: dict) -> list[Row]:
    """The models that have a result, in the order of the variants, teachers of others last.

    Args:
        data: from :meth:`msad.experiments.comparison.Comparison.collect`, with "cost" if it was measured.
    """
    variants, costs = data.get("variants") or {}, data.get("cost") or {}
    found: dict[str, tuple[dict, dict[int, dict]]] = {}
    results = [metrics or {} for run in data.get("runs") or () for metrics in run.get("results", {}).values()]
    present = {(task, name) for metrics in results for task, values in metrics.items()
               for name, value in (values or {}).items() if is_number(value)}  # fmt: skip
    for run in data.get("runs") or ():
        for name, metrics in run.get("results", {}).items():
            variant = {"name": run["variant"], **variants.get(run["variant"], {})}
            found.setdefault(name, (variant, {}))[1][run["seed"]] = {**run, "metrics": counted(metrics or {}, present)}
    order = {name: (v.get("teacher", False), i) for i, (name, v) in enumerate(variants.items())}
    rows = [Row(name, variant, runs, costs.get(name) or {}) for name, (variant, runs) in found.items()]
    return sorted(rows, key=lambda row: (order.get(row.variant["name"], (True, len(order))), row.name))


def student_resolution(name: str) -> str:
    """The resolution of a study's student, which is the model called student_RESOLUTION; "" for all others."""
    start, _, resolution = name.partition("student_")
    return resolution if not start and resolution in RESOLUTIONS else ""


def teachers_of(row: Row) -> list[str]:
    """Names of the variants that it learns from; reports of earlier versions do not say, and had one of this name."""
    return row.variant.get("teachers", ["teacher"])


def full_resolution(rows: list[Row], metric: str = "") -> Row | None:
    """The row that shares and cost ratios refer to, with this metric, if any; None if there is none.

    It is baseline_H, else a teacher that learns from no other: its branch H, if it has branches.
    """
    found = {row.name: row for row in rows if not metric or row.estimate(metric) is not None}
    taught = {row.variant["name"] for row in rows if row.variant.get("teachers")}
    first = dict.fromkeys(name for row in rows for name in teachers_of(row) if name not in taught)
    names = ["baseline_H", *(shown for name in first for shown in (f"{name}_H", name))]
    return next((found[name] for name in names if name in found), None)


def main_metric(rows: list[Row]) -> str:
    """AP of boxes, or mIoU if that is what the first row has."""
    return next((metric for metric in (AP, MIOU) if any(row.values(metric) for row in rows[:1])), AP)


def refuse_losses(metric: str) -> None:
    """ValueError if TASK/METRIC is better where it is smaller, which no ranking, chart or sentence here expects."""
    if metric.startswith("validation/"):
        raise ValueError(f"--metric {metric} is a loss: models are compared by metrics of which more is better")


def check_metric(rows: list[Row], metric: str) -> None:
    """ValueError with the known ones if no row was evaluated by TASK/METRIC, or if that is a loss."""
    refuse_losses(metric)
    found = [run["metrics"] for row in rows for run in row.runs.values()]
    known = dict.fromkeys(f"{task}/{name}" for metrics in found for task, values in metrics.items() for name in values)
    if known and metric not in known:
        raise ValueError(f"--metric {metric}: the models were evaluated by {', '.join(known)}")


def warnings(data: dict) -> list[str]:
    """What training has warned of, a line for each text, with the variants that it is about, and seeds if not all."""
    about: dict[str, dict[str, list[int]]] = {}
    seeds: dict[str, list[int]] = {}
    for run in data.get("runs") or ():
        seeds.setdefault(run["variant"], []).append(run["seed"])
        for text in () if "same_as" in run else run.get("warnings") or ():
            about.setdefault(text, {}).setdefault(run["variant"], []).append(run["seed"])

    def name(variant: str, found: list[int]) -> str:
        return variant if found == seeds[variant] else f"{variant} (seed {', '.join(map(str, found))})"

    return [f"{', '.join(name(*one) for one in variants.items())}: {text}" for text, variants in about.items()]


def failures(data: dict) -> list[str]:
    """A line for each run that has failed."""
    return [f"{r['variant']}, seed {r['seed']}: {r['error']}" for r in data.get("runs") or () if "error" in r]
