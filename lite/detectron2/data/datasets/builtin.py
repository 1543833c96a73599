"""Registers COCO under the usual names.

Files are looked for in the folder that the environment variable ``DETECTRON2_DATASETS`` names (``./datasets``
by default), in the layout ``coco/annotations/*.json`` and ``coco/{train,val,test}{2014,2017}/*.jpg``. Nothing is
read before a data set is asked for.
"""

from __future__ import annotations

import os

from .builtin_meta import _get_builtin_metadata
from .coco import register_coco_instances

_LABELLED_SPLITS = (
    "2014_train",
    "2014_val",
    "2014_minival",
    "2014_valminusminival",
    "2017_train",
    "2017_val",
    "2017_val_100",
)
_TEST_SPLITS = ("2017_test", "2017_test-dev")


def _locate(split: str) -> tuple[str, str]:
    """Folder of the images of a split and suffix of its annotation file.

    COCO writes the year last, and both halves of the validation set of 2014 share its folder.
    """
    year, kind, *part = split.split("_")
    folder = {"train": "train", "test": "test", "test-dev": "test"}.get(kind, "val") + year
    return folder, "_".join([kind + year, *part])


def register_all_coco(root: str) -> None:
    """Register the COCO instance and person keypoint data sets below the folder ``root``."""
    families = (
        ("coco", "instances", "coco", _LABELLED_SPLITS),
        ("coco", "image_info", "coco", _TEST_SPLITS),
        ("keypoints_coco", "person_keypoints", "coco_person", _LABELLED_SPLITS),
    )
    for family, file_prefix, metadata, splits in families:
        for split in splits:
            folder, suffix = _locate(split)
            json_file = os.path.join(root, f"coco/annotations/{file_prefix}_{suffix}.json")
            images = os.path.join(root, "coco", folder)
            register_coco_instances(f"{family}_{split}", _get_builtin_metadata(metadata), json_file, images)


register_all_coco(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))
