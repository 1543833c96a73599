"""Assistants: sources of features that are trained beside the student, on what teachers and student give."""

from __future__ import annotations

import inspect
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from fvcore.common.registry import Registry
from torch import nn

from ..config import nearest
from .context import DistillContext, Features
from .options import check_options, own_options

DISTILL_ASSISTANT_REGISTRY = Registry("DISTILL_ASSISTANT")
# Keys of an entry that say how an assistant is trained, with defaults, see msad.engine.assistants. The default of
# BASE_LR is the student's.
TRAINING_OPTIONS = {
    "optimizer": "Adam", "base_lr": 0.0, "weight_decay": 0.0, "schedule": "solver", "head_learns": False,
    "waits": False,
}  # fmt: skip
INJECTED_ARGUMENTS = ("self", "student", "sources")


class Assistant(nn.Module, ABC):
    """A source that learns. Subclasses are registered in DISTILL_ASSISTANT_REGISTRY.

    A constructor gets the options of its DISTILL.ASSISTANTS entry, and, if it has parameters of these names,
    ``student`` and ``sources``: channels and strides (H pixels) of the student's neck, and of every teacher's by name.
    A class attribute ``positive`` names options that must be above 0.
    """

    @abstractmethod
    def shapes(self) -> dict[str, ShapeSpec]:
        """Channels and strides (H pixels) of :meth:`features`, under H-frame names, finest first."""

    @abstractmethod
    def losses(self, context: DistillContext) -> dict[str, torch.Tensor]:
        """What the assistant is trained on: scalars by name.

        Args:
            context: of the step, detached; ``context.run_losses`` gives the losses of the student's heads on features,
                whose gradients reach the features and not the heads.
        """

    @abstractmethod
    def features(self, context: DistillContext) -> Features:
        """The features that the student is compared with, called without gradients after the assistant's own step."""

    def forward(self, context: DistillContext) -> dict[str, torch.Tensor]:
        return self.losses(context)


def build_assistants(
    entries: list[dict],
    student: dict[str, ShapeSpec],
    sources: Mapping[str, dict[str, ShapeSpec]],
    seed: int = 0,
) -> dict[str, Assistant]:
    """The assistants of DISTILL.ASSISTANTS by name, which is that of their class.

    Args:
        entries: {NAME, OPTIMIZER, BASE_LR, WEIGHT_DECAY, SCHEDULE, HEAD_LEARNS, WAITS, options of the assistant}.
        student, sources: shapes at the neck.
        seed: initial weights are a function of it and of the name alone.

    Raises:
        ValueError: unknown assistant, option, value or name, or one named twice; says which.
    """
    built: dict[str, Assistant] = {}
    for entry in entries:
        options = {key.lower(): value for key, value in entry.items()}
        name = options.pop("name", None)
        known = [registered for registered, _ in DISTILL_ASSISTANT_REGISTRY]
        if name not in known:
            hint = nearest(str(name), known)
            raise ValueError(f"DISTILL.ASSISTANTS: unknown assistant {name!r}{hint} (known: {', '.join(known)})")
        if name in built or name in sources:
            raise ValueError(f"DISTILL.ASSISTANTS: there is a source named {name} already")
        cls = DISTILL_ASSISTANT_REGISTRY.get(name)
        defaults = {**TRAINING_OPTIONS, **own_options(cls, INJECTED_ARGUMENTS)}
        checked = check_options(f"DISTILL.ASSISTANTS: {name}", options, defaults, getattr(cls, "positive", ()))
        own = {key: value for key, value in checked.items() if key not in TRAINING_OPTIONS}
        parameters = inspect.signature(cls.__init__).parameters
        given: dict[str, Any] = {"student": student, "sources": dict(sources)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            built[name] = cls(**{key: value for key, value in given.items() if key in parameters}, **own)
    return built
