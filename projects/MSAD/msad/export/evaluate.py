"""Accuracy of an exported file on the data sets of a config, with the evaluators that trained models have."""

from __future__ import annotations

from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import inference_on_dataset
from detectron2.structures import Boxes, Instances

from ..data.low_res import FILE, reads_low_res
from ..data.names import class_names
from ..data.register import register_datasets
from ..engine.trainer import DistillTrainer
from ..files import finite
from .onnx import RUNNER
from .runner import Detector, read_image


class ExportedModel:
    """A file of :func:`export_onnx` with the interface of detectron2's models in evaluation: a list of dataset dicts
    with ``file_name`` -> a list of {"instances"}, or of segmentors {"sem_seg"}, in pixels of the images.

    Args:
        low_res: read the file of LOW_RES_IMAGES where a dict has one; results are in the frame of the dict's height
            and width all the same.
    """

    def __init__(self, file: str | Path, threads: int = 0, low_res: bool = False) -> None:
        self.detector = Detector(file, threads)
        self.low_res = low_res

    def __call__(self, inputs: list[dict]) -> list[dict]:
        files = [item[FILE] if self.low_res and FILE in item else item["file_name"] for item in inputs]
        images = [read_image(Path(file)) for file in files]
        for file, image in zip(files, images):
            if image is None:
                raise ValueError(f"{file}: {RUNNER} cannot read it (absent, no image, or cut off)")
        sizes = [(x.get("height", len(image)), x.get("width", image.shape[1])) for x, image in zip(inputs, images)]
        found = self.detector(images, sizes)
        if "sem_seg" in self.detector.outputs:
            return [{"sem_seg": label_scores(one, len(self.detector.about["classes"]))} for one in found]
        return [{"instances": instances(*pair)} for pair in zip(found, sizes)]


def instances(found: dict, size: tuple[int, int]) -> Instances:
    """Detections of the runner in an image of this height and width as detectron2 gives them."""
    result = Instances(size)
    result.pred_boxes = Boxes(torch.from_numpy(found["boxes"]))
    result.scores, result.pred_classes = torch.from_numpy(found["scores"]), torch.from_numpy(found["classes"])
    for name in ("masks", "keypoints"):
        if name in found:
            result.set(f"pred_{name}", torch.from_numpy(found[name]))
    return result


def label_scores(found: dict, classes: int) -> torch.Tensor:
    """Of a segmentor's detections, masks of the classes that occur: (classes, h, w), 1 for the class of a pixel."""
    scores = torch.zeros(classes, *found["masks"].shape[1:])
    scores[torch.from_numpy(found["classes"])] = torch.from_numpy(found["masks"]).float()
    return scores


def evaluate_exported(cfg: CfgNode, file: str | Path, threads: int = 0) -> dict[str, dict]:
    """Results of every data set of DATASETS.TEST: {data set: {task: {metric: value}}}; without ground truth None.

    The images are read and resized by the code that is shipped with the file, not by the config's INPUT.

    Raises:
        ValueError: DATASETS.TEST is empty, or the file does not have the classes of a data set.
    """
    register_datasets(cfg)
    if not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TEST is empty: on what is the model to be evaluated?")
    model, results = ExportedModel(file, threads, reads_low_res(cfg)), {}
    for name in cfg.DATASETS.TEST:
        records = DatasetCatalog.get(name)
        classes, known = model.detector.about["classes"], class_names(MetadataCatalog.get(name))
        unnamed = classes == [str(number) for number in range(len(known))]
        if known and classes != known and not unnamed:
            raise ValueError(f"{file} has the classes {', '.join(classes)}, but {name} has {', '.join(known)}")
        evaluator = DistillTrainer.build_evaluator(cfg, name)
        found = inference_on_dataset(model, [[record] for record in records], evaluator)
        results[name] = {task: {k: finite(v) for k, v in values.items()} for task, values in found.items()}
    return results
