"""Mask branch of R-CNNs (He et al., arXiv:1703.06870, sec. 3): a small binary mask for every box."""

import torch
import torch.nn.functional as F
from fvcore.nn.weight_init import c2_msra_fill
from torch import nn

from detectron2.config import configurable
from detectron2.layers import Conv2d, ConvTranspose2d, ShapeSpec, get_norm
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from detectron2.utils.registry import Registry

__all__ = [
    "ROI_MASK_HEAD_REGISTRY", "BaseMaskRCNNHead", "MaskRCNNConvUpsampleHead", "build_mask_head", "mask_rcnn_inference",
    "mask_rcnn_loss",
]

ROI_MASK_HEAD_REGISTRY = Registry("ROI_MASK_HEAD")
ROI_MASK_HEAD_REGISTRY.__doc__ = """
Mask heads by name; each is called as ``constructor(cfg, input_shape)`` with the :class:`ShapeSpec` of the features of
one box, and takes features and Instances as :class:`BaseMaskRCNNHead` does.
"""


def build_mask_head(cfg, input_shape: ShapeSpec) -> nn.Module:
    """Build the head that ``cfg.MODEL.ROI_MASK_HEAD.NAME`` names."""
    return ROI_MASK_HEAD_REGISTRY.get(cfg.MODEL.ROI_MASK_HEAD.NAME)(cfg, input_shape)


def mask_rcnn_loss(pred_mask_logits: torch.Tensor, instances: list[Instances], vis_period: int = 0) -> torch.Tensor:
    """Binary cross-entropy of the masks of the true classes, averaged over all cells of all masks (sec. 3, L_mask).

    Args:
        pred_mask_logits: (B, K, M, M) for K classes, or (B, 1, M, M) for masks that do not depend on the class; the B
            boxes of all images, image by image.
        instances: for each image ``proposal_boxes`` (pixels of the network's input), ``gt_masks`` and ``gt_classes``.
        vis_period: every so many iterations, predictions beside their targets go to the event storage; 0 for never.

    Returns:
        a scalar; 0, with zero gradients, if there are no boxes.
    """
    height, width = pred_mask_logits.shape[2:]
    if height != width:
        raise ValueError(f"mask_rcnn_loss: masks must be square, not {height} x {width}")
    # An image without ground truth may lack the fields of the others.
    filled = [x for x in instances if len(x) > 0]
    if not filled:
        return pred_mask_logits.sum() * 0
    target = torch.cat([x.gt_masks.crop_and_resize(x.proposal_boxes.tensor, height) for x in filled])
    logits = _logits_of_classes(pred_mask_logits, [x.gt_classes for x in filled]).float()
    _report(logits.detach(), target, vis_period)
    return F.binary_cross_entropy_with_logits(logits, target.float())


def mask_rcnn_inference(pred_mask_logits: torch.Tensor, pred_instances: list[Instances]) -> None:
    """Give every detection the mask of its class.

    Args:
        pred_mask_logits: as in :func:`mask_rcnn_loss`.
        pred_instances: for each image at least ``pred_classes``; each gets ``pred_masks``, (N, 1, M, M) foreground
            probabilities within its box.
    """
    if not pred_instances:
        return
    probabilities = _logits_of_classes(pred_mask_logits, [x.pred_classes for x in pred_instances]).sigmoid()
    for x, masks in zip(pred_instances, probabilities.split([len(x) for x in pred_instances])):
        x.pred_masks = masks[:, None]


def _logits_of_classes(logits: torch.Tensor, classes: list[torch.Tensor]) -> torch.Tensor:
    """From (B, K or 1, M, M) and the classes of each image, B in all, to (B, M, M)."""
    number = sum(map(len, classes))
    if number != len(logits):
        raise ValueError(f"got masks of {len(logits)} boxes for {number} instances")
    if logits.shape[1] == 1:
        return logits[:, 0]
    return logits[torch.arange(number, device=logits.device), torch.cat(classes)]


def _report(logits: torch.Tensor, target: torch.Tensor, vis_period: int) -> None:
    """Log how many cells are wrong; both arguments are (B, M, M), ``target`` is bool."""
    storage = get_event_storage()
    wrong = (logits > 0) != target
    total = target.numel()
    missed, errors, foreground = torch.stack([x.sum() for x in (wrong & target, wrong, target)]).tolist()
    storage.put_scalar("mask_rcnn/accuracy", 1 - errors / total)
    storage.put_scalar("mask_rcnn/false_positive", (errors - missed) / max(total - foreground, 1))
    storage.put_scalar("mask_rcnn/false_negative", missed / max(foreground, 1))
    if vis_period > 0 and storage.iter % vis_period == 0:
        pairs = torch.cat((logits.sigmoid(), target.float()), dim=2)
        for index, pair in enumerate(pairs):
            storage.put_image(f"Left: mask prediction;   Right: mask GT ({index})", pair.expand(3, *pair.shape))


class BaseMaskRCNNHead(nn.Module):
    """Loss and inference of a mask head; subclasses define :meth:`layers`.

    Args:
        loss_weight: factor of the loss.
        vis_period: see :func:`mask_rcnn_loss`.
    """

    @configurable
    def __init__(self, *, loss_weight: float = 1.0, vis_period: int = 0):
        super().__init__()
        self.loss_weight, self.vis_period = loss_weight, vis_period

    @classmethod
    def from_config(cls, cfg, input_shape: ShapeSpec) -> dict:
        return {"vis_period": cfg.VIS_PERIOD}

    def forward(self, x: torch.Tensor, instances: list[Instances]) -> dict[str, torch.Tensor] | list[Instances]:
        """
        Args:
            x: (B, C, H, W) features of the boxes of all images, image by image.
            instances: of each image; matched proposals in training, detections at inference.

        Returns:
            in training {"loss_mask": scalar}; at inference ``instances``, which have got ``pred_masks``.
        """
        logits = self.layers(x)
        if self.training:
            return {"loss_mask": self.loss_weight * mask_rcnn_loss(logits, instances, self.vis_period)}
        mask_rcnn_inference(logits, instances)
        return instances

    def layers(self, x: torch.Tensor) -> torch.Tensor:
        """Features (B, C, H, W) -> mask logits (B, K or 1, M, M)."""
        raise NotImplementedError


@ROI_MASK_HEAD_REGISTRY.register()
class MaskRCNNConvUpsampleHead(BaseMaskRCNNHead, nn.Sequential):
    """3x3 convolutions, a transposed convolution that doubles the side, and a 1x1 convolution to the classes.

    Args:
        input_shape: its channels are read.
        num_classes: masks per box, 1 for masks that do not depend on the class.
        conv_dims: channels of the 3x3 convolutions and, the last one, of the transposed convolution.
        conv_norm: normalisation of the 3x3 convolutions ("" for none, then they have a bias).
        kwargs: those of :class:`BaseMaskRCNNHead`.
    """

    @configurable
    def __init__(
        self, input_shape: ShapeSpec, *, num_classes: int, conv_dims: list[int], conv_norm: str = "", **kwargs
    ):
        super().__init__(**kwargs)
        if not conv_dims:
            raise ValueError("MaskRCNNConvUpsampleHead: conv_dims must name at least the channels of the upsampling")
        *widths, upsampled = conv_dims
        channels = input_shape.channels
        for number, width in enumerate(widths, start=1):
            conv = Conv2d(
                channels, width, 3, padding=1, bias=not conv_norm, norm=get_norm(conv_norm, width),
                activation=nn.ReLU(),
            )
            self.add_module(f"mask_fcn{number}", conv)
            channels = width
        self.deconv = ConvTranspose2d(channels, upsampled, 2, stride=2)
        convs = list(self.children())
        self.deconv_relu = nn.ReLU()
        self.predictor = Conv2d(upsampled, num_classes, 1)
        for conv in convs:
            c2_msra_fill(conv)
        nn.init.normal_(self.predictor.weight, std=0.001)
        nn.init.zeros_(self.predictor.bias)

    @classmethod
    def from_config(cls, cfg, input_shape: ShapeSpec) -> dict:
        node = cfg.MODEL.ROI_MASK_HEAD
        return {
            **super().from_config(cfg, input_shape),
            "input_shape": input_shape,
            "num_classes": 1 if node.CLS_AGNOSTIC_MASK else cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "conv_dims": [node.CONV_DIM] * (node.NUM_CONV + 1),
            "conv_norm": node.NORM,
        }

    def layers(self, x: torch.Tensor) -> torch.Tensor:
        return nn.Sequential.forward(self, x)
