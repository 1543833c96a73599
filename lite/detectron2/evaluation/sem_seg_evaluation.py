"""Metrics of semantic segmentation: intersection over union and accuracy of classes."""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable

import cv2
import numpy as np
import pycocotools.mask as mask_util
import torch
from PIL import Image

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from .evaluator import DatasetEvaluator

__all__ = ["SemSegEvaluator", "load_image_into_numpy_array"]

BOUNDARY_WIDTH = 0.02  # of the diagonal of the image


def load_image_into_numpy_array(filename: str, dtype: np.dtype | str | None = None) -> np.ndarray:
    """The pixels of an image file as they are, of the given type."""
    with PathManager.open(filename, "rb") as f:
        return np.asarray(Image.open(f), dtype=dtype)


class SemSegEvaluator(DatasetEvaluator):
    """mIoU, frequency-weighted IoU and accuracies, 0 to 100, from one confusion matrix over all images.

    With less than 255 classes also the IoU of boundaries (Cheng et al., arXiv:2103.16562), computed as detectron2
    does: on what erosion takes from the map of class numbers.

    Args:
        dataset_name: a registered data set with ``sem_seg_file_name`` in its samples; its metadata have
            ``stuff_classes``, ``ignore_label`` and optionally ``stuff_dataset_id_to_contiguous_id``.
        distributed: sum over all processes; otherwise each evaluates its own images.
        output_dir: gets sem_seg_predictions.json (run lengths by class) and sem_seg_evaluation.pth.
        sem_seg_loading_fn: (file name, dtype=) -> labels (H, W).
        num_classes, ignore_label: deprecated; the metadata say them.
    """

    def __init__(
        self, dataset_name: str, distributed: bool = True, output_dir: str | None = None, *,
        sem_seg_loading_fn: Callable[..., np.ndarray] = load_image_into_numpy_array, num_classes: int | None = None,
        ignore_label: int | None = None,
    ) -> None:
        self._logger = logging.getLogger(__name__)
        for name, value in (("num_classes", num_classes), ("ignore_label", ignore_label)):
            if value is not None:
                self._logger.warning("SemSegEvaluator: %s is deprecated, the metadata have it.", name)
        self._distributed = distributed
        self._output_dir = output_dir
        self.sem_seg_loading_fn = sem_seg_loading_fn
        metadata = MetadataCatalog.get(dataset_name)
        contiguous = metadata.get("stuff_dataset_id_to_contiguous_id") or {}
        self._dataset_ids = {number: dataset_id for dataset_id, number in contiguous.items()}
        self._class_names = list(metadata.stuff_classes)
        self._num_classes = len(self._class_names)
        if num_classes is not None and num_classes != self._num_classes:
            raise AssertionError(f"SemSegEvaluator: num_classes is {num_classes}, metadata have {self._num_classes}")
        self._ignore_label = metadata.get("ignore_label") if ignore_label is None else ignore_label
        self._boundaries = self._num_classes < np.iinfo(np.uint8).max
        self.input_file_to_gt_file = {
            sample["file_name"]: sample["sem_seg_file_name"] for sample in DatasetCatalog.get(dataset_name)
        }
        self.reset()

    def reset(self) -> None:
        # [prediction, ground truth]; the last index is ignored ground truth.
        size = self._num_classes + 1
        self._conf_matrix = np.zeros((size, size), dtype=np.int64)
        self._b_conf_matrix = np.zeros((size, size), dtype=np.int64)
        self._predictions: list[dict] = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Take the predictions of a batch.

        Args:
            inputs: each with "file_name", as the data set has it.
            outputs: each with "sem_seg", scores (K, H, W) of the size of the labels.

        Raises:
            ValueError: a label that is neither a class nor to be ignored, or labels of another size.
        """
        for item, output in zip(inputs, outputs):
            predicted = output["sem_seg"].argmax(dim=0).cpu().numpy().astype(np.int64)
            file_name = self.input_file_to_gt_file[item["file_name"]]
            truth = np.array(self.sem_seg_loading_fn(file_name, dtype=int))
            if truth.shape != predicted.shape:
                raise ValueError(f"{file_name} has labels of {truth.shape}, but the prediction has {predicted.shape}")
            truth[truth == self._ignore_label] = self._num_classes
            if truth.size and not 0 <= truth.min() <= truth.max() <= self._num_classes:
                wrong = truth.max() if truth.max() > self._num_classes else truth.min()
                raise ValueError(
                    f"{file_name} has the label {wrong}; classes are 0 to {self._num_classes - 1}, "
                    f"ignored is {self._ignore_label}"
                )
            self._conf_matrix += self._confusion(predicted, truth)
            if self._boundaries:
                self._b_conf_matrix += self._confusion(_boundary(predicted), _boundary(truth))
            self._predictions.extend(self.encode_json_sem_seg(predicted, item["file_name"]))

    def _confusion(self, predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
        size = self._num_classes + 1
        pairs = size * predicted.astype(np.int64).ravel() + truth.ravel()
        return np.bincount(pairs, minlength=size * size).reshape(size, size)

    def evaluate(self) -> OrderedDict | None:
        """The metrics; NaN for classes without ground truth.

        Returns:
            {"sem_seg": {"mIoU", "fwIoU", "mACC", "pACC" and, for each class, "IoU-<name>", "ACC-<name>" and, if
            computed, "BoundaryIoU-<name>" and "min(IoU, B-Iou)-<name>"}}. None in processes other than the main one.
        """
        matrix, boundary = self._conf_matrix, self._b_conf_matrix
        if self._distributed:
            comm.synchronize()
            parts = comm.gather((matrix, boundary, self._predictions), dst=0)
            if not comm.is_main_process():
                return None
            matrix, boundary = sum(part[0] for part in parts), sum(part[1] for part in parts)
            self._predictions = list(itertools.chain.from_iterable(part[2] for part in parts))
        if self._output_dir:
            PathManager.mkdirs(self._output_dir)
            with PathManager.open(os.path.join(self._output_dir, "sem_seg_predictions.json"), "w") as f:
                json.dump(self._predictions, f)
        metrics = self._metrics(matrix, boundary)
        if self._output_dir:
            with PathManager.open(os.path.join(self._output_dir, "sem_seg_evaluation.pth"), "wb") as f:
                torch.save(metrics, f)
        results = OrderedDict({"sem_seg": metrics})
        self._logger.info(results)
        return results

    def _metrics(self, matrix: np.ndarray, boundary: np.ndarray) -> dict[str, float]:
        hits, truth, predicted = _counts(matrix)
        iou, accuracy = np.full(self._num_classes, np.nan), np.full(self._num_classes, np.nan)
        present = truth > 0
        iou[present] = 100 * hits[present] / (truth + predicted - hits)[present]
        accuracy[present] = 100 * hits[present] / truth[present]
        with np.errstate(invalid="ignore"):
            frequency = truth / truth.sum()
            overall = 100 * hits.sum() / truth.sum()
        count = present.sum()
        metrics = {
            "mIoU": iou[present].sum() / count if count else np.nan,
            "fwIoU": (iou[present] * frequency[present]).sum() if count else np.nan,
        }
        b_hits, b_truth, b_predicted = _counts(boundary)
        b_union = b_truth + b_predicted - b_hits
        for i, name in enumerate(self._class_names):
            metrics[f"IoU-{name}"] = iou[i]
            if self._boundaries:
                b_iou = 100 * b_hits[i] / b_union[i] if b_union[i] else np.nan
                metrics[f"BoundaryIoU-{name}"] = b_iou
                metrics[f"min(IoU, B-Iou)-{name}"] = np.minimum(iou[i], b_iou)
        metrics |= {"mACC": accuracy[present].sum() / count if count else np.nan, "pACC": overall}
        metrics |= {f"ACC-{name}": accuracy[i] for i, name in enumerate(self._class_names)}
        return metrics

    def encode_json_sem_seg(self, sem_seg: np.ndarray, input_file_name: str) -> list[dict]:
        """A label map as COCO's stuff format: a run-length mask for each class that occurs."""
        records = []
        for label in np.unique(sem_seg):
            mask = np.asfortranarray(sem_seg == label, dtype=np.uint8)
            encoded = mask_util.encode(mask)
            encoded["counts"] = encoded["counts"].decode("ascii")
            category = self._dataset_ids.get(int(label), int(label))
            records.append({"file_name": input_file_name, "category_id": category, "segmentation": encoded})
        return records


def _counts(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels of each class that are right, in the ground truth, and predicted where ground truth counts."""
    inner = matrix[:-1, :-1].astype(np.float64)
    return inner.diagonal(), inner.sum(axis=0), inner.sum(axis=1)


def _boundary(labels: np.ndarray) -> np.ndarray:
    """What an erosion by :data:`BOUNDARY_WIDTH` takes from a map of class numbers; outside of the image is 0."""
    height, width = labels.shape
    steps = max(1, round(BOUNDARY_WIDTH * float(np.hypot(height, width))))
    padded = np.pad(labels.astype(np.uint8), 1)
    eroded = cv2.erode(padded, np.ones((3, 3), dtype=np.uint8), iterations=steps)[1:-1, 1:-1]
    return labels.astype(np.uint8) - eroded
