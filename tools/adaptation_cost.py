#!/usr/bin/env python
"""Adaptation costs between a student and its teachers, and the order of the teachers that follows.

    tools/adaptation_cost.py --config-file student.yaml --weights student.pth --output costs \
        --quality htc=42.3 detectors=49.1 --k 3

fits a linear map between the features of every pair of networks (the student of the yaml, trained, and all of its
DISTILL.TEACHERS) on images of DATASETS.TRAIN and reports its error on those of DATASETS.TEST. Writes DIR/costs.json,
DIR/costs.png (all pairs), DIR/graph.png, and with --quality (the teachers' AP) DIR/stages.yaml, the DISTILL.STAGES of
Algorithm 1; tools/order_teachers.py compares it with other rules. Each image goes once through each network. The same
command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from tabulate import tabulate
from tqdm import tqdm

from msad import load_config
from msad.cli import parse, require_device
from msad.cli import run as run_command
from msad.data.fingerprint import file_sha256
from msad.data.fixed import FixedInputs
from msad.data.register import register_datasets
from msad.distill.progressive.cost import PAIRINGS, AdaptationCosts, image_maps
from msad.distill.progressive.least_squares import SGDOptions
from msad.distill.progressive.order import suggest
from msad.distill.progressive.table import dump_stages, parse_quality, stages_block
from msad.distill.teachers import FrozenTeacher
from msad.engine.build import load_teacher, teacher_entries
from msad.engine.checkpoint import atomic_write
from msad.engine.provenance import fingerprint, machine
from msad.engine.setup import load_model
from msad.resolution import get_resolution
from msad.visualization.adaptation import plot_graph, plot_heat_map

STUDENT = "student"
SAVE_SECONDS = 60


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="adaptation_cost.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="yaml of the student, with DISTILL.TEACHERS")
    add("--weights", required=True, metavar="FILE", help="checkpoint of the trained student")
    add("--output", required=True, metavar="DIR", help="folder to write to")
    add("--images", type=int, metavar="N", help="images of each data set, drawn at random (default: all)")
    add("--quality", nargs="+", default=[], metavar="NAME=AP", help="performance of the teachers, for their order")
    add("--k", type=int, metavar="N", help="the most teachers to use (default: all)")
    add("--normalized", action="store_true", help="order by costs divided by the variance of the target")
    add("--pairing", choices=PAIRINGS, default=PAIRINGS[0], help="which levels are compared (default by_stride)")
    add("--ridge", type=float, default=1e-6, metavar="R", help="of least squares, relative (default 1e-6)")
    add("--sgd", action="store_true", help="train the maps by SGD, a step an image, instead of solving for them")
    add("--lr", type=float, default=SGDOptions().lr, metavar="F", help="learning rate of --sgd")
    add("--seed", type=int, default=0, metavar="N", help="of the drawn images and the initial maps of --sgd")
    args = parse(parser, argv)
    if (args.images is not None and args.images < 1) or (args.k is not None and args.k < 1) or args.ridge < 0:
        parser.error("--images and --k must be at least 1, --ridge not negative")
    return args


def networks_of(cfg: CfgNode, weights: str, entries: list[dict]) -> list[FrozenTeacher]:
    """The student at its resolution and its teachers at their scales, all frozen."""
    scale = 0.5 ** get_resolution(cfg.DISTILL.STUDENT_RESOLUTION).shift
    student = FrozenTeacher(load_model(cfg, weights), name=STUDENT, scale=scale)
    return [student, *(load_teacher(entry, cfg) for entry in entries)]


class Progress:
    """Sums and the number of images in them, kept in a file from which the same command goes on."""

    def __init__(self, file: Path, of: str, study: AdaptationCosts) -> None:
        self._file, self._of, self._study = file, of, study
        self.done = {"train": 0, "val": 0}
        self._saved = time.monotonic()
        if file.is_file():
            kept = torch.load(file, map_location="cpu", weights_only=True)
            if kept["of"] == of:
                self.done = kept["done"]
                study.load_state_dict(kept["study"])

    def count(self, split: str) -> None:
        """An image was added."""
        self.done[split] += 1
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        with atomic_write(str(self._file)) as stream:
            torch.save({"of": self._of, "done": self.done, "study": self._study.state_dict()}, stream)
        self._saved = time.monotonic()


def measure(args: argparse.Namespace, cfg: CfgNode, entries: list[dict]) -> tuple[dict, dict]:
    """Costs as :meth:`AdaptationCosts.result` gives them, and the number of images of each split."""
    options = [args.images, args.pairing, args.sgd and args.lr, args.seed]
    used = [[entry, file_sha256(entry["WEIGHTS"]), load_config(entry["CONFIG"]).dump()] for entry in entries]
    networks = networks_of(cfg, args.weights, entries)
    sgd = SGDOptions(lr=args.lr) if args.sgd else None
    study = AdaptationCosts(networks, args.pairing, sgd=sgd, seed=args.seed)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    progress = Progress(output / "progress.pt", fingerprint(cfg, args.weights, used, options), study)
    size = {"short_side": max(cfg.INPUT.MIN_SIZE_TRAIN), "longest": cfg.INPUT.MAX_SIZE_TRAIN, "seed": args.seed}
    inputs = {
        split: [FixedInputs(cfg, name, args.images, **size) for name in names]
        for split, names in (("train", cfg.DATASETS.TRAIN), ("val", cfg.DATASETS.TEST))
    }
    total = {split: sum(map(len, parts)) for split, parts in inputs.items()}
    try:
        with tqdm(total=sum(total.values()), initial=sum(progress.done.values()), unit="img", disable=None) as bar:
            for split, parts in inputs.items():
                for item in _from(parts, progress.done[split]):
                    study.add(split, {network.name: image_maps(network, item) for network in networks})
                    progress.count(split)
                    bar.update()
    finally:
        progress.save()
    return study.result(args.ridge), total


def _from(parts: list[FixedInputs], start: int) -> Iterator[dict]:
    """Inputs of all parts from position ``start`` on; those before are not read."""
    places = [(part, index) for part in parts for index in range(len(part))]
    return (part[index] for part, index in itertools.islice(places, start, None))


def _without_nan(costs: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {a: {b: value for b, value in row.items() if math.isfinite(value)} for a, row in costs.items()}


def undetermined(levels: dict[str, dict[str, dict[str, dict]]]) -> str:
    """A warning if a linear map has fewer locations to be fitted on than unknowns, else ""."""
    few = [
        (entry["locations"], entry["unknowns"], pair)
        for row in levels.values() for pairs in row.values() for pair, entry in pairs.items()
        if entry["locations"] < entry["unknowns"]
    ]  # fmt: skip
    if not few:
        return ""
    locations, unknowns, pair = min(few)
    return (
        f"Warning: {len(few)} linear maps are fitted on fewer locations than they have unknowns (at worst {locations} "
        f"for {unknowns}, {pair}): their costs say little. Fix: more --images.\n"
    )


def check(args: argparse.Namespace, cfg: CfgNode) -> tuple[list[dict], dict[str, float]]:
    """Entries of the teachers and their quality (empty if none is given); ValueError for what cannot be measured."""
    entries = [entry for entry in teacher_entries(cfg) if "MEAN_OF" not in entry]
    names = [entry["NAME"] for entry in entries]
    if not entries:
        raise ValueError(f"{args.config_file} has no DISTILL.TEACHERS to compare the student with")
    quality = parse_quality(args.quality)
    unknown = next((name for name in quality if name not in names), None)
    if unknown is not None:
        raise ValueError(f"--quality: no teacher {unknown!r}; the teachers are {', '.join(names)}")
    absent = next((name for name in names if quality and name not in quality), None)
    if absent is not None:
        raise ValueError(f"--quality: the performance of teacher {absent!r} is missing")
    for key in ("TRAIN", "TEST"):
        if not cfg.DATASETS[key]:
            raise ValueError(f"adaptation costs need images in DATASETS.{key}")
    for file in (args.weights, *(entry["WEIGHTS"] for entry in entries)):
        if not os.path.isfile(file):
            raise FileNotFoundError(f"no checkpoint {file}")
    return entries, {name: quality[name] for name in names if name in quality}


def run(args: argparse.Namespace) -> str:
    cfg = load_config(args.config_file, args.opts)
    require_device(cfg.MODEL.DEVICE)
    entries, quality = check(args, cfg)
    register_datasets(cfg)
    found, images = measure(args, cfg, entries)
    costs = {key: _without_nan(found[key]) for key in ("costs", "normalized_costs")}
    used = costs["normalized_costs" if args.normalized else "costs"]
    names = [STUDENT, *(entry["NAME"] for entry in entries)]
    order = suggest("algorithm1", used, STUDENT, quality, args.k or len(quality)) if quality else []
    about: dict[str, Any] = {
        "student": STUDENT, "quality": quality, **costs, "levels": found["levels"], "teachers": entries, "order": order,
        "images": images, "short_side": max(cfg.INPUT.MIN_SIZE_TRAIN), "pairing": args.pairing, "seed": args.seed,
        "fit": {"sgd": SGDOptions(lr=args.lr)._asdict()} if args.sgd else {"ridge": args.ridge},
        **machine(cfg.MODEL.DEVICE), "config": args.config_file, "weights": args.weights,
    }  # fmt: skip
    output = Path(args.output)
    with atomic_write(str(output / "costs.json"), "w") as stream:
        json.dump(about, stream, indent=1)
    plot_heat_map({"adaptation cost": costs["costs"], "divided by variance": costs["normalized_costs"]}, names,
                  output / "costs.png")  # fmt: skip
    plot_graph(used, names, output / "graph.png", order)
    written = ["costs.json", "costs.png", "graph.png"]
    rows = [[a, *(costs["costs"][a].get(b) for b in names), *(costs["normalized_costs"][a].get(b) for b in names)]
            for a in names]  # fmt: skip
    header = ["from \\ to", *names, *(f"{name}/var" for name in names)]
    table = undetermined(found["levels"]) + tabulate(rows, header, floatfmt=".3f", missingval="-")
    if not order:
        hint = f"tools/order_teachers.py {output}/costs.json --quality NAME=AP ... puts the teachers in order"
        return f"{table}\n\n{output}: {', '.join(written)}\n{hint}"
    block = dump_stages(stages_block(order, entries))
    (output / "stages.yaml").write_text(block)
    written.append("stages.yaml")
    return f"{table}\n\nalgorithm1: {' -> '.join([STUDENT, *order])}\n\n{block}\n{output}: {', '.join(written)}"


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run_command(
        "adaptation_cost.py", lambda: print(run(args)), "interrupted. The same command goes on with the other images."
    )


if __name__ == "__main__":
    sys.exit(main())
