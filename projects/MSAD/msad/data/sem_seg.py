"""``TYPE: sem_seg``: images with label maps, as of Cityscapes and VOC, and how they are cropped for training."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import build_augmentation
from PIL import Image

from ..files import files_below
from .dataset_types import DATASET_TYPE_REGISTRY, NAMES, PATH, TEXT, Key, add_dataset, check_entry
from .image_files import upright_size
from .label_maps import THREADS, readable_label_map, wrong_labels

KEYS = {
    "IMAGES": PATH,
    "LABELS": PATH,
    "CLASSES": NAMES,
    "IGNORE_LABEL": Key(lambda v: isinstance(v, int) and 0 <= v <= 255, "a number from 0 to 255", required=False),
    "IMAGE_SUFFIX": TEXT.optional(),
    "LABEL_SUFFIX": TEXT.optional(),
    "LIST": PATH.optional(),
}


@DATASET_TYPE_REGISTRY.register()
def sem_seg(name: str, entry: dict[str, Any]) -> None:
    """A class for every pixel, evaluated by the mean intersection over union.

    Keys of the entry:

    - ``IMAGES``, ``LABELS``: folders, with or without folders (or links to folders) inside. A label map is an image of
      one channel ("L"), or with a palette ("P"), whose values are the numbers of classes; it belongs to the image of
      the same path without the suffixes.
    - ``IMAGE_SUFFIX``, ``LABEL_SUFFIX``: ends of the file names, ".jpg" and ".png". Cityscapes: "_leftImg8bit.png" and
      "_gtFine_labelTrainIds.png".
    - ``LIST``: file with one name (path without suffix) a line; without it, all files are taken.
    - ``CLASSES``: names of the classes 0, 1, ...
    - ``IGNORE_LABEL``: value of pixels that do not count, 255.
    """
    entry = check_entry(entry, KEYS)
    ignored, classes = entry.get("IGNORE_LABEL", 255), list(entry["CLASSES"])
    if ignored < len(classes):
        raise ValueError(f"IGNORE_LABEL {ignored} is the number of the class {classes[ignored]!r}")
    add_dataset(
        name,
        entry,
        functools.partial(_load, entry, ignored),
        evaluator_type="sem_seg",
        stuff_classes=classes,
        ignore_label=ignored,
        image_root=entry["IMAGES"],
        sem_seg_root=entry["LABELS"],
    )


def _load(entry: dict[str, Any], ignored: int) -> list[dict]:
    """Dataset dicts of one entry, whose label maps have been looked through."""
    where = f"data set {entry['NAME']!r} (DATASETS.REGISTER)"
    suffixes = {"IMAGES": entry.get("IMAGE_SUFFIX", ".jpg"), "LABELS": entry.get("LABEL_SUFFIX", ".png")}
    found = {}
    for key, suffix in suffixes.items():
        if not os.path.isdir(entry[key]):
            raise FileNotFoundError(f"{where}: {key}: no such folder: {entry[key]}")
        found[key] = set(_names(entry[key], suffix))
    if "LIST" in entry:
        wanted = _read_list(entry["LIST"], where)
    else:
        wanted = sorted(found["IMAGES"] | found["LABELS"])
    if not wanted:
        raise ValueError(f"{where}: no file in {entry['IMAGES']} ends with {suffixes['IMAGES']!r}")
    paths = {key: {n: os.path.join(entry[key], n + suffix) for n in wanted} for key, suffix in suffixes.items()}
    for key, names in found.items():
        missing = [name for name in wanted if name not in names]
        if missing:
            raise FileNotFoundError(
                f"{where}: {key}: {len(missing)} of {len(wanted)} files are missing, the first is "
                f"{paths[key][missing[0]]}"
            )
    pairs = [(paths["IMAGES"][name], paths["LABELS"][name]) for name in wanted]
    check = functools.partial(_check_pair, len(entry["CLASSES"]), ignored)
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(check, pairs, [os.stat(label).st_mtime_ns for _, label in pairs]))
    return [
        {"file_name": image, "sem_seg_file_name": label, "image_id": name, "width": width, "height": height}
        for name, (image, _), (label, width, height) in zip(wanted, pairs, found)
    ]


def _names(folder: str, suffix: str) -> Iterable[str]:
    """Paths from ``folder``, without the suffix, of the files that end with it."""
    return (os.path.relpath(file, folder).removesuffix(suffix) for file in files_below(folder) if file.endswith(suffix))


def _read_list(path: str, where: str) -> list[str]:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{where}: LIST: no such file: {path}")
    with open(path) as file:
        return [line.strip() for line in file if line.strip()]


@functools.lru_cache(maxsize=1 << 17)
def _check_pair(classes: int, ignored: int, pair: tuple[str, str], changed: int) -> tuple[str, int, int]:
    """(label map to read, width, height) of an image; of a map with a palette a copy without it is read.

    ValueError if the label map has another form, size, or values beyond the classes.

    ``changed``, the time of the last change of the label map, is there to be remembered: data sets are loaded several
    times in a run, and each label map is decoded once.
    """
    image, label = pair
    with Image.open(image) as opened:
        size = upright_size(opened)
    read = readable_label_map(label, size)
    wrong = wrong_labels(label, classes, ignored)
    if wrong:
        raise ValueError(
            f"label map {label} has the label {wrong[0]}; classes are 0 to {classes - 1}, ignored is {ignored}"
        )
    return read, *size


def is_segmentation(dicts: list[dict]) -> bool:
    """Whether all that the samples have is label maps."""
    return bool(dicts) and "sem_seg_file_name" in dicts[0] and "annotations" not in dicts[0]


def crop_mapper(cfg: CfgNode) -> DatasetMapper:
    """detectron2's mapper for training that crops after resizing, so that crops have one size at all scales.

    INPUT.CROP (TYPE, SIZE in pixels as height and width, SINGLE_CATEGORY_MAX_AREA) says how; where a crop is larger
    than the image, the batch is padded with the ignored label.
    """
    crop = cfg.INPUT.CROP
    resize, *others = build_augmentation(cfg, is_train=True)
    crops = T.RandomCrop_CategoryAreaConstraint(
        crop.TYPE, crop.SIZE, crop.SINGLE_CATEGORY_MAX_AREA, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
    )
    return DatasetMapper(True, augmentations=[resize, crops, *others], image_format=cfg.INPUT.FORMAT)
