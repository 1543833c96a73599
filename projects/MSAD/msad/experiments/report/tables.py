"""The table of a study, for Markdown, the terminal and HTML."""

from __future__ import annotations

from collections.abc import Callable

from tabulate import tabulate

from .rows import Row, reference_of, rows_of

MISSING = "-"
MAX_CLASSES = 6
_TASKS = {"segm": "mask AP", "keypoints": "keypoint AP"}


def table(metrics: dict) -> tuple[list[str], list[list[str]]]:
    """Headers and cells, a list of cells per row; columns that no row has a number for are left out."""
    rows = rows_of(metrics)
    reference = reference_of(rows)
    columns: list[tuple[str, Callable[[Row], str | None]]] = [("AP", lambda row: _spread(row.ap, row.std))]
    columns += [(name, lambda row, name=name: _fixed(row.metric(name), 1)) for name in ("AP50", "APs", "APm", "APl")]
    classes = _few_classes(rows)
    columns += [(f"AP {name}", lambda row, name=name: _fixed(row.metric(f"AP-{name}"), 1)) for name in classes]
    for task, title in _TASKS.items():
        columns.append((title, lambda row, task=task: _spread(row.metric("AP", task), row.task_std(task))))
    columns += [
        (f"of {reference.name if reference else 'H'}", lambda row: _share(row, reference)),
        ("iterations", lambda row: _fixed(row.iterations, 0)),
        ("train s", lambda row: _fixed(row.seconds, 0)),
        ("cpu s", lambda row: _fixed(row.cpu_seconds, 0)),
        ("GMACs", lambda row: _gmacs(row, reference)),
        ("ms", lambda row: _fixed(row.ms, 1)),
    ]
    headers, cells = ["model"], [[row.name] for row in rows]
    for title, cell in columns:
        values = [cell(row) for row in rows]
        if title == "AP" or any(value is not None for value in values):
            headers.append(title)
            for line, value in zip(cells, values):
                line.append(MISSING if value is None else value)
    return headers, cells


def _few_classes(rows: list[Row]) -> list[str]:
    """Classes that a row has an AP for, if there are 2 to MAX_CLASSES: the mean over rare ones says little."""
    names = [key.removeprefix("AP-") for row in rows for key in row.result.get("bbox") or () if key.startswith("AP-")]
    found = [name for name in dict.fromkeys(names) if any(row.metric(f"AP-{name}") is not None for row in rows)]
    return found if 2 <= len(found) <= MAX_CLASSES else []


def markdown_table(metrics: dict) -> str:
    """GitHub-flavoured Markdown."""
    headers, cells = table(metrics)
    cells = [[cell.replace("|", "\\|") for cell in row] for row in cells]
    return _tabulate(headers, [[f"`{row[0]}`", *row[1:]] for row in cells], "github")


def format_table(metrics: dict) -> str:
    """Plain text for a terminal."""
    return _tabulate(*table(metrics), "simple")


def _tabulate(headers: list[str], cells: list[list[str]], style: str) -> str:
    align = ["left"] + ["right"] * (len(headers) - 1)
    return tabulate(cells, headers, tablefmt=style, colalign=align if cells else None, disable_numparse=True)


def _fixed(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}f}"


def _spread(value: float | None, std: float | None) -> str | None:
    text = _fixed(value, 1)
    return text if text is None or std is None else f"{text} ± {std:.1f}"


def _share(row: Row, reference: Row | None) -> str | None:
    if row.ap is None or reference is None or reference.ap <= 0:
        return None
    return f"{100 * row.ap / reference.ap:.0f} %"


def _gmacs(row: Row, reference: Row | None) -> str | None:
    if row.gmacs is None:
        return None
    text = f"{row.gmacs:.2f}" if row.gmacs < 10 else f"{row.gmacs:.1f}"
    if reference is None or not reference.gmacs:
        return text
    return f"{text} ({row.gmacs / reference.gmacs:.2f}x)"
