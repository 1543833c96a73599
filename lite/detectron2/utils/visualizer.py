"""Pictures of annotations and detections."""

from __future__ import annotations

import random
from collections.abc import Sequence
from enum import Enum
from typing import Any

import cv2
import matplotlib.colors as mplc
import numpy as np
import torch

from detectron2.data.catalog import Metadata
from detectron2.data.image_io import read_image
from detectron2.structures import BitMasks, BoxMode, PolygonMasks

from . import canvas as draw
from .canvas import VisImage
from .colormap import colormap
from .drawing import Drawing, to_array
from .generic_mask import GenericMask

__all__ = ["ColorMode", "GenericMask", "VisImage", "Visualizer"]


class ColorMode(Enum):
    """How predictions are colored."""

    IMAGE = 0
    """Every instance has its own color."""
    SEGMENTATION = 1
    """Instances of one class have similar colors, from the metadata's `thing_colors` where it has them."""
    IMAGE_BW = 2
    """As IMAGE, on a picture that is gray outside the masks."""


_OFF_WHITE = (1.0, 1.0, 240 / 255)
_MASK_OPACITY = {ColorMode.IMAGE: 0.5, ColorMode.SEGMENTATION: 0.7, ColorMode.IMAGE_BW: 0.3}


class Visualizer(Drawing):
    """Draws annotations and detections over an image; see `Drawing` for coordinates and colors."""

    def __init__(
        self,
        img_rgb: np.ndarray,
        metadata: Any = None,
        scale: float = 1.0,
        instance_mode: ColorMode = ColorMode.IMAGE,
        font_size_scale: float = 1.0,
    ):
        """
        Args:
            img_rgb: RGB (H, W, 3), values in [0, 255].
            metadata: the data set's Metadata, or anything with some of its attributes `thing_classes`,
                `thing_colors`, `stuff_classes`, `stuff_colors`, `keypoint_names` and `keypoint_connection_rules`.
                Default: an empty Metadata.
            scale: pixels of the picture per pixel of the image.
            instance_mode: how predictions are colored.
            font_size_scale: factor for the size of labels, which otherwise follows that of the image.
        """
        super().__init__(img_rgb, scale, font_size_scale)
        self.metadata = Metadata() if metadata is None else metadata
        self.keypoint_threshold = 0.05
        self._instance_mode = instance_mode

    def draw_instance_predictions(self, predictions: Any, jittering: bool = True) -> VisImage:
        """Draw a model's detections.

        Args:
            predictions: Instances with any of `pred_boxes`, `scores`, `pred_classes`, `pred_masks` and
                `pred_keypoints`.
            jittering: with ColorMode.SEGMENTATION, vary the class color from instance to instance.
        """

        def field(name: str) -> Any:
            return predictions.get(name) if predictions.has(name) else None

        masks, classes = field("pred_masks"), field("pred_classes")
        if masks is not None:
            masks = self._convert_masks(masks)
        classes = None if classes is None else np.asarray(classes).tolist()
        if self._instance_mode == ColorMode.IMAGE_BW:
            self.output.reset_image(self._gray_outside(masks or []))
        return self.overlay_instances(
            boxes=field("pred_boxes"),
            labels=_create_text_labels(classes, field("scores"), self._meta("thing_classes")),
            masks=masks,
            keypoints=field("pred_keypoints"),
            assigned_colors=self._class_colors(classes, jittering),
            alpha=_MASK_OPACITY[self._instance_mode],
        )

    def draw_sem_seg(
        self,
        sem_seg: Any,
        area_threshold: int | None = None,
        alpha: float = 0.8,
        draw_text: bool = True,
        edge_color: Any = _OFF_WHITE,
    ) -> VisImage:
        """Fill the classes of a label map, the largest first, and write their names.

        Args:
            sem_seg: (H, W), the class of each pixel. Labels that `stuff_classes` does not have are left out.
            area_threshold: connected parts of fewer pixels are left out.
            alpha: opacity.
            edge_color: color of the outlines.
        """
        sem_seg, names, colors = to_array(sem_seg), self._meta("stuff_classes"), self._meta("stuff_colors")
        known = [label for label in np.unique(sem_seg).tolist() if 0 <= label < (len(names) if names else np.inf)]
        masks = {label: _large_parts(sem_seg == label, area_threshold or 1) for label in known}
        drawn = sorted((label for label in known if masks[label].any()), key=lambda label: -masks[label].sum())
        palette = np.asarray(colors) / 255 if colors else colormap(rgb=True, maximum=1)
        for label in drawn:
            color = palette[label % len(palette)]
            self.draw_binary_mask(masks[label], color, edge_color=edge_color, alpha=alpha, area_threshold=0)
        for label in drawn if draw_text else ():
            place = _middle_of_largest_part(masks[label])
            self.draw_text(names[label] if names else str(label), place, color=palette[label % len(palette)])
        return self.output

    def draw_dataset_dict(self, dic: dict) -> VisImage:
        """Draw annotations and label map ("sem_seg", "sem_seg_file_name") of an image in the data-set format."""
        if dic.get("annotations"):
            self._draw_annotations(dic["annotations"])
        labels = dic.get("sem_seg")
        if labels is None and "sem_seg_file_name" in dic:
            labels = read_image(dic["sem_seg_file_name"])
        return self.output if labels is None else self.draw_sem_seg(labels, area_threshold=0, alpha=0.5)

    def _draw_annotations(self, annotations: list[dict]) -> None:
        classes = [a.get("category_id", 0) for a in annotations]
        masks = keypoints = None
        if any("segmentation" in a for a in annotations):
            masks = [a.get("segmentation") or [] for a in annotations]
        if any("keypoints" in a for a in annotations):
            flat = [a.get("keypoints", ()) for a in annotations]
            # Instances without keypoints get keypoints that are not labeled.
            keypoints = np.zeros((len(flat), max(map(len, flat)) // 3, 3))
            for row, values in zip(keypoints, flat):
                row.flat[: len(values)] = values
        crowd = [a.get("iscrowd", 0) for a in annotations]
        self.overlay_instances(
            boxes=[BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations],
            labels=_create_text_labels(classes, None, self._meta("thing_classes"), crowd),
            masks=masks,
            keypoints=keypoints,
            assigned_colors=self._class_colors(classes, jittering=True),
        )

    def overlay_instances(
        self,
        *,
        boxes: Any = None,
        labels: Sequence[str] | None = None,
        masks: Any = None,
        keypoints: Any = None,
        assigned_colors: Sequence[Any] | None = None,
        alpha: float = 0.5,
    ) -> VisImage:
        """Draw instances, the largest first, and their labels on top of all.

        Args:
            boxes: Boxes, or (N, 4) corners as array, tensor or list.
            labels: N texts.
            masks: PolygonMasks, BitMasks, or N masks as GenericMask takes them.
            keypoints: Keypoints, or (N, K, 3): x, y and visibility or probability.
            assigned_colors: N colors; by default those of the palette in turn.
            alpha: opacity of the masks.
        """
        boxes = None if boxes is None else to_array(boxes).reshape(-1, 4)
        masks = None if masks is None else self._convert_masks(masks)
        keypoints = None if keypoints is None else to_array(keypoints)
        names = ("boxes", "labels", "masks", "keypoints", "colors")
        given = zip(names, (boxes, labels, masks, keypoints, assigned_colors))
        counts = {name: len(value) for name, value in given if value is not None}
        if len(set(counts.values())) > 1:
            raise ValueError(f"Instances to draw differ in number: {counts}")
        total = next(iter(counts.values()), 0)
        if assigned_colors is None:
            palette = colormap(rgb=True, maximum=1)
            assigned_colors = [palette[i % len(palette)] for i in range(total)]

        order = _largest_first(boxes, masks, total)
        colors = [mplc.to_rgb(color) for color in assigned_colors]
        for i in order:
            if masks is not None:
                self._draw_mask(masks[i], colors[i], colors[i], alpha)
            if boxes is not None:
                self.draw_box(boxes[i], alpha=0.9, edge_color=colors[i])
        for points in keypoints if keypoints is not None else ():
            self.draw_and_connect_keypoints(points)
        if labels is not None and (boxes is not None or masks is not None):
            taken: list[draw.Window] = []
            for i in order:
                place = boxes[i] if boxes is not None else masks[i].bbox()
                self._draw_label(labels[i], place, colors[i], taken)
        return self.output

    def draw_and_connect_keypoints(self, keypoints: Any) -> VisImage:
        """Draw the keypoints (K, 3) of one instance whose third number exceeds `keypoint_threshold`, and
        the lines between them that the metadata's connection rules name."""
        points = to_array(keypoints)
        shown = points[:, 2] > self.keypoint_threshold
        names = self._meta("keypoint_names") or ()
        where = {name: points[k, :2] for k, name in enumerate(names) if shown[k]}
        for start, end, color in self._meta("keypoint_connection_rules") or ():
            if start in where and end in where:
                xs, ys = np.stack([where[start], where[end]], axis=1)
                self.draw_line(xs, ys, tuple(c / 255.0 for c in color), linewidth=2 * self._line_width)
        for x, y in points[shown, :2]:
            self.draw_circle((x, y), "w", radius=2.5 * self._line_width)
            self.draw_circle((x, y), "r", radius=1.7 * self._line_width)
        return self.output

    def _meta(self, name: str) -> Any:
        """An attribute of the metadata, or None."""
        return getattr(self.metadata, name, None)

    def _class_colors(self, classes: Sequence[int] | None, jittering: bool) -> list[draw.Color] | None:
        """Colors by class, where the mode and the metadata have them."""
        palette = self._meta("thing_colors")
        if self._instance_mode != ColorMode.SEGMENTATION or not palette or classes is None:
            return None
        colors = [tuple(channel / 255 for channel in palette[c]) for c in classes]
        return [_jitter(c) for c in colors] if jittering else colors

    def _gray_outside(self, masks: list[GenericMask]) -> np.ndarray:
        """The image, gray where no mask is."""
        gray = cv2.cvtColor(self.img, cv2.COLOR_RGB2GRAY)
        picture = np.repeat(gray[:, :, None], 3, axis=2)
        for mask in masks:
            inside = mask.mask > 0
            picture[inside] = self.img[inside]
        return picture

    def _convert_masks(self, masks: Any) -> list[GenericMask]:
        """Masks in any form as a list."""
        if isinstance(masks, PolygonMasks):
            masks = masks.polygons
        elif isinstance(masks, (BitMasks, torch.Tensor)):
            masks = to_array(masks)
        size = (self.output.height, self.output.width)
        return [m if isinstance(m, GenericMask) else GenericMask(m, *size) for m in masks]


def _create_text_labels(
    classes: Sequence[int] | None,
    scores: Any,
    class_names: Sequence[str] | None,
    is_crowd: Sequence[int] | None = None,
) -> list[str] | None:
    """One text an instance, such as "dog 87%" or "person|crowd"; None if nothing is known."""
    if classes is None and scores is None:
        return None
    parts: list[list[str]] = []
    if classes is not None:
        parts.append([class_names[c] if class_names else str(c) for c in np.asarray(classes).tolist()])
    if scores is not None:
        parts.append([f"{score:.0%}" for score in to_array(scores).tolist()])
    labels = [" ".join(words) for words in zip(*parts)]
    if is_crowd is not None:
        labels = [f"{label}|crowd" if crowd else label for label, crowd in zip(labels, is_crowd)]
    return labels


def _largest_first(boxes: np.ndarray | None, masks: list[GenericMask] | None, total: int) -> list[int]:
    """The order of drawing: by falling area, so that small instances stay visible."""
    if boxes is not None:
        areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    elif masks is not None:
        areas = np.asarray([m.area() for m in masks])
    else:
        areas = np.zeros(total)
    return np.argsort(-areas, kind="stable").tolist()


def _large_parts(mask: np.ndarray, area: int) -> np.ndarray:
    """A bitmap (H, W) without its connected parts of fewer than `area` pixels."""
    _, parts, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    return mask & (stats[:, cv2.CC_STAT_AREA] >= area)[parts]


def _middle_of_largest_part(mask: np.ndarray) -> tuple[float, float]:
    """x and y in the middle (median) of the largest connected part of a bitmap (H, W)."""
    _, parts, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    ys, xs = np.nonzero(parts == 1 + stats[1:, cv2.CC_STAT_AREA].argmax())
    return float(np.median(xs)), float(np.median(ys))


def _jitter(color: draw.Color) -> draw.Color:
    """A color near the given one."""
    return tuple(min(max(channel + random.uniform(-0.15, 0.15), 0.0), 1.0) for channel in color)
