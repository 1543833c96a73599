"""What dense detectors that are built from yaml have in common."""

from __future__ import annotations

from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import Backbone
from detectron2.utils import comm
from torch import nn

# Logit of all classes in an ignored region. Its sigmoid is 0 in float32, and the number exists in float16.
SURELY_BACKGROUND = -100.0


def dense_arguments(cfg: CfgNode, node: str, build_head: Callable[[list[ShapeSpec]], nn.Module]) -> dict:
    """Arguments of a subclass of detectron2's DenseDetector that all kinds take from MODEL.{node} alike.

    Args:
        build_head: channels and strides of the maps that the head reads -> head.

    Raises:
        ValueError: IN_FEATURES that the backbone does not make.
    """
    options = cfg.MODEL[node]
    backbone = build_backbone(cfg)
    shapes = backbone.output_shape()
    absent = [name for name in options.IN_FEATURES if name not in shapes]
    if absent:
        raise ValueError(f"MODEL.{node}.IN_FEATURES: {absent} are not made by the backbone, which has {list(shapes)}")
    return {
        "backbone": backbone,
        "head": build_head([shapes[name] for name in options.IN_FEATURES]),
        "head_in_features": list(options.IN_FEATURES),
        "num_classes": options.NUM_CLASSES,
        "test_score_thresh": options.SCORE_THRESH_TEST,
        "test_topk_candidates": options.TOPK_CANDIDATES_TEST,
        "test_nms_thresh": options.NMS_THRESH_TEST,
        "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        "pixel_mean": cfg.MODEL.PIXEL_MEAN,
        "pixel_std": cfg.MODEL.PIXEL_STD,
    }


def cell_generator(backbone: Backbone, levels: list[str], offset: float) -> DefaultAnchorGenerator:
    """One anchor a location: a square with the sides of the level's stride.

    Args:
        offset: where in a stride its centre lies.
    """
    strides = [backbone.output_shape()[name].stride for name in levels]
    return DefaultAnchorGenerator(
        sizes=[[stride] for stride in strides], aspect_ratios=[1.0], strides=strides, offset=offset
    )


def mean_of_processes(x: torch.Tensor) -> torch.Tensor:
    """``x`` averaged over the processes of a distributed run."""
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(x)
        x = x / comm.get_world_size()
    return x
