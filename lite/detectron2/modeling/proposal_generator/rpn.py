"""Region proposal network (Ren et al., arXiv:1506.01497)."""

import torch
import torch.nn.functional as F
from torch import nn

from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.modeling.box_regression import Box2BoxTransform, _dense_box_regression_loss
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from detectron2.utils.events import get_event_storage
from detectron2.utils.registry import Registry

from .build import PROPOSAL_GENERATOR_REGISTRY
from .proposal_utils import top_proposals

__all__ = ["RPN", "RPN_HEAD_REGISTRY", "StandardRPNHead", "build_rpn_head"]

RPN_HEAD_REGISTRY = Registry("RPN_HEAD")
RPN_HEAD_REGISTRY.__doc__ = """
Heads of region proposal networks by name; each is called as ``constructor(cfg, input_shape)`` with a list of
:class:`ShapeSpec` and takes a list of feature maps to (objectness logits, anchor deltas), both lists over levels.
"""


def build_rpn_head(cfg, input_shape: list[ShapeSpec]) -> nn.Module:
    """Build the head that ``cfg.MODEL.RPN.HEAD_NAME`` names."""
    return RPN_HEAD_REGISTRY.get(cfg.MODEL.RPN.HEAD_NAME)(cfg, input_shape)


@RPN_HEAD_REGISTRY.register()
class StandardRPNHead(nn.Module):
    """3x3 convolutions with ReLU, then 1x1 ones for objectness and box deltas; shared by all levels.

    Args:
        in_channels: channels of every level.
        num_anchors: anchors per cell; box_dim: numbers that describe a box.
        conv_dims: channels of the 3x3 convolutions, -1 for as many as come in. A single one is ``conv`` itself; several
            are ``conv.conv0``, ``conv.conv1``, ...
    """

    @configurable
    def __init__(self, *, in_channels: int, num_anchors: int, box_dim: int = 4, conv_dims: list[int] = (-1,)):
        super().__init__()
        widths: list[int] = []
        for dim in conv_dims:
            widths.append([in_channels, *widths][-1] if dim == -1 else dim)
        if not widths or min(widths) <= 0:
            raise ValueError(f"StandardRPNHead: conv_dims must be positive or -1, at least one; got {list(conv_dims)}")
        convs = [
            Conv2d(before, width, 3, padding=1, activation=nn.ReLU())
            for before, width in zip([in_channels, *widths], widths)
        ]
        if len(convs) == 1:
            self.conv = convs[0]
        else:
            self.conv = nn.Sequential()
            for i, conv in enumerate(convs):
                self.conv.add_module(f"conv{i}", conv)
        self.objectness_logits = nn.Conv2d(widths[-1], num_anchors, 1)
        self.anchor_deltas = nn.Conv2d(widths[-1], num_anchors * box_dim, 1)
        for conv in (*convs, self.objectness_logits, self.anchor_deltas):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)

    @classmethod
    def from_config(cls, cfg, input_shape: list[ShapeSpec]) -> dict:
        anchors = build_anchor_generator(cfg, input_shape)
        channels = {shape.channels for shape in input_shape}
        per_cell = set(anchors.num_anchors)
        if len(channels) > 1 or len(per_cell) > 1:
            raise ValueError(
                "the levels share one RPN head, so they need equal channels and equally many anchors; "
                f"got channels {sorted(channels)}, anchors {sorted(per_cell)}"
            )
        return {
            "in_channels": channels.pop(), "num_anchors": per_cell.pop(), "box_dim": anchors.box_dim,
            "conv_dims": cfg.MODEL.RPN.CONV_DIMS,
        }

    def forward(self, features: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Maps (N, C, H_l, W_l) -> logits (N, A, H_l, W_l) and deltas (N, A * 4, H_l, W_l), lists over levels."""
        hidden = [self.conv(x) for x in features]
        return [self.objectness_logits(x) for x in hidden], [self.anchor_deltas(x) for x in hidden]


@PROPOSAL_GENERATOR_REGISTRY.register()
class RPN(nn.Module):
    """Scores anchors as object or background, moves them, and proposes the best.

    Args:
        in_features: names of the feature maps, from fine to coarse.
        head, anchor_generator, anchor_matcher, box2box_transform: see those modules.
        batch_size_per_image, positive_fraction: anchors that count for the loss, and the largest share of positives.
        pre_nms_topk, post_nms_topk: (training, test) numbers of proposals before NMS, per level, and after NMS, over
            all levels.
        nms_thresh, min_box_size: see :func:`~.proposal_utils.find_top_rpn_proposals`.
        anchor_boundary_thresh: anchors further than this many pixels out of the image do not count; negative: all do.
        loss_weight: factor of both losses, or a dict of factors by name of the loss.
        box_reg_loss_type: "smooth_l1" (with ``smooth_l1_beta``), "giou", "diou" or "ciou".
    """

    @configurable
    def __init__(
        self, *, in_features: list[str], head: nn.Module, anchor_generator: nn.Module, anchor_matcher: Matcher,
        box2box_transform: Box2BoxTransform, batch_size_per_image: int, positive_fraction: float,
        pre_nms_topk: tuple[int, int], post_nms_topk: tuple[int, int], nms_thresh: float = 0.7,
        min_box_size: float = 0.0, anchor_boundary_thresh: float = -1.0,
        loss_weight: float | dict[str, float] = 1.0, box_reg_loss_type: str = "smooth_l1",
        smooth_l1_beta: float = 0.0,
    ):
        super().__init__()
        self.in_features = in_features
        self.rpn_head, self.anchor_generator = head, anchor_generator
        self.anchor_matcher, self.box2box_transform = anchor_matcher, box2box_transform
        self.batch_size_per_image, self.positive_fraction = batch_size_per_image, positive_fraction
        # Keyed by whether the module is training.
        self.pre_nms_topk = dict(zip((True, False), pre_nms_topk))
        self.post_nms_topk = dict(zip((True, False), post_nms_topk))
        self.nms_thresh, self.min_box_size = nms_thresh, float(min_box_size)
        self.anchor_boundary_thresh = anchor_boundary_thresh
        if not isinstance(loss_weight, dict):
            loss_weight = dict.fromkeys(("loss_rpn_cls", "loss_rpn_loc"), loss_weight)
        self.loss_weight = loss_weight
        self.box_reg_loss_type, self.smooth_l1_beta = box_reg_loss_type, smooth_l1_beta

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict:
        node = cfg.MODEL.RPN
        shapes = [input_shape[name] for name in node.IN_FEATURES]
        weight = node.LOSS_WEIGHT
        modules = {
            "anchor_generator": build_anchor_generator(cfg, shapes),
            "anchor_matcher": Matcher(node.IOU_THRESHOLDS, node.IOU_LABELS, allow_low_quality_matches=True),
            "box2box_transform": Box2BoxTransform(weights=node.BBOX_REG_WEIGHTS),
            "head": build_rpn_head(cfg, shapes),
        }
        loss = {
            "batch_size_per_image": node.BATCH_SIZE_PER_IMAGE, "positive_fraction": node.POSITIVE_FRACTION,
            "loss_weight": {"loss_rpn_cls": weight, "loss_rpn_loc": weight * node.BBOX_REG_LOSS_WEIGHT},
            "box_reg_loss_type": node.BBOX_REG_LOSS_TYPE, "smooth_l1_beta": node.SMOOTH_L1_BETA,
        }
        selection = {
            "pre_nms_topk": (node.PRE_NMS_TOPK_TRAIN, node.PRE_NMS_TOPK_TEST),
            "post_nms_topk": (node.POST_NMS_TOPK_TRAIN, node.POST_NMS_TOPK_TEST),
            "nms_thresh": node.NMS_THRESH, "min_box_size": cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE,
        }
        return dict(
            in_features=node.IN_FEATURES, anchor_boundary_thresh=node.BOUNDARY_THRESH, **modules, **loss, **selection
        )

    def forward(
        self, images: ImageList, features: dict[str, torch.Tensor], gt_instances: list[Instances] | None = None
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """
        Args:
            images: only their sizes are read.
            features: maps (N, C, H_l, W_l) by name.
            gt_instances: for training, ``gt_boxes`` of each image in pixels of the network's input.

        Returns:
            for each image Instances with ``proposal_boxes`` and ``objectness_logits``, best first and without
            gradients, and the losses "loss_rpn_cls" and "loss_rpn_loc" (none at inference).
        """
        maps = [features[name] for name in self.in_features]
        anchors = self.anchor_generator(maps)
        logits, deltas = self.rpn_head(maps)
        logits = [x.permute(0, 2, 3, 1).flatten(1) for x in logits]
        box_dim = self.anchor_generator.box_dim
        deltas = [
            x.unflatten(1, (-1, box_dim)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in deltas
        ]
        losses = {}
        if self.training:
            if gt_instances is None:
                raise ValueError("RPN: training needs ground truth")
            labels, boxes = self.label_and_sample_anchors(anchors, gt_instances)
            losses = self.losses(anchors, logits, labels, deltas, boxes)
        return self.predict_proposals(anchors, logits, deltas, images.image_sizes), losses

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Assign every anchor (R over all levels) of every image to a ground-truth box, and draw those that count.

        Returns:
            for each image the labels, (R,) int8 (1 object, 0 background, -1 not drawn), and the matched boxes, (R, 4),
            which mean nothing where the label is not 1.
        """
        everywhere = Boxes.cat(anchors)
        labels, boxes = [], []
        for gt in gt_instances:
            match, label = self.anchor_matcher(pairwise_iou(gt.gt_boxes, everywhere))
            if self.anchor_boundary_thresh >= 0:
                label.masked_fill_(~everywhere.inside_box(gt.image_size, self.anchor_boundary_thresh), -1)
            labels.append(self._subsample_labels(label))
            matched = gt.gt_boxes.tensor[match] if len(gt) else torch.zeros_like(everywhere.tensor)
            boxes.append(matched)
        return labels, boxes

    def _subsample_labels(self, label: torch.Tensor) -> torch.Tensor:
        """Set to -1 all labels (R,) but those of a random sample; in place."""
        positive, negative = subsample_labels(label, self.batch_size_per_image, self.positive_fraction, bg_label=0)
        label.fill_(-1)
        label[positive] = 1
        label[negative] = 0
        return label

    def losses(
        self, anchors: list[Boxes], pred_objectness_logits: list[torch.Tensor], gt_labels: list[torch.Tensor],
        pred_anchor_deltas: list[torch.Tensor], gt_boxes: list[torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Weighted losses of a batch, divided by the number of anchors that are to be drawn for it.

        Args:
            anchors: (R_l, 4) boxes of each level; pred_objectness_logits: (N, R_l) and pred_anchor_deltas:
                (N, R_l, 4) of each level; gt_labels, gt_boxes: what :meth:`label_and_sample_anchors` returns.

        Returns:
            dict with the scalars "loss_rpn_cls" and "loss_rpn_loc".
        """
        labels = torch.stack(gt_labels)
        num_images = len(labels)
        positive, drawn = labels == 1, labels >= 0
        num_positive, num_drawn = torch.stack((positive.sum(), drawn.sum())).tolist()
        storage = get_event_storage()
        storage.put_scalar("rpn/num_pos_anchors", num_positive / num_images)
        storage.put_scalar("rpn/num_neg_anchors", (num_drawn - num_positive) / num_images)

        localization = _dense_box_regression_loss(
            anchors, self.box2box_transform, pred_anchor_deltas, gt_boxes, positive,
            box_reg_loss_type=self.box_reg_loss_type, smooth_l1_beta=self.smooth_l1_beta,
        )
        # Weights in place of a selection: nothing has to wait for its size.
        objectness = F.binary_cross_entropy_with_logits(
            torch.cat(pred_objectness_logits, dim=1).float(), positive.float(), weight=drawn.float(), reduction="sum"
        )
        per_anchor = 1.0 / (self.batch_size_per_image * num_images)
        losses = {"loss_rpn_cls": objectness * per_anchor, "loss_rpn_loc": localization * per_anchor}
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    @torch.no_grad()
    def predict_proposals(
        self, anchors: list[Boxes], pred_objectness_logits: list[torch.Tensor],
        pred_anchor_deltas: list[torch.Tensor], image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """Proposals of every image, see :meth:`forward`; arguments as in :meth:`losses`."""

        def decode(level: int, image: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            deltas = pred_anchor_deltas[level][image, index]
            moved = self.box2box_transform.apply_deltas(
                deltas.flatten(0, 1).float(), anchors[level].tensor[index].flatten(0, 1)
            )
            return moved.view_as(deltas)

        return top_proposals(
            decode, pred_objectness_logits, image_sizes, training=self.training, nms_thresh=self.nms_thresh,
            min_box_size=self.min_box_size, pre_nms_topk=self.pre_nms_topk[self.training],
            post_nms_topk=self.post_nms_topk[self.training],
        )
