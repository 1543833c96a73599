"""Validation images with what the models of a comparison find in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor

from ..data.low_res import FILE, reads_low_res
from ..data.register import registered
from ..data.sampling import at_equal_distances
from ..data.sem_seg import is_segmentation
from ..engine.predictor import predict_low_res
from ..visualization import LabelMap, Panel, save_panels
from .comparison import Comparison
from .jobs import Run


def load_predictors(study: Comparison, names: Iterable[str]) -> dict[str, DefaultPredictor]:
    """Of those of ``names`` that are finished variants, trained with the study's first seed, by name."""
    predictors = {}
    for name in names:
        if name in study.finished():
            run = Run(name, study.seeds[0])
            cfg = study.config(run).clone()
            cfg.defrost()
            cfg.MODEL.WEIGHTS = str(study.weights(run))
            predictors[name] = DefaultPredictor(cfg)
    return predictors


def draw_panels(
    study: Comparison, path: Path, predictors: Mapping[str, DefaultPredictor], count: int = 4, threshold: float = 0.5
) -> None:
    """Write a picture: a row an image, the ground truth and then a column a model.

    Args:
        predictors: by title; those of students with LOW_RES_IMAGES see these, and the picture shows the H image.
        count: of images, at equal distances in the data set that the first finished variant is tested on.
        threshold: least score of the detections that are shown.
    """
    cfg = study.config(Run(study.finished()[0], study.seeds[0]))
    with registered(cfg):
        records, metadata = DatasetCatalog.get(cfg.DATASETS.TEST[0]), MetadataCatalog.get(cfg.DATASETS.TEST[0])
        panels = []
        for record in at_equal_distances(records, count):
            image = read_image(record["file_name"], "BGR")
            truth = record
            if is_segmentation(records):
                truth = LabelMap.read(record["sem_seg_file_name"], metadata.ignore_label)
            columns = {"ground truth": truth}
            for title, predict in predictors.items():
                low = FILE in record and reads_low_res(predict.cfg)
                columns[title] = predict_low_res(predict, record) if low else predict(image)
            panels.append(Panel(image[:, :, ::-1], columns, Path(record["file_name"]).name))
        save_panels(path, panels, metadata, threshold=threshold)
