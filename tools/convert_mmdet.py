#!/usr/bin/env python
"""Convert a checkpoint of mmdetection (2.x, 3.x) into a detectron2 checkpoint and the yaml that goes with it.

    tools/convert_mmdet.py retinanet_x101_64x4d_fpn_mstrain_3x_coco.pth --output teachers/retinanet_x101

writes model.pth and config.yaml, which give the detections that mmdetection's model gives. RetinaNet, FCOS, GFL,
RepPoints, Faster, Mask and Cascade (Mask) R-CNN, HTC and DetectoRS on ResNets, ResNeXts, deformable ones and Swin are
known. Of a distillation's checkpoint the student is taken. Whatever does not fit is named, and nothing is written.
"""

import argparse
import os
import sys

import torch
import yaml

from msad import cli
from msad.convert import convert
from msad.convert.files import read_checkpoint
from msad.convert.mmdet import PIXELS, STYLES
from msad.files import atomic_write


def run(checkpoint: str, output: str, pixels: str = "", style: str = "", prefix: str | None = None) -> str:
    """Convert and say what was done; errors are ValueError or FileNotFoundError."""
    found = read_checkpoint(checkpoint, prefix)
    files = [os.path.join(output, name) for name in ("model.pth", "config.yaml")]
    cli.refuse_overwriting(files, [checkpoint])
    converted = convert(found, pixels, style)
    config = {**converted.config, "MODEL": {**converted.config["MODEL"], "WEIGHTS": "model.pth"}}
    os.makedirs(output, exist_ok=True)
    with atomic_write(files[0]) as file:
        torch.save({"model": converted.tensors, "__author__": "mmdetection"}, file)
    with atomic_write(files[1], "w") as file:
        yaml.safe_dump(config, file, sort_keys=False, default_flow_style=None, width=110)
    lines = [f"{converted.kind}: {len(converted.plan.moves)} tensors -> {files[0]}, {files[1]}"]
    for what, names in (
        ("computed by detectron2", converted.plan.computed), ("that only detectron2 has", converted.added),
        ("of another model, left out", found.left_out),
    ):  # fmt: skip
        if names:
            lines.append(f"{len(names)} tensors {what}, e.g. {names[0]}")
    if found.classes:
        lines.append(f"classes: {', '.join(found.classes)}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="FILE", help="of mmdetection")
    parser.add_argument("--output", required=True, metavar="FOLDER")
    parser.add_argument("--pixels", default="", choices=PIXELS, help="of the images, if the file has no config")
    parser.add_argument("--style", default="", choices=STYLES, help="of the ResNet, if the file has no config")
    parser.add_argument("--prefix", help="of the wanted detector's tensors, e.g. teacher.; default: found by itself")
    args = cli.parse(parser, argv)
    return cli.run(
        parser.prog, lambda: print(run(args.checkpoint, args.output, args.pixels, args.style, args.prefix))
    )


if __name__ == "__main__":
    sys.exit(main())
