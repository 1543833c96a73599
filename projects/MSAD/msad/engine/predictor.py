"""Trained models and annotations that pictures are made from: checked weights, names of classes, ground truth."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.engine import DefaultPredictor

from ..config import load_config
from ..data.low_res import LowResOnly
from ..data.mappers import inference_mapper
from ..data.names import class_names, read_names
from ..data.register import register_datasets
from .checkpoint import CheckedCheckpointer


def load_predictor(config_file: str, weights: str, device: str | None, opts: list[str]) -> DefaultPredictor:
    """detectron2's predictor with all of its weights: BGR uint8 image (H, W, 3) -> {"instances": ...} or
    {"sem_seg": ...} in its pixels.

    Raises:
        FileNotFoundError: config or weights.
        ValueError, KeyError: wrong config, or weights of another model.
    """
    cfg = load_config(config_file, opts)
    register_datasets(cfg)
    if device or (cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available()):
        cfg.MODEL.DEVICE = device or "cpu"
    cfg.MODEL.WEIGHTS = ""  # loaded below, with a check that they fit
    predictor = DefaultPredictor(cfg)
    CheckedCheckpointer(predictor.model).load_all(weights, config_file)
    return predictor


def predict_low_res(predictor: DefaultPredictor, record: dict) -> dict:
    """What a model finds in the file of LOW_RES_IMAGES of a dataset dict, in pixels of the dict's own image.

    OSError if the file cannot be read.
    """
    item = LowResOnly(inference_mapper(predictor.cfg))(record)
    with torch.no_grad():
        return predictor.model([item])[0]


def is_segmentor(cfg: CfgNode) -> bool:
    """Whether the model of a config gives a class for every pixel."""
    return cfg.MODEL.META_ARCHITECTURE == "SemanticSegmentor"


class GroundTruth:
    """Annotations by image file.

    Args:
        source: a COCO file, or a folder of label maps with the names of the images.
        segmentation: the masks of a COCO file are taken as label maps.
    """

    def __init__(self, source: str, segmentation: bool = False) -> None:
        source = os.path.abspath(source)
        self.folder = Path(source) if os.path.isdir(source) else None
        self._records: dict[str, list[dict]] = {}
        if self.folder:
            if not segmentation:
                raise ValueError(f"--ground-truth {source} is a folder of label maps, but the model is no segmentor")
            self.metadata = MetadataCatalog.get("unnamed classes")
            return
        if not os.path.isfile(source):
            raise FileNotFoundError(f"--ground-truth: no such file: {source}")
        name = f"ground truth {'masks ' * segmentation}{source}"
        entry = {"NAME": name, "JSON": source, "IMAGES": os.path.dirname(source)}
        entry["TYPE"] = "coco_sem_seg" if segmentation else "coco"
        register_datasets(CfgNode({"DATASETS": {"REGISTER": [entry]}}))
        for record in DatasetCatalog.get(name):
            self._records.setdefault(os.path.basename(record["file_name"]), []).append(record)
        self.metadata = MetadataCatalog.get(name)

    def find(self, path: Path) -> dict | None:
        """The dataset dict of the image: of several with its file name, that whose folders agree furthest."""
        if self.folder:
            labels = self.folder / f"{path.stem}.png"
            return {"file_name": str(path), "sem_seg_file_name": str(labels)} if labels.is_file() else None
        records = self._records.get(path.name, [])
        return max(records, key=lambda record: _common_tail(path.absolute(), Path(record["file_name"])), default=None)


def _common_tail(a: Path, b: Path) -> int:
    return next((i for i, (x, y) in enumerate(zip(reversed(a.parts), reversed(b.parts))) if x != y), len(a.parts))


def class_metadata(cfg: CfgNode, ground_truth: GroundTruth | None, config_file: str = "") -> Metadata:
    """Class and keypoint names: of the export or of the first test data set, else of the ground truth, else none.

    Raises:
        ValueError: those of the ground truth are others than the model's.
    """
    model = _model_metadata(cfg, config_file)
    if ground_truth is None or ground_truth.folder:
        return model
    ours, theirs = class_names(model), class_names(ground_truth.metadata)
    if is_segmentor(cfg):  # an annotation file has no name for the background
        ours, theirs = ours[1:], theirs[1:]
    if ours and ours != theirs:
        raise ValueError(
            f"--ground-truth has other classes than the model: {', '.join(theirs)}; the model's are {', '.join(ours)}"
        )
    return model if ours and is_segmentor(cfg) else ground_truth.metadata


def _model_metadata(cfg: CfgNode, config_file: str) -> Metadata:
    if names := read_names(config_file):
        return Metadata(name=f"metadata beside {config_file}", **names)
    for name in cfg.DATASETS.TEST[:1]:
        if name not in DatasetCatalog.list():
            continue
        if not class_names(MetadataCatalog.get(name)):
            try:
                DatasetCatalog.get(name)  # its file knows the names
            except FileNotFoundError as error:
                print(f"classes are shown by their indices: {error}", file=sys.stderr)
                continue
        return MetadataCatalog.get(name)
    return MetadataCatalog.get("unnamed classes")
