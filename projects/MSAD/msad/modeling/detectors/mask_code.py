"""A linear code for masks: principal components of the training set's (MEInst, Zhang et al., CVPR 2020)."""

from __future__ import annotations

import os
import zipfile

import numpy as np
import torch
from torch import nn

MASK_SIZE = 28  # rows and columns of a mask inside its box, as in the paper
IN_CHECKPOINT = "checkpoint"  # value of MODEL.MEINST.CODE: the weights of the model have the code, there is no file


class MaskCode(nn.Module):
    """Masks (N, s, s) to codes (N, D) and back.

    A code holds the coordinates of ``mask - mean`` along D orthonormal components, each divided by its standard
    deviation over the training masks: what a network has to predict has unit scale in every coordinate. Decoding is
    linear; values of 0.5 and more are foreground. Nothing here is trained by gradients, all of it is in checkpoints.

    Args:
        mean: (s * s,).
        components: (D, s * s), orthonormal rows, most important first.
        variance: (D,), of the training masks along the components, positive.
    """

    def __init__(self, mean: torch.Tensor, components: torch.Tensor, variance: torch.Tensor) -> None:
        super().__init__()
        side = round(len(mean) ** 0.5)
        if side**2 != len(mean) or components.shape != (len(variance), len(mean)) or not (variance > 0).all():
            raise ValueError(
                f"not a mask code: mean {tuple(mean.shape)}, components {tuple(components.shape)}, "
                f"variance {tuple(variance.shape)}"
            )
        self.mask_size = side
        for name, value in (("mean", mean), ("components", components), ("variance", variance)):
            self.register_buffer(name, value.float())

    @classmethod
    def unknown(cls, dim: int) -> MaskCode:
        """A code of ``dim`` numbers that is to be loaded from a checkpoint; until then all it gives is NaN."""
        size = MASK_SIZE**2
        return cls(torch.full((size,), torch.nan), torch.zeros(dim, size), torch.ones(dim))

    @property
    def dim(self) -> int:
        """D."""
        return len(self.variance)

    def encode(self, masks: torch.Tensor) -> torch.Tensor:
        """(N, s, s) bool or values in [0, 1] -> (N, D)."""
        with torch.autocast(self.mean.device.type, enabled=False):
            return (masks.flatten(1).to(self.mean.dtype) - self.mean) @ self.components.T / self.variance.sqrt()

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N, s, s), foreground where 0.5 or more; values are cut to [0, 1]."""
        with torch.autocast(self.mean.device.type, enabled=False):
            masks = self.mean + (codes.to(self.mean.dtype) * self.variance.sqrt()) @ self.components
        return masks.clamp(0, 1).view(-1, self.mask_size, self.mask_size)

    def distance(self, codes: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """(N, D) twice -> (N,): squared distance of the decoded (uncut) masks, in units of the mean one to the mean.

        The components are orthonormal, so that the squared distance of two masks is that of their codes with the
        variances as weights; dividing by the sum of these gives 1 on average to a code that is always zero.
        """
        return ((codes - other).square() * (self.variance / self.variance.sum())).sum(dim=1)

    def save(self, path: str | os.PathLike) -> None:
        """Write an .npz file for MODEL.MEINST.CODE."""
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        np.savez(path, **{name: value.numpy() for name, value in self.state_dict().items()})

    @classmethod
    def load(cls, path: str | os.PathLike) -> MaskCode:
        """Read the file of MODEL.MEINST.CODE.

        Raises:
            FileNotFoundError: there is none; names the tool that makes one.
            ValueError: it is something else.
        """
        how = "tools/fit_mask_code.py --config-file YAML makes one from DATASETS.TRAIN"
        if not path:
            raise FileNotFoundError(f"MODEL.MEINST.CODE is empty: MEInst needs a code for masks; {how}")
        if not os.path.isfile(path):
            raise FileNotFoundError(f"MODEL.MEINST.CODE: no file {path}; {how}")
        try:
            with np.load(path) as content:
                return cls(*(torch.from_numpy(content[name]) for name in ("mean", "components", "variance")))
        except (KeyError, OSError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"MODEL.MEINST.CODE: {path} is not a file of {how.split(' --')[0]}: {error}") from None


class MaskStatistics:
    """Mean and covariance of masks that come in portions; memory does not grow with their number."""

    def __init__(self, mask_size: int = MASK_SIZE) -> None:
        self.count = 0
        self._sum = np.zeros(mask_size**2)
        self._products = np.zeros((mask_size**2, mask_size**2))

    def add(self, masks: torch.Tensor) -> None:
        """Count (N, s, s) masks."""
        flat = masks.flatten(1).cpu().numpy().astype(np.float64)
        self.count += len(flat)
        self._sum += flat.sum(axis=0)
        self._products += flat.T @ flat

    def fit(self, dim: int) -> tuple[MaskCode, float]:
        """The code of the ``dim`` largest principal components, and the fraction of the variance that it keeps.

        Raises:
            ValueError: the masks do not vary in so many directions.
        """
        mean = self._sum / max(self.count, 1)
        variance, vectors = np.linalg.eigh(self._products / max(self.count, 1) - np.outer(mean, mean))
        variance, vectors = variance[::-1], vectors[:, ::-1]
        rank = int((variance > 1e-9 * max(variance[0], 1e-9)).sum())
        if not 0 < dim <= rank:
            raise ValueError(f"MODEL.MEINST.DIM is {dim}, but {self.count} masks vary in {rank} directions")
        components = vectors[:, :dim].T
        # A component and its negative are as good; the largest entry is made positive, so that a fit is reproducible.
        largest = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
        code = MaskCode(
            torch.from_numpy(mean), torch.from_numpy(components * np.sign(largest)),
            torch.from_numpy(variance[:dim].copy()),
        )  # fmt: skip
        return code, float(variance[:dim].sum() / variance[:rank].sum())
