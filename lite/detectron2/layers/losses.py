"""Box regression losses, taken from torchvision under detectron2's names.

Both take boxes1 and boxes2 of shape (N, 4) as corners, `reduction` ("none", "mean", "sum") and `eps`.
"""

from torchvision.ops import complete_box_iou_loss as ciou_loss
from torchvision.ops import distance_box_iou_loss as diou_loss

__all__ = ["ciou_loss", "diou_loss"]
