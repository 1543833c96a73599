"""Weights of distillation losses from their gradients at the student's features, instead of by trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import nn

_HALF_SCALE = 4096.0  # keeps gradients of half precision maps above what float16 rounds to zero


class GradientBalance(nn.Module):
    """Weight every loss so that the norm of its gradient at the maps it reads is ``ratio`` times the detection losses'.

    For ``iters`` iterations from ``start`` on both norms are measured: over all maps of a place, images and processes
    together, so that several processes find what one would with the joint batch. The weight of a loss is
    ``ratio * mean |d L_det / d F| / mean |d L_distill / d F|``, the means being over the iterations so far; after the
    last of them it stays. Measuring takes a backward pass through head and losses, and for places in front of the neck
    through the neck; afterwards there is no cost.

    The sums are buffers: saved with the run, they make a resumed one find the same weights.

    Args:
        ratio: positive.
        iters: at least 1.
        places: by name of a loss, where its gradient is measured: losses of one place share its maps.
        start: iteration at which distillation begins.

    Raises:
        ValueError: ``ratio`` or ``iters`` is not positive.
    """

    sums: torch.Tensor
    _place_of: torch.Tensor

    def __init__(self, ratio: float, iters: int, places: Mapping[str, str], start: int = 0) -> None:
        super().__init__()
        if ratio <= 0 or iters < 1:
            raise ValueError(f"DISTILL.BALANCE needs RATIO > 0 and ITERS >= 1, got {ratio} and {iters}")
        self.ratio, self.iters, self.start = ratio, iters, start
        self.names, self.places = tuple(places), tuple(dict.fromkeys(places.values()))
        index = torch.tensor([self.places.index(place) for place in places.values()], dtype=torch.long)
        self.register_buffer("_place_of", index, persistent=False)  # on the device: copied there once, not every step
        self._of_losses = tuple(places.values())
        # Norms of the detection losses at each place, then of each loss at its own.
        self.register_buffer("sums", torch.zeros(len(self.places) + len(self.names)))

    def measures(self, iteration: int) -> bool:
        """Whether the norms of this iteration (of training, from 0) count."""
        return self.start <= iteration < self.start + self.iters

    @property
    def weights(self) -> torch.Tensor:
        """(losses,): weights from what has been measured so far; 0 for a loss that never had a gradient."""
        detection, distill = self.sums[self._place_of], self.sums[len(self.places) :]
        return torch.where(distill > 0, self.ratio * detection / distill, 0.0)

    def forward(
        self,
        iteration: int,
        maps: Mapping[str, Sequence[torch.Tensor]],
        detection: torch.Tensor,
        distill: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """Weights for this iteration, (losses,).

        Args:
            iteration: of training, from 0.
            maps: the student's maps at each place.
            detection: sum of the detection losses as they are trained.
            distill: total of each loss with weight 1.
        """
        if self.measures(iteration):
            squares = [squared_gradient(detection, maps[place]) for place in self.places]
            squares += [squared_gradient(loss, maps[place]) for loss, place in zip(distill, self._of_losses)]
            norms = torch.stack(squares)
            if comm.get_world_size() > 1:
                dist.all_reduce(norms)
            # A step that mixed precision spoils does not count, for any loss.
            self.sums += torch.where(norms.isfinite().all(), norms.sqrt(), 0.0)
        return self.weights


def squared_gradient(loss: torch.Tensor, maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of squares of the gradient of ``loss`` at ``maps``, 0-dim float32; the graph stays for training."""
    total = torch.zeros((), device=loss.device)
    maps = [x for x in maps if x.requires_grad]  # those of frozen layers do not
    if not maps or not loss.requires_grad:
        return total
    scale = torch.ones_like(total)
    if any(x.dtype == torch.float16 for x in maps):  # large losses are sums, whose gradients would not fit
        scale = _HALF_SCALE / loss.detach().float().abs().clamp(min=1.0)
    for gradient in torch.autograd.grad(loss * scale, maps, retain_graph=True, allow_unused=True):
        if gradient is not None:
            total = total + (gradient.float() / scale).square().sum()
    return total
