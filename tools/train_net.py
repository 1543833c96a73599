#!/usr/bin/env python
"""Train and evaluate baselines, teachers and students.

    tools/train_net.py --config-file configs/MSAD/fcos_R_50_T_1x.yaml --num-gpus 8
    tools/train_net.py --config-file configs/MSAD/fcos_R_50_S_L_1x.yaml --num-gpus 8 --resume
    tools/train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth
    tools/train_net.py --config-file ... SOLVER.IMS_PER_BATCH 4 SOLVER.BASE_LR 0.0025 OUTPUT_DIR output/mine

What is trained follows from the yaml: META_ARCHITECTURE MultiScaleTeacher is a teacher, a DISTILL.TEACHERS entry makes
the model a student, anything else is a baseline. A run never writes into the folder of another one; an evaluation
writes below OUTPUT_DIR/inference only. Several machines: the same command on each with --num-machines, --machine-rank
and --dist-url tcp://HOST:PORT.
"""

import argparse
import logging
import sys
from pathlib import Path

from detectron2.engine import default_argument_parser, launch
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

from msad import cli, load_config
from msad.data.checks import check_test_sets
from msad.engine.first_screen import quiet_console
from msad.engine.provenance import command_line
from msad.engine.run_folder import check_folder, check_inputs, has_run, last_checkpoint, set_aside
from msad.engine.setup import evaluate, load_model, prepare, start_process, train

INTERRUPTED = "interrupted; the same command with --resume goes on from the last checkpoint"


def work(args: argparse.Namespace) -> dict | None:
    """Train or evaluate in this process; returns results by task."""
    cfg, notes = load_config(args.config_file, args.opts), []
    cli.require_device(cfg.MODEL.DEVICE)
    folder = Path(cfg.OUTPUT_DIR)
    if args.eval_only:
        cfg.OUTPUT_DIR = str(folder / "inference")  # the run in OUTPUT_DIR keeps its own log and config
    else:
        cfg, notes = check_folder(cfg, args.config_file, args.resume)
    resumed = args.resume and has_run(folder)
    comm.synchronize()  # nobody writes before all have looked
    start_process(cfg, command_line(), training=not args.eval_only)
    if args.eval_only:
        cfg.OUTPUT_DIR = str(folder)
    cfg.freeze()
    prepare(cfg)
    for note in notes:
        logging.getLogger("msad").warning(note)
    if args.eval_only:
        check_test_sets(cfg)
        return evaluate(cfg, load_model(cfg, last_checkpoint(folder) if args.resume else ""))
    if comm.is_main_process():
        if not resumed:
            set_aside(folder)
        check_inputs(cfg, resumed)
    return train(cfg, resume=args.resume)


def process(args: argparse.Namespace) -> None:
    """:func:`work` in one of the processes of a job; bad input ends it with one line and status 2."""

    def attempt() -> None:
        try:
            work(args)
        except cli.BAD_INPUT:
            with quiet_console():  # log.txt alone keeps where it came from
                logging.getLogger("detectron2").info("Stopped", exc_info=True)
            raise

    if status := cli.run("train_net.py", attempt, INTERRUPTED):
        sys.exit(status)


def main(argv: list[str] | None = None) -> int:
    parser = default_argument_parser(__doc__)
    parser.set_defaults(dist_url=None)
    args = cli.parse(parser, argv)
    if not args.config_file:
        parser.error("--config-file is required")
    if args.num_machines > 1 and args.dist_url is None:
        parser.error(f"--num-machines {args.num_machines} needs --dist-url tcp://HOST:PORT, of the machine with rank 0")
    if not 0 <= args.machine_rank < args.num_machines:
        parser.error(f"--machine-rank is from 0 to {args.num_machines - 1}, not {args.machine_rank}")
    args.dist_url = args.dist_url or "auto"  # a free port: detectron2's own is one for all jobs of a user

    def start() -> int:
        load_config(args.config_file, args.opts)  # so that a wrong key is one line, before any process starts
        machines = {key: getattr(args, key) for key in ("num_machines", "machine_rank", "dist_url")}
        try:
            launch(process, args.num_gpus, args=(args,), **machines)
        except (SystemExit, ProcessExitedException) as stop:
            return stop.code if isinstance(stop, SystemExit) else stop.exit_code
        return 0

    return cli.run("train_net.py", start, INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
