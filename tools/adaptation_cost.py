#!/usr/bin/env python
"""Adaptation costs between a student and its teachers, and the order of the teachers that follows.

    tools/adaptation_cost.py --config-file student.yaml --weights student.pth --output costs \
        --quality htc=42.3 detectors=49.1 --k 3

fits a linear map between the features of every pair of networks (the student of the yaml, trained, and all of its
DISTILL.TEACHERS) on images of DATASETS.TRAIN and reports its error on those of DATASETS.TEST. Writes DIR/costs.json,
DIR/costs.png (all pairs), DIR/graph.png, and with --quality (the teachers' AP) DIR/stages.yaml, the curriculum of
Algorithm 1, which train_net.py --config-file runs as it is, from the student of --weights; tools/order_teachers.py
compares it with other rules. Each image goes once through each network. The same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from tabulate import tabulate

from msad import load_config
from msad.cli import parse, positive, refuse_overwriting, require_device
from msad.cli import run as run_command
from msad.data.register import register_datasets
from msad.distill.losses.pairing import MATCHES
from msad.distill.progressive.least_squares import SGDOptions
from msad.distill.progressive.order import suggest
from msad.distill.progressive.table import curriculum, dump_stages, parse_quality, stages_block
from msad.engine.build import teacher_entries
from msad.engine.provenance import machine
from msad.experiments.adaptation import STUDENT, cost_record, finite_costs, measure_adaptation, pairing_of
from msad.files import require_checkpoint, write_json
from msad.visualization.adaptation import graph_figure, heat_map_figure
from msad.visualization.plots import save_figure


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="adaptation_cost.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="yaml of the student, with DISTILL.TEACHERS")
    add("--weights", required=True, metavar="FILE", help="checkpoint of the trained student")
    add("--output", required=True, metavar="DIR", help="folder to write to")
    add("--images", type=positive, metavar="N", help="images of each data set, drawn at random (default: all)")
    add("--quality", nargs="+", default=[], metavar="NAME=AP", help="performance of the teachers, for their order")
    add("--k", type=positive, metavar="N", help="the most teachers to use (default: all)")
    add("--normalized", action="store_true", help="order by costs divided by the variance of the target")
    add("--pairing", choices=MATCHES, help="which levels are compared (default: those that DISTILL.LOSSES compare)")
    add("--ridge", type=float, default=1e-6, metavar="R", help="of least squares, relative (default 1e-6)")
    add("--sgd", action="store_true", help="train the maps by SGD, a step an image, instead of solving for them")
    add("--lr", type=float, default=SGDOptions().lr, metavar="F", help="learning rate of --sgd")
    add("--seed", type=int, default=0, metavar="N", help="of the drawn images and the initial maps of --sgd")
    args = parse(parser, argv)
    if args.ridge < 0:
        parser.error(f"--ridge must not be negative, got {args.ridge}")
    return args


def doubts(levels: dict[str, dict[str, dict[str, dict]]]) -> str:
    """Warnings of linear maps that have fewer locations to be fitted on than unknowns, or are worse than a constant."""
    entries = [(pair, e) for row in levels.values() for pairs in row.values() for pair, e in pairs.items()]
    few = [(e["locations"], e["unknowns"], pair) for pair, e in entries if e["locations"] < e["unknowns"]]
    bad = [
        (e["train_cost"] / e["train_variance"], pair)
        for pair, e in entries if 0 < e["train_variance"] < e["train_cost"]
    ]  # fmt: skip
    text = ""
    if few:
        locations, unknowns, pair = min(few)
        text += (
            f"Warning: {len(few)} linear maps are fitted on fewer locations than they have unknowns (at worst "
            f"{locations} for {unknowns}, {pair}): their costs say little. Fix: more --images.\n"
        )
    if bad:
        ratio, pair = max(bad)
        text += (
            f"Warning: {len(bad)} linear maps are worse than a constant on the images that they learned from (at "
            f"worst {ratio:.2g} times, {pair}): --sgd has not got far. Fix: another --lr, more --images, or no --sgd.\n"
        )
    return text


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
        require_checkpoint(file)
    return entries, {name: quality[name] for name in names if name in quality}


def run(args: argparse.Namespace) -> str:
    cfg = load_config(args.config_file, args.opts)
    require_device(cfg.MODEL.DEVICE)
    entries, quality = check(args, cfg)
    read = [args.config_file, args.weights, *(entry[key] for entry in entries for key in ("CONFIG", "WEIGHTS"))]
    refuse_overwriting([Path(args.output) / name for name in ("costs.json", "stages.yaml")], read)
    register_datasets(cfg)
    output, sgd = Path(args.output), SGDOptions(lr=args.lr) if args.sgd else None
    pairing = args.pairing or pairing_of(cfg)
    options = {"images": args.images, "pairing": pairing, "ridge": args.ridge, "sgd": sgd, "seed": args.seed}
    found, images = measure_adaptation(cfg, args.weights, entries, output, **options)
    costs = finite_costs(found)
    used = costs["normalized_costs" if args.normalized else "costs"]
    names = [STUDENT, *(entry["NAME"] for entry in entries)]
    about: dict[str, Any] = {
        **cost_record(args.config_file, args.weights, entries, args.opts, quality, costs),
        **machine(cfg.MODEL.DEVICE),
        "levels": found["levels"],
        "images": images,
        "short_side": max(cfg.INPUT.MIN_SIZE_TRAIN),
        "pairing": pairing,
        "seed": args.seed,
        "fit": {"sgd": sgd._asdict()} if sgd else {"ridge": args.ridge},
    }
    order: list[str] = []
    try:
        order = suggest("algorithm1", used, STUDENT, quality, args.k or len(quality)) if quality else []
    finally:  # what is measured is kept where no order follows from it
        write_json(output / "costs.json", {**about, "order": order})
    tables = {"adaptation cost": costs["costs"], "divided by variance": costs["normalized_costs"]}
    save_figure(heat_map_figure(tables, names), output / "costs.png")
    save_figure(graph_figure(used, names, order), output / "graph.png")
    written = ["costs.json", "costs.png", "graph.png"]
    rows = [[a, *(costs["costs"][a].get(b) for b in names), *(costs["normalized_costs"][a].get(b) for b in names)]
            for a in names]  # fmt: skip
    header = ["from \\ to", *names, *(f"{name}/var" for name in names)]
    table = doubts(found["levels"]) + tabulate(rows, header, floatfmt=".3f", missingval="-")
    if not order:
        hint = f"tools/order_teachers.py {output}/costs.json --quality NAME=AP ... puts the teachers in order"
        return f"{table}\n\n{output}: {', '.join(written)}\n{hint}"
    stages = curriculum(stages_block(order, entries), about["config"], args.weights, args.output, args.opts)
    block = dump_stages(stages)
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
