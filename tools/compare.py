#!/usr/bin/env python
"""Which loss, which detector, which setting is better? Train yaml files with several seeds and compare them.

    tools/compare.py configs/nuclei/losses/*.yaml --seeds 0 1 2 --reference control
    tools/compare.py A.yaml B.yaml --iterations 2000 --teacher-iterations 4000 --equal-time
    tools/compare.py configs/nuclei/losses/*.yaml --jobs 2 --threads 1              two runs at a time on the CPU
    tools/compare.py configs/nuclei/losses/*.yaml --devices cuda:0 cuda:1 -- MODEL.DEVICE cuda
    tools/compare.py configs/nuclei/losses/*.yaml --report-only                     what is there so far

Every file is a row of the table. The teachers that the files name in DISTILL.TEACHERS are trained first, once a seed,
and shared by all rows. With --equal-time each row is also trained for as many iterations as fit into the time that the
reference took (processor time on a CPU, else the clock's; measured in the runs of equal iterations), because a loss
that makes steps slow takes time in which the plain detector could have learned. With --count-teachers that time is the
reference's with its teachers, and rows without one train for all of it.
A finished run is kept and an interrupted one resumes: repeat the same command. A run that fails does not stop others.
Results: OUTPUT/compare.md, compare.json, compare.png, differences.png, and a folder a seed and row; weights.png shows
the metric over the weight of a loss where rows differ in it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from msad.engine.checkpoint import atomic_write
from msad.engine.setup import engine_name
from msad.experiments import comparison as compare
from msad.experiments.jobs import device_opts, make_slots
from msad.experiments.report.comparison import TITLES, Entry, entries, format_comparison, write_markdown
from msad.visualization import IntervalRow, plot_intervals, plot_weights


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", type=Path, metavar="YAML", help="a row each; Base*.yaml are passed over")
    parser.add_argument("--output", type=Path, default=Path("output/compare"), help="default: %(default)s")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    parser.add_argument("--reference", default="", metavar="ROW", help="row of the differences; default: the first")
    parser.add_argument("--iterations", type=int, metavar="N", help="of every row; default: as its yaml says")
    parser.add_argument("--teacher-iterations", type=int, metavar="N", help="default: as the teacher's yaml says")
    parser.add_argument("--teacher-weights", default="", metavar="FILE",
                        help="use this checkpoint and train no teacher; {seed} in it stands for the seed")  # fmt: skip
    parser.add_argument("--equal-time", action="store_true", help="each row also at the reference's training time")
    parser.add_argument("--count-teachers", action="store_true", help="that time includes the rows' teachers")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time on the CPU; default: 1")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads a run; default: cores / jobs")
    parser.add_argument("--devices", nargs="+", default=[], metavar="cuda:N", help="a run at a time on each")
    parser.add_argument("--metric", default="bbox/AP", metavar="TASK/METRIC", help="e.g. segm/AP; default: %(default)s")
    parser.add_argument("--report-only", action="store_true", help="train nothing, report what is finished")
    # Everything after -- is for the configs: argparse would give it to the options of many values before it.
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    args = parser.parse_args(arguments[:split])
    args.opts = arguments[split + 1 :]
    args.seeds = list(dict.fromkeys(args.seeds))
    return args


def make_comparison(args: argparse.Namespace) -> compare.Comparison:
    """The comparison that the command line asks for.

    Raises:
        ValueError: no yaml file is left, or names and values do not fit.
    """
    files = [file for file in args.configs if not file.name.startswith("Base")]
    if not files:
        raise ValueError("no yaml file to compare: Base*.yaml are what others are based on")
    opts = [*args.opts, *device_opts(args.devices)]
    return compare.Comparison(
        compare.unique_names(files), args.output, opts, tuple(args.seeds), args.iterations, args.teacher_iterations,
        args.teacher_weights, args.reference, args.equal_time, args.count_teachers,
    )  # fmt: skip


def draw(data: dict, output: Path, metric: str) -> tuple[str, ...]:
    """Draw the charts that there is data for; returns their file names."""
    series = {TITLES[kind]: entries(data, kind, metric) for kind in TITLES}
    series = {title: rows for title, rows in series.items() if rows}
    if not series:
        return ()
    reference = next((r.ap.mean for rows in series.values() for r in rows if r.name == data["reference"]), None)
    points = {title: [_point(r) for r in rows] for title, rows in series.items()}
    plot_intervals(points, output / "compare.png", metric, reference, data["reference"])
    changes = {title: [_change(r, rows, data["reference"]) for r in rows if r.difference] for title, rows in
               series.items()}  # fmt: skip
    changes = {title: rows for title, rows in changes.items() if rows}
    pictures = ["compare.png"]
    if changes:
        plot_intervals(changes, output / "differences.png", f"{metric} minus {data['reference']}, seed by seed", 0.0)
        pictures.append("differences.png")
    if by_weight := _by_weight(data["losses"], points.get(TITLES["row"], [])):
        plot_weights(by_weight, output / "weights.png", metric, reference, data["reference"])
        pictures.append("weights.png")
    return tuple(pictures)


def _by_weight(losses: dict[str, list[dict]], rows: list[IntervalRow]) -> dict[str, list[tuple[float, IntervalRow]]]:
    """Loss -> (weight, row) of the losses that rows have by themselves, with several positive weights."""
    out = {}
    for row in rows:
        entries_ = losses.get(row.name, ())
        weight = float(entries_[0].get("weight", 0)) if len(entries_) == 1 else 0.0  # yaml reads 1e-3 as a text
        if weight > 0:
            out.setdefault(entries_[0]["name"], []).append((weight, row))
    return {name: points for name, points in out.items() if len({weight for weight, _ in points}) > 1}


def _point(row: Entry) -> IntervalRow:
    return IntervalRow(row.name, row.ap.mean, row.ap.half, list(row.values.values()))


def _change(row: Entry, rows: list[Entry], reference: str) -> IntervalRow:
    base = next(r for r in rows if r.name == reference).values
    return IntervalRow(
        row.name, row.difference.mean, row.difference.half, [v - base[s] for s, v in row.values.items() if s in base]
    )


def report(comparison: compare.Comparison, metric: str) -> dict:
    """Write compare.json, compare.md and the charts; returns the data."""
    data = {
        "command": " ".join(["python", *sys.argv]),
        "engine": engine_name(),
        "torch": torch.__version__,
        **compare.collect(comparison),
    }
    comparison.output.mkdir(parents=True, exist_ok=True)
    with atomic_write(str(comparison.output / "compare.json"), "w") as file:
        json.dump(data, file, indent=1)
    write_markdown(data, comparison.output / "compare.md", metric, draw(data, comparison.output, metric))
    return data


def main() -> int:
    args = parse_args()
    missing = []
    try:
        comparison = make_comparison(args)
        if not args.report_only:
            missing = compare.run(comparison, make_slots(args.jobs, args.threads, args.devices))
        data = report(comparison, args.metric)
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on where it was.", file=sys.stderr)
        return 130
    except (FileNotFoundError, KeyError, ValueError) as error:
        print(f"error: {error if isinstance(error, OSError) else error.args[0]}", file=sys.stderr)
        return 2
    print(format_comparison(data, args.metric))
    print(f"\nReport: {args.output / 'compare.md'}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
