"""Keypoint branch of R-CNNs (He et al., arXiv:1703.06870, sec. 5): a heatmap for every keypoint of every box."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from detectron2.config import configurable
from detectron2.layers import Conv2d, ConvTranspose2d, ShapeSpec
from detectron2.structures import Instances, heatmaps_to_keypoints
from detectron2.utils.events import get_event_storage
from detectron2.utils.registry import Registry

__all__ = [
    "ROI_KEYPOINT_HEAD_REGISTRY", "BaseKeypointRCNNHead", "KRCNNConvDeconvUpsampleHead", "build_keypoint_head",
    "keypoint_rcnn_inference", "keypoint_rcnn_loss",
]

ROI_KEYPOINT_HEAD_REGISTRY = Registry("ROI_KEYPOINT_HEAD")
ROI_KEYPOINT_HEAD_REGISTRY.__doc__ = """
Keypoint heads by name; each is called as ``constructor(cfg, input_shape)`` with the :class:`ShapeSpec` of the features
of one box, and takes features and Instances as :class:`BaseKeypointRCNNHead` does.
"""

_NOT_VALID = -1
_skipped_batches = itertools.count(start=1)


def build_keypoint_head(cfg, input_shape: ShapeSpec) -> nn.Module:
    """Build the head that ``cfg.MODEL.ROI_KEYPOINT_HEAD.NAME`` names."""
    return ROI_KEYPOINT_HEAD_REGISTRY.get(cfg.MODEL.ROI_KEYPOINT_HEAD.NAME)(cfg, input_shape)


def keypoint_rcnn_loss(
    pred_keypoint_logits: torch.Tensor, instances: list[Instances], normalizer: float | None
) -> torch.Tensor:
    """Cross-entropy over the cells of each heatmap, of which one holds the keypoint (sec. 5).

    Keypoints that are not labeled or lie outside their proposal do not count. Batches without any that counts are
    themselves counted, over the life of the process, as "kpts_num_skipped_batches" in the event storage.

    Args:
        pred_keypoint_logits: (B, K, S, S), the B boxes of all images, image by image.
        instances: for each image ``proposal_boxes`` (pixels of the network's input) and ``gt_keypoints``.
        normalizer: what to divide the sum by; None for the number of keypoints that count.

    Returns:
        a scalar; 0, with zero gradients, if no keypoint counts.
    """
    side, width = pred_keypoint_logits.shape[2:]
    if side != width:
        raise ValueError(f"keypoint_rcnn_loss: heatmaps must be square, not {side} x {width}")
    encoded = [x.gt_keypoints.to_heatmap(x.proposal_boxes.tensor, side) for x in instances if len(x) > 0]
    number = sum(len(cells) for cells, _ in encoded)
    if number != len(pred_keypoint_logits):
        raise ValueError(
            f"keypoint_rcnn_loss: got heatmaps of {len(pred_keypoint_logits)} boxes for {number} instances"
        )
    targets = [cells.masked_fill(valid == 0, _NOT_VALID) for cells, valid in encoded]
    num_valid = int(sum(valid.sum() for _, valid in encoded))
    if num_valid == 0:
        get_event_storage().put_scalar("kpts_num_skipped_batches", next(_skipped_batches), smoothing_hint=False)
        return pred_keypoint_logits.sum() * 0
    loss = F.cross_entropy(
        pred_keypoint_logits.float().flatten(2).flatten(0, 1), torch.cat(targets).flatten(),
        ignore_index=_NOT_VALID, reduction="sum",
    )
    return loss / (num_valid if normalizer is None else normalizer)


def keypoint_rcnn_inference(pred_keypoint_logits: torch.Tensor, pred_instances: list[Instances]) -> None:
    """Give every detection its keypoints.

    Args:
        pred_keypoint_logits: as in :func:`keypoint_rcnn_loss`.
        pred_instances: for each image at least ``pred_boxes``, N of them. Each gets ``pred_keypoints``, (N, K, 3): x
            and y in the pixels of the boxes and a positive score; and ``pred_keypoint_heatmaps``, (N, K, S, S), the
            logits over its box. Both are without gradients.
    """
    if not pred_instances:
        return
    logits = pred_keypoint_logits.detach()
    boxes = torch.cat([x.pred_boxes.tensor for x in pred_instances]).detach()
    if len(boxes) != len(logits):
        raise ValueError(f"keypoint_rcnn_inference: got heatmaps of {len(logits)} boxes for {len(boxes)} detections")
    x, y, _, score = heatmaps_to_keypoints(logits, boxes).unbind(dim=2)
    counts = [len(found) for found in pred_instances]
    keypoints = torch.stack((x, y, score), dim=2)
    for found, points, maps in zip(pred_instances, keypoints.split(counts), logits.split(counts)):
        found.pred_keypoints, found.pred_keypoint_heatmaps = points, maps


class BaseKeypointRCNNHead(nn.Module):
    """Loss and inference of a keypoint head; subclasses define :meth:`layers`.

    Args:
        num_keypoints: K.
        loss_weight: factor of the loss.
        loss_normalizer: "visible" divides the loss by the number of keypoints in the batch that count; a number is
            multiplied by the number of images first.
    """

    @configurable
    def __init__(self, *, num_keypoints: int, loss_weight: float = 1.0, loss_normalizer: float | str = 1.0):
        super().__init__()
        if isinstance(loss_normalizer, str) and loss_normalizer != "visible":
            raise ValueError(f"keypoint head: loss_normalizer must be a number or 'visible', not {loss_normalizer!r}")
        self.num_keypoints = num_keypoints
        self.loss_weight, self.loss_normalizer = loss_weight, loss_normalizer

    @classmethod
    def from_config(cls, cfg, input_shape: ShapeSpec) -> dict:
        node, common = cfg.MODEL.ROI_KEYPOINT_HEAD, cfg.MODEL.ROI_HEADS
        normalizer = "visible"
        if not node.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS:
            # All keypoints of as many positive proposals as an image can have.
            normalizer = node.NUM_KEYPOINTS * common.BATCH_SIZE_PER_IMAGE * common.POSITIVE_FRACTION
        return {
            "num_keypoints": node.NUM_KEYPOINTS, "loss_weight": node.LOSS_WEIGHT, "loss_normalizer": normalizer
        }

    def forward(self, x: torch.Tensor, instances: list[Instances]) -> dict[str, torch.Tensor] | list[Instances]:
        """
        Args:
            x: (B, C, H, W) features of the boxes of all images, image by image.
            instances: of each image; matched proposals in training, detections at inference.

        Returns:
            in training {"loss_keypoint": scalar}; at inference ``instances``, which have got ``pred_keypoints`` and
            ``pred_keypoint_heatmaps``.
        """
        logits = self.layers(x)
        if self.training:
            visible = self.loss_normalizer == "visible"
            normalizer = None if visible else self.loss_normalizer * len(instances)
            return {"loss_keypoint": self.loss_weight * keypoint_rcnn_loss(logits, instances, normalizer)}
        keypoint_rcnn_inference(logits, instances)
        return instances

    def layers(self, x: torch.Tensor) -> torch.Tensor:
        """Features (B, C, H, W) -> heatmap logits (B, K, S, S)."""
        raise NotImplementedError


@ROI_KEYPOINT_HEAD_REGISTRY.register()
class KRCNNConvDeconvUpsampleHead(BaseKeypointRCNNHead, nn.Sequential):
    """3x3 convolutions with ReLU, a transposed convolution to the keypoints that doubles the side, and bilinear
    upsampling that doubles it again.

    Args:
        input_shape: its channels are read.
        num_keypoints: K.
        conv_dims: channels of the 3x3 convolutions.
        kwargs: those of :class:`BaseKeypointRCNNHead`.
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, num_keypoints: int, conv_dims: list[int], **kwargs):
        super().__init__(num_keypoints=num_keypoints, **kwargs)
        self.up_scale = 2.0
        channels = input_shape.channels
        for number, width in enumerate(conv_dims, start=1):
            self.add_module(f"conv_fcn{number}", Conv2d(channels, width, 3, padding=1))
            self.add_module(f"conv_fcn_relu{number}", nn.ReLU())
            channels = width
        self.score_lowres = ConvTranspose2d(channels, num_keypoints, 4, stride=2, padding=1)
        for parameter in self.parameters():
            if parameter.dim() == 1:
                nn.init.zeros_(parameter)
            else:
                nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")

    @classmethod
    def from_config(cls, cfg, input_shape: ShapeSpec) -> dict:
        arguments = super().from_config(cfg, input_shape)
        return {**arguments, "input_shape": input_shape, "conv_dims": cfg.MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS}

    def layers(self, x: torch.Tensor) -> torch.Tensor:
        maps = nn.Sequential.forward(self, x)
        return F.interpolate(maps, scale_factor=self.up_scale, mode="bilinear", align_corners=False)
