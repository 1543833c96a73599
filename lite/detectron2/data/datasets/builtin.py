"""Registers COCO under the usual names.

Files are looked for in the folder that the environment variable ``DETECTRON2_DATASETS`` names (``./datasets``
by default), in the layout ``coco/annotations/*.json`` and ``coco/{train,val,test}{2014,2017}/*.jpg``. Nothing is
read before a data set is asked for.
"""

from __future__ import annotations

import os

from .builtin_meta import _get_builtin_metadata
from .coco import register_coco_instances

# Name of the split: (folder of its images, suffix of its annotation file).
_LABELLED_SPLITS = {
    "2014_train": ("train2014", "train2014"),
    "2014_val": ("val2014", "val2014"),
    "2014_minival": ("val2014", "minival2014"),
    "2014_valminusminival": ("val2014", "valminusminival2014"),
    "2017_train": ("train2017", "train2017"),
    "2017_val": ("val2017", "val2017"),
    "2017_val_100": ("val2017", "val2017_100"),
}
_TEST_SPLITS = {
    "2017_test": ("test2017", "test2017"),
    "2017_test-dev": ("test2017", "test-dev2017"),
}


def register_all_coco(root: str) -> None:
    """Register the COCO instance and person keypoint data sets below the folder ``root``."""
    families = (
        ("coco", "instances", "coco", _LABELLED_SPLITS),
        ("coco", "image_info", "coco", _TEST_SPLITS),
        ("keypoints_coco", "person_keypoints", "coco_person", _LABELLED_SPLITS),
    )
    for family, file_prefix, metadata, splits in families:
        for split, (folder, suffix) in splits.items():
            register_coco_instances(
                f"{family}_{split}",
                _get_builtin_metadata(metadata),
                os.path.join(root, "coco/annotations", f"{file_prefix}_{suffix}.json"),
                os.path.join(root, "coco", folder),
            )


register_all_coco(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))
