"""Renaming of tensors by rules."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

Tensors = dict[str, torch.Tensor]
Transform = Callable[[torch.Tensor], torch.Tensor]  # how values change with the name: their order alone


def reorder(index: Callable[[int], torch.Tensor], dim: int = 0) -> Transform:
    """Transform that takes rows (of ``dim``) in the order ``index(number of rows)``."""
    return lambda x: x.index_select(dim, index(x.shape[dim]))


def anchor_order(size: int, sizes: int = 3, shapes: int = 3) -> torch.Tensor:
    """Where detectron2's rows are among mmdetection's: sizes outside and shapes inside, there it is the reverse."""
    rows = torch.arange(size).view(shapes, sizes, size // (sizes * shapes))
    return rows.transpose(0, 1).flatten()


class Rule(NamedTuple):
    """One kind of tensors.

    Attributes:
        source: regular expression of the whole name in mmdetection.
        target: template of the name in detectron2, with groups as ``\\1``, or a function of the match. A name that
            ends in ``[i]`` is element i of a vector.
        transform: of the values.
    """

    source: str
    target: str | Callable[[re.Match], str]
    transform: Transform = nn.Identity()


# Buffers that are computed, not learned.
COMPUTED = re.compile(
    r".*\.(?:num_batches_tracked|relative_position_index|attn_mask)|bbox_head\.integral\.project|data_preprocessor\..*"
)
_ELEMENT = re.compile(r"(.*)\[(\d+)\]")


class Move(NamedTuple):
    """One tensor's way: from ``source`` to ``target``, or to its element ``index``."""

    source: str
    target: str
    index: int | None
    transform: Transform


class Plan(NamedTuple):
    """What becomes of the tensors of a file.

    Attributes:
        moves: one for each tensor that counts.
        computed: names of tensors that detectron2 computes by itself.
        unknown: names that no rule knows.
    """

    moves: list[Move]
    computed: list[str]
    unknown: list[str]

    def to_detectron2(self, tensors: Tensors) -> Tensors:
        """The tensors under detectron2's names."""
        out: Tensors = {}
        vectors: dict[str, list[tuple[int, torch.Tensor]]] = {}
        for move in self.moves:
            value = move.transform(tensors[move.source]).contiguous()
            if move.index is None:
                out[move.target] = value
            else:
                vectors.setdefault(move.target, []).append((move.index, value))
        for name, elements in vectors.items():
            ordered = sorted(elements, key=lambda item: item[0])
            if [i for i, _ in ordered] != list(range(len(ordered))):
                raise ValueError(f"{name} lacks elements: the file has {[i for i, _ in ordered]}")
            out[name] = torch.stack([value.reshape(()) for _, value in ordered])
        return out


def make_plan(names: list[str], rules: list[Rule]) -> Plan:
    """Decide by the first rule that fits each name; ValueError if two names become one."""
    compiled = [(re.compile(rule.source), rule) for rule in rules]
    plan, taken = Plan([], [], []), {}
    for name in names:
        if COMPUTED.fullmatch(name):
            plan.computed.append(name)
            continue
        fits = ((pattern.fullmatch(name), rule) for pattern, rule in compiled)
        match, rule = next(((match, rule) for match, rule in fits if match), (None, None))
        if match is None:
            plan.unknown.append(name)
            continue
        target = rule.target(match) if callable(rule.target) else match.expand(rule.target)
        if target in taken:
            raise ValueError(f"{name} and {taken[target]} would both become {target}")
        taken[target] = name
        element = _ELEMENT.fullmatch(target)
        plan.moves.append(
            Move(name, element[1], int(element[2]), rule.transform)
            if element
            else Move(name, target, None, rule.transform)
        )
    return plan
