"""FCOS for yaml: detectron2's own class, which detectron2 itself only builds from code."""

from __future__ import annotations

from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.meta_arch import fcos
from torch import nn


@META_ARCH_REGISTRY.register()
class FCOS(fcos.FCOS):
    """FCOS (Tian et al., ICCV 2019) of detectron2 with the keys of MODEL.FCOS; adds no parameter.

    Regression ranges and centre radii follow from the strides of IN_FEATURES, so levels moved down by one (a student
    in the L frame) get halved ranges by themselves.
    """

    @configurable
    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg) -> dict:
        options = cfg.MODEL.FCOS
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        absent = [name for name in options.IN_FEATURES if name not in shapes]
        if absent:
            raise ValueError(f"MODEL.FCOS.IN_FEATURES: {absent} are not made by the backbone, which has {list(shapes)}")
        head = cls.build_head(
            cfg,
            input_shape=[shapes[name] for name in options.IN_FEATURES],
            num_classes=options.NUM_CLASSES,
            conv_dims=list(options.CONV_DIMS),
            norm=options.NORM,
            prior_prob=options.PRIOR_PROB,
        )
        # Distances pass a ReLU: without a bias, half of the four outputs start dead, and small networks trained from
        # scratch do not recover.
        nn.init.constant_(head.bbox_pred.bias, options.PRIOR_DISTANCE)
        return {
            "backbone": backbone,
            "head": head,
            "head_in_features": list(options.IN_FEATURES),
            "num_classes": options.NUM_CLASSES,
            "center_sampling_radius": options.CENTER_SAMPLING_RADIUS,
            "focal_loss_alpha": options.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": options.FOCAL_LOSS_GAMMA,
            "test_score_thresh": options.SCORE_THRESH_TEST,
            "test_topk_candidates": options.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": options.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    @classmethod
    def build_head(cls, cfg, **kwargs) -> nn.Module:
        """The head that goes with these arguments of detectron2's FCOSHead."""
        return fcos.FCOSHead(**kwargs)

    def forward_training(self, images, features, predictions, gt_instances):
        """detectron2's losses in float32: its GIoU does not take the half-precision boxes of mixed precision."""
        predictions = [[x.float() for x in levels] for levels in predictions]
        return super().forward_training(images, features, predictions, gt_instances)
