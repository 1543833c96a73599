"""How flat the detection loss is around trained weights, and the gap between training and validation loss.

Li et al., "Visualizing the Loss Landscape of Neural Nets" (2018): the loss along random directions, filter-normalised
so that networks whose weights have other scales compare. No teacher and no distillation loss takes part, as in figure 5
of "Learning Lightweight Object Detectors via Progressive Knowledge Distillation".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from torch import nn

from ..data.fixed import FixedInputs

# Distances at which sharpness is reported, as fractions of the norm of each filter.
DISTANCES = (0.05, 0.1, 0.25, 0.5)
Direction = dict[str, torch.Tensor]
# What dense detectors keep outside their state_dict: the running number of positives that divides their losses.
_COUNTS = "loss_normalizer"


def random_direction(model: nn.Module, seed: int) -> Direction:
    """A Gaussian direction by name of parameter, each filter with the norm of the model's filter.

    A filter is what makes one output channel. Biases and affine parameters of norms are left out. Networks of equal
    parameters get the same draws for one seed.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        draw = torch.randn(parameter.shape, generator=generator).to(parameter)
        norms = parameter.detach().flatten(1).norm(dim=1) / draw.flatten(1).norm(dim=1).clamp(min=1e-12)
        direction[name] = draw * norms.view(-1, *[1] * (parameter.dim() - 1))
    return direction


@contextmanager
def moved(model: nn.Module, directions: Sequence[Direction], steps: Sequence[float]) -> Iterator[None]:
    """Inside, the parameters are those of the model plus the directions times their steps; outside, exactly its own."""
    names = {name for direction in directions for name in direction}
    own = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if name in names}
    try:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                for direction, step in zip(directions, steps, strict=True):
                    if name in direction:
                        parameter.add_(direction[name], alpha=step)
        yield
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in own:
                    parameter.copy_(own[name])


def fixed_batches(cfg: CfgNode, dataset: str, images: int, batch_size: int, seed: int = 0) -> list[list[dict]]:
    """Training inputs of a data set at the test size, without augmentation; the same ones for one seed.

    Args:
        images: how many at most, drawn at random.

    Raises:
        ValueError: the data set has no image with annotations.
    """
    size = {"short_side": cfg.INPUT.MIN_SIZE_TEST, "longest": cfg.INPUT.MAX_SIZE_TEST}
    inputs = list(FixedInputs(cfg, dataset, images, **size, seed=seed))
    return [inputs[i : i + batch_size] for i in range(0, len(inputs), batch_size)]


class DetectionLoss:
    """Mean of a model's detection losses over fixed batches; equal models give equal values.

    Everything random is seeded, norms use their running statistics, dropout is off, and running counts of positives
    are afterwards what they were before.

    Args:
        batches: of :func:`fixed_batches`.
        on_batch: called after every batch.
    """

    def __init__(self, batches: Sequence[list[dict]], on_batch: Callable[[], Any] = lambda: None) -> None:
        self.batches = batches
        self.on_batch = on_batch

    def __call__(self, model: nn.Module) -> float:
        """The sum of the losses, mean over batches; infinite or NaN where it cannot be computed any more."""
        counts = {module: vars(module).get(_COUNTS) for module in model.modules()}
        values = []
        with training_without_noise(model), torch.no_grad(), EventStorage(), torch.random.fork_rng():
            for number, batch in enumerate(self.batches):
                torch.manual_seed(number)
                try:
                    values.append(float(sum(model(batch).values())))
                except FloatingPointError:  # detectron2's RPN refuses proposals that are not finite
                    values.append(math.inf)
                self.on_batch()
        for module, count in counts.items():
            if count is not None:
                setattr(module, _COUNTS, count)
            elif _COUNTS in vars(module):  # it came with the first loss
                delattr(module, _COUNTS)
        return float(np.mean(values))


@contextmanager
def training_without_noise(model: nn.Module) -> Iterator[None]:
    """Inside, the model returns losses, but backbone, norms and dropout are as in evaluation."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    getattr(model, "detector", model).backbone.eval()
    for module in model.modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)):
            module.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def loss_along(
    model: nn.Module, loss: Callable[[nn.Module], float], direction: Direction, steps: Sequence[float]
) -> list[float]:
    """Loss at each of ``steps`` along a direction."""
    values = []
    for step in steps:
        with moved(model, [direction], [step]):
            values.append(loss(model))
    return values


def sharpness(lines: Sequence[Mapping[float, float]]) -> dict[float, float]:
    """Mean rise of the loss at each distance, over directions and both signs.

    Args:
        lines: of each direction, step -> loss; 0 must be among the steps.

    Returns:
        distance -> mean of L(theta + distance d) - L(theta), ascending.
    """
    rises: dict[float, list[float]] = {}
    for line in lines:
        for step, value in line.items():
            if step != 0:
                rises.setdefault(abs(step), []).append(value - line[0.0])
    return {distance: float(np.mean(rises[distance])) for distance in sorted(rises)}
