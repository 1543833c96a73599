#!/usr/bin/env python
"""Evaluate an exported model on the test data of a config.

    tools/evaluate_onnx.py shipped/model.onnx --config-file STUDENT.yaml
    tools/evaluate_onnx.py shipped/model_int8.onnx --config-file STUDENT.yaml --threads 2 DATASETS.TEST "('my_val',)"

prints {data set: {task: {metric: value}}} as JSON, after what the evaluator says. Images are read and resized as the
program that is shipped with the model does it; the config names the data and the evaluator.
"""

from __future__ import annotations

import argparse
import json
import sys

from detectron2.utils.logger import setup_logger

from msad import cli, load_config
from msad.export.onnx import require


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="FILE", help="the .onnx file")
    parser.add_argument("--config-file", required=True, metavar="FILE", help="names the data in DATASETS.TEST")
    parser.add_argument("--threads", type=int, default=0, help="of onnxruntime (default: one a core)")
    args = cli.parse(parser, argv)

    def work() -> None:
        require("onnxruntime")
        from msad.export.evaluate import evaluate_exported

        setup_logger()
        print(json.dumps(evaluate_exported(load_config(args.config_file, args.opts), args.model, args.threads)))

    return cli.run(parser.prog, work)


if __name__ == "__main__":
    sys.exit(main())
