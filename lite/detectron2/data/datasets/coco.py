"""COCO's annotation format: https://cocodataset.org/#format-data."""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import logging
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from iopath.common.file_io import file_lock
from pycocotools.coco import COCO

from detectron2.structures import BoxMode, PolygonMasks
from detectron2.utils.file_io import PathManager

from ..catalog import DatasetCatalog, MetadataCatalog

logger = logging.getLogger(__name__)


# --------------------------------------------------------------------------------------------- reading


def load_coco_json(
    json_file: str, image_root: str, dataset_name: str | None = None, extra_annotation_keys: Iterable[str] | None = None
) -> list[dict]:
    """Read a COCO annotation file (instances or person keypoints).

    Args:
        json_file: path of the file.
        image_root: folder of the images.
        dataset_name: if given, the categories go into the metadata of this name and category ids are mapped
            to ``0 .. number of categories - 1``, in the order of their ids. Otherwise ids stay as they are.
        extra_annotation_keys: further keys of annotations to keep.

    Returns:
        a dict for each image, sorted by image id, with "file_name", "height", "width", "image_id" and
        "annotations". Boxes are XYWH_ABS; keypoints are moved by half a pixel to continuous coordinates;
        polygons with fewer than three points are dropped, and so are instances that had no others.

    Raises:
        AssertionError: annotation ids are not unique, or one has the unsupported key "ignore".
        KeyError: an annotation's category is not declared.
        ValueError: an annotation's box is empty.
    """
    coco = _open_coco(json_file)
    id_map = None if dataset_name is None else _publish_categories(coco, dataset_name, json_file)
    _check_annotation_ids(coco, json_file)
    kept_keys = ["iscrowd", "bbox", "category_id", *(extra_annotation_keys or ())]

    samples, invalid = [], 0
    for image_id in sorted(coco.imgs):
        image = coco.imgs[image_id]
        converted = [_convert_annotation(a, kept_keys, id_map, json_file) for a in coco.imgToAnns[image_id]]
        usable = [anno for anno in converted if anno is not None]
        invalid += len(converted) - len(usable)
        samples.append(
            {
                "file_name": os.path.join(image_root, image["file_name"]),
                "height": image["height"],
                "width": image["width"],
                "image_id": image_id,
                "annotations": usable,
            }
        )
    logger.info("%s: %d images", json_file, len(samples))
    if invalid:
        logger.warning(
            "%s: dropped %d instances whose polygons all have fewer than three points or an odd number of coordinates.",
            json_file,
            invalid,
        )
    return samples


def _open_coco(json_file: str) -> COCO:
    # COCO prints its progress; what matters is logged here.
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(PathManager.get_local_path(json_file))


def _publish_categories(coco: COCO, dataset_name: str, json_file: str) -> dict[int, int]:
    """Write the categories to the metadata; returns the map from the file's ids to contiguous ones."""
    ids = sorted(coco.cats)
    id_map = {category_id: index for index, category_id in enumerate(ids)}
    metadata = MetadataCatalog.get(dataset_name)
    metadata.thing_classes = [coco.cats[category_id]["name"] for category_id in ids]
    metadata.thing_dataset_id_to_contiguous_id = id_map
    # COCO's own ids have gaps and everybody knows; in other files gaps may be a mistake.
    if "coco" not in dataset_name and ids != list(range(1, len(ids) + 1)):
        logger.warning("%s: category ids are not 1 .. %d and are mapped in order.", json_file, len(ids))
    return id_map


def _check_annotation_ids(coco: COCO, json_file: str) -> None:
    listed = coco.dataset.get("annotations", [])
    # The public minival files of 2014 do have duplicates.
    if "minival" not in json_file and len(coco.anns) != len(listed):
        raise AssertionError(f"{json_file}: {len(listed)} annotations have {len(coco.anns)} different ids.")
    stray = sum(anno["image_id"] not in coco.imgs for anno in listed)
    if stray:
        logger.warning("%s: %d of %d annotations belong to images not listed.", json_file, stray, len(listed))


def _convert_annotation(anno: dict, kept_keys: list[str], id_map: dict[int, int] | None, json_file: str) -> dict | None:
    """One annotation in the form that samples have, None if its mask is invalid."""
    where = f"{json_file}: annotation {anno.get('id')} of image {anno['image_id']}"
    if anno.get("ignore", 0):
        raise AssertionError(f"{where} has the key 'ignore', which is not supported; use 'iscrowd'.")
    result = {key: anno[key] for key in kept_keys if key in anno}
    if "bbox" in anno and not anno["bbox"]:
        raise ValueError(f"{where} has an empty 'bbox'.")
    result["bbox_mode"] = BoxMode.XYWH_ABS

    segmentation = anno.get("segmentation")
    if segmentation:
        result["segmentation"] = _normalize_segmentation(segmentation)
        if not result["segmentation"]:
            return None
    if anno.get("keypoints"):
        result["keypoints"] = _shift_points(anno["keypoints"], 0.5)
    if id_map is not None:
        category = anno["category_id"]
        if category not in id_map:
            raise KeyError(f"{where} has category_id {category}, which is not among the file's 'categories'.")
        result["category_id"] = id_map[category]
    return result


def _normalize_segmentation(segmentation: list | dict) -> list | dict:
    if isinstance(segmentation, list):
        return [polygon for polygon in segmentation if len(polygon) >= 6 and len(polygon) % 2 == 0]
    if isinstance(segmentation["counts"], list):
        return mask_util.frPyObjects(segmentation, *segmentation["size"])
    return segmentation


def _shift_points(keypoints: list[float], amount: float) -> list[float]:
    """Move x and y of a flat list x, y, visibility, ... by some pixels."""
    return [value if i % 3 == 2 else value + amount for i, value in enumerate(keypoints)]


def load_sem_seg(gt_root: str, image_root: str, gt_ext: str = "png", image_ext: str = "jpg") -> list[dict]:
    """Samples for semantic segmentation from two folders with files of equal names.

    Args:
        gt_root: folder of label maps: images of one channel whose values are class numbers.
        image_root: folder of images.
        gt_ext, image_ext: extensions of the files to take.

    Returns:
        a sample with "file_name" and "sem_seg_file_name" for each pair, by name; files without a partner are left out
        with a warning.
    """
    stems = []
    for folder, extension in ((image_root, image_ext), (gt_root, gt_ext)):
        suffix = f".{extension}"
        stems.append({name.removesuffix(suffix) for name in PathManager.ls(folder) if name.endswith(suffix)})
    images, labels = stems
    if not labels:
        raise AssertionError(f"There is no .{gt_ext} file in {gt_root}.")
    if images != labels:
        logger.warning(
            "%s has %d images and %s %d label maps; the %d with both are used.",
            image_root, len(images), gt_root, len(labels), len(images & labels),
        )
    return [
        {
            "file_name": os.path.join(image_root, f"{stem}.{image_ext}"),
            "sem_seg_file_name": os.path.join(gt_root, f"{stem}.{gt_ext}"),
        }
        for stem in sorted(images & labels)
    ]


def register_coco_instances(name: str, metadata: dict, json_file: str, image_root: str) -> None:
    """Register a data set in COCO format; it is read on first use.

    Args:
        name: what to call it, e.g. in ``DATASETS.TRAIN``.
        metadata: further metadata. ``thing_classes`` comes from the file.
        json_file: annotation file.
        image_root: folder of the images.
    """
    for value, what in ((name, "name"), (json_file, "json_file"), (image_root, "image_root")):
        if not isinstance(value, (str, os.PathLike)):
            raise AssertionError(f"register_coco_instances: {what} must be a string, got {value!r}.")
    # The metadata refuses other files under a name in use; saying the same twice is harmless.
    MetadataCatalog.get(name).set(json_file=json_file, image_root=image_root, evaluator_type="coco", **metadata)
    if name not in DatasetCatalog:
        DatasetCatalog.register(name, lambda: load_coco_json(json_file, image_root, name))


# --------------------------------------------------------------------------------------------- writing


def convert_to_coco_dict(dataset_name: str) -> dict[str, Any]:
    """A registered data set as the content of a COCO annotation file.

    Images are numbered when they lack an "image_id". Category ids are those of the original file where the
    metadata has ``thing_dataset_id_to_contiguous_id``, contiguous ones otherwise.
    """
    metadata = MetadataCatalog.get(dataset_name)
    samples = DatasetCatalog.get(dataset_name)
    contiguous = metadata.get("thing_dataset_id_to_contiguous_id") or {i: i for i in range(len(metadata.thing_classes))}
    original_id = {index: category_id for category_id, index in contiguous.items()}

    images, annotations = [], []
    for number, sample in enumerate(samples):
        image_id = sample.get("image_id", number)
        images.append(
            {
                "id": image_id,
                "width": int(sample["width"]),
                "height": int(sample["height"]),
                "file_name": str(sample["file_name"]),
            }
        )
        for anno in sample.get("annotations", []):
            entry = {"id": len(annotations) + 1, "image_id": image_id, **_to_coco_annotation(anno)}
            entry["category_id"] = original_id[anno["category_id"]]
            annotations.append(entry)
    logger.info("%s: converted %d images with %d annotations", dataset_name, len(images), len(annotations))
    return {
        "info": {
            "date_created": str(datetime.datetime.now()),
            "description": f"Data set '{dataset_name}', converted by detectron2.",
        },
        "images": images,
        "categories": [{"id": original_id[i], "name": name} for i, name in enumerate(metadata.thing_classes)],
        "licenses": None,
        "annotations": annotations,
    }


def _to_coco_annotation(anno: dict) -> dict[str, Any]:
    """An annotation in COCO's form, but for its ids."""
    box = BoxMode.convert(anno["bbox"], anno["bbox_mode"], BoxMode.XYWH_ABS)
    entry: dict[str, Any] = {
        "bbox": [round(float(value), 3) for value in box],
        "area": float(box[2] * box[3]),
        "iscrowd": int(anno.get("iscrowd", 0)),
    }
    if "segmentation" in anno:
        entry["segmentation"], entry["area"] = _to_coco_segmentation(anno["segmentation"])
    if "keypoints" in anno:
        # From continuous coordinates back to indices of pixels.
        entry["keypoints"] = _shift_points(anno["keypoints"], -0.5)
        labelled = sum(visibility > 0 for visibility in anno["keypoints"][2::3])
        entry["num_keypoints"] = anno.get("num_keypoints", labelled)
    return entry


def _to_coco_segmentation(segmentation: list | dict) -> tuple[list | dict, float]:
    """The mask in a form that json can write, and its area in square pixels."""
    if isinstance(segmentation, list):
        return segmentation, float(PolygonMasks([segmentation]).area()[0])
    if not isinstance(segmentation, dict):
        raise TypeError(f"A segmentation must be polygons or an RLE dict, got {type(segmentation).__name__}.")
    if isinstance(segmentation["counts"], list):
        segmentation = mask_util.frPyObjects(segmentation, *segmentation["size"])
    counts = segmentation["counts"]
    text = counts.decode("ascii") if isinstance(counts, bytes) else counts
    return {**segmentation, "counts": text}, float(np.asarray(mask_util.area(segmentation)))


def convert_to_coco_json(dataset_name: str, output_file: str, allow_cached: bool = True) -> None:
    """Write a registered data set as a COCO annotation file.

    Args:
        dataset_name: which.
        output_file: local path. Processes that do this at the same time wait for each other.
        allow_cached: leave a file that exists already as it is.
    """
    os.makedirs(os.path.dirname(os.path.abspath(output_file)), exist_ok=True)
    with file_lock(output_file):
        if allow_cached and os.path.exists(output_file):
            logger.warning("Using the existing %s; delete it if the data set has changed.", output_file)
            return
        content = json.dumps(convert_to_coco_dict(dataset_name))
        partial = f"{output_file}.partial"
        with open(partial, "w") as stream:
            stream.write(content)
        os.replace(partial, output_file)
