"""How a distillation loss is named, configured and called.

A loss is an ``nn.Module`` registered by class name and built from an entry of DISTILL.LOSSES. Its constructor gets
``levels`` (names of the level pairs: H-frame names at the neck) and the entry's options, and, if it has parameters of
these names,

- ``channels``: {level: C} of the teacher, which the student's features have too when they arrive,
- ``student_channels``: {level: C} of the student; who asks for them gets the student's features without adaptation
  layer,
- ``strides``: {level: stride in H pixels} of the grid on which features are compared.

It is called as ``loss(student, teacher, context)`` with feature dicts of equal names, grids and (but for
``student_channels``) shapes (N, C, h, w), and a :class:`msad.distill.context.DistillContext`; it returns a dict of
scalar tensors. Losses know tensors, not models. Class attributes may say more of the options, by their names in lower
case: ``default_weight`` is the WEIGHT of entries that have none, ``positive``, ``not_negative`` name what must be so,
``two_stage`` has values published for two-stage detectors where the defaults are those of dense ones,
``needs_boxes`` (of an instance, where options decide) says that it looks at ground truth boxes, which segmentors are
not trained on, ``pools_teacher`` asks for the student's grid where levels differ in stride (otherwise it is the
teacher's).

A loss that compares predictions instead of features has a class attribute ``heads``, the kinds of heads it can compare
("dense", "distributions", "rcnn"). It is built without ``levels`` and called as ``loss(pairs, context)`` with a list of
:class:`msad.distill.context.HeadPair`.
"""

from __future__ import annotations

import inspect
import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from fvcore.common.registry import Registry
from torch import nn

from ...config import nearest
from ...modeling.taps import NECK
from ...resolution import resample
from ..context import DistillContext, Features
from ..options import check_options, own_options
from .pairing import LevelPair, build_adaptation, crop_to_common, pair_levels

logger = logging.getLogger(__name__)
DISTILL_LOSS_REGISTRY = Registry("DISTILL_LOSS")
# Entry keys that every loss has, in lower case, with defaults (source: a name, or a list of names), and parameters that
# are not options.
COMMON_OPTIONS = {
    "weight": 1.0, "source": None, "tap": NECK, "levels": (), "match": "by_stride", "adaptation": "auto",
    "adaptation_norm": "",
}  # fmt: skip
OF_FEATURES = tuple(COMMON_OPTIONS)[2:]
INJECTED_ARGUMENTS = ("self", "levels", "channels", "student_channels", "strides")
RENAMED = {"adaptor": "adaptation", "adaptor_norm": "adaptation_norm"}
# Tap -> channels and strides (H pixels) by level, finest first.
ShapesAt = Callable[[str], dict[str, ShapeSpec]]


class WeightedLoss(nn.Module):
    """A registered loss with what its DISTILL.LOSSES entry says of every loss.

    Args:
        name: by which its terms are logged.
        weight: factor on its terms.
        pairs: levels that are compared; empty for a loss between predictions.
        adaptation: layers from the student's to the teacher's channels, by name of the pair.
        source: name of the teacher, ensemble or assistant that the student is compared with.
        tap: where features are read.
        resize: pairs differ in stride, and the student's features are resized to the teacher's grid.
    """

    def __init__(
        self,
        name: str,
        weight: float,
        pairs: list[LevelPair],
        loss: nn.Module,
        adaptation: nn.ModuleDict,
        *,
        source: str,
        tap: str = NECK,
        resize: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.weight, self.pairs = name, weight, pairs
        self.source, self.tap, self.resize = source, tap, resize
        self.loss = loss
        self.adaptation = adaptation

    @property
    def heads(self) -> tuple[str, ...]:
        """Kinds of heads that the loss can compare; empty: it compares features."""
        return getattr(self.loss, "heads", ())

    @property
    def levels(self) -> list[str]:
        """Names of the pairs: the teacher's levels, on whose grids features are compared."""
        return [pair.teacher for pair in self.pairs]

    @property
    def place(self) -> str:
        """Where its gradient is compared with that of other losses: the neck, or its levels of another tap."""
        return self.tap if self.tap == NECK else f"{self.tap}.{'+'.join(pair.student for pair in self.pairs)}"

    def student_maps(self, context: DistillContext) -> list[torch.Tensor]:
        """The student's maps (N, C, h, w) at :attr:`place`: all levels of the neck."""
        maps = context.at(self.tap, "student")
        return list(maps.values()) if self.tap == NECK else [maps[pair.student] for pair in self.pairs]

    def forward(self, context: DistillContext) -> dict[str, torch.Tensor]:
        """Weighted terms, named ``loss_distill/{NAME}`` plus the term's own name if the loss has several."""
        if self.heads:
            terms = self.loss(context.heads(self.source), context)
        else:
            terms = self.loss(*self._on_one_grid(context), context)
        return {
            f"loss_distill/{self.name}" + (f"/{term}" if len(terms) > 1 else ""): self.weight * value
            for term, value in terms.items()
        }

    def _on_one_grid(self, context: DistillContext) -> tuple[Features, Features]:
        """Features of student and source by name of the pair, of equal grids and, where adapted, channels."""
        students, teachers = context.at(self.tap, "student"), context.at(self.tap, self.source)
        ours, theirs = {}, {}
        for pair in self.pairs:
            s, t = students[pair.student], teachers[pair.teacher]
            if self.resize or self.tap != NECK:  # features at the neck are cut to the student's grid already
                s, t = crop_to_common(s, t, pair.strides)
            if pair.teacher in self.adaptation:
                s = self.adaptation[pair.teacher](s)
            ratio = pair.strides[1] / pair.strides[0]
            if self.resize and getattr(self.loss, "pools_teacher", False):
                t = resample(t, s.shape[-2:], 1 / ratio, average=True)
            elif self.resize:
                s = resample(s, t.shape[-2:], ratio)
            ours[pair.teacher], theirs[pair.teacher] = s, t
        return ours, theirs


def lower_keys(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of DISTILL.LOSSES, whose keys may have either case, with keys in lower case."""
    return {key.lower(): value for key, value in entry.items()}


def loss_class(name: str | None) -> type[nn.Module] | None:
    """The registered loss ``name``, or None."""
    return next((cls for known, cls in DISTILL_LOSS_REGISTRY if known == name), None)


def compares_heads(name: str | None) -> bool:
    """Whether ``name`` is that of a loss between predictions."""
    return bool(getattr(loss_class(name), "heads", ()))


def compares_necks(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of DISTILL.LOSSES, with lower-case keys, compares the pyramids of both networks."""
    return not compares_heads(entry.get("name")) and entry.get("tap", NECK) == NECK


def build_losses(
    entries: list[dict],
    student: ShapesAt,
    sources: Mapping[str, ShapesAt],
    seed: int = 0,
    default: Sequence[str] | None = None,
) -> nn.ModuleList:
    """Build DISTILL.LOSSES: one loss for every entry and each of its sources.

    Args:
        entries: {NAME, WEIGHT, SOURCE, TAP, LEVELS (default: all that have a partner), MATCH, ADAPTATION,
            ADAPTATION_NORM, further options of the loss}; see :func:`pair_levels` and :func:`build_adaptation`.
        student, sources: channels and strides (H pixels) of the student and of every source at a tap.
        seed: initial weights of a loss are a function of it and of the loss's name alone.
        default: sources of an entry that names none; None: all of them.

    Raises:
        ValueError: unknown loss, option, value, source or level; says which, and the nearest valid name.
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
        for key in RENAMED.keys() & options:
            raise ValueError(f"DISTILL.LOSSES: {kind}: {key.upper()} is called {RENAMED[key].upper()} now")
        defaults = {**COMMON_OPTIONS, **own_options(cls, INJECTED_ARGUMENTS)}
        limits = [getattr(cls, limit, ()) for limit in ("positive", "not_negative")]
        options = check_options(f"DISTILL.LOSSES: {kind}", options, defaults, *limits)
        number = f"_{names.count(kind) + 1}" if kind in names else ""
        names.append(kind)
        for source in _sources(kind, options.pop("source", None), list(sources), default):
            label = f"{kind}{number}@{source}" if len(sources) > 1 else f"{kind}{number}"
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(zlib.crc32(f"{seed} {label}".encode()))
                built.append(_build_loss(label, cls, dict(options), student, source, sources[source]))
    return built


def _sources(kind: str, wanted: Any, known: list[str], default: Sequence[str] | None) -> list[str]:
    if wanted is None:
        return list(known if default is None else default)
    wanted = [wanted] if isinstance(wanted, str) else wanted
    if not isinstance(wanted, (list, tuple)) or not wanted or any(wanted.count(name) > 1 for name in wanted):
        raise ValueError(f"DISTILL.LOSSES: {kind}: SOURCE must be a name, or a list of different names, not {wanted!r}")
    for name in wanted:
        if name not in known:
            raise ValueError(
                f"DISTILL.LOSSES: {kind}: SOURCE {name!r} is none of the names in DISTILL.TEACHERS and "
                f"DISTILL.ASSISTANTS ({', '.join(known)}){nearest(str(name), known)}"
            )
    return list(wanted)


def _suggest(kind: str, known: list[str]) -> str:
    """As :func:`nearest`, but a part of one name alone means that name: MD is MagnitudeMD and not MGD."""
    containing = [name for name in known if kind.lower() in name.lower()]
    return f"; did you mean {containing[0]}?" if len(containing) == 1 else nearest(kind, known)


def _build_loss(
    label: str, cls: type[nn.Module], options: dict[str, Any], student: ShapesAt, source: str, teacher: ShapesAt
) -> WeightedLoss:
    weight = options.pop("weight", getattr(cls, "default_weight", 1.0))
    if getattr(cls, "heads", ()):
        of_features = [key.upper() for key in OF_FEATURES if key in options]
        if of_features:
            raise ValueError(f"DISTILL.LOSSES: {label} compares predictions and takes no {', '.join(of_features)}")
        return WeightedLoss(label, weight, [], cls(**options), nn.ModuleDict(), source=source)
    common = {key: options.pop(key, COMMON_OPTIONS[key]) for key in OF_FEATURES}
    tap, match = common["tap"], common["match"]
    ours, theirs = student(tap), teacher(tap)
    pairs = pair_levels(ours, theirs, match, common["levels"], from_last=tap != NECK)
    adaptation, norm = common["adaptation"], common["adaptation_norm"]
    wanted = inspect.signature(cls.__init__).parameters
    if "student_channels" in wanted:
        if adaptation != "auto" or norm:
            raise ValueError(f"DISTILL.LOSSES: {label} adapts channels by itself and takes no ADAPTATION")
        layers = nn.ModuleDict()
    else:
        layers = build_adaptation(pairs, ours, theirs, adaptation, norm)
    given = {
        "channels": {pair.teacher: theirs[pair.teacher].channels for pair in pairs},
        "student_channels": {pair.teacher: ours[pair.student].channels for pair in pairs},
        "strides": {pair.teacher: theirs[pair.teacher].stride for pair in pairs},
    }
    loss = cls(
        levels=[pair.teacher for pair in pairs], **{k: v for k, v in given.items() if k in wanted}, **options
    )
    if layers:
        logger.info(
            "Distillation loss %s: adaptation layers, trained with the student, at %s", label, ", ".join(layers)
        )
    return WeightedLoss(label, weight, pairs, loss, layers, source=source, tap=tap, resize=match == "by_index")
