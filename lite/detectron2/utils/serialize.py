"""Send what plain pickle cannot handle to another process."""

import pickle
from typing import Any


class PicklableWrapper:
    """Wraps a callable or object so that it survives pickling, lambdas and local functions included.

    The wrapper calls and reads through to the wrapped object; unpickling gives that object itself. Lambdas and the
    like need the optional package ``cloudpickle``.
    """

    def __init__(self, obj: Any):
        self._obj = obj._obj if isinstance(obj, PicklableWrapper) else obj

    def __reduce__(self):
        try:
            payload = pickle.dumps(self._obj)
        except Exception as error:  # pickle raises all kinds
            payload = _cloudpickle(self._obj, error)
        return pickle.loads, (payload,)

    def __call__(self, *args, **kwargs):
        return self._obj(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "_obj":  # asked for before __init__ has set it
            raise AttributeError(name)
        return getattr(self._obj, name)


def _cloudpickle(obj: Any, cause: Exception) -> bytes:
    try:
        import cloudpickle
    except ImportError:
        raise TypeError(
            f"cannot pickle {obj!r}: make it a module-level function or install the package cloudpickle"
        ) from cause
    return cloudpickle.dumps(obj)
