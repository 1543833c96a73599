"""Cost of whole detectors by part: parameters, multiply-adds, latency, and the price of a distillation step.

The backbone alone says little at low resolution: the head reads as many locations at L as at H and outweighs
everything else there. Parts are ``bottom_up``, ``neck``, ``fusion`` (teachers only), ``head``, and what surrounds
them: ``preprocessing`` (moving, reducing, normalising and padding images) and ``postprocessing`` (decoding, NMS,
rescaling). All are measured in one real forward pass: what a model skips costs nothing, and what it computes in vain
is counted. Peak memory is in :mod:`msad.evaluation.memory`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from detectron2.evaluation import inference_context
from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..distill.distiller import Distiller
from ..modeling.adapters import adapt, detector_of
from ..modeling.fusion_student import FusionBackbone
from ..modeling.taps import before_neck
from ..resolution import downsample_batch

PARTS = ("preprocessing", "bottom_up", "neck", "fusion", "head", "postprocessing")
TOTAL = "total"
STEPS = ("student_step", "teacher_neck", "distillation_step")
RATIO = "ratio"


def part_modules(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The modules that make up the parts of a detector or of a teacher around one.

    The module of ``neck`` is the backbone around its ``bottom_up``, which counts as a part of its own; a backbone
    that has none is ``bottom_up`` as a whole. An R-CNN's ``head`` is that of its proposals, the pooling and the heads
    of its regions. The parts of a fusion student are those of all of its branches.

    Raises:
        TypeError: no adapter knows the detector.
    """
    detector = detector_of(model)
    head = adapt(detector).head_modules()
    backbone = detector.backbone
    backbones = list(backbone.branches.values()) if isinstance(backbone, FusionBackbone) else [backbone]
    if all(hasattr(network, "bottom_up") for network in backbones):
        modules = {"bottom_up": before_neck(detector), "neck": backbones}
    else:
        modules = {"bottom_up": backbones}
    if isinstance(backbone, FusionBackbone):
        modules["fusion"] = [backbone.fusion]
    elif detector is not model:
        modules["fusion"] = [model.fusion]
    modules["head"] = head
    return modules


def _num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Number of parameters by part, and ``total``. Buffers, such as frozen batch norms, are not parameters."""
    counts = dict.fromkeys(PARTS, 0)
    counts.update((part, sum(map(_num_parameters, modules))) for part, modules in part_modules(model).items())
    if counts["neck"]:
        counts["neck"] -= counts["bottom_up"]
    return {**counts, TOTAL: _num_parameters(model)}


def random_inputs(
    height: int, width: int, batch: int = 1, boxes: int = 0, seed: int = 0, masks: bool = False, keypoints: int = 0
) -> list[dict]:
    """Inputs of random pixels in detectron2's format, on the CPU.

    Args:
        height, width: of each image (3, height, width), uint8.
        batch: number of images.
        boxes: ground truth boxes of class 0 in each; 0: no "instances".
        masks: the objects also have polygons, which fill their boxes.
        keypoints: number of visible points in each object's box.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for _ in range(batch):
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        item = {"image": image, "height": height, "width": width}
        if boxes:
            low, high = torch.rand(2, boxes, 2, generator=generator).sort(dim=0).values
            gt = item["instances"] = Instances((height, width))
            gt.gt_boxes = Boxes(torch.cat([low * 0.9, high * 0.9 + 0.1], dim=1) * torch.tensor([width, height] * 2))
            gt.gt_classes = torch.zeros(boxes, dtype=torch.int64)
            if masks:
                corners = gt.gt_boxes.tensor[:, [0, 1, 2, 1, 2, 3, 0, 3]].double().numpy()
                gt.gt_masks = PolygonMasks([[polygon] for polygon in corners])
            if keypoints:
                x0, y0, x1, y1 = gt.gt_boxes.tensor[:, None].unbind(2)
                u, v = torch.rand(2, boxes, keypoints, generator=generator)
                points = [x0 + u * (x1 - x0), y0 + v * (y1 - y0), torch.full_like(u, 2)]
                gt.gt_keypoints = Keypoints(torch.stack(points, dim=2))
        inputs.append(item)
    return inputs


@contextmanager
def _marks_at_parts(model: nn.Module, mark: Callable[[], Any]) -> Iterator[list[tuple[str, Any]]]:
    """Inside, a pass of ``model`` appends (part that begins, ``mark()``) whenever the innermost part changes.

    What lies outside the modules is ``preprocessing`` until the head has returned for the first time and
    ``postprocessing`` from then; for R-CNNs this includes the selection of proposals.
    """
    active = ["preprocessing"]
    begun = []

    def enter(part: str) -> None:
        active.append(part)
        begun.append((part, mark()))

    def leave() -> None:
        if active.pop() == "head":
            active[0] = "postprocessing"
        begun.append((active[-1], mark()))

    with ExitStack() as hooks:
        for part, modules in part_modules(model).items():
            for module in modules:
                on_entry = module.register_forward_pre_hook(lambda _module, _args, part=part: enter(part))
                hooks.enter_context(on_entry)
                hooks.enter_context(module.register_forward_hook(lambda _module, _args, _output: leave()))
        begun.append((active[0], mark()))
        yield begun


def _by_part(
    model: nn.Module, inputs: list[dict], mark: Callable[[], Any], difference: Callable[[Any, Any], float]
) -> dict[str, float]:
    """One inference pass: by how much ``mark()`` grows within each part, and in ``total``."""
    with inference_context(model), torch.no_grad(), _marks_at_parts(model, mark) as begun:
        model(inputs)
        begun.append(("", mark()))
    costs = dict.fromkeys(PARTS, 0.0)
    for (part, start), (_, stop) in pairwise(begun):
        costs[part] += difference(start, stop)
    costs[TOTAL] = difference(begun[0][1], begun[-1][1])
    return costs


def _deform_conv_flop(x: torch.Size, weight: torch.Size, *_args, out_shape: torch.Size, **_kwargs) -> int:
    """As of an ordinary convolution: the sampling of its taps is no product of matrices."""
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def _attention_flop(query: torch.Size, key: torch.Size, value: torch.Size, *_args, **_kwargs) -> int:
    """Of queries (..., L, D) on keys (..., S, D) and values (..., S, E)."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


# What torch's counter does not know: torchvision's operator, and scaled_dot_product_attention as CPUs do it.
_FLOPS = {
    torch.ops.torchvision.deform_conv2d: _deform_conv_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop,
}


def count_macs(model: nn.Module, inputs: list[dict]) -> dict[str, float]:
    """Multiply-adds of one image by part, and ``total``, in GMACs: 1e9 multiply-adds, half of the GFLOPs.

    Counts convolutions, linear layers, matrix products and attention on the image as the model pads it. Elementwise
    operations, normalisation, pooling and resizing are left out, as is usual; post-processing consists of such.

    Args:
        model: a detector, or a teacher, of which only what its ``eval_branch`` needs is run.
        inputs: one image as a loader gives it or from :func:`random_inputs`, in pixels of the model's own input; for a
            teacher that is H. Its size decides on the cost of dense detectors; that of an R-CNN's heads depends on how
            many proposals it makes of the image.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_FLOPS)
    with counter:
        flops = _by_part(model, inputs, counter.get_total_flops, lambda a, b: b - a)
    return {part: value / 2 / 1e9 for part, value in flops.items()}


def time_parts(model: nn.Module, inputs: list[dict]) -> dict[str, float]:
    """Milliseconds of one inference pass by part, and ``total`` from images on the CPU to detections.

    On a GPU, parts are told apart by events on its stream, and nothing is synchronised before the end of the pass;
    with MSAD.FUSION_STUDENT.STREAMS only the total is meaningful.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        return _by_part(model, inputs, time.perf_counter, lambda a, b: (b - a) * 1e3)
    stream = torch.cuda.current_stream(device)

    def elapsed(start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        stop.synchronize()
        return start.elapsed_time(stop)

    torch.cuda.synchronize(device)
    return _by_part(model, inputs, lambda: stream.record_event(torch.cuda.Event(enable_timing=True)), elapsed)


def medians(passes: list[dict[str, float]]) -> dict[str, float]:
    """Median over dicts of equal keys, key by key. Medians of parts need not add up to the median total."""
    return {key: median(one[key] for one in passes) for key in passes[0]}


def milliseconds(function: Callable[[], Any], device: torch.device) -> float:
    """Time of one call of ``function``, which works on ``device``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3


def _train(module: nn.Module, inputs: list[dict]) -> None:
    sum(module(inputs).values()).backward()
    module.zero_grad(set_to_none=True)


def student_step(distiller: Distiller, batch: list[dict]) -> None:
    """The student alone, forward and backward, on ``batch`` (H pixels) at its own resolution."""
    reduced = downsample_batch(batch, distiller.resolution.shift, distiller.device, distiller.downsample_mode)
    with EventStorage(0):
        _train(distiller.student.train(), reduced)


def distillation_step(distiller: Distiller, batch: list[dict]) -> None:
    """Forward and backward of the whole on ``batch`` (H pixels), with the assistants' own steps."""
    with EventStorage(0):
        _train(distiller.train(), batch)


def training_step_cost(
    distiller: Distiller,
    batch: list[dict],
    repeats: int = 5,
    warmup: int = 1,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """What a distillation step costs beyond its ingredients.

    Times, in every round and in turns, so that other work on the machine hits all alike: ``student_step``, the
    student alone on images of its own resolution, forward and backward; ``teacher_neck``, the frozen teacher up to
    its neck; ``distillation_step``, the distiller's forward and backward. The optimizer's update, the same in the
    first and the last, is left out.

    Args:
        distiller: with a teacher and at least one loss. Its normalisation statistics change, its parameters do not.
        batch: inputs with "instances" in H pixels.
        on_round: called after every round, warm-up included.

    Returns:
        Median milliseconds, and ``ratio``: the median over rounds of distillation_step / (student_step +
        teacher_neck); 1 means that distillation adds nothing to what it is made of.
    """
    if distiller.teacher is None or not len(distiller.losses):
        raise ValueError("no distillation to measure: DISTILL.TEACHERS or DISTILL.LOSSES is empty")
    shift, device = distiller.resolution.shift, distiller.device
    reduced = downsample_batch(batch, shift, device, distiller.downsample_mode)

    functions = {
        "student_step": lambda: _train(distiller.student, reduced),
        "teacher_neck": lambda: distiller.teacher.features(batch, distiller.max_shift),
        "distillation_step": lambda: distillation_step(distiller, batch),
    }
    distiller.train()
    rounds = []
    with EventStorage(0):
        for i in range(warmup + repeats):
            # Everybody is first, second and third equally often: what runs before leaves its traces in the caches.
            turns = [STEPS[(i + k) % len(STEPS)] for k in range(len(STEPS))]
            times = {name: milliseconds(functions[name], device) for name in turns}
            times[RATIO] = times["distillation_step"] / (times["student_step"] + times["teacher_neck"])
            rounds.append(times)
            on_round()
    return medians(rounds[warmup:])
