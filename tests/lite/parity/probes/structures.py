"""Boxes, masks, keypoints, instances and image lists on random inputs."""

import pathlib

import numpy as np
import torch
from detectron2.structures import (
    BitMasks,
    Boxes,
    BoxMode,
    ImageList,
    Instances,
    Keypoints,
    PolygonMasks,
    ROIMasks,
    heatmaps_to_keypoints,
    pairwise_ioa,
    pairwise_iou,
    pairwise_point_box_distance,
    polygons_to_bitmask,
)
from detectron2.structures.boxes import matched_pairwise_iou, pairwise_intersection
from detectron2.structures.masks import polygon_area

TOLERANCE = 1e-5


def probe(workdir: pathlib.Path) -> dict:
    torch.set_num_threads(1)
    out = {}
    for part in (_boxes, _box_modes, _bitmasks, _polygons, _keypoints, _instances, _image_lists):
        rng = np.random.default_rng(7)
        out.update({f"{part.__name__[1:]}.{k}": v for k, v in part(rng).items()})
    return out


def _random_boxes(rng, count, size=60.0):
    corners = rng.uniform(-5, size, (count, 2, 2))
    return np.concatenate([corners.min(1), corners.max(1)], axis=1).astype(np.float32)


def _boxes(rng):
    a, b = (Boxes(torch.from_numpy(_random_boxes(rng, n))) for n in (9, 7))
    a.tensor[3, 2] = a.tensor[3, 0]  # zero width
    clipped, scaled = a.clone(), a.clone()
    clipped.clip((40, 30))
    scaled.scale(1.5, 0.25)
    points = torch.from_numpy(rng.uniform(0, 50, (5, 2)).astype(np.float32))
    return {
        "area": a.area(),
        "centers": a.get_centers(),
        "clipped": clipped.tensor,
        "scaled": scaled.tensor,
        "nonempty": a.nonempty(),
        "nonempty_5": a.nonempty(threshold=5),
        "inside": a.inside_box((50, 45)),
        "inside_3": a.inside_box((50, 45), 3),
        "cat": Boxes.cat([a, b]).tensor,
        "cat_of_none": Boxes.cat([]).tensor,
        "index_int": a[-2].tensor,
        "index_slice": a[1::3].tensor,
        "index_mask": a[a.nonempty()].tensor,
        "index_rows": a[torch.tensor([4, 0, 4])].tensor,
        "from_ints": Boxes(torch.tensor([[1, 2, 3, 4]])).tensor,
        "dtypes": [str(Boxes(torch.zeros(1, 4, dtype=t)).tensor.dtype) for t in (torch.float64, torch.int64)],
        "iou": pairwise_iou(a, b),
        "iou_self": pairwise_iou(a, a),
        "ioa": pairwise_ioa(a, b),
        "intersection": pairwise_intersection(a, b),
        "matched_iou": matched_pairwise_iou(b, Boxes(a.tensor[:7] + 4)),
        "iou_with_none": list(pairwise_iou(a, Boxes(torch.zeros(0, 4))).shape),
        "point_distance": pairwise_point_box_distance(points, a),
        "repr": repr(Boxes(torch.tensor([[1.0, 2, 3, 4]]))),
    }


def _box_modes(rng):
    xyxy, xywh = BoxMode.XYXY_ABS, BoxMode.XYWH_ABS
    array = _random_boxes(rng, 4).astype(np.float64)
    out = {"values": [f"{m.name}={int(m)}" for m in BoxMode]}
    for name, pair in {"to_xywh": (xyxy, xywh), "to_xyxy": (xywh, xyxy)}.items():
        out[f"{name}.array"] = BoxMode.convert(array, *pair)
        out[f"{name}.tensor"] = BoxMode.convert(torch.from_numpy(array), *pair)
        out[f"{name}.float32"] = str(BoxMode.convert(array.astype(np.float32), *pair).dtype)
        out[f"{name}.list"] = np.asarray(BoxMode.convert([3.5, 4.25, 9.0, 20.0], *pair))
        out[f"{name}.tuple_type"] = type(BoxMode.convert((3, 4, 9, 20), *pair)).__name__
        out[f"{name}.tuple"] = list(BoxMode.convert((3, 4, 9, 20), *pair))
    return out


def _bitmasks(rng):
    masks = rng.random((5, 24, 32)) > 0.9
    masks[2] = False
    masks[3] = False
    masks[3, 4:17, 8:29] = True
    bitmasks = BitMasks(torch.from_numpy(masks))
    boxes = torch.from_numpy(_random_boxes(rng, 5, size=30))
    roi_masks = ROIMasks(torch.from_numpy(rng.random((5, 14, 14)).astype(np.float32)))
    return {
        "nonempty": bitmasks.nonempty(),
        "boxes": bitmasks.get_bounding_boxes().tensor,
        "crop": bitmasks.crop_and_resize(boxes, 14),
        "crop_whole": bitmasks.crop_and_resize(torch.tensor([[0.0, 0, 32, 24]] * 5), 7),
        "cat": BitMasks.cat([bitmasks, bitmasks[:2]]).tensor,
        "index_int": bitmasks[3].tensor,
        "index_mask": bitmasks[bitmasks.nonempty()].tensor,
        "size": list(bitmasks.image_size),
        "repr": repr(bitmasks),
        "roi_masks": roi_masks.to_bitmasks(Boxes(boxes), 24, 32).tensor,
        "roi_masks_0.7": roi_masks.to_bitmasks(Boxes(boxes), 24, 32, 0.7).tensor,
        "roi_mask_index": roi_masks[torch.tensor([1, 3])].tensor,
    }


def _random_polygon(rng, center, radius, vertices):
    angles = np.sort(rng.uniform(0, 2 * np.pi, vertices))
    spokes = radius * rng.uniform(0.4, 1.0, vertices)
    return np.stack(
        [center[0] + spokes * np.cos(angles), center[1] + spokes * np.sin(angles)], axis=1
    ).ravel()


def _whole_pixels(rng):
    """Corners on whole pixels, in boxes of whole pixels, lie where the rasterizer rounds."""
    shapes = [[np.rint(_random_polygon(rng, rng.uniform(30, 60, 2), rng.uniform(8, 30), 7))] for _ in range(60)]
    masks = PolygonMasks(shapes)
    return masks.crop_and_resize(masks.get_bounding_boxes().tensor, 28)


def _polygons(rng):
    instances = [
        [_random_polygon(rng, rng.uniform(10, 40, 2), rng.uniform(3, 18), 8) for _ in range(parts)]
        for parts in (1, 2, 1, 3, 1, 1)
    ]
    masks = PolygonMasks(instances)
    tight = masks.get_bounding_boxes().tensor
    shifted = tight + torch.from_numpy(rng.uniform(-4, 4, tuple(tight.shape)).astype(np.float32))
    flat = tight.clone()
    flat[:, 2] = flat[:, 0] + torch.tensor([0.0, 0.01, 0.09, 0.11, 0.5, 1.0])
    return {
        "area": masks.area(),
        "shoelace": polygon_area(np.array([0.0, 4, 4, 1]), np.array([0.0, 0, 3, 5])),
        "boxes": tight,
        "boxes_outside": PolygonMasks([[p - 40 for p in parts] for parts in instances]).get_bounding_boxes().tensor,
        "nonempty": masks.nonempty(),
        "raster": np.stack([polygons_to_bitmask(p, 48, 52) for p in instances]),
        "bitmasks": BitMasks.from_polygon_masks(masks, 48, 52).tensor,
        "bitmasks_of_lists": BitMasks.from_polygon_masks(instances, 20, 30).tensor,
        "crop_tight": masks.crop_and_resize(tight, 28),
        "crop_shifted": masks.crop_and_resize(shifted, 14),
        "crop_flat": masks.crop_and_resize(flat, 14),
        "crop_whole_pixels": _whole_pixels(rng),
        "index_mask": masks[torch.tensor([True, False] * 3)].area(),
        "index_rows": masks[torch.tensor([5, 0])].area(),
        "index_slice": masks[2:4].area(),
        "index_int": masks[-1].area(),
        "index_list": masks[[1, 2]].area(),
        "cat": PolygonMasks.cat([masks, masks[:1]]).area(),
        "repr": repr(masks),
    }


def _keypoints(rng):
    boxes = torch.from_numpy(_random_boxes(rng, 6))
    raw = np.concatenate([rng.uniform(-5, 60, (6, 17, 2)), rng.integers(0, 3, (6, 17, 1))], axis=2)
    raw[0, 0, :2], raw[0, 1, :2], raw[0, 2, :2] = boxes[0, :2], boxes[0, 2:], boxes[0, [0, 3]]
    raw[0, :3, 2] = 2
    keypoints = Keypoints(raw)
    cells, valid = keypoints.to_heatmap(boxes, 56)
    maps = torch.from_numpy(rng.normal(size=(6, 4, 14, 14)).astype(np.float32))
    boxes[5] = torch.tensor([10.0, 10.0, 10.2, 30.5])  # narrower than a pixel
    return {
        "cells": cells,
        "valid": valid,
        "cat": Keypoints.cat([keypoints, keypoints[2:4]]).tensor,
        "index": keypoints[torch.tensor([3, 1])].tensor,
        "dtype": str(keypoints.tensor.dtype),
        "repr": repr(keypoints),
        "decoded": heatmaps_to_keypoints(maps, boxes),
        "decoded_none": list(heatmaps_to_keypoints(maps[:0], boxes[:0]).shape),
    }


def _instances(rng):
    def make(count):
        x = Instances((30, 40))
        x.gt_boxes = Boxes(torch.from_numpy(_random_boxes(rng, count)))
        x.gt_classes = torch.from_numpy(rng.integers(0, 9, count))
        x.set("names", [f"n{i}" for i in range(count)])
        return x

    a, b = make(4), make(3)
    joined = Instances.cat([a, b])
    picked = joined[2]
    moved = Instances((30, 40), classes=torch.arange(4)).to(torch.float64)
    some = Instances((30, 40), classes=torch.arange(4), boxes=a.gt_boxes)[
        torch.tensor([True, False, True, False])
    ]
    return {
        "length": len(joined),
        "boxes": joined.gt_boxes.tensor,
        "classes": joined.gt_classes,
        "names": joined.names,
        "picked": picked.gt_boxes.tensor,
        "picked_names": picked.names,
        "last": joined[-1].gt_classes,
        "slice": joined[1:4].names,
        "masked": some.boxes.tensor,
        "fields": list(joined.get_fields()),
        "size": list(joined.image_size),
        "has": [str(joined.has(n)) for n in ("names", "scores")],
        "dtype": str(moved.classes.dtype),
        "repr": repr(Instances((3, 4), classes=torch.arange(2), names=["a", "b"])),
    }


def _image_lists(rng):
    images = [
        torch.from_numpy(rng.random((3, h, w)).astype(np.float32)) for h, w in ((9, 13), (12, 6), (10, 10))
    ]
    out = {}
    options = {
        "plain": {},
        "divisible": {"size_divisibility": 8},
        "filled": {"size_divisibility": 5, "pad_value": 0.5},
        "constraint": {"size_divisibility": 2, "padding_constraints": {"size_divisibility": 16}},
        "square": {"padding_constraints": {"square_size": 20}},
        "square_divisible": {"padding_constraints": {"square_size": 20, "size_divisibility": 16}},
        "no_square": {"size_divisibility": 4, "padding_constraints": {"square_size": 0}},
    }
    for name, kwargs in options.items():
        batch = ImageList.from_tensors(images, **kwargs)
        out[name] = batch.tensor
        out[f"{name}.sizes"] = np.asarray(batch.image_sizes)
        out[f"{name}.second"] = batch[1]
        out[f"{name}.single"] = ImageList.from_tensors(images[:1], **kwargs).tensor
    out["length"] = len(ImageList.from_tensors(images))
    out["gray"] = ImageList.from_tensors([image[0] for image in images], 4).tensor
    out["bytes"] = ImageList.from_tensors([(i * 255).byte() for i in images], 4, 7).tensor
    return out
