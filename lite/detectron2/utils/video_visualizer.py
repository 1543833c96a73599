"""Detections on the frames of a video, with steady colors."""

from __future__ import annotations

from typing import Any

import numpy as np
from torchvision.ops import box_iou

from detectron2.structures import Instances

from .canvas import VisImage
from .colormap import random_color
from .visualizer import ColorMode, Visualizer

_MIN_IOU = 0.5
"""Overlap above which detections of one class in successive frames count as one object."""


class VideoVisualizer:
    """Draws predictions frame by frame; an object keeps its color as long as its boxes overlap."""

    def __init__(self, metadata: Any, instance_mode: ColorMode = ColorMode.IMAGE):
        """Arguments as for `Visualizer`."""
        self.metadata = metadata
        self._instance_mode = instance_mode
        self._previous: Instances | None = None
        self._colors: list[np.ndarray] = []

    def draw_instance_predictions(self, frame: np.ndarray, predictions: Instances) -> VisImage:
        """Draw the detections of the next frame, an RGB image (H, W, 3); they must have `pred_boxes`."""
        predictions = predictions.to("cpu")
        self._colors = self._match_colors(predictions)
        self._previous = predictions
        picture = _ColoredVisualizer(frame, self.metadata, instance_mode=self._instance_mode)
        picture.instance_colors = self._colors
        return picture.draw_instance_predictions(predictions)

    def draw_sem_seg(self, frame: np.ndarray, sem_seg: Any, area_threshold: int | None = None) -> VisImage:
        """Draw the label map (H, W) of a frame; see `Visualizer.draw_sem_seg`."""
        picture = Visualizer(frame, self.metadata, instance_mode=self._instance_mode)
        return picture.draw_sem_seg(sem_seg, area_threshold)

    def _match_colors(self, now: Instances) -> list[np.ndarray]:
        """Colors of the best matches in the previous frame; new ones for objects without match."""
        colors: list[np.ndarray | None] = [None] * len(now.pred_boxes)
        if self._previous is not None and len(now.pred_boxes) and len(self._colors):
            overlap = box_iou(now.pred_boxes.tensor, self._previous.pred_boxes.tensor).numpy()
            if now.has("pred_classes") and self._previous.has("pred_classes"):
                overlap *= (now.pred_classes[:, None] == self._previous.pred_classes).numpy()
            while overlap.max() > _MIN_IOU:
                new, old = np.unravel_index(overlap.argmax(), overlap.shape)
                colors[new] = self._colors[old]
                overlap[new], overlap[:, old] = 0, 0
        return [random_color(rgb=True, maximum=1) if color is None else color for color in colors]


class _ColoredVisualizer(Visualizer):
    """Draws instances in colors given beforehand."""

    instance_colors: list[np.ndarray]

    def _class_colors(self, classes, jittering):
        return self.instance_colors
