"""The tables of a comparison, for Markdown, the terminal and HTML."""

from __future__ import annotations

from collections.abc import Callable

from tabulate import tabulate

from .judgement import no_percentages
from .rows import AP, Row, full_resolution, rows_of
from .statistics import Estimate

MISSING = "-"
MAX_CLASSES = 6  # with more, AP of each class is no table for people
_OTHERS = ("AP50", "AP75", "APs", "APm", "APl")
_TASKS = {"bbox/AP": "box AP", "segm/AP": "mask AP", "keypoints/AP": "keypoint AP"}
Table = tuple[list[str], list[list[str]]]
Columns = list[tuple[str, Callable[[Row], str | None]]]


def accuracy_table(data: dict, metric: str = AP) -> Table:
    """Headers and cells, a list of cells a model; columns that no model has a number for are left out.

    Args:
        metric: TASK/METRIC of the first column, of shares and of differences.
    """
    rows = rows_of(data)
    task, name = metric.split("/", 1)
    full, several = full_resolution(rows, metric), len(data.get("seeds") or ()) > 1
    columns: Columns = [(name, lambda row: _plus_minus(row.estimate(metric)))]
    if several:
        columns.append(("95 % interval", lambda row: _interval(row.estimate(metric))))
    if full is not None and full.estimate(metric).mean > 0 and not no_percentages(data, metric):
        whole = full.estimate(metric).mean
        columns.append((f"of {full.name}", lambda row: _fixed(row.mean(metric), 0, " %", 100 / whole)))
    reference = next((row for row in rows if row.name == data.get("reference")), None)
    if reference is not None:
        columns.append((f"minus {reference.name}", lambda row: _difference(row.minus(reference, metric))))
        columns.append(("higher in", lambda row: _wins(row, reference, metric)))
    columns += [(key, lambda row, key=key: _fixed(row.mean(f"{task}/{key}"), 1)) for key in _OTHERS if key != name]
    for key in _few_classes(rows, task, name):
        columns.append((key.replace("-", " ", 1), lambda row, key=key: _fixed(row.mean(f"{task}/{key}"), 1)))
    for other, title in _TASKS.items():
        if other.split("/")[0] != task:
            columns.append((title, lambda row, other=other: _plus_minus(row.estimate(other))))
    return _table(rows, columns, always=name)


def class_table(data: dict, metric: str = AP) -> Table:
    """TASK/METRIC of each class, a line a class and a column a model: means over seeds.

    Empty where there are so few classes that :func:`accuracy_table` has them.
    """
    task, name = metric.split("/", 1)
    rows = [row for row in rows_of(data) if row.estimate(metric) is not None]
    keys = _class_keys(rows, task, name)
    if len(keys) <= MAX_CLASSES:
        return [], []
    cells = [[_fixed(row.mean(f"{task}/{key}"), 1) or MISSING for row in rows] for key in keys]
    return ["class", *(row.name for row in rows)], [[key.split("-", 1)[1], *line] for key, line in zip(keys, cells)]


def cost_table(data: dict) -> Table:
    """What training and inference take."""
    rows = rows_of(data)
    full = full_resolution(rows)
    columns: Columns = [
        ("iterations", lambda row: _fixed(row.mean("iterations"), 0)),
        ("train s", lambda row: _fixed(row.mean("seconds"), 0)),
        ("CPU s", lambda row: _fixed(row.mean("cpu_seconds"), 0)),
        ("input", lambda row: "x".join(map(str, row.cost.get("input") or ())) or None),
        ("parameters", lambda row: f"{row.cost['parameters']:,}" if row.cost.get("parameters") else None),
        ("GMACs", lambda row: _gmacs(row, full)),
        ("ms", lambda row: _fixed(row.total("ms"), 1)),
    ]
    return _table(rows, columns)


def _table(rows: list[Row], columns: Columns, always: str = "") -> Table:
    headers, cells = ["model"], [[row.name] for row in rows]
    for title, cell in columns:
        values = [cell(row) for row in rows]
        if title == always or any(value is not None for value in values):
            headers.append(title)
            for line, value in zip(cells, values):
                line.append(MISSING if value is None else value)
    return headers, cells


def _few_classes(rows: list[Row], task: str, name: str) -> list[str]:
    """Metrics of classes that a row has, if there are 2 to MAX_CLASSES: the mean over rare ones says little."""
    found = _class_keys(rows, task, name)
    return found if 2 <= len(found) <= MAX_CLASSES else []


def _class_keys(rows: list[Row], task: str, name: str) -> list[str]:
    """Metrics of single classes, those that a row has."""
    keys = dict.fromkeys(k for row in rows for run in row.runs.values() for k in run["metrics"].get(task) or ())
    prefix = "IoU-" if name == "mIoU" else f"{name}-"
    return [k for k in keys if k.startswith(prefix) and any(row.mean(f"{task}/{k}") is not None for row in rows)]


def format_tables(data: dict, metric: str = AP) -> str:
    """Accuracy and cost, for a terminal."""
    return "\n\n".join(format_table(table, "simple") for table in (accuracy_table(data, metric), cost_table(data)))


def format_table(table: Table, style: str) -> str:
    """One table in a style of tabulate's: "simple" for a terminal, "github" for a Markdown page."""
    headers, cells = for_markdown(table) if style == "github" else table
    if style == "github":
        cells = [[f"`{row[0]}`", *row[1:]] for row in cells]
    align = ["left"] + ["right"] * (len(headers) - 1)
    return tabulate(cells, headers, tablefmt=style, colalign=align if cells else None, disable_numparse=True)


def for_markdown(table: Table) -> Table:
    """A table whose texts, such as names of classes, end no cell of a Markdown page and are no HTML."""

    def escaped(text: str) -> str:
        return " ".join(text.split()).replace("|", "\\|").replace("<", "\\<")

    headers, cells = table
    return [escaped(header) for header in headers], [[escaped(cell) for cell in row] for row in cells]


def _fixed(value: float | None, digits: int, unit: str = "", factor: float = 1.0) -> str | None:
    return None if value is None else f"{factor * value:.{digits}f}{unit}"


def _plus_minus(value: Estimate | None) -> str | None:
    if value is None or value.std is None:
        return None if value is None else f"{value.mean:.1f}"
    return f"{value.mean:.1f} ± {value.std:.1f}"


def _interval(value: Estimate | None) -> str | None:
    if value is None or value.half is None:
        return None
    return f"{value.mean - value.half:.1f} to {value.mean + value.half:.1f}"


def _difference(change: Estimate | None) -> str | None:
    if change is None or change.half is None:
        return None if change is None else f"{change.mean:+.2f}"
    return f"{change.mean:+.2f} ± {change.half:.2f}" + (" *" if change.excludes_zero else "")


def _wins(row: Row, reference: Row, metric: str) -> str | None:
    change, base = row.minus(reference, metric), reference.values(metric)
    if change is None or change.n < 2:
        return None
    return f"{sum(v > base[s] for s, v in row.values(metric).items() if s in base)} of {change.n}"


def _gmacs(row: Row, full: Row | None) -> str | None:
    value, whole = row.total("gmacs"), full and full.total("gmacs")
    if value is None:
        return None
    return f"{value:.3g}" + (f" ({value / whole:.2f}x)" if whole else "")
