"""Students that see the images of another sensor: ``DATASETS.REGISTER[].LOW_RES_IMAGES``.

The teacher sees the images of IMAGES (H). The student sees the files of the same names in LOW_RES_IMAGES, whose sides
are those of H over ``2**shift``, up to rounding. Both show the same scene from border to border.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog, build_detection_test_loader
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image
from PIL import Image

from ..finding import ERROR, OK
from ..resolution import downsampled_size, get_resolution
from .coco_annotations import bitmap, encoded
from .image_files import check_pixels, inspect_image, inspect_images
from .label_maps import resized_label_map
from .mappers import inference_mapper
from .sampling import at_equal_distances
from .tally import Tally

FILE = "low_res_file_name"
# Transforms that change colours and nothing else.
_COLOURS = (T.BlendTransform, T.ColorTransform)


def reads_low_res(cfg: CfgNode) -> bool:
    """Whether the model of a config reads LOW_RES_IMAGES: a student, or DATASETS.LOW_RES says so."""
    return bool(cfg.DISTILL.TEACHERS) or cfg.DATASETS.LOW_RES


def student_shift(cfg: CfgNode) -> int:
    """How many times smaller the student's images are, as a power of two."""
    return get_resolution(cfg.DISTILL.STUDENT_RESOLUTION).shift


def low_res_mapper(cfg: CfgNode, mapper: Callable[[dict], dict], dicts: Sequence[dict]) -> Callable[[dict], dict]:
    """What maps training data of which some have LOW_RES_IMAGES; ``mapper`` itself where that changes nothing.

    Raises:
        ValueError: only a part of the data has LOW_RES_IMAGES, or ``mapper`` is of another kind.
    """
    count = sum(FILE in record for record in dicts)
    if not count or not reads_low_res(cfg):
        return mapper
    if count < len(dicts):
        raise ValueError(
            f"{count} of {len(dicts)} images of DATASETS.TRAIN have LOW_RES_IMAGES: all sets must, or none"
        )
    if not cfg.DISTILL.TEACHERS:
        return LowResOnly(mapper)
    if not isinstance(mapper, DatasetMapper):
        raise ValueError(f"LOW_RES_IMAGES need a DatasetMapper that makes the H images, got {type(mapper).__name__}")
    return LowResPairs(mapper, student_shift(cfg))


def sees_low_res(cfg: CfgNode, dataset_name: str) -> bool:
    """Whether the model of a config reads the LOW_RES_IMAGES of a data set, which has some."""
    return reads_low_res(cfg) and "LOW_RES_IMAGES" in (MetadataCatalog.get(dataset_name).get("definition") or {})


def build_test_mapper(cfg: CfgNode, dataset_name: str) -> Callable[[dict], dict]:
    """What maps a data set to the images that the model of ``cfg`` sees in tests; results are in the frame of H."""
    mapper = inference_mapper(cfg)
    return LowResOnly(mapper) if sees_low_res(cfg, dataset_name) else mapper


def build_test_loader(cfg: CfgNode, dataset_name: str):
    """detectron2's test loader with :func:`build_test_mapper`."""
    return build_detection_test_loader(cfg, dataset_name, mapper=build_test_mapper(cfg, dataset_name))


class LowResPairs:
    """Maps the H image as ``mapper`` does, and adds the student's image of the same region.

    The item gets "low_res_image", a tensor (C, h, w) of the type of "image", whose size is that of the H image over
    ``2**shift``, rounded up. Resizing, cropping and flipping are replayed in one resampling, colours change alike.

    Args:
        mapper: for the H image, with any augmentations that map rectangles to rectangles.
        shift: of the student's resolution.
    """

    def __init__(self, mapper: DatasetMapper, shift: int) -> None:
        self.shift = shift
        self.format = mapper.image_format
        self.mapper = copy.copy(mapper)
        self.recorder = _Recorder(mapper.augmentations)
        self.mapper.augmentations = self.recorder

    def __call__(self, record: dict) -> dict:
        low = read_image(record[FILE], self.format)
        sample = self.mapper(record)
        size, transforms = self.recorder.size, self.recorder.transforms
        problem = size_problem(size, low.shape[:2], self.shift)
        if problem:
            raise ValueError(f"{record[FILE]} {problem}")
        low = follow(low, transforms, size, tuple(sample["image"].shape[-2:]), self.shift)
        sample["low_res_image"] = torch.from_numpy(np.ascontiguousarray(low.transpose(2, 0, 1)))
        return sample


class LowResOnly:
    """Maps the files of LOW_RES_IMAGES in place of those of H: for evaluation, and for training without a teacher.

    Annotations are scaled to the file, unless the mapper is one of tests; "height" and "width" of the item stay those
    of H, so that detections come out in the frame of the annotations.
    """

    def __init__(self, mapper: Callable[[dict], dict]) -> None:
        self.mapper = mapper
        self.unused = () if getattr(mapper, "is_train", True) else ("annotations", "sem_seg_file_name")

    def __call__(self, record: dict) -> dict:
        sample = self.mapper(to_low_res({key: value for key, value in record.items() if key not in self.unused}))
        return {**sample, "height": record["height"], "width": record["width"]}


def to_low_res(record: dict) -> dict:
    """The dataset dict of the file in LOW_RES_IMAGES, with annotations and label map in its pixels.

    Crowds are left out: no mapper trains on them.

    Raises:
        OSError: the file cannot be read; names it.
    """
    file = inspect_image(record[FILE])
    if file.problem:
        raise OSError(f"{record[FILE]} cannot be read: {file.problem}")
    out = {**record, "file_name": record[FILE], "width": file.width, "height": file.height}
    if "annotations" in record:
        out["annotations"] = [_scaled(a, record, out) for a in record["annotations"] if not a.get("iscrowd")]
    if "sem_seg_file_name" in record:
        out["sem_seg_file_name"] = resized_label_map(record["sem_seg_file_name"], file.width, file.height)
    return out


def _scaled(annotation: dict[str, Any], record: dict, to: dict) -> dict[str, Any]:
    """An annotation of ``record`` in the pixels of the dataset dict ``to``."""
    sx, sy = to["width"] / record["width"], to["height"] / record["height"]
    out = {**annotation, "bbox": [v * s for v, s in zip(annotation["bbox"], (sx, sy, sx, sy))]}
    mask = annotation.get("segmentation")
    if isinstance(mask, dict):
        # A pixel belongs to the object if at least half of its area does.
        whole = bitmap(mask, record["height"], record["width"]).astype(np.float32)
        small = cv2.resize(whole, (to["width"], to["height"]), interpolation=cv2.INTER_AREA) >= 0.5
        out["segmentation"] = encoded(small)
    elif mask:
        out["segmentation"] = [[v * (sx, sy)[i % 2] for i, v in enumerate(polygon)] for polygon in mask]
    if annotation.get("keypoints"):
        out["keypoints"] = [v * (sx, sy, 1)[i % 3] for i, v in enumerate(annotation["keypoints"])]
    return out


def size_problem(size: tuple[int, int], low: tuple[int, int], shift: int) -> str:
    """What is wrong with the (height, width) of a low-resolution file of an H image of ``size``; "" if nothing is."""
    if all(abs(ours - whole / 2**shift) < 1 for ours, whole in zip(low, size)):
        return ""
    wanted = downsampled_size(size, shift)
    return (
        f"is {low[1]} x {low[0]} (width x height), but the image is {size[1]} x {size[0]}: "
        f"1/{2**shift} of that is {wanted[1]} x {wanted[0]}"
    )


def follow(
    low: np.ndarray, transforms: T.TransformList, size: tuple[int, int], out: tuple[int, int], shift: int
) -> np.ndarray:
    """The region of ``low`` that an augmented H image shows.

    Args:
        low: (h, w, C) uint8, all of the scene.
        transforms: what was done with the H image.
        size, out: (height, width) of the H image before and after.
        shift: the result is ``2**shift`` times smaller than ``out``, rounded up; a last row or column that is only
            partly inside is completed from the scene, or by repeating its border.
    """
    x_scale, y_scale, x_move, y_move = _axes(transforms, size)
    height, width = downsampled_size(out, shift)
    # The result's borders in the pixels of H before the augmentations, then in those of the file.
    xs = sorted((edge - x_move) / x_scale * low.shape[1] / size[1] for edge in (0, width * 2**shift))
    ys = sorted((edge - y_move) / y_scale * low.shape[0] / size[0] for edge in (0, height * 2**shift))
    margin = int(np.ceil(max(0, -xs[0], -ys[0], xs[1] - low.shape[1], ys[1] - low.shape[0])))
    pixels = max((xs[1] - xs[0]) / width, (ys[1] - ys[0]) / height)  # of the file, in one of the result
    if margin > pixels + 1:
        raise ValueError(
            f"an augmentation adds a border to the H image, which LOW_RES_IMAGES cannot follow: {transforms}"
        )
    padded = np.pad(low, ((margin, margin), (margin, margin), (0, 0)), mode="edge")
    box = (xs[0] + margin, ys[0] + margin, xs[1] + margin, ys[1] + margin)
    channels = [
        np.asarray(Image.fromarray(padded[..., c]).resize((width, height), Image.Resampling.BILINEAR, box=box))
        for c in range(low.shape[2])
    ]
    image = np.stack(channels, axis=2)
    image = image[:, :: -1 if x_scale < 0 else 1][:: -1 if y_scale < 0 else 1]
    for transform in transforms.transforms:
        if isinstance(transform, _COLOURS):
            if np.ndim(getattr(transform, "src_image", 0)) > 1:
                raise ValueError(f"the augmentation {transform} mixes in an H image; LOW_RES_IMAGES cannot follow it")
            image = transform.apply_image(image)
    return image


def _axes(transforms: T.TransformList, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Scale of x and y (negative: mirrored) and where the point (0, 0) of an H image of ``size`` goes."""
    height, width = size
    corners = np.array([[0, 0], [width, 0], [0, height], [width, height]], dtype=np.float64)
    moved = transforms.apply_coords(corners.copy())
    across, down = (moved[1] - moved[0]) / width, (moved[2] - moved[0]) / height
    if not np.allclose(moved[3], moved[1] + moved[2] - moved[0]) or abs(across[1]) + abs(down[0]) > 1e-6:
        raise ValueError(f"LOW_RES_IMAGES can follow resizing, cropping and flipping only, not {transforms}")
    return across[0], down[1], moved[0, 0], moved[0, 1]


class _Recorder(T.Augmentation):
    """Does what ``augmentations`` do, and keeps the size before and the transforms."""

    def __init__(self, augmentations: T.AugmentationList) -> None:
        self.augmentations = augmentations

    def __call__(self, aug_input: T.AugInput) -> T.TransformList:
        self.size = aug_input.image.shape[:2]
        self.transforms = self.augmentations(aug_input)
        return self.transforms

    def __repr__(self) -> str:
        return repr(self.augmentations)


def check_low_res_files(tally: Tally, records: Sequence[dict], shift: int, count: int) -> None:
    """Whether the files of LOW_RES_IMAGES are there, whole, of the right size and of 8 bits.

    Args:
        count: so many files, taken at equal distances, are looked into; 0: all.
    """
    records = [record for record in records if FILE in record]
    if count and len(records) > count:
        tally.add(OK, f"{count} of {len(records)} files of LOW_RES_IMAGES were looked into", "", "")
        records = at_equal_distances(records, count)
    of = f"{len(records)} files of LOW_RES_IMAGES"
    for record, file in zip(records, inspect_images([record[FILE] for record in records])):
        if file.problem:
            tally.add(ERROR, f"cannot be used: {file.problem}", record[FILE], "correct LOW_RES_IMAGES", of)
            continue
        problem = size_problem((record["height"], record["width"]), (file.height, file.width), shift)
        if problem:
            fix = "give the files this size, or correct DISTILL.STUDENT_RESOLUTION"
            tally.add(ERROR, "has another size than its image asks for", record[FILE], fix, of, problem)
        check_pixels(tally, file, record[FILE], of)
