"""A student, its sources and the losses between them, as one trainable module."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Protocol

import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, ImageList
from detectron2.utils.events import get_event_storage
from torch import nn

from ..modeling.adapters import adapt
from ..modeling.features import same_statistics, tap_neck
from ..modeling.head_outputs import HeadRecord, tap_heads
from ..modeling.taps import NECK, tap, tap_shapes
from ..resolution import (
    Resolution,
    downsample_batch,
    downsampled_size,
    level_of,
    shift_levels,
    shift_names,
)
from .balance import GradientBalance
from .context import DistillContext, Features, HeadPair
from .head_pairs import check_heads, check_kind, pair_heads
from .teachers import Ensemble, FrozenTeacher


class AssistantCall(Protocol):
    """What :attr:`Distiller.assistants` has; ``read``: whether anything but the student's heads reads its features."""

    waits: bool

    def __call__(self, context: DistillContext, read: bool) -> None: ...


class Distiller(nn.Module):
    """Detection losses of a student at low resolution plus distillation losses against its sources.

    The student is any detector that has an adapter, in the frame of ``resolution``; its features are read by hooks for
    the length of a call, so no detector is edited. In evaluation mode the module is the student.

    Args:
        student: detector whose input is H downsampled by ``resolution``.
        teachers: frozen teachers; the first one initialises the student.
        losses: from :func:`msad.distill.losses.build_losses`; empty: no teacher and no assistant ever runs.
        resolution: of the student.
        ensembles: means of teachers.
        w_det: weight of the student's detection losses.
        factor: iteration -> factor on the distillation losses.
        start_iter: until then ``factor`` is 0 because distillation has not begun; assistants learn nevertheless, if
            they do not wait.
        downsample_mode: see :func:`msad.resolution.downsample`.
        balance: sets the weights of the losses, which then must have weight 1; None: they are as they are.

    Attributes:
        assistants: called with the context of each step that distils, before the losses, and unless their attribute
            ``waits`` is true of those before the first; each trains an assistant and adds its features to
            ``context.sources``.
        on_context: called with the context of each training step, after the assistants. Where there are several
            processes they must be the same in all, because teachers run for them.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Sequence[FrozenTeacher],
        losses: nn.ModuleList,
        resolution: Resolution,
        *,
        ensembles: Sequence[Ensemble] = (),
        w_det: float = 1.0,
        factor: Callable[[int], float] = lambda iteration: 1.0,
        start_iter: int = 0,
        downsample_mode: str = "antialias",
        balance: GradientBalance | None = None,
    ) -> None:
        super().__init__()
        if len(losses) and not teachers:
            raise ValueError("DISTILL.LOSSES need a teacher: DISTILL.TEACHERS is empty")
        self.student = student
        self.losses = losses
        self.teachers = list(teachers)
        self.ensembles = list(ensembles)
        self.resolution = resolution
        self.w_det = w_det
        self.factor = factor
        self.start_iter = start_iter
        self.downsample_mode = downsample_mode
        self.balance = balance
        self.assistants: list[AssistantCall] = []
        self.on_context: list[Callable[[DistillContext], None]] = []
        self._read: dict[str, dict[str, set[str]]] = defaultdict(dict)  # levels that losses read, by source and tap
        self._compares_heads = False
        for loss in losses:
            if getattr(loss.loss, "needs_boxes", False) and not adapt(student).levels:
                raise ValueError(f"DISTILL.LOSSES: {loss.name} looks at ground truth boxes, which a segmentor has not")
            if loss.tap != NECK:
                self._read["student"].setdefault(loss.tap, set()).update(pair.student for pair in loss.pairs)
                self._read[loss.source].setdefault(loss.tap, set()).update(pair.teacher for pair in loss.pairs)
            if loss.heads:
                self._check_heads(loss.source, loss.heads, loss.name)
                self._compares_heads = True

    def _check_heads(self, source: str, kinds: tuple[str, ...], loss: str) -> None:
        teacher = next((t for t in self.teachers if t.name == source), None)
        if any(ensemble.name == source for ensemble in self.ensembles) or (teacher and teacher.scale != 1):
            raise ValueError(
                f"DISTILL.LOSSES: {loss} compares predictions, which only a teacher of SCALE 1 has, not {source!r}"
            )
        if teacher:
            check_heads(self.student, teacher.detector, self.resolution.shift, kinds, loss)
        else:  # an assistant, whose features go through the student's heads
            check_kind(self.student, "student", kinds, loss)

    @property
    def teacher(self) -> FrozenTeacher | None:
        """The first teacher."""
        return self.teachers[0] if self.teachers else None

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
        iteration = get_event_storage().iter
        factor = self._current_factor(iteration)
        assistants = self._training_assistants(iteration, distils=factor is not None)
        with ExitStack() as step:
            if assistants:  # their losses are of the ground truth that the student's own are of
                step.enter_context(adapt(self.student).assign_once())
            context = self.observe(batched_inputs, distils=factor is not None or bool(assistants))
            for train in assistants:
                train(context, read=factor is not None or bool(self.on_context))
        for listen in self.on_context:
            listen(context)
        if factor is None:
            return self._with_idle_losses(context.detection)
        return {**context.detection, **self.distill(context, factor)}

    def observe(self, batched_inputs: list[dict], distils: bool = True) -> DistillContext:
        """Run the teachers (without gradients) and the student on inputs in H pixels.

        Args:
            distils: False: the teachers run for :attr:`on_context` alone, and no heads are recorded.
        """
        shift = self.resolution.shift
        inputs = [dict(item, image=item["image"].to(self.device, non_blocking=True)) for item in batched_inputs]
        small = downsample_batch(inputs, shift, self.device, self.downsample_mode)
        for item, own in zip(inputs, small):  # a teacher's branch at this resolution need not make them again
            if "low_res_image" not in item:
                item["downsampled_images"] = {(shift, self.downsample_mode): own["image"]}
        context = DistillContext(inputs, get_event_storage().iter, taps=defaultdict(dict))
        # The teachers run first: what they need is free again before the student keeps its activations.
        if distils or self.on_context:
            for teacher in self._running():
                with tap(teacher.detector, self._read[teacher.name]) as tapped:
                    context.sources[teacher.name] = teacher.features(inputs, self.max_shift)
                self._keep(context, teacher.name, tapped)
        record: HeadRecord | None = None
        with ExitStack() as step:
            if distils and self._compares_heads:
                record = step.enter_context(tap_heads(adapt(self.student).heads()))
            neck = step.enter_context(tap_neck(self.student))
            tapped = step.enter_context(tap(self.student, self._read["student"]))
            context.detection = {name: self.w_det * value for name, value in self.student(small).items()}
        self._keep(context, "student", tapped)
        context.student = shift_levels(neck, shift) if adapt(self.student).levels else {}
        for teacher in self.teachers:
            if context.sources.get(teacher.name) and teacher.shift is not None:
                features = self._on_student_grid(context.sources[teacher.name], context.student)
                context.sources[teacher.name] = features
        for ensemble in self.ensembles:
            if all(member in context.sources for member in ensemble.members):
                context.sources[ensemble.name] = ensemble.features(context.sources)
        if record is not None:
            context.pair_heads = partial(self._pair_heads, record, context.sources)
        context.run_losses = partial(self._run_losses, small)
        return context

    def _running(self) -> list[FrozenTeacher]:
        """The teachers that something of this step reads."""
        if self.on_context or self.assistants:
            return self.teachers
        read = {loss.source for loss in self.losses}
        read |= {member for ensemble in self.ensembles if ensemble.name in read for member in ensemble.members}
        return [teacher for teacher in self.teachers if teacher.name in read]

    @staticmethod
    def _keep(context: DistillContext, name: str, tapped: dict[str, Features]) -> None:
        for place, features in tapped.items():
            context.taps[place][name] = features

    def distill(self, context: DistillContext, factor: float = 1.0) -> dict[str, torch.Tensor]:
        """Weighted distillation losses of a step, times ``factor``."""
        losses = [loss(context) for loss in self.losses]
        weights = [1.0] * len(losses)
        if self.balance is not None:
            totals = [sum(terms.values()) for terms in losses]
            detection = sum(context.detection.values())
            maps = {loss.place: loss.student_maps(context) for loss in self.losses}
            weights = self.balance(context.iteration, maps, detection, totals)
        output = {}
        for terms, weight in zip(losses, weights):
            output.update({name: factor * weight * value for name, value in terms.items()})
        return output

    def _current_factor(self, iteration: int) -> float | None:
        """Factor on the distillation losses at this iteration; None: they need not run.

        In the first iteration they do, at whatever factor: what cannot be computed is to be found then. In that of
        START_ITER they do, too, because a warm-up begins there with a factor of 0 and assistants go on.
        """
        if not len(self.losses):
            return None
        factor = self.factor(iteration)
        measured = self.balance is not None and self.balance.measures(iteration)
        return factor if factor or measured or iteration in (0, self.start_iter) else None

    def _training_assistants(self, iteration: int, distils: bool) -> list[AssistantCall]:
        """All in a step that distils, those that do not wait before the first one, none when distillation has ended."""
        if distils:
            return self.assistants
        before = len(self.losses) > 0 and iteration < self.start_iter
        return [train for train in self.assistants if before and not train.waits]

    def _with_idle_losses(self, detection: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Give parameters of losses that do not run a gradient of 0: DistributedDataParallel waits for every one."""
        idle = [p.sum() for p in self.losses.parameters() if p.requires_grad]
        if not idle:
            return detection
        name, value = next(iter(detection.items()))
        return {**detection, name: value + 0.0 * sum(idle)}

    def _pair_heads(self, record: HeadRecord, sources: dict[str, Features], source: str) -> list[HeadPair]:
        teacher = next((t for t in self.teachers if t.name == source), None)
        run_head, detector = self._run_head, self.student
        if teacher is not None:
            run_head, detector = teacher.run_head, teacher.detector
        return pair_heads(record, self.student, detector, run_head, sources[source], self.resolution.shift)

    def _run_head(self, name: str, features: Features, boxes: list[Boxes]) -> tuple:
        """Output of the student's own head on features under H-frame names; boxes in H pixels."""
        shift = self.resolution.shift
        own = [Boxes(per_image.tensor / 2**shift) for per_image in boxes]
        with same_statistics(self.student):  # these features do not occur at inference
            return adapt(self.student).run_head(name, shift_levels(features, -shift), own)

    def _run_losses(self, small: list[dict], features: Features) -> dict[str, torch.Tensor]:
        """Losses of the student's heads on features under H-frame names, with the ground truth of ``small``."""
        adapter = adapt(self.student)
        images = ImageList(small[0]["image"], [tuple(item["image"].shape[-2:]) for item in small])
        own = shift_levels(features, -self.resolution.shift)
        return adapter.losses(images, own, adapter.targets(small))

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


def student_shapes(student: nn.Module, resolution: Resolution, place: str = NECK) -> dict[str, ShapeSpec]:
    """Channels and strides (H pixels) of the student at a tap; at the neck under H-frame names."""
    if place != NECK:
        return tap_shapes(student, place, 0.5**resolution.shift)
    shapes = student.backbone.output_shape()
    names = adapt(student).levels
    return {
        h_name: ShapeSpec(channels=shapes[name].channels, stride=shapes[name].stride * 2**resolution.shift)
        for name, h_name in zip(names, shift_names(names, resolution.shift))
    }
