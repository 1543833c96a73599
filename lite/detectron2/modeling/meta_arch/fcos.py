"""FCOS (Tian et al., arXiv:1904.01355) with the improvements of its journal version (arXiv:2006.09214)."""

import torch
import torch.nn.functional as F
from torch import nn

from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.box_regression import Box2BoxTransformLinear, _dense_box_regression_loss
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage

from .dense_detector import DenseDetector
from .dense_losses import focal_loss_sum
from .retinanet import RetinaNetHead

__all__ = ["FCOS"]

# A cell of stride s takes objects whose farthest edge is between these multiples of s away; the finest level has no
# lower and the coarsest no upper limit. With strides 8..128 that is (0, 64), (64, 128) ... (512, inf) pixels.
REACH_IN_STRIDES = (4.0, 8.0)
# Larger than any area, so that a quality of (this - area) is positive and prefers the smaller box.
AREA_CEILING = 1e8


class FCOS(DenseDetector):
    """One-stage detector without anchor shapes: one square per cell stands for its centre.

    Args:
        head: gives class logits, box distances and centreness logits of every level, see :class:`FCOSHead`.
        box2box_transform: default: distances in units of the stride.
        center_sampling_radius: positives lie less than this many strides from the box centre, in x and in y.
        test_score_thresh, test_topk_candidates: what survives of each level before NMS (``test_nms_thresh``).
    """

    def __init__(
        self, *, backbone: Backbone, head: nn.Module, head_in_features: list[str] | None = None,
        box2box_transform=None, num_classes, center_sampling_radius: float = 1.5, focal_loss_alpha=0.25,
        focal_loss_gamma=2.0, test_score_thresh=0.2, test_topk_candidates=1000, test_nms_thresh=0.6,
        max_detections_per_image=100, pixel_mean, pixel_std,
    ):
        super().__init__(backbone, head, head_in_features, pixel_mean=pixel_mean, pixel_std=pixel_std)
        self.num_classes = num_classes
        self.box2box_transform = box2box_transform or Box2BoxTransformLinear(normalize_by_size=True)
        shapes = backbone.output_shape()
        strides = [shapes[name].stride for name in self.head_in_features]
        self.anchor_generator = DefaultAnchorGenerator(
            sizes=[[stride] for stride in strides], aspect_ratios=[1.0], strides=strides, offset=0.5
        )
        self.center_sampling_radius = center_sampling_radius
        self.focal_loss_alpha, self.focal_loss_gamma = focal_loss_alpha, focal_loss_gamma
        self.test_score_thresh, self.test_nms_thresh = test_score_thresh, test_nms_thresh
        self.test_topk_candidates = test_topk_candidates
        self.max_detections_per_image = max_detections_per_image

    def forward_training(self, images, features, predictions, gt_instances) -> dict[str, torch.Tensor]:
        logits, deltas, centerness = self._transpose_dense_predictions(predictions, [self.num_classes, 4, 1])
        anchors = self.anchor_generator(features)
        labels, boxes = self.label_anchors(anchors, gt_instances)
        return self.losses(anchors, logits, labels, deltas, boxes, centerness)

    @torch.no_grad()
    def _match_anchors(self, gt_boxes: Boxes, anchors: list[Boxes]) -> torch.Tensor:
        """Quality (M, R) of the match of M boxes and R cells: 0 for none, higher for smaller boxes."""
        cells = Boxes.cat(anchors)
        size = cells.tensor[:, 2] - cells.tensor[:, 0]
        center = cells.get_centers()
        lower, upper = size * REACH_IN_STRIDES[0], size * REACH_IN_STRIDES[1]
        lower[: len(anchors[0])] = 0.0
        upper[len(cells) - len(anchors[-1]) :] = float("inf")

        box = gt_boxes.tensor[:, None, :]
        edges = torch.cat((center - box[..., :2], box[..., 2:] - center), dim=-1)  # (M, R, 4)
        reach = edges.amax(dim=-1)
        matched = (edges.amin(dim=-1) > 0) & (reach > lower) & (reach < upper)
        offset = (center - gt_boxes.get_centers()[:, None, :]).abs().amax(dim=-1)
        matched &= offset < self.center_sampling_radius * size
        return matched * (AREA_CEILING - gt_boxes.area())[:, None]

    @torch.no_grad()
    def label_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Assign every cell (R over all levels) of every image to the smallest box that it matches.

        Returns:
            for each image the labels, (R,) int64 (0..K-1 a class, K background), and the matched boxes, (R, 4),
            which mean nothing where the label is background.
        """
        labels, boxes = [], []
        for gt in gt_instances:
            if len(gt) == 0:
                tensor = torch.cat([a.tensor for a in anchors])
                labels.append(gt.gt_classes.new_full((len(tensor),), self.num_classes))
                boxes.append(torch.zeros_like(tensor))
                continue
            quality, match = self._match_anchors(gt.gt_boxes, anchors).max(dim=0)
            labels.append(gt.gt_classes[match].masked_fill_(quality == 0, self.num_classes))
            boxes.append(gt.gt_boxes.tensor[match])
        return labels, boxes

    def losses(
        self, anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes, pred_centerness
    ) -> dict[str, torch.Tensor]:
        """Losses of a batch, divided by the running number of foreground cells ``loss_normalizer``.

        Arguments as for ``RetinaNet.losses``; ``pred_centerness`` is (N, R_l, 1) for each level.

        Returns:
            dict with the scalars "loss_fcos_cls", "loss_fcos_loc" (GIoU) and "loss_fcos_ctr".
        """
        labels = torch.stack(gt_labels)
        foreground = (labels >= 0) & (labels != self.num_classes)
        classification = focal_loss_sum(pred_logits, labels, self.focal_loss_alpha, self.focal_loss_gamma)
        regression = _dense_box_regression_loss(
            anchors, self.box2box_transform, pred_anchor_deltas, gt_boxes, foreground, box_reg_loss_type="giou"
        )
        chosen = foreground.nonzero(as_tuple=True)
        centerness = F.binary_cross_entropy_with_logits(
            torch.cat(pred_centerness, dim=1).squeeze(2)[chosen],
            self.compute_ctrness_targets(anchors, gt_boxes)[chosen], reduction="sum",
        )
        count = len(chosen[0])
        get_event_storage().put_scalar("num_pos_anchors", count / len(labels))
        normalizer = self._ema_update("loss_normalizer", max(count, 1), 300)
        terms = {"loss_fcos_cls": classification, "loss_fcos_loc": regression, "loss_fcos_ctr": centerness}
        return {name: term / normalizer for name, term in terms.items()}

    @torch.no_grad()
    def compute_ctrness_targets(self, anchors: list[Boxes], gt_boxes: list[torch.Tensor]) -> torch.Tensor:
        """Centreness (arXiv:1904.01355, eq. 3) of R cells in their boxes, N x (R, 4) -> (N, R).

        It means nothing where the centre of the cell is outside of the box.
        """
        center = Boxes.cat(anchors).get_centers()
        boxes = torch.stack(list(gt_boxes))
        before, after = center - boxes[..., :2], boxes[..., 2:] - center
        ratio = torch.minimum(before, after) / torch.maximum(before, after)
        return ratio.prod(dim=-1).sqrt()

    def forward_inference(
        self, images: ImageList, features: list[torch.Tensor], predictions: list[list[torch.Tensor]]
    ) -> list[Instances]:
        """Detections of each image in pixels of the network's input; score = sqrt(class * centreness)."""
        logits, deltas, centerness = self._transpose_dense_predictions(predictions, [self.num_classes, 4, 1])
        anchors = self.anchor_generator(features)
        scores = [(c.sigmoid() * q.sigmoid()).sqrt() for c, q in zip(logits, centerness)]
        return [
            self.inference_single_image(anchors, [s[i] for s in scores], [d[i] for d in deltas], size)
            for i, size in enumerate(images.image_sizes)
        ]


class FCOSHead(RetinaNetHead):
    """RetinaNet's head with one anchor per cell and a centreness output on the box tower."""

    def __init__(self, *, input_shape: list[ShapeSpec], conv_dims: list[int], **kwargs):
        super().__init__(input_shape=input_shape, conv_dims=conv_dims, num_anchors=1, **kwargs)
        self.ctrness = nn.Conv2d(conv_dims[-1], 1, 3, padding=1)
        nn.init.normal_(self.ctrness.weight, std=0.01)
        nn.init.zeros_(self.ctrness.bias)

    def forward(
        self, features: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """Maps (N, C, H_l, W_l) -> logits (N, K, ...), distances (N, 4, ...), centreness (N, 1, ...) per level."""
        if len(features) != self._num_features:
            raise ValueError(f"the head was made for {self._num_features} levels and got {len(features)}")
        towers = [self.bbox_subnet(f) for f in features]
        logits = [self.cls_score(self.cls_subnet(f)) for f in features]
        return logits, [self.bbox_pred(t) for t in towers], [self.ctrness(t) for t in towers]
