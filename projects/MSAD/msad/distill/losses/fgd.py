"""Focal and global distillation (FGD, Yang et al., CVPR 2022)."""

from __future__ import annotations

import torch
from torch import nn

from ..context import DistillContext, Features
from .registry import DISTILL_LOSS_REGISTRY
from .shared import at_least_float32, attention, rasterize_max


def focal_masks(
    boxes: torch.Tensor, image: torch.Tensor, stride: int, size: tuple[int, int], num_images: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of locations in objects and outside of them (FGD, eq. 4 to 6).

    A box takes the locations from floor(low / stride) to ceil(high / stride), both included, and gives each the weight
    1 / their number, so that objects of all sizes count alike; where boxes overlap the smaller one counts. Locations of
    an image outside all boxes have equal weights that sum to 1.

    Args:
        boxes: (K, 4) x0 y0 x1 y1 in H pixels.
        image: (K,) index of the box's image.
        stride: of the grid in H pixels.
        size: (h, w) of the grid.

    Returns:
        foreground, background, each (num_images, h, w).
    """
    boxes = at_least_float32(boxes)
    low, high = (boxes[:, :2] / stride).floor(), (boxes[:, 2:] / stride).ceil()

    def covered(axis: int, length: int) -> torch.Tensor:
        locations = torch.arange(length, device=boxes.device)
        return (locations >= low[:, axis, None]) & (locations <= high[:, axis, None])

    weight = 1 / (high - low + 1).prod(dim=1)
    foreground = rasterize_max(covered(1, size[0]), covered(0, size[1]), image, weight, num_images)
    background = (foreground == 0).to(foreground.dtype)
    return foreground, background / background.sum(dim=(1, 2), keepdim=True).clamp(min=1)


def focal_loss(
    s: torch.Tensor, t: torch.Tensor, difference: torch.Tensor, masks: tuple[torch.Tensor, torch.Tensor],
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Differences in objects, outside of them, and of the attention, summed over maps (N, C, h, w) and divided by N.

    The teacher's attention weighs the squared ``difference`` of the maps, ``masks`` are those of :func:`focal_masks`;
    both sides' attentions are compared by L1.
    """
    (space_s, channels_s), (space_t, channels_t) = attention(s, temperature), attention(t, temperature)
    with torch.autocast(s.device.type, enabled=False):  # which would take float16 for what sums up squares
        weighted = torch.bmm(channels_t[:, None], difference.square().flatten(2))
    per_location = space_t * weighted.view(space_t.shape)
    gap = (space_s - space_t).abs().sum() + (channels_s - channels_t).abs().sum()
    return tuple(term / len(s) for term in (*((mask * per_location).sum() for mask in masks), gap))


class GlobalContext(nn.Module):
    """GcBlock: a bottleneck of the map averaged over locations with learned softmax weights.

    (N, C, h, w) -> (N, C), what the block adds to every location. Begins as zero.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 2, 1)
        self.where = nn.Linear(channels, 1, bias=False)  # a 1x1 convolution; softmax would not see a bias
        self.transform = nn.Sequential(
            nn.Linear(channels, hidden), nn.LayerNorm(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, channels)
        )
        nn.init.zeros_(self.transform[-1].weight)
        nn.init.zeros_(self.transform[-1].bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        locations = x.flatten(2)
        weights = torch.matmul(self.where.weight, locations).softmax(dim=2)  # (N, 1, h w)
        return self.transform(torch.matmul(locations, weights.transpose(1, 2).to(locations.dtype)).squeeze(2))


@DISTILL_LOSS_REGISTRY.register()
class FGD(nn.Module):
    """Sum over levels of alpha foreground + beta background + gamma attention + lambda |R_t(F_t) - R_s(F_s)|^2 / N.

    Sums over maps and means over images: the weights depend on the size of the maps. R_s and R_t are
    :class:`GlobalContext`, trained with the student.

    Args:
        alpha, beta, gamma, lam: weights of the terms; defaults for RetinaNet and GFL. Two-stage: 5e-5, 2.5e-5, 5e-5,
            5e-7; FCOS and RepPoints: 1.6e-3, 8e-4, 8e-4, 8e-6.
        temperature: of the attention.
    """

    positive = ("temperature",)
    not_negative = ("alpha", "beta", "gamma", "lam")
    needs_boxes = True
    two_stage = {"alpha": 5e-5, "beta": 2.5e-5, "gamma": 5e-5, "lam": 5e-7}

    def __init__(
        self,
        levels: list[str],
        channels: dict[str, int],
        strides: dict[str, int],
        alpha: float = 1e-3,
        beta: float = 5e-4,
        gamma: float = 5e-4,
        lam: float = 5e-6,
        temperature: float = 0.5,
    ) -> None:
        super().__init__()
        self.strides, self.temperature = strides, temperature
        self.weights = {"foreground": alpha, "background": beta, "attention": gamma, "global": lam}
        self.student_context = nn.ModuleDict({name: GlobalContext(channels[name]) for name in levels})
        self.teacher_context = nn.ModuleDict({name: GlobalContext(channels[name]) for name in levels})

    def forward(self, student: Features, teacher: Features, context: DistillContext) -> dict[str, torch.Tensor]:
        totals = dict.fromkeys(self.weights, 0.0)
        for name, s in student.items():
            t = teacher[name]
            masks = focal_masks(*context.boxes(s.device), self.strides[name], s.shape[-2:], len(s))
            ours, theirs = self.student_context[name](s), self.teacher_context[name](t)
            offset = at_least_float32(ours) - at_least_float32(theirs)
            difference = at_least_float32(s) - at_least_float32(t)
            whole = (difference + offset[:, :, None, None]).square().sum() / len(s)
            terms = (*focal_loss(s, t, difference, masks, self.temperature), whole)
            for key, term in zip(totals, terms):
                totals[key] = totals[key] + self.weights[key] * term
        return totals
