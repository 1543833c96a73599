"""A device that is not the CPU, on any machine: finds tensors that would meet across devices on a GPU.

Inside :func:`other_device`, what lies on ``OTHER`` ("meta") is a :class:`Tensor`. It computes on the CPU, to the last
digit as there, but refuses what a GPU refuses: operations with tensors of the CPU's memory, and NumPy. As on a GPU,
indices and tensors without dimensions may be the CPU's. Streams, kernels, float16 and traced graphs are not those of a
GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

OTHER = "meta"
_COPIES = {"copy_", "_to_copy"}
_INDEXED = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
_READ = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2"}  # the CPU waits for these
_waits: list[str] = []


class Tensor(torch.Tensor):
    """Lies on ``OTHER``; ``inner`` has its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Tensor:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, device=OTHER, **layout)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"{OTHER}: {self.inner!r}"

    def tolist(self) -> list:
        _waits.append("tolist")
        return self.inner.tolist()

    def numpy(self, **_):
        raise TypeError(f"{OTHER}: NumPy reads the CPU's memory alone")

    __array__ = numpy

    def __reduce_ex__(self, protocol: int):
        return self.inner.__reduce_ex__(protocol)  # what is saved and loaded lies on the CPU

    def __deepcopy__(self, memo: dict) -> Tensor:
        copied = Tensor(self.inner.clone())
        return torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied


def _name(func) -> str:
    return func._schema.name.partition("::")[2]


def _refuse_mixtures(func, args: tuple, kwargs: dict) -> None:
    for x in tree_leaves((args, kwargs)):
        if isinstance(x, torch.Tensor) and not isinstance(x, Tensor) and x.device.type == OTHER:
            raise AssertionError(f"{func}: {x} was made without values; {__name__} has to learn how")
    if _name(func) in _COPIES:
        return
    if _name(func) in _INDEXED and isinstance(args[0], Tensor):
        args = (args[0], *args[2:])
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = [tuple(x.shape) for x in tensors if isinstance(x, Tensor)]
    here = [tuple(x.shape) for x in tensors if not isinstance(x, Tensor) and x.dim()]
    if there and here:
        raise RuntimeError(f"{func}: tensors of {OTHER}, {there}, and of the CPU, {here}")


def _compute(func, args: tuple, kwargs: dict):
    _refuse_mixtures(func, args, kwargs)
    outer = {id(x.inner): x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
    device = kwargs.get("device")
    if _name(func) == "copy_":
        there = isinstance(args[0], Tensor)
    else:
        there = bool(outer) if device is None else torch.device(device).type == OTHER
    masked = _name(func) in _INDEXED and any(x is not None and x.dtype == torch.bool for x in args[1])
    if outer and (_name(func) in _READ or masked or (_name(func) in _COPIES and not there)):
        _waits.append(_name(func))
    if device is not None:
        kwargs = {**kwargs, "device": "cpu"}
    args, kwargs = tree_map(lambda x: x.inner if isinstance(x, Tensor) else x, (args, kwargs))
    out = func(*args, **kwargs)

    if not there:
        return out
    return tree_map(lambda x: outer[id(x)] if id(x) in outer else Tensor(x) if isinstance(x, torch.Tensor) else x, out)


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})


class _NewTensors(TorchFunctionMode):
    """torch makes tensors of Python's numbers without an operation."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.unsqueeze_ and isinstance(args[0], Tensor):
            func = torch.Tensor.unsqueeze  # a Tensor's shape stays what it is
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], Tensor):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(i) if isinstance(i, list) else i for i in index)
            args = (args[0], index, *args[2:])
        if func is torch.Tensor.new_tensor and isinstance(args[0], Tensor):
            func, args, kwargs = torch.tensor, args[1:], {"dtype": args[0].dtype, "device": OTHER, **kwargs}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == OTHER:
            del kwargs["device"]
            return func(*args, **kwargs).to(OTHER)
        return func(*args, **kwargs)


class _Autocast(torch.autocast):
    def __init__(self, device_type: str, *args, **kwargs) -> None:
        super().__init__("cpu" if device_type == OTHER else device_type, *args, **kwargs)


@contextlib.contextmanager
def other_device() -> Iterator[list[str]]:
    """Makes "meta" a device like another; ``torch.autocast`` does on it what it does on the CPU.

    Yields:
        Names of the operations for which the CPU has to wait for the device, a list that grows.
    """
    plain = torch.autocast
    _waits.clear()
    torch.autocast = torch.amp.autocast = _Autocast
    try:
        with _NewTensors(), _Operations():
            yield _waits
    finally:
        torch.autocast = torch.amp.autocast = plain
