"""Checkpoint loading that does not pass over a file that fits nothing."""

from __future__ import annotations

from typing import Any

from detectron2.checkpoint import DetectionCheckpointer


class CheckedCheckpointer(DetectionCheckpointer):
    """DetectionCheckpointer that stops if not a single tensor of the file fits the model.

    detectron2 logs what is missing and goes on; a detector trained or a student distilled from random weights that
    were meant to be pretrained is the commonest cause of unexplained low accuracy.
    """

    def _load_model(self, checkpoint: Any) -> Any:
        total = len(self.model.state_dict())
        incompatible = super()._load_model(checkpoint)
        unfit = len(incompatible.missing_keys) + len(incompatible.incorrect_shapes)
        if total and unfit >= total:
            raise ValueError(
                f"no tensor of the checkpoint fits {type(self.model).__name__}: the model wants e.g. "
                f"{(incompatible.missing_keys or [incompatible.incorrect_shapes[0][0]])[0]}, the file has e.g. "
                f"{next(iter(incompatible.unexpected_keys), 'other shapes')}"
            )
        self.logger.info("%d of %d tensors of %s loaded", total - unfit, total, type(self.model).__name__)
        return incompatible
