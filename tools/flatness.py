#!/usr/bin/env python
"""Loss landscape of trained detectors: flatness of the detection loss, and training against validation loss.

    tools/flatness.py --model baseline.yaml baseline.pth --model student.yaml student.pth --output flat
    tools/flatness.py --model student.yaml student.pth --directions 10 --surface 15 --output flat --images 64

moves each model along random filter-normalised directions and evaluates the detection losses alone (no teacher) on
images of DATASETS.TRAIN at the test size, without augmentation; on DATASETS.TEST at the weights themselves. Writes
DIR/flatness.json, DIR/flatness.png and, with --surface, DIR/surface.png, and prints a table. Finished directions are
kept: the same command goes on after an interruption. Overrides hold for all models.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from msad.cli import load_models, parse, positive, positive_float
from msad.cli import run as run_command
from msad.engine.provenance import fingerprint, write_measurements
from msad.engine.setup import load_model
from msad.evaluation.detection_loss import DetectionLoss, fixed_batches
from msad.evaluation.flatness import DISTANCES, loss_along, moved, random_direction, sharpness
from msad.files import finite, read_json, write_json
from msad.visualization.flatness import lines_figure, surfaces_figure
from msad.visualization.plots import save_figure


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="flatness.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", nargs=2, action="append", required=True, metavar=("YAML", "WEIGHTS"), help="may be repeated")
    add("--output", required=True, metavar="DIR", help="folder to write to")
    add("--images", type=positive, default=32, metavar="N", help="images of each data set (default 32)")
    add("--batch-size", type=positive, default=4, metavar="N", help="images of a batch (default 4)")
    add("--directions", type=positive, default=10, metavar="N", help="random directions (default 10)")
    add("--distances", nargs="+", type=positive_float, default=list(DISTANCES), metavar="D", help="in both senses")
    add("--surface", type=int, default=0, metavar="N", help="loss on a grid of N x N over two directions")
    add("--seed", type=int, default=0, metavar="N", help="of directions and images")
    args = parse(parser, argv)
    if args.surface < 0 or args.surface == 1:
        parser.error(f"--surface must be 2 or more points a side, or 0 for none, got {args.surface}")
    return args


class Record:
    """What is known of a model, kept in DIR/parts after every direction and row of the surface."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.values: dict = read_json(file) or {}

    def keep(self, key: str, value: object) -> None:
        self.values[key] = value
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._file, self.values, indent=None)


def explore(args: argparse.Namespace, cfg: CfgNode, weights: str, name: str) -> dict:
    """One entry of flatness.json."""
    settings = [args.images, args.batch_size, args.seed]
    record = Record(Path(args.output) / "parts" / f"{name}_{fingerprint(cfg, weights, *settings)}.json")
    steps = sorted({0.0, *args.distances, *(-d for d in args.distances)})
    grid = np.linspace(-max(args.distances), max(args.distances), args.surface).tolist() if args.surface else []
    lines = {f"direction {args.seed + i} {steps}": args.seed + i for i in range(args.directions)}
    rows = {f"surface {grid} row {i}": y for i, y in enumerate(grid)}
    missing = [key for key in ("train", "val", *lines, *rows) if key not in record.values]
    if missing:
        batches = {"train": fixed_batches(cfg, cfg.DATASETS.TRAIN[0], args.images, args.batch_size, args.seed)}
        batches["val"] = fixed_batches(cfg, cfg.DATASETS.TEST[0], args.images, args.batch_size, args.seed)
        model = load_model(cfg, weights)
        evaluations = {key: len(steps) if key in lines else len(grid) if key in rows else 1 for key in missing}
        total = sum(count * len(batches["val" if key == "val" else "train"]) for key, count in evaluations.items())
        with tqdm(total=total, desc=name, unit="batch", dynamic_ncols=True, disable=None) as bar:
            losses = {split: DetectionLoss(found, bar.update) for split, found in batches.items()}
            plane = [random_direction(model, args.seed + i) for i in range(2)] if rows else []
            for key in missing:
                record.keep(key, _evaluate(key, model, losses, lines, steps, rows, plane, grid))
    values = record.values
    found_lines = [values[key] for key in lines]
    rises = sharpness([{s: math.inf if v is None else v for s, v in zip(steps, line)} for line in found_lines])
    return {
        "train": values["train"],
        "val": values["val"],
        "gap": values["val"] - values["train"],
        "sharpness": {str(distance): finite(value) for distance, value in rises.items()},
        "steps": steps,
        "lines": found_lines,
        "grid": grid,
        "surface": [values[key] for key in rows],
    }


def _evaluate(
    key: str, model: nn.Module, losses: dict, lines: dict, steps: list, rows: dict, plane: list, grid: list
) -> float | list[float | None]:
    """The loss of a data set, along a line, or on a row of the surface; None where it is not finite."""
    if key in losses:
        return losses[key](model)
    if key in lines:
        return list(map(finite, loss_along(model, losses["train"], random_direction(model, lines[key]), steps)))
    values = []
    for x in grid:
        with moved(model, plane, [x, rows[key]]):
            values.append(finite(losses["train"](model)))
    return values


def run(args: argparse.Namespace) -> str:
    loaded = load_models(args.model, args.opts)
    first = next(cfg for cfg, _ in loaded.values())
    for cfg, _ in loaded.values():
        for key in ("TRAIN", "TEST"):
            if len(cfg.DATASETS[key]) != 1 or cfg.DATASETS[key] != first.DATASETS[key]:
                raise ValueError(f"all models need one and the same DATASETS.{key}, got {list(cfg.DATASETS[key])}")
    models = {name: explore(args, cfg, weights, name) for name, (cfg, weights) in loaded.items()}
    output = Path(args.output)
    options = {option: getattr(args, option) for option in ("images", "batch_size", "directions", "seed")}
    datasets = {key: first.DATASETS[key][0] for key in ("TRAIN", "TEST")}
    write_measurements(output / "flatness.json", models, loaded, **options, datasets=datasets)
    written = ["flatness.json", "flatness.png"]
    save_figure(lines_figure(models), output / "flatness.png")
    if args.surface:
        save_figure(surfaces_figure(models), output / "surface.png")
        written.append("surface.png")
    distances = list(next(iter(models.values()))["sharpness"])
    rows = [[name, m["train"], m["val"], m["gap"], *m["sharpness"].values()] for name, m in models.items()]
    header = ["model", "train loss", "val loss", "gap", *(f"rise at {distance}" for distance in distances)]
    return f"{tabulate(rows, header, floatfmt='.4f', missingval='inf')}\n\n{output}: {', '.join(written)}"


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run_command(
        "flatness.py",
        lambda: print(run(args)),
        "interrupted. Finished directions are kept; the same command goes on with the others.",
    )


if __name__ == "__main__":
    sys.exit(main())
