"""Logging to the terminal and to one file per process, and log calls that repeat rarely."""

import functools
import logging
import os
import sys
import time
from collections import Counter

from tabulate import tabulate
from termcolor import colored

from .file_io import PathManager

__all__ = ["create_small_table", "log_every_n", "log_every_n_seconds", "log_first_n", "setup_logger"]

_DATE_FORMAT = "%m/%d %H:%M:%S"


class _ColorFormatter(logging.Formatter):
    """Green origin, loud warnings and errors, and a short name for the root of the package."""

    def __init__(self, root: str, abbreviation: str):
        origin = colored("[%(asctime)s %(name)s]: ", "green")
        super().__init__(origin + "%(message)s", datefmt=_DATE_FORMAT)
        self._root = root
        self._abbreviation = abbreviation

    def _short(self, name: str) -> str:
        if not name.startswith(self._root + "."):
            return name
        below = name[len(self._root) + 1 :]
        return f"{self._abbreviation}.{below}" if self._abbreviation else below

    def formatMessage(self, record):
        own_name = record.name
        record.name = self._short(own_name)
        try:
            text = super().formatMessage(record)
        finally:
            record.name = own_name  # other handlers see the same record
        if record.levelno >= logging.ERROR:
            return colored(record.levelname, "red", attrs=["blink", "underline"]) + " " + text
        if record.levelno == logging.WARNING:
            return colored(record.levelname, "red", attrs=["blink"]) + " " + text
        return text


@functools.cache  # a second call with the same arguments must not double the handlers
def setup_logger(
    output: str | None = None,
    distributed_rank: int = 0,
    *,
    color: bool = True,
    name: str = "detectron2",
    abbrev_name: str | None = None,
    enable_propagation: bool = False,
    configure_stdout: bool = True,
) -> logging.Logger:
    """Configure the logger ``name``: everything from DEBUG up, to the terminal (rank 0) and to a file.

    Args:
        output: a file that ends in .txt or .log, or a folder that gets ``log.txt``; None writes no file. Ranks
            above 0 append ``.rank<N>`` to the file name.
        distributed_rank: rank of this process.
        color: color the terminal's lines.
        name: the logger to configure.
        abbrev_name: stands for ``name`` in the terminal; an empty string drops it. Default: "d2" for detectron2.
        enable_propagation: pass messages on to the parent logger as well.
        configure_stdout: whether to log to the terminal.
    """
    if abbrev_name is None:
        abbrev_name = {"detectron2": "d2"}.get(name, name)
    plain = logging.Formatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s", datefmt=_DATE_FORMAT)
    logger = logging.getLogger(name)
    logger.propagate = enable_propagation
    logger.setLevel(logging.DEBUG)
    if configure_stdout and distributed_rank == 0:
        _add_handler(logger, sys.stdout, _ColorFormatter(name, abbrev_name) if color else plain)
    if output is not None:
        _add_handler(logger, _open_log(_log_filename(os.fspath(output), distributed_rank)), plain)
    return logger


def _add_handler(logger: logging.Logger, stream, formatter: logging.Formatter) -> None:
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logger.addHandler(handler)


def _log_filename(output: str, rank: int) -> str:
    filename = output if output.endswith((".txt", ".log")) else os.path.join(output, "log.txt")
    return f"{filename}.rank{rank}" if rank > 0 else filename


@functools.cache  # several loggers may write to one file, through one stream
def _open_log(filename: str):
    folder = os.path.dirname(filename)
    if folder:
        PathManager.mkdirs(folder)
    return PathManager.open(filename, "a")


def _caller() -> tuple[str, tuple]:
    """Module name and call site of the first frame outside this file."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__:
        frame = frame.f_back
    module = frame.f_globals.get("__name__", "__main__")
    if module == "__main__":
        module = "detectron2"  # a script's own name has no handlers
    return module, (frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)


_seen: Counter = Counter()
_last_time: dict[tuple, float] = {}


def log_first_n(lvl: int, msg: str, n: int = 1, *, name: str | None = None, key: str | tuple = "caller") -> None:
    """Log only the first ``n`` times.

    Args:
        lvl: level, such as ``logging.WARNING``.
        msg: the text.
        n: how often.
        name: logger; default: the caller's module.
        key: what counts as the same: "caller" (the line of code), "message", or a tuple of both.
    """
    module, site = _caller()
    parts = (key,) if isinstance(key, str) else key
    identity = (("caller", site) if "caller" in parts else ()) + (("message", msg) if "message" in parts else ())
    if not identity or set(parts) - {"caller", "message"}:
        raise ValueError(f"key must be 'caller', 'message' or both, got {key!r}")
    _seen[identity] += 1
    if _seen[identity] <= n:
        logging.getLogger(name or module).log(lvl, msg)


def log_every_n(lvl: int, msg: str, n: int = 1, *, name: str | None = None) -> None:
    """Log the first of every ``n`` calls from the same line of code."""
    module, site = _caller()
    identity = ("every", site)
    _seen[identity] += 1
    if n == 1 or _seen[identity] % n == 1:
        logging.getLogger(name or module).log(lvl, msg)


def log_every_n_seconds(lvl: int, msg: str, n: float = 1, *, name: str | None = None) -> None:
    """Log at most once in ``n`` seconds from the same line of code."""
    module, site = _caller()
    now = time.time()
    if now - _last_time.get(site, float("-inf")) >= n:
        logging.getLogger(name or module).log(lvl, msg)
        _last_time[site] = now


def create_small_table(small_dict: dict) -> str:
    """A table with one row: keys as the header, values (floats with three decimals) below."""
    columns = {name: [value] for name, value in small_dict.items()}
    layout = {"tablefmt": "pipe", "floatfmt": ".3f", "stralign": "center", "numalign": "center"}
    return tabulate(columns, headers="keys", **layout)
