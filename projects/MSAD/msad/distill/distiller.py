"""A student, its frozen teacher and the losses between them, as one trainable module."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from detectron2.layers import ShapeSpec
from detectron2.utils.events import get_event_storage
from torch import nn

from ..modeling.adapters import Features, adapt
from ..modeling.features import run_neck, tap_neck
from ..modeling.head_outputs import tap_heads
from ..resolution import (
    Resolution,
    batch_images,
    downsample_batch,
    downsampled_size,
    level_of,
    pad_divisibility,
    shift_levels,
    shift_names,
)
from .balance import GradientBalance
from .head_pairs import check_heads, pair_heads
from .losses import DistillBatch

logger = logging.getLogger(__name__)


class FrozenTeacher:
    """A teacher that cannot change: outside every module tree, without gradients, always in evaluation mode.

    It is deliberately not an ``nn.Module``: assigned to a module it stays invisible to ``train()``, ``state_dict()``,
    ``parameters()``, optimizers and DistributedDataParallel.

    Args:
        model: a MultiScaleTeacher or a detector in the H frame.
        batch_norm: "eval" (running statistics) or "batch" (statistics of the batch, buffers untouched).
        reverse_channels: images are in the other order, RGB for BGR, than the model's.
    """

    def __init__(self, model: nn.Module, batch_norm: str = "eval", reverse_channels: bool = False) -> None:
        if batch_norm not in ("eval", "batch"):
            raise ValueError(f"DISTILL.TEACHER_BN must be 'eval' or 'batch', not {batch_norm!r}")
        self.model = model.eval().requires_grad_(False)
        self.reverse_channels = reverse_channels
        if batch_norm == "batch":
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    # Without tracking, train mode normalises by the batch and leaves the buffers alone; so does a
                    # synchronised BatchNorm that updates them by itself, if the update has no weight.
                    module.track_running_stats = False
                    module.momentum = 0.0
                    module.train()

    @property
    def detector(self) -> nn.Module:
        """The detector itself, inside a multi-resolution teacher or not."""
        return getattr(self.model, "detector", self.model)

    def shapes(self) -> dict[str, ShapeSpec]:
        """Levels that can be imitated, H-frame names, strides in H pixels."""
        shapes = self.detector.backbone.output_shape()
        return {name: shapes[name] for name in adapt(self.detector).levels}

    @torch.no_grad()
    def features(self, batched_inputs: list[dict], max_shift: int) -> Features:
        """Maps to imitate, level l: (N, C, h_l, w_l), on the grid of H padded for branches up to ``max_shift``."""
        if self.reverse_channels:
            batched_inputs = [_with_reversed_channels(item) for item in batched_inputs]
        if hasattr(self.model, "neck_features"):
            return self.model.neck_features(batched_inputs, max_shift)
        detector = self.model
        device = detector.pixel_mean.device
        images = batch_images(
            [item["image"].to(device, non_blocking=True) for item in batched_inputs],
            detector.pixel_mean,
            detector.pixel_std,
            pad_divisibility(max(detector.backbone.size_divisibility, 1), 0, max_shift),
        )
        return run_neck(detector.backbone, images.tensor, adapt(detector).levels)


def _with_reversed_channels(item: dict) -> dict:
    """A model input whose images (3, h, w), also those that are reduced already, have their channels turned round."""
    reduced = {key: image.flip(0) for key, image in item.get("downsampled_images", {}).items()}
    return dict(item, image=item["image"].flip(0), downsampled_images=reduced)


class Distiller(nn.Module):
    """Detection losses of a student at low resolution plus distillation losses against a frozen teacher.

    The student is a dense detector or an R-CNN in the frame of ``resolution``; its pyramid is tapped by a hook for the
    length of a call, so no detector is edited. In evaluation mode the module is the student.

    Args:
        student: detector whose input is H reduced by ``resolution``.
        teacher: None, or a frozen teacher in the H frame.
        losses: from :func:`msad.distill.losses.build_losses`; empty: the teacher never runs.
        resolution: of the student.
        w_det: weight of the student's detection losses.
        factor: iteration -> factor on the distillation losses.
        downsample_mode: see :func:`msad.resolution.downsample`.
        balance: sets the weights of the losses, which then must have weight 1; None: they are as they are.

    Attributes:
        observer: None, or called with student's and teacher's maps (H-frame names, one grid) of each training step.
    """

    observer: Callable[[Features, Features], None] | None = None

    def __init__(
        self,
        student: nn.Module,
        teacher: FrozenTeacher | None,
        losses: nn.ModuleList,
        resolution: Resolution,
        *,
        w_det: float = 1.0,
        factor: Callable[[int], float] = lambda iteration: 1.0,
        downsample_mode: str = "antialias",
        balance: GradientBalance | None = None,
    ) -> None:
        super().__init__()
        if len(losses) and teacher is None:
            raise ValueError("DISTILL.LOSSES need a teacher: DISTILL.TEACHERS is empty")
        self.student = student
        self.losses = losses
        self.teacher = teacher
        self.resolution = resolution
        self.w_det = w_det
        self.factor = factor
        self.downsample_mode = downsample_mode
        self.balance = balance
        self._compares_heads = False
        for loss in losses:
            if getattr(loss, "heads", ()):
                check_heads(student, teacher.detector, resolution.shift, loss.heads, loss.name)
                self._compares_heads = True

    @property
    def device(self) -> torch.device:
        return self.student.pixel_mean.device

    @property
    def max_shift(self) -> int:
        """Shift of the smallest input that the student reads: its own, or that of a fusion student's last branch."""
        return self.resolution.shift + getattr(self.student.backbone, "max_shift", 0)

    def forward(self, batched_inputs: list[dict]) -> dict[str, torch.Tensor] | list[dict]:
        """Training: inputs in H pixels -> losses. Evaluation: the student's inputs -> the student's detections."""
        if not self.training:
            return self.student(batched_inputs)
        shift = self.resolution.shift
        moved = [dict(item, image=item["image"].to(self.device, non_blocking=True)) for item in batched_inputs]
        reduced = downsample_batch(moved, shift, self.device, self.downsample_mode)
        for item, small in zip(moved, reduced):  # the teacher's branch at this resolution need not reduce them again
            if "low_res_image" not in item:
                item["downsampled_images"] = {(shift, self.downsample_mode): small["image"]}
        factor = self._current_factor()
        # The teacher runs first: what it needs is free again before the student keeps its activations.
        wanted = factor is not None or self.observer is not None
        imitated = {} if not wanted else self.teacher.features(moved, self.max_shift)
        tap = nullcontext() if factor is None or not self._compares_heads else tap_heads(adapt(self.student).heads())
        with tap_neck(self.student) as taken, tap as record:
            output = {name: self.w_det * value for name, value in self.student(reduced).items()}
        if not wanted:
            return output
        student = shift_levels(taken, shift)
        teacher = self._on_student_grid(imitated, student)
        if self.observer is not None:
            self.observer(student, teacher)
        if factor is None:
            return output
        batch = DistillBatch(
            image_sizes=[tuple(item["image"].shape[-2:]) for item in moved],
            gt=[item["instances"] for item in moved],
            pair_heads=record and partial(pair_heads, record, self.student, self.teacher.detector, teacher, shift),
        )
        losses = [loss(student, teacher, batch) for loss in self.losses]
        weights = [1.0] * len(losses)
        if self.balance is not None:
            totals = [sum(terms.values()) for terms in losses]
            iteration = get_event_storage().iter
            weights = self.balance(iteration, list(taken.values()), sum(output.values()), totals)
        for terms, weight in zip(losses, weights):
            output.update({name: factor * weight * value for name, value in terms.items()})
        return output

    def _current_factor(self) -> float | None:
        """Factor on the distillation losses at this iteration; None: they, and so the teacher, need not be computed."""
        if not len(self.losses):
            return None
        iteration = get_event_storage().iter
        factor = self.factor(iteration)
        over = factor == 0.0 and iteration > 0 and not any(p.requires_grad for p in self.losses.parameters())
        return None if over else factor

    def _on_student_grid(self, teacher: Features, student: Features) -> Features:
        """Cut off what the teacher padded beyond the student's input; both grids begin at the image's corner."""
        finest = min(student, key=level_of)
        extent = tuple(side << level_of(finest) for side in student[finest].shape[-2:])  # padded input, H pixels
        out = {}
        for name, t in teacher.items():
            h, w = downsampled_size(extent, level_of(name))
            if name in student:
                h, w = student[name].shape[-2:]
                if t.shape[-2] < h or t.shape[-1] < w or t.shape[0] != student[name].shape[0]:
                    raise ValueError(
                        f"level {name} (H frame): teacher map {tuple(t.shape)} does not cover the student's "
                        f"{tuple(student[name].shape)}; is DISTILL.STUDENT_RESOLUTION {self.resolution.name} the "
                        "resolution that the student's levels and strides are made for?"
                    )
            out[name] = t[..., :h, :w]
        return out


def student_shapes(student: nn.Module, resolution: Resolution) -> dict[str, ShapeSpec]:
    """Levels the student's head reads under H-frame names, strides in H pixels."""
    shapes = student.backbone.output_shape()
    names = adapt(student).levels
    return {
        h_name: ShapeSpec(channels=shapes[name].channels, stride=shapes[name].stride * 2**resolution.shift)
        for name, h_name in zip(names, shift_names(names, resolution.shift))
    }
