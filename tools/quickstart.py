#!/usr/bin/env python
"""How much of a full-resolution detector's accuracy does one at half the resolution keep? Train, compare, report.

    tools/quickstart.py                                  synthetic scenes, one seed: minutes on two CPU cores
    tools/quickstart.py --data DIR                       your data: DIR/images, DIR/annotations_{train,val}.json (COCO)
    tools/quickstart.py --data DIR --short-side 320 --iterations 2000
    tools/quickstart.py --configs configs/nuclei --seeds 0 1 2 --rows all      a full study of a configs folder

Trains the conventional low-resolution detector, the one with aligned levels, the multi-resolution teacher, a student
that is only initialised from the teacher (the control), the MSAD student, and the low-resolution detector once more
with as many iterations as teacher and student together; several at a time, a run a core. An interrupted run goes on
with the same command.
Results: OUTPUT/report.html, report.md, metrics.json, and a folder a seed and row.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import cv2
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.engine import DefaultPredictor

from msad import load_config
from msad.data import register_datasets
from msad.data.synthetic import make_dataset, register_entries
from msad.engine.checkpoint import atomic_write
from msad.engine.setup import engine_name, load_model
from msad.evaluation.cost import count_macs, count_parameters, measure_latency
from msad.experiments.jobs import count_cores, device_opts, make_slots
from msad.experiments.report import format_table, write_report
from msad.experiments.study import ROWS, Study, collect, run
from msad.modeling.teacher import MultiScaleTeacher
from msad.visualization import Panel, plot_curves, save_panels

REPOSITORY = Path(__file__).resolve().parents[1]
QUICK_ROWS = (
    "baseline_H", "baseline_L", "baseline_L_shifted", "teacher", "student_L_control", "student_L", "baseline_L_2x",
)  # fmt: skip
SYNTHETIC = {
    "num_train": 600, "num_val": 100, "size": (128, 128), "objects": (3, 7), "min_size": 10.0,
    "classes": ("disc", "ring", "triangle"), "seed": 0,
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/quickstart"), help="default: %(default)s")
    parser.add_argument("--data", type=Path, help="folder with images/, annotations_train.json, annotations_val.json")
    parser.add_argument("--configs", type=Path, default=REPOSITORY / "configs/quickstart", help="folder of the models")
    rows = f"'all' or of {', '.join(ROWS)}; default: {' '.join(QUICK_ROWS)}"
    parser.add_argument("--rows", nargs="+", default=list(QUICK_ROWS), metavar="ROW", help=rows)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="each row runs once a seed; default: 0")
    parser.add_argument("--iterations", type=int, help="of every stage; default: as the configs say")
    parser.add_argument("--short-side", type=int, help="of H in pixels; default: as the configs say")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time on the CPU; default: one a core, up to 4")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads a run; default: cores / jobs")
    parser.add_argument("--devices", nargs="+", default=[], metavar="cuda:N", help="a run at a time on each GPU")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides for every row, after --")
    args = parser.parse_args()
    if args.jobs is not None and args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    args.seeds = list(dict.fromkeys(args.seeds))
    return args


def data_opts(folder: Path) -> list:
    """Overrides that make every row train and test on ``folder``."""
    for name in ("images", "annotations_train.json", "annotations_val.json"):
        if not (folder / name).exists():
            raise FileNotFoundError(f"--data {folder}: there is no {name} in it")
    folder = folder.resolve()
    categories = json.loads((folder / "annotations_train.json").read_text()).get("categories", [])
    entries = register_entries(folder, folder.name)
    return [
        "DATASETS.REGISTER", entries,
        "DATASETS.TRAIN", (entries[0]["NAME"],),
        "DATASETS.TEST", (entries[1]["NAME"],),
        "MODEL.FCOS.NUM_CLASSES", len(categories),
        "MODEL.RETINANET.NUM_CLASSES", len(categories),
    ]  # fmt: skip


def describe_data(study: Study) -> dict:
    """Name and counts of the data that the study used."""
    cfg = study.config(study.task(study.ordered()[0], study.seeds[0]))
    register_datasets(cfg)  # nothing has, where all rows were finished before
    train, val = (DatasetCatalog.get(names[0]) for names in (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST))
    return {
        "name": cfg.DATASETS.TRAIN[0].removesuffix("_train"),
        "images_train": len(train),
        "images_val": len(val),
        "instances_train": sum(len(d["annotations"]) for d in train),
        "classes": list(MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).thing_classes),
    }


def first_test_image(cfg: CfgNode) -> list[dict]:
    """The first image of the data that a row is tested on, as its model gets it."""
    register_datasets(cfg)
    return [DatasetMapper(cfg, is_train=False)(DatasetCatalog.get(cfg.DATASETS.TEST[0])[0])]


def measure_costs(study: Study) -> dict[str, dict]:
    """Parameters, GMACs and milliseconds of each evaluated model on the first test image at its own size."""
    costs: dict[str, dict] = {}
    by_config: dict[tuple, dict] = {}
    for name in study.complete():
        seed = study.seeds[0]
        task = study.task(name, seed)
        cfg = study.config(task)
        model = load_model(cfg, str(study.folder(task) / "model_final.pth"))
        branches = model.branches if isinstance(model, MultiScaleTeacher) else [None]
        for branch in branches:
            if branch is not None:
                model.set_eval_branch(branch)
            key = (cfg.MODEL.dump(), cfg.INPUT.MIN_SIZE_TEST, branch)
            if key not in by_config:
                inputs = first_test_image(cfg)
                macs = {part: float(f"{value:.4g}") for part, value in count_macs(model, inputs).items()}
                latency = {p: float(f"{v:.4g}") for p, v in measure_latency(model, inputs, repeats=15).items()}
                parameters = sum(p.numel() for p in model.parameters())
                parts = count_parameters(model)
                by_config[key] = {
                    "input": list(inputs[0]["image"].shape[1:]), "parameters": parameters, "parameters_by_part": parts,
                    "gmacs": macs, "ms": latency,
                }  # fmt: skip
            costs[name if branch is None else f"{name}_{branch}"] = by_config[key]
    return costs


def draw_panels(study: Study, path: Path, count: int = 4, threshold: float = 0.5) -> None:
    """Ground truth, teacher and the low-resolution models side by side on a few validation images."""
    seed = study.seeds[0]
    columns = {"teacher": "teacher (H + L)", "baseline_L": "baseline L", "student_L": "student L"}
    columns = {name: title for name, title in columns.items() if name in study.complete()}
    predictors = {}
    for name in columns:
        task = study.task(name, seed)
        cfg = study.config(task).clone()
        cfg.defrost()
        cfg.MODEL.WEIGHTS = str(study.folder(task) / "model_final.pth")
        predictors[name] = DefaultPredictor(cfg)
    test = study.config(study.task(study.ordered()[0], seed)).DATASETS.TEST[0]
    records = DatasetCatalog.get(test)
    panels = []
    for record in records[:: max(len(records) // count, 1)][:count]:
        image = cv2.imread(record["file_name"])
        found = {title: predictors[name](image)["instances"] for name, title in columns.items()}
        panels.append(Panel(image[:, :, ::-1], {"ground truth": record, **found}, Path(record["file_name"]).name))
    save_panels(path, panels, MetadataCatalog.get(test), threshold=threshold)


def add_seconds(output: Path, seconds: float) -> float:
    """Add to the time that the study has taken so far, over interruptions; returns the sum."""
    file = output / "seconds.json"
    total = (json.loads(file.read_text()) if file.is_file() else 0.0) + seconds
    output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(round(total, 1)))
    return round(total, 1)


def make_study(args: argparse.Namespace) -> Study:
    """The study that the command line asks for; draws the synthetic scenes if it needs them."""
    opts = [value for value in args.opts if value != "--"]
    if args.data is not None:
        opts = data_opts(args.data) + opts
    elif not load_config(args.configs / "Base.yaml").DATASETS.TRAIN:
        folder = args.output / "scenes"
        print(f"Scenes: {SYNTHETIC['num_train']} for training, {SYNTHETIC['num_val']} for validation, in {folder}")
        make_dataset(folder, **SYNTHETIC)
        opts = data_opts(folder) + opts
    opts += device_opts(args.devices)
    rows = tuple(ROWS) if args.rows == ["all"] else tuple(args.rows)
    return Study(args.configs, args.output, opts, tuple(args.seeds), rows, args.short_side, args.iterations)


def finish(study: Study, begin: float) -> dict:
    """Measure costs, draw the pictures, write metrics.json and the report; returns the metrics.

    Args:
        begin: of this attempt, by time.time().
    """
    data, cost = describe_data(study), measure_costs(study)
    runs = {name: study.folder(study.task(name, study.seeds[0])) / "metrics.json" for name in study.complete()}
    plot_curves({name: file for name, file in runs.items() if file.is_file()}, study.output / "curves.png")
    draw_panels(study, study.output / "panels.jpg")
    metrics = {
        "engine": engine_name(),
        "seconds": add_seconds(study.output, time.time() - begin),
        "command": " ".join(["python", *sys.argv]),
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "seeds": list(study.seeds),
        "data": data,
        "results": collect(study),
        "cost": cost,
    }
    with atomic_write(str(study.output / "metrics.json"), "w") as file:
        json.dump(metrics, file, indent=1)
    write_report(metrics, study.output)
    return metrics


def main() -> int:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    begin = time.time()
    failed, metrics = [], None
    try:
        study = make_study(args)
        on_cpu = study.config(study.task(study.ordered()[0], study.seeds[0])).MODEL.DEVICE == "cpu"
        jobs = args.jobs or (min(count_cores(), 4) if on_cpu else 1)
        failed = run(study, make_slots(jobs, args.threads, args.devices))
        if study.complete():
            metrics = finish(study, begin)
    except KeyboardInterrupt:
        add_seconds(args.output, time.time() - begin)
        print("\nInterrupted. The same command goes on where it was.", file=sys.stderr)
        return 130
    except (FileNotFoundError, KeyError, ValueError) as error:
        print(f"error: {error if isinstance(error, OSError) else error.args[0]}", file=sys.stderr)
        return 2
    if metrics is not None:
        print(format_table(metrics))
        print(f"\n{metrics['seconds']:.0f} s in all. Report: {args.output / 'report.html'}")
    for task in failed:
        log = study.folder(task) / "log.txt"
        print(f"error: {task}: {study.error(task)}{f'; see {log}' if log.is_file() else ''}", file=sys.stderr)
    if failed:
        print("These rows are missing for that; the same command tries them again.", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
