#!/usr/bin/env python
"""Is the suggested order of teachers a good one? Distil by all orders, and rank those that the rules suggest.

    tools/compare_orders.py configs/nuclei/progressive/pool.yaml --student configs/nuclei/progressive/student.yaml \\
        --seeds 0 1 --output output/orders

The first yaml is a stage: a student with its losses and schedule, and a pool of teachers in DISTILL.TEACHERS. With each
seed, the teachers and the off-the-shelf student are trained, their adaptation costs measured, and the student distilled
by every order of the teachers up to --longest; orders that begin alike share these stages (four teachers: 64 stages).
Writes DIR/orders.json, DIR/orders.png, the costs of each seed as a picture, and prints the ranks of the rules.
A finished run is kept and an interrupted one resumes: repeat the same command. KEY VALUE overrides apply to all runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from msad import cli
from msad.engine.provenance import command_line
from msad.engine.setup import engine_name
from msad.experiments.adaptation import STUDENT
from msad.experiments.jobs import error_of, make_slots, run_all, take_devices
from msad.experiments.metrics import choose_metric
from msad.experiments.orders import OrderStudy, mean_ranks, order_study
from msad.files import write_json
from msad.visualization.adaptation import graph_figure, heat_map_figure
from msad.visualization.orders import orders_figure
from msad.visualization.plots import save_figure


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="compare_orders.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("config", type=Path, metavar="YAML", help="a stage, with the pool in DISTILL.TEACHERS")
    add("--student", type=Path, required=True, metavar="YAML", help="the off-the-shelf student")
    add("--output", type=Path, default=Path("output/orders"), metavar="DIR", help="default: %(default)s")
    add("--seeds", nargs="+", type=int, default=[0, 1], metavar="N", help="default: 0 1")
    add("--longest", type=int, metavar="N", help="most teachers of an order (default: all)")
    cli.add_slot_options(parser)
    add("--metric", metavar="TASK/METRIC", help="default: bbox/AP, or sem_seg/mIoU of segmentors")
    add("--report-only", action="store_true", help="train nothing, report what is finished")
    args = cli.parse(parser, argv)
    if args.longest is not None and args.longest < 1:
        parser.error("--longest must be at least 1")
    return args


def report(study: OrderStudy, metric: str) -> str:
    """Write what is known; returns the tables."""
    data = {"command": command_line(), "engine": engine_name(), **study.collect(metric)}
    study.output.mkdir(parents=True, exist_ok=True)
    write_json(study.output / "orders.json", data)
    names, best, written = [STUDENT, *study.teachers], [], ["orders.json"]
    for seed, found in data["seeds"].items():
        costs = {"adaptation cost": found["costs"], "divided by variance": found["normalized_costs"]}
        save_figure(heat_map_figure(costs, names), study.output / f"costs_seed{seed}.png")
        order = next(e["order"] for e in reversed(found["rules"]) if e["rule"] == "algorithm1")
        save_figure(graph_figure(found["costs"], names, order), study.output / f"graph_seed{seed}.png")
        written += [f"costs_seed{seed}.png", f"graph_seed{seed}.png"]
        best += [[seed, " -> ".join(o), value] for o, value in sorted(found["orders"], key=lambda e: -e[1])[:5]]
    if best:
        save_figure(orders_figure(data), study.output / "orders.png")
        written.append("orders.png")
    quality = [[seed, found["student"], *found["quality"].values()] for seed, found in data["seeds"].items()]
    tables = [
        tabulate(quality, ["seed", *names], floatfmt=".1f"),
        tabulate(best, ["seed", "best orders", metric], floatfmt=".1f"),
        tabulate(mean_ranks(data), ["k", "rule", "mean rank", metric, "of", "order"], floatfmt=".1f"),
    ]
    return "\n\n".join(table for table in tables if table) + f"\n\n{study.output}: {', '.join(written)}"


def work(args: argparse.Namespace) -> int:
    """Train and report; status 1 if a run failed."""
    opts = [*args.opts, *take_devices(args.devices)]
    study = order_study(args.config, args.student, args.output, args.seeds, args.longest, opts)
    slots, failed = make_slots(args.jobs, args.threads, args.devices), []
    metric = choose_metric(study.networks, args.metric)
    study.check(args.report_only)
    if not args.report_only:
        failed = study.networks.run(slots)
        report(study, metric)  # costs and suggestions are known long before the orders
        incomplete = {run.seed for run in failed}
        failed += run_all(study, [run for run in study.runs() if run.seed not in incomplete], slots)
    print(report(study, metric))
    for run in failed:
        print(f"FAILED: {run}: {error_of(study.folder(run)) or error_of(study.networks.folder(run))}")
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return cli.run("compare_orders.py", lambda: work(args), "interrupted; the same command goes on where it was")


if __name__ == "__main__":
    sys.exit(main())
