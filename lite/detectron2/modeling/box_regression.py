"""How boxes are written as numbers relative to anchors or proposals, and the regression loss of dense detectors."""

import math

import torch
from fvcore.nn import giou_loss, smooth_l1_loss

from detectron2.layers import ciou_loss, diou_loss
from detectron2.structures import Boxes

__all__ = ["Box2BoxTransform", "Box2BoxTransformLinear"]

# Widths and heights grow by at most this factor's logarithm: beyond 1000 px from a stride of 16 lies garbage.
DEFAULT_SCALE_CLAMP = math.log(1000.0 / 16)


def _check_boxes(name: str, boxes) -> None:
    if not isinstance(boxes, torch.Tensor):
        raise TypeError(f"{name} takes boxes as a tensor (N, 4), not a {type(boxes).__name__}")


def _centers_and_sizes(boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., 4) XYXY -> centres (..., 2) and sizes (..., 2)."""
    top_left, bottom_right = boxes[..., :2], boxes[..., 2:]
    size = bottom_right - top_left
    return top_left + 0.5 * size, size


class Box2BoxTransform:
    """The R-CNN parametrisation (Girshick et al., arXiv:1311.2524): shift of the centre in units of the source's
    size and logarithm of the ratio of sizes, each times a weight.

    Args:
        weights: factors of (dx, dy, dw, dh).
        scale_clamp: largest dw and dh that :meth:`apply_deltas` believes.
    """

    def __init__(
        self, weights: tuple[float, float, float, float], scale_clamp: float = DEFAULT_SCALE_CLAMP
    ):
        self.weights, self.scale_clamp = weights, scale_clamp

    def get_deltas(self, src_boxes: torch.Tensor, target_boxes: torch.Tensor) -> torch.Tensor:
        """Deltas (N, 4) that take ``src_boxes`` to ``target_boxes``, both (N, 4) XYXY.

        Raises ValueError if a source box has no area.
        """
        for boxes in (src_boxes, target_boxes):
            _check_boxes("Box2BoxTransform.get_deltas", boxes)
        src_center, src_size = _centers_and_sizes(src_boxes)
        target_center, target_size = _centers_and_sizes(target_boxes)
        if not (src_size > 0).all():
            raise ValueError("Box2BoxTransform: a source box has no positive width or height")
        wx, wy, ww, wh = self.weights
        shift = (target_center - src_center) / src_size
        scale = torch.log(target_size / src_size)
        return torch.stack((wx * shift[:, 0], wy * shift[:, 1], ww * scale[:, 0], wh * scale[:, 1]), dim=1)

    def apply_deltas(self, deltas: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Move ``boxes`` (N, 4) by ``deltas`` (N, k * 4), k sets a box; gives (N, k * 4) in float32."""
        sets = deltas.float().unflatten(1, (-1, 4))
        center, size = _centers_and_sizes(boxes.to(sets.dtype)[:, None, :])
        wx, wy, ww, wh = self.weights
        dx, dy, dw, dh = sets.unbind(-1)
        scale = torch.stack((dw / ww, dh / wh), dim=-1).clamp(max=self.scale_clamp)
        new_center = torch.stack((dx / wx, dy / wy), dim=-1) * size + center
        half = 0.5 * torch.exp(scale) * size
        return torch.cat((new_center - half, new_center + half), dim=-1).reshape(deltas.shape)


class Box2BoxTransformLinear:
    """Distances from the centre of the source box to the four edges of the target, as in FCOS
    (Tian et al., arXiv:1904.01355), in units of the source's size if ``normalize_by_size``, else in pixels.
    """

    def __init__(self, normalize_by_size: bool = True):
        self.normalize_by_size = normalize_by_size

    def _unit(self, size: torch.Tensor) -> torch.Tensor | float:
        return torch.cat((size, size), dim=-1) if self.normalize_by_size else 1.0

    def get_deltas(self, src_boxes: torch.Tensor, target_boxes: torch.Tensor) -> torch.Tensor:
        """(left, top, right, bottom), (N, 4); negative where the centre lies outside of the target."""
        for boxes in (src_boxes, target_boxes):
            _check_boxes("Box2BoxTransformLinear.get_deltas", boxes)
        center, size = _centers_and_sizes(src_boxes)
        deltas = torch.cat((center - target_boxes[..., :2], target_boxes[..., 2:] - center), dim=-1)
        return deltas / self._unit(size)

    def apply_deltas(self, deltas: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """The boxes (N, 4) that lie ``deltas`` (N, 4) around the centres of ``boxes``; negative ones count as 0."""
        center, size = _centers_and_sizes(boxes.to(deltas.dtype))
        distance = deltas.relu() * self._unit(size)
        return torch.cat((center - distance[..., :2], center + distance[..., 2:]), dim=-1)


_IOU_LOSSES = {"giou": giou_loss, "diou": diou_loss, "ciou": ciou_loss}


def _dense_box_regression_loss(
    anchors: list[Boxes | torch.Tensor],
    box2box_transform: Box2BoxTransform | Box2BoxTransformLinear,
    pred_anchor_deltas: list[torch.Tensor],
    gt_boxes: list[torch.Tensor],
    fg_mask: torch.Tensor,
    box_reg_loss_type: str = "smooth_l1",
    smooth_l1_beta: float = 0.0,
) -> torch.Tensor:
    """Sum of the regression loss over the foreground anchors of a batch, a scalar.

    Args:
        anchors: (R_l, 4) boxes of each level.
        pred_anchor_deltas: (N, R_l, 4) predictions of each level.
        gt_boxes: for each of the N images the (R, 4) boxes matched to the anchors, R the sum of all R_l.
        fg_mask: (N, R) bool, the anchors that count.
        box_reg_loss_type: "smooth_l1" compares deltas; "giou", "diou" and "ciou" compare decoded boxes.
        smooth_l1_beta: where smooth L1 turns from quadratic to linear; 0 is plain L1.
    """
    boxes = torch.cat([a.tensor if isinstance(a, Boxes) else a for a in anchors])
    # The indices are found once; only foreground rows are ever encoded or decoded.
    image, anchor = fg_mask.nonzero(as_tuple=True)
    # In float32 under mixed precision too: 16 bits do not resolve pixels of a large image.
    predicted = torch.cat(pred_anchor_deltas, dim=1)[image, anchor].float()
    targets, boxes = torch.stack(list(gt_boxes))[image, anchor], boxes[anchor]
    if box_reg_loss_type == "smooth_l1":
        wanted = box2box_transform.get_deltas(boxes, targets)
        return smooth_l1_loss(predicted, wanted, beta=smooth_l1_beta, reduction="sum")
    if box_reg_loss_type not in _IOU_LOSSES:
        raise ValueError(
            f"box regression loss '{box_reg_loss_type}' is unknown; choose smooth_l1, {', '.join(_IOU_LOSSES)}"
        )
    decoded = box2box_transform.apply_deltas(predicted, boxes)
    return _IOU_LOSSES[box_reg_loss_type](decoded, targets, reduction="sum")
