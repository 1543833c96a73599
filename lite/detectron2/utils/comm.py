"""Communication between the processes of a distributed job; every function also works without one.

Ranks are those of ``torch.distributed``. "Local" means: on the same machine.
"""

import functools
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

_local_group: dist.ProcessGroup | None = None


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    """The number of processes of the job."""
    return dist.get_world_size() if _distributed() else 1


def get_rank() -> int:
    """The rank of this process in the job."""
    return dist.get_rank() if _distributed() else 0


def is_main_process() -> bool:
    """Whether this process is the one that writes files and logs."""
    return get_rank() == 0


@functools.cache
def create_local_process_group(num_workers_per_machine: int) -> None:
    """Make the process group of each machine; every process of the job calls it once.

    Args:
        num_workers_per_machine: processes on each machine, a divisor of the world size. Ranks are expected to be
            numbered machine by machine.

    Raises:
        ValueError: the world size is not a multiple of ``num_workers_per_machine``.
    """
    global _local_group
    world = dist.get_world_size()
    if world % num_workers_per_machine:
        raise ValueError(f"{world} processes do not divide into machines of {num_workers_per_machine}")
    for first in range(0, world, num_workers_per_machine):
        # new_group is collective: processes outside a group have to call it as well
        ranks = range(first, first + num_workers_per_machine)
        group = dist.new_group(list(ranks))
        if dist.get_rank() in ranks:
            _local_group = group


def get_local_process_group() -> dist.ProcessGroup:
    """The group of the processes on this machine.

    Raises:
        AssertionError: nobody has called :func:`create_local_process_group`.
    """
    assert _local_group is not None, (
        "the local process group is missing: start the job with detectron2.engine.launch, or call "
        "comm.create_local_process_group after torch.distributed.init_process_group"
    )
    return _local_group


def get_local_rank() -> int:
    """The rank of this process on its machine."""
    return dist.get_rank(group=get_local_process_group()) if _distributed() else 0


def get_local_size() -> int:
    """The number of processes on this machine."""
    return dist.get_world_size(group=get_local_process_group()) if _distributed() else 1


def synchronize() -> None:
    """Wait until all processes have come here."""
    if get_world_size() > 1:
        # without device_ids NCCL guesses the device and may use the wrong one
        on_gpu = dist.get_backend() == dist.Backend.NCCL
        dist.barrier(device_ids=[torch.cuda.current_device()] if on_gpu else None)


@functools.cache
def _object_group() -> dist.ProcessGroup:
    """A group that can send Python objects from host memory."""
    if dist.get_backend() == dist.Backend.NCCL:
        return dist.new_group(backend="gloo")
    return dist.group.WORLD


def _group_size(group: dist.ProcessGroup | None) -> tuple[dist.ProcessGroup | None, int]:
    if get_world_size() == 1:
        return None, 1
    group = group if group is not None else _object_group()
    return group, dist.get_world_size(group)


def all_gather(data: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The ``data`` (any picklable object) of all ranks, in the order of ranks, on every rank.

    Args:
        data: this rank's object.
        group: default: all processes, through gloo.
    """
    group, size = _group_size(group)
    if size == 1:
        return [data]
    everyone = [None] * size
    dist.all_gather_object(everyone, data, group=group)
    return everyone


def gather(data: Any, dst: int = 0, group: dist.ProcessGroup | None = None) -> list[Any]:
    """As :func:`all_gather`, but only rank ``dst`` (of the job) gets the list; the others get an empty one."""
    group, size = _group_size(group)
    if size == 1:
        return [data]
    if dist.get_rank() != dst:
        dist.gather_object(data, None, dst=dst, group=group)
        return []
    everyone = [None] * size
    dist.gather_object(data, everyone, dst=dst, group=group)
    return everyone


def shared_random_seed() -> int:
    """A random number that all processes agree on; every process has to call it.

    It comes from numpy's global generator of rank 0.
    """
    return all_gather(np.random.randint(2**31))[0]


def reduce_dict(input_dict: dict[str, torch.Tensor], average: bool = True) -> dict[str, torch.Tensor]:
    """Add up (or average) scalar tensors over all ranks; the result is right on rank 0 only.

    Args:
        input_dict: scalar tensors, the same keys on every rank.
        average: divide by the number of ranks.
    """
    size = get_world_size()
    if size == 1:
        return input_dict
    with torch.no_grad():
        # a common order, for ranks may have filled their dicts in different ones
        names = sorted(input_dict)
        stacked = torch.stack([input_dict[name] for name in names])
        dist.reduce(stacked, dst=0)
        if average and is_main_process():
            stacked /= size
        return dict(zip(names, stacked, strict=True))
