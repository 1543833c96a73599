"""Swin Transformer (Liu et al., arXiv:2103.14030). Inside, maps have the shape (N, H, W, C)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from .backbone import Backbone

__all__ = ["SwinTransformer"]

MASKED = -100.0  # added to attention between tokens that the shift brought together


def _pad_to(x: Tensor, multiple: int) -> Tensor:
    """Zeros at the right and bottom of a (N, H, W, C) map, until its sides divide by ``multiple``."""
    bottom, right = (-side % multiple for side in x.shape[1:3])
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if bottom or right else x


def _windows(x: Tensor, size: int) -> Tensor:
    """(N, H, W, C) -> (N * windows, size * size, C), windows in row-major order."""
    n, h, w, c = x.shape
    return x.view(n, h // size, size, w // size, size, c).transpose(2, 3).reshape(-1, size * size, c)


def _unwindow(windows: Tensor, size: int, h: int, w: int) -> Tensor:
    """Inverse of :func:`_windows`."""
    channels = windows.shape[-1]
    return windows.view(-1, h // size, w // size, size, size, channels).transpose(2, 3).reshape(-1, h, w, channels)


def _shift_mask(h: int, w: int, size: int, shift: int, device: torch.device) -> Tensor:
    """(windows, size^2, size^2): 0 between tokens that were neighbours before the shift, else :data:`MASKED`."""
    def regions(side: int) -> Tensor:
        position = torch.arange(side, device=device)
        return (position >= side - size).long() + (position >= side - shift).long()

    region = regions(h)[:, None] * 3 + regions(w)
    region = _windows(region.view(1, h, w, 1), size).squeeze(-1)
    return (region[:, None, :] != region[:, :, None]) * MASKED


class _PatchEmbed(nn.Module):
    def __init__(self, patch_size: tuple[int, int], in_channels: int, dim: int, norm_layer: Callable | None):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        self.norm = norm_layer(dim) if norm_layer else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, ceil(H / patch), ceil(W / patch), dim)."""
        bottom, right = (-side % patch for side, patch in zip(x.shape[2:], self.patch_size))
        if bottom or right:
            x = F.pad(x, (0, right, 0, bottom))
        x = self.proj(x).permute(0, 2, 3, 1)
        return x if self.norm is None else self.norm(x)


class _WindowAttention(nn.Module):
    """Multi-head self-attention within windows, with a learnt bias by relative position (Sec. 3.2)."""

    def __init__(
        self, dim: int, window_size: int, num_heads: int, qkv_bias: bool, qk_scale: float | None, attn_drop: float,
        proj_drop: float,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"SwinTransformer: {dim} channels do not divide by {num_heads} heads")
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        span = 2 * window_size - 1
        self.relative_position_bias_table = nn.Parameter(torch.zeros(span * span, num_heads))
        axis = torch.arange(window_size)
        y, x = axis.repeat_interleave(window_size), axis.repeat(window_size)
        dy, dx = (p[:, None] - p[None, :] + window_size - 1 for p in (y, x))  # query minus key
        self.register_buffer("relative_position_index", dy * span + dx)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(attn_drop), nn.Dropout(proj_drop)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """
        Args:
            x: (N * windows, tokens, C).
            mask: (windows, tokens, tokens), added to the attention.
        """
        count, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(count, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attention = (q * self.scale) @ k.transpose(-2, -1)
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        attention = attention + bias.view(tokens, tokens, -1).permute(2, 0, 1)
        if mask is not None:
            by_window = attention.view(-1, len(mask), self.num_heads, tokens, tokens)
            attention = (by_window + mask[:, None].to(attention.dtype)).view(attention.shape)
        attention = self.attn_drop(attention.softmax(dim=-1))
        return self.proj_drop(self.proj((attention @ v).transpose(1, 2).reshape(count, tokens, dim)))


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, drop: float):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class _Block(nn.Module):
    """Attention and MLP with normalisation before each; ``shift`` moves the windows by so many tokens."""

    def __init__(
        self, dim: int, num_heads: int, window_size: int, shift: int, mlp_ratio: float, qkv_bias: bool,
        qk_scale: float | None, drop: float, attn_drop: float, drop_path: float, norm_layer: Callable,
    ):
        super().__init__()
        self.window_size = window_size
        self.shift = shift
        self.norm1 = norm_layer(dim)
        self.attn = _WindowAttention(dim, window_size, num_heads, qkv_bias, qk_scale, attn_drop, drop)
        self.drop_path = StochasticDepth(drop_path, "row") if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = _Mlp(dim, int(dim * mlp_ratio), drop)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(N, H, W, C) -> the same shape; ``mask`` is that of the padded map if the block is shifted, else None."""
        h, w = x.shape[1:3]
        # Padding comes after the normalisation: its tokens are zero, and attended to.
        y = _pad_to(self.norm1(x), self.window_size)
        padded = y.shape[1:3]
        if self.shift:
            y = y.roll((-self.shift, -self.shift), dims=(1, 2))
        y = _unwindow(self.attn(_windows(y, self.window_size), mask), self.window_size, *padded)
        if self.shift:
            y = y.roll((self.shift, self.shift), dims=(1, 2))
        x = x + self.drop_path(y[:, :h, :w])
        return x + self.drop_path(self.mlp(self.norm2(x)))


class _PatchMerging(nn.Module):
    """Halves a map: four neighbours to one token of twice the channels."""

    def __init__(self, dim: int, norm_layer: Callable):
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = norm_layer(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> (N, ceil(H / 2), ceil(W / 2), 2C)."""
        x = _pad_to(x, 2)
        neighbours = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(neighbours, dim=-1)))


class _Stage(nn.Module):
    """Blocks of one resolution, every second one shifted by half a window, and the way down to the next."""

    def __init__(
        self, dim: int, depth: int, num_heads: int, window_size: int, drop_path: Sequence[float], norm_layer: Callable,
        last: bool, use_checkpoint: bool, **block_options,
    ):
        super().__init__()
        self.window_size = window_size
        self.shift = window_size // 2
        self.use_checkpoint = use_checkpoint
        self.blocks = nn.ModuleList(
            _Block(
                dim, num_heads, window_size, i % 2 * self.shift, drop_path=drop_path[i], norm_layer=norm_layer,
                **block_options,
            )
            for i in range(depth)
        )
        self.downsample = None if last else _PatchMerging(dim, norm_layer)

    def forward(self, x: Tensor) -> Tensor:
        h, w = (-(-side // self.window_size) * self.window_size for side in x.shape[1:3])
        mask = None
        if self.shift and len(self.blocks) > 1:
            mask = _shift_mask(h, w, self.window_size, self.shift, x.device)
        for block in self.blocks:
            inputs = (x, mask if block.shift else None)
            x = checkpoint(block, *inputs, use_reentrant=False) if self.use_checkpoint else block(*inputs)
        return x


class SwinTransformer(Backbone):
    """Swin Transformer as a backbone: maps "p0" to "p3" of strides 4 to 32, each through a LayerNorm of its own.

    Args:
        pretrain_img_size: pixels of a side (or both) of the images that ``ape`` was trained on.
        patch_size: pixels of a token's side.
        embed_dim: channels of "p0"; each later map has twice as many.
        depths, num_heads: number of blocks and of heads in each stage.
        window_size: side of an attention window, in tokens.
        mlp_ratio: hidden channels of the MLP to those of the map.
        qkv_bias, qk_scale: whether queries, keys and values have a bias; scale of the queries, default d_head^-1/2.
        drop_rate, attn_drop_rate: dropout after projections and of the attention.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0.
        norm_layer: channels -> normalisation of the last axis.
        ape: add an absolute position embedding to the patches.
        patch_norm: normalise the embedded patches.
        out_indices: stages whose map is returned.
        frozen_stages: >= 0 freezes the patch embedding, >= 1 also ``ape``, >= 2 also the first ``frozen_stages - 1``
            stages.
        use_checkpoint: compute the blocks again in the backward pass instead of keeping their activations.
    """

    def __init__(
        self, pretrain_img_size=224, patch_size=4, in_chans=3, embed_dim=96, depths=(2, 2, 6, 2),
        num_heads=(3, 6, 12, 24), window_size=7, mlp_ratio=4.0, qkv_bias=True, qk_scale=None, drop_rate=0.0,
        attn_drop_rate=0.0, drop_path_rate=0.2, norm_layer=nn.LayerNorm, ape=False, patch_norm=True,
        out_indices=(0, 1, 2, 3), frozen_stages=-1, use_checkpoint=False,
    ):
        super().__init__()
        if len(depths) != len(num_heads):
            raise ValueError(f"SwinTransformer: depths {list(depths)} and num_heads {list(num_heads)} differ in length")
        if not out_indices or not all(0 <= i < len(depths) for i in out_indices):
            raise ValueError(f"SwinTransformer: out_indices {list(out_indices)} must name some of {len(depths)} stages")
        if frozen_stages > len(depths) + 1:
            raise ValueError(f"SwinTransformer: frozen_stages {frozen_stages} freezes more than {len(depths)} stages")
        self.out_indices = tuple(out_indices)
        self.num_features = [embed_dim << i for i in range(len(depths))]
        patch = _pair(patch_size)
        self.patch_embed = _PatchEmbed(patch, in_chans, embed_dim, norm_layer if patch_norm else None)
        self.absolute_pos_embed = None
        if ape:
            size = [side // p for side, p in zip(_pair(pretrain_img_size), patch)]
            self.absolute_pos_embed = nn.Parameter(torch.zeros(1, embed_dim, *size))
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)
        self.pos_drop = nn.Dropout(drop_rate)
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        self.layers = nn.ModuleList(
            _Stage(
                dim, depth, heads, window_size, rate.tolist(), norm_layer, last=i == len(depths) - 1,
                use_checkpoint=use_checkpoint, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, qk_scale=qk_scale,
                drop=drop_rate, attn_drop=attn_drop_rate,
            )
            for i, (dim, depth, heads, rate) in enumerate(zip(self.num_features, depths, num_heads, rates))
        )
        for i in self.out_indices:
            self.add_module(f"norm{i}", norm_layer(self.num_features[i]))
        self._out_features = [f"p{i}" for i in self.out_indices]
        self._out_feature_channels = {f"p{i}": self.num_features[i] for i in self.out_indices}
        self._out_feature_strides = {f"p{i}": 4 << i for i in self.out_indices}
        self.apply(_init_weights)
        self._freeze(frozen_stages)

    @property
    def size_divisibility(self) -> int:
        """Sides need not divide by 32 here, but those of the maps must halve exactly for an FPN."""
        return 32

    def _freeze(self, stages: int) -> None:
        frozen: list[nn.Module] = [self.patch_embed] if stages >= 0 else []
        if stages >= 1 and self.absolute_pos_embed is not None:
            self.absolute_pos_embed.requires_grad_(False)
        if stages >= 2:
            frozen += [self.pos_drop, *self.layers[: stages - 1]]
        for module in frozen:
            module.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, in_chans, H, W) -> {"p0": (N, embed_dim, H/4, W/4), ...}, sides rounded up."""
        x = self.patch_embed(x)
        if self.absolute_pos_embed is not None:
            size = x.shape[1:3]
            embedding = F.interpolate(self.absolute_pos_embed, size=size, mode="bicubic", align_corners=False)
            x = x + embedding.permute(0, 2, 3, 1)
        x = self.pos_drop(x)
        outputs = {}
        for i, stage in enumerate(self.layers[: max(self.out_indices) + 1]):
            x = stage(x)
            if i in self.out_indices:
                normed = getattr(self, f"norm{i}")(x)
                outputs[f"p{i}"] = normed.permute(0, 3, 1, 2).contiguous()
            if i < max(self.out_indices):
                x = stage.downsample(x)
        return outputs


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
