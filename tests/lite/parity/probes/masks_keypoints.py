"""Mask and keypoint heads with equal weights and inputs, pasted masks, decoded keypoints, and the way of a record with
polygons, run lengths and keypoints through the data loader."""

import json

import cv2
import numpy as np
import pycocotools.mask as coco_mask
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data import transforms as T
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.layers import ShapeSpec
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.modeling.roi_heads import build_keypoint_head, build_mask_head
from detectron2.modeling.roi_heads.keypoint_head import keypoint_rcnn_loss
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_loss
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks, ROIMasks
from detectron2.utils.events import EventStorage

TOLERANCE = 1e-5
SIZES = [(90, 120), (75, 101), (64, 64)]
COUNTS = [5, 0, 3]
SHAPE = ShapeSpec(channels=6, width=7, height=7)


def random_boxes(g, count, size):
    corner = torch.rand(count, 2, generator=g) * (min(size) / 2)
    return torch.cat((corner, corner + 3 + torch.rand(count, 2, generator=g) * (min(size) / 2)), dim=1)


def star(g, box, corners=9):
    """A polygon around the middle of a box, partly outside of it."""
    middle, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2
    angle = torch.arange(corners) * (2 * np.pi / corners)
    radius = 0.4 + 0.8 * torch.rand(corners, generator=g)
    points = middle + half * torch.stack((angle.cos(), angle.sin()), dim=1) * radius[:, None]
    return points.double().flatten().numpy()


def matched(bitmasks):
    """Proposals of three images, the second without any, with all that heads are trained on."""
    g = torch.Generator().manual_seed(5)
    found = []
    for size, count in zip(SIZES, COUNTS):
        gt = random_boxes(g, count, size)
        masks = PolygonMasks([[star(g, box) for _ in range(1 + i % 2)] for i, box in enumerate(gt)])
        if bitmasks:
            masks = BitMasks.from_polygon_masks(masks, *size)
        points = torch.cat((
            gt[:, None, :2] + torch.rand(count, 4, 2, generator=g) * (gt[:, None, 2:] - gt[:, None, :2]),
            torch.randint(0, 3, (count, 4, 1), generator=g).float(),
        ), dim=2)
        fields = {"gt_masks": masks, "gt_classes": torch.randint(0, 3, (count,), generator=g)}
        moved = Boxes(gt + torch.randn(count, 4, generator=g))
        found.append(Instances(size, proposal_boxes=moved, gt_keypoints=Keypoints(points), **fields))
    return found


def detections():
    g = torch.Generator().manual_seed(6)
    found = []
    for size, count in zip(SIZES, COUNTS):
        boxes = random_boxes(g, count, size)
        boxes[2:3, 2] = boxes[2:3, 0] + 0.3  # narrower than a pixel
        classes = torch.randint(0, 3, (count,), generator=g)
        scores = torch.rand(count, generator=g)
        found.append(Instances(size, pred_boxes=Boxes(boxes), pred_classes=classes, scores=scores))
    return found


def train(out, name, head, loss_of, instances):
    torch.manual_seed(3)
    x = torch.randn(sum(map(len, instances)), 6, 7, 7).requires_grad_()
    head.train().zero_grad()
    with EventStorage() as storage:
        losses = head(x, instances)
    (loss,) = losses.values()
    gradients = torch.autograd.grad(loss, [*head.parameters(), x], allow_unused=True)
    out[f"{name}.losses"] = {key: value.detach() for key, value in losses.items()}
    # Scaled up: the gradients of a few cells in a mean over thousands are far below one.
    out[f"{name}.gradients"] = [None if x is None else x * 1000 for x in gradients]
    skipped = storage.latest().get("kpts_num_skipped_batches")
    out[f"{name}.logged"] = {k: v[0] for k, v in storage.latest().items() if k != "kpts_num_skipped_batches"}
    out[f"{name}.skipped"] = skipped is not None
    out[f"{name}.hints"] = {key: int(value) for key, value in storage.smoothing_hints().items()}
    with EventStorage():
        out[f"{name}.loss of logits"] = loss_of(head.layers(x), instances).detach()


def describe(out, name, head):
    out[f"{name}.state_dict"] = [[k, list(v.shape)] for k, v in head.state_dict().items()]
    out[f"{name}.drawn"] = [float(v.double().sum()) for v in head.state_dict().values()]
    out[f"{name}.generator"] = float(torch.rand(()))
    # The predictors start near zero.
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(8 if parameter.abs().max() < 0.01 else 1).add_(0.01)


def mask_heads(out):
    variants = {
        "plain": {}, "agnostic": {"CLS_AGNOSTIC_MASK": True}, "GN": {"NORM": "GN", "CONV_DIM": 32},
        "BN": {"NORM": "BN"}, "no convolutions": {"NUM_CONV": 0},
    }
    for variant, changes in variants.items():
        cfg = get_cfg()
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
        node = cfg.MODEL.ROI_MASK_HEAD
        node.NAME, node.NUM_CONV, node.CONV_DIM = "MaskRCNNConvUpsampleHead", 2, 8
        for key, value in changes.items():
            node[key] = value
        torch.manual_seed(1)
        head = build_mask_head(cfg, SHAPE)
        name = f"mask.{variant}"
        describe(out, name, head)
        for bitmasks in (False, True):
            case = f"{name}.{'bitmasks' if bitmasks else 'polygons'}"
            train(out, case, head, mask_rcnn_loss, matched(bitmasks))
        train(out, f"{name}.nothing", head, mask_rcnn_loss, [x[:0] for x in matched(False)])
        head.eval()
        torch.manual_seed(4)
        found = head(torch.randn(sum(COUNTS), 6, 7, 7), detections())
        out[f"{name}.predicted"] = [x.pred_masks for x in found]
        none = head(torch.randn(0, 6, 7, 7), [x[:0] for x in detections()])
        out[f"{name}.predicted.nothing"] = [list(x.pred_masks.shape) for x in none]
        out[f"{name}.images"] = [image(x, 1.0) for x in found] + [image(x, 1.7) for x in found]


def keypoint_heads(out):
    for variant, changes in {
        "visible": {}, "static": {"NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS": False}, "weighted": {"LOSS_WEIGHT": 3.0},
        "no convolutions": {"CONV_DIMS": ()},
    }.items():
        cfg = get_cfg()
        cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 4
        node = cfg.MODEL.ROI_KEYPOINT_HEAD
        node.CONV_DIMS, node.NUM_KEYPOINTS = (8, 10), 4
        for key, value in changes.items():
            node[key] = value
        torch.manual_seed(1)
        head = build_keypoint_head(cfg, SHAPE)
        name = f"keypoints.{variant}"
        describe(out, name, head)
        out[f"{name}.normalizer"] = head.loss_normalizer
        instances = matched(False)
        hidden = [Instances(x.image_size, **x.get_fields()) for x in instances]
        for x in hidden:
            x.gt_keypoints = Keypoints(x.gt_keypoints.tensor * torch.tensor([1.0, 1, 0]))
        for case, batch in {"train": instances, "hidden": hidden, "nothing": [x[:0] for x in instances]}.items():
            for normalizer in (None, 7.5):
                train(
                    out, f"{name}.{case}.{normalizer}", head,
                    lambda maps, x, n=normalizer: keypoint_rcnn_loss(maps, x, n), batch,
                )
        head.eval()
        torch.manual_seed(4)
        found = head(torch.randn(sum(COUNTS), 6, 7, 7), detections())
        out[f"{name}.predicted"] = [x.pred_keypoints for x in found]
        out[f"{name}.heatmaps"] = [x.pred_keypoint_heatmaps for x in found]
        none = head(torch.randn(0, 6, 7, 7), [x[:0] for x in detections()])
        out[f"{name}.predicted.nothing"] = [
            [list(x.pred_keypoints.shape), list(x.pred_keypoint_heatmaps.shape)] for x in none
        ]
        out[f"{name}.images"] = [image(x, 0.6) for x in found]


def image(found, scale):
    """Detections as they are reported: in pixels of the image, in COCO's format."""
    height, width = (int(side * scale) for side in found.image_size)
    result = detector_postprocess(found, height, width)
    answer = {"boxes": result.pred_boxes.tensor, "scores": result.scores, "size": list(result.image_size)}
    if result.has("pred_masks"):
        answer["masks"] = result.pred_masks
    if result.has("pred_keypoints"):
        # Of its own: conversion to json may change the result in place.
        answer["keypoints"] = result.pred_keypoints.clone()
    answer["json"] = instances_to_coco_json(result, 1)
    return answer


def pasting(out):
    g = torch.Generator().manual_seed(9)
    boxes = random_boxes(g, 6, (60, 80))
    boxes[1] -= 12  # partly outside
    masks = torch.rand(6, 1, 28, 28, generator=g)
    for name, given in {"tensor": masks, "roi_masks": ROIMasks(masks[:, 0])}.items():
        for threshold in (0.2, 0.5, 0.8):
            found = Instances((60, 80), pred_boxes=Boxes(boxes.clone()), pred_masks=given)
            out[f"paste.{name}.{threshold}"] = detector_postprocess(found, 99, 123, threshold).pred_masks


# ---------------------------------------------------------------------------------------------------------- data


def write_dataset(folder):
    """Three images with polygons, one with run lengths, one of people whose keypoints are all hidden."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.RandomState(4)
    images, annotations = [], []
    for image_id, (height, width) in enumerate([(40, 60), (61, 45), (50, 50), (40, 40)]):
        cv2.imwrite(str(folder / f"{image_id}.png"), rng.randint(0, 256, (height, width, 3)).astype(np.uint8))
        images.append({"id": image_id, "file_name": f"{image_id}.png", "height": height, "width": width})
        for number in range(3):
            corner = rng.uniform((0, 0), (width / 2, height / 2))
            size = rng.uniform((8, 8), (width / 2, height / 2))
            angle = np.arange(10) * (2 * np.pi / 10)
            radius = rng.uniform(0.3, 1, (10, 1))  # not convex, so a crop can cut it into pieces
            points = corner + size / 2 * (1 + radius * np.stack((np.cos(angle), np.sin(angle)), axis=1))
            polygons = [points.ravel().tolist()]
            if number == 1:
                polygons.append([*corner, corner[0] + 4.0, corner[1], *(corner + 3.0)])
            visible = rng.randint(0, 3, 5) * (image_id != 3)
            keypoints = np.column_stack((rng.uniform((0, 0), (width, height), (5, 2)), visible))
            segmentation = polygons
            if image_id == 2:
                code = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
                segmentation = {"size": code["size"], "counts": code["counts"].decode()}
            annotations.append({
                "id": len(annotations) + 1, "image_id": image_id, "category_id": 1, "iscrowd": int(number == 2),
                "bbox": [*corner.tolist(), *size.tolist()], "area": float(size.prod()), "segmentation": segmentation,
                "keypoints": keypoints.ravel().tolist(), "num_keypoints": int((visible > 0).sum()),
            })
    names = [f"k{i}" for i in range(5)]
    categories = [{"id": 1, "name": "person", "keypoints": names, "skeleton": []}]
    path = folder / "annotations.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return str(path), str(folder), names


def sample_fields(sample):
    instances = sample["instances"]
    values = {"image": sample["image"], "boxes": instances.gt_boxes.tensor, "classes": instances.gt_classes}
    if instances.has("gt_masks"):
        masks = instances.gt_masks
        if isinstance(masks, PolygonMasks):
            values["polygons"] = [[np.asarray(p) for p in polygons] for polygons in masks.polygons]
            values["area"] = masks.area()
            masks = BitMasks.from_polygon_masks(masks, *instances.image_size)
        values["masks"] = masks.tensor
        values["tight boxes"] = masks.get_bounding_boxes().tensor
    if instances.has("gt_keypoints"):
        values["keypoints"] = instances.gt_keypoints.tensor
    return values


def mapping(out, workdir):
    json_file, root, names = write_dataset(workdir / "masks_keypoints")
    register_coco_instances("parity_people", {}, json_file, root)
    flips = [("k1", "k2"), ("k3", "k4")]
    MetadataCatalog.get("parity_people").set(keypoint_names=names, keypoint_flip_map=flips)
    for minimum in (0, 1, 5):
        samples = get_detection_dataset_dicts("parity_people", min_keypoints=minimum)
        out[f"dicts.{minimum}"] = [x["image_id"] for x in samples]
    samples = get_detection_dataset_dicts("parity_people")
    augmentations = {
        "flip": [T.RandomFlip(1.0)], "resize": [T.ResizeShortestEdge((25, 80), 120, "range")],
        "flip and resize": [T.ResizeShortestEdge((30, 50), 90, "choice"), T.RandomFlip(0.5)],
        "vertical": [T.RandomFlip(1.0, horizontal=False, vertical=True)],
        "crop": [T.RandomCrop("relative_range", (0.5, 0.5)), T.RandomFlip(0.5)],
        "large scale": [T.ResizeScale(0.6, 1.8, 64, 64), T.FixedSizeCrop((64, 64))],
        "rotation": [T.RotationTransform(*SIZES[0], 0), T.RandomRotation((-50, 50)), T.RandomFlip(0.5)],
        "rotation in place": [T.RandomRotation((-30, 30), expand=False)],
        "extent": [T.RandomExtent((0.6, 1.3), (0.2, 0.2))],
        "colors": [T.RandomBrightness(0.5, 1.5), T.RandomSaturation(0.5, 1.5), T.RandomLighting(5.0)],
    }
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("parity_people",)
    cfg.MODEL.MASK_ON = cfg.MODEL.KEYPOINT_ON = True
    for mask_format in ("polygon", "bitmask"):
        cfg.INPUT.MASK_FORMAT = mask_format
        for name, steps in augmentations.items():
            for recompute in (False, True):
                mapper = DatasetMapper(cfg, True, augmentations=steps, recompute_boxes=recompute)
                np.random.seed(8)
                for sample in samples:
                    run_lengths = isinstance(sample["annotations"][0]["segmentation"], dict)
                    if run_lengths and mask_format == "polygon":
                        continue
                    for draw in range(3):
                        key = f"map.{mask_format}.{name}.{recompute}.{sample['image_id']}.{draw}"
                        out[key] = sample_fields(mapper(sample))


def probe(workdir):
    out = {}
    mask_heads(out)
    keypoint_heads(out)
    pasting(out)
    mapping(out, workdir)
    return out
