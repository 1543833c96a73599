#!/usr/bin/env python
"""The order of teachers for progressive distillation, from their adaptation costs.

    tools/order_teachers.py costs.json --k 3
    tools/order_teachers.py costs.yaml --k 3 --rule max --output configs/my_stages.yaml
    tools/order_teachers.py costs.json --quality swin_t=42.7 swin_s=48.2

prints the order that each rule suggests for 1 to k teachers, and the DISTILL.STAGES of the chosen one. COSTS is the
JSON of tools/adaptation_cost.py, from which a whole config for train_net.py is made, or a table typed in yaml with the
keys student, quality and costs (see msad/distill/progressive/table.py), which gives the block for a yaml of yours.

Rules: algorithm1 (Algorithm 1 of MTPD: backwards from the best teacher, default), sum and max (shortest path from the
student to the best teacher), forward (always the nearest unused teacher).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from msad import load_config
from msad.cli import parse, positive, refuse_overwriting
from msad.cli import run as run_command
from msad.distill.progressive.order import RULES, path_costs, suggest
from msad.distill.progressive.table import CostTable, curriculum, dump_stages, parse_quality, read_costs, stages_block
from msad.engine.scaling import schedule_overrides, set_iterations


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="order_teachers.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("costs", metavar="COSTS", help="JSON of adaptation_cost.py, or a table in yaml")
    parser.add_argument("--k", type=int, metavar="N", help="the most teachers to use (default: all)")
    parser.add_argument("--rule", choices=RULES, default=RULES[0], help="whose order becomes the stages")
    parser.add_argument("--at-most", action="store_true", help="sum and max: paths over at most k teachers, not k")
    parser.add_argument("--normalized", action="store_true", help="use the costs divided by the variance of the target")
    parser.add_argument("--quality", nargs="+", default=[], metavar="NAME=AP", help="performance of the teachers")
    parser.add_argument("--max-iter", type=positive, metavar="N",
                        help="iterations of a stage, its steps moved alike if the student's yaml is known")  # fmt: skip
    parser.add_argument("--output", metavar="FILE", help="yaml file for the DISTILL.STAGES block")
    args = parse(parser, argv)
    if args.opts:
        parser.error(f"{args.opts[0]}: no config is read here; overrides belong to train_net.py")
    return args


def compare_rules(table: CostTable, costs: dict, longest: int, exactly: bool) -> str:
    """What every rule suggests for 1 to ``longest`` teachers, with sum and maximum of the costs along the path."""
    rows = []
    for k in range(1, longest + 1):
        for rule in RULES:
            order = suggest(rule, costs, table.student, table.quality, k, exactly=exactly)
            steps = path_costs(costs, table.student, order)
            rows.append([k, rule, " -> ".join(order), sum(steps), max(steps)])
    return tabulate(rows, ["k", "rule", "order", "sum", "max"], floatfmt=".3f")


def stage_length(table: CostTable, iterations: int | None) -> dict[str, dict]:
    """What every stage overrides to take so many iterations; nothing for None."""
    if iterations is None:
        return {}
    if not table.config:
        return {"SOLVER": {"MAX_ITER": iterations}}
    whole, cfg = (load_config(table.config, table.opts) for _ in range(2))
    cfg.defrost()
    set_iterations(cfg, iterations)
    return schedule_overrides(cfg, whole)


def run(args: argparse.Namespace) -> str:
    table = read_costs(args.costs, parse_quality(args.quality))
    if args.normalized and not table.normalized_costs:
        raise ValueError(f"{args.costs} has no normalized_costs: --normalized needs the JSON of adaptation_cost.py")
    costs = table.normalized_costs if args.normalized else table.costs
    longest = len(table.quality) if args.k is None else args.k
    order = suggest(args.rule, costs, table.student, table.quality, longest, exactly=not args.at_most)
    if table.config and not os.path.isfile(table.config):
        raise FileNotFoundError(f"{args.costs}: its student's config {table.config} is not there")
    stages = stages_block(order, table.teachers, stage_length(table, args.max_iter))
    if table.config and "TEACHERS" in stages["DISTILL"]:
        folder = os.path.dirname(args.output or "")
        stages = curriculum(stages, table.config, table.weights, folder, table.opts)
    block = dump_stages(stages)
    if args.output:
        teachers = [entry.get(key, "") for entry in table.teachers for key in ("CONFIG", "WEIGHTS")]
        refuse_overwriting([args.output], [args.costs, table.config, table.weights, *teachers])
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(block)
    compared = compare_rules(table, costs, min(longest, len(table.quality)), not args.at_most)
    return f"{compared}\n\n{args.rule}: {table.student} -> {' -> '.join(order)}\n\n{block}"


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return run_command("order_teachers.py", lambda: print(run(args), end=""))


if __name__ == "__main__":
    sys.exit(main())
