"""Writing report.html and report.md, with the charts that the numbers allow and the pictures that are there."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ...visualization.plots import RowPoint, plot_ap_vs_cost, plot_results
from .rows import Row, reference_of, rows_of
from .style import STYLE
from .summary import summary
from .tables import markdown_table, table

TITLE = "Low-resolution detection by distillation"
_NOTES = (
    "AP is COCO's average precision (0-100) on the validation images, averaged over IoU 0.50-0.95; APs, APm and APl "
    "are those of small, medium and large objects. GMACs and milliseconds are those of the whole model for the first "
    "validation image (an R-CNN's heads cost what the proposals cost that it makes of it); the "
    "factor in brackets is relative to the full-resolution model. Training seconds (by the clock and, "
    "as cpu s, of the processor) and iterations are the row's own: "
    "a student needs those of its teacher besides. A dash means that there is no number."
)
# Pictures that the study leaves in the report's folder: pattern and caption.
_FOUND = (
    ("curves*.png", "Training curves."),
    ("panel*.png", "Validation images with the annotations and the models' predictions; a colour is a class."),
    ("panel*.jpg", "Validation images with the annotations and the models' predictions; a colour is a class."),
)


class Picture(NamedTuple):
    """A file in the report's folder and what it shows."""

    file: str
    caption: str


def write_report(metrics: dict, out_dir: str | Path) -> Path:
    """Write ``report.html`` and ``report.md`` into ``out_dir`` and return the path of the former.

    ``metrics`` is what a study leaves in its metrics.json: "results" (row -> task -> COCO metrics, "seconds",
    "iterations", "std", "per_seed"), "cost" (row -> "gmacs", "ms", each with "total"), and "engine", "command",
    "seconds", "seeds", "data", "versions", "log". Everything but "results" may be missing, and so may any row.
    Charts of AP by row and of AP against cost are drawn here; ``curves*.png``, ``panel*.png`` and ``panel*.jpg`` are
    shown if they are in ``out_dir``.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    pictures = _pictures(metrics, out_dir)
    (out_dir / "report.md").write_text(_markdown(metrics, pictures), encoding="utf-8")
    path = out_dir / "report.html"
    path.write_text(_html(metrics, pictures), encoding="utf-8")
    return path


def _pictures(metrics: dict, out_dir: Path) -> list[Picture]:
    rows = [row for row in rows_of(metrics) if row.ap is not None]
    reference = reference_of(rows)
    pictures = []
    if rows:
        points = [RowPoint(r.name, r.ap, None, r.std, r.per_seed) for r in rows]
        plot_results(points, out_dir / "results.png", reference and reference.name)
        caption = "Validation AP of every model"
        if any(row.std for row in rows):
            caption += "; the whiskers are the standard deviation over the seeds, the dots the seeds"
        pictures.append(Picture("results.png", f"{caption}."))
    for file, name, label in (("ap_vs_gmacs.png", "gmacs", "GMACs"), ("ap_vs_ms.png", "ms", "milliseconds")):
        points = [RowPoint(r.name, r.ap, getattr(r, name), r.std) for r in rows if getattr(r, name) is not None]
        if len(points) > 1:
            plot_ap_vs_cost(points, out_dir / file, f"{label} of the whole model per image")
            pictures.append(Picture(file, f"Validation AP against {label} of the whole model: upper left is better."))
    for pattern, caption in _FOUND:
        pictures += [Picture(file.name, caption) for file in sorted(out_dir.glob(pattern))]
    return pictures


def _setting(metrics: dict) -> Iterator[tuple[str, str]]:
    """Name and value of what a reader wants to know before the numbers."""
    data = metrics.get("data") or {}
    if data:
        counts = [
            f"{data[key]:,} {text}"
            for key, text in (
                ("images_train", "training images"),
                ("instances_train", "training objects"),
                ("images_val", "validation images"),
            )
            if data.get(key) is not None
        ]
        yield "Data", f"{data.get('name', 'unnamed')}{': ' if counts else ''}{', '.join(counts)}"
    if metrics.get("engine"):
        yield "Engine", str(metrics["engine"])
    if metrics.get("seeds"):
        yield "Seeds", ", ".join(map(str, metrics["seeds"]))
    if metrics.get("seconds") is not None:
        yield "Time of the whole study", _duration(metrics["seconds"])


def _reproduction(metrics: dict) -> Iterator[tuple[str, str]]:
    if metrics.get("engine"):
        yield "Engine", str(metrics["engine"])
    if metrics.get("seeds"):
        yield "Seeds", ", ".join(map(str, metrics["seeds"]))
    if metrics.get("versions"):
        yield "Versions", ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())
    if isinstance(metrics.get("log"), str):
        yield "Log", metrics["log"]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (rest if not hours else 0, "s")]
    return " ".join(f"{value} {unit}" for value, unit in parts if value) or "0 s"


def _described(metrics: dict) -> list[Row]:
    return [row for row in rows_of(metrics) if row.description]


def _markdown(metrics: dict, pictures: list[Picture]) -> str:
    lines = [f"# {TITLE}", ""]
    lines += [f"- {name}: {value}" for name, value in _setting(metrics)]
    lines += ["", "## In short", "", *(f"- {sentence}" for sentence in summary(metrics))]
    lines += ["", "## Results", "", markdown_table(metrics), "", _NOTES, ""]
    for picture in pictures:
        lines += [f"![{picture.caption}]({picture.file})", "", picture.caption, ""]
    lines += ["## What the models are", ""]
    lines += [f"- `{row.name}` ({row.title}): {row.description}" for row in _described(metrics)]
    lines += ["", "## How to reproduce", ""]
    if metrics.get("command"):
        lines += ["```bash", metrics["command"], "```", ""]
    lines += [f"- {name}: {value}" for name, value in _reproduction(metrics)]
    return "\n".join(lines).rstrip() + "\n"


def _html(metrics: dict, pictures: list[Picture]) -> str:
    e = html.escape
    facts = "".join(f"<div><dt>{e(n)}</dt><dd>{e(v)}</dd></div>" for n, v in _setting(metrics))
    sentences = "".join(f"<li>{e(sentence)}</li>" for sentence in summary(metrics))
    figures = "".join(
        f'<figure class="{"wide" if p.file.startswith("panel") else "chart"}">'
        f'<a href="{e(p.file)}"><img src="{e(p.file)}" alt="{e(p.caption)}" loading="lazy"></a>'
        f"<figcaption>{e(p.caption)}</figcaption></figure>"
        for p in pictures
    )
    kinds = "".join(
        f"<div><dt><code>{e(row.name)}</code> {e(row.title)}</dt><dd>{e(row.description)}</dd></div>"
        for row in _described(metrics)
    )
    command = f"<pre>{e(metrics['command'])}</pre>" if metrics.get("command") else ""
    remake = "".join(f"<div><dt>{e(n)}</dt><dd>{e(v)}</dd></div>" for n, v in _reproduction(metrics))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{TITLE}</title>
<style>
{STYLE}</style>
</head>
<body>
<main>
<h1>{TITLE}</h1>
<dl class="facts">{facts}</dl>
<h2>In short</h2>
<ul class="summary">{sentences}</ul>
<h2>Results</h2>
<div class="scroll">{_html_table(metrics)}</div>
<p class="note">{e(_NOTES)}</p>
<div class="figures">{figures}</div>
{f'<h2>What the models are</h2><dl class="kinds">{kinds}</dl>' if kinds else ""}
{f'<h2>How to reproduce</h2>{command}<dl class="facts">{remake}</dl>' if command or remake else ""}
</main>
</body>
</html>
"""


def _html_table(metrics: dict) -> str:
    e = html.escape
    headers, cells = table(metrics)
    titles = {row.name: row.title for row in rows_of(metrics)}
    lines = ["<table><thead><tr>", *(f'<th scope="col">{e(header)}</th>' for header in headers), "</tr></thead><tbody>"]
    for name, *values in cells:
        group = name.split("_")[0]
        mark = " result" if name == "student_L" else ""
        title = f"<small>{e(titles[name])}</small>" if titles[name] else ""
        lines.append(f'<tr class="{e(group)}{mark}"><th scope="row"><code>{e(name)}</code>{title}</th>')
        lines += [f"<td>{e(value)}</td>" for value in values]
        lines.append("</tr>")
    return "".join([*lines, "</tbody></table>"])
