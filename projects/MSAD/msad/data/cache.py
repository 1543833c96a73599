"""Small files that checks of data keep for the next time, in the user's folder for such things."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from detectron2.utils.file_io import PathManager

from ..files import local_file, write_json


def cache_file(name: str) -> Path:
    """The path of a file in ``$XDG_CACHE_HOME/msad`` (default: ``~/.cache/msad``); the folder is made."""
    folder = Path(os.getenv("XDG_CACHE_HOME") or Path.home() / ".cache") / "msad"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(folder)
    except OSError:  # a home that is not there or not ours
        folder = Path(tempfile.gettempdir()) / f"msad-{os.getuid()}"
        folder.mkdir(exist_ok=True)
    return folder / name


def read_cache(name: str) -> Any:
    """What :func:`write_cache` wrote, or None."""
    try:
        return json.loads(cache_file(name).read_text())
    except (OSError, ValueError):
        return None


def write_cache(name: str, content: Any) -> Path:
    """Write JSON."""
    path = cache_file(name)
    write_json(path, content, indent=None, shared=True)
    return path


def file_sha256(path: str | os.PathLike) -> str:
    """sha256 of a file as hexadecimal digits; remembered as long as its size and time of change stay."""
    path = PathManager.get_local_path(os.fspath(path))
    status = os.stat(path)
    return _sha256(path, status.st_size, status.st_mtime_ns)


def checkpoint_id(path: str | os.PathLike) -> str:
    """By what a checkpoint is recognised: the sha256 of its file and its query; an absent one's path, an address."""
    path, file = os.fspath(path), local_file(path)
    return file_sha256(file) + path[len(file) :] if os.path.isfile(file) else path


@functools.lru_cache(maxsize=256)
def _sha256(path: str, size: int, mtime_ns: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()
