"""Training loader whose batch i is a function of (data, seed, i) and nothing else.

detectron2's loader draws augmentations from generators that live in the workers, so a resumed run, or one with another
number of workers, sees other images. Here the stream of indices comes from detectron2's sampler with a fixed seed,
every sample carries its position in that stream, and its augmentations are drawn from generators seeded by
(seed, position). Resuming replays indices, which costs nothing, and loads no image that is not trained on.
"""

import contextlib
import itertools
import logging
import random
from collections.abc import Callable, Iterator

import cv2
import numpy as np
import torch
import torch.utils.data
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, DatasetMapper
from detectron2.data.build import trivial_batch_collator
from detectron2.data.detection_utils import read_image
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm

from .checks import load_train_dicts
from .image_files import inspect_images
from .low_res import FILE, low_res_mapper
from .regions import RegionMapper
from .sem_seg import crop_mapper, is_segmentation

logger = logging.getLogger(__name__)

# So many unusable images in a row are no accident.
MAX_CONSECUTIVE_FAILURES = 20


def build_train_loader(
    cfg: CfgNode, *, seed: int, start_iter: int = 0, mapper: Callable[[dict], dict] | None = None
) -> "TrainLoader":
    """The loader of ``cfg.DATASETS.TRAIN``: checked, cleaned, sampled and batched as the config says.

    Args:
        seed: not negative, and the same in every process.
        start_iter: number of batches that are passed over.
        mapper: from a dataset dict to a model input; default ``DatasetMapper(cfg, True)``, which for segmentation crops
            after resizing.

    Raises:
        ValueError, FileNotFoundError: the data and the config do not fit, see ``checks.check_data``, or the config's
            sizes of images or batches are none.
    """
    world_size = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH < 1 or cfg.SOLVER.IMS_PER_BATCH % world_size:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}; it must be a positive multiple of the number of "
            f"processes, {world_size}"
        )
    if mapper is None and cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" and len(cfg.INPUT.MIN_SIZE_TRAIN) != 2:
        raise ValueError(
            "INPUT.MIN_SIZE_TRAIN_SAMPLING range needs two sizes in INPUT.MIN_SIZE_TRAIN, the least and the greatest, "
            f"not {tuple(cfg.INPUT.MIN_SIZE_TRAIN)}"
        )
    dicts = load_train_dicts(cfg)
    if mapper is None:
        mapper = crop_mapper(cfg) if cfg.INPUT.CROP.ENABLED and is_segmentation(dicts) else DatasetMapper(cfg, True)
    mapper = low_res_mapper(cfg, mapper, dicts)
    if RegionMapper.is_needed(dicts):
        mapper = RegionMapper(mapper)
    sampler = cfg.DATALOADER.SAMPLER_TRAIN
    repeat_factors = None
    if sampler == "RepeatFactorTrainingSampler":
        repeat_factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dicts, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
        )
    elif sampler != "TrainingSampler":
        raise ValueError(
            f"DATALOADER.SAMPLER_TRAIN is {sampler!r}; supported are TrainingSampler and RepeatFactorTrainingSampler"
        )
    return TrainLoader(
        dicts,
        mapper,
        cfg.SOLVER.IMS_PER_BATCH // world_size,
        seed=seed,
        start_iter=start_iter,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        group_by_aspect=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        repeat_factors=repeat_factors,
    )


class TrainLoader:
    """Endless iterable over batches, each a list of model inputs (dicts) of this process.

    ``start_iter`` and ``seed`` can be set until the first batch is asked for: a trainer learns both from a checkpoint,
    after the loader is built. Every model input carries ``skipped``, the number of unusable images that it replaces;
    the loader's own ``skipped`` is their sum over the batches that it has yielded.
    Batches depend on the number of processes, on nothing else of how the run is carried out.

    Args:
        dicts: dataset dicts; ``width`` and ``height`` decide on the group of an image, without them its file.
        mapper: from a dataset dict to a model input; draws from torch's CPU, numpy's and Python's global generators.
        batch_size: images per batch in this process.
        group_by_aspect: do not put wide and tall images into the same batch.
        repeat_factors: (len(dicts),) how often an image comes per epoch; None: once.
    """

    def __init__(
        self,
        dicts: list[dict],
        mapper: Callable[[dict], dict],
        batch_size: int,
        *,
        seed: int,
        start_iter: int = 0,
        num_workers: int = 0,
        group_by_aspect: bool = True,
        repeat_factors: torch.Tensor | None = None,
    ) -> None:
        self._started = False
        self.seed = seed
        self.start_iter = start_iter
        self.batch_size = batch_size
        self.num_workers = num_workers
        # Serialized, so that workers share one buffer instead of copying a heap of Python objects page by page.
        self._dataset = DatasetFromList(dicts, copy=False)
        self._mapper = mapper
        self._wide = _are_wide(dicts) if group_by_aspect else [False] * len(dicts)
        self._repeat_factors = repeat_factors
        self._reported: set[str] = set()
        self.skipped = 0

    @property
    def start_iter(self) -> int:
        """Index of the first batch."""
        return self._start_iter

    @start_iter.setter
    def start_iter(self, value: int) -> None:
        self._start_iter = self._settable("start_iter", value)

    @property
    def seed(self) -> int:
        """Of the order of the images and of their augmentations."""
        return self._seed

    @seed.setter
    def seed(self, value: int) -> None:
        self._seed = self._settable("seed", value)

    def _settable(self, name: str, value: int) -> int:
        if self._started:
            raise RuntimeError(f"the loader has started; {name} cannot be changed any more")
        if value < 0:
            raise ValueError(f"{name} of the training loader must not be negative, got {value}")
        return int(value)

    def __iter__(self) -> Iterator[list[dict]]:
        # A generator: nothing below runs before the first batch is asked for.
        self._started = True
        loader = torch.utils.data.DataLoader(
            _SeededSamples(self._dataset, self._mapper, self.seed),
            batch_sampler=_Batches(self),
            num_workers=self.num_workers,
            collate_fn=trivial_batch_collator,
            worker_init_fn=_start_worker,
            # DataLoader draws a base seed on its own; not from the generator that the model uses.
            generator=torch.Generator().manual_seed(self.seed),
        )
        for batch in loader:
            for _, failures in batch:
                self._report(failures)
                self.skipped += len(failures)
            yield [sample for sample, _ in batch]

    def index_batches(self) -> Iterator[list[tuple[int, int]]]:
        """Batches of (dataset index, position in the joint stream of all processes) from ``start_iter`` on."""
        return itertools.islice(self._all_index_batches(), self.start_iter, None)

    def _all_index_batches(self) -> Iterator[list[tuple[int, int]]]:
        rank, world_size = comm.get_rank(), comm.get_world_size()
        if self._repeat_factors is None:
            sampler = TrainingSampler(len(self._dataset), seed=self.seed)
        else:
            sampler = RepeatFactorTrainingSampler(self._repeat_factors, seed=self.seed)
        # Samplers deal the joint stream out to the processes in turn.
        positions = itertools.count(rank, world_size)
        waiting: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
        for index, position in zip(sampler, positions):
            group = waiting[self._wide[index]]
            group.append((index, position))
            if len(group) == self.batch_size:
                yield group.copy()
                group.clear()

    def _report(self, failures: list[tuple[str, str]]) -> None:
        # Here and not in the workers, where each would have its own idea of what was said before.
        for file, reason in failures:
            if file not in self._reported:
                self._reported.add(file)
                logger.warning("skipped %s, used another image instead: %s", file, reason)


def _are_wide(dicts: list[dict]) -> list[bool]:
    """Whether each image is wider than tall; detectron2's mapper completes what a dict does not say."""
    unsaid = [d["file_name"] for d in dicts if not d.keys() >= {"width", "height"}]
    files = dict(zip(unsaid, inspect_images(unsaid)))
    sizes = ((f.width, f.height) if (f := files.get(d.get("file_name"))) else (d["width"], d["height"]) for d in dicts)
    return [width > height for width, height in sizes]


class _Batches:
    """Batch sampler; an object, because DataLoader asks it for a fresh iterator."""

    def __init__(self, loader: TrainLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self._loader.index_batches()


class _SeededSamples(torch.utils.data.Dataset):
    """From (index, position) to (model input, [(file, reason) of every image that could not be used]).

    Only files that cannot be decoded are replaced by the next one; a fault of annotations stops the run.
    """

    def __init__(self, dataset, mapper: Callable[[dict], dict], seed: int) -> None:
        self._dataset = dataset
        self._mapper = mapper
        self._seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[dict, list[tuple[str, str]]]:
        index, position = key
        failures: list[tuple[str, str]] = []
        for step in range(MAX_CONSECUTIVE_FAILURES + 1):
            record = self._dataset[(index + step) % len(self._dataset)]
            file = str(record.get("file_name", f"item {(index + step) % len(self._dataset)}"))
            try:
                with seeded(self._seed, position):
                    sample = self._mapper(record)
                if sample is None:
                    raise _NothingToUse("the mapper returned None")
            except MemoryError:
                raise
            except Exception as error:  # decoders raise nearly anything at a broken file
                if not isinstance(error, _NothingToUse) and _is_readable(record):
                    raise ValueError(
                        f"{file} is read without a fault, so its annotations or the augmentations are wrong: "
                        f"{type(error).__name__}: {error}"
                    ) from error
                failures.append((file, f"{type(error).__name__}: {error}"))
                last = error
                continue
            sample["skipped"] = len(failures)
            return sample, failures
        raise RuntimeError(
            f"{len(failures)} images in a row cannot be used, the last of them {file}: {failures[-1][1]}"
        ) from last


class _NothingToUse(ValueError):
    """A mapper has no use for an image."""


def _is_readable(record: dict) -> bool:
    try:
        return all(read_image(record[key], "RGB") is not None for key in ("file_name", FILE) if key in record)
    except Exception:
        return False


@contextlib.contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Seed torch's CPU, numpy's and Python's generators from ``entropy`` inside, and put their states back after."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    seeds = np.random.SeedSequence(entropy).generate_state(3)
    # CPU only: the devices' generators belong to the model, and torch.manual_seed would reset them as well.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(seeds[0]))
        np.random.seed(seeds[1])
        random.seed(int(seeds[2]))
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _start_worker(worker_id: int) -> None:
    # One thread a worker, as torch does for itself; OpenCV would start one a core in each of them.
    cv2.setNumThreads(0)
