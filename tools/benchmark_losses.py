#!/usr/bin/env python
"""What distillation losses cost per training step: milliseconds and peak memory of forward and backward.

Losses are measured alone, on random maps of a teacher at the given image size; a student at L has maps of the same
size. On a CPU the time is processor time, summed over threads. The teacher's own forward pass and the student's are
the same for all losses: tools/benchmark.py --train-step.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import asdict

import torch
import yaml
from tabulate import tabulate
from tqdm import tqdm

from msad import cli
from msad.distill.losses import DISTILL_LOSS_REGISTRY
from msad.engine.provenance import machine
from msad.evaluation.loss_cost import Setting, loss_costs
from msad.files import prepare_folder, write_json

EXAMPLES = """
examples:
  # every registered loss with its default options: a student at 400x667
  tools/benchmark_losses.py --threads 1 --output losses.json

  # what an adaptation layer adds; an entry is written as in DISTILL.LOSSES
  tools/benchmark_losses.py --loss CWD --loss "{NAME: CWD, ADAPTATION: always}" --size 192 320 --channels 32
"""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    default = Setting()
    parser = argparse.ArgumentParser(
        prog="benchmark_losses.py", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--loss", action="append", default=[], metavar="NAME|ENTRY",
        help="a registered loss or an entry of DISTILL.LOSSES; can be repeated (default: all that compare features)",
    )  # fmt: skip
    parser.add_argument(
        "--size", nargs=2, type=cli.positive, default=list(default.size), metavar=("HEIGHT", "WIDTH"),
        help="image in H pixels (default: 800 1333)",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=cli.positive, default=default.batch, help="images (default: 2)")
    parser.add_argument("--channels", type=cli.positive, default=default.channels, help="of the teacher; default: 256")
    parser.add_argument("--student-channels", type=cli.positive, help="of the student (default: the teacher's)")
    parser.add_argument("--repeats", type=cli.positive, default=5, help="timed steps; the median counts (default: 5)")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them (default: 1)")
    parser.add_argument("--threads", type=cli.positive, help="CPU threads (default: torch's choice)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", metavar="FILE", help="also write everything to this JSON file")
    args = cli.parse(parser, argv)
    if args.opts:
        parser.error(f"there is no config to override: {' '.join(args.opts)}")
    return args


def entries(texts: list[str]) -> list[dict]:
    """DISTILL.LOSSES entries of the command line; none: every loss of the project that compares features."""
    if not texts:
        ours = [(name, cls) for name, cls in DISTILL_LOSS_REGISTRY if cls.__module__.startswith("msad.")]
        return [{"NAME": name} for name, cls in ours if not getattr(cls, "heads", ())]
    parsed = [yaml.safe_load(text) for text in texts]
    return [entry if isinstance(entry, dict) else {"NAME": entry} for entry in parsed]


def label(entry: dict) -> str:
    options = [f"{key} {value}" for key, value in entry.items() if key != "NAME"]
    return f"`{entry['NAME']}`" + (f" ({', '.join(options)})" if options else "")


def format_rows(rows: list[dict]) -> str:
    """A Markdown table."""
    lines = [
        [label(r["entry"]), r["milliseconds"], r["peak_memory_bytes"] / 2**20, r["parameters"] / 1e6] for r in rows
    ]
    headers = ["loss", "ms per step", "peak MiB", "trained parameters (M)"]
    return tabulate(lines, headers=headers, tablefmt="github", floatfmt=("", ".0f", ".0f", ".2f"))


def run(args: argparse.Namespace, command: str) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    cli.require_device(args.device, "--device")
    if args.output:
        prepare_folder(args.output)
    channels = args.student_channels or args.channels
    setting = Setting(tuple(args.size), args.batch_size, args.channels, channels, device=args.device)
    chosen = entries(args.loss)
    total = len(chosen) * (1 + args.warmup + args.repeats)
    with tqdm(total=total, unit="step", desc="losses", disable=None) as bar:
        rows = loss_costs(chosen, setting, args.repeats, args.warmup, args.threads, bar.update)
    result = {"command": command, **machine(args.device), "setting": asdict(setting), "losses": rows}
    print(f"torch {result['torch']}, {result['device']}, {result['threads']} threads\n\n{format_rows(rows)}")
    if args.output:
        write_json(args.output, result)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    command = shlex.join(["tools/benchmark_losses.py", *(sys.argv[1:] if argv is None else argv)])
    return cli.run("benchmark_losses.py", lambda: run(args, command))


if __name__ == "__main__":
    sys.exit(main())
