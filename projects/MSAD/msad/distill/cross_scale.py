"""The cross-scale assistant (CSA) of ScaleKD (Zhu et al., CVPR 2023, Sec. 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from torch import nn

from ..resolution import inside_images, resample
from .assistants import DISTILL_ASSISTANT_REGISTRY, Assistant
from .context import DistillContext, Features
from .losses.pairing import pair_levels

_HIDDEN = -1e4  # a score that has no weight, and fits into float16


def _tokens(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(2).transpose(1, 2)  # (N, C, h, w) -> (N, h w, C)


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor | None
) -> torch.Tensor:
    """softmax(Q K^T / sqrt d) V of (N, heads, T, d) over the keys that are ``seen``, bool (N, 1, h, w); None: all.

    A mask would keep torch from its kernels that store no scores. One more channel hides keys in any kernel; those of
    GPUs want eight.
    """
    if seen is None:
        return F.scaled_dot_product_attention(query, key, value)
    hidden = F.pad(torch.where(seen.flatten(2)[..., None], 0.0, _HIDDEN).to(key.dtype), (0, 7))
    key, scale = torch.cat([key, hidden.expand(*key.shape[:3], 8)], dim=3), query.shape[3] ** -0.5
    query, value = F.pad(query, (0, 8), value=1.0), F.pad(value, (0, 8))
    return F.scaled_dot_product_attention(query, key, value, scale=scale)[..., :-8]


class Aggregation(nn.Module):
    """MSC(., r): one token for each r x r locations, by a strided convolution, layer norm and GELU."""

    def __init__(self, in_channels: int, channels: int, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.merge = nn.Conv2d(in_channels, channels, ratio, stride=ratio)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C', h, w) -> (N, C, ceil(h / r), ceil(w / r)); the border is completed with zeros."""
        x = F.pad(x, (0, -x.shape[-1] % self.ratio, 0, -x.shape[-2] % self.ratio))
        x = self.norm(self.merge(x).permute(0, 2, 3, 1))
        return F.gelu(x).permute(0, 3, 1, 2)


class CrossScaleAttention(nn.Module):
    """Cross-attention whose heads see keys and values at different ratios of aggregation; eqs. (3) to (6).

    ``h_i = softmax(Q_i K_i^T / sqrt(d)) (V_i + P(V_i))`` with ``Q = X W_Q``, ``K_i = MSC(Y, r_i) W_K``,
    ``V_i = MSC(Y', r_i) W_V`` and P a depthwise 3x3 convolution on the map of V. The printed eq. (6) has V inside the
    softmax.

    Args:
        query_channels, key_channels, value_channels: of X, Y and Y'.
        channels: C of the output.
        heads: in all, divided evenly among ``ratios``.
        ratios: r_i, one of each group of heads.

    Raises:
        ValueError: C is no multiple of heads, or heads none of the number of ratios.
    """

    def __init__(
        self, query_channels: int, key_channels: int, value_channels: int, channels: int, heads: int,
        ratios: tuple[int, ...],
    ) -> None:  # fmt: skip
        super().__init__()
        if channels % heads or heads % len(ratios):
            raise ValueError(
                f"CrossScaleAssistant: {heads} HEADS must divide {channels} channels, and the {len(ratios)} ratios them"
            )
        self.heads, self.size = heads // len(ratios), channels // heads
        group = channels // len(ratios)
        self.query = nn.Linear(query_channels, channels)
        self.of_keys = nn.ModuleList(Aggregation(key_channels, channels, r) for r in ratios)
        self.of_values = nn.ModuleList(
            self.of_keys[i] if key_channels == value_channels else Aggregation(value_channels, channels, r)
            for i, r in enumerate(ratios)
        )
        self.keys = nn.ModuleList(nn.Linear(channels, group) for _ in ratios)
        self.values = nn.ModuleList(nn.Linear(channels, group) for _ in ratios)
        self.project = nn.ModuleList(nn.Conv2d(group, group, 3, padding=1, groups=group) for _ in ratios)
        self.output = nn.Linear(channels, channels)

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (self.heads, self.size)).transpose(1, 2)  # (N, T, group) -> (N, heads, T, d)

    def forward(
        self, x: torch.Tensor, y: torch.Tensor, values: torch.Tensor | None = None,
        extents: list[tuple[int, int]] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Queries of x (N, C_x, h, w), keys of y and values of ``values`` (default: y) -> (N, C, h, w).

        Args:
            extents: (rows, columns) of y and ``values`` that each image covers; what lies outside is padding, to which
                nothing attends. None: there is none.
        """
        queries = self.query(_tokens(x)).chunk(len(self.keys), dim=2)
        inside = None
        if extents is not None and any(extent != tuple(y.shape[-2:]) for extent in extents):
            inside = inside_images(y, extents)
            y, values = (z if z is None else z.masked_fill(~inside, 0) for z in (y, values))
        found = []
        for i, query in enumerate(queries):
            of_keys = self.of_keys[i](y)
            of_values = of_keys if values is None else self.of_values[i](values)
            key, value = self.keys[i](_tokens(of_keys)), self.values[i](_tokens(of_values))
            on_map = value.transpose(1, 2).unflatten(2, of_values.shape[-2:])
            seen = None
            if inside is not None:
                ratio = self.of_keys[i].ratio
                seen = inside[..., ::ratio, ::ratio]  # a token is of the image if its first location is
                on_map = on_map.masked_fill(~seen, 0)
            value = value + _tokens(self.project[i](on_map))
            attended = _attention(*(self._split(z) for z in (query, key, value)), seen)
            found.append(attended.transpose(1, 2).flatten(2))
        out = self.output(torch.cat(found, dim=2))
        return out.transpose(1, 2).unflatten(2, x.shape[-2:])


def _are_ratios(level: tuple) -> bool:
    return bool(level) and all(isinstance(r, int) and not isinstance(r, bool) and r > 0 for r in level)


@DISTILL_ASSISTANT_REGISTRY.register()
class CrossScaleAssistant(Assistant):
    """Refines the teacher's features for the student's grid, level by level, and is trained by the student's heads.

    Its class and box predictions, through the student's heads, are what the student is distilled from: a DISTILL.LOSSES
    entry with SOURCE: CrossScaleAssistant.

    Args:
        teacher: name of the teacher; "": the first.
        match: how levels pair, "by_index" (a teacher at twice the input) or "by_stride" (aligned).
        qkv: "eq": queries from the student, keys and values from the teacher, as in eqs. (3) to (5); "text": queries
            and keys from the teacher, values from the student, as in the text.
        heads: of each level's attention.
        ratio: of aggregation on the student's finest level: 8 where it is P3, 16 where it is P2. It halves with every
            level and doubles with the teacher's grid (QKV eq); the second half of the heads has half of it.
        ratios: of each level, finest first, a list of one ratio for each group of heads, in place of ``ratio``; as
            they are, whatever the teacher's grid.
        multiscale: False: plain attention, all ratios 1.

    Raises:
        ValueError: an unknown teacher, ``qkv`` or pairing, a level of the student without a partner, or ratios that are
            no whole numbers above 0, one list for each level.
    """

    positive = ("heads", "ratio")

    def __init__(
        self,
        student: dict[str, ShapeSpec],
        sources: dict[str, dict[str, ShapeSpec]],
        teacher: str = "",
        match: str = "by_index",
        qkv: str = "eq",
        heads: int = 8,
        ratio: int = 8,
        ratios: tuple = (),
        multiscale: bool = True,
    ) -> None:
        super().__init__()
        if qkv not in ("eq", "text"):
            raise ValueError(f"DISTILL.ASSISTANTS: CrossScaleAssistant: QKV must be 'eq' or 'text', not {qkv!r}")
        self.teacher = teacher or next(iter(sources))
        if self.teacher not in sources:
            raise ValueError(
                f"DISTILL.ASSISTANTS: CrossScaleAssistant: no teacher is named {teacher!r} ({', '.join(sources)})"
            )
        self.qkv = qkv
        theirs = sources[self.teacher]
        self.pairs = pair_levels(student, theirs, match)
        if alone := student.keys() - {pair.student for pair in self.pairs}:
            raise ValueError(
                f"DISTILL.ASSISTANTS: CrossScaleAssistant: {', '.join(sorted(alone))} of the student (H frame) has no "
                f"partner in {self.teacher} under MATCH: {match}, and its heads need all levels"
            )
        given = [tuple(level) if isinstance(level, list | tuple) else () for level in ratios]
        if ratios and (len(given) != len(self.pairs) or not all(map(_are_ratios, given))):
            raise ValueError(
                f"DISTILL.ASSISTANTS: CrossScaleAssistant: RATIOS must be {len(self.pairs)} lists of whole numbers "
                f"above 0, one for each level, not {ratios!r}"
            )
        self._shapes = {pair.student: student[pair.student] for pair in self.pairs}
        self.attention = nn.ModuleDict()
        for position, pair in enumerate(self.pairs):
            s, t = student[pair.student], theirs[pair.teacher]
            finer = max(round(s.stride / t.stride), 1) if qkv == "eq" else 1
            first = max(ratio // 2**position, 1) * finer if multiscale else 1
            own = given[position] if given and multiscale else (first, max(first // 2, 1))
            channels = (s.channels, t.channels, t.channels) if qkv == "eq" else (t.channels, t.channels, s.channels)
            self.attention[pair.student] = CrossScaleAttention(*channels, s.channels, heads, own)

    def shapes(self) -> dict[str, ShapeSpec]:
        return self._shapes

    def features(self, context: DistillContext) -> Features:
        refined = {}
        for pair in self.pairs:
            s, t = context.student[pair.student], context.sources[self.teacher][pair.teacher]
            if self.qkv == "eq":
                given, grid, stride = (s, t), t, pair.strides[1]
            else:
                t = resample(t, s.shape[-2:], pair.strides[0] / pair.strides[1])
                given, grid, stride = (t, t, s), s, pair.strides[0]
            refined[pair.student] = self.attention[pair.student](*given, extents=context.extents(grid, stride))
        return refined

    def losses(self, context: DistillContext) -> dict[str, torch.Tensor]:
        return context.run_losses(self.features(context))
