"""Checkpoints of detectors, and the file formats of pretrained models."""

import os
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import torch
from fvcore.common.checkpoint import Checkpointer
from torch import nn

from detectron2.utils import comm
from detectron2.utils.file_io import PathManager, atomic_write

from .c2_model_loading import align_and_update_state_dicts
from .safe_files import load_pickle, load_torch

# Buffers that the configuration sets; published checkpoints may lack them.
_FROM_CONFIG = ("pixel_mean", "pixel_std")
# Buffers that older checkpoints have and models now compute.
_COMPUTED = "anchor_generator.cell_anchors"


class DetectionCheckpointer(Checkpointer):
    """Saves checkpoints atomically and loads the formats in which detectors and backbones are published.

    * ``.pth``: what :meth:`save` writes, or a bare state dict.
    * ``.pkl`` with "model": models of detectron2's zoo and converted backbones.
    * ``.pkl`` without: Caffe2's ImageNet models, whose names are translated.
    * ``.pyth`` with "model_state": models of pycls.

    A file with a true "matching_heuristics", a Caffe2 or pycls file, or a path that ends in
    "?matching_heuristics=True" is matched by the ends of names, see :func:`align_and_update_state_dicts`.

    Args:
        model: the model, bare or wrapped for data-parallel training.
        save_dir: folder to save in and resume from.
        save_to_disk: default: only in the main process.
        checkpointables: objects with ``state_dict()`` and ``load_state_dict()``, saved and resumed as well.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", *, save_to_disk: bool | None = None, **checkpointables):
        if save_to_disk is None:
            save_to_disk = comm.is_main_process()
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.path_manager = PathManager
        self._match_endings = False
        self._source = ""

    def save(self, name: str, **kwargs) -> None:
        """Write ``<save_dir>/<name>.pth`` and note it as the last checkpoint.

        Args:
            name: file name without extension.
            kwargs: more data to store.
        """
        if not (self.save_dir and self.save_to_disk):
            return
        state = {"model": self.model.state_dict()}
        state.update((key, part.state_dict()) for key, part in self.checkpointables.items())
        state.update(kwargs)
        filename = name + ".pth"
        if os.path.basename(filename) != filename:
            raise ValueError(f"the name of a checkpoint is no path: {name!r}")
        self.path_manager.mkdirs(self.save_dir)
        target = self.path_manager.get_local_path(os.path.join(self.save_dir, filename))
        self.logger.info("Saving checkpoint to %s", target)
        with atomic_write(target) as file:
            torch.save(state, file)
        self.tag_last_checkpoint(filename)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Note which checkpoint :meth:`resume_or_load` resumes from."""
        note = self.path_manager.get_local_path(os.path.join(self.save_dir, "last_checkpoint"))
        with atomic_write(note, "w") as file:
            file.write(last_filename_basename)

    def load(self, path: str, *args, **kwargs) -> dict[str, Any]:
        """Load a checkpoint and report what did not fit.

        Args:
            path: a file or an address; empty or None loads nothing.
            args, kwargs: see ``fvcore.common.checkpoint.Checkpointer.load``.

        Returns:
            what else the file contains.

        Raises:
            FileNotFoundError, AssertionError: there is no such file.
            ValueError: the file is damaged, is no checkpoint, or the path has an unknown query.
        """
        self._source, self._match_endings = _split_query(path or "")
        return super().load(self._source, *args, **kwargs)

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".pkl"):
            checkpoint = _with_model(load_pickle(filename), bare=_from_caffe2)
        elif filename.endswith(".pyth"):
            checkpoint = _from_pycls(load_torch(filename), filename)
        else:
            checkpoint = _with_model(load_torch(filename), bare=lambda weights: {"model": weights})
        _require_tensors(checkpoint["model"], filename)
        return {**checkpoint, "matching_heuristics": True} if self._match_endings else checkpoint

    def _load_model(self, checkpoint: dict[str, Any]):
        self._convert_ndarray_to_tensor(checkpoint["model"])
        if checkpoint.get("matching_heuristics"):
            checkpoint["model"] = align_and_update_state_dicts(
                self.model.state_dict(), checkpoint["model"], c2_conversion=checkpoint.get("__author__") == "Caffe2"
            )
        offered = len(checkpoint["model"])
        misfits = super()._load_model(checkpoint)
        self._report(offered - len(misfits.unexpected_keys) - len(misfits.incorrect_shapes), offered)
        return misfits._replace(
            missing_keys=[name for name in misfits.missing_keys if name not in _FROM_CONFIG],
            unexpected_keys=[name for name in misfits.unexpected_keys if _COMPUTED not in name],
        )

    def _report(self, loaded: int, offered: int) -> None:
        if loaded:
            self.logger.info("Loaded %d of the %d tensors of %s", loaded, offered, self._source)
        else:
            self.logger.error(
                "NOTHING was loaded: none of the %d tensors of %s has a name and shape of this %s",
                offered,
                self._source,
                type(self.model).__name__,
            )


def _split_query(path: str) -> tuple[str, bool]:
    """The path without its query, and whether that asks for matching by endings."""
    address, _, query = path.partition("?")
    asked = dict(parse_qsl(query))
    by_endings = asked.pop("matching_heuristics", None) == "True"
    if asked:
        raise ValueError(f"{path}: the only query known here is matching_heuristics=True")
    return address, by_endings


def _with_model(content: Any, bare: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """A file's content if it has its weights under "model", else what ``bare`` makes of it."""
    return content if isinstance(content, dict) and "model" in content else bare(content)


def _from_caffe2(content: Any) -> dict[str, Any]:
    blobs = content.get("blobs", content) if isinstance(content, dict) else content
    if isinstance(blobs, dict):
        blobs = {name: blob for name, blob in blobs.items() if not str(name).endswith("_momentum")}
    return {"model": blobs, "__author__": "Caffe2", "matching_heuristics": True}


def _from_pycls(content: Any, filename: str) -> dict[str, Any]:
    if not isinstance(content, dict) or not isinstance(content.get("model_state"), dict):
        raise ValueError(f"{filename} is no checkpoint of pycls, which has its weights under 'model_state'")
    # Counters of batches, which detectron2's norms do not have.
    weights = {k: v for k, v in content["model_state"].items() if not k.endswith("num_batches_tracked")}
    return {"model": weights, "__author__": "pycls", "matching_heuristics": True}


def _require_tensors(weights: Any, filename: str) -> None:
    if not isinstance(weights, dict):
        raise ValueError(f"{filename} is no checkpoint: there is a {type(weights).__name__} in place of its weights")
    for name, value in weights.items():
        if not isinstance(value, (torch.Tensor, np.ndarray)):
            raise ValueError(f"{filename} is no checkpoint: its {name!r} is a {type(value).__name__}, not a tensor")
