"""Samplers that split one stream of indices over the processes of a job.

The training samplers are infinite. Every process draws the same stream from the same seed and takes each
``world_size``-th index, beginning at its rank, so nothing has to be communicated but the seed.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from detectron2.utils import comm

logger = logging.getLogger(__name__)


class _EndlessSampler(Sampler):
    """This process's share of an endless repetition of ``_epoch(generator)``."""

    def __init__(self, shuffle: bool, seed: int | None):
        self._shuffle = shuffle
        self._seed = int(comm.shared_random_seed() if seed is None else seed)
        self._rank = comm.get_rank()
        self._world_size = comm.get_world_size()

    def _epoch(self, generator: torch.Generator) -> torch.Tensor:
        """Indices of one pass, N int64; all randomness comes from ``generator``."""
        raise NotImplementedError

    def _infinite_indices(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed)
        while True:
            yield from self._epoch(generator).tolist()

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(self._infinite_indices(), self._rank, None, self._world_size)


class TrainingSampler(_EndlessSampler):
    """All of ``range(size)``, again and again, in a new random order each time (or in order).

    Args:
        size: number of samples in the data set.
        shuffle: whether to shuffle.
        seed: must agree between processes; drawn and shared when not given.
    """

    def __init__(self, size: int, shuffle: bool = True, seed: int | None = None):
        if not isinstance(size, int):
            raise TypeError(f"{type(self).__name__}: size must be an int, got {size!r}.")
        if size < 1:
            raise ValueError(f"{type(self).__name__}: there is nothing to draw from, size is {size}.")
        super().__init__(shuffle, seed)
        self._size = size

    def _epoch(self, generator: torch.Generator) -> torch.Tensor:
        if self._shuffle:
            return torch.randperm(self._size, generator=generator)
        return torch.arange(self._size)


class RandomSubsetTrainingSampler(TrainingSampler):
    """As :class:`TrainingSampler`, but over a random part of the data that stays the same all the time.

    Args:
        size: number of samples in the data set.
        subset_ratio: fraction of them to use, in (0, 1].
        shuffle, seed_shuffle: order in each pass.
        seed_subset: which samples belong to the part.
    """

    def __init__(
        self,
        size: int,
        subset_ratio: float,
        shuffle: bool = True,
        seed_shuffle: int | None = None,
        seed_subset: int | None = None,
    ):
        super().__init__(size, shuffle, seed_shuffle)
        kept = int(size * subset_ratio)
        if not (0.0 < subset_ratio <= 1.0 and kept > 0):
            raise AssertionError(f"subset_ratio={subset_ratio} of {size} samples is not a usable part.")
        seed_subset = int(comm.shared_random_seed() if seed_subset is None else seed_subset)
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed_subset))
        self._subset = order[:kept]
        logger.info("Training on %d of %d samples (seed %d).", kept, size, seed_subset)

    def _epoch(self, generator: torch.Generator) -> torch.Tensor:
        if not self._shuffle:
            return self._subset
        return self._subset[torch.randperm(len(self._subset), generator=generator)]


class RepeatFactorTrainingSampler(_EndlessSampler):
    """Each sample appears about ``repeat_factors[i]`` times in a pass (LVIS, Gupta et al. 2019, section B.2).

    The fractional part of a factor is rounded up or down at random anew in each pass.

    Args:
        repeat_factors: N floats.
        shuffle, seed: as for :class:`TrainingSampler`.
    """

    def __init__(self, repeat_factors: torch.Tensor, *, shuffle: bool = True, seed: int | None = None):
        super().__init__(shuffle, seed)
        self._whole = torch.trunc(repeat_factors)
        self._fraction = repeat_factors - self._whole

    @staticmethod
    def repeat_factors_from_category_frequency(
        dataset_dicts: list[dict], repeat_thresh: float, sqrt: bool = True
    ) -> torch.Tensor:
        """Factors that bring out rare classes.

        With f(c) the fraction of images that show class c, the class asks for ``max(1, t / f(c))`` repetitions
        (the square root of the quotient if ``sqrt``) and an image gets what its rarest class asks for.

        Args:
            dataset_dicts: samples with "annotations".
            repeat_thresh: t, classes in more than this fraction of the images are not repeated.

        Returns:
            one factor >= 1 for each sample, float32.
        """
        classes_of = [{anno["category_id"] for anno in sample["annotations"]} for sample in dataset_dicts]
        images_with = Counter(itertools.chain.from_iterable(classes_of))
        wanted = {}
        for category, count in images_with.items():
            quotient = repeat_thresh * len(dataset_dicts) / count
            wanted[category] = max(1.0, quotient**0.5 if sqrt else quotient)
        factors = [max((wanted[c] for c in classes), default=1.0) for classes in classes_of]
        return torch.tensor(factors, dtype=torch.float32)

    def _epoch(self, generator: torch.Generator) -> torch.Tensor:
        round_up = torch.rand(len(self._fraction), generator=generator) < self._fraction
        repeats = (self._whole + round_up).to(torch.int64)
        indices = torch.arange(len(repeats)).repeat_interleave(repeats)
        if not self._shuffle:
            return indices
        return indices[torch.randperm(len(indices), generator=generator)]


class InferenceSampler(Sampler):
    """This process's contiguous share of ``range(size)``, each index once over all processes.

    Shares differ by at most one in length; the first processes get the longer ones.
    """

    def __init__(self, size: int):
        if size < 1:
            raise AssertionError(f"There is nothing to run inference on, size is {size}.")
        self._indices = self._get_local_indices(size, comm.get_world_size(), comm.get_rank())

    @staticmethod
    def _get_local_indices(total_size: int, world_size: int, rank: int) -> range:
        share, longer = divmod(total_size, world_size)
        begin = rank * share + min(rank, longer)
        return range(begin, begin + share + (rank < longer))

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)
