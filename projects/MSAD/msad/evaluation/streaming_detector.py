"""A detector on the frames of videos: detections and latency of every frame, or a whole sequence in real time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from torch import nn

from .streaming import Output, play


class FrameDetector:
    """From a frame to COCO results (category_id, bbox, score), timed as a user of the detector waits for them.

    The time covers resizing, the network, its post-processing and the mapping of classes, not reading the file.

    Args:
        cfg: of the model; frames are resized as at test time.
        model: in evaluation mode.
        categories: class of the model -> category id of the data set; None: such detections are dropped.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module, categories: Sequence[int | None]) -> None:
        self.model = model
        self.categories = categories
        self.format = cfg.INPUT.FORMAT
        self._device = torch.device(cfg.MODEL.DEVICE)
        self._resize = T.ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)

    def read(self, file: str) -> np.ndarray:
        """(h, w, 3) in the model's channel order."""
        return detection_utils.read_image(file, self.format)

    @torch.no_grad()
    def __call__(self, frame: np.ndarray) -> list[dict]:
        height, width = frame.shape[:2]
        resized = self._resize.get_transform(frame).apply_image(frame)
        image = torch.as_tensor(np.ascontiguousarray(resized.transpose(2, 0, 1)))
        output = self.model([{"image": image, "height": height, "width": width}])[0]["instances"]
        results = instances_to_coco_json(output.to("cpu"), 0)  # waits for a GPU
        kept = []
        for result in results:
            category = self.categories[result["category_id"]]
            if category is not None:
                bbox = [float(value) for value in result["bbox"]]
                kept.append({"category_id": category, "bbox": bbox, "score": float(result["score"])})
        return kept

    def timed(self, frame: np.ndarray) -> tuple[list[dict], float]:
        """Results and seconds."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        results = self(frame)
        return results, time.perf_counter() - start


def detect_frames(
    detector: FrameDetector, files: Sequence[str], on_frame: Callable[[], Any] = lambda: None
) -> tuple[list[list[dict]], list[float]]:
    """Detections and seconds of every frame, one after the other; the first frame is run once more for warming up."""
    detections, runtimes = [], []
    for number, file in enumerate(files):
        frame = detector.read(file)
        if number == 0:
            detector(frame)
        results, seconds = detector.timed(frame)
        detections.append(results)
        runtimes.append(seconds)
        on_frame()
    return detections, runtimes


def play_sequences(
    detector: FrameDetector,
    files: Sequence[Sequence[str]],
    rates: Sequence[float],
    *,
    stride: int = 1,
    dynamic: bool = False,
    on_sequence: Callable[[], Any] = lambda: None,
) -> tuple[list[list[Output]], list[list[list[dict]]]]:
    """Play every sequence in real time; its frames are loaded before its clock starts, one warms the detector up.

    Returns:
        outputs and detections of each sequence, see :func:`msad.evaluation.streaming.play`.
    """
    outputs, detections = [], []
    for names, fps in zip(files, rates, strict=True):
        frames = [detector.read(name) for name in names]
        detector(frames[0])
        made, found = play(frames, detector, fps, stride=stride, dynamic=dynamic)
        outputs.append(made)
        detections.append(found)
        on_sequence()
    return outputs, detections


def categories_of(number: int, ids: Sequence[int], coco_mapping: Sequence[int] | None) -> list[int | None]:
    """Category id of the data set for each class of a model.

    Args:
        number: classes of the model.
        ids: category ids of the data set, ascending.
        coco_mapping: the data set's ``coco_mapping``: position among ``ids`` of each of COCO's 80 classes, out of range
            for none.

    Raises:
        ValueError: the model has neither the classes of the data set nor COCO's, or the file has no mapping of them.
    """
    if number == len(ids):
        return list(ids)
    if coco_mapping is not None and number == len(coco_mapping):
        return [ids[position] if 0 <= position < len(ids) else None for position in coco_mapping]
    known = "" if coco_mapping is None else f" and maps {len(coco_mapping)} classes of COCO to them"
    raise ValueError(f"the model has {number} classes; the data set has {len(ids)}{known}")
