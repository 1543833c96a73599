"""detectron2 evaluator of VisDrone-DET, and the challenge's result files."""

from __future__ import annotations

import itertools
import logging
import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Instances
from detectron2.utils import comm
from tabulate import tabulate

from ..data.visdrone import CLASSES, read_rows
from .visdrone import LIMITS, evaluate_classes, summarize

logger = logging.getLogger(__name__)


def to_rows(instances: Instances) -> np.ndarray:
    """(n, 8) rows of the result format, best first: left, top, width, height, score, category (1 to 10), -1, -1."""
    boxes = instances.pred_boxes.tensor.numpy().astype(np.float64)
    rows = np.full((len(boxes), 8), -1.0)
    rows[:, :2], rows[:, 2:4] = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    rows[:, 4] = instances.scores.numpy()
    rows[:, 5] = instances.pred_classes.numpy() + 1
    return rows[np.argsort(-rows[:, 4], kind="stable")]


def write_results(folder: str | os.PathLike, results: dict[str, np.ndarray]) -> None:
    """Write NAME.txt of each image in the challenge's result format.

    Args:
        results: image name (without suffix) -> (n, 8) rows, best first, as the challenge's tool expects them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in results.items():
        lines = [
            ",".join([*(f"{value:.2f}" for value in row[:4]), f"{row[4]:.6f}", *(f"{value:.0f}" for value in row[5:])])
            for row in rows
        ]
        (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))


def require_whole_images(dataset_name: str, records: list[dict]) -> None:
    """ValueError if dataset dicts show patches of images."""
    cut = next((record["image_id"] for record in records if "crop" in record), None)
    if cut is not None:
        raise ValueError(f"data set {dataset_name!r} has patches of images ({cut}, ...); test on whole images")


class VisDroneEvaluator(DatasetEvaluator):
    """AP and AR of VisDrone-DET (see :mod:`msad.evaluation.visdrone`) as the task "bbox".

    Set TEST.DETECTIONS_PER_IMAGE to 500 and a low score threshold: recall counts up to 500 detections an image.

    Args:
        dataset_name: registered as TYPE visdrone, whole images.
        output_dir: gets ``visdrone_results/NAME.txt``, the files to submit; None: nothing is written.
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None) -> None:
        self._name = dataset_name
        self._output_dir = output_dir
        self._records = DatasetCatalog.get(dataset_name)
        require_whole_images(dataset_name, self._records)
        self.reset()

    def reset(self) -> None:
        self._results: dict[str, np.ndarray] = {}

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        for item, output in zip(inputs, outputs):
            self._results[item["image_id"]] = to_rows(output["instances"].to("cpu"))

    def evaluate(self) -> OrderedDict | None:
        """{"bbox": metrics in percent}; empty if the data set has no annotations. None outside the main process."""
        gathered = comm.gather(self._results)
        if not comm.is_main_process():
            return None
        results = dict(itertools.chain.from_iterable(part.items() for part in gathered))
        if self._output_dir:
            write_results(Path(self._output_dir) / "visdrone_results", results)
        if any("annotation_file" not in record for record in self._records):
            logger.warning("Data set %r has no annotations: results are written and not evaluated", self._name)
            return OrderedDict()
        if max((len(rows) for rows in results.values()), default=0) == 100:
            logger.warning("At most 100 detections an image: AR500 needs TEST.DETECTIONS_PER_IMAGE 500")
        nothing = np.zeros((0, 8))
        classes = evaluate_classes(
            [read_rows(record["annotation_file"]) for record in self._records],
            [results.get(record["image_id"], nothing) for record in self._records],
            [(record["height"], record["width"]) for record in self._records],
        )
        metrics = summarize(classes)
        names = ["AP", "AP50", "AP75", *(f"AR{k}" for k in LIMITS)]
        rows = [
            ["classes by images (toolkit)", *(metrics[name] for name in names)],
            ["plain mean of classes", *(metrics[f"{name}_plain"] for name in names)],
        ]
        per_class = [[name, metrics[f"AP-{name}"], result.images] for name, result in zip(CLASSES, classes)]
        logger.info("VisDrone-DET on %r:\n%s", self._name, tabulate(rows, ["mean", *names], floatfmt=".3f"))
        logger.info("AP by class:\n%s", tabulate(per_class, ["class", "AP", "images"], floatfmt=".3f"))
        return OrderedDict(bbox=metrics)
