"""Detectors as functions of tensors alone, for tracing: from pixels to detections, with the modules of the model."""

from __future__ import annotations

from functools import singledispatch

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from torch import Tensor, nn

from ..modeling.adapters import adapt
from ..modeling.detectors.gfl import GFL
from ..modeling.detectors.meinst import MEInst
from ..modeling.fusion_student import FusionBackbone
from . import graph_ops as ops

Tensors = dict[str, Tensor]


class DetectionGraph(nn.Module):
    """A detector, in eval mode, that takes and gives tensors only.

    ``forward`` takes images (N, H, W, 3) uint8 with channels in the model's order, and sizes (N, 2) int64: an image of
    this height and width lies in the upper left corner of its slot. It returns, for the M detections of all images,
    image by image and of each the best first, the tensors that ``outputs`` names:

    - boxes (M, 4), corners in pixels of ``images``, clipped to the image;
    - scores (M,); classes (M,) int64, counted from 0; image (M,) int64, index in the batch;
    - masks (M, S, S), probabilities inside the boxes, of detectors with masks;
    - keypoints (M, K, 3), x, y in pixels of ``images`` and a probability, of detectors with keypoints.

    Args:
        detector: its modules are shared, not copied.
        extras: names of the outputs beyond the first four.
    """

    def __init__(self, detector: nn.Module, extras: list[str]) -> None:
        super().__init__()
        if isinstance(detector.backbone, FusionBackbone):
            raise TypeError("a fusion student cannot be exported to ONNX: it makes smaller views image by image")
        adapt(detector).check_preprocessing()
        self.detector = detector
        self.outputs = ["boxes", "scores", "classes", "image", *extras]
        self.eval()

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        detector = self.detector
        divisibility = detector.backbone.size_divisibility
        x = ops.normalize(images, sizes, detector.pixel_mean, detector.pixel_std, divisibility)
        found = self.detect(detector.backbone(x), sizes)
        return tuple(found[name] for name in self.outputs)

    def detect(self, features: Tensors, sizes: Tensor) -> Tensors:
        """Detections from the maps of the backbone."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        raise NotImplementedError

    def limits(self) -> dict[str, float]:
        """The "score_threshold", "nms_threshold" and "max_detections" of an image."""
        raise NotImplementedError

    def axes(self) -> dict[str, dict[int, str]]:
        """Axes of each output whose length is free, by name."""
        return {name: {0: "detections"} for name in self.outputs}


def _anchors(generator: nn.Module, maps: list[Tensor]) -> list[Tensor]:
    """(R_l, 4) of every level."""
    levels = zip(generator.cell_anchors, generator.strides, maps)
    return [ops.grid_anchors(cell, stride, generator.offset, features) for cell, stride, features in levels]


class DenseGraph(DetectionGraph):
    """RetinaNet, FCOS, MEInst or GFL: the best places of every level, then one suppression within each class."""

    def __init__(self, detector: DenseDetector) -> None:
        super().__init__(detector, ["masks"] if isinstance(detector, MEInst) else [])

    @property
    def num_classes(self) -> int:
        return self.detector.num_classes

    def limits(self) -> dict[str, float]:
        detector = self.detector
        return {
            "score_threshold": detector.test_score_thresh, "nms_threshold": detector.test_nms_thresh,
            "max_detections": detector.max_detections_per_image,
        }  # fmt: skip

    def detect(self, features: Tensors, sizes: Tensor) -> Tensors:
        detector = self.detector
        maps = [features[name] for name in detector.head_in_features]
        levels = zip(detector.anchor_generator.cell_anchors, _anchors(detector.anchor_generator, maps))
        predictions = zip(*detector.head(maps))
        best = [self._candidates(len(cell), *level, *maps) for (cell, *level), maps in zip(levels, predictions)]
        chosen, scores, classes, anchors, sides, *codes = (torch.cat(parts, dim=1) for parts in zip(*best))
        # Before a selection: an exported box transform need not work on no boxes.
        boxes = detector.box2box_transform.apply_deltas(sides.flatten(0, 1), anchors.flatten(0, 1))
        boxes = boxes.reshape(*scores.shape, 4)
        counts = chosen > detector.test_score_thresh
        if getattr(detector, "clip_before_nms", False):
            limit = sizes.flip(1).repeat(1, 2)[:, None].to(boxes.dtype)
            boxes = torch.minimum(boxes.clamp(min=0), limit)
            counts = counts & (boxes[..., 2:] > boxes[..., :2]).all(dim=2)
        image, row = counts.nonzero().unbind(1)
        scores, classes, boxes = scores[image, row], classes[image, row], boxes[image, row]
        kept = ops.suppress(
            boxes, scores, image, classes, sizes.shape[0], detector.num_classes, detector.test_nms_thresh,
            detector.max_detections_per_image,
        )  # fmt: skip
        image, row = image[kept], row[kept]
        found = {"boxes": ops.clip(boxes[kept], sizes[image]), "scores": scores[kept], "classes": classes[kept]}
        if codes:
            found["masks"] = detector.mask_code.decode(codes[0][image, row])
        return {**found, "image": image}

    def _candidates(
        self, per_place: int, anchors: Tensor, logits: Tensor, sides: Tensor, *more: Tensor
    ) -> list[Tensor]:
        """The best pairs of anchor and class of one level, (N, T, ...) each: what they were chosen by, their scores,
        classes and anchors, and what the head says of the anchor: sides, codes.

        ``logits`` and what follows are maps (N, A * K, H, W), A ``per_place``.
        """
        detector = self.detector
        scores = ops.flat_map(logits, per_place).sigmoid()
        late = getattr(detector, "score_rule", "") == "product_after_threshold"
        if isinstance(detector, FCOS):
            centerness, *more = more
            centerness = ops.flat_map(centerness, per_place).sigmoid()
            scores = scores if late else (scores * centerness).sqrt()
        chosen, index = ops.best(scores.flatten(1), detector.test_topk_candidates)
        row = index.div(detector.num_classes, rounding_mode="floor")
        rest = [ops.take_rows(ops.flat_map(x, per_place), row) for x in (sides, *more)]
        scores = chosen * ops.take_rows(centerness, row)[..., 0] if late else chosen
        return [chosen, scores, index % detector.num_classes, anchors[row], *rest]


class RCNNGraph(DetectionGraph):
    """Faster, Mask, Keypoint and Cascade R-CNN with a region proposal network and a feature pyramid."""

    def __init__(self, detector: GeneralizedRCNN) -> None:
        heads = detector.roi_heads
        super().__init__(detector, ["masks"] * heads.mask_on + ["keypoints"] * heads.keypoint_on)
        self.stages = [(heads.box_head, heads.box_predictor)]
        if isinstance(heads, CascadeROIHeads):
            self.stages = list(zip(heads.box_head, heads.box_predictor))

    @property
    def num_classes(self) -> int:
        return self.detector.roi_heads.num_classes

    def limits(self) -> dict[str, float]:
        predictor = self.stages[-1][1]
        return {
            "score_threshold": predictor.test_score_thresh, "nms_threshold": predictor.test_nms_thresh,
            "max_detections": predictor.test_topk_per_image,
        }  # fmt: skip

    def detect(self, features: Tensors, sizes: Tensor) -> Tensors:
        proposals, image = self._proposals(features, sizes)
        heads = self.detector.roi_heads
        maps = [features[name] for name in heads.box_in_features]
        boxes, scores = proposals, []
        for number, (head, predictor) in enumerate(self.stages):
            if number > 0:
                proposals = ops.clip(boxes, sizes[image])
            logits, deltas = predictor(head(ops.pool(heads.box_pooler, maps, proposals, image)))
            boxes = predictor.box2box_transform.apply_deltas(deltas, proposals)
            scores.append(logits.sigmoid() if predictor.use_sigmoid_ce else logits.softmax(dim=1))
        found = self._select(predictor, boxes, sum(scores) / len(scores), image, sizes)
        return {**found, **self._extras(features, found)}

    def _proposals(self, features: Tensors, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (P, 4) of all images and the image (P,) of each."""
        rpn = self.detector.proposal_generator
        maps = [features[name] for name in rpn.in_features]
        anchors = _anchors(rpn.anchor_generator, maps)
        levels = []
        for number, (cells, logits, deltas) in enumerate(zip(anchors, *rpn.rpn_head(maps))):
            per_place = rpn.anchor_generator.num_anchors[number]
            values, index = ops.best(ops.flat_map(logits, per_place).flatten(1), rpn.pre_nms_topk[False])
            moved = rpn.box2box_transform.apply_deltas(
                ops.take_rows(ops.flat_map(deltas, per_place), index).flatten(0, 1), cells[index].flatten(0, 1)
            )
            image = torch.arange(sizes.shape[0], device=index.device)[:, None].expand_as(index)
            levels.append((moved, values.flatten(), image.flatten(), torch.full_like(image, number).flatten()))
        boxes, scores, image, level = map(torch.cat, zip(*levels))
        boxes = ops.clip(boxes, sizes[image])
        solid = ((boxes[:, 2:] - boxes[:, :2]) > rpn.min_box_size).all(dim=1).nonzero()[:, 0]
        boxes, scores, image, level = boxes[solid], scores[solid], image[solid], level[solid]
        kept = ops.suppress(
            boxes, scores, image, level, sizes.shape[0], len(maps), rpn.nms_thresh, rpn.post_nms_topk[False]
        )
        return boxes[kept], image[kept]

    def _select(self, predictor: nn.Module, boxes: Tensor, scores: Tensor, image: Tensor, sizes: Tensor) -> Tensors:
        """Detections from boxes (P, 4 K) or (P, 4) and scores (P, K + 1), background last."""
        row, classes = (scores[:, : predictor.num_classes] > predictor.test_score_thresh).nonzero().unbind(1)
        scores, image = scores[row, classes], image[row]
        per_class = predictor.bbox_pred.out_features // 4
        boxes = boxes.reshape(-1, per_class, 4)[row, classes] if per_class > 1 else boxes[row]
        boxes = ops.clip(boxes, sizes[image])
        kept = ops.suppress(
            boxes, scores, image, classes, sizes.shape[0], predictor.num_classes, predictor.test_nms_thresh,
            predictor.test_topk_per_image,
        )  # fmt: skip
        return {"boxes": boxes[kept], "scores": scores[kept], "classes": classes[kept], "image": image[kept]}

    def _extras(self, features: Tensors, found: Tensors) -> Tensors:
        """Masks and keypoints of detections."""
        heads, extras = self.detector.roi_heads, {}
        boxes, image = found["boxes"], found["image"]
        if heads.mask_on:
            maps = [features[name] for name in heads.mask_in_features]
            logits = heads.mask_head.layers(ops.pool(heads.mask_pooler, maps, boxes, image))
            rows = torch.arange(boxes.shape[0], device=boxes.device)
            agnostic = heads.mask_head.predictor.out_channels == 1
            extras["masks"] = (logits[:, 0] if agnostic else logits[rows, found["classes"]]).sigmoid()
        if heads.keypoint_on:
            maps = [features[name] for name in heads.keypoint_in_features]
            logits = heads.keypoint_head.layers(ops.pool(heads.keypoint_pooler, maps, boxes, image))
            extras["keypoints"] = ops.keypoint_peaks(logits, boxes)
        return extras


@singledispatch
def detection_graph(detector: nn.Module) -> DetectionGraph:
    """The graph of a detector. Another kind is one subclass of :class:`DetectionGraph` and one ``register``.

    Raises:
        TypeError: of no known kind, or with a part that no graph knows; names it.
    """
    raise TypeError(
        f"a {type(detector).__name__} cannot be exported to ONNX; RetinaNet, FCOS, GFL, MEInst, R-CNNs and "
        "SemanticSegmentor can"
    )


for _kind in (RetinaNet, FCOS, GFL):
    detection_graph.register(_kind, DenseGraph)


@detection_graph.register
def _(detector: GeneralizedRCNN) -> DetectionGraph:
    heads, proposals = detector.roi_heads, detector.proposal_generator
    # Subclasses go other ways to their detections.
    if type(heads) not in (StandardROIHeads, CascadeROIHeads) or not isinstance(proposals, RPN):
        parts = f"{type(proposals).__name__} and {type(heads).__name__}"
        raise TypeError(f"an R-CNN of {parts} cannot be exported to ONNX; RPN with Standard- or CascadeROIHeads can")
    for task in ("mask", "keypoint"):
        if getattr(heads, f"{task}_on") and getattr(heads, f"{task}_pooler") is None:
            raise TypeError(f"an R-CNN without pooler of its {task} head (POOLER_TYPE '') cannot be exported to ONNX")
    return RCNNGraph(detector)
