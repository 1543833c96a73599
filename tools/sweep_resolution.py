#!/usr/bin/env python
"""Accuracy and latency of a trained model over test sizes, as in supplementary Table 2 of MSAD.

    tools/sweep_resolution.py --config-file configs/MSAD/fcos_R_50_S_L_1x.yaml --weights student.pth --output sweep
    tools/sweep_resolution.py --config-file TEACHER.yaml --weights teacher.pth --branch L --output sweep_L
    tools/sweep_resolution.py ... --sizes 448 400 352 --no-latency DATASETS.TEST "('my_val',)"

writes DIR/sweep.json, DIR/sweep.png and DIR/log.txt, and prints a table for each task. Sizes are short sides in pixels
of the model's own input (for a teacher those of H); the longest side allowed (INPUT.MAX_SIZE_TEST) is scaled alike.
Default: 100, 96, 92, 88, 84 and 80 % of INPUT.MIN_SIZE_TEST, the paper's sizes. Finished sizes are kept: the same
command goes on after an interruption, and further --sizes are added. Latency is that of a test image of the most
common size, the least of several rounds in which the sizes take turns, and is measured for all sizes anew when one is
added; sizes that are padded alike share it.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from detectron2.config import CfgNode
from torch import nn
from tqdm import tqdm

from msad import cli, load_config
from msad.engine import DistillTrainer
from msad.engine.provenance import fingerprint, machine
from msad.engine.setup import load_model, prepare
from msad.evaluation.sweep import at_size, default_sizes, evaluate_size, format_sweep
from msad.experiments.costs import measure_costs
from msad.experiments.run import log_to
from msad.files import read_json, require_checkpoint, write_json
from msad.visualization.plots import save_figure
from msad.visualization.sweep import sweep_figure


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="the yaml that the model was trained with")
    parser.add_argument("--weights", required=True, metavar="FILE", help="its checkpoint")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--sizes", nargs="+", type=cli.positive, metavar="PX", help="default: the paper's shares")
    parser.add_argument("--branch", metavar="NAME", help="of a teacher: H, L, ... or fused (default: MSAD.EVAL_BRANCH)")
    parser.add_argument("--no-latency", action="store_true", help="accuracy only")
    args = cli.parse(parser, argv)
    args.prog = parser.prog
    return args


def configure(args: argparse.Namespace) -> CfgNode:
    """The config of the sweep; ValueError for what cannot be swept."""
    cfg = load_config(args.config_file, args.opts)
    cfg.OUTPUT_DIR = args.output
    cli.require_device(cfg.MODEL.DEVICE)
    # A run's folder has a log and detections of its own.
    cli.refuse_overwriting([args.output], [os.path.dirname(file) or "." for file in (args.config_file, args.weights)])
    require_checkpoint(args.weights)
    if len(cfg.DATASETS.TEST) != 1:
        raise ValueError(f"a sweep needs one data set in DATASETS.TEST, got {list(cfg.DATASETS.TEST)}")
    if args.branch:
        if cfg.MODEL.META_ARCHITECTURE != "MultiScaleTeacher":
            raise ValueError(f"--branch {args.branch}: {cfg.MODEL.META_ARCHITECTURE} is no teacher and has no branches")
        cfg.MSAD.EVAL_BRANCH = args.branch
    cfg.freeze()
    return cfg


def describe(args: argparse.Namespace, cfg: CfgNode) -> dict:
    """What the numbers are of. "model" is a fingerprint of config, weights and data, by which sweeps differ."""
    teacher = cfg.MODEL.META_ARCHITECTURE == "MultiScaleTeacher"
    return {
        "model": fingerprint(cfg, args.weights),
        **machine(cfg.MODEL.DEVICE),
        "config": args.config_file,
        "opts": args.opts,
        "weights": args.weights,
        "branch": cfg.MSAD.EVAL_BRANCH if teacher else None,
        "dataset": cfg.DATASETS.TEST[0],
    }


def earlier(file: Path, about: dict) -> list[dict]:
    """Sizes that an earlier run has left; ValueError if they are another model's."""
    found = read_json(file)
    if found is None:
        return []
    if found["model"] != about["model"]:
        raise ValueError(
            f"{file} is of another model, config or data set, or of these before they changed (weights "
            f"{found['weights']}); choose another --output or delete it"
        )
    return found["sizes"]


def largest_first(sizes: dict[int, dict]) -> list[dict]:
    return sorted(sizes.values(), key=lambda entry: -entry["short_side"])


def measure_latencies(cfg: CfgNode, model: nn.Module, sizes: list[dict], branch: str | None) -> None:
    """Set "input", (height, width) as the network gets it, and "milliseconds" of all ``sizes``, which take turns."""
    costs = measure_costs({str(entry["short_side"]): (at_size(cfg, entry["short_side"]), model) for entry in sizes})
    for entry in sizes:
        found = costs[str(entry["short_side"]) + (f"_{branch}" if branch else "")]
        entry["input"], entry["milliseconds"] = found["input"], found["ms"]["total"]


def run(args: argparse.Namespace) -> list[dict]:
    """Evaluate what is missing; the sizes asked for and those of earlier runs, largest first."""
    cfg = configure(args)
    output = Path(args.output)
    file, about = output / "sweep.json", describe(args, cfg)
    done = {entry["short_side"]: entry for entry in earlier(file, about)}
    wanted = dict.fromkeys(args.sizes or default_sizes(cfg))
    missing = [side for side in wanted if side not in done]
    sizes = largest_first(done)
    untimed = not args.no_latency and any(entry["milliseconds"] is None for entry in sizes)
    if missing or untimed:
        output.mkdir(parents=True, exist_ok=True)
        with log_to(output / "log.txt"):
            prepare(cfg)
            model = load_model(cfg, args.weights)
        with tqdm(unit="img", dynamic_ncols=True, total=0, disable=None) as bar:
            for number, side in enumerate(missing, start=1):
                with log_to(output / "log.txt"):
                    sized = at_size(cfg, side)
                    loader = DistillTrainer.build_test_loader(sized, cfg.DATASETS.TEST[0])
                    bar.total = len(loader) * len(missing)
                    bar.set_description(f"{side} px ({number}/{len(missing)})")
                    evaluator = DistillTrainer.build_evaluator(sized, cfg.DATASETS.TEST[0])
                    entry = evaluate_size(model, loader, evaluator, bar.update)
                about_size = {"max_size": sized.INPUT.MAX_SIZE_TEST, "images": len(loader)}
                done[side] = {"short_side": side, **about_size, **entry}
                # Milliseconds compare where sizes took turns on one machine: those of earlier runs go.
                sizes = [{**entry, "input": None, "milliseconds": None} for entry in largest_first(done)]
                write_json(file, {**about, "sizes": sizes})
    if not args.no_latency and any(entry["milliseconds"] is None for entry in sizes):
        measure_latencies(cfg, model, sizes, about["branch"])
        write_json(file, {**about, "sizes": sizes})
    name = os.path.splitext(os.path.basename(args.config_file))[0] + (f", {about['branch']}" if about["branch"] else "")
    save_figure(sweep_figure(sizes, name), output / "sweep.png")
    return sizes


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    def work() -> None:
        print(f"{format_sweep(run(args))}\n\n{args.output}: sweep.json, sweep.png")

    kept = "interrupted; finished sizes are kept, and the same command goes on with the others"
    return cli.run(args.prog, work, kept)


if __name__ == "__main__":
    sys.exit(main())
