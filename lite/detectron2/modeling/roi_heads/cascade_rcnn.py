"""Cascade R-CNN (Cai and Vasconcelos, arXiv:1712.00726)."""

import torch
from torch import nn
from torchvision.ops import clip_boxes_to_image

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage

from .base import ROI_HEADS_REGISTRY, boxes_of, label_proposals, log_samples
from .box_head import build_box_head
from .fast_rcnn import FastRCNNOutputLayers, Predictions, fast_rcnn_inference
from .roi_heads import StandardROIHeads, build_pooler

__all__ = ["CascadeROIHeads"]


@ROI_HEADS_REGISTRY.register()
class CascadeROIHeads(StandardROIHeads):
    """Box branches in a row: each refines the boxes of the one before it, for a stricter overlap.

    Args:
        box_in_features, box_pooler: see :class:`StandardROIHeads`; shared by all stages.
        box_heads, box_predictors, proposal_matchers: one a stage; box deltas are class-agnostic.
        kwargs: those of :class:`StandardROIHeads` for the other branches, and of :class:`ROIHeads`. The first stage
            learns on drawn proposals, with its matcher; the later ones on all that the stage before gives them.
    """

    @configurable
    def __init__(
        self, *, box_in_features: list[str], box_pooler: ROIPooler, box_heads: list[nn.Module],
        box_predictors: list[nn.Module], proposal_matchers: list[Matcher], **kwargs,
    ):
        if "proposal_matcher" in kwargs:
            raise ValueError("CascadeROIHeads takes proposal_matchers, one a stage, and no proposal_matcher")
        stages = {len(box_heads), len(box_predictors), len(proposal_matchers)}
        if len(stages) != 1 or 0 in stages:
            raise ValueError(
                f"CascadeROIHeads: {len(box_heads)} box_heads, {len(box_predictors)} box_predictors and "
                f"{len(proposal_matchers)} proposal_matchers; each stage needs one of each"
            )
        super().__init__(
            box_in_features=box_in_features, box_pooler=box_pooler, box_head=nn.ModuleList(box_heads),
            box_predictor=nn.ModuleList(box_predictors), proposal_matcher=proposal_matchers[0], **kwargs,
        )
        self.num_cascade_stages = len(box_heads)
        self.proposal_matchers = proposal_matchers

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict:
        arguments = super().from_config(cfg, input_shape)
        del arguments["proposal_matcher"]
        return arguments

    @classmethod
    def _init_box_head(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict:
        heads, cascade = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_CASCADE_HEAD
        if not cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
            raise ValueError("CascadeROIHeads needs MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG True")
        if len(cascade.BBOX_REG_WEIGHTS) != len(cascade.IOUS):
            raise ValueError(
                f"MODEL.ROI_BOX_CASCADE_HEAD has {len(cascade.IOUS)} IOUS and {len(cascade.BBOX_REG_WEIGHTS)} "
                "BBOX_REG_WEIGHTS; each stage needs one of each"
            )
        if cascade.IOUS[0] != heads.IOU_THRESHOLDS[0]:
            raise ValueError(
                f"MODEL.ROI_BOX_CASCADE_HEAD.IOUS starts with {cascade.IOUS[0]}, which must be "
                f"MODEL.ROI_HEADS.IOU_THRESHOLDS: {heads.IOU_THRESHOLDS[0]}"
            )
        names = heads.IN_FEATURES
        pooler, shape = build_pooler(cfg.MODEL.ROI_BOX_HEAD, names, input_shape)
        stages = {"box_heads": [], "box_predictors": [], "proposal_matchers": []}
        for overlap, weights in zip(cascade.IOUS, cascade.BBOX_REG_WEIGHTS):
            head = build_box_head(cfg, shape)
            predictor = FastRCNNOutputLayers(
                cfg, head.output_shape, box2box_transform=Box2BoxTransform(weights=weights)
            )
            matcher = Matcher([overlap], [0, 1], allow_low_quality_matches=False)
            for made, part in zip(stages.values(), (head, predictor, matcher)):
                made.append(part)
        return {"box_in_features": names, "box_pooler": pooler, **stages}

    def forward(self, images, features, proposals, targets=None):
        """See :meth:`ROIHeads.forward`."""
        if not self.training:
            return super().forward(images, features, proposals)
        samples = self._training_samples(proposals, targets)
        return samples, {
            **self._forward_box(features, samples, targets), **self._forward_mask(features, samples),
            **self._forward_keypoint(features, samples),
        }

    def _forward_box(
        self, features: dict[str, torch.Tensor], proposals: list[Instances], targets: list[Instances] | None = None
    ):
        """Losses of all stages in training, else detections of each image."""
        maps = [features[name] for name in self.box_in_features]
        sizes = [p.image_size for p in proposals]
        losses, scores, boxes = {}, [], []
        for stage, predictor in enumerate(self.box_predictor):
            if stage > 0:
                proposals = self._refined_proposals(boxes, sizes)
                if self.training:
                    self._label(proposals, targets, stage)
            predictions = self._run_stage(maps, proposals, stage)
            boxes = predictor.predict_boxes(predictions, proposals)
            if self.training:
                with get_event_storage().name_scope(f"stage{stage}"):
                    of_stage = predictor.losses(predictions, proposals)
                losses.update({f"{name}_stage{stage}": loss for name, loss in of_stage.items()})
            else:
                scores.append(predictor.predict_probs(predictions, proposals))
        if self.training:
            return losses
        # The stages see the same proposals in the same order, so their opinions can be averaged.
        average = [sum(stages) / self.num_cascade_stages for stages in zip(*scores)]
        detections, _ = fast_rcnn_inference(
            boxes, average, sizes, predictor.test_score_thresh, predictor.test_nms_thresh,
            predictor.test_topk_per_image,
        )
        return detections

    def _run_stage(self, features: list[torch.Tensor], proposals: list[Instances], stage: int) -> Predictions:
        """Predictions of a stage for the proposals of all images."""
        pooled = self.box_pooler(features, boxes_of(proposals, training=True))
        if self.training and pooled.requires_grad:
            # The backbone hears all stages; together they are as loud as one.
            pooled.register_hook(lambda gradient: gradient / self.num_cascade_stages)
        return self.box_predictor[stage](self.box_head[stage](pooled))

    @torch.no_grad()
    def _refined_proposals(self, boxes: list[torch.Tensor], image_sizes: list[tuple[int, int]]) -> list[Instances]:
        """Predicted boxes of each image (R_i, 4) as proposals: clipped and without gradient. In training those that
        lost their area are dropped; at inference rows must stay what they are in the stages before."""
        proposals = []
        for predicted, size in zip(boxes, image_sizes):
            clipped = Boxes(clip_boxes_to_image(predicted.detach(), size))
            if self.training:
                clipped = clipped[clipped.nonempty()]
            proposals.append(Instances(size, proposal_boxes=clipped))
        return proposals

    @torch.no_grad()
    def _label(self, proposals: list[Instances], targets: list[Instances], stage: int) -> None:
        """Give each proposal the ``gt_classes`` and ``gt_boxes`` that it has in this stage, in place."""
        for found, truth in zip(proposals, targets):
            matches, found.gt_classes = label_proposals(
                found, truth, self.proposal_matchers[stage], self.num_classes
            )
            found.gt_boxes = truth.gt_boxes[matches] if len(truth) else found.proposal_boxes
        classes = torch.cat([p.gt_classes for p in proposals])
        num_background = (classes == self.num_classes).sum().item()
        with get_event_storage().name_scope(f"stage{stage}"):
            log_samples((len(classes) - num_background) / len(proposals), num_background / len(proposals))
