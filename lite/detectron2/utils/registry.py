"""Registries of named objects, and import by dotted name."""

import importlib
from typing import Any

from fvcore.common.registry import Registry

__all__ = ["Registry", "locate"]


def locate(name: str) -> Any:
    """The object with the dotted name ``name``, such as ``"torch.nn.Conv2d"`` or ``"pkg.mod.Class.method"``.

    Raises:
        ImportError: there is no such module or attribute.
    """
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts):
        raise ImportError(f"{name!r} is not a dotted Python name")
    for split in range(len(parts), 0, -1):
        module_name = ".".join(parts[:split])
        try:
            found = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            # a module that exists but lacks one of its own dependencies must not look like a wrong name
            if error.name is None or not (module_name + ".").startswith(error.name + "."):
                raise
            continue
        try:
            for attribute in parts[split:]:
                found = getattr(found, attribute)
        except AttributeError as error:
            raise ImportError(f"cannot locate {name!r}: {error}") from error
        return found
    raise ImportError(f"cannot locate {name!r}: no module named {parts[0]!r}")
