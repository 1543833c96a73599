"""Read pickle and torch files without running code that they may contain."""

import collections
import io
import pickle
from typing import Any

import numpy as np
import torch

try:
    from numpy._core import multiarray
except ImportError:  # numpy 1
    from numpy.core import multiarray

# Module names of both numpy 1 and 2 occur, whichever is installed here.
_NUMPY_INTERNALS = {"numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric"}
_DATA_ONLY = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
}


def _storage_from_bytes(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _text_as_bytes(text: str, encoding: str = "utf-8") -> bytes:
    return text.encode(encoding)


class _DataUnpickler(pickle.Unpickler):
    """Knows containers, numpy arrays and CPU tensors, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module in _NUMPY_INTERNALS and name in ("_reconstruct", "scalar"):
            return getattr(multiarray, name)
        if module in _NUMPY_INTERNALS and name == "_frombuffer":
            return _array_from_buffer
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _storage_from_bytes
        if (module, name) == ("_codecs", "encode"):
            return _text_as_bytes
        try:
            return _DATA_ONLY[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it contains {module}.{name}, which is not plain data") from None


def _array_from_buffer(buffer, dtype, shape, order) -> np.ndarray:
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order)


def load_pickle(filename: str) -> Any:
    """The content of a pickle file of containers, numbers, strings, numpy arrays and tensors.

    Raises:
        ValueError: the file is damaged or holds anything else.
    """
    with open(filename, "rb") as file:
        try:
            # latin1: the numpy arrays of files written by Python 2
            return _DataUnpickler(file, encoding="latin1").load()
        except Exception as error:  # damaged files raise all kinds
            raise ValueError(f"{filename} cannot be read as a pickle file of weights: {error}") from error


def load_torch(filename: str) -> Any:
    """The content of a file of ``torch.save``, tensors on the CPU.

    Raises:
        ValueError: the file is damaged, or holds objects other than containers, numbers, strings, numpy arrays
            and tensors.
    """
    dtypes = {type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}  # training state may hold numpy's numbers
    torch.serialization.add_safe_globals([multiarray._reconstruct, multiarray.scalar, np.ndarray, np.dtype, *dtypes])
    try:
        return torch.load(filename, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = _first_sentence(error)
        raise ValueError(
            f"{filename} is damaged or holds more than plain data ({reason}). If you trust it, read it with "
            f"torch.load(..., weights_only=False) and save only its weights: torch.save({{'model': ...}}, ...)."
        ) from error
    except (RuntimeError, EOFError, IndexError, KeyError, ValueError) as error:
        raise ValueError(f"{filename} is no readable checkpoint, it may be damaged: {error}") from error


def _first_sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line]
    return (lines or [str(error).strip().split("\n")[0]])[0][:200]
