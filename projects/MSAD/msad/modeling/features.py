"""Run a detector as far as its neck, or read the neck's features while the detector runs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..resolution import get_resolution, level_of
from .adapters import Features, adapt

_TOP_BLOCK = re.compile(r"backbone\.(?:branches\.(\w+)\.)?top_block\.p(\d+)\.")


def run_neck(backbone: nn.Module, x: torch.Tensor, levels: list[str]) -> Features:
    """``levels`` of the pyramid of ``x`` (N, 3, H, W); a backbone that can leave out the others does."""
    if getattr(backbone, "selects_levels", False):
        return backbone(x, levels)
    features = backbone(x)
    return {name: features[name] for name in levels}


@contextmanager
def tap_neck(detector: nn.Module) -> Iterator[Features]:
    """Inside, a forward pass of ``detector`` also fills the yielded dict with its pyramid features."""
    taken: Features = {}
    with detector.backbone.register_forward_hook(lambda _module, _args, output: taken.update(output)):
        yield taken


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """All BatchNorms inside ``module``, synchronised ones too; not those that are frozen for good."""
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def keep_statistics(norm: nn.Module) -> None:
    """Let a BatchNorm in training mode normalise by the batch and leave its buffers alone."""
    norm.track_running_stats = False
    norm.momentum = 0.0  # for a synchronised one that updates its buffers by itself


@contextmanager
def same_statistics(module: nn.Module) -> Iterator[None]:
    """Inside, BatchNorms of ``module`` in training mode normalise by the batch, and their buffers do not change."""
    norms = batch_norms(module)
    before = [(norm.track_running_stats, norm.momentum) for norm in norms]
    try:
        for norm in norms:
            keep_statistics(norm)
        yield
    finally:
        for norm, (tracks, momentum) in zip(norms, before):
            norm.track_running_stats, norm.momentum = tracks, momentum


def freeze_unused_levels(detector: nn.Module) -> list[str]:
    """Stop training what only serves pyramid levels that no head reads; names of the frozen parameters.

    detectron2's stock FPN builders make P7 together with P6. A student on P2-P6 never reads its P7: without
    gradient it would stop DistributedDataParallel with an unused-parameter error.
    """
    frozen = []
    for name, parameter in detector.named_parameters():
        made_for = _TOP_BLOCK.match(name)
        if not made_for:
            continue
        shift = get_resolution(made_for[1]).shift if made_for[1] else 0  # a branch has levels of its own frame
        if int(made_for[2]) + shift > max(map(level_of, adapt(detector).levels), default=math.inf):
            parameter.requires_grad_(False)
            frozen.append(name)
    return frozen
