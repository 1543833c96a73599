"""RepPoints (Yang et al., ICCV 2019): objects as sets of nine points, found in two stages."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import nn
from torchvision.ops import sigmoid_focal_loss

from ..deformable import deform_conv
from .candidates import best_candidates, suppress
from .dense import SURELY_BACKGROUND, cell_generator, dense_arguments, mean_of_processes
from .point_sets import POINTS, PointSetTransform, base_grid, best_overlaps, inside_image, nearest_points

# Share of the second stage's gradient that moves the first stage's points (Sec. 4.2).
OFFSET_GRADIENT = 0.1
BETA = 0.11  # where the smooth L1 loss turns from a square into a line, in units of POINT_SCALE strides


class RepPointsHead(nn.Module):
    """Two towers; the points of the first stage are where the second stage's convolutions look.

    Args:
        input_shape: maps of equal channels.
        num_classes: K.
        conv_dims: output channels of the 3x3 convolutions of each tower.
        point_dim: channels of the layers behind the towers.
        norm: of the towers, "" for none.
        prior_prob: initial score of every class.
        transform: see :class:`PointSetTransform`; its parameter belongs to the head.
    """

    @configurable
    def __init__(
        self, input_shape: list[ShapeSpec], *, num_classes: int, conv_dims: list[int], point_dim: int, norm: str,
        prior_prob: float, transform: PointSetTransform,
    ) -> None:  # fmt: skip
        super().__init__()
        channels = input_shape[0].channels
        self.cls_subnet = _tower(channels, conv_dims, norm)
        self.pts_subnet = _tower(channels, conv_dims, norm)
        width = conv_dims[-1] if conv_dims else channels
        self.cls_conv = nn.Conv2d(width, point_dim, 3, padding=1, bias=False)
        self.cls_score = nn.Conv2d(point_dim, num_classes, 1)
        self.pts_init_conv = nn.Conv2d(width, point_dim, 3, padding=1)
        self.pts_init_out = nn.Conv2d(point_dim, 2 * POINTS, 1)
        self.pts_refine_conv = nn.Conv2d(width, point_dim, 3, padding=1, bias=False)
        self.pts_refine_out = nn.Conv2d(point_dim, 2 * POINTS, 1)
        self.transform = transform
        self.register_buffer("grid", base_grid().view(1, -1, 1, 1), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for deformable in (self.cls_conv, self.pts_refine_conv):
            nn.init.kaiming_uniform_(deformable.weight, nonlinearity="relu")
        nn.init.constant_(self.cls_score.bias, -math.log(1 / prior_prob - 1))

    @classmethod
    def from_config(cls, cfg, input_shape: list[ShapeSpec]) -> dict:
        options = cfg.MODEL.REPPOINTS
        return {
            "input_shape": input_shape,
            "num_classes": options.NUM_CLASSES,
            "conv_dims": list(options.CONV_DIMS),
            "point_dim": options.POINT_DIM,
            "norm": options.NORM,
            "prior_prob": options.PRIOR_PROB,
            "transform": PointSetTransform(options.TRANSFORM),
        }

    def forward(self, features: list[torch.Tensor]) -> tuple[list[torch.Tensor], ...]:
        """Maps (N, C, h_l, w_l) -> class logits (N, K, h_l, w_l), points of the first and of the second stage.

        Points are (N, 18, h_l, w_l), see :mod:`.point_sets` for their order and unit.
        """
        levels = [self._level(x) for x in features]
        return tuple(list(outputs) for outputs in zip(*levels))

    def _level(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        for_class, for_points = self.cls_subnet(x), self.pts_subnet(x)
        first = self.pts_init_out(F.relu(self.pts_init_conv(for_points)))
        offset = first.detach() * (1 - OFFSET_GRADIENT) + first * OFFSET_GRADIENT - self.grid
        logits = self.cls_score(F.relu(deform_conv(for_class, offset, self.cls_conv.weight)))
        moved = self.pts_refine_out(F.relu(deform_conv(for_points, offset, self.pts_refine_conv.weight)))
        return logits, first, moved + first.detach()


def _tower(channels: int, dims: list[int], norm: str) -> nn.Sequential:
    blocks = []
    for dim in dims:
        blocks.append(
            Conv2d(channels, dim, 3, padding=1, bias=norm == "", norm=get_norm(norm, dim), activation=F.relu)
        )
        channels = dim
    return nn.Sequential(*blocks)


@META_ARCH_REGISTRY.register()
class RepPoints(DenseDetector):
    """Dense detector that assigns objects twice: to the nearest point, and to the boxes of the first stage's points.

    Points stand at stride (j, i), the corners of the grid, and everything is counted in strides, so levels moved down
    by one (a student in the L frame) need no other setting. Losses are divided by numbers of positives of the batch,
    averaged over processes. Its heads can be compared with those of a RepPoints alone: points are no other's box code.

    Args:
        backbone: its maps ``head_in_features`` feed the head.
        head: gives class logits and points of both stages, see :class:`RepPointsHead`.
        point_scale: the unit of the box losses in strides, and how many strides the side of an object has.
        points_per_object: positives of the first stage for each object.
        iou_thresholds: of the second stage, below the first background and from the second on positive.
        focal_alpha, focal_gamma: of the classification loss.
        loss_weights: of the boxes of the first and of the second stage.
        test_score_thresh, test_topk_candidates, test_nms_thresh, max_detections_per_image: as in detectron2's FCOS.
    """

    least_positives = 1  # of an image, in what losses are divided by, as if each image were a batch of its own

    @configurable
    def __init__(
        self, *, backbone: nn.Module, head: nn.Module, head_in_features: list[str], num_classes: int,
        point_scale: float = 4.0, points_per_object: int = 1, iou_thresholds: tuple[float, float] = (0.4, 0.5),
        focal_alpha: float = 0.25, focal_gamma: float = 2.0, loss_weights: tuple[float, float] = (0.5, 1.0),
        test_score_thresh: float = 0.05, test_topk_candidates: int = 1000, test_nms_thresh: float = 0.5,
        max_detections_per_image: int = 100, pixel_mean, pixel_std,
    ) -> None:  # fmt: skip
        super().__init__(backbone, head, head_in_features, pixel_mean=pixel_mean, pixel_std=pixel_std)
        self.num_classes = num_classes
        self.point_scale, self.points_per_object = point_scale, points_per_object
        self.iou_thresholds = iou_thresholds
        self.focal_alpha, self.focal_gamma, self.loss_weights = focal_alpha, focal_gamma, loss_weights
        self.test_score_thresh, self.test_topk_candidates = test_score_thresh, test_topk_candidates
        self.test_nms_thresh, self.max_detections_per_image = test_nms_thresh, max_detections_per_image
        self.anchor_generator = cell_generator(backbone, head_in_features, offset=0.0)

    @property
    def box2box_transform(self) -> PointSetTransform:
        return self.head.transform

    @classmethod
    def from_config(cls, cfg) -> dict:
        options = cfg.MODEL.REPPOINTS
        return {
            **dense_arguments(cfg, "REPPOINTS", partial(RepPointsHead, cfg)),
            "point_scale": options.POINT_SCALE,
            "points_per_object": options.POINTS_PER_OBJECT,
            "iou_thresholds": tuple(options.IOU_THRESHOLDS),
            "focal_alpha": options.FOCAL_LOSS_ALPHA,
            "focal_gamma": options.FOCAL_LOSS_GAMMA,
            "loss_weights": (options.INIT_WEIGHT, options.REFINE_WEIGHT),
        }

    @torch.no_grad()
    def label_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Assign objects to the R points of all levels, for the first stage.

        Returns:
            for each image the index of the object, (R,) int64, -1 where there is none, and which points count, (R,)
            bool: those inside of the image.
        """
        locations = Boxes.cat(anchors).tensor
        divisibility = max(self.backbone.size_divisibility, 1)
        owners, counted = [], []
        for gt in gt_instances:
            inside = inside_image(locations, gt.image_size, divisibility)
            owner = nearest_points(locations, gt.gt_boxes.tensor, self.point_scale, self.points_per_object)
            owners.append(torch.where(inside, owner, -1))
            counted.append(inside)
        return owners, counted

    @torch.no_grad()
    def label_refined(
        self, anchors: list[Boxes], boxes: torch.Tensor, counted: list[torch.Tensor], gt_instances: list[Instances]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Assign objects to the R points of all levels, for the classes and the second stage.

        Args:
            anchors: of each level; their order is that of the points.
            boxes: (N, R, 4), found in the first stage.
            counted: see :meth:`label_anchors`.

        Returns:
            for each image the labels, (R,) int64 (0..K-1 a class, K background, -1 ignored), and the matched boxes
            (R, 4), which mean something where the label is a class.
        """
        background, foreground = self.iou_thresholds
        labels, matched = [], []
        for found, inside, gt in zip(boxes, counted, gt_instances):
            owner = best_overlaps(found, gt.gt_boxes.tensor, foreground, background)
            classes = torch.cat([gt.gt_classes, gt.gt_classes.new_tensor([-1, self.num_classes])])  # -2, -1 of owners
            labels.append(torch.where(inside, classes[owner], -1))
            matched.append(_boxes_of(owner, gt))
        return labels, matched

    def forward_training(
        self, images: ImageList, features: list[torch.Tensor], predictions: list[list[torch.Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        """Losses in float32, also under mixed precision."""
        anchors = self.anchor_generator(features)
        owners, counted = self.label_anchors(anchors, gt_instances)
        predictions = self._transpose_dense_predictions(predictions, [self.num_classes, 2 * POINTS, 2 * POINTS])
        logits, first, second = (torch.cat(levels, dim=1).float() for levels in predictions)
        return self.losses(anchors, logits, first, second, owners, counted, gt_instances)

    def losses(
        self, anchors: list[Boxes], logits: torch.Tensor, first: torch.Tensor, second: torch.Tensor,
        owners: list[torch.Tensor], counted: list[torch.Tensor], gt_instances: list[Instances],
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        """Weighted losses of a batch.

        Args:
            anchors: of each level, squares with the sides of a stride; R in all.
            logits: (N, R, K) of the classes.
            first, second: (N, R, 18), points of the stages.
            owners, counted: see :meth:`label_anchors`.

        Returns:
            "loss_cls" (focal loss), "loss_points_init" and "loss_points_refine" (smooth L1 of the boxes in units of
            ``point_scale`` strides), each divided by its stage's number of positives, of which an image has at least
            one.
        """
        locations = Boxes.cat(anchors).tensor
        boxes = [self.box2box_transform.apply_deltas(points, locations) for points in (first, second)]
        labels, refined = map(torch.stack, self.label_refined(anchors, boxes[0], counted, gt_instances))
        labels = labels.masked_fill(logits[..., 0] == SURELY_BACKGROUND, -1)  # whose boxes may reach an object
        nearest = torch.stack([_boxes_of(owner, gt) for owner, gt in zip(owners, gt_instances)])
        positive = torch.stack(owners) >= 0, (labels >= 0) & (labels < self.num_classes)
        counts = torch.stack([x.sum(dim=1).clamp(min=self.least_positives).sum() for x in positive])
        first_count, second_count = mean_of_processes(counts.float())
        places = [x.nonzero(as_tuple=True) for x in positive]
        get_event_storage().put_scalar("num_pos_anchors", len(places[1][0]) / len(gt_instances))

        target = F.one_hot(labels.clamp(min=0), self.num_classes + 1)[..., :-1].to(logits)
        focal = sigmoid_focal_loss(logits, target, self.focal_alpha, self.focal_gamma)
        box_losses = [
            self._box_loss(found, matched, place, locations)
            for found, matched, place in zip(boxes, (nearest, refined), places)
        ]
        return {
            "loss_cls": (focal.sum(dim=2) * (labels >= 0)).sum() / second_count,
            "loss_points_init": self.loss_weights[0] * box_losses[0] / first_count,
            "loss_points_refine": self.loss_weights[1] * box_losses[1] / second_count,
        }

    def _box_loss(
        self, boxes: torch.Tensor, matched: torch.Tensor, positive: tuple[torch.Tensor, torch.Tensor],
        locations: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Sum over the positives, P images and P points, of boxes (N, R, 4)."""
        image, place = positive
        unit = self.point_scale * (locations[place, 2] - locations[place, 0])[:, None]
        return F.smooth_l1_loss(boxes[image, place] / unit, matched[image, place] / unit, beta=BETA, reduction="sum")

    def forward_inference(
        self, images: ImageList, features: list[torch.Tensor], predictions: list[list[torch.Tensor]]
    ) -> list[Instances]:
        """Detections of each image in pixels of the network's input."""
        logits, _, points = self._transpose_dense_predictions(
            predictions, [self.num_classes, 2 * POINTS, 2 * POINTS]
        )
        locations = [level.tensor for level in self.anchor_generator(features)]
        return [
            self._detect(locations, [x[i].sigmoid() for x in logits], [x[i] for x in points], size)
            for i, size in enumerate(images.image_sizes)
        ]

    def _detect(
        self, locations: list[torch.Tensor], scores: list[torch.Tensor], points: list[torch.Tensor],
        image_size: tuple[int, int],
    ) -> Instances:  # fmt: skip
        """Detections of one image from scores (R_l, K) and points (R_l, 18) of each level's locations (R_l, 4)."""
        found = []
        for level_locations, level_scores, level_points in zip(locations, scores, points):
            score, place, label = best_candidates(level_scores, self.test_score_thresh, self.test_topk_candidates)
            boxes = Boxes(self.head.transform.apply_deltas(level_points[place], level_locations[place]))
            found.append(Instances(image_size, pred_boxes=boxes, scores=score, pred_classes=label))
        return suppress(Instances.cat(found), self.test_nms_thresh, self.max_detections_per_image)


def _boxes_of(owner: torch.Tensor, gt: Instances) -> torch.Tensor:
    """Boxes (R, 4) of the objects that ``owner`` (R,) numbers; zeros where it is negative."""
    boxes = torch.cat([gt.gt_boxes.tensor, gt.gt_boxes.tensor.new_zeros(1, 4)])
    return boxes[owner.clamp(min=-1)]
