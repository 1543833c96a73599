"""RoI heads with a branch a task, each with its own pooled features (Mask R-CNN, arXiv:1703.06870, fig. 4 right)."""

import torch
from torch import nn

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes, ImageList, Instances

from .base import (
    ROI_HEADS_REGISTRY,
    ROIHeads,
    boxes_of,
    build_roi_heads,
    select_foreground_proposals,
    select_proposals_with_visible_keypoints,
)
from .box_head import build_box_head
from .fast_rcnn import FastRCNNOutputLayers
from .keypoint_head import build_keypoint_head
from .mask_head import build_mask_head
from .res5 import Res5ROIHeads

__all__ = [
    "ROI_HEADS_REGISTRY", "ROIHeads", "Res5ROIHeads", "StandardROIHeads", "build_roi_heads",
    "select_foreground_proposals", "select_proposals_with_visible_keypoints",
]


def build_pooler(node, names: list[str], input_shape: dict[str, ShapeSpec]) -> tuple[ROIPooler, ShapeSpec]:
    """The pooler that a config node with the keys ``POOLER_*`` describes, and the shape of what it gives.

    Raises ValueError if the maps ``names`` differ in channels.
    """
    shapes = [input_shape[name] for name in names]
    channels = {shape.channels for shape in shapes}
    if len(channels) != 1:
        raise ValueError(f"the feature maps {list(names)} are pooled together but have {sorted(channels)} channels")
    size = node.POOLER_RESOLUTION
    pooler = ROIPooler(
        output_size=size, scales=[1.0 / shape.stride for shape in shapes],
        sampling_ratio=node.POOLER_SAMPLING_RATIO, pooler_type=node.POOLER_TYPE,
    )
    return pooler, ShapeSpec(channels=channels.pop(), height=size, width=size)


@ROI_HEADS_REGISTRY.register()
class StandardROIHeads(ROIHeads):
    """A branch for classes and boxes, and optional ones for masks and keypoints.

    Args:
        box_in_features: names of the feature maps, from fine to coarse; box_pooler: pools them inside proposals.
        box_head: pooled features -> features of a box; box_predictor: those -> what its own ``losses`` and
            ``inference`` take, see :class:`FastRCNNOutputLayers`.
        mask_in_features, mask_pooler, mask_head: the same for masks, None for no masks. The head takes features and
            Instances to losses (training) or to Instances with ``pred_masks``. Without a pooler it gets the dict of
            feature maps.
        keypoint_in_features, keypoint_pooler, keypoint_head: the same for keypoints and ``pred_keypoints``.
        train_on_pred_boxes: the other branches learn on the boxes that the first one predicts.
        kwargs: those of :class:`ROIHeads`.
    """

    @configurable
    def __init__(
        self, *, box_in_features: list[str], box_pooler: ROIPooler, box_head: nn.Module, box_predictor: nn.Module,
        mask_in_features: list[str] | None = None, mask_pooler: ROIPooler | None = None,
        mask_head: nn.Module | None = None, keypoint_in_features: list[str] | None = None,
        keypoint_pooler: ROIPooler | None = None, keypoint_head: nn.Module | None = None,
        train_on_pred_boxes: bool = False, **kwargs,
    ):
        super().__init__(**kwargs)
        self.in_features = self.box_in_features = box_in_features
        self.box_pooler, self.box_head, self.box_predictor = box_pooler, box_head, box_predictor
        self.mask_on, self.keypoint_on = mask_in_features is not None, keypoint_in_features is not None
        if self.mask_on:
            self.mask_in_features = mask_in_features
            self.mask_pooler, self.mask_head = mask_pooler, mask_head
        if self.keypoint_on:
            self.keypoint_in_features = keypoint_in_features
            self.keypoint_pooler, self.keypoint_head = keypoint_pooler, keypoint_head
        self.train_on_pred_boxes = train_on_pred_boxes

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict:
        arguments = super().from_config(cfg)
        arguments["train_on_pred_boxes"] = cfg.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES
        # Methods of the class, so that a subclass can replace the branch that it wants different.
        for make_branch in (cls._init_box_head, cls._init_mask_head, cls._init_keypoint_head):
            arguments.update(make_branch(cfg, input_shape))
        return arguments

    @classmethod
    def _init_box_head(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict:
        names = cfg.MODEL.ROI_HEADS.IN_FEATURES
        pooler, shape = build_pooler(cfg.MODEL.ROI_BOX_HEAD, names, input_shape)
        head = build_box_head(cfg, shape)
        return {
            "box_in_features": names, "box_pooler": pooler, "box_head": head,
            "box_predictor": FastRCNNOutputLayers(cfg, head.output_shape),
        }

    @classmethod
    def _init_mask_head(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict:
        if not cfg.MODEL.MASK_ON:
            return {}
        return _extra_branch("mask", cfg, cfg.MODEL.ROI_MASK_HEAD, input_shape, build_mask_head)

    @classmethod
    def _init_keypoint_head(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict:
        if not cfg.MODEL.KEYPOINT_ON:
            return {}
        return _extra_branch("keypoint", cfg, cfg.MODEL.ROI_KEYPOINT_HEAD, input_shape, build_keypoint_head)

    def forward(
        self, images: ImageList, features: dict[str, torch.Tensor], proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """See :meth:`ROIHeads.forward`."""
        if not self.training:
            detections = self._forward_box(features, proposals)
            return self.forward_with_given_boxes(features, detections), {}
        samples = self._training_samples(proposals, targets)
        return samples, {
            **self._forward_box(features, samples), **self._forward_mask(features, samples),
            **self._forward_keypoint(features, samples),
        }

    def forward_with_given_boxes(
        self, features: dict[str, torch.Tensor], instances: list[Instances]
    ) -> list[Instances]:
        """Add ``pred_masks`` and ``pred_keypoints``, as far as there are such branches, to detections that have
        ``pred_boxes`` and ``pred_classes``; at inference only."""
        if self.training:
            raise RuntimeError("forward_with_given_boxes is for inference; call eval() first")
        for found in instances:
            if not (found.has("pred_boxes") and found.has("pred_classes")):
                raise ValueError("forward_with_given_boxes needs instances with pred_boxes and pred_classes")
        return self._forward_keypoint(features, self._forward_mask(features, instances))

    def _forward_box(self, features: dict[str, torch.Tensor], proposals: list[Instances]):
        """Losses of the sampled proposals in training, else detections of each image."""
        maps = [features[name] for name in self.box_in_features]
        pooled = self.box_pooler(maps, boxes_of(proposals, training=True))
        predictions = self.box_predictor(self.box_head(pooled))
        if not self.training:
            detections, _ = self.box_predictor.inference(predictions, proposals)
            return detections
        losses = self.box_predictor.losses(predictions, proposals)
        if self.train_on_pred_boxes:
            self._move_proposals(predictions, proposals)
        return losses

    @torch.no_grad()
    def _move_proposals(self, predictions, proposals: list[Instances]) -> None:
        """Replace the boxes of the proposals by those predicted for their classes, in place."""
        for p, moved in zip(proposals, self.box_predictor.predict_boxes_for_gt_classes(predictions, proposals)):
            p.proposal_boxes = Boxes(moved)

    def _objects(self, proposals: list[Instances]) -> list[Instances]:
        chosen, _ = select_foreground_proposals(proposals, self.num_classes)
        return chosen

    def _forward_mask(self, features: dict[str, torch.Tensor], instances: list[Instances]):
        """Losses in training, else ``instances`` with ``pred_masks``; without this branch {} and ``instances``."""
        if self.mask_on:
            boxes = self._objects(instances) if self.training else instances
            return self.mask_head(self._pool(self.mask_pooler, self.mask_in_features, features, boxes), boxes)
        return {} if self.training else instances

    def _forward_keypoint(self, features: dict[str, torch.Tensor], instances: list[Instances]):
        """As :meth:`_forward_mask`, for keypoints."""
        if self.keypoint_on:
            boxes = instances
            if self.training:
                boxes = select_proposals_with_visible_keypoints(self._objects(instances))
            pooled = self._pool(self.keypoint_pooler, self.keypoint_in_features, features, boxes)
            return self.keypoint_head(pooled, boxes)
        return {} if self.training else instances

    def _pool(self, pooler: ROIPooler | None, names: list[str], features: dict, instances: list[Instances]):
        if pooler is None:
            return {name: features[name] for name in names}
        return pooler([features[name] for name in names], boxes_of(instances, self.training))


def _extra_branch(kind: str, cfg, node, input_shape: dict[str, ShapeSpec], build_head) -> dict:
    """Arguments of :class:`StandardROIHeads` for masks or keypoints; the maps are those of the boxes."""
    names = cfg.MODEL.ROI_HEADS.IN_FEATURES
    pooler, shape = None, {name: input_shape[name] for name in names}
    if node.POOLER_TYPE:
        pooler, shape = build_pooler(node, names, input_shape)
    return {f"{kind}_in_features": names, f"{kind}_pooler": pooler, f"{kind}_head": build_head(cfg, shape)}
