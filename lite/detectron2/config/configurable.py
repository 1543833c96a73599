"""Build an object either from explicit arguments or from a configuration."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from fvcore.common.config import CfgNode

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def configurable(init_func: Callable | None = None, *, from_config: Callable | None = None) -> Callable:
    """Let a class or function also accept a config node in place of its arguments.

    Two uses::

        class Head(nn.Module):
            @configurable
            def __init__(self, width, depth=4): ...

            @classmethod
            def from_config(cls, cfg):
                return {"width": cfg.HEAD.WIDTH}

        @configurable(from_config=lambda cfg: {"width": cfg.HEAD.WIDTH})
        def build_head(width, depth=4): ...

    ``Head(cfg)``, ``Head(cfg=cfg)`` and ``Head(cfg, depth=2)`` ask ``from_config`` for the arguments;
    ``Head(width=8)`` does not. A keyword that ``from_config`` has as a parameter goes there; any other one
    replaces what ``from_config`` returned.

    Raises:
        TypeError: the decorated thing, or its ``from_config``, is not of the form above.
        AttributeError: a class is called with a config but has no ``from_config``.
    """
    if init_func is None:
        if from_config is None:
            raise TypeError("configurable() needs from_config= when it decorates a function")
        _require_cfg_parameter(from_config, "from_config")
        return functools.partial(_wrap_function, from_config=from_config)
    if not inspect.isfunction(init_func) or init_func.__name__ != "__init__" or from_config is not None:
        raise TypeError("write @configurable on __init__, or @configurable(from_config=...) on a function")
    return _wrap_init(init_func)


def _wrap_init(init: Callable) -> Callable:
    @functools.wraps(init)
    def wrapper(self, *args, **kwargs):
        if _has_config(args, kwargs):
            args, kwargs = (), _explicit_arguments(_from_config_of(type(self)), args, kwargs)
        init(self, *args, **kwargs)

    return wrapper


def _wrap_function(func: Callable, *, from_config: Callable) -> Callable:
    @functools.wraps(func)
    def wrapper(*args, **kwargs):
        if _has_config(args, kwargs):
            args, kwargs = (), _explicit_arguments(from_config, args, kwargs)
        return func(*args, **kwargs)

    wrapper.from_config = from_config
    return wrapper


def _is_config(value: Any) -> bool:
    if isinstance(value, CfgNode):
        return True
    # omegaconf is no dependency; whoever passes one of its nodes has it imported
    return type(value).__module__.startswith("omegaconf.")


def _has_config(args: tuple, kwargs: dict) -> bool:
    return _is_config(args[0] if args else kwargs.get("cfg"))


def _from_config_of(cls: type) -> Callable:
    method = getattr(cls, "from_config", None)
    if method is None:
        raise AttributeError(f"{cls.__name__} was given a config but has no classmethod from_config")
    if not inspect.ismethod(method):
        raise TypeError(f"{cls.__name__}.from_config must be a classmethod")
    _require_cfg_parameter(method, f"{cls.__name__}.from_config")
    return method


def _require_cfg_parameter(func: Any, name: str) -> None:
    if not callable(func) or next(iter(inspect.signature(func).parameters), None) != "cfg":
        raise TypeError(f"{name} must be callable with 'cfg' as its first parameter")


def _explicit_arguments(from_config: Callable, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The keyword arguments for the decorated callable."""
    parameters = inspect.signature(from_config).parameters.values()
    if any(p.kind in _VARIADIC for p in parameters):
        return from_config(*args, **kwargs)
    understood = {p.name for p in parameters}
    passed_on = {k: v for k, v in kwargs.items() if k in understood}
    replaced = {k: v for k, v in kwargs.items() if k not in understood}
    return {**from_config(*args, **passed_on), **replaced}
