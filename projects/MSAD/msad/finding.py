"""What a check of a config, of data or of a checkpoint says."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Generator, Iterable
from typing import NamedTuple

logger = logging.getLogger(__name__)
OK, WARNING, ERROR = "ok", "warning", "error"


class Finding(NamedTuple):
    """``level`` is "ok", "warning" or "error"; ``check`` what was looked at; ``fix`` what to do, empty for "ok"."""

    level: str
    check: str
    text: str
    fix: str = ""

    def __str__(self) -> str:
        stop = "" if self.text[-1:] in ".?" else "."
        return f"{self.check}: {self.text}" + (f"{stop} Fix: {self.fix}" if self.fix else "")


def check(name: str) -> Callable[[Callable[..., Generator]], Callable[..., list[Finding]]]:
    """Decorator of a check that is written as a generator.

    The generator yields (level, text, fix), or a Finding with a name of its own, and returns the text of the "ok" that
    is reported if it yielded nothing; None: nothing is reported then.
    """

    def decorate(function: Callable[..., Generator]) -> Callable[..., list[Finding]]:
        @functools.wraps(function)
        def collect(*args, **kwargs) -> list[Finding]:
            found, generator = [], function(*args, **kwargs)
            while True:
                try:
                    item = next(generator)
                except StopIteration as stop:
                    return found or ([Finding(OK, name, stop.value)] if stop.value else [])
                found.append(item if isinstance(item, Finding) else Finding(item[0], name, *item[1:]))

        return collect

    return decorate


def error_text(error: BaseException, one_line: bool = True) -> str:
    """What an exception says; an OSError's first argument is its number, and the text of a KeyError is quoted."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return (" ".join(text.split()) if one_line else text) or type(error).__name__


def log_findings(findings: Iterable[Finding]) -> None:
    """Log findings: errors as such, warnings as warnings, the rest as information."""
    levels = {OK: logging.INFO, WARNING: logging.WARNING, ERROR: logging.ERROR}
    for finding in findings:
        logger.log(levels[finding.level], "Preflight, %s", finding)
