"""Segmentors as functions of tensors alone, for tracing."""

from __future__ import annotations

import numpy as np
from detectron2.modeling import SemanticSegmentor
from torch import Tensor

from ..modeling.segmentation.adapter import count_classes
from . import graph_ops as ops
from .graph import DetectionGraph, detection_graph

# Largest difference of scores, relative to the largest score where that is above 1.
TOLERANCE = 1e-3


@detection_graph.register(SemanticSegmentor)
class SegmentorGraph(DetectionGraph):
    """A segmentor, with the inputs of :class:`DetectionGraph`.

    Its one output is "sem_seg": class scores (N, K, H, W) on the pixels of ``images``. As in the model, what lies
    around an image that is smaller than its slot has an influence on pooled maps.
    """

    def __init__(self, detector: SemanticSegmentor) -> None:
        super().__init__(detector, [])
        self.outputs = ["sem_seg"]

    @property
    def num_classes(self) -> int:
        return count_classes(self.detector)

    def limits(self) -> dict[str, float]:
        return {}

    def axes(self) -> dict[str, dict[int, str]]:
        return {"sem_seg": {0: "batch", 2: "height", 3: "width"}}

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        detector = self.detector
        divisibility = detector.backbone.size_divisibility
        x = ops.normalize(images, sizes, detector.pixel_mean, detector.pixel_std, divisibility)
        scores = detector.sem_seg_head(detector.backbone(x), None)[0]
        return (scores[:, :, : images.shape[1], : images.shape[2]],)


def check_scores(found: np.ndarray, wanted: list[Tensor]) -> None:
    """RuntimeError if scores (N, K, H, W) of a file differ from those of the model, (K, h, w) of each image."""
    for scores, theirs in zip(found, (x.numpy() for x in wanted)):
        apart = np.abs(scores[:, : theirs.shape[1], : theirs.shape[2]] - theirs).max()
        if not apart <= TOLERANCE * max(1.0, np.abs(theirs).max()):
            raise RuntimeError(
                f"scores of onnxruntime differ by {apart:.3g} from those of the model, which go up to "
                f"{np.abs(theirs).max():.3g}. The exported graph is wrong"
            )
