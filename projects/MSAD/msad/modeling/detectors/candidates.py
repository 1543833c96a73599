"""From dense scores to detections: which candidates of a level count, cut to the image or not before suppression."""

from __future__ import annotations

import torch
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances


def best_candidates(scores: torch.Tensor, threshold: float, count: int) -> tuple[torch.Tensor, ...]:
    """The best pairs of place and class of one level of one image.

    Args:
        scores: (R, K).
        threshold: pairs must be above it.
        count: the most to return.

    Returns:
        score, place (in R) and class of each, (P,), the best first.
    """
    flat = scores.flatten()
    above = (flat > threshold).nonzero().squeeze(1)
    score, order = flat[above].topk(min(count, above.numel()))
    place, label = above[order].div(scores.shape[1], rounding_mode="floor"), above[order] % scores.shape[1]
    return score, place, label


def suppress(found: Instances, nms_thresh: float, count: int, clip: bool = True) -> Instances:
    """The ``count`` best candidates of an image after suppression within each class.

    Args:
        clip: first cut candidates to the image and drop the empty ones, as mmdetection does; detectron2 cuts the
            detections at the end. Two boxes of an object at the border overlap more once they are cut.
    """
    if clip:
        found = clip_and_drop_empty(found)
    kept = batched_nms(found.pred_boxes.tensor, found.scores, found.pred_classes, nms_thresh)
    return found[kept[:count]]


def clip_and_drop_empty(found: Instances) -> Instances:
    """Detections cut to the image of their ``image_size``, without those of which nothing is left."""
    boxes = Boxes(found.pred_boxes.tensor.clone())
    boxes.clip(found.image_size)
    found.pred_boxes = boxes
    return found[boxes.nonempty().nonzero().squeeze(1)]


class ClipsBeforeNMS:
    """Mixin in front of a subclass of detectron2's DenseDetector.

    Attributes:
        clip_before_nms: see ``clip`` of :func:`suppress`.
    """

    clip_before_nms = True

    def _decode_multi_level_predictions(self, *args) -> Instances:
        found = super()._decode_multi_level_predictions(*args)
        return clip_and_drop_empty(found) if self.clip_before_nms else found
