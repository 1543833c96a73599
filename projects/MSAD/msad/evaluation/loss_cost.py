"""What a distillation loss costs per training step: time and peak memory on random maps, without any detector."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from detectron2.layers import ShapeSpec

from ..distill.context import DistillContext
from ..distill.losses import build_losses
from ..distill.losses.registry import WeightedLoss
from ..resolution import downsampled_size, level_of
from .cost import medians, milliseconds, random_inputs
from .memory import PeakMemory, growth_in_fresh_process


@dataclass(frozen=True)
class Setting:
    """On what losses are measured.

    Attributes:
        size: (h, w) of the images in H pixels; a student at L gets half of it and has the same maps.
        batch: number of images.
        channels: of the teacher's maps.
        student_channels: of the student's.
        levels: H-frame levels that are compared.
        boxes: ground truth boxes an image.
        divisibility: to which sides are padded, in H pixels.
        device: of maps and losses.
    """

    size: tuple[int, int] = (800, 1333)
    batch: int = 2
    channels: int = 256
    student_channels: int = 256
    levels: tuple[str, ...] = ("p3", "p4", "p5", "p6", "p7")
    boxes: int = 7
    divisibility: int = 64
    device: str = "cpu"


def make_loss(entry: dict[str, Any], setting: Setting) -> WeightedLoss:
    """The loss of a DISTILL.LOSSES entry for maps of this setting."""

    def shapes(channels: int) -> dict[str, ShapeSpec]:
        return {name: ShapeSpec(channels=channels, stride=2 ** level_of(name)) for name in setting.levels}

    student, teacher = shapes(setting.student_channels), shapes(setting.channels)
    (loss,) = build_losses([entry], lambda tap: student, {"teacher": lambda tap: teacher})
    return loss.to(setting.device)


def make_context(setting: Setting) -> DistillContext:
    """Random features of student (leaves that require a gradient) and teacher, and the images' ground truth."""
    padded = tuple(-(-side // setting.divisibility) * setting.divisibility for side in setting.size)
    generator = torch.Generator().manual_seed(0)

    def maps(channels: int) -> dict[str, torch.Tensor]:
        sizes = {name: downsampled_size(padded, level_of(name)) for name in setting.levels}
        draw = {k: torch.randn(setting.batch, channels, *size, generator=generator) for k, size in sizes.items()}
        return {name: x.to(setting.device) for name, x in draw.items()}

    student, teacher = maps(setting.student_channels), maps(setting.channels)
    inputs = random_inputs(*setting.size, setting.batch, setting.boxes)
    return DistillContext(
        inputs, student={k: v.requires_grad_() for k, v in student.items()}, sources={"teacher": teacher}
    )


def step(loss: WeightedLoss, context: DistillContext) -> None:
    """Forward and backward as far as the student's features, whose gradients are dropped again."""
    sum(loss(context).values()).backward()
    loss.zero_grad(set_to_none=True)
    for x in context.student.values():
        x.grad = None


def peak_memory(entry: dict[str, Any], setting: Setting, threads: int | None = None) -> int:
    """Bytes that a step of the loss needs at most beyond the maps and its own parameters, gradients included.

    On a GPU: of torch's allocator. On a CPU: by how much a fresh process grows.

    Raises:
        RuntimeError: that process failed; with the last line that it wrote.
    """
    if torch.device(setting.device).type == "cuda":
        loss, context = make_loss(entry, setting), make_context(setting)
        step(loss, context)  # what libraries allocate once
        memory = PeakMemory(setting.device)
        step(loss, context)
        return memory.growth()
    request = {"entry": entry, "setting": asdict(setting)}
    return growth_in_fresh_process(f"{__name__}:prepare_step", threads, **request)


def prepare_step(entry: dict[str, Any], setting: dict[str, Any]) -> Callable[[], None]:
    """For :func:`growth_in_fresh_process`: a step of the loss of ``entry``, on maps of ``Setting(**setting)``."""
    small = Setting(**{**setting, "size": (64, 64)})
    step(make_loss(entry, small), make_context(small))  # what torch loads at first use
    return functools.partial(step, make_loss(entry, Setting(**setting)), make_context(Setting(**setting)))


def step_time(loss: WeightedLoss, context: DistillContext, device: torch.device) -> float:
    """Milliseconds of :func:`step`; on a CPU processor time, to which other work on the machine adds nothing."""
    if device.type != "cpu":
        return milliseconds(lambda: step(loss, context), device)
    start = time.process_time()
    step(loss, context)
    return (time.process_time() - start) * 1e3


def loss_costs(
    entries: list[dict[str, Any]],
    setting: Setting,
    repeats: int = 5,
    warmup: int = 1,
    threads: int | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Median milliseconds, peak memory and number of trained parameters of each loss, measured in turns.

    Args:
        entries: of DISTILL.LOSSES.
        threads: of the processes in which memory is measured.
        on_step: called after everything that takes time, ``len(entries) * (1 + warmup + repeats)`` times.
    """
    losses, context, rows = [make_loss(entry, setting) for entry in entries], make_context(setting), []
    for entry, loss in zip(entries, losses):
        parameters = sum(p.numel() for p in loss.parameters())
        memory = peak_memory(entry, setting, threads)
        rows.append({"name": loss.name, "entry": entry, "parameters": parameters, "peak_memory_bytes": memory})
        on_step()
    rounds = []
    for _ in range(warmup + repeats):
        times = {}
        for i, loss in enumerate(losses):
            times[i] = step_time(loss, context, torch.device(setting.device))
            on_step()
        rounds.append(times)
    for i, value in medians(rounds[warmup:]).items():
        rows[i]["milliseconds"] = value
    return rows
