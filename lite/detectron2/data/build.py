"""Data loaders, from a config or from explicit arguments."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.data as torchdata

from detectron2.config import configurable
from detectron2.utils.comm import get_world_size
from detectron2.utils.env import seed_all_rng

from .common import AspectRatioGroupedDataset, DatasetFromList, MapDataset, ToIterableDataset
from .dataset_dicts import (
    filter_images_with_few_keypoints,
    filter_images_with_only_crowd_annotations,
    get_detection_dataset_dicts,
    load_proposals_into_dataset,
    print_instances_class_histogram,
)
from .dataset_mapper import DatasetMapper
from .samplers import InferenceSampler, RandomSubsetTrainingSampler, RepeatFactorTrainingSampler, TrainingSampler

__all__ = [
    "build_batch_data_loader",
    "build_detection_test_loader",
    "build_detection_train_loader",
    "filter_images_with_few_keypoints",
    "filter_images_with_only_crowd_annotations",
    "get_detection_dataset_dicts",
    "load_proposals_into_dataset",
    "print_instances_class_histogram",
    "trivial_batch_collator",
    "worker_init_reset_seed",
]

logger = logging.getLogger(__name__)


def trivial_batch_collator(batch: list) -> list:
    """Leave a batch as the list that it is; models take lists of dicts."""
    return batch


def _only_item(batch: list) -> Any:
    return batch[0]


def worker_init_reset_seed(worker_id: int) -> None:
    """Give each worker process its own seed for Python, numpy and torch."""
    seed_all_rng(torch.initial_seed() % 2**31 + worker_id)


def build_batch_data_loader(
    dataset,
    sampler: torchdata.Sampler | None,
    total_batch_size: int,
    *,
    aspect_ratio_grouping: bool = False,
    num_workers: int = 0,
    collate_fn: Callable[[list], Any] | None = None,
    drop_last: bool = True,
    single_gpu_batch_size: int | None = None,
    prefetch_factor: int = 2,
    persistent_workers: bool = False,
    pin_memory: bool = False,
    seed: int | None = None,
    **kwargs,
):
    """An iterable over this process's batches.

    Args:
        dataset: map-style, or iterable (then ``sampler`` must be None).
        sampler: yields this process's indices.
        total_batch_size: over all processes.
        aspect_ratio_grouping: keep wide and tall images apart. Samples need "width" and "height".
        num_workers: processes that load data.
        collate_fn: from a list of samples to a batch; keeps the list when not given.
        drop_last: drop an incomplete last batch. With grouping it is always dropped.
        single_gpu_batch_size: batch size of one process, instead of ``total_batch_size``.
        prefetch_factor, persistent_workers, pin_memory: as in torch's DataLoader.
        seed: of the workers' random numbers.
        **kwargs: further arguments of torch's DataLoader.
    """
    if single_gpu_batch_size:
        if total_batch_size:
            raise ValueError("Give either total_batch_size or single_gpu_batch_size, not both.")
        batch_size = single_gpu_batch_size
    else:
        processes = get_world_size()
        if total_batch_size <= 0 or total_batch_size % processes:
            raise AssertionError(
                f"The total batch size {total_batch_size} cannot be split evenly over {processes} processes."
            )
        batch_size = total_batch_size // processes
    if isinstance(dataset, torchdata.IterableDataset):
        _refuse_sampler(sampler)
    else:
        # A worker makes whole batches, so that batches are the same however many workers there are.
        dataset = ToIterableDataset(dataset, sampler, shard_chunk_size=batch_size)
    options = {
        "num_workers": num_workers,
        "worker_init_fn": worker_init_reset_seed,
        "prefetch_factor": prefetch_factor if num_workers > 0 else None,
        "persistent_workers": persistent_workers,
        "pin_memory": pin_memory,
        "generator": None if seed is None else torch.Generator().manual_seed(seed),
        **kwargs,
    }
    if not aspect_ratio_grouping:
        collate_fn = collate_fn or trivial_batch_collator
        return torchdata.DataLoader(
            dataset, batch_size=batch_size, drop_last=drop_last, collate_fn=collate_fn, **options
        )
    singles = torchdata.DataLoader(dataset, batch_size=1, collate_fn=_only_item, **options)
    batches = AspectRatioGroupedDataset(singles, batch_size)
    return batches if collate_fn is None else MapDataset(batches, collate_fn)


def _mapped(dataset, mapper: Callable[[dict], Any] | None):
    """A list or data set as a data set of what ``mapper`` makes of its samples."""
    if isinstance(dataset, list):
        dataset = DatasetFromList(dataset, copy=False)
    return dataset if mapper is None else MapDataset(dataset, mapper)


def _refuse_sampler(sampler) -> None:
    if sampler is not None:
        raise AssertionError("An iterable data set has its own order: sampler must be None.")


def _training_sampler(cfg, dataset) -> torchdata.Sampler:
    """The sampler that ``DATALOADER.SAMPLER_TRAIN`` names.

    ``SEED`` orders the samples even at its default of -1, so two runs of a config see the same order.
    """
    options, size = cfg.DATALOADER, len(dataset)
    name = options.SAMPLER_TRAIN
    logger.info("Training sampler: %s", name)
    if name == "TrainingSampler":
        return TrainingSampler(size, seed=cfg.SEED)
    if name == "RandomSubsetTrainingSampler":
        return RandomSubsetTrainingSampler(size, options.RANDOM_SUBSET_RATIO)
    if name == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dataset, options.REPEAT_THRESHOLD, sqrt=options.REPEAT_SQRT
        )
        return RepeatFactorTrainingSampler(factors, seed=cfg.SEED)
    raise ValueError(
        f"DATALOADER.SAMPLER_TRAIN must be TrainingSampler, RandomSubsetTrainingSampler or "
        f"RepeatFactorTrainingSampler, got {name!r}."
    )


def _train_loader_from_config(cfg, mapper=None, *, dataset=None, sampler=None) -> dict:
    arguments = {
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "aspect_ratio_grouping": cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        "total_batch_size": cfg.SOLVER.IMS_PER_BATCH,
        "mapper": DatasetMapper(cfg, True) if mapper is None else mapper,
    }
    if dataset is None:
        min_keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
        proposal_files = cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None
        filter_empty = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
        dataset = get_detection_dataset_dicts(cfg.DATASETS.TRAIN, filter_empty, min_keypoints, proposal_files)
    if sampler is None and not isinstance(dataset, torchdata.IterableDataset):
        sampler = _training_sampler(cfg, dataset)
    return {**arguments, "dataset": dataset, "sampler": sampler}


@configurable(from_config=_train_loader_from_config)
def build_detection_train_loader(
    dataset,
    *,
    mapper: Callable[[dict], Any] | None,
    sampler: torchdata.Sampler | None = None,
    total_batch_size: int,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
    collate_fn: Callable[[list], Any] | None = None,
    **kwargs,
):
    """An endless iterable over training batches.

    Call it with a config, ``build_detection_train_loader(cfg, mapper=None, ...)``, or with explicit arguments.

    Args:
        dataset: a list of samples, or a map-style or iterable data set.
        mapper: from a sample to what the model takes, e.g. :class:`DatasetMapper`; None changes nothing.
        sampler: order of the samples, a :class:`TrainingSampler` when not given.
        total_batch_size, aspect_ratio_grouping, num_workers, collate_fn, **kwargs: see
            :func:`build_batch_data_loader`.
    """
    dataset = _mapped(dataset, mapper)
    if isinstance(dataset, torchdata.IterableDataset):
        _refuse_sampler(sampler)
    elif sampler is None:
        sampler = TrainingSampler(len(dataset))
    elif not isinstance(sampler, torchdata.Sampler):
        raise AssertionError(f"sampler must be a torch Sampler, got {type(sampler).__name__}.")
    kwargs.update(num_workers=num_workers, collate_fn=collate_fn, aspect_ratio_grouping=aspect_ratio_grouping)
    return build_batch_data_loader(dataset, sampler, total_batch_size, **kwargs)


def _test_loader_from_config(cfg, dataset_name: str | list[str], mapper=None) -> dict:
    names = [dataset_name] if isinstance(dataset_name, str) else list(dataset_name)
    proposal_files = None
    if cfg.MODEL.LOAD_PROPOSALS:
        files = dict(zip(cfg.DATASETS.TEST, cfg.DATASETS.PROPOSAL_FILES_TEST, strict=True))
        proposal_files = [files[name] for name in names]
    dataset = get_detection_dataset_dicts(names, filter_empty=False, proposal_files=proposal_files)
    return {
        "dataset": dataset,
        "mapper": DatasetMapper(cfg, False) if mapper is None else mapper,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "sampler": None if isinstance(dataset, torchdata.IterableDataset) else InferenceSampler(len(dataset)),
    }


@configurable(from_config=_test_loader_from_config)
def build_detection_test_loader(
    dataset,
    *,
    mapper: Callable[[dict], Any],
    sampler: torchdata.Sampler | None = None,
    batch_size: int = 1,
    num_workers: int = 0,
    collate_fn: Callable[[list], Any] | None = None,
) -> torchdata.DataLoader:
    """A loader that visits each sample once, split over the processes of the job.

    Call it with a config, ``build_detection_test_loader(cfg, dataset_name, mapper=None)``, or with explicit
    arguments.

    Args:
        dataset: a list of samples, or a map-style or iterable data set.
        mapper: from a sample to what the model takes.
        sampler: order of the samples, an :class:`InferenceSampler` when not given.
        batch_size: of one process.
        num_workers, collate_fn: see :func:`build_batch_data_loader`.
    """
    dataset = _mapped(dataset, mapper)
    if isinstance(dataset, torchdata.IterableDataset):
        _refuse_sampler(sampler)
    elif sampler is None:
        sampler = InferenceSampler(len(dataset))
    collate_fn = collate_fn or trivial_batch_collator
    return torchdata.DataLoader(dataset, batch_size, sampler=sampler, num_workers=num_workers, collate_fn=collate_fn)
