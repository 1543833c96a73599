"""The default way from a sample of a registered data set to the input of a model."""

from __future__ import annotations

import copy
import logging

import numpy as np
import torch
from fvcore.transforms.transform import Transform, TransformList

from detectron2.config import configurable

from . import detection_utils as utils
from . import transforms as T

logger = logging.getLogger(__name__)


class DatasetMapper:
    """Reads the image of a sample, augments it and turns its annotations into ``Instances``.

    The result is a copy of the sample with "image" (``C x H x W`` uint8 tensor, network input size), and in
    training "instances" instead of "annotations". Where the sample has "sem_seg_file_name" it gets "sem_seg" instead
    (``H x W`` int64 labels, resized without interpolation). "height" and "width" stay those of the file, to which
    results are scaled back.

    Args:
        is_train: annotations are used in training only.
        augmentations: augmentations or fixed transforms, in order.
        image_format: see :func:`detection_utils.read_image`.
        use_instance_mask: whether to keep masks.
        use_keypoint: whether to keep keypoints.
        instance_mask_format: "polygon" or "bitmask".
        keypoint_hflip_indices: see :func:`detection_utils.create_keypoint_hflip_indices`.
        precomputed_proposal_topk: if given, how many precomputed proposals to load.
        recompute_boxes: take boxes from the augmented masks, which is tighter after a crop or rotation.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        augmentations: list[T.Augmentation | Transform],
        image_format: str,
        use_instance_mask: bool = False,
        use_keypoint: bool = False,
        instance_mask_format: str = "polygon",
        keypoint_hflip_indices: np.ndarray | None = None,
        precomputed_proposal_topk: int | None = None,
        recompute_boxes: bool = False,
    ):
        if recompute_boxes and not use_instance_mask:
            raise AssertionError("recompute_boxes takes boxes from masks, so it needs use_instance_mask.")
        self.is_train = is_train
        self.image_format = image_format
        self.augmentations = T.AugmentationList(augmentations)
        self.use_instance_mask, self.instance_mask_format = use_instance_mask, instance_mask_format
        self.recompute_boxes = recompute_boxes
        self.use_keypoint, self.keypoint_hflip_indices = use_keypoint, keypoint_hflip_indices
        self.proposal_topk = precomputed_proposal_topk
        logger.info("Augmentations for %s: %s", "training" if is_train else "inference", augmentations)

    @classmethod
    def from_config(cls, cfg, is_train: bool = True) -> dict:
        inputs, model = cfg.INPUT, cfg.MODEL
        augmentations = utils.build_augmentation(cfg, is_train)
        crops = is_train and inputs.CROP.ENABLED
        if crops:
            augmentations = [T.RandomCrop(inputs.CROP.TYPE, inputs.CROP.SIZE), *augmentations]
        arguments = {"is_train": is_train, "augmentations": augmentations, "image_format": inputs.FORMAT}
        arguments |= {"use_instance_mask": model.MASK_ON, "instance_mask_format": inputs.MASK_FORMAT}
        arguments |= {"use_keypoint": model.KEYPOINT_ON, "recompute_boxes": crops and model.MASK_ON}
        if model.KEYPOINT_ON:
            arguments["keypoint_hflip_indices"] = utils.create_keypoint_hflip_indices(cfg.DATASETS.TRAIN)
        if model.LOAD_PROPOSALS:
            split = "TRAIN" if is_train else "TEST"
            arguments["precomputed_proposal_topk"] = cfg.DATASETS[f"PRECOMPUTED_PROPOSAL_TOPK_{split}"]
        return arguments

    def _transform_annotations(
        self, dataset_dict: dict, transforms: TransformList, image_shape: tuple[int, int]
    ) -> None:
        """Replace "annotations" by "instances" for an image of ``image_shape`` (height, width) pixels."""
        transformed = [
            utils.transform_instance_annotations(
                anno, transforms, image_shape, keypoint_hflip_indices=self.keypoint_hflip_indices
            )
            for anno in self._without_unused(dataset_dict.pop("annotations"))
            if not anno.get("iscrowd", 0)
        ]
        instances = utils.annotations_to_instances(transformed, image_shape, self.instance_mask_format)
        if self.recompute_boxes and instances.has("gt_masks"):
            instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        dataset_dict["instances"] = utils.filter_empty_instances(instances)

    def _without_unused(self, annotations: list[dict]) -> list[dict]:
        """The annotations without the masks or keypoints that the model does not ask for."""
        unused = {"segmentation": not self.use_instance_mask, "keypoints": not self.use_keypoint}
        unused = {key for key, drop in unused.items() if drop}
        return [{k: v for k, v in annotation.items() if k not in unused} for annotation in annotations]

    def _wanted(self, dataset_dict: dict) -> dict:
        """The sample without what nobody will read: to copy polygons takes as long as to read the image."""
        sample = dict(dataset_dict)
        handler = getattr(self._transform_annotations, "__func__", None)
        if not self.is_train:
            sample.pop("annotations", None)
        elif "annotations" in sample and handler is DatasetMapper._transform_annotations:
            # Subclasses that handle annotations themselves get all that these hold.
            sample["annotations"] = self._without_unused(sample["annotations"])
        return sample

    def __call__(self, dataset_dict: dict) -> dict:
        """Map one sample of a registered data set; the sample itself is not changed."""
        sample = copy.deepcopy(self._wanted(dataset_dict))
        image = utils.read_image(sample["file_name"], self.image_format)
        utils.check_image_size(sample, image)

        labels = None
        if "sem_seg_file_name" in sample:
            labels = utils.read_image(sample.pop("sem_seg_file_name"), "L").squeeze(2)
        seen = T.AugInput(image, sem_seg=labels)
        transforms = self.augmentations(seen)
        image_shape = seen.image.shape[:2]
        # Flips and BGR are views with negative strides, which torch cannot take over.
        sample["image"] = torch.from_numpy(np.ascontiguousarray(seen.image.transpose(2, 0, 1)))

        if labels is not None:
            sample["sem_seg"] = torch.from_numpy(seen.sem_seg.astype(np.int64))
        if self.proposal_topk is not None:
            utils.transform_proposals(sample, image_shape, transforms, proposal_topk=self.proposal_topk)
        if "annotations" in sample:
            self._transform_annotations(sample, transforms, image_shape)
        return sample
