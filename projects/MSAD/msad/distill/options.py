"""Options of entries of DISTILL.LOSSES, ASSISTANTS and TEACHERS: known names, values of the kind of their default."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Mapping
from typing import Any

from ..config import nearest

_KINDS = {
    bool: "True or False, without quotation marks", int: "a whole number", float: "a number", str: "a text",
    tuple: "a list",
}  # fmt: skip
NOT_NEGATIVE = ("weight", "base_lr", "weight_decay")


def own_options(cls: type, injected: Collection[str]) -> dict[str, Any]:
    """Options of a registered class by name with their defaults: its constructor's parameters that are not injected."""
    parameters = inspect.signature(cls.__init__).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name not in injected}


def check_options(
    where: str,
    options: Mapping[str, Any],
    defaults: Mapping[str, Any],
    positive: Collection[str] = (),
    not_negative: Collection[str] = (),
) -> dict[str, Any]:
    """``options`` (lower-case keys) of the kind of their defaults; yaml reads 1e-3 as a text and lists for tuples.

    Args:
        where: the entry, as "DISTILL.LOSSES: FitNet".
        options: of the entry.
        defaults: of all that there are. One without a default, or None, may be anything; of an empty tuple the elements
            may, and of another one they are of the kind of its first.
        positive: names of those that must be above 0.
        not_negative: of those that must not be below 0, beside WEIGHT, BASE_LR and WEIGHT_DECAY.

    Raises:
        ValueError: an unknown option, or a value of another kind than its default; names entry and option.
    """
    checked, valid = {}, [name.upper() for name in defaults]
    for key, value in options.items():
        if key not in defaults:
            hint = nearest(key.upper(), valid)
            raise ValueError(f"{where} has no option {key.upper()}{hint} (options: {', '.join(valid)})")
        found, wanted = _as_kind_of(defaults[key], value)
        numbers = found if isinstance(found, tuple) else (found,)
        if not wanted and key in positive and not all(number > 0 for number in numbers):
            wanted = "above 0"
        if not wanted and (key in NOT_NEGATIVE or key in not_negative) and found < 0:
            wanted = "at least 0"
        if wanted:
            raise ValueError(f"{where}: {key.upper()} must be {wanted}, not {value!r}")
        checked[key] = found
    return checked


def _as_kind_of(default: Any, value: Any) -> tuple[Any, str]:
    """(``value`` as what its default is, "") or (as it is, what it should be)."""
    kind = type(default)
    if kind is float:
        number = _number(value)
        return (value, _KINDS[float]) if number is None else (number, "")
    if kind is tuple and isinstance(value, (list, tuple)):
        parts = [_as_kind_of(default[0], part) for part in value] if default else [(part, "") for part in value]
        wrong = next((wanted for _, wanted in parts if wanted), "")
        if default and (wrong or not parts):
            return value, f"a list, each of it {wrong or _KINDS[type(default[0])]}"
        return tuple(part for part, _ in parts), ""
    fits = kind not in _KINDS or (isinstance(value, kind) and (kind is bool or not isinstance(value, bool)))
    return value, "" if fits else _KINDS[kind]


def _number(value: Any) -> float | None:
    """``value`` as a finite number, None if it is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and not isinstance(value, bool) else None
