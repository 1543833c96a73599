#!/usr/bin/env python
"""What detectors cost, part by part: parameters, multiply-adds, latency, peak memory, and a distillation step.

Weights are random, unless --trained asks for those of the yaml files; nothing is downloaded. Every model is measured on
one image at the size of its own resolution; R-CNNs with random weights make as many proposals and detections of it as
their limits allow (MODEL.RPN.POST_NMS_TOPK_TEST, TEST.DETECTIONS_PER_IMAGE). Timings alternate between the models, so
that other work on the machine hits all alike.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tabulate import tabulate
from tqdm import tqdm

from msad import cli, load_config
from msad.engine import DistillTrainer
from msad.engine.build import teacher_entries
from msad.engine.provenance import machine
from msad.engine.setup import load_model
from msad.evaluation import cost
from msad.evaluation.memory import peak_memory, step_memory
from msad.evaluation.region_limits import fill_regions
from msad.files import write_json
from msad.modeling.teacher import MultiScaleTeacher
from msad.resolution import downsampled_size, get_resolution

EXAMPLES = """
a config is measured at the size of its resolution, given as PATH@H, PATH@L (1/2) or PATH@EL (1/4); default H.
A multi-resolution teacher always gets the H image; for it, @fused, @H, ... choose the branch that is evaluated.

examples:
  # what half-resolution students save over the full-resolution baseline, as a whole and by part
  tools/benchmark.py --size 192 320 --config-file configs/quickstart/baseline_H.yaml \\
      --config-file configs/quickstart/student_L.yaml@L --config-file configs/quickstart/student_L_light.yaml@L

  # the teacher as it is configured, and one of its branches, on a GPU
  tools/benchmark.py --config-file TEACHER.yaml --config-file TEACHER.yaml@L --device cuda --output teacher.json

  # overhead of a distillation step, eight images of 192x320 in H, on one core
  tools/benchmark.py --train-step configs/quickstart/student_L.yaml configs/quickstart/teacher.yaml \\
      --size 192 320 --batch-size 8 --threads 1

  # a lighter head without another yaml; keys after the options go to all configs
  tools/benchmark.py --config-file STUDENT.yaml@L MODEL.FCOS.CONV_DIMS "[128, 128]"
"""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file", action="append", default=[], metavar="PATH[@RESOLUTION]", help="a model; can be repeated"
    )
    parser.add_argument(
        "--train-step",
        nargs=2,
        metavar=("STUDENT", "TEACHER"),
        help="two yaml files: time the student's own step, the teacher's neck and the distillation step of the "
        "student's DISTILL settings with this teacher",
    )
    parser.add_argument(
        "--size", nargs=2, type=cli.positive, default=[800, 1333], metavar=("HEIGHT", "WIDTH"),
        help="image in H pixels (default: 800 1333)",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=cli.positive, default=2, help="images in the training step (default: 2)")
    parser.add_argument("--repeats", type=cli.positive, default=10, help="timed passes, the median counts; default: 10")
    parser.add_argument("--warmup", type=int, default=2, help="passes before them (default: 2)")
    parser.add_argument("--threads", type=cli.positive, help="CPU threads (default: torch's choice)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if there is one, or cpu"
    )
    parser.add_argument("--output", metavar="FILE", help="also write everything to this JSON file")
    parser.add_argument("--trained", action="store_true", help="load every MODEL.WEIGHTS (default: random ones)")
    args = cli.parse(parser, argv)
    args.prog = parser.prog
    if not args.config_file and not args.train_step:
        parser.error("nothing to measure: give --config-file or --train-step")
    if args.output and not os.path.isdir(os.path.dirname(args.output) or "."):
        parser.error(f"--output: no folder {os.path.dirname(args.output)}")
    return args


def split_resolution(name: str) -> tuple[str, str]:
    """``PATH@RESOLUTION`` -> (path, resolution or ""); an existing file may have an @ in its name."""
    path, at, resolution = name.rpartition("@")
    return (path, resolution) if at and not os.path.isfile(name) else (name, "")


class BadInput(ValueError):
    """A config that cannot be measured; the message names it."""


@contextmanager
def blaming(path: str) -> Iterator[None]:
    """Turn what configs raise into BadInput with the name of the file."""
    try:
        yield
    except (AssertionError, OSError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        message = str(error.args[0] if isinstance(error, KeyError) else error)
        raise BadInput(message if path in message else f"{path}: {message}") from error


def configure(path: str, args: argparse.Namespace) -> CfgNode:
    """The config of a yaml file with the command line's overrides; without weights but with --trained."""
    with blaming(path):
        weights = [] if args.trained else ["MODEL.WEIGHTS", ""]
        return load_config(path, [*args.opts, *weights, "MODEL.DEVICE", args.device])


def describe(name: str, args: argparse.Namespace) -> tuple[dict[str, Any], CfgNode]:
    """The row of one --config-file without its numbers, and its config."""
    path, resolution = split_resolution(name)
    cfg = configure(path, args)
    size = tuple(args.size)
    if MultiScaleTeacher.__name__ == cfg.MODEL.META_ARCHITECTURE:
        resolution = cfg.MSAD.EVAL_BRANCH = resolution or cfg.MSAD.EVAL_BRANCH
    else:
        resolution = resolution or "H"
        with blaming(name):
            size = downsampled_size(size, get_resolution(resolution).shift)
    label = f"{os.path.splitext(os.path.basename(path))[0]}@{resolution}"
    return {"name": label, "config": path, "resolution": resolution, "input": list(size)}, cfg


def build(cfg: CfgNode) -> torch.nn.Module:
    torch.manual_seed(0)
    model = load_model(cfg) if cfg.MODEL.WEIGHTS else build_model(cfg).eval()
    return model.to(memory_format=torch.channels_last) if cfg.SOLVER.CHANNELS_LAST else model


def benchmark_models(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row of results for each --config-file."""
    described = [describe(name, args) for name in args.config_file]
    rows, models = [row for row, _ in described], []
    rounds = args.warmup + args.repeats
    with tqdm(total=len(rows) * (2 + rounds), unit="pass", desc="models", disable=None) as bar:
        for row, cfg in described:
            bar.set_postfix_str(f"{row['name']}: multiply-adds")
            with blaming(row["config"]):
                model = build(cfg) if cfg.MODEL.WEIGHTS else fill_regions(build(cfg))
                row["parameters"] = cost.count_parameters(model)
            row["gmacs"] = cost.count_macs(model, cost.random_inputs(*row["input"]))
            bar.update()
            bar.set_postfix_str(f"{row['name']}: memory")
            row["peak_memory_bytes"] = peak_memory(cfg, *row["input"], threads=args.threads)
            bar.update()
            models.append(model)
        inputs = [cost.random_inputs(*row["input"]) for row in rows]
        passes: list[list[dict[str, float]]] = [[] for _ in rows]
        bar.set_postfix_str("latency")
        for _ in range(rounds):
            for model, images, times in zip(models, inputs, passes):
                times.append(cost.time_parts(model, images))
                bar.update()
    for row, times in zip(rows, passes):
        row["milliseconds"] = cost.medians(times[args.warmup :])
        for key in ("gmacs", "milliseconds"):
            row[f"{key}_ratio"] = row[key][cost.TOTAL] / rows[0][key][cost.TOTAL]
    return rows


def benchmark_train_step(args: argparse.Namespace) -> dict[str, Any]:
    """Times of --train-step, with the distiller that training would build."""
    student, teacher = (configure(path, args) for path in args.train_step)
    if not student.DISTILL.LOSSES:
        raise BadInput(f"{args.train_step[0]}: DISTILL.LOSSES is empty, so there is no distillation to measure")
    with tempfile.TemporaryDirectory() as folder, blaming(" and ".join(args.train_step)):
        # The trainer insists on weights, for good reasons; these are random.
        entry = {"CONFIG": os.path.join(folder, "teacher.yaml"), "WEIGHTS": os.path.join(folder, "teacher.pth")}
        with open(entry["CONFIG"], "w") as f:
            f.write(teacher.dump())
        torch.save({"model": build(teacher).state_dict()}, entry["WEIGHTS"])
        # How the student names the teacher, and the size at which it shows it the images.
        kept = {key: value for key, value in (teacher_entries(student) or [{}])[0].items() if key in ("NAME", "SCALE")}
        student.DISTILL.TEACHERS = [{**kept, **entry}]
        distiller = DistillTrainer.build_model(student)
    keypoints = student.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if student.MODEL.KEYPOINT_ON else 0
    batch = cost.random_inputs(
        *args.size, batch=args.batch_size, boxes=10, masks=student.MODEL.MASK_ON, keypoints=keypoints
    )
    with tqdm(total=args.warmup + args.repeats, unit="round", desc="training step", disable=None) as bar:
        times = cost.training_step_cost(distiller, batch, args.repeats, args.warmup, on_round=bar.update)
    # Afterwards: what the assistants' optimizers keep between steps is there then, and left out as the student's is.
    steps = (cost.student_step, cost.distillation_step)
    alone, whole = (step_memory(partial(step, distiller, batch), args.device) for step in steps)
    return {
        "peak_memory_bytes": whole,
        "student_peak_memory_bytes": alone,
        "student": args.train_step[0],
        "teacher": args.train_step[1],
        "resolution": student.DISTILL.STUDENT_RESOLUTION,
        "batch_size": args.batch_size,
        "ratio": times.pop(cost.RATIO),
        "milliseconds": times,
    }


def format_models(rows: list[dict[str, Any]]) -> str:
    """Two tables: what the models compute, and how long they take."""

    def parts(key: str) -> dict[str, list[float]]:
        # A part that no model has, or that consists of uncounted operations, needs no column.
        used = [part for part in (*cost.PARTS, cost.TOTAL) if any(row[key][part] for row in rows)]
        return {part.replace("_", "-"): [row[key][part] for row in rows] for part in used}

    name = {"config": [row["name"] for row in rows]}
    compute = {
        **name,
        "input": ["x".join(map(str, row["input"])) for row in rows],
        "params (M)": [row["parameters"][cost.TOTAL] / 1e6 for row in rows],
        **parts("gmacs"),
        "of first": [f"{row['gmacs_ratio']:.3f}x" for row in rows],
    }
    latency = {
        **name,
        **parts("milliseconds"),
        "of first": [f"{row['milliseconds_ratio']:.3f}x" for row in rows],
        "peak MiB": [round(row["peak_memory_bytes"] / 2**20) for row in rows],
    }
    return "\n\n".join(
        f"{title}\n{tabulate(columns, headers='keys', floatfmt='.4g')}"
        for title, columns in (
            ("Compute for one image, GMACs (1e9 multiply-adds)", compute),
            ("Inference on one image, median milliseconds", latency),
        )
    )


def format_train_step(step: dict[str, Any]) -> str:
    lines = [[name.replace("_", " "), step["milliseconds"][name]] for name in cost.STEPS]
    table = tabulate(lines, headers=[f"training, batch of {step['batch_size']}", "median ms"], floatfmt=".4g")
    ratio = f"distillation step / (student step + teacher neck) = {step['ratio']:.3f}"
    peak, alone = (step[f"{whose}peak_memory_bytes"] / 2**20 for whose in ("", "student_"))
    return f"{table}\n{ratio}\npeak memory beyond the weights: {peak:.0f} MiB; the student's own step: {alone:.0f} MiB"


def run(args: argparse.Namespace, command: list[str]) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    cli.require_device(args.device, "--device")
    result = {**machine(args.device), "size": args.size, "command": shlex.join(command)}
    tables = []
    if args.train_step:
        result["train_step"] = benchmark_train_step(args)
        tables.append(format_train_step(result["train_step"]))
    if args.config_file:
        result["models"] = benchmark_models(args)
        tables.insert(0, format_models(result["models"]))
    print(
        f"{result['engine']}, torch {result['torch']}, {result['device']}, {result['threads']} threads",
        *tables, sep="\n\n",
    )  # fmt: skip
    if args.output:
        write_json(args.output, result)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    def work() -> None:
        read = [split_resolution(name)[0] for name in args.config_file] + list(args.train_step or ())
        cli.refuse_overwriting([args.output] if args.output else [], read)
        run(args, ["tools/benchmark.py", *(sys.argv[1:] if argv is None else argv)])

    return cli.run(args.prog, work, "interrupted, nothing written")


if __name__ == "__main__":
    sys.exit(main())
