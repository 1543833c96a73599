"""Inputs for measurements: the same images in every call, at one size, without augmentation."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
from detectron2.data import transforms as T

from .low_res import to_low_res
from .regions import RegionMapper


class FixedInputs:
    """Training inputs (image and instances) of a data set; images are read when they are asked for.

    Args:
        cfg: INPUT.FORMAT, masks and keypoints of the model; DATALOADER.FILTER_EMPTY_ANNOTATIONS.
        dataset: registered name.
        images: how many at most, drawn at random by ``seed``; None: all.
        short_side: of the input in pixels.
        longest: the most that the long side may be.
        low_res: read the files of LOW_RES_IMAGES.

    Raises:
        ValueError: the data set has no image (with annotations).
    """

    def __init__(
        self, cfg: CfgNode, dataset: str, images: int | None, *, short_side: int, longest: int, seed: int = 0,
        low_res: bool = False,
    ) -> None:  # fmt: skip
        dicts = get_detection_dataset_dicts([dataset], filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
        if not dicts:
            raise ValueError(f"data set {dataset!r} has no image with annotations")
        chosen = sorted(np.random.default_rng(seed).permutation(len(dicts))[:images].tolist())
        self._dicts = [to_low_res(dicts[index]) if low_res else dicts[index] for index in chosen]
        resize = T.ResizeShortestEdge([short_side] * 2, longest)
        self._mapper = RegionMapper(DatasetMapper(cfg, True, augmentations=[resize]))

    def __len__(self) -> int:
        return len(self._dicts)

    def __getitem__(self, index: int) -> dict:
        return self._mapper(self._dicts[index])

    def __iter__(self) -> Iterator[dict]:
        return map(self._mapper, self._dicts)
