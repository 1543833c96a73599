#!/usr/bin/env python
"""Accuracy against cost of trained models: in torch, exported to ONNX, and as 8-bit integers.

    tools/pareto.py --output pareto --calibration train_images/ --threads 1 2 \\
        --model H baseline_H.yaml H/model_final.pth --model H@192 baseline_H.yaml H/model_final.pth \\
        --model student student_L.yaml student/model_final.pth

Each --model is a name, the yaml that it was trained with and a checkpoint; NAME@PIXELS tests at that short side, the
longest side scaled alike. Writes DIR/pareto.json, DIR/pareto.png and a folder a model with its ONNX files, and prints a
table. A star marks what no other model of its engine beats in AP and time. Overrides go to all models.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from detectron2.config import CfgNode
from tabulate import tabulate

from msad import cli, load_config
from msad.engine.setup import engine_name, prepare
from msad.evaluation.sweep import at_size
from msad.export.onnx import require
from msad.files import write_json
from msad.visualization.pareto import pareto_figure
from msad.visualization.plots import save_figure


def candidate(name: str, config_file: str, weights: str, opts: list[str]) -> tuple[str, CfgNode, str]:
    """Name, config and checkpoint of a model of the command line; ValueError if its size or data cannot be used."""
    cfg = load_config(config_file, opts)
    label, at, side = name.rpartition("@")
    if at:
        if not side.isdigit():
            raise ValueError(f"--model {name}: behind the @ comes a short side in pixels")
        cfg, name = at_size(cfg, int(side)), f"{label}_{side}"
    if len(cfg.DATASETS.TEST) != 1:
        raise ValueError(f"{config_file}: needs one data set in DATASETS.TEST, has {list(cfg.DATASETS.TEST)}")
    return name, cfg, weights


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", nargs=3, action="append", required=True, metavar=("NAME[@PIXELS]", "CONFIG", "WEIGHTS"),
        help="can be repeated",
    )  # fmt: skip
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--calibration", metavar="DIR", help="images for 8-bit integers (default: none of these)")
    parser.add_argument("--threads", nargs="+", type=cli.positive, default=[1], help="numbers of threads (default: 1)")
    parser.add_argument("--images", type=cli.positive, default=10, help="timed images of the test data (default: 10)")
    parser.add_argument("--rounds", type=cli.positive, default=5, help="passes, the least counts (default: 5)")
    args = cli.parse(parser, argv)

    def work() -> None:
        require("onnx", "onnxruntime")
        from msad.export.pareto import Candidate, measure
        from msad.export.quantize import find_images

        models = [Candidate(*candidate(*model, args.opts)) for model in args.model]
        names = [model.name for model in models]
        if len(set(names)) < len(names):
            raise ValueError(f"--model: names must differ, got {', '.join(names)}")
        calibration = find_images(args.calibration) if args.calibration else []
        output = Path(args.output)
        output.mkdir(parents=True, exist_ok=True)
        prepare(models[0].cfg)
        rows = measure(models, output, calibration, args.threads, args.images, args.rounds)
        about = {"engine": engine_name(), "threads": args.threads, "opts": args.opts, "models": args.model}
        write_json(output / "pareto.json", {**about, "rows": rows})
        save_figure(pareto_figure(rows), output / "pareto.png")
        header = ["model", "engine", "AP", "GMACs", *(f"ms, threads: {n}" for n in args.threads), "best"]
        cells = [
            [r["name"], r["engine"], r["AP"], r["gmacs"], *r["milliseconds"].values(), "*" * r["best"]] for r in rows
        ]
        print(tabulate(cells, header, floatfmt=("", "", ".1f", ".4g", *[".1f"] * len(args.threads), "")))

    return cli.run(parser.prog, work)


if __name__ == "__main__":
    sys.exit(main())
