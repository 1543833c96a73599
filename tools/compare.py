#!/usr/bin/env python
"""Which loss, which detector, which setting is better? Train yaml files with several seeds and compare them.

    tools/compare.py configs/nuclei/losses/*.yaml --seeds 0 1 2 --reference no_kd
    tools/compare.py A.yaml B.yaml --iterations 2000 --teacher-iterations 4000 --equal-time
    tools/compare.py STUDENT.yaml --equal-cost baseline_H.yaml
    tools/compare.py NO_KD.yaml STUDENT.yaml --sweep DISTILL.LOSSES.0.WEIGHT=x0.1,x1,x10
    tools/compare.py configs/nuclei/losses/*.yaml --devices cuda:0 cuda:1        a run at a time on each GPU
    tools/compare.py configs/nuclei/losses/*.yaml --report-only                  what is there so far

Every file is a variant. The teachers that the files name in DISTILL.TEACHERS, and theirs, are trained first, once a
seed, and shared by all. With --equal-time each variant is also trained for as many iterations as fit into the time that
the reference took with the same seed (processor time on a CPU, else the clock's), because a loss that makes steps slow
takes time in which the plain detector could have learned; with --count-teachers that time is the reference's with its
teachers, and variants without one train for all of it. --equal-cost adds a conventional detector at the input size at
which it costs as many multiply-adds as the reference. --sweep makes one variant a value of a key; "x10" is ten times
the file's value, or that of an override.
A finished run is kept and an interrupted one resumes: repeat the same command. A run that fails does not stop others.
Results: OUTPUT/report.html, report.md, report.json, and a folder a seed and variant. KEY VALUE overrides apply to all.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from msad import cli
from msad.engine.provenance import about_report
from msad.experiments.comparison import Comparison
from msad.experiments.jobs import make_slots, take_devices
from msad.experiments.metrics import choose_metric
from msad.experiments.panels import draw_panels, load_predictor
from msad.experiments.report import PANELS, write_report
from msad.experiments.rows import check_metric, failures, rows_of, warnings
from msad.experiments.tables import format_tables
from msad.experiments.variants import Variant, at_equal_time, equal_cost, sweep, unique_names


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="+", type=Path, metavar="YAML", help="a variant each; not Base*.yaml")
    parser.add_argument("--output", type=Path, default=Path("output/compare"), help="default: %(default)s")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    parser.add_argument("--reference", default="", metavar="NAME", help="of the differences; default: the first file")
    parser.add_argument("--iterations", type=cli.positive, metavar="N", help="of every variant; default: its yaml's")
    parser.add_argument("--teacher-iterations", type=cli.positive, metavar="N", help="default: its yaml's")
    parser.add_argument("--teacher-weights", default="", metavar="FILE",
                        help="use this checkpoint and train no teacher; {seed} in it stands for the seed")  # fmt: skip
    parser.add_argument("--equal-time", action="store_true", help="each variant also at the reference's training time")
    parser.add_argument("--count-teachers", action="store_true", help="that time includes the teachers")
    parser.add_argument("--equal-cost", type=Path, metavar="YAML", help="this detector at the cost of the reference")
    parser.add_argument("--sweep", action="append", default=[], metavar="KEY=V,V,...",
                        help="one variant a value of a config key")  # fmt: skip
    cli.add_slot_options(parser)
    parser.add_argument("--metric", metavar="TASK/METRIC",
                        help="e.g. segm/AP; default: bbox/AP, or sem_seg/mIoU if the first is a segmentor")  # fmt: skip
    parser.add_argument("--panels", nargs="+", default=[], metavar="NAME",
                        help="also draw validation images with what these variants find")  # fmt: skip
    parser.add_argument("--report-only", action="store_true", help="train nothing, report what is finished")
    return parser


def make_comparison(args: argparse.Namespace) -> Comparison:
    """The comparison that the command line asks for.

    Raises:
        ValueError: no yaml file is left, or names and values do not fit.
    """
    files = [file for file in args.configs if not file.name.startswith("Base")]
    if not files:
        raise ValueError("no yaml file to compare: Base*.yaml are what others are based on")
    variants = {name: Variant(file) for name, file in unique_names(files).items()}
    reference = args.reference or next(iter(variants))
    if len(args.sweep) > 1:
        raise ValueError(f"--sweep takes one key, got {' and '.join(args.sweep)}")
    for assignment in args.sweep:
        variants = sweep(variants, assignment, args.opts)
        reference = args.reference or next(iter(variants))
    if args.equal_time:
        timed = [at_equal_time(name, v, reference, args.count_teachers) for name, v in variants.items()]
        variants |= {name: v for one in timed for name, v in one.items() if v.base != reference}
    if args.equal_cost:
        variants |= equal_cost(args.equal_cost, reference)
    opts = [*args.opts, *take_devices(args.devices)]
    made = Comparison(variants, args.output, opts, tuple(dict.fromkeys(args.seeds)), args.iterations,
                      args.teacher_iterations, args.teacher_weights, reference)  # fmt: skip
    for name in args.panels:
        if name not in made.variants:
            raise ValueError(f"--panels {name} is none of the variants {', '.join(made.variants)}")
    return made


def report(comparison: Comparison, metric: str) -> dict:
    """Write the report; returns its data."""
    data = {**about_report(), **comparison.collect()}
    check_metric(rows_of(data), metric)
    write_report(data, comparison.output, "Comparison", metric)
    return data


def work(args: argparse.Namespace) -> int:
    """Train and report; status 1 if a run failed."""
    comparison = make_comparison(args)
    metric = choose_metric(comparison, args.metric)
    if args.report_only:
        comparison.check(report_only=True)
    failed = [] if args.report_only else comparison.run(make_slots(args.jobs, args.threads, args.devices))
    if args.panels and (models := comparison.models()):
        predictors = {name: load_predictor(*models[name]) for name in args.panels if name in models}
        draw_panels(next(iter(models.values()))[0], args.output / PANELS, predictors)
    elif not args.report_only:
        (args.output / PANELS).unlink(missing_ok=True)  # of an earlier call, perhaps of other models
    data = report(comparison, metric)
    print(format_tables(data, metric) if rows_of(data) else "No run has finished yet.")
    for line in failures(data):
        print(f"FAILED: {line}")
    for line in warnings(data):
        print(f"WARNED: {line}")
    print(f"\nReport: {args.output / 'report.html'}")
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    words: list[str] = []
    for word in sys.argv[1:] if argv is None else argv:
        if words[-1:] == ["--sweep"]:  # what follows looks like an override without a blank
            words[-1] += f"={word}"
        else:
            words.append(word)
    args = cli.parse(make_parser(), words)
    return cli.run("compare", lambda: work(args), "interrupted; the same command goes on where it was")


if __name__ == "__main__":
    sys.exit(main())
