"""Files that are whole or absent, whatever interrupts the writing, JSON, what lies below a folder, and checkpoints."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

FINAL = "model_final.pth"  # what detectron2 calls the last checkpoint of a training


@contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb", shared: bool = False) -> Iterator[IO]:
    """Write a local file under a temporary name that becomes ``path`` at the end; nothing is left if the block raises.

    Args:
        shared: several processes may write the file; the last to end counts. Else what a killed process left of it is
            overwritten by the next.
    """
    temporary = f"{os.fspath(path)}{f'.{os.getpid()}' if shared else ''}.tmp"
    try:
        with open(temporary, mode) as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def files_below(folder: str | os.PathLike, above: frozenset[str] = frozenset()) -> Iterator[str]:
    """Paths of all files in a folder and those inside it, also behind links; names that begin with a dot are hidden.

    Args:
        above: real paths of the folders around it: a link back to one of them is not followed.
    """
    above |= {os.path.realpath(folder)}
    with os.scandir(folder) as found:
        entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in entries:
        if not entry.is_dir():
            yield entry.path
        elif os.path.realpath(entry.path) not in above:
            yield from files_below(entry.path, above)


def finite(value: float) -> float | None:
    """A number for JSON, which has neither NaN nor infinity: None."""
    return float(value) if math.isfinite(value) else None


def read_json(file: str | os.PathLike) -> Any:
    """Content of a file, or None if it is not there."""
    if not os.path.isfile(file):
        return None
    with open(file, encoding="utf-8") as stream:
        return json.load(stream)


def read_whole_json(file: str | os.PathLike) -> Any:
    """:func:`read_json`, but None also if the file is cut off."""
    with suppress(ValueError):
        return read_json(file)
    return None


def write_json(file: str | os.PathLike, content: Any, indent: int | None = 1, shared: bool = False) -> None:
    """Write JSON as :func:`atomic_write` does, what is not :func:`finite` as null.

    Args:
        indent: None: all in a line.
        shared: see :func:`atomic_write`.
    """
    try:
        text = json.dumps(content, indent=indent, allow_nan=False)
    except ValueError:
        text = json.dumps(_without_nan(content), indent=indent)
    with atomic_write(file, "w", shared) as stream:
        stream.write(text + "\n")


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return finite(content) if isinstance(content, float) else content


def prepare_folder(file: str | os.PathLike) -> None:
    """Make the folder of a file that is written when all work is done.

    Raises:
        OSError: now and not then, if the file cannot be written: ``file`` is a folder, or its folder cannot be made or
            written to.
    """
    folder = os.path.dirname(os.path.abspath(file))
    os.makedirs(folder, exist_ok=True)
    if os.path.isdir(file):
        raise IsADirectoryError(f"{os.fspath(file)} is a folder, and is to be a file")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"nothing can be written to {folder}")


def local_file(checkpoint: str | os.PathLike) -> str:
    """The file that a checkpoint is read from, without a query ("?matching_heuristics=True"); "" of an address."""
    path = os.fspath(checkpoint)
    return "" if "://" in path else path.partition("?")[0]


def require_checkpoint(path: str | os.PathLike) -> None:
    """FileNotFoundError if a checkpoint that is no address is not there."""
    if (file := local_file(path)) and not os.path.isfile(file):
        raise FileNotFoundError(f"no checkpoint {path}")
