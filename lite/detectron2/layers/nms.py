"""Non-maximum suppression."""

from torch import Tensor
from torchvision.ops import boxes as box_ops
from torchvision.ops import nms

__all__ = ["batched_nms", "nms"]


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Suppress boxes that overlap a better one of the same group by more than `iou_threshold`.

    Args:
        boxes: (N, 4) corners.
        scores: (N,).
        idxs: (N,) group of each box, for example its class or its pyramid level.

    Returns:
        int64 indices of the kept boxes by falling score.
    """
    # torchvision may add an offset per group to the coordinates; float16 has too few bits for that.
    return box_ops.batched_nms(boxes.float(), scores, idxs, iou_threshold)
