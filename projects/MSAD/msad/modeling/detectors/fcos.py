"""FCOS for yaml: detectron2's own class, which detectron2 itself only builds from code."""

from __future__ import annotations

from functools import partial

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch import fcos
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn

from ..deformable import ModulatedConv
from .candidates import ClipsBeforeNMS, best_candidates, suppress
from .dense import dense_arguments

SCORE_RULES = ("sqrt_product", "product_after_threshold")
BOXES = ("relu_stride", "exp")


class ScaledFCOSHead(fcos.FCOSHead):
    """detectron2's head with what it left out of the original: a learned factor a level, exponential distances,
    centreness from the tower of the classes, and deformable convolutions at the end of the towers.

    Args:
        input_shape, conv_dims, kwargs: of detectron2's FCOSHead.
        boxes: "relu_stride" (a distance is ReLU(scale x) strides) or "exp" (it is exp(scale x) units).
        exp_unit: of "exp" in pixels of the network's input, positive.
        centerness_on: tower that centreness is predicted from: "reg" or "cls".
        deform_last: the last convolution of each tower is deformable and modulated.
    """

    def __init__(
        self, *, input_shape: list, conv_dims: list[int], boxes: str, centerness_on: str, deform_last: bool = False,
        exp_unit: float = 1.0, **kwargs,
    ) -> None:  # fmt: skip
        super().__init__(input_shape=input_shape, conv_dims=conv_dims, **kwargs)
        for tower in (self.cls_subnet, self.bbox_subnet) if deform_last else ():
            last = max(k for k, layer in enumerate(tower) if isinstance(layer, nn.Conv2d))
            tower[last] = ModulatedConv(tower[last].in_channels, tower[last].out_channels)
        if boxes not in BOXES:
            raise ValueError(f"MODEL.FCOS.BOXES must be one of {BOXES}, not {boxes!r}")
        if centerness_on not in ("reg", "cls"):
            raise ValueError(f"MODEL.FCOS.CENTERNESS_ON must be 'reg' or 'cls', not {centerness_on!r}")
        if exp_unit <= 0:
            raise ValueError(f"MODEL.FCOS.EXP_UNIT must be above 0, not {exp_unit}")
        self.exp_unit = exp_unit
        self.exponential, self.centerness_on = boxes == "exp", centerness_on
        self.strides = [shape.stride for shape in input_shape]
        self.scales = nn.Parameter(torch.ones(len(input_shape)))

    def forward(self, features: list[torch.Tensor]) -> tuple[list[torch.Tensor], ...]:
        """Maps (N, C, h_l, w_l) -> class logits, distances in strides and centreness logits, as detectron2's head."""
        outputs = []
        for x, scale, stride in zip(features, self.scales, self.strides):
            for_class, for_box = self.cls_subnet(x), self.bbox_subnet(x)
            distance = scale * self.bbox_pred(for_box)
            if self.exponential:
                distance = distance.float().exp() * (self.exp_unit / stride)  # detectron2 decodes ReLU(x) strides
            centerness = self.ctrness(for_class if self.centerness_on == "cls" else for_box)
            outputs.append((self.cls_score(for_class), distance, centerness))
        return tuple(list(levels) for levels in zip(*outputs))


@META_ARCH_REGISTRY.register()
class FCOS(ClipsBeforeNMS, fcos.FCOS):
    """FCOS (Tian et al., ICCV 2019) of detectron2 with the keys of MODEL.FCOS; by default it adds no parameter.

    Regression ranges and centre radii follow from the strides of IN_FEATURES, so levels moved down by one (a student
    in the L frame) get halved ranges by themselves.

    Args:
        score_rule: "sqrt_product": candidates are chosen by sqrt(class score * centreness), their score. As in
            mmdetection "product_after_threshold": chosen by the class score alone, and scored by the product.
        clip_before_nms: see :class:`ClipsBeforeNMS`.
        kwargs: detectron2's.
    """

    @configurable
    def __init__(self, *, score_rule: str = "sqrt_product", clip_before_nms: bool = False, **kwargs) -> None:
        super().__init__(**kwargs)
        if score_rule not in SCORE_RULES:
            raise ValueError(f"MODEL.FCOS.SCORE_RULE must be one of {SCORE_RULES}, not {score_rule!r}")
        self.score_rule, self.clip_before_nms = score_rule, clip_before_nms

    @classmethod
    def from_config(cls, cfg) -> dict:
        options = cfg.MODEL.FCOS
        head = partial(
            cls.build_head,
            cfg,
            num_classes=options.NUM_CLASSES,
            conv_dims=list(options.CONV_DIMS),
            norm=options.NORM,
            prior_prob=options.PRIOR_PROB,
        )
        arguments = dense_arguments(cfg, "FCOS", lambda shapes: head(input_shape=shapes))
        # Distances pass a ReLU: without a bias, half of the four outputs start dead, and small networks trained from
        # scratch do not recover.
        nn.init.constant_(arguments["head"].bbox_pred.bias, options.PRIOR_DISTANCE)
        return {
            **arguments,
            "score_rule": options.SCORE_RULE,
            "clip_before_nms": options.CLIP_BEFORE_NMS,
            "center_sampling_radius": options.CENTER_SAMPLING_RADIUS,
            "focal_loss_alpha": options.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": options.FOCAL_LOSS_GAMMA,
        }

    @classmethod
    def build_head(cls, cfg, **kwargs) -> nn.Module:
        """The head that goes with these arguments of detectron2's FCOSHead."""
        options = cfg.MODEL.FCOS
        own = {"boxes": options.BOXES, "centerness_on": options.CENTERNESS_ON, "deform_last": options.DEFORM_LAST}
        if options.SCALES:
            return ScaledFCOSHead(**own, exp_unit=options.EXP_UNIT, **kwargs)
        if tuple(own.values()) != ("relu_stride", "reg", False):
            raise ValueError(
                "MODEL.FCOS.BOXES 'exp', CENTERNESS_ON 'cls' and DEFORM_LAST need MODEL.FCOS.SCALES: True"
            )
        return fcos.FCOSHead(**kwargs)

    def forward_training(self, images, features, predictions, gt_instances):
        """detectron2's losses in float32: its GIoU does not take the half-precision boxes of mixed precision."""
        predictions = [[x.float() for x in levels] for levels in predictions]
        return super().forward_training(images, features, predictions, gt_instances)

    def forward_inference(
        self, images: ImageList, features: list[torch.Tensor], predictions: list[list[torch.Tensor]]
    ) -> list[Instances]:
        """Detections of each image in pixels of the network's input."""
        if self.score_rule == "sqrt_product":
            return super().forward_inference(images, features, predictions)
        levels = self._transpose_dense_predictions(predictions, [self.num_classes, 4, 1])
        locations = [level.tensor for level in self.anchor_generator(features)]
        return [
            self._detect(locations, *([x[i] for x in output] for output in levels), size)
            for i, size in enumerate(images.image_sizes)
        ]

    def _detect(
        self, locations: list[torch.Tensor], logits: list[torch.Tensor], deltas: list[torch.Tensor],
        centerness: list[torch.Tensor], image_size: tuple[int, int],
    ) -> Instances:  # fmt: skip
        """Detections of one image from (R_l, K), (R_l, 4) and (R_l, 1) of each level's locations (R_l, 4)."""
        found = []
        for level, c, d, q in zip(locations, logits, deltas, centerness):
            score, place, label = best_candidates(c.sigmoid(), self.test_score_thresh, self.test_topk_candidates)
            boxes = Boxes(self.box2box_transform.apply_deltas(d[place].float(), level[place]))
            score = score * q[place, 0].sigmoid()
            found.append(Instances(image_size, pred_boxes=boxes, scores=score, pred_classes=label))
        found = Instances.cat(found)
        return suppress(found, self.test_nms_thresh, self.max_detections_per_image, self.clip_before_nms)
