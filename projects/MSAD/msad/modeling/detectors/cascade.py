"""Cascade Mask R-CNN (Cai and Vasconcelos, TPAMI 2019) with a mask head for every stage."""

from __future__ import annotations

import torch
from detectron2.config import configurable
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import CascadeROIHeads, select_foreground_proposals
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import nn

Maps = dict[str, torch.Tensor]


@ROI_HEADS_REGISTRY.register()
class CascadeMaskROIHeads(CascadeROIHeads):
    """detectron2's cascade with mmdetection's rules and, with MODEL.MASK_ON, a mask head a stage.

    Every stage draws its own samples from the boxes that the stage before moved, the ground truth among them, and its
    losses are weighted; detectron2's class keeps the proposals of the first draw, has one mask head for all stages,
    and scales gradients instead. Parameter names are detectron2's, with ``mask_head.{stage}``.

    Args:
        stage_loss_weights: of all losses of each stage.
        score_mean: what is averaged over the stages for the final scores: "logits" or "probs" (detectron2).
        mask_mean: which heads' masks are averaged at inference: "all" or only the "last".
        kwargs: detectron2's; without keypoints.
    """

    @configurable
    def __init__(
        self, *, stage_loss_weights: list[float], score_mean: str = "logits", mask_mean: str = "all", **kwargs
    ) -> None:  # fmt: skip
        super().__init__(**kwargs)
        node = "MODEL.ROI_BOX_CASCADE_HEAD"
        if self.keypoint_on:
            raise ValueError(f"{type(self).__name__} has no keypoint head; set MODEL.KEYPOINT_ON: False")
        if len(stage_loss_weights) != self.num_cascade_stages:
            raise ValueError(
                f"{node}.STAGE_LOSS_WEIGHTS has {len(stage_loss_weights)} values for {self.num_cascade_stages} stages"
            )
        if score_mean not in ("logits", "probs"):
            raise ValueError(f"{node}.SCORE_MEAN must be 'logits' or 'probs', not {score_mean!r}")
        if mask_mean not in ("all", "last"):
            raise ValueError(f"{node}.MASK_MEAN must be 'all' or 'last', not {mask_mean!r}")
        self.stage_loss_weights = list(stage_loss_weights)
        self.score_mean, self.mask_mean = score_mean, mask_mean
        # Added here, with a mark, because the next stage must not see them again.
        self.append_ground_truth, self.proposal_append_gt = self.proposal_append_gt, False

    @classmethod
    def from_config(cls, cfg, input_shape) -> dict:
        options = cfg.MODEL.ROI_BOX_CASCADE_HEAD
        return {
            **super().from_config(cfg, input_shape),
            "stage_loss_weights": options.STAGE_LOSS_WEIGHTS,
            "score_mean": options.SCORE_MEAN,
            "mask_mean": options.MASK_MEAN,
        }

    @classmethod
    def _init_mask_head(cls, cfg, input_shape) -> dict:
        branch, heads = {}, []
        for _ in cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS:
            branch = super()._init_mask_head(cfg, input_shape)
            heads.append(branch.get("mask_head"))
        return {**branch, "mask_head": nn.ModuleList(heads)} if branch else {}

    def forward(
        self, images: ImageList, features: Maps, proposals: list[Instances], targets: list[Instances] | None = None
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """detectron2's contract of RoI heads: the last stage's samples and losses, or detections and {}."""
        if not self.training:
            return self.forward_with_given_boxes(features, self.detect(features, proposals)), {}
        if targets is None:
            raise ValueError(f"{type(self).__name__}: training needs ground truth")
        losses, samples = {}, proposals
        for stage, weight in enumerate(self.stage_loss_weights):
            samples = self.sample(proposals, targets, stage)
            predictions = self.classify(features, samples, stage)
            with get_event_storage().name_scope(f"stage{stage}"):
                of_stage = self.box_predictor[stage].losses(predictions, samples)
                proposals = self.refine(predictions, samples, stage)
                if self.mask_on:
                    of_stage |= self.mask_losses(features, self.mask_samples(samples, proposals, targets, stage), stage)
            losses |= {f"{name}_stage{stage}": weight * value for name, value in of_stage.items()}
        return samples, losses

    @torch.no_grad()
    def sample(self, proposals: list[Instances], targets: list[Instances], stage: int) -> list[Instances]:
        """Draw the proposals that a stage learns from.

        Returns:
            what detectron2's ``label_and_sample_proposals`` gives with the stage's threshold, with the field
            ``is_ground_truth`` (R,), bool.
        """
        candidates = []
        for found, truth in zip(proposals, targets):
            boxes = [found.proposal_boxes] + [truth.gt_boxes] * self.append_ground_truth
            joint = Instances(found.image_size, proposal_boxes=Boxes.cat(boxes))
            joint.is_ground_truth = torch.arange(len(joint), device=joint.proposal_boxes.device) >= len(found)
            candidates.append(joint)
        self.proposal_matcher = self.proposal_matchers[stage]
        return self.label_and_sample_proposals(candidates, targets)

    def classify(self, features: Maps, proposals: list[Instances], stage: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (R, K + 1) and deltas (R, 4) of the proposals of all images in a stage."""
        pooled = self.pool_boxes(features, [x.proposal_boxes for x in proposals])
        return self.box_predictor[stage](self.box_head[stage](pooled))

    def pool_boxes(self, features: Maps, boxes: list[Boxes]) -> torch.Tensor:
        """What the box heads see of each box: (R, C, h, w)."""
        return self.box_pooler([features[name] for name in self.box_in_features], boxes)

    def pool_masks(self, features: Maps, boxes: list[Boxes]) -> torch.Tensor:
        """What the mask heads see of each box: (R, C, h, w)."""
        return self.mask_pooler([features[name] for name in self.mask_in_features], boxes)

    @torch.no_grad()
    def refine(self, predictions: tuple, proposals: list[Instances], stage: int) -> list[Instances]:
        """Proposals moved to where a stage predicts their objects, cut to the image.

        In training without those that were ground truth or have no area; else row for row.
        """
        refined = []
        for moved, before in zip(self.box_predictor[stage].predict_boxes(predictions, proposals), proposals):
            boxes = Boxes(moved)
            boxes.clip(before.image_size)
            if self.training:
                boxes = boxes[boxes.nonempty() & ~before.is_ground_truth]
            refined.append(Instances(before.image_size, proposal_boxes=boxes))
        return refined

    def mask_samples(
        self, samples: list[Instances], refined: list[Instances], targets: list[Instances], stage: int
    ) -> list[Instances]:
        """What the mask head of a stage learns from: the objects among the stage's samples, before they move."""
        return select_foreground_proposals(samples, self.num_classes)[0]

    def mask_losses(self, features: Maps, objects: list[Instances], stage: int) -> dict[str, torch.Tensor]:
        """"loss_mask" of a stage."""
        return self.mask_head[stage](self.pool_masks(features, [x.proposal_boxes for x in objects]), objects)

    def detect(self, features: Maps, proposals: list[Instances]) -> list[Instances]:
        """Boxes, scores and classes of each image in pixels of the network's input."""
        sizes, scores = [x.image_size for x in proposals], []
        last = self.num_cascade_stages - 1
        for stage in range(last + 1):
            predictions = self.classify(features, proposals, stage)
            logits = predictions[0].float()
            scores.append(logits if self.score_mean == "logits" else logits.softmax(dim=1))
            if stage < last:
                proposals = self.refine(predictions, proposals, stage)
        predictor = self.box_predictor[last]
        mean = sum(scores) / len(scores)
        mean = mean.softmax(dim=1) if self.score_mean == "logits" else mean
        boxes = predictor.predict_boxes(predictions, proposals)
        found, _ = fast_rcnn_inference(
            boxes, list(mean.split([len(x) for x in proposals])), sizes, predictor.test_score_thresh,
            predictor.test_nms_thresh, predictor.test_topk_per_image,
        )  # fmt: skip
        return found

    def _forward_mask(self, features: Maps, instances: list[Instances]) -> list[Instances]:
        """Give detections ``pred_masks``; detectron2 calls this in ``forward_with_given_boxes``."""
        if self.mask_on:
            pooled = self.pool_masks(features, [x.pred_boxes for x in instances])
            by_head = self.masks(pooled, instances)
            for found, *masks in zip(instances, *by_head):
                found.pred_masks = sum(masks) / len(masks)
        return instances

    def masks(self, pooled: torch.Tensor, instances: list[Instances]) -> list[list[torch.Tensor]]:
        """Foreground probabilities (N, 1, M, M) of each image's detections, by each head that counts."""
        heads = self.mask_head if self.mask_mean == "all" else self.mask_head[-1:]
        return [[found.pred_masks for found in head(pooled, instances)] for head in heads]
