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
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
Direction = dict[str, torch.Tensor]


def random_direction(model: nn.Module, seed: int) -> Direction:
    """A Gaussian direction by name of parameter, each filter with the norm of the model's filter.

    A filter is what makes one output channel. Biases and affine parameters of norms are left out. Networks of equal
    parameters get the same draws for one seed.
    """
    generator = torch.Generator().manual_seed(seed)
    transposed = {id(module.weight): module.groups for module in model.modules() if isinstance(module, TRANSPOSED)}
    direction = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        draw = torch.randn(parameter.shape, generator=generator).to(parameter)
        own, drawn = (_filter_norms(w, transposed.get(id(parameter))) for w in (parameter.detach(), draw))
        direction[name] = draw * (own / drawn.clamp(min=1e-12))
    return direction


def _filter_norms(weight: torch.Tensor, groups: int | None) -> torch.Tensor:
    """The norm of each element's filter, in a shape that broadcasts to ``weight``.

    Args:
        groups: of a transposed convolution, whose weight is (in, out / groups, *kernel); None: the first axis is out.
    """
    if groups is None:
        return torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.dim())), keepdim=True)
    grouped = weight.unflatten(0, (groups, -1))
    norms = torch.linalg.vector_norm(grouped, dim=(1, *range(3, grouped.dim())), keepdim=True)
    return norms.expand(-1, grouped.shape[1], *norms.shape[2:]).flatten(0, 1)


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
