"""RoI heads of the R-CNNs without a pyramid ("C4"): the last stage of the ResNet runs on every proposal."""

import torch
from torch import nn

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.resnet import BottleneckBlock, ResNet
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes, ImageList, Instances

from .base import ROI_HEADS_REGISTRY, ROIHeads, boxes_of, select_foreground_proposals
from .fast_rcnn import FastRCNNOutputLayers
from .mask_head import build_mask_head

__all__ = ["Res5ROIHeads"]


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeads(ROIHeads):
    """Boxes, and masks if wanted, from features that went through one shared ``res5``.

    Args:
        in_features: name of the one feature map; pooler: pools it inside boxes.
        res5: (M, C, H, W) -> (M, C', H / 2, W / 2).
        box_predictor: see :class:`FastRCNNOutputLayers`; it gets the mean over the cells.
        mask_head: see :class:`StandardROIHeads`; None for no masks.
        kwargs: those of :class:`ROIHeads`.
    """

    @configurable
    def __init__(
        self, *, in_features: list[str], pooler: ROIPooler, res5: nn.Module, box_predictor: nn.Module,
        mask_head: nn.Module | None = None, **kwargs,
    ):
        super().__init__(**kwargs)
        self.in_features, self.pooler = in_features, pooler
        self.res5, self.box_predictor = res5, box_predictor
        self.mask_on = mask_head is not None
        if self.mask_on:
            self.mask_head = mask_head

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict:
        heads, node = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_HEAD
        if cfg.MODEL.KEYPOINT_ON:
            raise ValueError("Res5ROIHeads has no keypoints; set MODEL.ROI_HEADS.NAME to StandardROIHeads")
        if len(heads.IN_FEATURES) != 1:
            raise ValueError(f"Res5ROIHeads reads one feature map, not {list(heads.IN_FEATURES)}")
        source = input_shape[heads.IN_FEATURES[0]]
        res5, channels = cls._build_res5_block(cfg)
        arguments = super().from_config(cfg)
        arguments |= {
            "in_features": heads.IN_FEATURES, "res5": res5,
            "pooler": ROIPooler(
                node.POOLER_RESOLUTION, [1.0 / source.stride], node.POOLER_SAMPLING_RATIO, node.POOLER_TYPE
            ),
            "box_predictor": FastRCNNOutputLayers(cfg, ShapeSpec(channels=channels, height=1, width=1)),
        }
        if cfg.MODEL.MASK_ON:
            size = node.POOLER_RESOLUTION
            arguments["mask_head"] = build_mask_head(cfg, ShapeSpec(channels=channels, height=size, width=size))
        return arguments

    @classmethod
    def _build_res5_block(cls, cfg) -> tuple[nn.Sequential, int]:
        """Stage res5 from ``cfg.MODEL.RESNETS``, and its channels."""
        node = cfg.MODEL.RESNETS
        if node.DEFORM_ON_PER_STAGE[-1]:
            raise ValueError("Res5ROIHeads: MODEL.RESNETS.DEFORM_ON_PER_STAGE of res5 must be False")
        channels = node.RES2_OUT_CHANNELS * 8
        blocks = ResNet.make_stage(
            BottleneckBlock, 3, stride_per_block=[2, 1, 1], in_channels=channels // 2, out_channels=channels,
            bottleneck_channels=node.NUM_GROUPS * node.WIDTH_PER_GROUP * 8, num_groups=node.NUM_GROUPS,
            norm=node.NORM, stride_in_1x1=node.STRIDE_IN_1X1,
        )
        return nn.Sequential(*blocks), channels

    def _features_of(self, features: dict[str, torch.Tensor], boxes: list[Boxes]) -> torch.Tensor:
        return self.res5(self.pooler([features[name] for name in self.in_features], boxes))

    def forward(
        self, images: ImageList, features: dict[str, torch.Tensor], proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """See :meth:`ROIHeads.forward`; in training no proposals are returned."""
        if self.training:
            proposals = self._training_samples(proposals, targets)
        shared = self._features_of(features, boxes_of(proposals, training=True))
        predictions = self.box_predictor(shared.mean(dim=(2, 3)))
        if not self.training:
            detections, _ = self.box_predictor.inference(predictions, proposals)
            return self.forward_with_given_boxes(features, detections), {}
        losses = self.box_predictor.losses(predictions, proposals)
        if self.mask_on:
            objects, masks = select_foreground_proposals(proposals, self.num_classes)
            losses |= self.mask_head(shared[torch.cat(masks)], objects)
        return [], losses

    def forward_with_given_boxes(
        self, features: dict[str, torch.Tensor], instances: list[Instances]
    ) -> list[Instances]:
        """Add ``pred_masks``, if there is a mask head, to detections with ``pred_boxes`` and ``pred_classes``."""
        if self.training:
            raise RuntimeError("forward_with_given_boxes is for inference; call eval() first")
        if not self.mask_on:
            return instances
        return self.mask_head(self._features_of(features, boxes_of(instances, training=False)), instances)
