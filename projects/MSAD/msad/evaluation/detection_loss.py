"""The detection losses of a model by themselves, on fixed images: no teacher and no distillation loss takes part."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils.events import EventStorage
from torch import nn

from ..data.fixed import FixedInputs
from ..data.low_res import reads_low_res

# What dense detectors keep outside their state_dict: the running number of positives that divides their losses.
_COUNTS = "loss_normalizer"
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
    low_res = "LOW_RES_IMAGES" in (MetadataCatalog.get(dataset).get("definition") or {}) and reads_low_res(cfg)
    inputs = list(FixedInputs(cfg, dataset, images, **size, seed=seed, low_res=low_res))
    return [inputs[i : i + batch_size] for i in range(0, len(inputs), batch_size)]


class DetectionLoss:
    """Mean of a model's detection losses over fixed batches; equal models give equal values.

    Everything random is seeded, norms use their running statistics, dropout is off, and running counts of positives
    are afterwards what they were before.

    Args:
        batches: of :func:`fixed_batches`.
        on_batch: called after every batch.
    """

    def __init__(self, batches: Sequence[list[dict]], on_batch: Callable[[], Any] = lambda: None) -> None:
        self.batches = batches
        self.on_batch = on_batch

    def __call__(self, model: nn.Module) -> float:
        """The sum of the losses, mean over batches; infinite or NaN where it cannot be computed any more."""
        counts = {module: vars(module).get(_COUNTS) for module in model.modules()}
        values = []
        with training_without_noise(model), torch.no_grad(), EventStorage(), torch.random.fork_rng():
            for number, batch in enumerate(self.batches):
                torch.manual_seed(number)
                try:
                    values.append(float(sum(model(batch).values())))
                except FloatingPointError:  # detectron2's RPN refuses proposals that are not finite
                    values.append(math.inf)
                self.on_batch()
        for module, count in counts.items():
            if count is not None:
                setattr(module, _COUNTS, count)
            elif _COUNTS in vars(module):  # it came with the first loss
                delattr(module, _COUNTS)
        return float(np.mean(values))


@contextmanager
def training_without_noise(model: nn.Module) -> Iterator[None]:
    """Inside, the model returns losses, but backbone, norms and dropout are as in evaluation."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    getattr(model, "detector", model).backbone.eval()
    for module in model.modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)):
            module.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
