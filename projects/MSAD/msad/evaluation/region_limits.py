"""R-CNNs with random weights whose heads see as many regions as those of trained ones."""

from __future__ import annotations

import torch
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from torch import nn

_CERTAIN = 10.0  # logit


@torch.no_grad()
def fill_regions(model: nn.Module) -> nn.Module:
    """Let an untrained R-CNN propose and detect as many regions as its limits allow; in place, returns ``model``.

    Random weights propose a handful of regions and detect nothing, so that the heads of regions seem to cost nothing,
    where trained ones propose MODEL.RPN.POST_NMS_TOPK_TEST of nearly every image. Afterwards proposals are anchors,
    each is surely an object of the first class, and nothing is suppressed. Masks and keypoints are then those of
    TEST.DETECTIONS_PER_IMAGE objects, which trained models have in the fullest images only. Other detectors stay what
    they are.
    """
    for module in model.modules():
        if isinstance(module, RPN):
            module.nms_thresh = 1.0
        elif isinstance(module, StandardRPNHead):
            _zero(module.objectness_logits, module.anchor_deltas)
        elif isinstance(module, FastRCNNOutputLayers):
            module.test_nms_thresh = 1.0
            _zero(module.cls_score, module.bbox_pred)
            module.cls_score.bias.fill_(-_CERTAIN)
            module.cls_score.bias[0] = _CERTAIN
    return model


def _zero(*layers: nn.Module) -> None:
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
