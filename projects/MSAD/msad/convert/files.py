"""Read mmdetection's checkpoint files without running what they may contain, and what they say of their model."""

from __future__ import annotations

import os
import pickle
import types
from typing import Any, NamedTuple

import torch

# Prefixes under which files hold the one detector that counts: data-parallel wrappers, and the students of
# distillation tool boxes.
PREFIXES = ("module.", "student.", "architecture.")


class Checkpoint(NamedTuple):
    """What a file holds.

    Attributes:
        tensors: by mmdetection's names, without wrappers' prefixes.
        left_out: names of tensors that are not the detector's, such as a distillation's teacher.
        classes: names of the classes, if the file has them.
        config: text of the training config, "" if the file has none.
        prefix: that was asked for, "" if none was.
    """

    tensors: dict[str, torch.Tensor]
    left_out: list[str]
    classes: list[str]
    config: str
    prefix: str = ""


class _Inert:
    """Stands for an object of a class that is not plain data; keeps nothing and does nothing."""

    def __init__(self, *args, **kwargs) -> None:
        pass

    def __setstate__(self, state) -> None:
        pass

    def __call__(self, *args, **kwargs) -> _Inert:
        return self

    def append(self, item) -> None:
        pass

    def add(self, item) -> None:
        pass

    def __setitem__(self, key, value) -> None:
        pass


_KNOWN = {
    ("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"),
    ("torch", "FloatStorage"), ("torch", "HalfStorage"), ("torch", "LongStorage"), ("torch", "DoubleStorage"),
    ("torch", "IntStorage"), ("torch", "BoolStorage"), ("torch", "ByteStorage"), ("torch", "BFloat16Storage"),
    ("torch.storage", "UntypedStorage"), ("torch.serialization", "_get_layout"),
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(module, name) if (module, name) in _KNOWN else _Inert


# What torch.load asks of a pickle module.
_PICKLE = types.ModuleType("inert_pickle")
_PICKLE.Unpickler = _Unpickler
_PICKLE.load = lambda file, **kwargs: _Unpickler(file, **kwargs).load()


def read_checkpoint(path: str, prefix: str | None = None) -> Checkpoint:
    """Read a checkpoint of mmdetection 2.x or 3.x, or of a distillation built on it.

    Objects of unknown classes, which users' own files hold beside the weights, are replaced by inert ones.

    Args:
        prefix: of the detector's tensors; None: the first of PREFIXES that occurs, again and again.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, has no tensors of a detector, or none with ``prefix``.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_PICKLE)
    except Exception as error:  # damaged files raise all kinds
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error
    state = content
    if isinstance(content, dict):
        # Beside an "ema_state_dict", mmengine's "state_dict" has the averaged weights and that one the others.
        named = [key for key in ("state_dict", "ema_state_dict", "model") if isinstance(content.get(key), dict)]
        state = content[named[0]] if named else content
    if not isinstance(state, dict) or not any(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} has no tensors under 'state_dict'")
    tensors = {name: value.detach() for name, value in state.items() if isinstance(value, torch.Tensor)}
    meta = content.get("meta") if isinstance(content, dict) else None
    meta = meta if isinstance(meta, dict) else {}
    inner, left_out = _without_prefix(tensors, prefix)
    if not inner:
        raise ValueError(f"{path} has no tensors that begin with {prefix!r}, but e.g. {next(iter(tensors))}")
    return Checkpoint(inner, left_out, _classes(meta), _config(meta), prefix or "")


def _without_prefix(tensors: dict, prefix: str | None) -> tuple[dict, list[str]]:
    if prefix is not None:
        kept = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        return kept, [name for name in tensors if not name.startswith(prefix)]
    left_out: list[str] = []
    while True:
        found = next((p for p in PREFIXES if any(name.startswith(p) for name in tensors)), None)
        if found is None:
            return tensors, left_out
        left_out += [name for name in tensors if not name.startswith(found)]
        tensors = {name.removeprefix(found): value for name, value in tensors.items() if name.startswith(found)}


def _classes(meta: dict) -> list[str]:
    told = meta.get("CLASSES")
    if told is None:
        of_data = meta.get("dataset_meta")
        told = (of_data.get("classes") or of_data.get("CLASSES")) if isinstance(of_data, dict) else None
    return [told] if isinstance(told, str) else list(told or [])


def _config(meta: dict) -> str:
    return next((meta[key] for key in ("config", "cfg") if isinstance(meta.get(key), str)), "")
