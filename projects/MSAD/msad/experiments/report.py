"""The report of a comparison: report.html and report.md with tables, a summary, charts, and how to reproduce it, beside
the numbers in report.json.

The page is report.html beside this module, whose script sorts tables and draws the gallery; it needs no server and no
network.
"""

from __future__ import annotations

import contextlib
import html
import json
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ..files import read_json, write_json
from ..visualization import (
    CostRow,
    IntervalRow,
    plot_ap_vs_cost,
    plot_curves,
    plot_intervals,
    plot_sweep_lines,
    variant_styles,
)
from . import gallery
from .jobs import format_seconds
from .judgement import summary
from .rows import AP, Row, failures, full_resolution, rows_of, student_resolution, warnings
from .tables import Table, accuracy_table, class_table, cost_table, format_table
from .variants import label

PANELS, COSTS = "panels.jpg", "ap_vs_cost.png"
_WIDE = (PANELS, COSTS)
_COST_AXES = {"gmacs": "GMACs of the whole model per image", "ms": "ms of the whole model per image"}
_ACCURACY = (
    "AP is COCO's average precision (0-100) on the validation images, averaged over IoU 0.50-0.95; APs, APm and APl "
    "are those of small, medium and large objects; mIoU is the mean over classes of the intersection of predicted and "
    "labelled pixels over their union. Of several seeds: mean ± standard deviation, the 95 % confidence "
    "interval of the mean (Student's t), and differences seed by seed with theirs; a star says that it excludes zero, "
    "which one in twenty models without any effect achieves by chance. A dash means that there is no number."
)
_CLASSES = "The metric of each class, mean over the seeds."
_COST = (
    "Training seconds (by the clock and of the processors) and iterations are the model's own; a student needs those "
    "of its teacher besides. GMACs and ms are those of the whole model, an R-CNN's with the proposals that it makes, "
    "for a validation image of the most common size, padded as in the column input (height x width); the factor in "
    "brackets is relative to the full-resolution model. ms is the least of several rounds in which models take turns."
)


class Picture(NamedTuple):
    """A file in the report's folder and what it shows."""

    file: str
    caption: str


def write_report(
    data: dict, out_dir: str | Path, title: str, metric: str = AP, curves: Mapping[str, Path] | None = None
) -> Path:
    """Write ``report.html``, ``report.md``, their charts and ``report.json`` into ``out_dir``; returns the first.

    Args:
        data: what report.json will hold: from :meth:`msad.experiments.comparison.Comparison.collect`, and if known
            "cost", "data", "seconds" and :func:`msad.engine.provenance.about_report`. Anything may be missing.
        title: of the page.
        metric: TASK/METRIC of the charts and the first column.
        curves: variant -> metrics.json of a run. A ``panels.jpg`` and a gallery (:func:`write_gallery`) are shown if
            they are in ``out_dir``.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    page = {
        "title": title, "facts": dict(_facts(data)), "summary": summary(data, metric),
        "tables": {name: (table, note) for name, table, note in (
            ("Accuracy", accuracy_table(data, metric), _ACCURACY), ("Classes", class_table(data, metric), _CLASSES),
            ("Cost", cost_table(data), _COST)) if table[0]},
        "notes": {"Runs that failed": failures(data), "What training warned of": warnings(data)},
        "pictures": draw_charts(data, out_dir, metric, curves or {}),
        "variants": {name: (v.get("title", ""), v.get("description") or f"{v['file']}")
                     for name, v in (data.get("variants") or {}).items()},
        "command": data.get("command", ""),
    }  # fmt: skip
    write_json(out_dir / "report.json", data)
    (out_dir / "report.md").write_text(_markdown(**page), encoding="utf-8")
    path = out_dir / "report.html"
    titles = {row.name: row.title for row in rows_of(data)}
    shown = read_json(out_dir / gallery.FILE)
    path.write_text(_html(titles=titles, shown=shown, **page), encoding="utf-8")
    return path


def draw_charts(data: dict, out_dir: Path, metric: str, curves: Mapping[str, Path]) -> list[Picture]:
    """Draw what there are numbers for."""
    rows = [row for row in rows_of(data) if row.estimate(metric) is not None]
    styles = variant_styles([*(data.get("variants") or {}), *(row.variant["name"] for row in rows)])
    pictures: list[Picture] = []

    def draw(file: str, caption: str, function, *args) -> None:
        function(*args[:1], out_dir / file, *args[1:])
        pictures.append(Picture(file, caption))

    full = full_resolution(rows, metric)
    reference = next((row for row in rows if row.name == data.get("reference")), None)
    line = (full or reference) and (full or reference).estimate(metric).mean
    name = (full or reference).name if full or reference else ""
    if rows:
        points = [_point(row, metric) for row in rows]
        draw("results.png", f"Validation {metric} of every model.", partial(plot_intervals, bars=True), points,
             f"validation {metric}", styles, line, name)  # fmt: skip
    if reference is not None and (changes := [p for row in rows if (p := _change(row, reference, metric))]):
        draw("differences.png", f"Differences to {reference.name}, seed by seed.", plot_intervals, changes,
             f"{metric} minus {reference.name}", styles, 0.0)  # fmt: skip
    points = [_cost_point(row, metric) for row in rows]
    if sum(bool(point.costs) for point in points) > 1:
        draw(COSTS, f"Validation {metric} against costs of the whole model: upper left is better. A line joins models "
             "that are the same network at several input sizes.", plot_ap_vs_cost, points, styles,
             f"validation {metric}")  # fmt: skip
    lines: dict[str, list] = {}
    keys: dict[str, None] = {}
    for row in rows:
        base, key, value = row.variant.get("swept") or ("", "", None)
        if type(value) in (int, float):
            keys[key] = None
            _, _, rest = row.name.partition(f"_{key.split('.')[-1]}_{label(value)}")  # of a budget, or of a joined part
            lines.setdefault(base + rest, []).append((value, _point(row, metric)))
    if any(len(points) > 1 for points in lines.values()) and len(keys) == 1:
        outside = reference is not None and not reference.variant.get("swept")  # without the loss, for example
        base_line = (reference.estimate(metric).mean, reference.name) if outside else ()
        draw("sweep.png", f"Validation {metric} over {next(iter(keys))}.", plot_sweep_lines, lines, next(iter(keys)),
             metric, *base_line)  # fmt: skip
    if found := {name: file for name, file in curves.items() if file.is_file()}:
        with contextlib.suppress(ValueError):  # runs so short that nothing was logged
            draw("curves.png", "Training curves.", plot_curves, found, styles)
    if (out_dir / PANELS).is_file():
        caption = "Validation images with the annotations and the models' predictions; a colour is a class."
        pictures.append(Picture(PANELS, caption))
    return pictures


def _point(row: Row, metric: str) -> IntervalRow:
    value = row.estimate(metric)
    values = list(row.values(metric).values())
    return IntervalRow(row.name, value.mean, value.half, values, row.variant["name"])


def _cost_point(row: Row, metric: str) -> CostRow:
    costs = {axis: row.total(key) for key, axis in _COST_AXES.items() if row.total(key) is not None}
    return CostRow(_point(row, metric), costs, row.cost.get("network", ""), min(row.cost.get("input") or [0]))


def _change(row: Row, reference: Row, metric: str) -> IntervalRow | None:
    change, base = row.minus(reference, metric), reference.values(metric)
    if change is None:
        return None
    values = [v - base[s] for s, v in row.values(metric).items() if s in base]
    return IntervalRow(row.name, change.mean, change.half, values, row.variant["name"])


def _facts(data: dict) -> Iterator[tuple[str, str]]:
    """Name and value of what a reader wants to know before the numbers."""
    about = data.get("data") or {}
    if about:
        counts = [f"{about[key]:,} {text}" for key, text in (("images_train", "training images"), ("instances_train",
                  "training objects"), ("images_val", "validation images")) if about.get(key) is not None]  # fmt: skip
        yield "Data", ": ".join(filter(None, [about.get("name", "unnamed"), ", ".join(counts)]))
    if data.get("engine"):
        yield "Engine", data["engine"]
    if data.get("versions"):
        yield "Versions", ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    if data.get("seeds"):
        yield "Seeds", ", ".join(map(str, data["seeds"]))
    if data.get("seconds") is not None:
        yield "Time in all", format_seconds(data["seconds"])


def _markdown(title, facts, summary, tables, notes, pictures, variants, command) -> str:
    lines = [f"# {title}", "", *(f"- {name}: {value}" for name, value in facts.items())]
    lines += ["", "## In short", "", *(f"- {sentence}" for sentence in summary)]
    for name, (table, note) in tables.items():
        lines += ["", f"## {name}", "", format_table(table, "github"), "", note]
    for heading, said in notes.items():
        if said:
            lines += ["", f"## {heading}", "", *(f"- {line}" for line in said)]
    for picture in pictures:
        lines += ["", f"![{picture.caption}]({picture.file})", "", picture.caption]
    lines += ["", "## The variants", ""]
    lines += [f"- `{name}`{f' ({about})' if about else ''}: {text}" for name, (about, text) in variants.items()]
    if command:
        lines += ["", "## How to reproduce", "", "```bash", command, "```"]
    return "\n".join(lines).rstrip() + "\n"


def _html(title, facts, summary, tables, notes, pictures, variants, command, titles, shown) -> str:
    """The page; ``shown`` is the content of a gallery.json, which takes the place of the panels, or None."""
    e = html.escape
    about = "".join(f"<div><dt>{e(name)}</dt><dd>{e(value)}</dd></div>" for name, value in facts.items())
    body = [f'<h1>{e(title)}</h1><dl class="facts">{about}</dl>']
    body.append(f'<h2>In short</h2><ul class="summary">{"".join(f"<li>{e(s)}</li>" for s in summary)}</ul>')
    for name, (table, note) in tables.items():
        body.append(f'<h2>{e(name)}</h2><div class="scroll">{_html_table(table, titles)}</div>')
        body.append(f'<p class="note">{e(note)}</p>')
    for heading, said in notes.items():
        if said:
            body.append(f"<h2>{heading}</h2><ul>{''.join(f'<li>{e(line)}</li>' for line in said)}</ul>")
    if shown:
        pictures = [picture for picture in pictures if picture.file != PANELS]
        body.append(_GALLERY.format(count=len(shown["images"]), least=gallery.LEAST_SCORE))
    figures = "".join(
        f'<figure class="{"wide" if p.file in _WIDE else "chart"}">'
        f'<a href="{e(p.file)}"><img src="{e(p.file)}" alt="{e(p.caption)}" loading="lazy"></a>'
        f"<figcaption>{e(p.caption)}</figcaption></figure>"
        for p in pictures
    )
    body.append(f'<div class="figures">{figures}</div>')
    kinds = "".join(
        f"<div><dt><code>{e(name)}</code> {e(about)}</dt><dd>{e(text)}</dd></div>"
        for name, (about, text) in variants.items()
    )
    body.append(f'<h2>The variants</h2><dl class="kinds">{kinds}</dl>')
    if command:
        body.append(f"<h2>How to reproduce</h2><pre>{e(command)}</pre>")
    page = (Path(__file__).with_name("report.html")).read_text(encoding="utf-8")
    # A JSON text without "<" cannot end the script that holds it.
    script = json.dumps(shown, separators=(",", ":")).replace("<", "\\u003c")
    parts = {"TITLE": e(title), "BODY": "\n".join(body), "GALLERY": script}
    return re.sub(r"{{(TITLE|BODY|GALLERY)}}", lambda found: parts[found[1]], page)


_GALLERY = """<section id="gallery" hidden><h2>Gallery</h2>
<p class="note">{count} validation images. A detection finds an object of its class from an IoU of 0.5 on; each finds at
most one, the best score first, and a detection that finds none is false. Detections below a score of {least} are not
here. A click on an image enlarges it; with one model switched on, its scores are written there.</p>
<div class="controls">
<label>Score from <input type="range" id="score" min="{least}" max="1" step="0.01" value="0.5">
<output id="threshold">0.50</output></label>
<span class="switches" id="switches"></span>
<label>Class <select id="class"><option value="">all</option></select></label>
<label><input type="checkbox" id="missed"> teacher finds, student misses</label>
</div>
<div class="scroll counts"><table id="counts"><thead><tr><th scope="col">in all images</th><th scope="col">found</th>
<th scope="col">missed</th><th scope="col">false</th><th scope="col">recall</th></tr></thead>
<tbody></tbody></table></div>
<p class="empty" id="none" hidden>No image has such an object at this score.</p>
<div class="shots" id="shots"></div>
</section>"""


def _html_table(table: Table, titles: Mapping[str, str]) -> str:
    e = html.escape
    headers, cells = table
    lines = ["<table><thead><tr>", *(f'<th scope="col">{e(header)}</th>' for header in headers), "</tr></thead><tbody>"]
    for name, *values in cells:
        about = f"<small>{e(titles[name])}</small>" if titles.get(name) else ""
        mark = ' class="result"' if student_resolution(name) else ""
        lines.append(f'<tr{mark}><th scope="row"><code>{e(name).replace("@", "@<wbr>")}</code>{about}</th>')
        lines += [f"<td>{e(value)}</td>" for value in values]
        lines.append("</tr>")
    return "".join([*lines, "</tbody></table>"])
