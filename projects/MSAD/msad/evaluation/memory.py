"""Peak memory: of inference, weights included, and of whatever else runs."""

from __future__ import annotations

import functools
import json
import pkgutil
import resource
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .cost import random_inputs
from .region_limits import fill_regions


@torch.no_grad()
def _build_and_run(cfg: CfgNode, height: int, width: int) -> None:
    fill_regions(build_model(cfg).eval())(random_inputs(height, width))


def resident_bytes() -> tuple[int, int]:
    """(current, highest so far) resident bytes of this process; both the highest where there is no /proc."""
    try:
        with open("/proc/self/status") as f:
            fields = dict(line.split(":", 1) for line in f)
        # Not getrusage: what that returns on Linux begins with the parent's memory at the time of the fork.
        return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024
    except FileNotFoundError:
        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return highest, highest


class PeakMemory:
    """By how many bytes memory grows at most from now on.

    On a GPU: what torch's allocator holds. On a CPU: the resident memory of this process, which only shows what nobody
    before has asked the allocator for, so use it early.
    """

    def __init__(self, device: str) -> None:
        self.gpu = device if torch.device(device).type == "cuda" else None
        if self.gpu:
            torch.cuda.reset_peak_memory_stats(self.gpu)
        self.before = torch.cuda.memory_allocated(self.gpu) if self.gpu else resident_bytes()[0]

    def growth(self) -> int:
        return (torch.cuda.max_memory_allocated(self.gpu) if self.gpu else resident_bytes()[1]) - self.before


class TensorMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside and live at once, on any device.

    Not counted is what operators need while they run. Unlike resident memory it does not depend on what ran before.

    Attributes:
        bytes: now.
        peak: most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._see((args, kwargs), counted=False)  # what an operator reads and nobody made inside is older
        out = func(*args, **(kwargs or {}))
        self._see(out, counted=True)
        self.peak = max(self.peak, self.bytes)
        return out

    def _see(self, tree: object, counted: bool) -> None:
        for x in tree_leaves(tree):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self._sizes:
                storage = x.untyped_storage()
                self._sizes[storage._cdata] = size = storage.nbytes() if counted else 0
                self.bytes += size
                weakref.finalize(storage, self._remove, storage._cdata)

    def _remove(self, key: int) -> None:
        self.bytes -= self._sizes.pop(key)


def step_memory(step: Callable[[], None], device: str) -> int:
    """Bytes that ``step`` needs at most: on a GPU of torch's allocator, elsewhere of tensors that live at once."""
    if torch.device(device).type == "cuda":
        memory = PeakMemory(device)
        step()
        return memory.growth()
    with TensorMemory() as memory:
        step()
    return memory.peak


def growth_in_fresh_process(function: str, threads: int | None = None, **request: Any) -> int:
    """Bytes by which a fresh process grows while it does what ``function`` prepares.

    Args:
        function: "module:name" of a function that takes ``request``, whose values JSON can hold, and returns what is
            measured. What it does itself is not: imports, the first use of libraries, data.
        threads: torch's; default: torch's choice.

    Raises:
        RuntimeError: the process failed; with the last line that it wrote.
    """
    child = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import _child; _child()"],
        input=json.dumps({"function": function, "threads": threads, "request": request}),
        capture_output=True,
        text=True,
        start_new_session=True,  # Ctrl-C is for the parent, which ends the child
    )
    if child.returncode:
        raise RuntimeError(f"measuring memory failed: {(child.stderr.strip().splitlines() or ['no message'])[-1]}")
    return int(child.stdout.split()[-1])


def _child() -> None:
    """Entry of that process: what to do on stdin, bytes as the last line of stdout."""
    asked = json.load(sys.stdin)
    if asked["threads"]:
        torch.set_num_threads(asked["threads"])
    measured = pkgutil.resolve_name(asked["function"])(**asked["request"])
    memory = PeakMemory("cpu")
    measured()
    print(memory.growth())


def prepare_inference(cfg: str, height: int, width: int) -> Callable[[], None]:
    """For :func:`growth_in_fresh_process`: the model of a yaml text, built and run on one image."""
    import msad  # noqa: F401  (fills the registries)

    # Whatever torch loads and allocates at its first convolution is not the model's.
    F.conv2d(torch.zeros(1, 8, 32, 32), torch.zeros(8, 8, 3, 3))
    return functools.partial(_build_and_run, CfgNode.load_cfg(cfg), height, width)


def peak_memory(cfg: CfgNode, height: int, width: int, threads: int | None = None) -> int:
    """Bytes that the model of ``cfg``, with random weights, needs at most to process one image.

    R-CNNs have as many regions as their limits allow, see :func:`msad.evaluation.region_limits.fill_regions`.

    On a GPU: the most that torch's allocator held at once. On a CPU: by how much the resident memory of a fresh
    process grows from before the model is built, so it also contains what the allocator of the C library keeps.

    Args:
        height, width: of the image in pixels of the model's own input.
        threads: of the fresh process; default: torch's choice.

    Raises:
        RuntimeError: the process failed; with the last line that it wrote.
    """
    if torch.device(cfg.MODEL.DEVICE).type == "cuda":
        memory = PeakMemory(cfg.MODEL.DEVICE)
        _build_and_run(cfg, height, width)
        return memory.growth()
    request = {"cfg": cfg.dump(), "height": height, "width": width}
    return growth_in_fresh_process(f"{__name__}:prepare_inference", threads, **request)
