"""RetinaNet (Lin et al., arXiv:1708.02002)."""

import math

import torch
from torch import nn

from detectron2.config import configurable
from detectron2.layers import CycleBatchNormList, ShapeSpec, get_norm
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.modeling.backbone import Backbone, build_backbone
from detectron2.modeling.box_regression import Box2BoxTransform, _dense_box_regression_loss
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from detectron2.utils.events import get_event_storage

from .build import META_ARCH_REGISTRY
from .dense_detector import DenseDetector
from .dense_losses import focal_loss_sum

__all__ = ["RetinaNet"]

_PER_LEVEL_NORMS = {"BN": nn.BatchNorm2d, "SyncBN": nn.SyncBatchNorm}


@META_ARCH_REGISTRY.register()
class RetinaNet(DenseDetector):
    """One-stage detector: anchors matched by IoU, focal loss for the classes.

    Args:
        head: gives class logits (A * K channels) and box deltas (A * 4 channels) of every level.
        anchor_generator, box2box_transform, anchor_matcher: see those modules.
        box_reg_loss_type: "smooth_l1" (with ``smooth_l1_beta``), "giou", "diou" or "ciou".
        test_score_thresh, test_topk_candidates: what survives of each level before NMS (``test_nms_thresh``).
        vis_period, input_format: iterations between training images, and the channel order of the images.
    """

    @configurable
    def __init__(
        self, *, backbone: Backbone, head: nn.Module, head_in_features, anchor_generator, box2box_transform,
        anchor_matcher, num_classes, focal_loss_alpha=0.25, focal_loss_gamma=2.0, smooth_l1_beta=0.0,
        box_reg_loss_type="smooth_l1", test_score_thresh=0.05, test_topk_candidates=1000, test_nms_thresh=0.5,
        max_detections_per_image=100, pixel_mean, pixel_std, vis_period=0, input_format="BGR",
    ):
        super().__init__(backbone, head, head_in_features, pixel_mean=pixel_mean, pixel_std=pixel_std)
        self.num_classes = num_classes
        self.anchor_generator, self.anchor_matcher = anchor_generator, anchor_matcher
        self.box2box_transform = box2box_transform
        self.focal_loss_alpha, self.focal_loss_gamma = focal_loss_alpha, focal_loss_gamma
        self.box_reg_loss_type, self.smooth_l1_beta = box_reg_loss_type, smooth_l1_beta
        self.test_score_thresh, self.test_nms_thresh = test_score_thresh, test_nms_thresh
        self.test_topk_candidates = test_topk_candidates
        self.max_detections_per_image = max_detections_per_image
        self.vis_period, self.input_format = vis_period, input_format

    @classmethod
    def from_config(cls, cfg) -> dict:
        node = cfg.MODEL.RETINANET
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        shapes = [shapes[name] for name in node.IN_FEATURES]
        modules = {
            "backbone": backbone,
            "head": RetinaNetHead(cfg, shapes),
            "anchor_generator": build_anchor_generator(cfg, shapes),
            "anchor_matcher": Matcher(node.IOU_THRESHOLDS, node.IOU_LABELS, allow_low_quality_matches=True),
            "box2box_transform": Box2BoxTransform(weights=node.BBOX_REG_WEIGHTS),
        }
        loss = {
            "box_reg_loss_type": node.BBOX_REG_LOSS_TYPE, "smooth_l1_beta": node.SMOOTH_L1_LOSS_BETA,
            "focal_loss_alpha": node.FOCAL_LOSS_ALPHA, "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
        }
        test = {
            "test_score_thresh": node.SCORE_THRESH_TEST, "test_nms_thresh": node.NMS_THRESH_TEST,
            "test_topk_candidates": node.TOPK_CANDIDATES_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        }
        return dict(
            head_in_features=node.IN_FEATURES, num_classes=node.NUM_CLASSES, **modules, **loss, **test,
            pixel_mean=cfg.MODEL.PIXEL_MEAN, pixel_std=cfg.MODEL.PIXEL_STD,
            vis_period=cfg.VIS_PERIOD, input_format=cfg.INPUT.FORMAT,
        )

    def forward_training(self, images, features, predictions, gt_instances) -> dict[str, torch.Tensor]:
        logits, deltas = self._transpose_dense_predictions(predictions, [self.num_classes, 4])
        anchors = self.anchor_generator(features)
        labels, boxes = self.label_anchors(anchors, gt_instances)
        return self.losses(anchors, logits, labels, deltas, boxes)

    def losses(self, anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes) -> dict[str, torch.Tensor]:
        """Losses of a batch, divided by the running number of foreground anchors ``loss_normalizer``.

        Args:
            anchors: (R_l, 4) boxes of each level; pred_logits: (N, R_l, K) and pred_anchor_deltas: (N, R_l, 4)
                of each level; gt_labels, gt_boxes: what :meth:`label_anchors` returns.

        Returns:
            dict with the scalars "loss_cls" and "loss_box_reg".
        """
        labels = torch.stack(gt_labels)
        foreground = (labels >= 0) & (labels != self.num_classes)
        classification = focal_loss_sum(pred_logits, labels, self.focal_loss_alpha, self.focal_loss_gamma)
        regression = _dense_box_regression_loss(
            anchors, self.box2box_transform, pred_anchor_deltas, gt_boxes, foreground,
            box_reg_loss_type=self.box_reg_loss_type, smooth_l1_beta=self.smooth_l1_beta,
        )
        count = foreground.sum().item()
        get_event_storage().put_scalar("num_pos_anchors", count / len(labels))
        normalizer = self._ema_update("loss_normalizer", max(count, 1), 100)
        return {"loss_cls": classification / normalizer, "loss_box_reg": regression / normalizer}

    @torch.no_grad()
    def label_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Assign every anchor (R over all levels) of every image to a ground-truth box.

        Returns:
            for each image the labels, (R,) int64 (0..K-1 a class, K background, -1 ignored), and the matched
            boxes, (R, 4), which mean nothing where the label is not a class.
        """
        everywhere = Boxes.cat(anchors)
        labels, boxes = [], []
        for gt in gt_instances:
            match, kind = self.anchor_matcher(pairwise_iou(gt.gt_boxes, everywhere))
            if len(gt) == 0:
                labels.append(torch.full_like(match, self.num_classes))
                boxes.append(torch.zeros_like(everywhere.tensor))
                continue
            label = gt.gt_classes[match]
            label.masked_fill_(kind == 0, self.num_classes).masked_fill_(kind == -1, -1)
            labels.append(label)
            boxes.append(gt.gt_boxes.tensor[match])
        return labels, boxes

    def forward_inference(
        self, images: ImageList, features: list[torch.Tensor], predictions: list[list[torch.Tensor]]
    ) -> list[Instances]:
        """Detections of each image in pixels of the network's input."""
        logits, deltas = self._transpose_dense_predictions(predictions, [self.num_classes, 4])
        anchors = self.anchor_generator(features)
        scores = [level.sigmoid() for level in logits]
        return [
            self.inference_single_image(anchors, [s[i] for s in scores], [d[i] for d in deltas], size)
            for i, size in enumerate(images.image_sizes)
        ]


class RetinaNetHead(nn.Module):
    """Two towers of 3x3 convolutions, shared by all levels, for the classes and for the boxes.

    Args:
        input_shape: one :class:`ShapeSpec` a level; all levels have the same channels.
        num_anchors: anchors per cell.
        conv_dims: channels of the convolutions of each tower.
        norm: normalisation behind them; batch norms keep separate statistics for each level.
        prior_prob: probability that a fresh head gives to every class.
    """

    @configurable
    def __init__(
        self, *, input_shape: list[ShapeSpec], num_classes, num_anchors, conv_dims: list[int], norm="",
        prior_prob=0.01,
    ):
        super().__init__()
        self._num_features = len(input_shape)
        channels = input_shape[0].channels
        self.cls_subnet = self._tower(channels, conv_dims, norm)
        self.bbox_subnet = self._tower(channels, conv_dims, norm)
        self.cls_score = nn.Conv2d(conv_dims[-1], num_anchors * num_classes, 3, padding=1)
        self.bbox_pred = nn.Conv2d(conv_dims[-1], num_anchors * 4, 3, padding=1)
        _init_convs(self)
        nn.init.constant_(self.cls_score.bias, -math.log((1 - prior_prob) / prior_prob))

    @classmethod
    def from_config(cls, cfg, input_shape: list[ShapeSpec]) -> dict:
        node = cfg.MODEL.RETINANET
        per_level = build_anchor_generator(cfg, input_shape).num_anchors
        if len(set(per_level)) != 1:
            raise ValueError(f"the levels share one head, so they need equally many anchors, not {per_level}")
        return {
            "input_shape": input_shape, "num_anchors": per_level[0], "num_classes": node.NUM_CLASSES,
            "conv_dims": [input_shape[0].channels] * node.NUM_CONVS, "norm": node.NORM, "prior_prob": node.PRIOR_PROB,
        }

    def _tower(self, channels: int, conv_dims: list[int], norm) -> nn.Sequential:
        layers: list[nn.Module] = []
        for width in conv_dims:
            layers.append(nn.Conv2d(channels, width, 3, padding=1))
            if norm in _PER_LEVEL_NORMS:
                # Levels differ in statistics and share the affine part.
                layers.append(
                    CycleBatchNormList(self._num_features, _PER_LEVEL_NORMS[norm], num_features=width)
                )
            elif norm:
                layers.append(get_norm(norm, width))
            layers.append(nn.ReLU())
            channels = width
        return nn.Sequential(*layers)

    def forward(self, features: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Maps (N, C, H_l, W_l) -> logits (N, A * K, H_l, W_l) and deltas (N, A * 4, H_l, W_l), lists over levels."""
        if len(features) != self._num_features:
            raise ValueError(f"the head was made for {self._num_features} levels and got {len(features)}")
        logits = [self.cls_score(self.cls_subnet(f)) for f in features]
        deltas = [self.bbox_pred(self.bbox_subnet(f)) for f in features]
        return logits, deltas


def _init_convs(module: nn.Module) -> None:
    """Normal weights of deviation 0.01 and zero biases for every convolution inside."""
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)
