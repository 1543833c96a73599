"""Checkpoints that are whole or absent, and loading that does not pass over a file that fits nothing."""

from __future__ import annotations

import os
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from ..files import atomic_write, require_checkpoint


def part_of(name: str) -> str:
    """Part of a detector that a tensor belongs to: "backbone.bottom_up", "backbone" (its neck), "head", ..."""
    parts = name.removeprefix("detector.").split(".")
    return ".".join(parts[:2]) if parts[:2] == ["backbone", "bottom_up"] else parts[0]


def load_branches(detector: nn.Module, entries: list[dict]) -> set[str]:
    """Load the WEIGHTS of MSAD.FUSION_STUDENT.BRANCHES, a pretrained network or a detector each, into the branches.

    Returns:
        the names of the detector's tensors that were loaded.
    """
    loaded = set()
    for entry in entries:
        if entry.get("WEIGHTS"):
            holder = nn.Module()  # gives the branch the names that it has in a detector of its own
            holder.backbone = detector.backbone.branches[entry["RESOLUTION"]]
            checkpointer = CheckedCheckpointer(holder)
            checkpointer.load(entry["WEIGHTS"])
            names = holder.state_dict().keys() - set(checkpointer.missing_or_mismatched)
            loaded |= {name.replace("backbone.", f"backbone.branches.{entry['RESOLUTION']}.", 1) for name in names}
    return loaded


class _Misfit(ValueError):
    """A checkpoint that cannot be used; the text follows the file's name."""


class CheckedCheckpointer(DetectionCheckpointer):
    """DetectionCheckpointer that stops if not a single tensor of the file fits the model, and writes atomically.

    detectron2 logs what is missing and goes on; a detector trained or a student distilled from random weights that
    were meant to be pretrained is the commonest cause of unexplained low accuracy. A part of the model that is loaded
    only in part, or a bottom-up network that is not loaded at all, is worth a warning of its own: pretrained weights
    rightly lack whole parts (neck, head) and nothing else. Where nothing may be missing, there is :meth:`load_all`.

    The checkpoint of a plain detector fits a MultiScaleTeacher: its names get the prefix ``detector.``.

    Attributes:
        missing_or_mismatched: names of the model's tensors that the last loaded file lacks or has in another shape.
        unexpected: keys of that file that match nothing in the model.
    """

    missing_or_mismatched: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    _owner = ""  # of a model that must get all of its tensors

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint and report what did not fit; an empty path loads nothing.

        Returns:
            what else the file contains.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: nothing in it fits, or a tensor that does is not finite; names both.
        """
        self.missing_or_mismatched = self.unexpected = ()
        if not path:
            return {}
        require_checkpoint(path)
        try:
            return super().load(path, *args, **kwargs)
        except _Misfit as error:
            raise ValueError(f"{path} {error}") from None

    def load_all(self, path: str, owner: str) -> None:
        """Load the model's tensors from a checkpoint that must have all of them.

        Args:
            owner: whose checkpoint it should be, for the error: a config file or "this config".

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a tensor is absent, of another shape or not finite.
        """
        self._owner = owner
        try:
            self.load(path, checkpointables=[])
        finally:
            self._owner = ""

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Go on from the last checkpoint of ``save_dir``, which must fit as a whole, or load ``path``."""
        self._owner = "this config" if resume and self.has_checkpoint() else ""
        try:
            return super().resume_or_load(path, resume=resume)
        finally:
            self._owner = ""

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``{save_dir}/{name}.pth`` and note it as the last; a run killed meanwhile keeps the one before."""
        if not self.save_dir or not self.save_to_disk:
            return
        content = {"model": self.model.state_dict()}
        content.update({key: part.state_dict() for key, part in self.checkpointables.items()})
        content.update(kwargs)
        folder = self.path_manager.get_local_path(self.save_dir)
        self.logger.info("Saving checkpoint to %s", os.path.join(folder, f"{name}.pth"))
        with atomic_write(os.path.join(folder, f"{name}.pth")) as file:
            torch.save(content, file)
        self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Note from which file of ``save_dir`` a run resumes."""
        folder = self.path_manager.get_local_path(self.save_dir)
        with atomic_write(os.path.join(folder, "last_checkpoint"), "w") as file:
            file.write(last_filename_basename)

    def _load_model(self, checkpoint: Any) -> Any:
        # BatchNorm's counters are never reported as missing.
        total = sum(not name.endswith("num_batches_tracked") for name in self.model.state_dict())
        checkpoint["model"] = self._as_teacher(checkpoint["model"])
        incompatible = super()._load_model(checkpoint)
        # Tensors of another shape are in both lists.
        differing = [name for name, *_ in incompatible.incorrect_shapes]
        self.unexpected = tuple(incompatible.unexpected_keys)
        self.missing_or_mismatched = tuple(dict.fromkeys([*incompatible.missing_keys, *differing]))
        missing = self.missing_or_mismatched
        if total and len(missing) >= total:
            raise _Misfit(
                f"is of another model: no tensor of the checkpoint fits {type(self.model).__name__}, which has "
                f"e.g. {missing[0]}; the file has e.g. {next(iter(incompatible.unexpected_keys), 'other shapes')}"
            )
        if self._owner and missing:
            raise _Misfit(
                f"is not a checkpoint of {self._owner}: {len(missing)} tensors are absent or of another shape, e.g. "
                f"{', '.join(missing[:3])}"
            )
        for name, value in self.model.state_dict().items():
            if value.is_floating_point() and name not in missing and not torch.isfinite(value).all():
                raise _Misfit(f"has NaN or infinity in {name}: the training that wrote it diverged")
        loaded = total - len(self.missing_or_mismatched)
        self.logger.info("%d of %d tensors of %s loaded", loaded, total, type(self.model).__name__)
        for line in self._doubtful_parts():
            self.logger.warning("PRETRAINED WEIGHTS DO NOT FIT: %s", line)
        return incompatible

    def _as_teacher(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """The tensors of a plain detector under the names that they have in a MultiScaleTeacher, if this is one."""
        wanted = self.model.state_dict()
        renamed = {f"detector.{name}": value for name, value in tensors.items()}
        if any(name in wanted for name in tensors) or not any(name in wanted for name in renamed):
            return tensors
        new = [name for name in wanted if name not in renamed and not name.endswith("num_batches_tracked")]
        self.logger.info("Weights of a plain detector; new in this model, from random values: %s", ", ".join(new))
        return renamed

    def _doubtful_parts(self) -> list[str]:
        """A line for each part of the model that got some of its tensors but not all, or no backbone at all.

        Statistics of norms do not count: weights for frozen norms, such as detectron2's MSRA models, lack them.
        """
        names: dict[str, list[str]] = {}
        for name in self.model.state_dict():
            if not name.endswith((".running_mean", ".running_var", ".num_batches_tracked")):
                names.setdefault(part_of(name), []).append(name)
        unfit = set(self.missing_or_mismatched)
        network = "backbone.bottom_up" if "backbone.bottom_up" in names else "backbone"
        lines = []
        for part, tensors in names.items():
            without = [name for name in tensors if name in unfit]
            if without and (len(without) < len(tensors) or part == network):
                lines.append(
                    f"{len(without)} of the {len(tensors)} tensors of {part} are not in the file or of another shape "
                    f"and keep their random values: {', '.join(without[:5])}{', ...' if len(without) > 5 else ''}"
                )
        return lines
