"""Generalized Focal Loss detector (Li et al., NeurIPS 2020): one quality-aware score, box sides as distributions."""

from __future__ import annotations

from functools import partial

import torch
from detectron2.config import configurable
from detectron2.layers import batched_nms
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.structures.boxes import matched_pairwise_iou
from detectron2.utils.events import get_event_storage
from torch import nn
from torchvision.ops import generalized_box_iou_loss

from . import atss
from .candidates import ClipsBeforeNMS
from .dense import cell_generator, dense_arguments, mean_of_processes
from .distribution import DistributionTransform, distribution_focal_loss, quality_focal_loss


class GFLHead(RetinaNetHead):
    """RetinaNet's two towers; one anchor a location, 4 (REG_MAX + 1) box logits, scaled by a learned factor a level."""

    @configurable
    def __init__(self, *, input_shape: list, conv_dims: list[int], reg_max: int, **kwargs) -> None:
        super().__init__(input_shape=input_shape, conv_dims=conv_dims, num_anchors=1, **kwargs)
        self.bbox_pred = nn.Conv2d(conv_dims[-1], 4 * (reg_max + 1), 3, padding=1)
        nn.init.normal_(self.bbox_pred.weight, std=0.01)
        nn.init.zeros_(self.bbox_pred.bias)  # uniform distributions: every side REG_MAX / 2 strides away
        self.scales = nn.Parameter(torch.ones(len(input_shape)))

    @classmethod
    def from_config(cls, cfg, input_shape: list) -> dict:
        options = cfg.MODEL.GFL
        return {
            "input_shape": input_shape,
            "num_classes": options.NUM_CLASSES,
            "conv_dims": list(options.CONV_DIMS),
            "norm": options.NORM,
            "prior_prob": options.PRIOR_PROB,
            "reg_max": options.REG_MAX,
        }

    def forward(self, features: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Maps (N, C, h_l, w_l) -> class logits (N, K, h_l, w_l) and box logits (N, 4 (n + 1), h_l, w_l)."""
        logits, sides = super().forward(features)
        return logits, [scale * x for scale, x in zip(self.scales, sides)]


@META_ARCH_REGISTRY.register()
class GFL(ClipsBeforeNMS, DenseDetector):
    """Dense detector with ATSS assignment, QFL, DFL and GIoU.

    Cells are squares with the sides of a stride; distances are counted in strides from their centres (stride (i + 1/2),
    as everywhere in detectron2), so levels moved down by one (a student in the L frame) need no other setting. Losses
    are divided by values of the batch (number of positives, sum of their scores), averaged over processes: nothing
    outlives a step, and several processes have the gradients of one with the joint batch.

    Args:
        backbone: its maps ``head_in_features`` feed the head.
        head: gives class logits and box logits of every level, see :class:`GFLHead`.
        num_classes: K.
        box2box_transform: between boxes and distributions.
        anchor_size: sides of the anchors that ATSS assigns, in strides.
        atss_topk: candidates a level and box.
        qfl_beta: exponent of QFL.
        loss_weights: of QFL, DFL and GIoU.
        offset: where in a location its centre lies, in strides; 0 in mmdetection's weights.
        clip_before_nms: see :class:`ClipsBeforeNMS`.
        test_score_thresh, test_topk_candidates, test_nms_thresh, max_detections_per_image: as in detectron2's FCOS.
    """

    @configurable
    def __init__(
        self, *, backbone: nn.Module, head: nn.Module, head_in_features: list[str], num_classes: int,
        box2box_transform: DistributionTransform, anchor_size: float = 8.0, atss_topk: int = 9, qfl_beta: float = 2.0,
        loss_weights: tuple[float, float, float] = (1.0, 0.25, 2.0), offset: float = 0.5,
        clip_before_nms: bool = False, test_score_thresh: float = 0.05, test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.6, max_detections_per_image: int = 100, pixel_mean, pixel_std,
    ) -> None:  # fmt: skip
        super().__init__(backbone, head, head_in_features, pixel_mean=pixel_mean, pixel_std=pixel_std)
        self.num_classes = num_classes
        self.box2box_transform = box2box_transform
        self.anchor_size, self.atss_topk = anchor_size, atss_topk
        self.qfl_beta, self.loss_weights = qfl_beta, loss_weights
        self.clip_before_nms = clip_before_nms
        self.test_score_thresh, self.test_topk_candidates = test_score_thresh, test_topk_candidates
        self.test_nms_thresh, self.max_detections_per_image = test_nms_thresh, max_detections_per_image
        self.anchor_generator = cell_generator(backbone, head_in_features, offset)

    @classmethod
    def from_config(cls, cfg) -> dict:
        options = cfg.MODEL.GFL
        return {
            **dense_arguments(cfg, "GFL", partial(cls.build_head, cfg)),
            "box2box_transform": DistributionTransform(options.REG_MAX),
            "anchor_size": options.ANCHOR_SIZE,
            "atss_topk": options.ATSS_TOPK,
            "qfl_beta": options.QFL_BETA,
            "loss_weights": (options.QFL_WEIGHT, options.DFL_WEIGHT, options.GIOU_WEIGHT),
            "offset": options.OFFSET,
            "clip_before_nms": options.CLIP_BEFORE_NMS,
        }

    @classmethod
    def build_head(cls, cfg, input_shape: list) -> nn.Module:
        """The head on maps of these shapes, a level each."""
        return GFLHead(cfg, input_shape)

    @torch.no_grad()
    def label_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Assign ground truth to the R locations of all levels.

        Returns:
            for each image the labels, (R,) int64 (0..K-1 a class, K background), and the matched boxes (R, 4), zeros
            where the label is background.
        """
        locations = [level.tensor for level in anchors]
        device = locations[0].device
        boxes = torch.cat([gt.gt_boxes.tensor for gt in gt_instances])
        counts = torch.tensor([len(gt) for gt in gt_instances])
        image = torch.arange(len(counts)).repeat_interleave(counts).to(device, non_blocking=True)
        matched = atss.assign(locations, boxes, image, len(counts), self.atss_topk, self.anchor_size)
        classes = torch.cat([gt.gt_classes for gt in gt_instances])
        classes = torch.cat([classes, classes.new_full((1,), self.num_classes)])
        boxes = torch.cat([boxes, boxes.new_zeros(1, 4)])
        return list(classes[matched]), list(boxes[matched])

    def forward_training(
        self, images: ImageList, features: list[torch.Tensor], predictions: list[list[torch.Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        """Losses in float32, also under mixed precision."""
        anchors = self.anchor_generator(features)
        labels, boxes = self.label_anchors(anchors, gt_instances)
        logits, sides = (torch.cat([x.flatten(2) for x in levels], dim=2).float() for levels in predictions)
        return self.losses(Boxes.cat(anchors), logits, sides, torch.stack(labels), torch.stack(boxes))

    def losses(
        self, locations: Boxes, logits: torch.Tensor, sides: torch.Tensor, labels: torch.Tensor, boxes: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Weighted losses of a batch.

        Args:
            locations: (R, 4).
            logits: (N, K, R) of the classes.
            sides: (N, 4 (n + 1), R), logits of the distances.
            labels, boxes: (N, R), (N, R, 4), see :meth:`label_anchors`.

        Returns:
            "loss_gfl_qfl": over all locations, the quality of a positive being the IoU of its predicted box, divided by
            the number of positives; "loss_gfl_dfl" (mean of the four sides) and "loss_gfl_giou": means over
            positives, weighted by their largest class scores.
        """
        image, place = (labels != self.num_classes).nonzero(as_tuple=True)
        target, location = boxes[image, place], locations.tensor[place]
        chosen = sides[image, :, place]
        predicted = self.box2box_transform.apply_deltas(chosen, location)
        weight = logits.detach()[image, :, place].sigmoid().amax(dim=1)

        quality = torch.zeros_like(logits)
        quality[image, labels[image, place], place] = matched_pairwise_iou(Boxes(predicted.detach()), Boxes(target))
        qfl = quality_focal_loss(logits, quality, self.qfl_beta).sum()
        distances = self.box2box_transform.get_deltas(location, target)
        dfl = distribution_focal_loss(chosen.unflatten(1, (4, -1)), distances).mean(dim=1)
        giou = generalized_box_iou_loss(predicted, target)

        get_event_storage().put_scalar("num_pos_anchors", len(place) / len(labels))
        positives, scores = mean_of_processes(torch.stack([weight.new_full((), len(place)), weight.sum()]))
        positives, scores = positives.clamp(min=1), scores.clamp(min=1e-6)
        terms = {"qfl": qfl / positives, "dfl": (weight * dfl).sum() / scores, "giou": (weight * giou).sum() / scores}
        return {f"loss_gfl_{name}": w * value for w, (name, value) in zip(self.loss_weights, terms.items())}

    def forward_inference(
        self, images: ImageList, features: list[torch.Tensor], predictions: list[list[torch.Tensor]]
    ) -> list[Instances]:
        """Detections of each image in pixels of the network's input. Only candidates' distributions are decoded."""
        logits, sides = self._transpose_dense_predictions(
            predictions, [self.num_classes, 4 * (self.box2box_transform.reg_max + 1)]
        )
        anchors = self.anchor_generator(features)
        scores = [x.sigmoid() for x in logits]
        return [
            self._best(anchors, [s[i] for s in scores], [x[i] for x in sides], size)
            for i, size in enumerate(images.image_sizes)
        ]

    def _best(self, anchors, scores, sides, image_size: tuple[int, int]) -> Instances:
        """Detections of one image from (R_l, K) scores and (R_l, 4 (n + 1)) box logits of each level."""
        found = self._decode_multi_level_predictions(
            anchors, scores, sides, self.test_score_thresh, self.test_topk_candidates, image_size
        )
        kept = batched_nms(found.pred_boxes.tensor, found.scores, found.pred_classes, self.test_nms_thresh)
        return found[kept[: self.max_detections_per_image]]
