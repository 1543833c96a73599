"""Which of the boxes that a region proposal network predicts become proposals."""

import math
from collections.abc import Callable

import torch
from torchvision.ops import clip_boxes_to_image

from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances

__all__ = [
    "add_ground_truth_to_proposals", "add_ground_truth_to_proposals_single_image", "find_top_rpn_proposals",
    "top_proposals",
]

# Ground truth among the proposals counts as nearly certain; an infinite logit would poison what is computed from it.
_GT_LOGIT = math.log((1.0 - 1e-10) / (1.0 - (1.0 - 1e-10)))


def find_top_rpn_proposals(
    proposals: list[torch.Tensor], pred_objectness_logits: list[torch.Tensor], image_sizes: list[tuple[int, int]],
    nms_thresh: float, pre_nms_topk: int, post_nms_topk: int, min_box_size: float, training: bool,
) -> list[Instances]:
    """The best boxes of every image after suppression within each level.

    Args:
        proposals: (N, R_l, 4) boxes of each level; pred_objectness_logits: (N, R_l) of each level.
        image_sizes: (height, width) of each image without padding, in pixels of the network's input.
        nms_thresh: overlap (IoU) above which the worse of two boxes goes.
        pre_nms_topk: boxes of each level and image that enter the suppression.
        post_nms_topk: boxes of an image, over all levels, that leave it.
        min_box_size: clipped boxes whose width or height is no larger are dropped.
        training: raise FloatingPointError on infinite and NaN predictions instead of dropping them.

    Returns:
        Instances with ``proposal_boxes`` and ``objectness_logits``, best first, for each image.
    """
    return top_proposals(
        lambda level, image, index: proposals[level][image, index], pred_objectness_logits, image_sizes,
        nms_thresh, pre_nms_topk, post_nms_topk, min_box_size, training,
    )


def top_proposals(
    boxes_of: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor], logits: list[torch.Tensor],
    image_sizes: list[tuple[int, int]], nms_thresh: float, pre_nms_topk: int, post_nms_topk: int,
    min_box_size: float, training: bool,
) -> list[Instances]:
    """:func:`find_top_rpn_proposals` for boxes that are made on demand.

    ``boxes_of(level, image, index)`` gives the boxes (N, T, 4) of the cells ``index`` (N, T) of a level; ``image`` is
    (N, 1). Most boxes are not among the best and need never be decoded.
    """
    image = torch.arange(len(image_sizes), device=logits[0].device)[:, None]
    boxes, scores, levels = [], [], []
    for level, level_logits in enumerate(logits):
        best, index = level_logits.topk(min(pre_nms_topk, level_logits.shape[1]), dim=1)
        boxes.append(boxes_of(level, image, index))
        scores.append(best)
        levels.append(torch.full_like(index[0], level))
    boxes, scores, levels = torch.cat(boxes, dim=1), torch.cat(scores, dim=1), torch.cat(levels)

    finite = boxes.isfinite().all(dim=2) & scores.isfinite()
    if training and not finite.all():
        raise FloatingPointError("the region proposal network predicts infinite or NaN values: training has diverged")
    found = []
    for box, score, usable, size in zip(boxes, scores, finite, image_sizes):
        box = clip_boxes_to_image(box, size)
        extent = box[:, 2:] - box[:, :2]
        usable = (usable & (extent > min_box_size).all(dim=1)).nonzero().squeeze(1)
        box, score = box[usable], score[usable]
        kept = batched_nms(box, score, levels[usable], nms_thresh)[:post_nms_topk]
        found.append(Instances(size, proposal_boxes=Boxes(box[kept]), objectness_logits=score[kept]))
    return found


def add_ground_truth_to_proposals(
    gt: list[Instances] | list[Boxes], proposals: list[Instances]
) -> list[Instances]:
    """:func:`add_ground_truth_to_proposals_single_image` for each image."""
    if len(gt) != len(proposals):
        raise ValueError(f"got ground truth of {len(gt)} and proposals of {len(proposals)} images")
    return [add_ground_truth_to_proposals_single_image(*pair) for pair in zip(gt, proposals)]


def add_ground_truth_to_proposals_single_image(gt: Instances | Boxes, proposals: Instances) -> Instances:
    """``proposals`` followed by the ground-truth boxes, which get a logit of almost certainty.

    Args:
        gt: boxes, or Instances with ``gt_boxes``.
        proposals: Instances with ``proposal_boxes`` and ``objectness_logits``; every other field must be one of
            ``gt`` too.
    """
    extra = {} if isinstance(gt, Boxes) else dict(gt.get_fields())
    boxes = gt if isinstance(gt, Boxes) else gt.gt_boxes
    extra["proposal_boxes"] = boxes
    extra["objectness_logits"] = boxes.tensor.new_full((len(boxes),), _GT_LOGIT)
    missing = [name for name in proposals.get_fields() if name not in extra]
    if missing:
        raise ValueError(f"ground truth cannot join the proposals: it has no {', '.join(missing)}")
    shared = {name: extra[name] for name in proposals.get_fields()}
    return Instances.cat([proposals, Instances(proposals.image_size, **shared)])
