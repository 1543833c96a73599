"""How flat the detection loss is around trained weights, and the gap between training and validation loss.

Li et al., "Visualizing the Loss Landscape of Neural Nets" (2018): the loss along random directions, filter-normalised
so that networks whose weights have other scales compare. No teacher and no distillation loss takes part, as in figure 5
of "Learning Lightweight Object Detectors via Progressive Knowledge Distillation".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

# Distances at which sharpness is reported, as fractions of the norm of each filter.
DISTANCES = (0.05, 0.1, 0.25, 0.5)
Direction = dict[str, torch.Tensor]


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
