"""A table of the versions and devices in use, for bug reports and the head of a log file."""

import importlib
import importlib.metadata
import os
import platform
import sys

import numpy as np
import torch
from tabulate import tabulate

import detectron2

__all__ = ["collect_env_info"]


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _engine() -> list[tuple[str, str]]:
    folder = os.path.dirname(detectron2.__file__)
    return [
        ("engine", "detectron2-lite (independent implementation, not detectron2 itself)"),
        ("detectron2 API", f"{detectron2.__version__} @ {folder}"),
    ]


def _gpus() -> list[tuple[str, str]]:
    if not torch.cuda.is_available():
        return [("GPU", "none available")]
    indices_of: dict[str, list[str]] = {}
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        label = f"{torch.cuda.get_device_name(index)} (arch {major}.{minor})"
        indices_of.setdefault(label, []).append(str(index))
    rows = [("GPU " + ",".join(indices), label) for label, indices in indices_of.items()]
    rows.append(("CUDA of torch", str(torch.version.cuda)))
    rows.append(("cuDNN", str(torch.backends.cudnn.version())))
    return rows


def _environment() -> list[tuple[str, str]]:
    prefixes = ("DETECTRON2_", "CUDA_", "NCCL_", "OMP_NUM_", "TORCH_")
    return [(name, value) for name, value in sorted(os.environ.items()) if name.startswith(prefixes)]


def collect_env_info() -> str:
    """The table as text."""
    rows = [
        ("platform", platform.platform()),
        ("Python", sys.version.replace("\n", "")),
        *_engine(),
        ("PyTorch", f"{torch.__version__} @ {os.path.dirname(torch.__file__)}"),
        ("numpy", np.__version__),
    ]
    for distribution in ("torchvision", "fvcore", "iopath", "pycocotools", "Pillow"):
        rows.append((distribution, _version(distribution)))
    rows.append(("OpenCV", _opencv()))
    return tabulate(rows + _gpus() + _environment()) + "\n"


def _opencv() -> str:
    try:
        return importlib.import_module("cv2").__version__  # several distributions provide it
    except ImportError as error:
        return f"cannot be imported: {error}"


if __name__ == "__main__":
    print(collect_env_info())
