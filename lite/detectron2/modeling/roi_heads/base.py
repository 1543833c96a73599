"""What all RoI heads share: which proposals they learn from, and which objects these stand for."""

import torch
from torch import nn

from detectron2.config import configurable
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator.proposal_utils import add_ground_truth_to_proposals
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from detectron2.utils.events import get_event_storage
from detectron2.utils.registry import Registry

__all__ = [
    "ROI_HEADS_REGISTRY", "ROIHeads", "build_roi_heads", "label_proposals", "select_foreground_proposals",
    "select_proposals_with_visible_keypoints",
]

ROI_HEADS_REGISTRY = Registry("ROI_HEADS")
ROI_HEADS_REGISTRY.__doc__ = """
Second stages of R-CNNs by name; each is called as ``constructor(cfg, input_shape)`` with a dict from the name of a
feature map to its :class:`ShapeSpec`, and returns a :class:`ROIHeads`.
"""


def build_roi_heads(cfg, input_shape) -> "ROIHeads":
    """Build the heads that ``cfg.MODEL.ROI_HEADS.NAME`` names."""
    return ROI_HEADS_REGISTRY.get(cfg.MODEL.ROI_HEADS.NAME)(cfg, input_shape)


def select_foreground_proposals(
    proposals: list[Instances], bg_label: int
) -> tuple[list[Instances], list[torch.Tensor]]:
    """Those of each image whose ``gt_classes`` is neither ``bg_label`` nor -1, and bool masks (R_i,) of them."""
    if not isinstance(proposals, (list, tuple)) or not all(isinstance(p, Instances) for p in proposals):
        raise TypeError("select_foreground_proposals takes a list of Instances")
    masks = [(p.gt_classes != -1) & (p.gt_classes != bg_label) for p in proposals]
    # Indices once, not a mask for every field: each mask would make the device wait.
    return [p[mask.nonzero().squeeze(1)] for p, mask in zip(proposals, masks)], masks


def select_proposals_with_visible_keypoints(proposals: list[Instances]) -> list[Instances]:
    """Those of each image that have at least one labelled keypoint of ``gt_keypoints`` inside ``proposal_boxes``
    (borders included): the others teach a keypoint head nothing."""
    selected = []
    for p in proposals:
        if len(p) == 0:
            selected.append(p)
            continue
        corners = p.proposal_boxes.tensor[:, None]
        points, labelled = p.gt_keypoints.tensor[..., :2], p.gt_keypoints.tensor[..., 2] >= 1
        inside = ((points >= corners[..., :2]) & (points <= corners[..., 2:])).all(dim=2)
        selected.append(p[(inside & labelled).any(dim=1).nonzero().squeeze(1)])
    counts = [len(kept) for p, kept in zip(proposals, selected) if len(p)]
    get_event_storage().put_scalar("keypoint_head/num_fg_samples", sum(counts) / max(len(counts), 1))
    return selected


def label_proposals(
    proposals: Instances, targets: Instances, matcher: Matcher, num_classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Match the R proposals of an image to its ground truth.

    Returns:
        the index of the object matched to each proposal (0 if there is none), and its class: ``num_classes`` for
        background, -1 for ignored; both (R,) int64.
    """
    matches, kinds = matcher(pairwise_iou(targets.gt_boxes, proposals.proposal_boxes))
    if len(targets) == 0:
        return matches, torch.full_like(matches, num_classes)
    classes = targets.gt_classes[matches]
    return matches, classes.masked_fill_(kinds == 0, num_classes).masked_fill_(kinds == -1, -1)


def log_samples(num_objects: float, num_background: float) -> None:
    """Put into the event storage how many proposals of objects and of background an image has, on average."""
    storage = get_event_storage()
    storage.put_scalar("roi_head/num_fg_samples", num_objects)
    storage.put_scalar("roi_head/num_bg_samples", num_background)


class ROIHeads(nn.Module):
    """Base of the modules that work on the features of each proposal.

    A subclass implements :meth:`forward`.

    Args:
        num_classes: without background, which has this number.
        batch_size_per_image, positive_fraction: proposals that count for the losses, and the largest share of objects.
        proposal_matcher: labels proposals by their overlap with the ground truth.
        proposal_append_gt: let the ground-truth boxes be proposals too.
    """

    @configurable
    def __init__(
        self, *, num_classes: int, batch_size_per_image: int, positive_fraction: float, proposal_matcher: Matcher,
        proposal_append_gt: bool = True,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.batch_size_per_image, self.positive_fraction = batch_size_per_image, positive_fraction
        self.proposal_matcher, self.proposal_append_gt = proposal_matcher, proposal_append_gt

    @classmethod
    def from_config(cls, cfg) -> dict:
        node = cfg.MODEL.ROI_HEADS
        return {
            "num_classes": node.NUM_CLASSES, "batch_size_per_image": node.BATCH_SIZE_PER_IMAGE,
            "positive_fraction": node.POSITIVE_FRACTION, "proposal_append_gt": node.PROPOSAL_APPEND_GT,
            "proposal_matcher": Matcher(node.IOU_THRESHOLDS, node.IOU_LABELS, allow_low_quality_matches=False),
        }

    @torch.no_grad()
    def label_and_sample_proposals(self, proposals: list[Instances], targets: list[Instances]) -> list[Instances]:
        """Draw the proposals of each image that count for the losses.

        Args:
            proposals: with ``proposal_boxes`` and, with ``proposal_append_gt``, ``objectness_logits``.
            targets: ground truth with ``gt_boxes``, ``gt_classes`` and other fields ``gt_*``.

        Returns:
            the drawn proposals, those of objects first, with ``gt_classes`` and, if the image has objects, every
            field ``gt_*`` of the object matched to each.
        """
        if self.proposal_append_gt:
            proposals = add_ground_truth_to_proposals(targets, proposals)
        sampled, num_objects, num_background = [], 0, 0
        for candidates, truth in zip(proposals, targets):
            matches, classes = label_proposals(candidates, truth, self.proposal_matcher, self.num_classes)
            objects, background = subsample_labels(
                classes, self.batch_size_per_image, self.positive_fraction, bg_label=self.num_classes
            )
            num_objects += len(objects)
            num_background += len(background)
            chosen = torch.cat((objects, background))
            drawn = candidates[chosen]
            drawn.gt_classes = classes[chosen]
            if len(truth) > 0:
                partner = matches[chosen]
                for name, value in truth.get_fields().items():
                    if name.startswith("gt_") and not drawn.has(name):
                        drawn.set(name, value[partner])
            sampled.append(drawn)
        log_samples(num_objects / len(sampled), num_background / len(sampled))
        return sampled

    def forward(
        self, images: ImageList, features: dict[str, torch.Tensor], proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """
        Args:
            images: only for heads that want to see them.
            features: maps (N, C, H_l, W_l) by name.
            proposals: of each image, with ``proposal_boxes`` in pixels of the network's input.
            targets: ground truth of each image, in training.

        Returns:
            in training the sampled proposals and a dict of losses, else detections and an empty dict.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement forward")

    def _training_samples(self, proposals: list[Instances], targets: list[Instances] | None) -> list[Instances]:
        if targets is None:
            raise ValueError(f"{type(self).__name__}: training needs ground truth")
        return self.label_and_sample_proposals(proposals, targets)


def boxes_of(instances: list[Instances], training: bool) -> list[Boxes]:
    """Where a branch looks: proposals while training, detected boxes after."""
    return [x.proposal_boxes if training else x.pred_boxes for x in instances]
