"""Last layers of Fast R-CNN (Girshick, arXiv:1504.08083): class and box of every proposal, losses and detections."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import clip_boxes_to_image

from detectron2.config import configurable
from detectron2.layers import ShapeSpec, batched_nms, cross_entropy
from detectron2.modeling.box_regression import Box2BoxTransform, _dense_box_regression_loss
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage

__all__ = ["FastRCNNOutputLayers", "fast_rcnn_inference", "fast_rcnn_inference_single_image"]

Predictions = tuple[torch.Tensor, torch.Tensor]
"""Class logits (M, K + 1), background last, and box deltas (M, K * 4), or (M, 4) if class-agnostic."""


def fast_rcnn_inference(
    boxes: list[torch.Tensor], scores: list[torch.Tensor], image_shapes: list[tuple[int, int]],
    score_thresh: float, nms_thresh: float, topk_per_image: int,
) -> tuple[list[Instances], list[torch.Tensor]]:
    """:func:`fast_rcnn_inference_single_image` for each image: lists of its two results."""
    results = [
        fast_rcnn_inference_single_image(*image, score_thresh, nms_thresh, topk_per_image)
        for image in zip(boxes, scores, image_shapes, strict=True)
    ]
    return [found for found, _ in results], [rows for _, rows in results]


def fast_rcnn_inference_single_image(
    boxes: torch.Tensor, scores: torch.Tensor, image_shape: tuple[int, int], score_thresh: float,
    nms_thresh: float, topk_per_image: int,
) -> tuple[Instances, torch.Tensor]:
    """Detections of one image: clipped boxes above a score, suppressed within each class.

    Args:
        boxes: (R, K * 4), or (R, 4) for all classes; scores: (R, K + 1), background last. Rows with infinite or NaN
            values are passed over.
        image_shape: (height, width) in pixels of ``boxes``.
        topk_per_image: the most detections to return; negative: all.

    Returns:
        Instances with ``pred_boxes``, ``scores`` and ``pred_classes``, best first, and the row of each, (D,) int64.
    """
    finite = boxes.isfinite().all(dim=1) & scores.isfinite().all(dim=1)
    candidates = (scores[:, :-1] > score_thresh) & finite[:, None]
    row, label = candidates.nonzero(as_tuple=True)
    score = scores[row, label]
    per_class = boxes.unflatten(1, (-1, 4))
    box = clip_boxes_to_image(per_class[row, label if per_class.shape[1] > 1 else 0], image_shape)
    kept = batched_nms(box, score, label, nms_thresh)
    if topk_per_image >= 0:
        kept = kept[:topk_per_image]
    found = Instances(image_shape, pred_boxes=Boxes(box[kept]), scores=score[kept], pred_classes=label[kept])
    return found, row[kept]


def _log_classification_stats(pred_logits: torch.Tensor, gt_classes: torch.Tensor, prefix: str = "fast_rcnn") -> None:
    """Put into the event storage how often the best class (logits (M, K + 1)) is that of ``gt_classes`` (M,): over all
    proposals, over those of objects, and the share of objects taken for background."""
    total = gt_classes.numel()
    if total == 0:
        return
    background = pred_logits.shape[1] - 1
    guess = pred_logits.argmax(dim=1)
    right, is_object = guess == gt_classes, (gt_classes >= 0) & (gt_classes < background)
    counts = torch.stack((right, is_object, right & is_object, (guess == background) & is_object)).sum(dim=1)
    num_right, num_objects, num_objects_right, num_missed = counts.tolist()
    storage = get_event_storage()
    storage.put_scalar(f"{prefix}/cls_accuracy", num_right / total)
    if num_objects > 0:
        storage.put_scalar(f"{prefix}/fg_cls_accuracy", num_objects_right / num_objects)
        storage.put_scalar(f"{prefix}/false_negative", num_missed / num_objects)


def _target_boxes(proposals: Instances) -> torch.Tensor:
    """Boxes to regress to, (R, 4). An image without objects has none, and what stands in for them is not read."""
    return proposals.get("gt_boxes" if proposals.has("gt_boxes") else "proposal_boxes").tensor


def _fed_loss_weights(cfg) -> torch.Tensor:
    # Imported here: only this loss asks the data sets something.
    from detectron2.data.detection_utils import get_fed_loss_cls_weights

    return get_fed_loss_cls_weights(cfg.DATASETS.TRAIN, cfg.MODEL.ROI_BOX_HEAD.FED_LOSS_FREQ_WEIGHT_POWER)


class FastRCNNOutputLayers(nn.Module):
    """Two linear layers, ``cls_score`` and ``bbox_pred``, and what belongs to them.

    Args:
        input_shape: of the features of a box, or their number; flattened if they have a height and a width.
        box2box_transform: how deltas move a proposal.
        num_classes: K, without background.
        test_score_thresh, test_nms_thresh, test_topk_per_image: see :func:`fast_rcnn_inference_single_image`.
        cls_agnostic_bbox_reg: one box for all classes.
        box_reg_loss_type: "smooth_l1" (with ``smooth_l1_beta``), "giou", "diou" or "ciou".
        loss_weight: factor of both losses, or a dict of factors by name of the loss.
        use_sigmoid_ce: independent sigmoid per class in place of the softmax.
        use_fed_loss: federated loss (Zhou et al., arXiv:2103.07461), only with ``use_sigmoid_ce``:
            of the classes that a batch does not show, ``fed_loss_num_classes`` less the shown ones are drawn by
            ``get_fed_loss_cls_weights()`` (K,), and the rest does not count.
    """

    @configurable
    def __init__(
        self, input_shape: ShapeSpec | int, *, box2box_transform: Box2BoxTransform, num_classes: int,
        test_score_thresh: float = 0.0, test_nms_thresh: float = 0.5, test_topk_per_image: int = 100,
        cls_agnostic_bbox_reg: bool = False, smooth_l1_beta: float = 0.0, box_reg_loss_type: str = "smooth_l1",
        loss_weight: float | dict[str, float] = 1.0, use_fed_loss: bool = False, use_sigmoid_ce: bool = False,
        get_fed_loss_cls_weights: Callable[[], torch.Tensor] | None = None, fed_loss_num_classes: int = 50,
    ):
        super().__init__()
        if isinstance(input_shape, ShapeSpec):
            shape = (input_shape.channels, input_shape.height, input_shape.width)
            features = math.prod(side or 1 for side in shape)
        else:
            features = input_shape
        box_dim = len(box2box_transform.weights)
        self.cls_score = nn.Linear(features, num_classes + 1)
        self.bbox_pred = nn.Linear(features, (1 if cls_agnostic_bbox_reg else num_classes) * box_dim)
        for layer, deviation in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=deviation)
            nn.init.zeros_(layer.bias)

        self.num_classes, self.box2box_transform = num_classes, box2box_transform
        self.test_score_thresh, self.test_nms_thresh = test_score_thresh, test_nms_thresh
        self.test_topk_per_image = test_topk_per_image
        self.box_reg_loss_type, self.smooth_l1_beta = box_reg_loss_type, smooth_l1_beta
        if not isinstance(loss_weight, dict):
            loss_weight = dict.fromkeys(("loss_cls", "loss_box_reg"), loss_weight)
        self.loss_weight = loss_weight
        self.use_sigmoid_ce, self.use_fed_loss = use_sigmoid_ce, use_fed_loss
        self.fed_loss_num_classes = fed_loss_num_classes
        if use_fed_loss:
            if not use_sigmoid_ce or get_fed_loss_cls_weights is None:
                raise ValueError("the federated loss needs use_sigmoid_ce and weights of the classes")
            weights = get_fed_loss_cls_weights()
            if len(weights) != num_classes:
                raise ValueError(f"the federated loss has weights of {len(weights)} classes, not of {num_classes}")
            self.register_buffer("fed_loss_cls_weights", weights)

    @classmethod
    def from_config(cls, cfg, input_shape: ShapeSpec) -> dict:
        heads, node = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_HEAD
        loss = {
            "box_reg_loss_type": node.BBOX_REG_LOSS_TYPE, "smooth_l1_beta": node.SMOOTH_L1_BETA,
            "loss_weight": {"loss_box_reg": node.BBOX_REG_LOSS_WEIGHT},
            "use_sigmoid_ce": node.USE_SIGMOID_CE, "use_fed_loss": node.USE_FED_LOSS,
            "fed_loss_num_classes": node.FED_LOSS_NUM_CLASSES,
            "get_fed_loss_cls_weights": lambda: _fed_loss_weights(cfg),
        }
        test = {
            "test_score_thresh": heads.SCORE_THRESH_TEST, "test_nms_thresh": heads.NMS_THRESH_TEST,
            "test_topk_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        }
        return dict(
            input_shape=input_shape, num_classes=heads.NUM_CLASSES,
            cls_agnostic_bbox_reg=node.CLS_AGNOSTIC_BBOX_REG,
            box2box_transform=Box2BoxTransform(weights=node.BBOX_REG_WEIGHTS), **loss, **test,
        )

    def forward(self, x: torch.Tensor) -> Predictions:
        """Features (M, ...) of the boxes of all images -> logits (M, K + 1) and deltas (M, K * 4) or (M, 4)."""
        x = x.flatten(1)
        return self.cls_score(x), self.bbox_pred(x)

    def losses(self, predictions: Predictions, proposals: list[Instances]) -> dict[str, torch.Tensor]:
        """Weighted losses of a batch.

        Args:
            predictions: what :meth:`forward` returns.
            proposals: of each image ``proposal_boxes``, ``gt_classes`` (K for background) and, if the image has
                objects, ``gt_boxes``; M over all images.

        Returns:
            dict with the scalars "loss_cls", a mean over proposals, and "loss_box_reg", a sum over proposals of
            objects divided by M.
        """
        logits, deltas = predictions
        classes = torch.cat([p.gt_classes for p in proposals])
        _log_classification_stats(logits, classes)
        sources = torch.cat([p.proposal_boxes.tensor for p in proposals])
        targets = torch.cat([_target_boxes(p) for p in proposals])
        classify = self.sigmoid_cross_entropy_loss if self.use_sigmoid_ce else cross_entropy
        losses = {
            "loss_cls": classify(logits, classes),
            "loss_box_reg": self.box_reg_loss(sources, targets, deltas, classes),
        }
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    def sigmoid_cross_entropy_loss(self, pred_class_logits: torch.Tensor, gt_classes: torch.Tensor) -> torch.Tensor:
        """Binary cross-entropy summed over classes, mean over the M proposals; logits (M, K + 1), the last unused."""
        if len(pred_class_logits) == 0:
            return pred_class_logits.sum() * 0.0
        wanted = F.one_hot(gt_classes, self.num_classes + 1)[:, :-1].to(pred_class_logits.dtype)
        counted = None
        if self.use_fed_loss:
            chosen = self.get_fed_loss_classes(
                gt_classes, self.fed_loss_num_classes, self.num_classes, self.fed_loss_cls_weights
            )
            counted = wanted.new_zeros(self.num_classes + 1).index_fill_(0, chosen, 1.0)[:-1]
        total = F.binary_cross_entropy_with_logits(
            pred_class_logits[:, :-1], wanted, weight=counted, reduction="sum"
        )
        return total / len(pred_class_logits)

    def get_fed_loss_classes(
        self, gt_classes: torch.Tensor, num_fed_loss_classes: int, num_classes: int, weight: torch.Tensor
    ) -> torch.Tensor:
        """The classes in ``gt_classes`` and as many others, drawn by ``weight`` (K,), as make
        ``num_fed_loss_classes``; int64, background among them if it is in ``gt_classes``."""
        shown = gt_classes.unique()
        lacking = num_fed_loss_classes - len(shown)
        if lacking <= 0:
            return shown
        chance = weight.new_zeros(num_classes + 1)
        chance[:-1] = weight
        chance[shown] = 0
        return torch.cat((shown, torch.multinomial(chance, lacking, replacement=False)))

    def box_reg_loss(
        self, proposal_boxes: torch.Tensor, gt_boxes: torch.Tensor, pred_deltas: torch.Tensor,
        gt_classes: torch.Tensor,
    ) -> torch.Tensor:
        """Regression loss, a scalar; boxes (M, 4) matched row by row, deltas (M, K * 4) or (M, 4), classes (M,)."""
        deltas = pred_deltas.unflatten(1, (-1, proposal_boxes.shape[1]))
        rows = ((gt_classes >= 0) & (gt_classes < self.num_classes)).nonzero().squeeze(1)
        own = deltas[rows, gt_classes[rows] if deltas.shape[1] > 1 else 0]
        total = _dense_box_regression_loss(
            [proposal_boxes[rows]], self.box2box_transform, [own[None]], [gt_boxes[rows]],
            rows.new_ones((1, len(rows)), dtype=torch.bool), self.box_reg_loss_type, self.smooth_l1_beta,
        )
        # By all proposals, not by those of objects: every object proposal weighs the same in every batch.
        return total / max(gt_classes.numel(), 1.0)

    def inference(
        self, predictions: Predictions, proposals: list[Instances]
    ) -> tuple[list[Instances], list[torch.Tensor]]:
        """Detections of each image and the proposal that each came from, see :func:`fast_rcnn_inference`."""
        return fast_rcnn_inference(
            self.predict_boxes(predictions, proposals), self.predict_probs(predictions, proposals),
            [p.image_size for p in proposals], self.test_score_thresh, self.test_nms_thresh, self.test_topk_per_image,
        )

    def predict_boxes_for_gt_classes(self, predictions: Predictions, proposals: list[Instances]) -> list[torch.Tensor]:
        """Boxes (R_i, 4) of each image: those predicted for ``gt_classes``; of background, those of the last class."""
        boxes = torch.cat(self.predict_boxes(predictions, proposals)) if proposals else predictions[1]
        counts = [len(p) for p in proposals]
        per_class = boxes.unflatten(1, (-1, 4))
        if per_class.shape[1] > 1:
            classes = torch.cat([p.gt_classes for p in proposals]).clamp(0, self.num_classes - 1)
            per_class = per_class[torch.arange(len(classes), device=classes.device), classes, None]
        return list(per_class[:, 0].split(counts))

    def predict_boxes(self, predictions: Predictions, proposals: list[Instances]) -> list[torch.Tensor]:
        """Boxes (R_i, K * 4), or (R_i, 4) if class-agnostic, of each image; not clipped."""
        if not proposals:
            return []
        sources = torch.cat([p.proposal_boxes.tensor for p in proposals])
        return list(self.box2box_transform.apply_deltas(predictions[1], sources).split([len(p) for p in proposals]))

    def predict_probs(self, predictions: Predictions, proposals: list[Instances]) -> list[torch.Tensor]:
        """Scores (R_i, K + 1) of each image."""
        logits = predictions[0]
        probabilities = logits.sigmoid() if self.use_sigmoid_ce else logits.softmax(dim=-1)
        return list(probabilities.split([len(p) for p in proposals]))
