"""Start one process a GPU (or a CPU process, where there is no GPU) and connect them."""

import logging
import socket
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from detectron2.utils import comm

__all__ = ["DEFAULT_TIMEOUT", "launch"]

DEFAULT_TIMEOUT = timedelta(minutes=30)


def launch(
    main_func: Callable,
    num_gpus_per_machine: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str | None = None,
    args: tuple = (),
    timeout: timedelta = DEFAULT_TIMEOUT,
) -> None:
    """Call `main_func(*args)` in `num_machines * num_gpus_per_machine` connected processes.

    Run this once on each machine. With a single process in all, `main_func` is called directly.

    Args:
        main_func: an importable function (it is sent to spawned processes by name).
        num_gpus_per_machine: processes on each machine; process i uses GPU i. Without any GPU they are
            CPU processes that talk over gloo.
        num_machines: how many machines take part.
        machine_rank: the number of this machine, from 0.
        dist_url: where to meet: "tcp://host:port" of machine 0, "file://..." on a shared file system, or
            "auto" for a free local port (one machine only).
        args: arguments of `main_func`.
        timeout: how long a collective operation may wait for the others.

    Raises:
        ValueError: the numbers or the url do not fit together.
        torch.multiprocessing.ProcessRaisedException: `main_func` raised in a process; the others were ended.
    """
    world_size = num_machines * num_gpus_per_machine
    if world_size <= 1:
        main_func(*args)
        return
    if not 0 <= machine_rank < num_machines:
        raise ValueError(f"machine_rank is {machine_rank}, it must be in 0..{num_machines - 1}.")
    url = _meeting_point(dist_url, num_machines)
    job = (main_func, world_size, num_gpus_per_machine, machine_rank, url, args, timeout)
    mp.start_processes(
        _run_process, args=job, nprocs=num_gpus_per_machine, daemon=False, start_method="spawn"
    )


def _meeting_point(dist_url: str | None, num_machines: int) -> str:
    if dist_url is None:
        raise ValueError("Several processes need a dist_url: 'auto', 'tcp://host:port' or 'file://path'.")
    if dist_url == "auto":
        if num_machines > 1:
            raise ValueError("dist_url 'auto' finds a port on this machine only; give 'tcp://host:port'.")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    if num_machines > 1 and dist_url.startswith("file://"):
        logging.getLogger(__name__).warning("file:// needs a shared file system; prefer tcp://host:port.")
    return dist_url


def _run_process(
    local_rank: int,
    main_func: Callable,
    world_size: int,
    processes_here: int,
    machine_rank: int,
    dist_url: str,
    args: tuple,
    timeout: timedelta,
) -> None:
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        if processes_here > torch.cuda.device_count():
            raise ValueError(f"{processes_here} GPUs asked for, there are {torch.cuda.device_count()} here.")
        # Before NCCL starts: it takes the current device.
        torch.cuda.set_device(local_rank)
    dist.init_process_group(
        backend="nccl" if on_gpu else "gloo",
        init_method=dist_url,
        world_size=world_size,
        rank=machine_rank * processes_here + local_rank,
        timeout=timeout,
    )
    comm.create_local_process_group(processes_here)
    comm.synchronize()
    main_func(*args)
    dist.destroy_process_group()
