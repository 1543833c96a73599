"""What a training script does before and around training: command line, loggers, seed, writers, DDP."""

import argparse
import os
import sys

import torch
from torch.nn.parallel import DistributedDataParallel

from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import CommonMetricPrinter, EventWriter, JSONWriter, TensorboardXWriter
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

__all__ = ["create_ddp_model", "default_argument_parser", "default_setup", "default_writers"]


def create_ddp_model(model: torch.nn.Module, *, fp16_compression: bool = False, **kwargs) -> torch.nn.Module:
    """Wrap `model` in `DistributedDataParallel`, if there is more than one process.

    Args:
        fp16_compression: send gradients as float16.
        kwargs: for `DistributedDataParallel`.
    """
    if comm.get_world_size() == 1:
        return model
    on_gpu = any(p.device.type == "cuda" for p in model.parameters())
    if on_gpu:
        kwargs.setdefault("device_ids", [comm.get_local_rank()])
    wrapped = DistributedDataParallel(model, **kwargs)
    if fp16_compression:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

        wrapped.register_comm_hook(state=None, hook=fp16_compress_hook)
    return wrapped


def default_argument_parser(epilog: str | None = None) -> argparse.ArgumentParser:
    """The common flags of training scripts; `epilog` replaces the examples at the end of the help."""
    program = os.path.basename(sys.argv[0])
    examples = f"""
examples:
  one machine:
    {program} --config-file cfg.yaml --num-gpus 8
  other values for config keys:
    {program} --config-file cfg.yaml MODEL.WEIGHTS weights.pth SOLVER.BASE_LR 0.001
  two machines, one command on each:
    {program} --config-file cfg.yaml --num-machines 2 --machine-rank 0 --dist-url tcp://HOST:PORT
    {program} --config-file cfg.yaml --num-machines 2 --machine-rank 1 --dist-url tcp://HOST:PORT
"""
    parser = argparse.ArgumentParser(
        epilog=epilog or examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("--config-file", default="", metavar="FILE", help="the yaml config to start from")
    flag("--resume", action="store_true", help="continue from the last checkpoint in OUTPUT_DIR, if any")
    flag("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS, do not train")
    for name, default, meaning in (
        ("--num-gpus", 1, "processes (one a GPU) on each machine"),
        ("--num-machines", 1, "machines that take part"),
        ("--machine-rank", 0, "number of this machine, from 0"),
    ):
        flag(name, type=int, default=default, help=meaning)
    flag("--dist-url", default=_default_dist_url(), help="where the processes meet: tcp://, file:// or auto")
    flag("opts", default=None, nargs=argparse.REMAINDER, help="config keys and their values, KEY VALUE ...")
    return parser


def _default_dist_url() -> str:
    # A fixed port a user, in the range of dynamic ports: two users on one machine do not collide.
    user = os.getuid() if hasattr(os, "getuid") else 1
    return f"tcp://127.0.0.1:{49152 + hash(user) % 16384}"


def default_setup(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Prepare a process for a job: output folder, loggers, a record of what runs, random seed, cuDNN.

    `cfg.OUTPUT_DIR/config.yaml` gets the full config (from the main process).
    """
    output_dir = cfg.OUTPUT_DIR
    if comm.is_main_process() and output_dir:
        PathManager.mkdirs(output_dir)

    rank = comm.get_rank()
    for name in ("fvcore", "detectron2"):
        logger = setup_logger(output_dir, distributed_rank=rank, name=name)
    logger.info("This is process %d of %d.", rank, comm.get_world_size())
    logger.info("Environment:\n%s", collect_env_info())
    logger.info("Arguments: %s", args)

    config_file = getattr(args, "config_file", "")
    if config_file:
        with PathManager.open(config_file, "r") as f:
            logger.info("Config file %s:\n%s", config_file, f.read())
    if comm.is_main_process() and output_dir:
        target = os.path.join(output_dir, "config.yaml")
        with PathManager.open(target, "w") as f:
            f.write(cfg.dump())
        logger.info("The full config is in %s:\n%s", os.path.abspath(target), cfg.dump())

    # Each process has its own random numbers, or all would augment alike.
    seed_all_rng(cfg.SEED + rank if cfg.SEED >= 0 else None)
    if cfg.FLOAT32_PRECISION:
        torch.set_float32_matmul_precision(cfg.FLOAT32_PRECISION)
    # In evaluation nearly every image has a new size, so that trying out algorithms does not pay.
    if not getattr(args, "eval_only", False):
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK


def default_writers(output_dir: str, max_iter: int | None = None) -> list[EventWriter]:
    """Writers to the log, to `metrics.json` and to tensorboard files, the latter two in `output_dir`.

    Args:
        max_iter: for the remaining time in the log.
    """
    PathManager.mkdirs(output_dir)
    metrics_file = os.path.join(output_dir, "metrics.json")
    return [CommonMetricPrinter(max_iter), JSONWriter(metrics_file), TensorboardXWriter(output_dir)]
