"""Dataset wrappers between a list of samples and a data loader."""

from __future__ import annotations

import copy
import logging
import pickle
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.utils.data as torchdata

from detectron2.utils.serialize import PicklableWrapper

logger = logging.getLogger(__name__)

_WARN_AFTER_RETRIES = 3


class _PickledList:
    """A read-only list kept as one tensor of bytes.

    Python objects that are merely read are written to by reference counting, so that each worker process would
    end up with its own copy of the list. Tensors stay shared, however the workers are started.
    """

    def __init__(self, items: list):
        pickles = [pickle.dumps(item, protocol=-1) for item in items]
        lengths = torch.tensor([0, *map(len, pickles)], dtype=torch.int64)
        self._bounds = torch.cumsum(lengths, dim=0)
        self._bytes = torch.from_numpy(np.frombuffer(b"".join(pickles), dtype=np.uint8).copy())
        logger.info("Packed %d samples into %.2f MiB.", len(items), self._bytes.numel() / 2**20)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> Any:
        index = range(len(self))[index]
        begin, end = self._bounds[index : index + 2].tolist()
        return pickle.loads(memoryview(self._bytes[begin:end].numpy()))


class DatasetFromList(torchdata.Dataset):
    """A list as a data set.

    Args:
        lst: the samples.
        copy: return a deep copy of each sample, so that the list cannot be changed through it. Only matters
            without serialization.
        serialize: keep the samples pickled in memory that worker processes share. A function is called with
            the list and must return what to read the samples from.
    """

    def __init__(self, lst: list, copy: bool = True, serialize: bool | Callable = True):
        if serialize:
            self._samples = serialize(lst) if callable(serialize) else _PickledList(lst)
        else:
            self._samples = lst
        self._copy = copy and not serialize

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, idx: int) -> Any:
        sample = self._samples[idx]
        return copy.deepcopy(sample) if self._copy else sample


class _MappedIterable(torchdata.IterableDataset):
    def __init__(self, dataset: Iterable, map_func: Callable):
        self._dataset = dataset
        self._map_func = PicklableWrapper(map_func)

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator:
        mapped = (self._map_func(sample) for sample in self._dataset)
        return (sample for sample in mapped if sample is not None)


class MapDataset(torchdata.Dataset):
    """Apply ``map_func`` to the samples of a data set.

    Where the function returns None (an image without usable annotations, say), another sample, drawn among
    those not known to fail, takes its place. Iterable data sets skip such samples; for them this class returns
    an iterable.
    """

    def __new__(cls, dataset, map_func):
        if isinstance(dataset, torchdata.IterableDataset):
            return _MappedIterable(dataset, map_func)
        return super().__new__(cls)

    def __getnewargs__(self):
        return self._dataset, self._map_func

    def __init__(self, dataset: torchdata.Dataset, map_func: Callable):
        self._dataset = dataset
        self._map_func = PicklableWrapper(map_func)
        self._usable = set(range(len(dataset)))
        self._rng = random.Random(42)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, idx: int) -> Any:
        sample = self._mapped(int(idx))
        failures = 0
        while sample is None:
            failures += 1
            if not self._usable:
                raise RuntimeError("The mapper returned None for every sample of the data set.")
            if failures >= _WARN_AFTER_RETRIES:
                logger.warning("The mapper returned None %d times in a row for sample %d.", failures, idx)
            sample = self._mapped(self._rng.choice(sorted(self._usable)))
        return sample

    def _mapped(self, index: int) -> Any:
        sample = self._map_func(self._dataset[index])
        remember = self._usable.discard if sample is None else self._usable.add
        remember(index)
        return sample


class ToIterableDataset(torchdata.IterableDataset):
    """Samples of a map-style data set in the order of a sampler, as an iterable.

    Args:
        dataset: map-style data set.
        sampler: yields its indices.
        shard_sampler: the sampler yields the same in every worker process, so each worker takes its part.
        shard_chunk_size: how many consecutive samples go to one worker. With the batch size, each batch is
            made by one worker and batches come out as without workers.
    """

    def __init__(
        self,
        dataset: torchdata.Dataset,
        sampler: torchdata.Sampler,
        shard_sampler: bool = True,
        shard_chunk_size: int = 1,
    ):
        if isinstance(dataset, torchdata.IterableDataset):
            raise AssertionError(f"{type(dataset).__name__} is iterable already.")
        if not isinstance(sampler, torchdata.Sampler):
            raise AssertionError(f"Expected a torch Sampler, got {type(sampler).__name__}.")
        self.dataset, self.sampler = dataset, sampler
        self.shard_sampler, self.shard_chunk_size = shard_sampler, shard_chunk_size

    def __iter__(self) -> Iterator:
        worker = torchdata.get_worker_info() if self.shard_sampler else None
        for position, index in enumerate(self.sampler):
            chunk = position // self.shard_chunk_size
            if worker is None or chunk % worker.num_workers == worker.id:
                yield self.dataset[index]

    def __len__(self) -> int:
        return len(self.sampler)


class AspectRatioGroupedDataset(torchdata.IterableDataset):
    """Batches in which either all images are wide or none is, which saves padding.

    Args:
        dataset: iterable over dicts with "width" and "height".
        batch_size: number of samples in each batch. Samples that do not fill a batch are never returned.
    """

    def __init__(self, dataset: Iterable[dict], batch_size: int):
        self.dataset = dataset
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[dict]]:
        waiting: dict[bool, list[dict]] = {True: [], False: []}
        for sample in self.dataset:
            is_wide = sample["width"] > sample["height"]
            waiting[is_wide].append(sample)
            if len(waiting[is_wide]) == self.batch_size:
                yield waiting[is_wide]
                waiting[is_wide] = []
