"""Attention-guided and non-local distillation (FKD, Zhang and Ma, ICLR 2021)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..context import DistillContext, Features
from .registry import DISTILL_LOSS_REGISTRY
from .shared import at_least_float32, attention

SUBSAMPLE = (8, 4, 2, 2, 2)  # of the non-local module's keys and values, finest level first


class NonLocal(nn.Module):
    """Dot-product non-local block: x plus what every location gathers from all locations. Begins as the identity.

    Without a softmax, ``(q k^T) v = q (k^T v)``: the cost is linear in the number of locations. The products are made
    in float32 under mixed precision.

    Args:
        channels: C of the map.
        hidden: channels of queries, keys and values.
        subsample: keys and values are max-pooled by it.
    """

    def __init__(self, channels: int, hidden: int, subsample: int) -> None:
        super().__init__()
        self.subsample = subsample
        self.query, self.key, self.value = (nn.Conv2d(channels, hidden, 1) for _ in range(3))
        self.output = nn.Conv2d(hidden, channels, 1, bias=False)
        # Only ever used on batches of the training; running statistics would be state that nobody reads.
        self.norm = nn.BatchNorm2d(channels, track_running_stats=False)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, _, h, w = x.shape
        kernel = (min(self.subsample, h), min(self.subsample, w))
        query, key, value = (at_least_float32(layer(x)) for layer in (self.query, self.key, self.value))
        with torch.autocast(x.device.type, enabled=False):  # float16 is too small for products of three maps
            keys, values = (F.max_pool2d(m, kernel).flatten(2) for m in (key, value))
            relation = torch.matmul(values, keys.transpose(1, 2) / keys.shape[2])  # (N, hidden, hidden)
            out = self.output(torch.matmul(relation, query.flatten(2)).view(n, -1, h, w))
            if out.numel() == out.shape[1]:  # BatchNorm refuses a single value; two copies have the same statistics
                return x + self.norm(torch.cat([out, out]))[:1]
            return x + self.norm(out)


def length(x: torch.Tensor, per_image: bool) -> torch.Tensor:
    """Euclidean norm of a batch (N, ...): of all at once, or the mean over images."""
    norm = torch.linalg.vector_norm  # its gradient at 0 is 0
    return norm(x.flatten(1), dim=1).mean() if per_image else norm(x)


@DISTILL_LOSS_REGISTRY.register()
class FKD(nn.Module):
    """Sum over levels of a (attended features + non-local relations) + b (spatial + channel pools).

    Every term is a norm and not its square, by default of the whole batch: the loss grows with the square root of
    the number of images (of a process), as in the released code, for whose batches of two the weights were found.

    Args:
        alpha: weight a; one-stage detectors. Two-stage: 7e-5.
        beta: weight b; one-stage detectors. Two-stage: 4e-3.
        temperature: of the attention; released code: 0.1 for one-stage and 0.5 for two-stage detectors.
        channel_mask: weigh channels of the feature term by their attention, too; the released two-stage code does not.
        per_image: mean over images of norms instead, which does not depend on their number.
    """

    positive = ("temperature",)
    not_negative = ("alpha", "beta")
    two_stage = {"alpha": 7e-5, "beta": 4e-3, "temperature": 0.5, "channel_mask": False}

    def __init__(
        self,
        levels: list[str],
        channels: dict[str, int],
        student_channels: dict[str, int],
        alpha: float = 4.2e-4,
        beta: float = 2.4e-2,
        temperature: float = 0.1,
        channel_mask: bool = True,
        per_image: bool = False,
    ) -> None:
        super().__init__()
        self.alpha, self.beta, self.temperature = alpha, beta, temperature
        self.channel_mask, self.per_image = channel_mask, per_image
        self.levels = nn.ModuleDict()
        for i, name in enumerate(levels):
            s, t = student_channels[name], channels[name]
            subsample = SUBSAMPLE[min(i, len(SUBSAMPLE) - 1)]
            reduction = 4 if i < 2 else 2  # 64 of 256 channels on the two finest levels
            self.levels[name] = nn.ModuleDict(
                {
                    "feature": nn.Conv2d(s, t, 1),
                    "spatial": nn.Conv2d(1, 1, 3, padding=1),
                    "channel": nn.Linear(s, t),
                    "relation": nn.Conv2d(s, t, 1),
                    "student_nonlocal": NonLocal(s, max(s // reduction, 1), subsample),
                    "teacher_nonlocal": NonLocal(t, max(t // reduction, 1), subsample),
                }
            )

    def forward(self, student: Features, teacher: Features, context: DistillContext) -> dict[str, torch.Tensor]:
        totals = dict.fromkeys(("feature", "spatial", "channel", "relation"), 0.0)
        for name, s in student.items():
            for key, term in self._terms(self.levels[name], s, teacher[name]).items():
                totals[key] = totals[key] + term
        weights = {"feature": self.alpha, "spatial": self.beta, "channel": self.beta, "relation": self.alpha}
        return {key: weights[key] * total for key, total in totals.items()}

    def _terms(self, parts: nn.ModuleDict, s: torch.Tensor, t: torch.Tensor) -> dict[str, torch.Tensor]:
        adapted = parts["feature"](s)
        weights = self._weights(s if s.shape[1] == t.shape[1] else adapted, s, t)
        pairs = {
            "feature": (adapted, t),
            "spatial": (parts["spatial"](s.mean(dim=1, keepdim=True)), t.mean(dim=1, keepdim=True)),
            "channel": (parts["channel"](s.mean(dim=(2, 3))), t.mean(dim=(2, 3))),
            "relation": (parts["relation"](parts["student_nonlocal"](s)), parts["teacher_nonlocal"](t)),
        }
        differences = {key: at_least_float32(a) - at_least_float32(b) for key, (a, b) in pairs.items()}
        differences["feature"] = weights * differences["feature"]
        return {key: length(difference, self.per_image) for key, difference in differences.items()}

    @torch.no_grad()
    def _weights(self, s_channels: torch.Tensor, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Square root (N, C or 1, h, w) of the product of the two sides' mean spatial and mean channel attention.

        The student's channels are weighed on ``s_channels``, a map with as many channels as the teacher's.
        """
        space_s, channels_s = attention(s, self.temperature)
        if s_channels is not s:
            channels_s = attention(s_channels, self.temperature)[1]
        space_t, channels_t = attention(t, self.temperature)
        space, channels = (space_s + space_t) / 2, (channels_s + channels_t) / 2
        if not self.channel_mask:
            return space.sqrt()[:, None]
        return space.sqrt()[:, None] * channels.sqrt()[:, :, None, None]
