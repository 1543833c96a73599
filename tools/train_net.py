#!/usr/bin/env python
"""Train and evaluate baselines, teachers and students.

    tools/train_net.py --config-file configs/MSAD/fcos_R_50_T_1x.yaml --num-gpus 8
    tools/train_net.py --config-file configs/MSAD/fcos_R_50_S_L_1x.yaml --num-gpus 8 --resume
    tools/train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth
    tools/train_net.py --config-file ... SOLVER.IMS_PER_BATCH 4 SOLVER.BASE_LR 0.0025 OUTPUT_DIR output/mine

What is trained follows from the yaml: META_ARCHITECTURE MultiScaleTeacher is a teacher, a DISTILL.TEACHERS entry makes
the model a student, anything else is a baseline. Several machines: the same command on each with --num-machines,
--machine-rank and --dist-url tcp://HOST:PORT.
"""

import sys

from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from msad import load_config
from msad.engine.setup import evaluate, load_model, prepare, train


def main(args):
    cfg = load_config(args.config_file, args.opts)
    cfg.freeze()
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="msad")
    prepare(cfg)
    if args.eval_only:
        return evaluate(cfg, load_model(cfg))
    return train(cfg, resume=args.resume)


def cli() -> int:
    parser = default_argument_parser(__doc__)
    args = parser.parse_args()
    if not args.config_file:
        parser.error("--config-file is required")
    try:
        load_config(args.config_file, args.opts)  # so that a wrong key is one line, before any process starts
    except (FileNotFoundError, KeyError, ValueError) as error:
        parser.error(str(error.args[0]))
    try:
        machines = {key: getattr(args, key) for key in ("num_machines", "machine_rank", "dist_url")}
        launch(main, args.num_gpus, args=(args,), **machines)
    except KeyboardInterrupt:
        print("\nInterrupted. The same command with --resume goes on from the last checkpoint.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(cli())
