"""COCO files, the mapper, samplers and loaders on a data set made for the purpose."""

import itertools
import json

import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.data import (
    DatasetCatalog,
    DatasetFromList,
    DatasetMapper,
    MapDataset,
    MetadataCatalog,
    build_batch_data_loader,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
    samplers,
)
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.structures import BoxMode

TOLERANCE = 1e-4
SIZES = [(40, 60), (60, 40), (50, 50), (33, 71), (64, 48)]  # height, width
CATEGORIES = [{"id": 9, "name": "dog"}, {"id": 2, "name": "person"}, {"id": 4, "name": "cat"}]


def _write_image(path, height, width, seed):
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)
    path.write_bytes(b"P6 %d %d 255\n" % (width, height) + pixels.tobytes())


def _annotation(rng, number, image_id, height, width):
    x, y = rng.uniform(0, width / 2), rng.uniform(0, height / 2)
    w, h = rng.uniform(4, width / 2), rng.uniform(4, height / 2)
    visibility = rng.randint(0, 3, 5)
    points = np.stack([rng.randint(0, width, 5), rng.randint(0, height, 5), visibility], axis=1)
    triangle = [x, y, x + w, y, x + w / 2, y + h]
    return {
        "id": number,
        "image_id": image_id,
        "category_id": int(rng.choice([2, 4, 9])),
        "bbox": [x, y, w, h],
        "area": w * h,
        "iscrowd": 0,
        "segmentation": [triangle, [x, y, x + w, y, x + w, y + h, x, y + h]][: 1 + number % 2],
        "keypoints": points.ravel().tolist(),
        "score": float(rng.rand()),
    }


def _make_dataset(folder):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.RandomState(0)
    images, annotations = [], []
    for index, (height, width) in enumerate(SIZES):
        image_id = 100 - index
        _write_image(folder / f"{image_id}.ppm", height, width, seed=index)
        images.append({"id": image_id, "file_name": f"{image_id}.ppm", "height": height, "width": width})
        for _ in range(index):
            annotations.append(_annotation(rng, len(annotations) + 1, image_id, height, width))
    height, width = SIZES[2]
    runs = [300, 40, height * width - 340]
    annotations[2].update(iscrowd=1, segmentation={"size": [height, width], "counts": runs})
    annotations[4]["segmentation"] = [[1, 2, 3, 4], annotations[4]["segmentation"][0]]
    annotations[5]["segmentation"] = [[1, 2, 3, 4]]
    del annotations[6]["segmentation"]
    path = folder / "annotations.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES}))
    return str(path), str(folder)


def _plain(value):
    """Samples as json text with sorted keys; file names without their folder."""

    def default(item):
        return item.decode() if isinstance(item, bytes) else np.asarray(item).tolist()

    return json.dumps(value, sort_keys=True, default=default)


def _fields(prefix, sample, out):
    out[f"{prefix}/image"] = sample["image"].numpy()
    out[f"{prefix}/keys"] = sorted(sample)
    out[f"{prefix}/size"] = [sample["height"], sample["width"]]
    if "instances" not in sample:
        return
    instances = sample["instances"]
    out[f"{prefix}/fields"] = sorted(instances.get_fields())
    out[f"{prefix}/image_size"] = list(instances.image_size)
    out[f"{prefix}/boxes"] = instances.gt_boxes.tensor.numpy()
    out[f"{prefix}/classes"] = instances.gt_classes.numpy()
    if instances.has("gt_keypoints"):
        out[f"{prefix}/keypoints"] = instances.gt_keypoints.tensor.numpy()
    if instances.has("gt_masks"):
        masks = instances.gt_masks
        bits = masks.tensor if hasattr(masks, "tensor") else masks.crop_and_resize(instances.gt_boxes.tensor, 14)
        out[f"{prefix}/masks"] = bits.numpy().astype(np.uint8)


def _mapper_outputs(samples, out):
    flips = np.array([0, 2, 1, 4, 3])
    resize_and_flip = [T.ResizeShortestEdge((30, 45), 90, "range"), T.RandomFlip()]
    crop = T.RandomCrop("relative_range", (0.8, 0.8))
    variants = {
        "boxes": {},
        "polygons": {"use_instance_mask": True},
        "bitmasks": {"use_instance_mask": True, "instance_mask_format": "bitmask", "recompute_boxes": True},
        "keypoints": {"use_keypoint": True, "keypoint_hflip_indices": flips},
        "all": {
            "use_instance_mask": True,
            "use_keypoint": True,
            "keypoint_hflip_indices": flips,
            "recompute_boxes": True,
        },
    }
    samples = [dict(s, annotations=[a for a in s["annotations"] if "segmentation" in a]) for s in samples]
    for name, options in variants.items():
        # crops of polygons are in masks_keypoints
        augmentations = resize_and_flip if options.get("use_instance_mask") else [crop, *resize_and_flip]
        for is_train in (True, False):
            mapper = DatasetMapper(is_train, augmentations=augmentations, image_format="BGR", **options)
            np.random.seed(3)
            for sample in samples:
                if options.get("recompute_boxes") and not sample["annotations"]:
                    continue
                key = f"mapper/{name}/{'train' if is_train else 'test'}/{sample['image_id']}"
                _fields(key, mapper(sample), out)


def _loader_outputs(name, out):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = (name,)
    cfg.DATASETS.TEST = (name,)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.INPUT.MIN_SIZE_TRAIN = (24, 40)
    cfg.INPUT.MIN_SIZE_TEST = 32
    cfg.INPUT.CROP.ENABLED = True
    for sampler in ("TrainingSampler", "RepeatFactorTrainingSampler"):
        cfg.DATALOADER.SAMPLER_TRAIN = sampler
        cfg.DATALOADER.REPEAT_THRESHOLD = 0.6
        cfg.SEED = -1 if sampler == "TrainingSampler" else 3
        np.random.seed(11)
        loader = build_detection_train_loader(cfg)
        for step, batch in enumerate(itertools.islice(loader, 4)):
            for place, sample in enumerate(batch):
                _fields(f"loader/{sampler}/{step}/{place}", sample, out)
    test_loader = build_detection_test_loader(cfg, name)
    out["loader/test/length"] = len(test_loader)
    for batch in test_loader:
        _fields(f"loader/test/{batch[0]['image_id']}", batch[0], out)


def _streams(out):
    def head(sampler, n=25):
        return [int(i) for i in itertools.islice(iter(sampler), n)]

    out["sampler/training"] = head(samplers.TrainingSampler(7, seed=5))
    out["sampler/ordered"] = head(samplers.TrainingSampler(7, shuffle=False, seed=5))
    out["sampler/subset"] = head(samplers.RandomSubsetTrainingSampler(9, 0.5, seed_shuffle=1, seed_subset=2))
    factors = torch.tensor([1.0, 1.5, 2.25, 1.0])
    out["sampler/repeat"] = head(samplers.RepeatFactorTrainingSampler(factors, seed=8))
    out["sampler/repeat_ordered"] = head(samplers.RepeatFactorTrainingSampler(factors, shuffle=False, seed=8))
    np.random.seed(0)
    out["sampler/own_seed"] = head(samplers.TrainingSampler(20))
    out["sampler/inference"] = head(samplers.InferenceSampler(6))

    numbers = [{"i": i, "width": 1 + i % 3, "height": 2} for i in range(11)]
    mapped = MapDataset(DatasetFromList(numbers), lambda s: None if s["i"] in (2, 3, 7) else s)
    out["map/fallback"] = [mapped[i]["i"] for i in (0, 2, 3, 7, 2, 10)]
    for workers in (0, 2):
        for grouped in (False, True):
            loader = build_batch_data_loader(
                DatasetFromList(numbers),
                samplers.TrainingSampler(11, seed=1),
                3,
                aspect_ratio_grouping=grouped,
                num_workers=workers,
            )
            batches = itertools.islice(iter(loader), 5)
            key = f"batches/{workers}_workers/{'grouped' if grouped else 'plain'}"
            out[key] = [[s["i"] for s in batch] for batch in batches]
    np.random.seed(1)
    torch.manual_seed(1)
    loader = build_batch_data_loader(
        MapDataset(DatasetFromList(numbers), _random_numbers),
        samplers.TrainingSampler(11, seed=1),
        2,
        num_workers=2,
        seed=4,
    )
    out["workers/random_numbers"] = np.array(list(itertools.islice(iter(loader), 4)))


def _random_numbers(sample):
    return [float(np.random.rand()), float(torch.rand(()))]


def _metadata(out):
    for name in ("coco_2017_train", "coco_2014_minival", "keypoints_coco_2017_val_100", "coco_2017_test-dev"):
        facts = MetadataCatalog.get(name).as_dict()
        out[f"metadata/{name}"] = _plain({key: str(value) for key, value in facts.items()})
        out[f"metadata/{name}/registered"] = str(name in DatasetCatalog.list())
    out["metadata/flips"] = utils.create_keypoint_hflip_indices("keypoints_coco_2017_train")


def _crops_around_instances(out):
    np.random.seed(2)
    rng = np.random.RandomState(3)
    rows = []
    for _ in range(60):
        x, y = rng.uniform(0, 50), rng.uniform(0, 30)
        box = {"bbox": [x, y, rng.uniform(0, 20), rng.uniform(0, 20)], "bbox_mode": BoxMode.XYWH_ABS}
        crop = utils.gen_crop_transform_with_instance((12, 15), (40, 60), box)
        rows.append([int(v) for v in (crop.x0, crop.y0, crop.w, crop.h)])
    out["crop_with_instance"] = np.array(rows)


def _image_formats(path, out):
    for name in ("RGB", "BGR", "L", "HSV", "YCbCr", "YUV-BT.601", "LAB", "CMYK", "RGBX"):
        out[f"format/{name}/read"] = read = np.ascontiguousarray(utils.read_image(path, name))
        out[f"format/{name}/back"] = utils.convert_image_to_rgb(read, name)
        out[f"format/{name}/back from tensor"] = utils.convert_image_to_rgb(torch.from_numpy(read), name)


def probe(workdir):
    out = {}
    json_file, root = _make_dataset(workdir / "parity_images")
    out["coco/raw"] = _plain(load_coco_json(json_file, "images"))
    name = "parity_data"
    register_coco_instances(name, {}, json_file, root)
    samples = load_coco_json(json_file, root, name, ["score"])
    out["coco/mapped"] = _plain([dict(s, file_name=s["file_name"][len(root) :]) for s in samples])
    out["coco/classes"] = MetadataCatalog.get(name).thing_classes
    out["coco/id_map"] = str(MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id)
    converted = convert_to_coco_dict(name)
    out["coco/converted/categories"] = _plain(converted["categories"])
    out["coco/converted/areas"] = np.array([anno.pop("area") for anno in converted["annotations"]])
    out["coco/converted/annotations"] = _plain(converted["annotations"])
    out["coco/converted/images"] = _plain([dict(i, file_name="") for i in converted["images"]])
    for options in ({}, {"filter_empty": False}, {"min_keypoints": 9}):
        out[f"dicts/{options}"] = [s["image_id"] for s in get_detection_dataset_dicts(name, **options)]
    _mapper_outputs(samples, out)
    _loader_outputs(name, out)
    _streams(out)
    _metadata(out)
    _crops_around_instances(out)
    _image_formats(samples[0]["file_name"], out)
    return out
