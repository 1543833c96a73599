#!/usr/bin/env python
"""From a folder of images to a low-resolution detector that ships: look, train, distil, evaluate, export, report.

    tools/distill.py DATA --output DIR                                       an FCOS student at half the resolution
    tools/distill.py DATA --output DIR --detector mask_rcnn --backbone resnet50 --yes
    tools/distill.py DATA --output DIR --from model_final.pth --config config.yaml     the student of your own model
    tools/distill.py DATA --output DIR --method scalekd --controls           with what it should be compared with

First the data are looked at: sizes of the objects, a recommendation for the input size, and what training will take,
from a few measured steps. After your consent (--yes) teacher and student are trained and evaluated. DIR then holds
student/ (for detectron2, as ONNX with its runner, and a model card), report/report.html, and the runs. An interrupted
command goes on when it is repeated; a finished step is made again only if what it depends on has changed.
KEY VALUE overrides go to the detector at H, from which the others follow, those of DISTILL to the students.
In Python: msad.distill(DATA, DIR, ...).

DATA is a folder with
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from msad import cli
from msad.data.layouts import LAYOUTS
from msad.product.backbones import BACKBONES
from msad.product.choices import DETECTORS, METHODS, SCALES
from msad.product.pipeline import distill
from msad.product.plan import Plan


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distill", description=f"{__doc__}{LAYOUTS}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="see above; or the data.yaml of YOLO")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of all that is made")
    parser.add_argument("--detector", choices=DETECTORS, default="fcos", help="default: %(default)s")
    parser.add_argument("--backbone", choices=BACKBONES, default="efficientnet_lite0", help="default: %(default)s")
    parser.add_argument("--scale", choices=SCALES, default="1/2", help="of the student's input; default: %(default)s")
    parser.add_argument("--method", choices=METHODS, default="msad", help="default: %(default)s")
    parser.add_argument("--from", dest="checkpoint", default="", metavar="CHECKPOINT", help="of a trained detectron2 "
                        "model, which teaches")  # fmt: skip
    parser.add_argument("--config", default="", metavar="YAML", help="of that model")
    parser.add_argument("--short-side", type=int, metavar="PX", help="of H; default: as recommended for the data")
    parser.add_argument("--iterations", type=int, metavar="N", help="of every training; default: 24 passes, >= 600, "
                        "from scratch >= 1500")  # fmt: skip
    parser.add_argument("--controls", action="store_true", help="also train what the student is to be compared with")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    cli.add_slot_options(parser)
    parser.add_argument("--yes", action="store_true", help="do not ask before training")
    return parser


def ask(plan: Plan) -> bool:
    """Whether to go on with a plan that has been shown."""
    if not sys.stdin.isatty():
        raise ValueError("nobody is there to be asked: add --yes to train, the plan is above")
    return input("Train? [y/N] ").strip().lower() in ("y", "yes")


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = cli.parse(parser, argv)
    if args.threads:
        torch.set_num_threads(args.threads)

    def work() -> None:
        chosen = {key: value for key, value in vars(args).items() if key != "yes"}
        result = distill(**chosen, **({} if args.yes else {"confirm": ask}))
        if result is None:
            print("nothing was trained")
            return
        for name, tasks in result.metrics.items():
            found = [f"{task} AP {values['AP']:.1f}" for task, values in tasks.items() if "AP" in values]
            print(f"{name}: {', '.join(found)}")
        print(f"student: {result.card.parent}\nmodel card: {result.card}\nreport: {result.report}")

    return cli.run(parser.prog, work, "interrupted; the same command goes on where it was")


if __name__ == "__main__":
    sys.exit(main())
