"""Training of any detector without the ignored regions of its images: they are neither object nor background.

Class scores of locations whose point lies in a region are replaced by a constant far below zero: as background they
cost nothing and pass no gradient, and an RPN's proposals there come last. Proposals that remain there are not shown to
the second stage. All of it is done by module hooks, on dense detectors and R-CNNs of either engine; detectron2's own
"ignore" label would not do, because its FCOS knows no such label.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .adapters import adapt, detector_of
from .detectors.dense import SURELY_BACKGROUND


class IgnoredRegions:
    """The hooks of one model; they act on training batches whose inputs have "ignored_regions".

    That field is (R, 4): boxes relative to width and height of the input, as msad.data.regions makes it. Locations
    within one stride of an object's box, or with an anchor that may reach it, stay, and so do proposals centred in one:
    they may be its positives.

    Args:
        model: a dense detector, an R-CNN, or a module that is called with the same inputs and has it as ``detector``
            (its head then reads maps in the frame of the inputs).
    """

    def __init__(self, model: nn.Module) -> None:
        detector = detector_of(model)
        adapter, shapes = adapt(detector), detector.backbone.output_shape()
        self._regions: list[torch.Tensor] | None = None
        self._objects: list[torch.Tensor] = []
        self._hooks = [model.register_forward_pre_hook(self._take_batch)]
        if adapter.two_stage:
            self._anchors = detector.proposal_generator.anchor_generator
            levels, head = detector.proposal_generator.in_features, detector.proposal_generator.rpn_head
            self._hooks.append(detector.roi_heads.register_forward_pre_hook(self._without_proposals, with_kwargs=True))
        else:
            self._anchors, levels, head = detector.anchor_generator, adapter.levels, detector.head
        self._strides = [shapes[name].stride for name in levels]
        self._hooks.append(head.register_forward_hook(self._without_scores))

    def remove(self) -> None:
        """Let the model be as it was."""
        for hook in self._hooks:
            hook.remove()

    def _take_batch(self, model: nn.Module, args: tuple) -> None:
        batch = args[0] if model.training else []
        if not any(len(item.get("ignored_regions", ())) for item in batch):
            self._regions = None
            return
        device = detector_of(model).pixel_mean.device
        self._regions, self._objects = [], []
        for item in batch:
            height, width = item["image"].shape[-2:]
            regions = item.get("ignored_regions", torch.zeros(0, 4))
            regions = regions * regions.new_tensor([width, height, width, height])
            # Here, once, and not in the middle of the head, where a copy would wait for all that is under way.
            self._regions.append(regions.to(device, non_blocking=True))
            self._objects.append(item["instances"].gt_boxes.tensor.to(device, non_blocking=True))

    def _without_scores(self, _head: nn.Module, _args: tuple, output: tuple) -> tuple | None:
        if self._regions is None:
            return None
        scores, *others = output
        levels = zip(scores, self._strides, self._anchors.cell_anchors)
        return ([self._masked(maps, stride, anchors) for maps, stride, anchors in levels], *others)

    @torch.no_grad()
    def _mask(self, image: int, points: torch.Tensor, margin: torch.Tensor | float) -> torch.Tensor:
        """(P,) whether ``points`` (P, 2), in pixels, lie in a region and not within ``margin`` of an object."""
        return _inside(points, self._regions[image]) & ~_inside(points, self._objects[image], margin)

    def _masked(self, scores: torch.Tensor, stride: int, anchors: torch.Tensor) -> torch.Tensor:
        """``scores`` (N, A, h, w) of a level with ``anchors`` (A, 4), in pixels around the point of a location.

        The best anchor of an object much smaller than it is positive, however far its point is from the object.
        """
        reach = anchors.abs().amax(dim=0).view(2, 2).amax(dim=0).clamp(min=stride)
        h, w = scores.shape[-2:]
        y, x = torch.meshgrid(
            torch.arange(h, device=scores.device), torch.arange(w, device=scores.device), indexing="ij"
        )
        points = (torch.stack([x, y], dim=-1).reshape(-1, 2) + self._anchors.offset) * stride
        masks = torch.stack([self._mask(n, points, reach) for n in range(len(scores))])
        return scores.masked_fill(masks.view(-1, 1, h, w), SURELY_BACKGROUND)

    def _without_proposals(self, roi_heads: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        if self._regions is None or not roi_heads.training:
            return None
        args, kwargs = list(args), dict(kwargs)
        holder, key = (args, 2) if len(args) > 2 else (kwargs, "proposals")
        holder[key] = [
            proposals[~self._mask(n, proposals.proposal_boxes.get_centers(), 0.0)]
            for n, proposals in enumerate(holder[key])
        ]
        return tuple(args), kwargs


def _inside(points: torch.Tensor, boxes: torch.Tensor, margin: torch.Tensor | float = 0.0) -> torch.Tensor:
    """(P,) whether each of ``points`` (P, 2) lies in one of ``boxes`` (B, 4) or within ``margin``, (2,) or 1, of it."""
    points = points[:, None]
    first, last = boxes[:, :2] - margin, boxes[:, 2:] + margin
    return ((points >= first) & (points <= last)).all(dim=2).any(dim=1)
