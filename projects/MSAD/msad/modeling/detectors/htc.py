"""Hybrid Task Cascade (Chen et al., CVPR 2019): box and mask heads in turns, with or without a semantic branch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import Conv2d, ConvTranspose2d, ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY, GeneralizedRCNN
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import select_foreground_proposals
from detectron2.modeling.roi_heads.mask_head import ROI_MASK_HEAD_REGISTRY, mask_rcnn_inference, mask_rcnn_loss
from detectron2.structures import Boxes, ImageList, Instances
from fvcore.nn import weight_init
from torch import nn

from .cascade import CascadeMaskROIHeads, Maps
from .semantic_branch import SemanticBranch

SEMANTIC = "semantic"  # name under which the branch's embedding joins the feature maps


@ROI_MASK_HEAD_REGISTRY.register()
class HTCMaskHead(nn.Module):
    """Mask R-CNN's head, under detectron2's parameter names, that takes in what the head of the stage before saw.

    Args:
        input_shape: of the features of a box.
        num_classes: K; masks for each class.
        num_conv, conv_dim: 3x3 convolutions and their channels; the features of the head before have as many.
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, num_classes: int, num_conv: int, conv_dim: int) -> None:
        super().__init__()
        if input_shape.channels != conv_dim:
            raise ValueError(
                f"MODEL.ROI_MASK_HEAD.CONV_DIM is {conv_dim}, but HTCMaskHead adds maps of that many channels to "
                f"features of {input_shape.channels}"
            )
        # The first head has none: HTCROIHeads removes it.
        self.conv_res = Conv2d(conv_dim, conv_dim, 1, activation=F.relu)
        self.num_conv = num_conv
        for k in range(num_conv):
            self.add_module(f"mask_fcn{k + 1}", Conv2d(conv_dim, conv_dim, 3, padding=1, activation=F.relu))
        self.deconv = ConvTranspose2d(conv_dim, conv_dim, 2, stride=2)
        self.predictor = Conv2d(conv_dim, num_classes, 1)
        for layer in self.children():
            weight_init.c2_msra_fill(layer)

    @classmethod
    def from_config(cls, cfg, input_shape: ShapeSpec) -> dict:
        options = cfg.MODEL.ROI_MASK_HEAD
        if options.CLS_AGNOSTIC_MASK or options.NORM:
            raise ValueError("HTCMaskHead has a mask for each class and no normalisation (MODEL.ROI_MASK_HEAD)")
        return {
            "input_shape": input_shape,
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "num_conv": options.NUM_CONV,
            "conv_dim": options.CONV_DIM,
        }

    def forward(
        self, x: torch.Tensor, previous: torch.Tensor | None = None, want_logits: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            x: (R, C, h, w) features of boxes.
            previous: first result of the head of the stage before on the same boxes.
            want_logits: False for a head that only feeds the next.

        Returns:
            features (R, C, h, w), and mask logits (R, K, 2 h, 2 w) or None.
        """
        if previous is not None:
            x = x + self.conv_res(previous)
        for k in range(self.num_conv):
            x = getattr(self, f"mask_fcn{k + 1}")(x)
        return x, self.predictor(F.relu(self.deconv(x))) if want_logits else None


@ROI_HEADS_REGISTRY.register()
class HTCROIHeads(CascadeMaskROIHeads):
    """Cascade whose mask heads pass on their features and learn on the boxes that their stage has just moved.

    Args:
        semantic_branch: adds its embedding to the features of all boxes; None: HTC without semantic segmentation. Its
            loss needs ``semantic_targets``, which :class:`HTC` sets for the length of a training step.
        semantic_pooler: cuts boxes out of the embedding, as large as the mask heads' features.
        kwargs: those of :class:`CascadeMaskROIHeads`.
    """

    @configurable
    def __init__(
        self, *, semantic_branch: SemanticBranch | None = None, semantic_pooler: ROIPooler | None = None, **kwargs
    ) -> None:
        super().__init__(**kwargs)
        if not self.mask_on:
            raise ValueError("HTCROIHeads needs masks; set MODEL.MASK_ON: True")
        wrong = [type(head).__name__ for head in self.mask_head if not isinstance(head, HTCMaskHead)]
        if wrong:
            raise ValueError(f"HTCROIHeads needs MODEL.ROI_MASK_HEAD.NAME: HTCMaskHead, not {wrong[0]}")
        self.mask_head[0].conv_res = None
        self.semantic_head, self.semantic_pooler = semantic_branch, semantic_pooler
        self.semantic_targets: list[torch.Tensor] | None = None

    @classmethod
    def from_config(cls, cfg, input_shape) -> dict:
        arguments = super().from_config(cfg, input_shape)
        if cfg.MODEL.HTC.SEMANTIC_ON:
            branch = SemanticBranch(cfg, input_shape)
            arguments["semantic_branch"] = branch
            arguments["semantic_pooler"] = ROIPooler(
                output_size=cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION,
                scales=[1.0 / branch.stride],
                sampling_ratio=cfg.MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO,
                pooler_type="ROIAlignV2",
            )
        return arguments

    def forward(
        self, images: ImageList, features: Maps, proposals: list[Instances], targets: list[Instances] | None = None
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """As the cascade's; with the semantic branch also "loss_sem_seg"."""
        if self.semantic_head is None:
            return super().forward(images, features, proposals, targets)
        if not self.training:
            return super().forward(images, self._with_embedding(features), proposals)
        if self.semantic_targets is None:
            raise ValueError(
                "HTC's semantic branch is trained on maps of things and stuff: set MODEL.META_ARCHITECTURE: HTC and "
                "give inputs 'sem_seg', or MODEL.HTC.SEMANTIC_ON: False"
            )
        embedding, logits = self.semantic_head(features)
        samples, losses = super().forward(images, {**features, SEMANTIC: embedding}, proposals, targets)
        return samples, {**losses, **self.semantic_head.losses(logits, self.semantic_targets)}

    def forward_with_given_boxes(self, features: Maps, instances: list[Instances]) -> list[Instances]:
        """Detections with ``pred_boxes`` and ``pred_classes`` get ``pred_masks``."""
        return super().forward_with_given_boxes(self._with_embedding(features), instances)

    def _with_embedding(self, features: Maps) -> Maps:
        if self.semantic_head is not None and SEMANTIC not in features:
            return {**features, SEMANTIC: self.semantic_head(features)[0]}
        return features

    def pool_boxes(self, features: Maps, boxes: list[Boxes]) -> torch.Tensor:
        return self._add_semantics(super().pool_boxes(features, boxes), features, boxes)

    def pool_masks(self, features: Maps, boxes: list[Boxes]) -> torch.Tensor:
        return self._add_semantics(super().pool_masks(features, boxes), features, boxes)

    def _add_semantics(self, pooled: torch.Tensor, features: Maps, boxes: list[Boxes]) -> torch.Tensor:
        if self.semantic_head is None:
            return pooled
        semantic = self.semantic_pooler([features[SEMANTIC]], boxes)
        return pooled + F.adaptive_avg_pool2d(semantic, pooled.shape[-2:])

    def mask_samples(
        self, samples: list[Instances], refined: list[Instances], targets: list[Instances], stage: int
    ) -> list[Instances]:
        """Objects of a new draw from the boxes that the stage has moved, with the stage's own threshold."""
        return select_foreground_proposals(self.sample(refined, targets, stage), self.num_classes)[0]

    def mask_losses(self, features: Maps, objects: list[Instances], stage: int) -> dict[str, torch.Tensor]:
        pooled = self.pool_masks(features, [x.proposal_boxes for x in objects])
        return {"loss_mask": mask_rcnn_loss(self.mask_logits(pooled, [stage])[0], objects)}

    def mask_logits(self, pooled: torch.Tensor, stages: list[int]) -> list[torch.Tensor]:
        """Logits (R, K, M, M) of the heads of ``stages``; the heads before them run for their features."""
        previous, wanted = None, []
        for stage, head in enumerate(self.mask_head[: max(stages) + 1]):
            previous, logits = head(pooled, previous, stage in stages)
            wanted += [logits] if stage in stages else []
        return wanted

    def masks(self, pooled: torch.Tensor, instances: list[Instances]) -> list[list[torch.Tensor]]:
        last = self.num_cascade_stages - 1
        by_head = []
        for logits in self.mask_logits(pooled, list(range(last + 1)) if self.mask_mean == "all" else [last]):
            mask_rcnn_inference(logits, instances)
            by_head.append([found.pred_masks for found in instances])
        return by_head


@META_ARCH_REGISTRY.register()
class HTC(GeneralizedRCNN):
    """detectron2's R-CNN around HTCROIHeads that hands on "sem_seg", (h, w) int64 with each image, for training."""

    def forward(self, batched_inputs: list[dict]) -> dict[str, torch.Tensor] | list[dict]:
        if not self.training or getattr(self.roi_heads, "semantic_head", None) is None:
            return super().forward(batched_inputs)
        maps = []
        for number, item in enumerate(batched_inputs):
            size = tuple(item["image"].shape[-2:])
            if "sem_seg" not in item or tuple(item["sem_seg"].shape) != size:
                shape = f"one of {tuple(item['sem_seg'].shape)}" if "sem_seg" in item else "none"
                raise ValueError(
                    f"HTC's semantic branch needs a map 'sem_seg' of {size} with image {number} "
                    f"({item.get('file_name', 'no file name')}), which has {shape}; or set MODEL.HTC.SEMANTIC_ON: False"
                )
            maps.append(item["sem_seg"].to(self.device))
        self.roi_heads.semantic_targets = maps
        try:
            return super().forward(batched_inputs)
        finally:
            self.roi_heads.semantic_targets = None
