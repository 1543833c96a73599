#!/usr/bin/env python
"""Take the student, or any other model, out of its training run.

    tools/export_model.py --config-file configs/.../student.yaml --weights output/.../model_final.pth --output exported

writes exported/model.pth, which holds the model's weights and nothing else, and exported/config.yaml, which has only
keys that plain detectron2 knows; exported/msad.yaml has ours, if the model needs any. The last line printed says what
builds the model from them: plain detectron2, with a file of projects/MSAD/plain/, or with this package.

With --format onnx (pip install 'msad[onnx]'): exported/model.onnx, which goes from pixels to detections, and
exported/run.py, which runs it on images and videos without torch and detectron2 (see docs/SHIPPING.md). --int8 also
writes exported/model_int8.onnx, with 8-bit weights and activations, whose ranges are those on the images of
--calibration. --format torchscript writes the same graph as exported/model.torchscript.
"""

import argparse
import os
import sys

from msad import cli, load_config
from msad.export import export
from msad.export.onnx import FLOAT, INT8, export_onnx, require
from msad.export.torchscript import export_torchscript

FORMATS = {"detectron2": export, "onnx": export_onnx, "torchscript": export_torchscript}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="the yaml that the model was trained with")
    parser.add_argument("--weights", required=True, metavar="FILE", help="its checkpoint")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--format", choices=FORMATS, default="detectron2", help="default: detectron2")
    parser.add_argument("--int8", action="store_true", help="with --format onnx: also 8-bit integers")
    parser.add_argument("--calibration", metavar="DIR", help="folder of images like those of the application")
    args = cli.parse(parser, argv)

    def work() -> None:
        if bool(args.calibration) != args.int8 or (args.int8 and args.format != "onnx"):
            raise ValueError("--int8 needs --format onnx and --calibration DIR, and --calibration needs --int8")
        images = []
        if args.int8:
            require("onnx", "onnxruntime")
            from msad.export.quantize import find_images, quantize

            images = find_images(args.calibration)
        for used in (args.config_file, args.weights):
            cli.refuse_overwriting([args.output], [os.path.dirname(used) or "."])
        print(FORMATS[args.format](load_config(args.config_file, args.opts), args.weights, args.output))
        if args.int8:
            files = [os.path.join(args.output, name) for name in (FLOAT, INT8)]
            print(f"{files[1]}: {quantize(files[0], images, files[1])} integer layers, {len(images)} images")

    return cli.run(parser.prog, work)


if __name__ == "__main__":
    sys.exit(main())
