"""The model card of a student: what it is, from which data, how good, how expensive, and under which licence."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from ..experiments.tables import for_markdown

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
TASKS = {"bbox": "box", "segm": "mask", "keypoints": "keypoint"}


def read_licences(json_files: Sequence[str | Path]) -> list[str]:
    """Licences of the images of COCO annotation files: "name (url), N images", the commonest first.

    Images without one are counted too, unless no image has one.
    """
    counts: Counter = Counter()
    for file in json_files:
        content = json.loads(Path(file).read_text(encoding="utf-8-sig"))
        listed = [entry for entry in content.get("licenses") or [] if isinstance(entry, Mapping) and "id" in entry]
        known = {str(entry["id"]): entry for entry in listed}  # nothing checks the types of these ids
        counts.update(_licence(known.get(str(image.get("license")), {})) for image in content["images"])
    if not any(counts):
        return []
    return [f"{name or 'not stated'}, {number} image{'s' * (number != 1)}" for name, number in counts.most_common()]


def _licence(entry: Mapping[str, Any]) -> str:
    name, url = str(entry.get("name") or ""), str(entry.get("url") or "").replace("\\/", "/")
    return f"{name} ({url})" if name and url else name or url


def model_card(facts: Mapping[str, Any]) -> str:
    """The card as Markdown.

    Args:
        facts: "title", "detector", "backbone", "method", "scale", "teacher": texts; "data": {"name", "train", "val":
            numbers of images, "objects": by class, "changes": what reading them left out, "licences"}; "sizes":
            {"H", "student": short side in pixels}; "results": {model: {task: {metric: value}}}, the student first;
            "verdict": a sentence or ""; "cost": {model: {"gmacs", "ms", "parameters", "input"}}; "weights": {"start",
            "licence"}; "files": [(file, what it is)]; "made_with": lines.
    """
    data, sizes = facts["data"], facts["sizes"]
    licences = "; ".join(data["licences"]) or "not stated in the annotations; ask whoever gave you the data"
    lines = [
        f"# {facts['title']}", "",
        f"{facts['detector']} on {facts['backbone']}, for images with a short side of {sizes['student']} px: "
        f"{facts['scale']} of the {sizes['H']} px of the full-resolution model. Method: {facts['method']}. "
        f"{facts['teacher']}".rstrip(), "",
        "## Accuracy", "",
        f"On the {data['val']} validation images of {data['name']}. APs, APm and APl are those of objects of less than "
        "32², of 32² to 96², and of more than 96² pixels of the files.", "",
        _table(_accuracy(facts["results"])), "",
        *([facts["verdict"], ""] if facts["verdict"] else []),
        "## Cost", "",
        "Of the whole model, for an image of the most common size; milliseconds on the machine named below.", "",
        _table(_cost(facts["cost"], facts["results"])), "",
        "## Data", "",
        f"{data['name']}: {data['train']} images for training, {data['val']} for validation. Licence: {licences}.", "",
        _table((["class", "objects in training"], [[name, str(count)] for name, count in data["objects"].items()])), "",
        *(["Left out or changed when the annotations were read:", "", *(f"- {text}" for text in data["changes"]), ""]
          if data["changes"] else []),
        "## Licence of the weights", "",
        f"Training started from {facts['weights']['start']}; licence: {facts['weights']['licence']}. What may be done "
        "with the trained weights also depends on the licence of the data.", "",
        "## Limits", "",
        "One training with one seed: another seed gives another AP. The numbers are those of the validation "
        "images, which are not an independent test if choices were made by them.", "",
        "## Files", "",
        *(f"- `{file}`: {what}" for file, what in facts["files"]), "",
        "## Made with", "",
        *(f"- {line}" for line in facts["made_with"]), "",
    ]  # fmt: skip
    return "\n".join(lines)


def _table(table: tuple[list[str], list[list[str]]]) -> str:
    headers, cells = for_markdown(table)
    align = ["left"] + ["right"] * (len(headers) - 1)
    return tabulate(cells, headers, tablefmt="github", colalign=align if cells else None, disable_numparse=True)


def _accuracy(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> tuple[list[str], list[list[str]]]:
    cells = []
    for model, tasks in results.items():
        for task, values in tasks.items():
            if "AP" in values:
                name = f"{model}, {TASKS[task]}" if len(tasks) > 1 and task in TASKS else model
                cells.append([name, *(_number(values.get(metric), 1) for metric in METRICS)])
    return ["model", *METRICS], cells


def _cost(cost: Mapping[str, Mapping[str, Any]], models: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    cells = []
    for model in models:
        if model in cost:
            one = cost[model]
            cells.append([model, "x".join(map(str, one["input"])), f"{one['parameters'] / 1e6:.2f} M",
                          _number(one["gmacs"]["total"], 3), _number(one["ms"]["total"], 1)])  # fmt: skip
    return ["model", "padded input", "parameters", "GMACs", "ms"], cells


def _number(value: float | None, digits: int) -> str:
    """"-" for what COCO has no number for: there is no such object."""
    return "-" if value is None or value != value or value < 0 else f"{value:.{digits}f}"
