"""Checkpoints of detectors, and the file formats of pretrained models."""

import os
from typing import Any
from urllib.parse import parse_qs, urlparse

import torch
from fvcore.common.checkpoint import Checkpointer
from torch import nn

from detectron2.utils import comm
from detectron2.utils.file_io import PathManager, atomic_write

from .c2_model_loading import align_and_update_state_dicts
from .safe_files import load_pickle, load_torch

# Buffers that old files lack and that follow from the configuration.
_NEVER_MISSED = {"pixel_mean", "pixel_std"}


class DetectionCheckpointer(Checkpointer):
    """Saves checkpoints atomically and loads the formats in which detectors and backbones are published.

    * ``.pth``: what :meth:`save` writes, or a bare state dict.
    * ``.pkl`` with "model" and "__author__": models of detectron2's zoo and converted backbones.
    * ``.pkl`` without: Caffe2's ImageNet models, whose names are translated.

    A file with a true "matching_heuristics", a Caffe2 file, or a path that ends in "?matching_heuristics=True"
    is matched by the ends of names, see :func:`align_and_update_state_dicts`.

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
        self._match_endings = False
        self._source = path
        query = parse_qs(urlparse(path).query) if path else {}
        if "matching_heuristics" in query:
            self._match_endings = query.pop("matching_heuristics") == ["True"]
            path = path[: path.rindex("?")]
            if query:
                raise ValueError(f"{self._source}: only matching_heuristics can be asked for, not {sorted(query)}")
        return super().load(path, *args, **kwargs)

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".pkl"):
            content = _unpack_pkl(load_pickle(filename), filename)
        else:
            content = _unpack_torch(load_torch(filename), filename)
        _check_tensors(content["model"], filename)
        if "__author__" in content:
            self.logger.info("The weights in %s come from %s.", filename, content["__author__"])
        if self._match_endings:
            content["matching_heuristics"] = True
        return content

    def _load_model(self, checkpoint: dict[str, Any]):
        if checkpoint.get("matching_heuristics", False):
            self._convert_ndarray_to_tensor(checkpoint["model"])
            from_caffe2 = checkpoint.get("__author__") == "Caffe2"
            checkpoint["model"] = align_and_update_state_dicts(
                self.model.state_dict(), checkpoint["model"], c2_conversion=from_caffe2
            )
        offered = len(checkpoint["model"])
        incompatible = super()._load_model(checkpoint)
        loaded = offered - len(incompatible.unexpected_keys) - len(incompatible.incorrect_shapes)
        self._report(loaded, offered)

        _drop(incompatible.missing_keys, lambda key: key in _NEVER_MISSED)
        # anchors are no parameters, yet some files have them
        _drop(incompatible.unexpected_keys, lambda key: "anchor_generator.cell_anchors" in key)
        return incompatible

    def _report(self, loaded: int, offered: int) -> None:
        if loaded == 0:
            self.logger.error(
                "NOTHING was loaded: none of the %d tensors of %s fits this model, which keeps the values it had. "
                "Is it a checkpoint of another architecture?", offered, self._source,
            )  # fmt: skip
        else:
            self.logger.info("Loaded %d of the %d tensors of %s.", loaded, offered, self._source)


def _unpack_pkl(content: Any, filename: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{filename} holds a {type(content).__name__} instead of a dict of weights")
    if "model" in content:
        return content
    weights = content.get("blobs", content)
    weights = {name: value for name, value in weights.items() if not name.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _unpack_torch(content: Any, filename: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{filename} holds a {type(content).__name__} instead of a dict of weights")
    return content if "model" in content else {"model": content}


def _check_tensors(weights: Any, filename: str) -> None:
    if not isinstance(weights, dict):
        raise ValueError(f"{filename}: 'model' is a {type(weights).__name__} instead of a dict of tensors")
    for name, value in weights.items():
        if not hasattr(value, "shape"):
            raise ValueError(
                f"{filename} is no checkpoint of detectron2: its entry {name!r} is a {type(value).__name__}, "
                f"not a tensor (expected a key 'model' with a dict of tensors)"
            )


def _drop(names: list[str], unwanted) -> None:
    names[:] = [name for name in names if not unwanted(name)]
