"""What a dataset mapper is made of: reading images, transforming annotations, making ``Instances``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from fvcore.transforms.transform import CropTransform, HFlipTransform, TransformList

from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, Keypoints, PolygonMasks, polygons_to_bitmask

from . import transforms as T
from .catalog import MetadataCatalog, check_metadata_consistency, create_keypoint_hflip_indices
from .image_io import SizeMismatchError, check_image_size, convert_image_to_rgb, convert_PIL_to_numpy, read_image

__all__ = [
    "SizeMismatchError",
    "annotations_to_instances",
    "build_augmentation",
    "build_transform_gen",
    "check_image_size",
    "check_metadata_consistency",
    "convert_PIL_to_numpy",
    "convert_image_to_rgb",
    "create_keypoint_hflip_indices",
    "filter_empty_instances",
    "gen_crop_transform_with_instance",
    "get_fed_loss_cls_weights",
    "read_image",
    "transform_instance_annotations",
    "transform_keypoint_annotations",
    "transform_proposals",
]


def get_bbox(annotation: dict) -> list[float]:
    """The box of an annotation as XYXY in absolute pixels."""
    return BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)


def _transform_segmentation(segmentation: Any, transforms: TransformList, image_size: tuple[int, int]) -> Any:
    if isinstance(segmentation, list):
        corners = (np.asarray(polygon).reshape(-1, 2) for polygon in segmentation)
        return [moved.reshape(-1) for moved in transforms.apply_polygons(list(corners))]
    if isinstance(segmentation, dict):
        mask = transforms.apply_segmentation(mask_util.decode(segmentation))
        if tuple(mask.shape[:2]) != tuple(image_size):
            raise AssertionError(
                f"An RLE mask has shape {mask.shape[:2]} after its transforms, its image {tuple(image_size)}."
            )
        return mask
    raise ValueError(
        f"Cannot transform a segmentation of type {type(segmentation).__name__}: expected a list of polygons "
        f"or a dict with a run-length encoding."
    )


def transform_instance_annotations(
    annotation: dict,
    transforms: TransformList | list,
    image_size: tuple[int, int],
    *,
    keypoint_hflip_indices: np.ndarray | None = None,
) -> dict:
    """Apply transforms to the box, mask and keypoints of one annotation, in place.

    Args:
        annotation: "bbox" and "bbox_mode", and possibly "segmentation" and "keypoints".
        transforms: those of the image.
        image_size: (height, width) after the transforms.
        keypoint_hflip_indices: see :func:`create_keypoint_hflip_indices`.

    Returns:
        the same dict. Its box is XYXY_ABS, clipped to the image; polygons stay polygons, a run-length
        encoding becomes an ``H x W`` uint8 array; keypoints become a ``K x 3`` array.
    """
    if isinstance(transforms, (tuple, list)):
        transforms = TransformList(transforms)
    height, width = image_size
    box = transforms.apply_box(np.array([get_bbox(annotation)]))[0]
    annotation["bbox"] = np.minimum(np.maximum(box, 0), (width, height, width, height))
    annotation["bbox_mode"] = BoxMode.XYXY_ABS
    if "segmentation" in annotation:
        annotation["segmentation"] = _transform_segmentation(annotation["segmentation"], transforms, image_size)
    if "keypoints" in annotation:
        annotation["keypoints"] = transform_keypoint_annotations(
            annotation["keypoints"], transforms, image_size, keypoint_hflip_indices
        )
    return annotation


def transform_keypoint_annotations(
    keypoints: list[float],
    transforms: TransformList,
    image_size: tuple[int, int],
    keypoint_hflip_indices: np.ndarray | None = None,
) -> np.ndarray:
    """Apply transforms to the keypoints of one instance.

    Args:
        keypoints: 3K numbers x, y, visibility, as in COCO but in continuous coordinates.
        transforms: those of the image.
        image_size: (height, width) after the transforms.
        keypoint_hflip_indices: K indices; point ``i`` of a mirrored image is point ``indices[i]`` of the original.

    Returns:
        ``K x 3`` float64. Points that are unlabelled or left the image are all zero.
    """
    points = np.array(keypoints, dtype=np.float64).reshape(-1, 3)
    points[:, :2] = transforms.apply_coords(points[:, :2])
    height, width = image_size
    outside = np.any((points[:, :2] < 0) | (points[:, :2] > (width, height)), axis=1)
    points[outside | (points[:, 2] == 0)] = 0
    if keypoint_hflip_indices is not None and len(keypoint_hflip_indices) != len(points):
        raise ValueError(
            f"An annotation has {len(points)} keypoints, the metadata of its data set {len(keypoint_hflip_indices)}."
        )
    mirrored = sum(isinstance(step, HFlipTransform) for step in getattr(transforms, "transforms", [transforms]))
    if mirrored % 2 == 1:
        if keypoint_hflip_indices is None:
            raise ValueError("Mirroring an image with keypoints needs keypoint_hflip_indices.")
        points = points[np.asarray(keypoint_hflip_indices)]
    return points


def transform_proposals(
    dataset_dict: dict,
    image_shape: tuple[int, int],
    transforms: TransformList,
    *,
    proposal_topk: int,
    min_box_size: float = 0,
) -> None:
    """Replace the precomputed proposals of a dict by an ``Instances`` "proposals" for the transformed image.

    Args:
        dataset_dict: with "proposal_boxes", "proposal_bbox_mode" and "proposal_objectness_logits", sorted by
            the last. Without them nothing happens.
        image_shape: (height, width) after the transforms.
        transforms: those of the image.
        proposal_topk: how many to keep.
        min_box_size: drop those whose width or height is not above this, in pixels.
    """
    if "proposal_boxes" not in dataset_dict:
        return
    mode = dataset_dict.pop("proposal_bbox_mode")
    boxes = BoxMode.convert(dataset_dict.pop("proposal_boxes"), mode, BoxMode.XYXY_ABS)
    logits = torch.as_tensor(np.asarray(dataset_dict.pop("proposal_objectness_logits"), dtype="float32"))
    moved = Boxes(transforms.apply_box(boxes))
    moved.clip(image_shape)
    kept = torch.nonzero(moved.nonempty(threshold=min_box_size)).flatten()[:proposal_topk]
    dataset_dict["proposals"] = Instances(image_shape, proposal_boxes=moved[kept], objectness_logits=logits[kept])


def _to_bitmask(segmentation: Any, image_size: tuple[int, int]) -> np.ndarray:
    if isinstance(segmentation, list):
        return polygons_to_bitmask(segmentation, *image_size)
    if isinstance(segmentation, dict):
        return mask_util.decode(segmentation).astype(bool)
    if isinstance(segmentation, np.ndarray):
        if segmentation.ndim != 2:
            raise AssertionError(f"A mask must be an H x W array, got shape {segmentation.shape}.")
        return segmentation
    raise ValueError(
        f"Cannot make a bitmask from {type(segmentation).__name__}: expected a list of polygons, a dict with a "
        f"run-length encoding or an H x W array."
    )


def annotations_to_instances(annos: list[dict], image_size: tuple[int, int], mask_format: str = "polygon") -> Instances:
    """Make the ``Instances`` that models train on.

    Args:
        annos: annotations as :func:`transform_instance_annotations` returns them, N of them. Masks and
            keypoints are taken if the first has them; then all must.
        image_size: (height, width) in pixels.
        mask_format: "polygon" or "bitmask".

    Returns:
        Instances with ``gt_boxes``, ``gt_classes`` (N int64) and, where given, ``gt_masks`` and
        ``gt_keypoints``.
    """
    instances = Instances(image_size)
    instances.gt_boxes = Boxes(np.array([get_bbox(anno) for anno in annos], dtype=np.float32).reshape(-1, 4))
    instances.gt_classes = torch.tensor([int(anno["category_id"]) for anno in annos], dtype=torch.int64)
    if annos and "segmentation" in annos[0]:
        segmentations = _collect(annos, "segmentation")
        if mask_format == "polygon":
            instances.gt_masks = _polygon_masks(segmentations)
        elif mask_format == "bitmask":
            masks = np.stack([_to_bitmask(segm, image_size) for segm in segmentations])
            instances.gt_masks = BitMasks(torch.from_numpy(np.ascontiguousarray(masks)))
        else:
            raise AssertionError(f"mask_format must be 'polygon' or 'bitmask', got {mask_format!r}.")
    if annos and "keypoints" in annos[0]:
        instances.gt_keypoints = Keypoints(np.stack([np.asarray(k) for k in _collect(annos, "keypoints")]))
    return instances


def _collect(annos: list[dict], key: str) -> list:
    if any(key not in anno for anno in annos):
        raise KeyError(f"Some annotations of an image have '{key}' and others do not.")
    return [anno[key] for anno in annos]


def _polygon_masks(segmentations: list) -> PolygonMasks:
    try:
        return PolygonMasks(segmentations)
    except ValueError as error:
        raise ValueError(
            "These annotations cannot be used with INPUT.MASK_FORMAT 'polygon' (run-length encoded masks need "
            f"'bitmask'): {error}"
        ) from error


def filter_empty_instances(
    instances: Instances,
    by_box: bool = True,
    by_mask: bool = True,
    box_threshold: float = 1e-5,
    return_mask: bool = False,
) -> Instances | tuple[Instances, torch.Tensor]:
    """Drop instances without extent.

    Args:
        instances: with ``gt_boxes`` and perhaps ``gt_masks``.
        by_box: drop those whose box is not wider and higher than ``box_threshold`` pixels.
        by_mask: drop those with an empty mask, if there are masks.
        return_mask: also return which were kept, N bool.
    """
    if not (by_box or by_mask):
        raise AssertionError("filter_empty_instances: one of by_box and by_mask must be true.")
    kept = torch.ones(len(instances.gt_boxes), dtype=torch.bool)
    if by_box:
        kept &= instances.gt_boxes.nonempty(threshold=box_threshold)
    if by_mask and instances.has("gt_masks"):
        kept &= instances.gt_masks.nonempty()
    remaining = instances[kept]
    return (remaining, kept) if return_mask else remaining


def gen_crop_transform_with_instance(
    crop_size: tuple[int, int], image_size: tuple[int, int], instance: dict
) -> CropTransform:
    """Draw a crop that contains the centre of an instance.

    Args:
        crop_size, image_size: (height, width) in pixels.
        instance: annotation of the image, with "bbox" and "bbox_mode".
    """
    x0, y0, x1, y1 = get_bbox(instance)
    top = _draw_crop_start((y0 + y1) / 2, crop_size[0], image_size[0])
    left = _draw_crop_start((x0 + x1) / 2, crop_size[1], image_size[1])
    return CropTransform(left, top, int(crop_size[1]), int(crop_size[0]))


def _draw_crop_start(center: float, crop: int, size: int) -> int:
    """Along one axis of length ``size``, where a crop of length ``crop`` that covers ``center`` may begin."""
    if crop > size:
        raise AssertionError(f"A crop of {crop} pixels is larger than the image with {size}.")
    if center > size:
        raise AssertionError(f"The centre of the instance is at {center}, outside of an image of {size} pixels.")
    lowest = max(int(np.floor(center)) - crop, 0)
    highest = min(size - crop, int(np.ceil(center)))
    return int(np.random.randint(lowest, max(lowest, highest) + 1))


def get_fed_loss_cls_weights(dataset_names: str | list[str], freq_weight_power: float = 1.0) -> torch.Tensor:
    """Weights (K,) by which the federated loss draws classes: a power of the number of images that show each.

    The numbers are the metadata ``class_image_count``, alike in all data sets: ``{"id", "image_count"}`` a class.
    """
    names = [dataset_names] if isinstance(dataset_names, str) else list(dataset_names)
    check_metadata_consistency("class_image_count", names)
    counts = sorted(MetadataCatalog.get(names[0]).class_image_count, key=lambda entry: entry["id"])
    return torch.tensor([entry["image_count"] for entry in counts], dtype=torch.float32) ** freq_weight_power


def build_augmentation(cfg, is_train: bool) -> list[T.Augmentation]:
    """The default augmentations: resizing by the shorter side and, in training, a random flip.

    Cropping (``INPUT.CROP``) is not among them; the mapper puts it in front.
    """
    if not is_train:
        return [T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, "choice")]
    resize = T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING)
    flip = cfg.INPUT.RANDOM_FLIP
    if flip == "none":
        return [resize]
    if flip not in ("horizontal", "vertical"):
        raise ValueError(f"INPUT.RANDOM_FLIP must be 'horizontal', 'vertical' or 'none', got {flip!r}.")
    return [resize, T.RandomFlip(horizontal=flip == "horizontal", vertical=flip == "vertical")]


build_transform_gen = build_augmentation
