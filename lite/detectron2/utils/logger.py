"""Logging to the terminal and to one file per process, and log calls that repeat rarely."""

import copy
import logging
import sys
import time
from collections import Counter
from pathlib import Path

from tabulate import tabulate
from termcolor import colored

__all__ = ["create_small_table", "log_every_n", "log_every_n_seconds", "log_first_n", "setup_logger"]

_DATE_FORMAT = "%m/%d %H:%M:%S"
_ALARM_COLORS = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "magenta"}


class _TerminalFormatter(logging.Formatter):
    """Alarms begin with their level; time and origin are green, and ``alias`` stands for the root of the origin."""

    def __init__(self, root: str, alias: str):
        super().__init__()
        self._root, self._alias = f"{root}.", alias and f"{alias}."
        plain = colored("[%(asctime)s %(name)s]", "green") + " %(message)s"
        self._plain = logging.Formatter(plain, _DATE_FORMAT)
        self._alarms = {
            level: logging.Formatter(f"{colored('%(levelname)s', color, attrs=['bold'])} {plain}", _DATE_FORMAT)
            for level, color in _ALARM_COLORS.items()
        }

    def format(self, record: logging.LogRecord) -> str:
        shown = copy.copy(record)  # other handlers, such as the file's, get the full name
        if record.name.startswith(self._root):
            shown.name = self._alias + record.name[len(self._root) :]
        return self._alarms.get(record.levelno, self._plain).format(shown)


class _Terminal(logging.StreamHandler):
    """Writes to what ``sys.stdout`` is at that time: it can be redirected after the set-up."""

    stream = property(lambda self: sys.stdout, lambda self, stream: None)


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

    Calling it again changes the settings; no message is written twice to the same place.

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
    logger = logging.getLogger(name)
    logger.propagate = enable_propagation
    logger.setLevel(logging.DEBUG)
    lines = logging.Formatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s", _DATE_FORMAT)
    if configure_stdout and distributed_rank == 0:
        alias = {"detectron2": "d2"}.get(name, name) if abbrev_name is None else abbrev_name
        _route(logger, _Terminal(), _TerminalFormatter(name, alias) if color else lines)
    if output is not None:
        _route(logger, logging.FileHandler(_log_file(output, distributed_rank)), lines)
    return logger


def _route(logger: logging.Logger, handler: logging.Handler, formatter: logging.Formatter) -> None:
    """Add a handler, in the place of one that writes to the same file or to the terminal."""

    def target(one: logging.Handler):
        return getattr(one, "baseFilename", type(one))

    for former in [one for one in logger.handlers if target(one) == target(handler)]:
        logger.removeHandler(former)
        former.close()
    handler.setFormatter(formatter)
    logger.addHandler(handler)


def _log_file(output: str, rank: int) -> Path:
    path = Path(output)
    if path.suffix not in (".txt", ".log"):
        path /= "log.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f"{path.name}.rank{rank}") if rank else path


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
    centered = dict.fromkeys(("numalign", "stralign"), "center")
    return tabulate([small_dict], headers="keys", tablefmt="pipe", floatfmt=".3f", **centered)
