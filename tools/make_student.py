#!/usr/bin/env python
"""Make the half-resolution student of a detector that you have trained: its config, checked, ready to train.

    tools/make_student.py --config-file output/mine/config.yaml --weights output/mine/model_final.pth --output mine_L
    tools/make_student.py --config-file MINE.yaml --weights mine.pth --resolution EL --data DIR --output mine_EL
    tools/make_student.py --config-file COCO-Detection/retinanet_R_50_FPN_1x.yaml --weights zoo.pkl --output coco_L

writes OUTPUT/teacher.yaml, the detector as it is, and OUTPUT/student.yaml: the same detector on levels that are one
lower (two at EL), with anchors and test sizes divided, the finer levels made, and a DISTILL block. Both are built, the
teacher loads its weights and both detect in one image; the last line printed is the command that trains the student.
The config is the config.yaml that a run of detectron2 leaves, any yaml of detectron2's keys, or a name in its model
zoo; RetinaNet, FCOS, GFL, MEInst and Faster, Mask, Keypoint and Cascade R-CNN on feature pyramids. KEY VALUE overrides
go to both. Without --data or --train-json, the data sets are those of the config; annotations of other formats than
COCO's are converted into OUTPUT/data.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from msad import cli, load_config
from msad.config import default_config
from msad.config_values import value_at
from msad.data.layouts import LAYOUTS, register_entries
from msad.data.register import register_datasets
from msad.data.tally import raise_errors
from msad.distill.init import init_student
from msad.engine.build import load_teacher
from msad.engine.preflight import preflight
from msad.evaluation.cost import TOTAL, count_macs, count_parameters, random_inputs
from msad.evaluation.region_limits import fill_regions
from msad.export.plain import foreign_parts, plain_file, split_config
from msad.finding import WARNING
from msad.modeling.adapters import num_classes_key
from msad.modeling.student_config import student_config
from msad.product.methods import distil_aligned
from msad.resolution import downsampled_size, get_resolution


def data_opts(args: argparse.Namespace) -> list:
    """Overrides for --data or --train-json and its companions; [] without them.

    Names begin with "data_": no data set of the engine's own is called so.
    """
    if args.data:
        folder = Path(args.data)
        entries = register_entries(folder, f"data_{folder.resolve().name}", Path(args.output) / "data")
    elif args.train_json:
        files = {"train": (args.train_json, args.train_images), "val": (args.val_json, args.val_images)}
        if not all(map(all, files.values())):
            raise ValueError("--train-json belongs to --train-images, --val-json and --val-images")
        stem = f"data_{Path(args.train_json).stem.removesuffix('_train')}"
        entries = [
            {"NAME": f"{stem}_{split}", "JSON": os.path.abspath(file), "IMAGES": os.path.abspath(folder)}
            for split, (file, folder) in files.items()
        ]
    else:
        companions = ("train_images", "val_json", "val_images")
        if lost := [f"--{name.replace('_', '-')}" for name in companions if getattr(args, name)]:
            raise ValueError(f"{', '.join(lost)} without --train-json")
        return []
    names = [entry["NAME"] for entry in entries]
    return ["DATASETS.REGISTER", entries, "DATASETS.TRAIN", (names[0],), "DATASETS.TEST", (names[1],)]


def check_data(cfg: CfgNode) -> None:
    """ValueError or FileNotFoundError if the data sets are not known, or have other classes than the detector."""
    register_datasets(cfg)
    unknown = [name for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST) if name not in DatasetCatalog.list()]
    if unknown or not cfg.DATASETS.TRAIN:
        raise ValueError(
            f"the config's data sets ({', '.join(unknown) or 'none'}) are not known here: give --data DIR, or "
            "--train-json, --train-images, --val-json and --val-images"
        )
    key = num_classes_key(cfg)
    wanted = value_at(cfg, key)
    declared = {entry["NAME"] for entry in cfg.DATASETS.REGISTER}
    for name in declared.intersection(cfg.DATASETS.TRAIN):
        DatasetCatalog.get(name)  # the file knows the names
        names = MetadataCatalog.get(name).thing_classes
        if len(names) != wanted:
            raise ValueError(
                f"the detector has {wanted} classes ({key}), {name} has {len(names)} "
                f"({', '.join(names[:9])}); a student learns its teacher's classes: train it on these first"
            )


def make(args: argparse.Namespace) -> dict[str, dict]:
    """The trees of teacher.yaml and student.yaml."""
    cfg = load_config(args.config_file, [*args.opts, *data_opts(args)])
    weights = args.weights if "://" in args.weights else os.path.abspath(args.weights)
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = weights, os.path.join(args.output, "teacher")
    cfg.DISTILL = default_config().DISTILL
    check_data(cfg)
    student = student_config(cfg, args.resolution)
    student.OUTPUT_DIR = os.path.join(args.output, "student")
    distil_aligned(student, {"CONFIG": "teacher.yaml", "WEIGHTS": weights}, ratio=0.5)
    trees = {}
    for name, config in (("teacher", cfg), ("student", student)):
        tree = split_config(config, default_config(config.MSAD.IMPORTS))[0]
        trees[name] = {"VERSION": config.VERSION, **tree}
    return trees


def check(folder: Path) -> list[str]:
    """Build both, load the teacher, detect with both in one image; returns what is to be said of them.

    Raises:
        ValueError, FileNotFoundError: something does not fit; says what.
    """
    cfg = load_config(folder / "student.yaml", ["MODEL.DEVICE", "cpu"])
    teacher_cfg = load_config(folder / "teacher.yaml")
    teacher = load_teacher(cfg.DISTILL.TEACHERS[0], cfg)
    torch.manual_seed(0)
    student = build_model(cfg).eval()
    findings = preflight(cfg, student, [teacher], set())
    raise_errors(findings)
    init_student(student, teacher.model, cfg.DISTILL.INIT_STUDENT)
    side = teacher_cfg.INPUT.MIN_SIZE_TEST
    size = side, min(round(side * 4 / 3), max(teacher_cfg.INPUT.MAX_SIZE_TEST, side))
    sizes = {"teacher": size, "student": downsampled_size(size, get_resolution(cfg.DISTILL.STUDENT_RESOLUTION).shift)}
    macs, lines = {}, [f"note: {finding}" for finding in findings if finding.level == WARNING]
    for name, model in (("teacher", teacher.model.eval()), ("student", student)):
        if hasattr(model, "roi_heads"):  # what masks and keypoints cost depends on what is found
            model.roi_heads.mask_on = model.roi_heads.keypoint_on = False
        macs[name] = count_macs(fill_regions(model), random_inputs(*sizes[name]))[TOTAL]
        parameters = count_parameters(model)[TOTAL] / 1e6
        height, width = sizes[name]
        lines.append(f"{name}: {parameters:.1f} M parameters, {macs[name]:.4g} GMACs for {height} x {width} pixels")
    boxes = " (without masks and keypoints)" if cfg.MODEL.MASK_ON or cfg.MODEL.KEYPOINT_ON else ""
    ratio = macs["student"] / macs["teacher"]
    return [*lines, f"the student costs {ratio:.2f} of its teacher's multiply-adds{boxes}", built_by(cfg)]


def built_by(cfg: CfgNode) -> str:
    """What will build the student once it is exported."""
    foreign = foreign_parts(cfg)
    if not foreign:
        return "exported, the student is a plain detectron2 model: its yaml alone builds it"
    if plain := plain_file(cfg):
        return f"exported, the student is built by plain detectron2 and {plain}, without msad"
    return f"exported, the student needs import msad, for {', '.join(foreign)}; on detectron2's ResNets it would not"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="YAML", help="of the trained detector")
    parser.add_argument("--weights", required=True, metavar="FILE", help="its checkpoint")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the two yaml files and the training")
    parser.add_argument("--resolution", default="L", choices=["L", "EL"], help="1/2 or 1/4 of the input; default: L")
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--data", metavar="DIR", help=f"folder laid out as one of\n{LAYOUTS}".replace("%", "%%"))
    data.add_argument("--train-json", metavar="FILE", help="annotations of the training set")
    parser.add_argument("--train-images", metavar="DIR", help="its images")
    parser.add_argument("--val-json", metavar="FILE", help="annotations of the validation set")
    parser.add_argument("--val-images", metavar="DIR", help="its images")
    args = cli.parse(parser, argv)

    def work() -> None:
        output = Path(args.output)
        files = {name: output / f"{name}.yaml" for name in ("teacher", "student")}
        cli.refuse_overwriting(files.values(), [args.config_file, args.weights])
        texts = {name: yaml.safe_dump(tree, sort_keys=False) for name, tree in make(args).items()}
        for name, file in files.items():
            if file.exists() and file.read_text() != texts[name]:
                raise ValueError(f"{file} exists and is another one: choose another --output, or delete it")
        with tempfile.TemporaryDirectory() as folder:
            for name, text in texts.items():
                (Path(folder) / f"{name}.yaml").write_text(text)
            said = check(Path(folder))
        output.mkdir(parents=True, exist_ok=True)
        for name, file in files.items():
            file.write_text(texts[name])
        command = ["python", "tools/train_net.py", "--config-file", str(files["student"])]
        command += [] if torch.cuda.is_available() else ["MODEL.DEVICE", "cpu"]
        print("\n".join([*said, f"written: {files['teacher']}, {files['student']}", "train it:", shlex.join(command)]))

    return cli.run(parser.prog, work)


if __name__ == "__main__":
    sys.exit(main())
