"""Samples of registered data sets, joined and filtered for training or testing."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Sequence

import numpy as np
import torch.utils.data as torchdata
from tabulate import tabulate
from termcolor import colored

from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import log_first_n

from .catalog import DatasetCatalog, MetadataCatalog, check_metadata_consistency

logger = logging.getLogger(__name__)

_HISTOGRAM_COLUMNS = 3
_HISTOGRAM_NAME_LENGTH = 13


def filter_images_with_only_crowd_annotations(dataset_dicts: list[dict]) -> list[dict]:
    """The samples that have at least one annotation which is not a crowd region."""
    usable = [sample for sample in dataset_dicts if any(not a.get("iscrowd", 0) for a in sample["annotations"])]
    removed = len(dataset_dicts) - len(usable)
    logger.info("Removed %d images without usable annotations, %d images left.", removed, len(usable))
    return usable


def filter_images_with_few_keypoints(dataset_dicts: list[dict], min_keypoints_per_image: int) -> list[dict]:
    """The samples with at least so many labelled keypoints, over all instances."""

    def labelled(sample: dict) -> int:
        visibilities = (anno["keypoints"][2::3] for anno in sample["annotations"] if "keypoints" in anno)
        return sum(int(np.count_nonzero(np.asarray(v) > 0)) for v in visibilities)

    usable = [sample for sample in dataset_dicts if labelled(sample) >= min_keypoints_per_image]
    logger.info(
        "Removed %d images with fewer than %d keypoints.", len(dataset_dicts) - len(usable), min_keypoints_per_image
    )
    return usable


def load_proposals_into_dataset(dataset_dicts: list[dict], proposal_file: str) -> list[dict]:
    """Add precomputed proposals to samples.

    Args:
        dataset_dicts: samples with "image_id"; changed in place.
        proposal_file: pickle of a dict with "ids", "boxes" (an ``N x 4`` array for each image),
            "objectness_logits" (N numbers for each) and optionally "bbox_mode" (XYXY_ABS by default).
            Detectron's "indexes" and "scores" are understood, too.
    """
    logger.info("Loading proposals from %s", proposal_file)
    with PathManager.open(proposal_file, "rb") as stream:
        content = pickle.load(stream, encoding="latin1")
    ids = content["ids" if "ids" in content else "indexes"]
    logits = content["objectness_logits" if "objectness_logits" in content else "scores"]
    mode = BoxMode(content.get("bbox_mode", BoxMode.XYXY_ABS))
    row_of = {str(image_id): row for row, image_id in enumerate(ids)}
    for sample in dataset_dicts:
        if str(sample["image_id"]) not in row_of:
            raise KeyError(f"{proposal_file} has no proposals for image {sample['image_id']}.")
        row = row_of[str(sample["image_id"])]
        best_first = np.argsort(logits[row])[::-1]
        sample["proposal_boxes"] = content["boxes"][row][best_first]
        sample["proposal_objectness_logits"] = logits[row][best_first]
        sample["proposal_bbox_mode"] = mode
    return dataset_dicts


def print_instances_class_histogram(dataset_dicts: list[dict], class_names: list[str]) -> None:
    """Log how many instances each class has; crowd regions do not count.

    Raises:
        AssertionError: an annotation has a class id outside ``range(len(class_names))``.
    """
    counts = np.zeros(len(class_names), dtype=int)
    for sample in dataset_dicts:
        for anno in sample["annotations"]:
            category = anno["category_id"]
            if not 0 <= category < len(class_names):
                raise AssertionError(
                    f"{sample.get('file_name', 'A sample')} has category_id={category}, but there are only "
                    f"{len(class_names)} classes."
                )
            counts[category] += not anno.get("iscrowd", 0)
    limit = _HISTOGRAM_NAME_LENGTH
    cells = []
    for name, count in zip(class_names, counts, strict=True):
        cells += [name if len(name) <= limit else name[: limit - 2] + "..", int(count)]
    row_length = 2 * min(_HISTOGRAM_COLUMNS, len(class_names))
    rows = [cells[start : start + row_length] for start in range(0, len(cells), row_length)]
    if len(class_names) > 1:
        rows += [[], ["total", int(counts.sum())]]
    style = {"tablefmt": "pipe", "numalign": "left", "stralign": "center"}
    table = tabulate(rows, headers=["category", "#instances"] * (row_length // 2), **style)
    message = f"Instances of the {len(class_names)} categories:\n{colored(table, 'cyan')}"
    log_first_n(logging.INFO, message, key="message")


def get_detection_dataset_dicts(
    names: str | Sequence[str],
    filter_empty: bool = True,
    min_keypoints: int = 0,
    proposal_files: Sequence[str] | None = None,
    check_consistency: bool = True,
) -> list[dict]:
    """Load registered data sets and join them.

    Args:
        names: one name or several.
        filter_empty: drop images without annotations other than crowd regions.
        min_keypoints: drop images with fewer labelled keypoints.
        proposal_files: a file of precomputed proposals for each name.
        check_consistency: require that all data sets have the same ``thing_classes``.

    Raises:
        AssertionError: no name was given, a data set is empty, or no image survives the filters.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise AssertionError("No data set was named; check DATASETS.TRAIN and DATASETS.TEST.")
    parts = [DatasetCatalog.get(name) for name in names]
    if isinstance(parts[0], torchdata.Dataset):
        return torchdata.ConcatDataset(parts) if len(parts) > 1 else parts[0]
    for name, part in zip(names, parts, strict=True):
        if len(part) == 0:
            raise AssertionError(f"Data set '{name}' has no images.")
    if proposal_files is not None:
        if len(proposal_files) != len(names):
            raise AssertionError(f"{len(names)} data sets need as many proposal files, got {len(proposal_files)}.")
        parts = [load_proposals_into_dataset(*pair) for pair in zip(parts, proposal_files, strict=True)]
    samples = [sample for part in parts for sample in part]

    annotated = "annotations" in samples[0]
    if filter_empty and annotated:
        samples = filter_images_with_only_crowd_annotations(samples)
    if min_keypoints > 0 and annotated:
        samples = filter_images_with_few_keypoints(samples, min_keypoints)
    if annotated and all(MetadataCatalog.get(name).get("thing_classes") is not None for name in names):
        if check_consistency:
            check_metadata_consistency("thing_classes", names)
        print_instances_class_histogram(samples, MetadataCatalog.get(names[0]).thing_classes)
    if not samples:
        raise AssertionError(f"No usable image is left of data set {', '.join(names)}.")
    return samples
