"""Start one process a GPU (or a CPU process, where there is no GPU) and connect them."""

import gc
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed, multiprocessing

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
    job = _Job(main_func, args, num_gpus_per_machine, num_machines, machine_rank, url, timeout)
    multiprocessing.start_processes(_run_process, (job,), nprocs=num_gpus_per_machine, start_method="spawn")


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


@dataclass
class _Job:
    """What every process of this machine is told."""

    main_func: Callable
    args: tuple
    processes_here: int
    num_machines: int
    machine_rank: int
    url: str
    timeout: timedelta


def _run_process(local_rank: int, job: _Job) -> None:
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        if job.processes_here > torch.cuda.device_count():
            raise ValueError(
                f"{job.processes_here} GPUs asked for, there are {torch.cuda.device_count()} here."
            )
        # Before NCCL starts: it takes the current device.
        torch.cuda.set_device(local_rank)
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=job.url,
        rank=job.machine_rank * job.processes_here + local_rank,
        world_size=job.num_machines * job.processes_here,
        timeout=job.timeout,
    )
    comm.create_local_process_group(job.processes_here)
    comm.synchronize()
    job.main_func(*job.args)
    _disconnect()


def _disconnect() -> None:
    """Close all process groups, with which their threads end.

    A gloo thread that still wants to free a Python object while the interpreter shuts down aborts the process.
    """
    distributed.destroy_process_group()
    comm.forget_groups()
    # Models wrapped for DDP keep groups alive, and reference cycles keep models alive.
    gc.collect()
