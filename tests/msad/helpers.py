"""What several test files make: steps, and losses between two networks."""

from __future__ import annotations

import dataclasses

import torch
from detectron2.structures import Boxes, Instances

from msad import load_config
from msad.distill.context import DistillContext
from msad.distill.losses import build_losses


def make_context(image_sizes, gt=(), **fields) -> DistillContext:
    """A step with images of these (h, w), H pixels, and their ground truth (default: none)."""
    gt = list(gt) or [Instances(size, gt_boxes=Boxes(torch.zeros(0, 4))) for size in image_sizes]
    images = [torch.zeros(1, 1, 1).expand(3, *size) for size in image_sizes]
    return DistillContext([{"image": x, "instances": y} for x, y in zip(images, gt)], **fields)


def between(entries, student, teacher, seed=0):
    """DISTILL.LOSSES ``entries`` between networks of these neck shapes."""
    return build_losses(entries, lambda tap: student, {"teacher": lambda tap: teacher}, seed)


def evaluate(loss, student, teacher, context=None):
    """A built loss of these features."""
    context = make_context([]) if context is None else context
    return loss(dataclasses.replace(context, student=student, sources={"teacher": teacher}))


NARROW = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.RESNETS.STEM_OUT_CHANNELS", 8]
NARROW += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 16, "MODEL.FPN.OUT_CHANNELS", 32, "MODEL.GFL.CONV_DIMS", [32]]
NARROW += ["MODEL.FCOS.CONV_DIMS", [32], "MODEL.RETINANET.NUM_CONVS", 1, "MODEL.REPPOINTS.CONV_DIMS", [32]]
NARROW += ["MODEL.RPN.PRE_NMS_TOPK_TRAIN", 50, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 20, "MODEL.ROI_BOX_HEAD.FC_DIM", 16]
NARROW += ["MODEL.ROI_HEADS.NUM_CLASSES", 3, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 3]  # of make_batch


def load_narrow(path):
    """The config of a yaml file with networks that a CPU trains in a moment, without weights."""
    cfg = load_config(path, NARROW)
    if cfg.MODEL.RESNETS.DEPTH < 50:
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64  # detectron2 has no others
    return cfg
