#!/usr/bin/env python
"""How much of a full-resolution detector's accuracy does one at half the resolution keep? Train, compare, report.

    tools/quickstart.py                                  synthetic scenes, one seed: minutes on two CPU cores
    tools/quickstart.py --data DIR                       your data, in a layout of those below
    tools/quickstart.py --data DIR --short-side 320 --iterations 2000
    tools/quickstart.py --configs configs/nuclei --seeds 0 1 2 --variants all      a full study of a configs folder

Trains the full-resolution detector, the conventional one at half the resolution and at the student's cost, the one with
finer levels, the multi-resolution teacher, a student that is only initialised from the teacher (no distillation), the
MSAD student, and on your data the detector with finer levels once more with as many iterations as teacher and student
together; several at a time, a run a core. An interrupted run goes on with the same command.
Results: OUTPUT/report.html, report.md, report.json, and a folder a seed and variant. KEY VALUE overrides apply to all.

--data takes a folder with
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from msad import cli, load_config
from msad.data.layouts import LAYOUTS, read_contents, register_entries
from msad.data.register import registered
from msad.data.synthetic import DEMO, make_dataset
from msad.engine.provenance import about_report
from msad.evaluation.sweep import short_side_of
from msad.experiments.comparison import Comparison
from msad.experiments.costs import costs_of_trained
from msad.experiments.data_facts import describe_data
from msad.experiments.jobs import Run, count_cores, error_of, make_slots, take_devices
from msad.experiments.panels import draw_pictures
from msad.experiments.report import write_report
from msad.experiments.rows import warnings
from msad.experiments.tables import format_tables
from msad.experiments.variants import LONGER, QUICK, choose, standard_variants
from msad.export import export
from msad.files import read_json, write_json
from msad.modeling.adapters import num_classes_key

REPOSITORY = Path(__file__).resolve().parents[1]
TITLE = "Low-resolution detection by distillation"
SYNTHETIC = {"num_train": 600, "num_val": 100, "seed": 0, **DEMO}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quickstart.py", description=f"{__doc__}{LAYOUTS}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("output/quickstart"), help="default: %(default)s")
    parser.add_argument("--data", type=Path, metavar="DIR", help="images and annotations, see above")
    parser.add_argument("--configs", type=Path, default=REPOSITORY / "configs/quickstart", help="folder of the models")
    parser.add_argument("--variants", "--rows", nargs="+", metavar="NAME", help="'all', or names; default: see above")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="each variant runs once a seed; default: 0")
    parser.add_argument("--iterations", type=cli.positive, help="of every stage; default: as the configs say")
    parser.add_argument("--short-side", type=cli.positive, help="of H in pixels; default: as the configs say")
    cli.add_slot_options(parser, None, "cores, up to 4")
    return parser


def data_opts(folder: Path, converted: Path, files: Sequence[Path], opts: Sequence, say: bool = True) -> list:
    """Overrides that make the configs ``files`` train and test on ``folder``.

    Args:
        converted: folder for annotations of other formats than COCO's.
        opts: further overrides of the configs.
        say: print what the detectors ignore.
    """
    # No data set of the engine's own is called so, whatever the folder's name is.
    entries = register_entries(folder, f"data_{folder.resolve().name}", converted)
    content, _ = read_contents(entries)
    configs = [load_config(file, list(opts)) for file in files]
    train, val = (entry["NAME"] for entry in entries)
    out = ["DATASETS.REGISTER", entries, "DATASETS.TRAIN", (train,), "DATASETS.TEST", (val,)]
    for key in dict.fromkeys(num_classes_key(cfg) for cfg in configs):
        out += [key, len(content["classes"])]
    for what, key in (("masks", "MASK_ON"), ("keypoints", "KEYPOINT_ON")):
        if say and content[what] and not any(cfg.MODEL[key] for cfg in configs):
            print(f"note: the {what} are ignored; detectors with MODEL.{key} True learn them", file=sys.stderr)
    if content["keypoints"] and any(cfg.MODEL.KEYPOINT_ON for cfg in configs):
        out += ["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", content["keypoints"]]
    return out


def make_study(args: argparse.Namespace) -> Comparison:
    """The comparison that the command line asks for; draws the synthetic scenes if it needs them."""
    variants, folder = standard_variants(args.configs), args.data
    on_scenes = folder is None and not load_config(next(iter(variants.values())).file).DATASETS.TRAIN
    usual = [name for name in QUICK if name in variants and not (on_scenes and name == LONGER)]
    chosen = choose(variants, list(variants) if args.variants == ["all"] else args.variants or usual)
    opts, files = [*args.opts, *take_devices(args.devices)], dict.fromkeys(v.file for v in chosen.values())
    if on_scenes:
        folder = args.output / "scenes"
        print(f"Scenes: {SYNTHETIC['num_train']} for training, {SYNTHETIC['num_val']} for validation, in {folder}")
        make_dataset(folder, **SYNTHETIC)
    if folder is not None:
        opts = data_opts(folder, args.output / "data", list(files), opts, args.data is not None) + opts
    scale = 1.0
    if args.short_side:
        scale = args.short_side / short_side_of(load_config(args.configs / "Base.yaml"))
    reference = "student_L_no_kd" if len(args.seeds) > 1 and "student_L_no_kd" in chosen else ""
    return Comparison(chosen, args.output, opts, tuple(args.seeds), args.iterations, args.iterations,
                      reference=reference, input_scale=scale)  # fmt: skip


def add_seconds(output: Path, seconds: float) -> float:
    """Add to the time that the study has taken so far, over interruptions; returns the sum."""
    file = output / "seconds.json"
    total = (read_json(file) or 0.0) + seconds
    output.mkdir(parents=True, exist_ok=True)
    write_json(file, round(total, 1))
    return round(total, 1)


def finish(study: Comparison, begin: float) -> dict:
    """Measure costs, draw the pictures, write the report; returns its data.

    Args:
        begin: of this attempt, by time.time().
    """
    models = study.models()
    cost, about = costs_of_trained(models), describe_data(next(iter(models.values()))[0])
    conventional = "baseline_equal_cost" if "baseline_equal_cost" in models else "baseline_L"
    roles = {"teacher": "teacher", "conventional": conventional, "student": "student_L"}
    draw_pictures(study.output, models, roles)
    seconds = add_seconds(study.output, time.time() - begin)
    data = {**about_report(), "seconds": seconds, "data": about, **study.collect(), "cost": cost}
    curves = {name: weights.with_name("metrics.json") for name, (_, weights) in models.items()}
    write_report(data, study.output, TITLE, curves=curves)
    return data


def export_student(study: Comparison) -> str:
    """Write the student of the first seed as files that need no teacher; what builds it, or "" if there is none."""
    run = Run("student_L", study.seeds[0])
    if run.name not in study.variants or study.result(run) is None:
        return ""
    cfg = study.config(run)
    with registered(cfg):  # whose names the export asks for
        sentence = export(cfg, str(study.weights(run)), study.output / "student_L")
    return f"\n\nStudent: {study.output / 'student_L'}. {sentence}"


def work(args: argparse.Namespace) -> int:
    """Train, evaluate and report; status 1 if a run failed."""
    begin = time.time()
    study = make_study(args)
    jobs = args.jobs
    if jobs is None:
        jobs = min(count_cores(), 4) if study.config(study.runs()[0]).MODEL.DEVICE == "cpu" else 1
    try:
        failed = study.run(make_slots(jobs, args.threads, args.devices))
    except KeyboardInterrupt:
        add_seconds(args.output, time.time() - begin)
        raise
    if study.finished():
        data = finish(study, begin)
        for line in warnings(data):
            print(f"WARNED: {line}", file=sys.stderr)
        print(f"{format_tables(data)}\n\n{data['seconds']:.0f} s in all. Report: {args.output / 'report.html'}"
              f"{export_student(study)}")  # fmt: skip
    for run in failed:
        log = study.folder(run) / "log.txt"
        print(f"error: {run}: {error_of(study.folder(run))}{f'; see {log}' if log.is_file() else ''}", file=sys.stderr)
    if failed:
        print("These runs are missing for that; the same command tries them again.", file=sys.stderr)
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    args = cli.parse(make_parser(), argv)
    args.seeds = list(dict.fromkeys(args.seeds))
    if args.threads:
        torch.set_num_threads(args.threads)
    return cli.run("quickstart", lambda: work(args), "interrupted; the same command goes on where it was")


if __name__ == "__main__":
    sys.exit(main())
