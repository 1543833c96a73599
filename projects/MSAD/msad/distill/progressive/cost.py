"""Adaptation costs C(A, B) between detectors: how far the features of B are from the best linear map of those of A.

Section 3.2 of "Learning Lightweight Object Detectors via Progressive Knowledge Distillation": a 1x1 convolution at
each level maps the neck features of A to those of B; it is fitted on training images, and its mean squared error on
validation images is the cost. Where the grids differ, the map of A is resampled on that of B (r(.) of section 3.1), or
averaged where that is coarser: the convolution and the resampling are linear and change places freely, so the map of A
is resampled first.

The cost is in units of B's features. Divided by their variance it is 1 - R^2, which compares between different B.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from detectron2.layers import ShapeSpec

from ...resolution import resample
from ..losses.pairing import MATCHES
from .least_squares import FeatureSums, SGDFit, SGDOptions, with_ones

Maps = Mapping[str, torch.Tensor]  # level -> (C, h, w) of one image


class Source(Protocol):
    """A network that gives features: msad's FrozenTeacher, also around a student."""

    name: str

    def shapes(self) -> dict[str, ShapeSpec]:
        """Channels, and strides in H pixels, by level, finest first."""

    def features(self, inputs: list[dict], max_shift: int) -> dict[str, torch.Tensor]:
        """Level -> (N, C, h, w) of inputs in H pixels, padding included."""


def image_maps(source: Source, item: dict) -> dict[str, torch.Tensor]:
    """Level -> (C, h, w) of one input in H pixels, without padding."""
    height, width = item["image"].shape[-2:]
    maps = {}
    for level, features in source.features([item], 0).items():
        stride = source.shapes()[level].stride
        maps[level] = features[0, :, : math.ceil(height / stride), : math.ceil(width / stride)]
    return maps


def common_levels(a: Source, b: Source, pairing: str) -> list[tuple[str, str]]:
    """Levels of ``a`` and ``b`` that are compared, finest first.

    Args:
        pairing: "by_stride": of equal stride in H pixels; "by_index": the finest with the finest, and so on, which
            pairs networks of other input scales or backbones too.

    Raises:
        ValueError: an unknown pairing, no levels, as of a segmentor, or no pair.
    """
    if pairing not in MATCHES:
        raise ValueError(f"unknown pairing {pairing!r}; known: {', '.join(MATCHES)}")
    strides = [{level: shape.stride for level, shape in source.shapes().items()} for source in (a, b)]
    without = next((source.name for source, found in zip((a, b), strides) if not found), None)
    if without is not None:
        raise ValueError(f"{without} has no pyramid, between whose levels adaptation costs are measured")
    ordered = [sorted(found, key=found.__getitem__) for found in strides]
    if pairing == "by_index":
        return list(zip(*ordered))
    pairs = [(l, m) for l, m in itertools.product(*ordered) if strides[0][l] == strides[1][m]]  # noqa: E741
    if not pairs:
        raise ValueError(
            f"{a.name} and {b.name} have no level of equal stride ({sorted(strides[0].values())} and "
            f"{sorted(strides[1].values())} H pixels): pair them by_index"
        )
    return pairs


class AdaptationCosts:
    """Costs between every ordered pair of networks, from images that come one by one.

    Args:
        sources: student and teachers, names all different.
        pairing: see :func:`common_levels`.
        sgd: None: exact least squares; else the maps are trained by SGD, one pass over the training images.
        seed: of the maps that are trained.
    """

    def __init__(
        self, sources: Sequence[Source], pairing: str = "by_stride", *, sgd: SGDOptions | None = None, seed: int = 0
    ) -> None:
        names = [source.name for source in sources]
        if len(set(names)) < len(names) or len(names) < 2:
            raise ValueError(f"adaptation costs need two networks or more of different names, got {', '.join(names)}")
        self.names = names
        self._strides = {one.name: {level: shape.stride for level, shape in one.shapes().items()} for one in sources}
        self.pairs: dict[tuple[str, str], list[tuple[str, str]]] = {}
        self._sums: dict[str, dict[tuple, FeatureSums]] = {"train": {}, "val": {}}
        self._fits: dict[tuple, SGDFit] = {}
        for a, b in itertools.permutations(sources, 2):
            self.pairs[a.name, b.name] = common_levels(a, b, pairing)
            for levels in self.pairs[a.name, b.name]:
                key = (a.name, b.name, *levels)
                channels = a.shapes()[levels[0]].channels, b.shapes()[levels[1]].channels
                for sums in self._sums.values():
                    sums[key] = FeatureSums(*channels)
                if sgd is not None:
                    self._fits[key] = SGDFit(*channels, sgd, seed)

    def add(self, split: str, maps: Mapping[str, Maps]) -> None:
        """Add an image of "train" or "val": name of the network -> level -> (C, h, w) without padding.

        Raises:
            ValueError: features that are not finite; names network and level.
        """
        for name, levels in maps.items():
            for level, features in levels.items():
                if not torch.isfinite(features).all():
                    raise ValueError(f"the features of {name} at {level} are not finite")
        resized: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}  # shared by all targets of one grid
        for (a, b), levels in self.pairs.items():
            for source, target in levels:
                y = maps[b][target]
                ratio = self._strides[b][target] / self._strides[a][source]
                key = (a, source, ratio, tuple(y.shape[-2:]))
                if key not in resized:
                    x = with_ones(resample(maps[a][source][None], y.shape[-2:], ratio, average=True)[0])
                    resized[key] = x, x.T @ x
                x, xx = resized[key]
                rows = y.flatten(1).T
                self._sums[split][a, b, source, target].add(x, rows, xx)
                if split == "train" and self._fits:
                    self._fits[a, b, source, target].step(x[:, :-1], rows)

    def result(self, ridge: float = 1e-6) -> dict[str, Any]:
        """The costs on validation images.

        Args:
            ridge: of least squares, see :meth:`FeatureSums.solve`.

        Returns:
            {"costs": {A: {B: C(A, B)}}, "normalized_costs": the same divided by the variance of B,
            "levels": {A: {B: {"A's level>B's level": {"cost", "variance", both of the training images with "train_",
            "locations", "unknowns"}}}}};
            costs are means over levels. A level of B that does not vary has no normalised cost and is left out of that
            mean (NaN if all). A map with fewer training locations than unknowns (per channel of B) is not determined.

        Raises:
            ValueError: a map cannot be solved for, or SGD has diverged; there are no validation images.
        """
        costs: dict[str, dict[str, float]] = {name: {} for name in self.names}
        normalized: dict[str, dict[str, float]] = {name: {} for name in self.names}
        details: dict[str, dict[str, dict]] = {name: {} for name in self.names}
        for (a, b), levels in self.pairs.items():
            found = {f"{s}>{t}": self._level((a, b, s, t), ridge) for s, t in levels}
            ratios = [entry["cost"] / entry["variance"] for entry in found.values() if entry["variance"] > 0]
            costs[a][b] = sum(entry["cost"] for entry in found.values()) / len(found)
            normalized[a][b] = sum(ratios) / len(ratios) if ratios else math.nan
            details[a][b] = found
        return {"costs": costs, "normalized_costs": normalized, "levels": details}

    def _level(self, key: tuple, ridge: float) -> dict[str, float]:
        train, val = self._sums["train"][key], self._sums["val"][key]
        where = f"from {key[0]} {key[2]} to {key[1]} {key[3]}"
        try:
            weight = self._fits[key].weight() if self._fits else train.solve(ridge)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if not val.count:
            raise ValueError("there are no validation images to judge the linear maps by")
        learned = train.error(weight)
        if self._fits and not learned <= (first := train.error(self._fits[key].initial)):
            raise ValueError(
                f"{where}: SGD has diverged, its map has an error of {learned:.3g} where the one that it began with "
                f"has {first:.3g}: choose a smaller learning rate (--lr), or least squares"
            )
        return {
            "cost": val.error(weight),
            "variance": val.variance(),
            "train_cost": learned,
            "train_variance": train.variance(),
            "locations": train.count,
            "unknowns": len(train.xx),
        }

    def state_dict(self) -> dict:
        sums = {split: {key: s.state_dict() for key, s in found.items()} for split, found in self._sums.items()}
        return {"sums": sums, "fits": {key: fit.state_dict() for key, fit in self._fits.items()}}

    def load_state_dict(self, state: dict) -> None:
        for split, found in self._sums.items():
            for key, sums in found.items():
                sums.load_state_dict(state["sums"][split][key])
        for key, fit in self._fits.items():
            fit.load_state_dict(state["fits"][key])
