"""Accuracy against cost of trained models as they would be shipped: in torch, in onnxruntime, and as 8-bit integers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from torch import nn

from ..config_values import copy_with
from ..data.low_res import FILE, reads_low_res
from ..data.register import register_datasets
from ..engine.checkpoint import CheckedCheckpointer
from ..engine.predictor import is_segmentor
from ..engine.setup import evaluate
from ..evaluation.cost import count_macs
from .evaluate import evaluate_exported
from .onnx import FLOAT, INT8, export_onnx
from .quantize import quantize
from .runner import Detector, network_input


@dataclass
class Candidate:
    """A trained model at a test size: ``cfg`` has the size in INPUT, and the data in DATASETS.TEST."""

    name: str
    cfg: CfgNode
    weights: str


def measure(
    candidates: Sequence[Candidate], folder: Path, calibration: Sequence[Path] = (), threads: Sequence[int] = (1,),
    images: int = 10, rounds: int = 5,
) -> list[dict]:  # fmt: skip
    """Accuracy, multiply-adds and latency of every candidate in every engine.

    Args:
        folder: for the exported files, a folder a candidate.
        calibration: images for the integers; without any, they are left out.
        threads: numbers of threads that are timed.
        images: of the test data, on which is timed.
        rounds: passes over these images. All models take turns in each, so that other work on the machine hits all
            alike, and of each image the least time counts.

    Returns:
        dicts with "name", "engine", "AP" (of boxes, in percent), "gmacs" of one image (that of the first one's size),
        "milliseconds" by number of threads, from a resized image to detections inside it, mean over images, and
        "best": no other one of the same engine has a higher AP with as few milliseconds (at the first of ``threads``).

    Raises:
        ValueError: a model or its test data have no boxes; said before anything is exported.
    """
    for candidate in candidates:
        require_boxes(candidate)
    rows, calls = [], []
    for candidate in candidates:
        cfg, files = candidate.cfg, {}
        output = folder / candidate.name
        print(f"{candidate.name}: {export_onnx(cfg, candidate.weights, output)}")
        files["onnxruntime"] = output / FLOAT
        if calibration:
            files["int8"] = output / INT8
            quantize(files["onnxruntime"], calibration, files["int8"])
        cfg = copy_with(cfg, {"OUTPUT_DIR": str(output), "MODEL.DEVICE": "cpu"})
        model = build_model(cfg)
        CheckedCheckpointer(model).load_all(candidate.weights, f"the config of {candidate.name}")
        model.eval()
        name = cfg.DATASETS.TEST[0]
        small = _test_images(Detector(files["onnxruntime"]).about, name, images, reads_low_res(cfg))
        gmacs = count_macs(model, [_input(small[0])])["total"]
        accuracy = {"torch": evaluate(cfg, model)["bbox"]["AP"]}
        accuracy |= {engine: evaluate_exported(cfg, file)[name]["bbox"]["AP"] for engine, file in files.items()}
        for engine, ap in accuracy.items():
            ap = 0.0 if ap is None or math.isnan(ap) else float(ap)  # it has detected nothing
            row = {"name": candidate.name, "engine": engine, "AP": ap, "gmacs": gmacs, "milliseconds": {}}
            rows.append(row)
            calls += [(row, n, _caller(model, files.get(engine), n), small) for n in threads]
    _time(calls, rounds)
    for row in rows:
        row["best"] = not any(_beats(other, row, threads[0]) for other in rows)
    return rows


def require_boxes(candidate: Candidate) -> None:
    """ValueError if a model or its test data have no boxes, whose AP is measured."""
    register_datasets(candidate.cfg)
    name = candidate.cfg.DATASETS.TEST[0]
    if is_segmentor(candidate.cfg):
        raise ValueError(f"{candidate.name} is a segmentor; only the AP of boxes is measured")
    if not any(record.get("annotations") for record in DatasetCatalog.get(name)):
        raise ValueError(f"{candidate.name}: data set {name!r} has no annotated boxes, whose AP is measured")


def _test_images(about: dict, dataset: str, count: int, low_res: bool) -> list:
    """The first images of a data set, (h, w, 3) as the model is given them; ``low_res``: it reads LOW_RES_IMAGES."""
    records = DatasetCatalog.get(dataset)[:count]
    files = [record[FILE] if low_res and FILE in record else record["file_name"] for record in records]
    return [network_input(read_image(file, "BGR"), about) for file in files]


def _input(image) -> dict:
    return {"image": torch.from_numpy(image.transpose(2, 0, 1).copy())}


def _caller(model: nn.Module, file: Path | None, threads: int) -> Callable:
    """A function of a resized image that detects in it with this number of threads."""
    if file is not None:
        detector = Detector(file, threads)
        return lambda image: detector.run([image])

    @torch.no_grad()
    def call(image):
        torch.set_num_threads(threads)
        return model([_input(image)])

    return call


def _time(calls: list[tuple[dict, int, Callable, list]], rounds: int) -> None:
    """Fill in "milliseconds" of every row."""
    least = [[float("inf")] * len(images) for *_, images in calls]
    before = torch.get_num_threads()
    for _ in range(rounds):
        for times, (_, _, call, images) in zip(least, calls):
            for i, image in enumerate(images):
                start = time.perf_counter()
                call(image)
                times[i] = min(times[i], (time.perf_counter() - start) * 1e3)
    torch.set_num_threads(before)
    for times, (row, threads, _, _) in zip(least, calls):
        row["milliseconds"][str(threads)] = sum(times) / len(times)


def _beats(one: dict, other: dict, threads: int) -> bool:
    """Whether ``one`` is better in AP or time than ``other``, and worse in neither, in one engine."""
    if one["engine"] != other["engine"]:
        return False
    gain, saved = one["AP"] - other["AP"], other["milliseconds"][str(threads)] - one["milliseconds"][str(threads)]
    return gain >= 0 and saved >= 0 and (gain > 0 or saved > 0)
