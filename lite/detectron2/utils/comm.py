"""Communication between the processes of a distributed job; every function also works without one.

Ranks are those of ``torch.distributed``. "Local" means: on the same machine.
"""

import atexit
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

# Purpose: (the job's default group at the time, the group made for the purpose). A process can take part in one
# job after another, and a group of a former job is of no use in the next.
_groups: dict[str, tuple[dist.ProcessGroup, dist.ProcessGroup]] = {}


def _remember(purpose: str, group: dist.ProcessGroup) -> dist.ProcessGroup:
    _groups[purpose] = (dist.group.WORLD, group)
    return group


def _recall(purpose: str) -> dist.ProcessGroup | None:
    job, group = _groups.get(purpose, (None, None))
    return group if job is dist.group.WORLD else None


@atexit.register
def forget_groups() -> None:
    """Let go of all groups; for the end of a job.

    Also at exit: a gloo group that is freed when the interpreter is already half gone aborts the process.
    """
    _groups.clear()


def _in_job() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    """The number of processes of the job."""
    return dist.get_world_size() if _in_job() else 1


def get_rank() -> int:
    """The rank of this process in the job."""
    return dist.get_rank() if _in_job() else 0


def is_main_process() -> bool:
    """Whether this process is the one that writes files and logs."""
    return get_rank() == 0


def create_local_process_group(num_workers_per_machine: int) -> None:
    """Make the process group of each machine; every process of the job calls it once.

    Args:
        num_workers_per_machine: processes on each machine, a divisor of the world size. Ranks are expected to be
            numbered machine by machine.

    Raises:
        ValueError: the world size is not a multiple of ``num_workers_per_machine``.
    """
    if get_world_size() % num_workers_per_machine:
        raise ValueError(f"{get_world_size()} processes cannot be {num_workers_per_machine} on each machine")
    mine, _ = dist.new_subgroups(group_size=num_workers_per_machine)
    _remember("machine", mine)


def get_local_process_group() -> dist.ProcessGroup:
    """The group of the processes on this machine.

    Raises:
        AssertionError: nobody has called :func:`create_local_process_group`.
    """
    group = _recall("machine") if _in_job() else None
    if group is None:
        raise AssertionError("which processes share a machine is unknown: call create_local_process_group first")
    return group


def get_local_rank() -> int:
    """The rank of this process on its machine."""
    return dist.get_rank(get_local_process_group()) if _in_job() else 0


def get_local_size() -> int:
    """The number of processes on this machine."""
    return dist.get_world_size(get_local_process_group()) if _in_job() else 1


def synchronize() -> None:
    """Wait until all processes have come here."""
    if get_world_size() > 1:
        # NCCL would otherwise guess the GPU from the rank.
        gpus = [torch.cuda.current_device()] if dist.get_backend() == "nccl" else None
        dist.barrier(device_ids=gpus)


def _object_group() -> dist.ProcessGroup:
    """All processes, over gloo: NCCL would send pickled objects through the memory of the GPUs."""
    known = _recall("objects")
    if known is not None:
        return known
    return _remember("objects", dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo"))


def all_gather(data: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The ``data`` (any picklable object) of all ranks, in the order of ranks, on every rank.

    Args:
        data: this rank's object.
        group: default: all processes, through gloo.
    """
    if get_world_size() == 1:
        return [data]
    channel = group or _object_group()
    everybody = [None] * channel.size()
    dist.all_gather_object(everybody, data, group=channel)
    return everybody


def gather(data: Any, dst: int = 0, group: dist.ProcessGroup | None = None) -> list[Any]:
    """As :func:`all_gather`, but only rank ``dst`` (of the job) gets the list; the others get an empty one."""
    if get_world_size() == 1:
        return [data]
    channel = group or _object_group()
    received = [None] * channel.size() if get_rank() == dst else []
    dist.gather_object(data, received or None, dst=dst, group=channel)
    return received


def shared_random_seed() -> int:
    """A random number that all processes agree on; every process has to call it.

    It comes from numpy's global generator of rank 0.
    """
    proposal = [int(np.random.randint(2**31))]
    if get_world_size() > 1:
        dist.broadcast_object_list(proposal, src=0, group=_object_group())
    return proposal[0]


@torch.no_grad()
def reduce_dict(input_dict: dict[str, torch.Tensor], average: bool = True) -> dict[str, torch.Tensor]:
    """Add up (or average) scalar tensors over all ranks; the result is right on rank 0 only.

    Args:
        input_dict: scalar tensors, the same keys on every rank.
        average: divide by the number of ranks.
    """
    world = get_world_size()
    if world == 1:
        return input_dict
    order = sorted(input_dict)  # insertion may have happened in another order elsewhere
    sums = torch.stack([input_dict[name] for name in order])
    dist.reduce(sums, dst=0)
    return dict(zip(order, sums / world if average else sums))
