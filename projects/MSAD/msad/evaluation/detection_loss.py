"""The detection losses of a model by themselves, on fixed images: no teacher and no distillation loss takes part."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils.events import EventStorage
from torch import nn

from ..data.fixed import FixedInputs
from ..data.low_res import sees_low_res
from ..modeling.adapters import detector_of
from ..modeling.ignored_regions import IgnoredRegions

BATCH_SIZE = 4


def validation_loss(cfg: CfgNode, model: nn.Module, dataset: str) -> float:
    """L_detect of figure 5 of MTPD on a test set: the detection losses on TEST.LOSS_IMAGES of its images.

    Args:
        model: a detector, or a student alone, in the frame in which it is tested.
        dataset: registered name.
    """
    return DetectionLoss(fixed_batches(cfg, dataset, cfg.TEST.LOSS_IMAGES, BATCH_SIZE))(model)


def fixed_batches(cfg: CfgNode, dataset: str, images: int, batch_size: int, seed: int = 0) -> list[list[dict]]:
    """Training inputs of a data set as the model is tested on, without augmentation; the same ones for one seed.

    Args:
        images: how many at most, drawn at random.

    Raises:
        ValueError: the data set has no image with annotations.
    """
    size = {"short_side": cfg.INPUT.MIN_SIZE_TEST, "longest": cfg.INPUT.MAX_SIZE_TEST}
    inputs = list(FixedInputs(cfg, dataset, images, **size, seed=seed, low_res=sees_low_res(cfg, dataset)))
    return [inputs[i : i + batch_size] for i in range(0, len(inputs), batch_size)]


class DetectionLoss:
    """Mean of a model's detection losses over fixed batches; equal models give equal values.

    Everything random is seeded, norms use their running statistics, dropout is off. Losses that dense detectors divide
    by a running count of positives are divided by those of the batch, and the count stays what it is. Ignored regions
    are left out, whether the model was trained so or not.

    Args:
        batches: of :func:`fixed_batches`.
        on_batch: called after every batch.
    """

    def __init__(self, batches: Sequence[list[dict]], on_batch: Callable[[], Any] = lambda: None) -> None:
        self.batches = batches
        self.on_batch = on_batch

    def __call__(self, model: nn.Module) -> float:
        """The sum of the losses, mean over batches; infinite or NaN where it cannot be computed any more."""
        values = []
        with (
            training_without_noise(model), own_counts(model), ignoring_regions(model, self.batches),
            torch.no_grad(), EventStorage(), torch.random.fork_rng(),
        ):  # fmt: skip
            for number, batch in enumerate(self.batches):
                torch.manual_seed(number)
                try:
                    values.append(float(sum(model(batch).values())))
                except FloatingPointError:  # detectron2's RPN refuses proposals that are not finite
                    values.append(math.inf)
                self.on_batch()
        return float(np.mean(values))


@contextmanager
def ignoring_regions(model: nn.Module, batches: Sequence[list[dict]]) -> Iterator[None]:
    """Inside, losses leave out the ignored regions of ``batches``; where they are left out anyway nothing changes."""
    if not any(len(item.get("ignored_regions", ())) for batch in batches for item in batch):
        yield
        return
    hooks = IgnoredRegions(model)
    try:
        yield
    finally:
        hooks.remove()


@contextmanager
def own_counts(model: nn.Module) -> Iterator[None]:
    """Inside, what dense detectors keep as running means is that of the last batch alone; afterwards as before."""
    detectors = [module for module in model.modules() if isinstance(module, DenseDetector)]
    before: dict[tuple[nn.Module, str], float | None] = {}

    def take(detector: nn.Module, name: str, value: float, *_initial, **_momentum) -> float:
        before.setdefault((detector, name), vars(detector).get(name))
        setattr(detector, name, value)
        return value

    for detector in detectors:
        detector._ema_update = partial(take, detector)
    try:
        yield
    finally:
        for detector in detectors:
            del detector._ema_update
        for (detector, name), value in before.items():
            if value is None:  # it came with the first loss
                delattr(detector, name)
            else:
                setattr(detector, name, value)


@contextmanager
def training_without_noise(model: nn.Module) -> Iterator[None]:
    """Inside, the model returns losses, but backbone, norms and dropout are as in evaluation."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    detector_of(model).backbone.eval()
    for module in model.modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)):
            module.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
