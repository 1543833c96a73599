"""docs/results/runs.csv: the tables are the means, spreads and differences of the runs that are there."""

from __future__ import annotations

import csv
import re
from itertools import groupby
from pathlib import Path

import pytest

from msad.experiments.statistics import estimate

FOLDER = Path(__file__).parents[2] / "docs" / "results"
RUNS = list(csv.DictReader((FOLDER / "runs.csv").open(encoding="utf-8")))
KEYS = ("page", "section", "row")
MEANS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "CPU s", "AP of car")


def cells_of(page: str, section: str, row: str) -> list[tuple[str, str]]:
    """(header, cell) of the only row with this first cell, or one that goes on with a bracket, under the only heading
    that begins so."""
    text = (FOLDER / page).read_text(encoding="utf-8")
    (part,) = [part for part in re.split(r"^#+ ", text, flags=re.MULTILINE) if part.startswith(section)]
    headers, found, above = [], [], []
    for line in part.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if cells and set(line) <= set("|- "):
            headers = above
        elif cells[:1] == [row] or "".join(cells[:1]).startswith(f"{row} ("):
            found.append(list(zip(headers, cells)))
        above = cells
    assert len(found) == 1, f"{page}, {section}: {len(found)} rows {row}"
    return found[0]


def check(cell: str, mean: float, spread: float | None) -> None:
    """A mean, with or without bold, and what stands after ±, each to its last digit."""
    printed = re.fullmatch(r"([+-]?[\d.]+)(?: ± ([\d.]+))?", cell.strip("*"))
    assert printed, cell
    for text, value in ((printed[1], mean), (printed[2], spread)):
        if text:
            digits = len(text.partition(".")[2])
            assert float(text) == pytest.approx(value, abs=0.501 * 10**-digits), cell


def values_of(runs: list[dict], name: str) -> dict[str, float]:
    return {run["seed"]: float(run[name]) for run in runs if run[name]}


PLACES = {key: list(runs) for key, runs in groupby(RUNS, key=lambda run: tuple(run[key] for key in KEYS))}


@pytest.mark.parametrize("place", PLACES, ids=" | ".join)
def test_tables_are_the_means_of_their_runs(place):
    runs, metric, checked = PLACES[place], "", 0
    assert len({run["seed"] for run in runs}) == len(runs)
    for header, cell in cells_of(*place):
        if header in MEANS:
            metric, own = header, values_of(runs, header)
            if cell and own:
                check(cell, *estimate(list(own.values()))[:2])
                checked += 1
        elif header.startswith("minus `") and cell:
            base = values_of(PLACES[(*place[:2], header.removeprefix("minus "))], metric)
            differences = estimate([value - base[seed] for seed, value in values_of(runs, metric).items()])
            check(cell, differences.mean, differences.half)
            assert cell.startswith("**") == differences.excludes_zero
    assert checked >= 4
