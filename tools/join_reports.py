#!/usr/bin/env python
"""One report of comparisons that were run apart: their tables, differences seed by seed, charts.

    tools/join_reports.py output/students output/alone --reference student_L_no_kd --output output/all
    tools/join_reports.py output/alone twice=output/twice --costs --output output/all

Each folder is one that tools/compare.py or tools/quickstart.py has filled. SUFFIX=FOLDER calls its variants
NAME@SUFFIX, for folders that trained the same yaml files in different ways. --costs measures multiply-adds and
milliseconds of all models in turns and draws AP against them, with a line through the detectors that are the same
network at several input sizes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from msad import cli
from msad.engine.provenance import command_line
from msad.experiments.joining import Part, join, joined_costs
from msad.experiments.report import write_report
from msad.experiments.rows import check_metric, main_metric, rows_of
from msad.experiments.tables import format_tables


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="join_reports.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", type=parse_part, metavar="[SUFFIX=]FOLDER", help="with a report.json")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--reference", default="", metavar="NAME", help="of the differences; default: the first one's")
    parser.add_argument("--metric", metavar="TASK/METRIC", help="e.g. segm/AP; default: bbox/AP, or sem_seg/mIoU")
    parser.add_argument("--costs", action="store_true", help="measure multiply-adds and milliseconds")
    return parser


def parse_part(text: str) -> Part:
    """FOLDER or SUFFIX=FOLDER; a folder of that very name is one."""
    suffix, equals, folder = text.partition("=")
    return Part(Path(text)) if not equals or Path(text).is_dir() else Part(Path(folder), f"@{suffix}")


def work(args: argparse.Namespace) -> None:
    if args.opts:
        raise ValueError(f"{args.opts[0]}: nothing is trained here; overrides belong to the comparisons")
    cli.refuse_overwriting([args.output / "report.json"], [part.folder / "report.json" for part in args.parts])
    data = join(args.parts)
    data |= {"command": command_line(), "reference": args.reference or data["reference"]}
    names = [row.name for row in rows_of(data)]
    if args.reference and args.reference not in names:
        raise ValueError(f"--reference {args.reference} is none of the models {', '.join(names)}")
    metric = args.metric or main_metric(rows_of(data))
    check_metric(rows_of(data), metric)
    if args.costs:
        data["cost"] = joined_costs(args.parts)
        if without := [name for name in names if name not in data["cost"]]:
            print(f"note: no costs of {', '.join(without)}: their weights are gone", file=sys.stderr)
    write_report(data, args.output, "Comparison", metric)
    print(f"{format_tables(data, metric)}\n\nReport: {args.output / 'report.html'}")


def main(argv: Sequence[str] | None = None) -> int:
    args = cli.parse(make_parser(), argv)
    return cli.run("join_reports", lambda: work(args))


if __name__ == "__main__":
    sys.exit(main())
