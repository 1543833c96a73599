"""Mapper of dataset dicts that are a part of their image, or have regions in which nothing may be learnt."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.structures import BoxMode

REGIONS, CROP = "ignored_regions", "crop"
# Class of the annotations that carry regions through the augmentations; they are taken out again.
_CARRIER = -1


class RegionMapper:
    """A DatasetMapper for training that also knows the fields "crop" and "ignored_regions" of a dataset dict.

    - "crop" [x0, y0, x1, y1]: the part of the image, in its pixels, that is cut out before any augmentation.
    - "ignored_regions": boxes [x0, y0, x1, y1] in pixels of the image. They pass through the augmentations as boxes
      do and come out as a float tensor (R, 4) relative to the width and height of the augmented image, so that they
      hold for the image at any resolution; see :mod:`msad.modeling.ignored_regions`.

    Other dicts are mapped as the DatasetMapper maps them.

    Raises:
        ValueError: not a DatasetMapper, whose augmentations are known.
    """

    def __init__(self, mapper: DatasetMapper) -> None:
        if not isinstance(mapper, DatasetMapper):
            raise ValueError(
                f"patches and ignored regions need a DatasetMapper, got {type(mapper).__name__}: they cannot be "
                "combined with LOW_RES_IMAGES"
            )
        self.mapper = mapper

    @staticmethod
    def is_needed(dicts: Iterable[dict]) -> bool:
        """Whether a dict has one of the two fields."""
        return any(CROP in record or record.get(REGIONS) for record in dicts)

    def __call__(self, record: dict) -> dict:
        record = dict(record)
        crop, regions = record.pop(CROP, None), record.pop(REGIONS, None)
        if regions is not None:
            carriers = [{"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": _CARRIER} for box in regions]
            record["annotations"] = [*record.get("annotations", ()), *carriers]
        mapper = self.mapper
        if crop is not None:
            x0, y0, x1, y1 = crop
            mapper = copy.copy(mapper)
            mapper.augmentations = T.AugmentationList([T.CropTransform(x0, y0, x1 - x0, y1 - y0), mapper.augmentations])
        sample = mapper(record)
        if regions is not None:
            instances = sample["instances"]
            carried = instances.gt_classes == _CARRIER
            height, width = instances.image_size
            boxes = instances.gt_boxes.tensor[carried]
            sample[REGIONS] = boxes / torch.tensor([width, height, width, height], dtype=boxes.dtype)
            sample["instances"] = instances[~carried]
        return sample
