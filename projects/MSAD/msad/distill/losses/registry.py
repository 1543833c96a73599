"""How a distillation loss is named, configured and called.

A loss is an ``nn.Module`` registered by class name and built from an entry of DISTILL.LOSSES. Its constructor gets
``levels`` (H-frame names) and the entry's options, and, if it has parameters of these names,

- ``channels``: {level: C} of the teacher, which the student's maps have too when they arrive,
- ``student_channels``: {level: C} of the student; who asks for them gets the student's maps without adaptor,
- ``strides``: {level: stride in H pixels} of the grid on which maps are compared.

It is called as ``loss(student, teacher, batch)`` with feature dicts of equal names, grids and (but for
``student_channels``) shapes (N, C, h, w), and returns a dict of scalar tensors. Losses know tensors, not models.
Class attributes may say more of the options, by their names in lower case: ``default_weight`` is the WEIGHT of entries
that have none, ``positive`` names those that must be above 0, ``two_stage`` has values published for two-stage
detectors where the defaults are those of dense ones.

A loss that compares predictions instead of features has a class attribute ``heads``, the kinds of heads it can compare
("dense", "distributions", "rcnn"). It is built without ``levels`` and called with empty feature dicts; predictions are
in ``batch.heads``.
"""

from __future__ import annotations

import inspect
import logging
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import Instances
from fvcore.common.registry import Registry
from torch import nn

from ...config import nearest
from .pairing import LevelPair, build_adaptation, pair_levels, resize_to
from .predictions import HeadPair

logger = logging.getLogger(__name__)
DISTILL_LOSS_REGISTRY = Registry("DISTILL_LOSS")
# Entry keys that every loss has, in lower case, and parameters that are not options.
COMMON = ("weight", "levels", "match", "adaptor", "adaptor_norm")
GIVEN = ("self", "levels", "channels", "student_channels", "strides")


@dataclass
class DistillBatch:
    """What a loss may know of the batch besides features.

    Attributes:
        image_sizes: (h, w) of each image in H pixels, without padding.
        gt: ground truth in H pixels.
        pair_heads: computes :attr:`heads`.
    """

    image_sizes: list[tuple[int, int]]
    gt: list[Instances]
    pair_heads: Callable[[], list[HeadPair]] | None = None
    _boxes: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def heads(self) -> list[HeadPair]:
        """Head predictions of student and teacher, one pair a head; the teacher's heads run when first asked.

        Raises:
            RuntimeError: no loss of this run declares that it needs them.
        """
        if self.pair_heads is None:
            raise RuntimeError("head predictions were not recorded: a loss that reads batch.heads needs ``heads``")
        return self.pair_heads()

    def boxes(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Ground truth boxes of the whole batch, (K, 4) x0 y0 x1 y1 in H pixels, and their image index (K,).

        Copied to ``device`` once, however many losses and levels ask.
        """
        if device not in self._boxes:
            per_image = [instances.gt_boxes.tensor for instances in self.gt]
            counts = torch.tensor([len(boxes) for boxes in per_image])
            image = torch.arange(len(per_image)).repeat_interleave(counts)
            boxes = torch.cat(per_image) if per_image else torch.zeros(0, 4)
            self._boxes[device] = boxes.to(device, non_blocking=True), image.to(device, non_blocking=True)
        return self._boxes[device]


class WeightedLoss(nn.Module):
    """A registered loss with the name, weight, level pairs and adaptors of its DISTILL.LOSSES entry."""

    def __init__(
        self,
        name: str,
        weight: float,
        pairs: list[LevelPair],
        loss: nn.Module,
        adaptors: nn.ModuleDict,
        resize: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.weight, self.pairs, self.resize = name, weight, pairs, resize
        self.loss = loss
        self.adaptors = adaptors

    @property
    def heads(self) -> tuple[str, ...]:
        """Kinds of heads that the loss can compare; empty: it compares features."""
        return getattr(self.loss, "heads", ())

    @property
    def levels(self) -> list[str]:
        """Names of the pairs: the teacher's levels, on whose grids maps are compared."""
        return [pair.teacher for pair in self.pairs]

    def forward(
        self, student: dict[str, torch.Tensor], teacher: dict[str, torch.Tensor], batch: DistillBatch
    ) -> dict[str, torch.Tensor]:
        """Weighted terms, named ``loss_distill/{NAME}`` plus the term's own name if the loss has several."""
        adapted = {}
        for pair in self.pairs:
            x = student[pair.student]
            if pair.teacher in self.adaptors:
                x = self.adaptors[pair.teacher](x)
            adapted[pair.teacher] = resize_to(x, teacher[pair.teacher]) if self.resize else x
        terms = self.loss(adapted, {name: teacher[name] for name in adapted}, batch)
        return {
            f"loss_distill/{self.name}" + (f"/{term}" if len(terms) > 1 else ""): self.weight * value
            for term, value in terms.items()
        }


def lower_keys(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of DISTILL.LOSSES, whose keys may have either case, with keys in lower case."""
    return {key.lower(): value for key, value in entry.items()}


def loss_class(name: str | None) -> type[nn.Module] | None:
    """The registered loss ``name``, or None."""
    return next((cls for known, cls in DISTILL_LOSS_REGISTRY if known == name), None)


def compares_heads(name: str | None) -> bool:
    """Whether ``name`` is that of a loss between predictions."""
    return bool(getattr(loss_class(name), "heads", ()))


def build_losses(
    entries: list[dict], student: dict[str, ShapeSpec], teacher: dict[str, ShapeSpec], seed: int = 0
) -> nn.ModuleList:
    """Build DISTILL.LOSSES.

    Args:
        entries: {NAME, WEIGHT, LEVELS (default: all that have a partner), MATCH, ADAPTOR, ADAPTOR_NORM, further
            options of the loss}; see :func:`pair_levels` and :func:`build_adaptation`.
        student, teacher: H-frame shapes; strides in H pixels.
        seed: initial weights of a loss are a function of it and of the loss's name alone.

    Raises:
        ValueError: unknown loss, option, value or level; says which, and the nearest valid name.
    """
    built = nn.ModuleList()
    names: list[str] = []
    for entry in entries:
        options = lower_keys(entry)
        kind = options.pop("name", None)
        cls = loss_class(kind)
        if cls is None:
            known = [name for name, _ in DISTILL_LOSS_REGISTRY]
            raise ValueError(f"DISTILL.LOSSES: unknown loss {kind!r}{_suggest(str(kind), known)} (known: {known})")
        options = check_options(kind, cls, options)
        label = kind if kind not in names else f"{kind}_{names.count(kind) + 1}"
        names.append(kind)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(f"{seed} {label}".encode()))
            built.append(_build_loss(label, cls, options, student, teacher))
    return built


def _suggest(kind: str, known: list[str]) -> str:
    """As :func:`nearest`, but a part of one name alone means that name: MD is MagnitudeMD and not MGD."""
    containing = [name for name in known if kind.lower() in name.lower()]
    return f"; did you mean {containing[0]}?" if len(containing) == 1 else nearest(kind, known)


def _build_loss(
    label: str, cls: type[nn.Module], options: dict[str, Any], student: dict[str, ShapeSpec],
    teacher: dict[str, ShapeSpec],
) -> WeightedLoss:  # fmt: skip
    weight = options.pop("weight", getattr(cls, "default_weight", 1.0))
    if getattr(cls, "heads", ()):
        of_features = [key.upper() for key in COMMON if key in options]
        if of_features:
            raise ValueError(f"DISTILL.LOSSES: {label} compares predictions and takes no {', '.join(of_features)}")
        return WeightedLoss(label, weight, [], cls(**options), nn.ModuleDict())
    match = options.pop("match", "by_stride")
    pairs = pair_levels(student, teacher, match, options.pop("levels", None))
    adaptor, norm = options.pop("adaptor", "auto"), options.pop("adaptor_norm", "")
    wanted = inspect.signature(cls.__init__).parameters
    if "student_channels" in wanted:
        if adaptor != "auto" or norm:
            raise ValueError(f"DISTILL.LOSSES: {label} adapts channels by itself and takes no ADAPTOR")
        adaptors = nn.ModuleDict()
    else:
        adaptors = build_adaptation(pairs, student, teacher, adaptor, norm)
    given = {
        "channels": {pair.teacher: teacher[pair.teacher].channels for pair in pairs},
        "student_channels": {pair.teacher: student[pair.student].channels for pair in pairs},
        "strides": {pair.teacher: teacher[pair.teacher].stride for pair in pairs},
    }
    loss = cls(
        levels=[pair.teacher for pair in pairs], **{k: v for k, v in given.items() if k in wanted}, **options
    )
    if adaptors:
        logger.info("Distillation loss %s: 1x1 adaptors, trained with the student, at %s", label, ", ".join(adaptors))
    return WeightedLoss(label, weight, pairs, loss, adaptors, resize=match == "by_index")


def check_options(kind: str, cls: type[nn.Module], options: dict[str, Any]) -> dict[str, Any]:
    """``options`` (lower-case keys) if the loss takes them, numbers as numbers: yaml reads 1e-3 as a text.

    Raises:
        ValueError: an unknown option, or a value of another kind than its default; names loss and option.
    """
    parameters = inspect.signature(cls.__init__).parameters
    own = {name: parameter.default for name, parameter in parameters.items() if name not in GIVEN}
    valid = [name.upper() for name in (*COMMON, *own)]
    checked = {}
    for key, value in options.items():
        if key.upper() not in valid:
            raise ValueError(
                f"DISTILL.LOSSES: {kind} has no option {key.upper()}{nearest(key.upper(), valid)} "
                f"(options: {', '.join(valid)})"
            )
        wanted = ""
        if key == "weight" or isinstance(own.get(key), float):
            number = _number(value)
            wanted = "a number" if number is None else ""
            value = value if number is None else number
        elif isinstance(own.get(key), bool) and not isinstance(value, bool):
            wanted = "True or False, without quotation marks"
        if not wanted and key in getattr(cls, "positive", ()) and not value > 0:
            wanted = "above 0"
        if wanted:
            raise ValueError(f"DISTILL.LOSSES: {kind}: {key.upper()} must be {wanted}, not {value!r}")
        checked[key] = value
    return checked


def _number(value: Any) -> float | None:
    """``value`` as a finite number, None if it is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and not isinstance(value, bool) else None
