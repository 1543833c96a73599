"""Validation images with what the models of a comparison find in them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from detectron2.structures import Instances

from ..config_values import copy_with
from ..data.low_res import FILE, reads_low_res
from ..data.register import registered
from ..data.sampling import at_equal_distances
from ..data.sem_seg import is_segmentation
from ..engine.predictor import predict_low_res
from ..visualization import LabelMap, Panel, save_panels
from .gallery import write_gallery
from .report import PANELS


def load_predictor(cfg: CfgNode, weights: Path) -> DefaultPredictor:
    """What a trained model finds in an image, in pixels of that image."""
    return DefaultPredictor(copy_with(cfg, {"MODEL.WEIGHTS": str(weights)}))


def _found(predictor: DefaultPredictor, record: dict, image: np.ndarray) -> dict:
    """In pixels of the BGR ``image`` of a dataset dict, whose LOW_RES_IMAGES are what a student with such sees."""
    low = FILE in record and reads_low_res(predictor.cfg)
    return predict_low_res(predictor, record) if low else predictor(image)


def draw_pictures(out_dir: Path, models: Mapping[str, tuple[CfgNode, Path]], roles: Mapping[str, str]) -> None:
    """Write panels.jpg, a few validation images, and the gallery of more of them, for :func:`write_report`.

    Args:
        models: name -> config and weights of all models; the images are those that the first is tested on.
        roles: of the gallery -> the name of the model that has it; those that are none of ``models`` are left out.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    cfg = next(iter(models.values()))[0]
    predictors = {role: load_predictor(*models[name]) for role, name in roles.items() if name in models}
    draw_panels(cfg, out_dir / PANELS, {roles[role]: predictor for role, predictor in predictors.items()})

    def detect(predictor: DefaultPredictor, record: dict, image: np.ndarray) -> Instances:
        return _found(predictor, record, image)["instances"]

    columns = {role: (roles[role], partial(detect, predictor)) for role, predictor in predictors.items()}
    with registered(cfg):
        test = cfg.DATASETS.TEST[0]
        write_gallery(out_dir, DatasetCatalog.get(test), MetadataCatalog.get(test), columns)


def draw_panels(cfg: CfgNode, path: Path, predictors: Mapping[str, DefaultPredictor], count: int = 4) -> None:
    """Write a picture: a row an image, the ground truth and then a column a model.

    Args:
        cfg: whose first test data set has the images.
        predictors: by title.
        count: of images, at equal distances in the data set.
    """
    with registered(cfg):
        records, metadata = DatasetCatalog.get(cfg.DATASETS.TEST[0]), MetadataCatalog.get(cfg.DATASETS.TEST[0])
        panels = []
        for record in at_equal_distances(records, count):
            image = read_image(record["file_name"], "BGR")
            truth = record
            if is_segmentation(records):
                truth = LabelMap.read(record["sem_seg_file_name"], metadata.ignore_label)
            columns = {"ground truth": truth}
            columns |= {title: _found(predictor, record, image) for title, predictor in predictors.items()}
            panels.append(Panel(image[:, :, ::-1], columns, Path(record["file_name"]).name))
        save_panels(path, panels, metadata, threshold=0.5)
