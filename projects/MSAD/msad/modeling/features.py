"""Run a detectron2 detector from given pyramid features, or only as far as its features.

detectron2's detectors go from image to output in one ``forward``. The teacher needs the half after the neck (for
several sets of features) and distillation the half before it. Both are here, once for every detector.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import ImageList, Instances
from torch import nn

from ..resolution import get_resolution, level_of

Features = dict[str, torch.Tensor]
_TOP_BLOCK = re.compile(r"backbone\.(?:branches\.(\w+)\.)?top_block\.p(\d+)\.")


def _is_rcnn(detector: nn.Module) -> bool:
    """Whether the half after the neck is that of an R-CNN; TypeError for what is neither that nor a dense detector."""
    if isinstance(detector, DenseDetector):
        return False
    if isinstance(detector, GeneralizedRCNN) and detector.proposal_generator is not None:
        return True
    raise TypeError(
        f"{type(detector).__name__} cannot be run from features: only detectron2's dense detectors (RetinaNet, FCOS, "
        "...) and R-CNNs with a proposal generator are supported"
    )


def head_levels(detector: nn.Module) -> list[str]:
    """Names of the levels that the detector's heads read, finest first."""
    if not _is_rcnn(detector):
        return list(detector.head_in_features)
    roi_heads = detector.roi_heads
    readers = [detector.proposal_generator.in_features]
    readers += [getattr(roi_heads, f"{task}in_features", None) or [] for task in ("", "box_", "mask_", "keypoint_")]
    return sorted({name for names in readers for name in names}, key=level_of)


def losses(detector: nn.Module, images: ImageList, features: Features, gt: list[Instances]) -> Features:
    """Detection losses of ``detector`` (in training mode) on ``features`` in the frame of ``gt``."""
    if _is_rcnn(detector):
        proposals, rpn_losses = detector.proposal_generator(images, features, gt)
        _, roi_losses = detector.roi_heads(images, features, proposals, gt)
        return {**roi_losses, **rpn_losses}
    maps = [features[name] for name in detector.head_in_features]
    return detector.forward_training(images, maps, detector.head(maps), gt)


def predict(detector: nn.Module, images: ImageList, features: Features) -> list[Instances]:
    """Detections of ``detector`` (in eval mode), in pixels of ``images``."""
    if _is_rcnn(detector):
        proposals, _ = detector.proposal_generator(images, features)
        return detector.roi_heads(images, features, proposals)[0]
    maps = [features[name] for name in detector.head_in_features]
    return detector.forward_inference(images, maps, detector.head(maps))


def postprocess(results: list[Instances], batched_inputs: list[dict], images: ImageList) -> list[dict]:
    """Detections in network input pixels -> detectron2's output dicts in original image pixels."""
    output = []
    for result, item, size in zip(results, batched_inputs, images.image_sizes):
        height, width = item.get("height", size[0]), item.get("width", size[1])
        output.append({"instances": detector_postprocess(result, height, width)})
    return output


@contextmanager
def targets_once(detector: nn.Module) -> Iterator[None]:
    """Inside, ``detector`` assigns ground truth to anchors once and reuses the result.

    For several forward passes over feature sets that share one grid and one ground truth: the aligned branches of a
    multi-resolution teacher. The targets of R-CNN's second stage depend on each branch's own proposals and are not
    shared.
    """
    if _is_rcnn(detector):
        owner, method = detector.proposal_generator, "label_and_sample_anchors"
    else:
        owner, method = detector, "label_anchors"
    assign, memo = getattr(owner, method), []

    def assign_once(anchors, gt_instances):
        if not memo:
            memo.append(assign(anchors, gt_instances))
        return memo[0]

    setattr(owner, method, assign_once)
    try:
        yield
    finally:
        delattr(owner, method)  # uncover the method


def run_neck(backbone: nn.Module, x: torch.Tensor, levels: list[str]) -> Features:
    """``levels`` of the pyramid of ``x`` (N, 3, H, W); a backbone that can leave out the others does."""
    if getattr(backbone, "selects_levels", False):
        return backbone(x, levels)
    features = backbone(x)
    return {name: features[name] for name in levels}


@contextmanager
def tap_neck(detector: nn.Module) -> Iterator[Features]:
    """Inside, a forward pass of ``detector`` also fills the yielded dict with its pyramid features."""
    taken: Features = {}
    handle = detector.backbone.register_forward_hook(lambda _module, _args, output: taken.update(output))
    try:
        yield taken
    finally:
        handle.remove()


def freeze_unread_levels(detector: nn.Module) -> list[str]:
    """Stop training what only serves pyramid levels that no head reads; names of the frozen parameters.

    detectron2's stock FPN builders make P7 together with P6. A student on P2-P6 never reads its P7: without
    gradient it would stop DistributedDataParallel with an unused-parameter error.
    """
    frozen = []
    for name, parameter in detector.named_parameters():
        made_for = _TOP_BLOCK.match(name)
        if not made_for:
            continue
        shift = get_resolution(made_for[1]).shift if made_for[1] else 0  # a branch has levels of its own frame
        if int(made_for[2]) + shift > max(level_of(level) for level in head_levels(detector)):
            parameter.requires_grad_(False)
            frozen.append(name)
    return frozen
