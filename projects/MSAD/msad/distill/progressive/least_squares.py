"""Linear maps from the features of one network to those of another, from sums over images.

The cost of an adaptation layer (a 1x1 convolution with bias) is least squares over all locations of all images. It
depends on the features only through sums of products, so that images pass once, nothing is kept of them, and any map
is judged on other images by their sums as well.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn


class FeatureSums:
    """Sums in float64 over pairs of locations: x (n, A) of the source and y (n, B) of the target."""

    def __init__(self, source_channels: int, target_channels: int) -> None:
        self.count = 0
        self.xx = torch.zeros(source_channels + 1, source_channels + 1, dtype=torch.float64)
        self.xy = torch.zeros(source_channels + 1, target_channels, dtype=torch.float64)
        self.yy = torch.zeros(target_channels, dtype=torch.float64)

    def add(self, x: torch.Tensor, y: torch.Tensor, xx: torch.Tensor | None = None) -> None:
        """Add the locations of an image.

        Args:
            x: (n, A + 1) float64, the last column ones; see :func:`with_ones`.
            y: (n, B).
            xx: ``x.T @ x``, if it is known already.
        """
        y = y.to(torch.float64)
        self.count += len(x)
        self.xx += (x.T @ x if xx is None else xx).cpu()
        self.xy += (x.T @ y).cpu()
        self.yy += y.square().sum(dim=0).cpu()

    def solve(self, ridge: float = 1e-6) -> torch.Tensor:
        """The map (A + 1, B), the bias last, of the least squared error.

        Args:
            ridge: the squares of the weights (not of the bias) are penalised by ``ridge`` times the mean square of the
                source's features, per location: it settles maps that the features leave open, such as those of dead
                channels.

        Raises:
            ValueError: no locations, or the solution is not finite (no ridge and dependent features, or features that
                are not finite).
        """
        if not self.count:
            raise ValueError("there are no features to fit a linear map to")
        penalty = torch.diagonal(self.xx)[:-1].mean() * ridge
        system = self.xx.clone()
        torch.diagonal(system)[:-1].add_(penalty)
        weight, info = torch.linalg.solve_ex(system, self.xy)
        if info.any() or not torch.isfinite(weight).all():
            raise ValueError(
                "least squares has no finite solution: the features are not finite, or depend on one another (use a "
                "larger ridge)"
            )
        return weight

    def error(self, weight: torch.Tensor) -> float:
        """Mean squared error of a map (A + 1, B) on these locations, per element of y."""
        weight = weight.to(torch.float64)
        squares = self.yy.sum() - 2 * (weight * self.xy).sum() + (weight * (self.xx @ weight)).sum()
        return max(float(squares), 0.0) / (self.count * len(self.yy))

    def variance(self) -> float:
        """Variance of y over locations, mean over its channels: the error of the best constant."""
        mean = self.xy[-1] / self.count
        return max(float((self.yy / self.count - mean.square()).mean()), 0.0)

    def state_dict(self) -> dict:
        return {"count": self.count, "xx": self.xx, "xy": self.xy, "yy": self.yy}

    def load_state_dict(self, state: dict) -> None:
        self.count, self.xx, self.xy, self.yy = state["count"], state["xx"], state["xy"], state["yy"]


def with_ones(features: torch.Tensor) -> torch.Tensor:
    """(C, h, w) -> (h * w, C + 1) float64, a row a location, the last column ones."""
    rows = features.flatten(1).T.to(torch.float64)
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)


class SGDOptions(NamedTuple):
    """How the paper's way of fitting is carried out; the paper leaves all of it open."""

    lr: float = 0.01
    momentum: float = 0.9


class SGDFit:
    """A 1x1 convolution trained by SGD, a step an image, on the mean squared error: the paper's way.

    Args:
        seed: of the initial weights.

    Attributes:
        initial: the map that it begins with, as :meth:`weight` gives it.
    """

    def __init__(self, source_channels: int, target_channels: int, options: SGDOptions, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layer = nn.Linear(source_channels, target_channels)
        self.optimizer = torch.optim.SGD(self.layer.parameters(), options.lr, options.momentum)
        self.initial = self.weight()

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Learn from the locations of an image, x (n, A) and y (n, B)."""
        if self.layer.weight.device != x.device:
            state = self.optimizer.state_dict()
            self.optimizer = torch.optim.SGD(self.layer.to(x.device).parameters())
            self.optimizer.load_state_dict(state)  # which puts the momentum where the weights are
        with torch.enable_grad():
            loss = nn.functional.mse_loss(self.layer(x.float()), y.float())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def weight(self) -> torch.Tensor:
        """The map (A + 1, B), the bias last, as :meth:`FeatureSums.error` takes it."""
        return torch.cat([self.layer.weight.T, self.layer.bias[None]]).detach().cpu()  # a copy

    def state_dict(self) -> dict:
        return {"layer": self.layer.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.layer.load_state_dict(state["layer"])
        self.optimizer.load_state_dict(state["optimizer"])
