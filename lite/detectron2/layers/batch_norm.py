"""Normalization layers and their lookup by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fvcore.nn.distributed import differentiable_all_reduce
from torch import Tensor, nn
from torch.nn import BatchNorm2d

_COPIED_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class FrozenBatchNorm2d(nn.Module):
    """BatchNorm2d with statistics and affine parameters that never change: a fixed map per channel.

    Everything is a buffer, named as in BatchNorm2d, so that checkpoints of either fit the other.
    A fresh layer is the identity.
    """

    _version = 3

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0 - eps)):
            self.register_buffer(name, torch.full((num_features,), value))
        # Only converted layers have a count; without one the name is absent from the state dict.
        self.register_buffer("num_batches_tracked", None)

    def forward(self, x: Tensor) -> Tensor:
        if not (x.requires_grad and torch.is_grad_enabled()):
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        # The gradient of an affine map does not need its input: unlike F.batch_norm this keeps no activation.
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        scale, shift = scale.to(x.dtype)[:, None, None], shift.to(x.dtype)[:, None, None]
        return torch.addcmul(shift, x, scale)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args, **kwargs):
        # Version 1 (and files without versions, such as converted Caffe2 models) may lack the statistics.
        if (local_metadata.get("version") or 1) < 2:
            state_dict.setdefault(prefix + "running_mean", torch.zeros_like(self.running_mean))
            state_dict.setdefault(prefix + "running_var", torch.ones_like(self.running_var))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"num_features={self.num_features}, eps={self.eps}"

    @classmethod
    def convert_frozen_batchnorm(cls, module: nn.Module) -> nn.Module:
        """Replace every BatchNorm2d and SyncBatchNorm in a module, in place, by a frozen copy.

        Returns:
            `module`, or its frozen copy if it is itself such a layer.
        """
        return _replace(module, (BatchNorm2d, nn.SyncBatchNorm), cls._from_batchnorm)

    @classmethod
    def convert_frozenbatchnorm2d_to_batchnorm2d(cls, module: nn.Module) -> nn.Module:
        """The reverse of `convert_frozen_batchnorm`: every frozen layer becomes a trainable BatchNorm2d."""
        return _replace(module, (cls,), cls._to_batchnorm)

    @classmethod
    def _from_batchnorm(cls, bn: nn.Module) -> "FrozenBatchNorm2d":
        if bn.running_mean is None:
            raise ValueError(f"{bn} tracks no running statistics, hence cannot be frozen")
        frozen = cls(bn.num_features, bn.eps).to(bn.running_mean.device)
        names = _COPIED_BUFFERS + (("weight", "bias") if bn.affine else ())
        for name in names:
            setattr(frozen, name, _copy(getattr(bn, name)))
        return frozen.train(bn.training)

    def _to_batchnorm(self) -> BatchNorm2d:
        bn = BatchNorm2d(self.num_features, self.eps)
        for name in _COPIED_BUFFERS:
            if getattr(self, name) is not None:
                setattr(bn, name, _copy(getattr(self, name)))
        bn.weight, bn.bias = nn.Parameter(_copy(self.weight)), nn.Parameter(_copy(self.bias))
        return bn.to(self.weight.device).train(self.training)


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _replace(module: nn.Module, kinds: tuple, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Replace all submodules of the given classes; returns the new root."""
    if isinstance(module, kinds):
        return make(module)
    for name, child in module.named_children():
        new = _replace(child, kinds, make)
        if new is not child:
            module.add_module(name, new)
    return module


class NaiveSyncBatchNorm(BatchNorm2d):
    """BatchNorm2d whose training statistics are those of all processes.

    Slower than nn.SyncBatchNorm, but it runs on any device and accepts empty batches. The running
    variance is updated with the biased estimate.
    """

    def __init__(self, *args, stats_mode: str = "", **kwargs):
        """
        Args:
            stats_mode: "" averages the processes' statistics with equal weight; "N" weights them by
                batch size, for batches of different (or zero) size.
        """
        super().__init__(*args, **kwargs)
        if stats_mode not in ("", "N"):
            raise ValueError(f"stats_mode must be '' or 'N', got {stats_mode!r}")
        self._stats_mode = stats_mode

    def forward(self, input: Tensor) -> Tensor:
        if not (
            self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        ):
            return super().forward(input)
        x = input.float()
        channels = x.shape[1]
        if x.numel() == 0:
            if self._stats_mode == "":
                raise ValueError("SyncBN with stats_mode='' cannot average over an empty batch; use 'N'")
            # Tied to the graph, so that this process takes part in the backward communication.
            moments = x.sum().expand(2 * channels) * 0.0
        else:
            moments = torch.cat([x.mean(dim=(0, 2, 3)), x.square().mean(dim=(0, 2, 3))])

        weight = float(len(x)) if self._stats_mode == "N" else 1.0
        packed = torch.cat([moments * weight, moments.new_full((1,), weight)])
        packed = differentiable_all_reduce(packed)
        # All batches empty: zero statistics, and the running ones stay as they are.
        total = packed[-1].detach()
        mean, square = (packed[:-1] / total.clamp(min=1)).split(channels)
        var = square - mean.square()
        self._update_running(mean.detach(), var.detach(), total)

        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return torch.addcmul(shift[:, None, None], x, scale[:, None, None]).to(input.dtype)

    def _update_running(self, mean: Tensor, var: Tensor, total: Tensor) -> None:
        momentum = self.momentum * total.clamp(max=1)
        self.running_mean += momentum * (mean - self.running_mean)
        self.running_var += momentum * (var - self.running_var)


class CycleBatchNormList(nn.ModuleList):
    """BatchNorms with own statistics and common affine parameters, used in turn by successive calls.

    For a head shared by pyramid levels whose statistics differ: the i-th call of a round takes the
    statistics of level i.
    """

    def __init__(self, length: int, bn_class: type[nn.Module] = BatchNorm2d, **kwargs):
        """
        Args:
            length: calls per round.
            bn_class: class of the BatchNorms.
            kwargs: arguments of `bn_class`: `num_features` and what else it takes.
        """
        self._affine = kwargs.pop("affine", True)
        super().__init__([bn_class(**kwargs, affine=False) for _ in range(length)])
        if self._affine:
            self.weight = nn.Parameter(torch.ones(self[0].num_features))
            self.bias = nn.Parameter(torch.zeros(self[0].num_features))
        self._next = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self[self._next](x)
        self._next = (self._next + 1) % len(self)
        if self._affine:
            x = torch.addcmul(self.bias[:, None, None], x, self.weight[:, None, None])
        return x

    def extra_repr(self) -> str:
        return f"affine={self._affine}"


class LayerNorm(nn.Module):
    """Normalization across the channels of each position of (N, C, H, W) features."""

    def __init__(self, normalized_shape: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(normalized_shape))
        self.bias = nn.Parameter(torch.zeros(normalized_shape))
        self.normalized_shape = (normalized_shape,)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        channels_last = x.permute(0, 2, 3, 1)
        out = F.layer_norm(channels_last, self.normalized_shape, self.weight, self.bias, self.eps)
        return out.permute(0, 3, 1, 2)


_NORMS = {
    "BN": BatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "nnSyncBN": nn.SyncBatchNorm,
    "naiveSyncBN": NaiveSyncBatchNorm,
    "naiveSyncBN_N": lambda channels: NaiveSyncBatchNorm(channels, stats_mode="N"),
    "FrozenBN": FrozenBatchNorm2d,
    "GN": lambda channels: nn.GroupNorm(32, channels),
    "LN": LayerNorm,
}


def get_norm(norm: str | Callable[[int], nn.Module] | None, out_channels: int) -> nn.Module | None:
    """Make a normalization layer.

    Args:
        norm: one of BN, SyncBN, nnSyncBN, naiveSyncBN, naiveSyncBN_N, FrozenBN, GN (32 groups), LN;
            or a function from the number of channels to a layer; "" or None for no layer.
        out_channels: channels that the layer gets.
    """
    if norm is None or norm == "":
        return None
    if isinstance(norm, str):
        if norm not in _NORMS:
            raise KeyError(f"Unknown normalization {norm!r}; known: {', '.join(_NORMS)}")
        norm = _NORMS[norm]
    return norm(out_channels)
