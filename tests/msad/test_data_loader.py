"""The training loader: batch i is a function of (data, seed, i)."""

import itertools
import logging
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.utils import comm

from msad.config import add_msad_config
from msad.data import build_train_loader, make_dataset, register_datasets, register_entries
from msad.data.loader import MAX_CONSECUTIVE_FAILURES, TrainLoader, seeded
from msad.data.mappers import inference_mapper


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    make_dataset(folder, num_train=9, num_val=1, size=(48, 64), seed=3, objects=(3, 5), min_size=5)
    return folder


@pytest.fixture
def cfg(root):
    cfg = add_msad_config(get_cfg())
    cfg.DATASETS.REGISTER = register_entries(root, "loader_test")
    cfg.DATASETS.TRAIN = ("loader_test_train",)
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.RETINANET.NUM_CLASSES = 6
    cfg.INPUT.MIN_SIZE_TRAIN = (40, 48, 56)
    cfg.INPUT.CROP.ENABLED = True
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.DATALOADER.NUM_WORKERS = 0
    register_datasets(cfg)
    yield cfg
    for name in [n for n in DatasetCatalog.list() if n.startswith("loader_test")]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def _take(loader, count):
    return list(itertools.islice(loader, count))


def _assert_equal(first, second):
    assert len(first) == len(second)
    for a, b in zip(itertools.chain(*first), itertools.chain(*second)):
        assert a["file_name"] == b["file_name"] and a["skipped"] == b["skipped"]
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)
        assert torch.equal(a["instances"].gt_classes, b["instances"].gt_classes)


def _records(count, wide=()):
    return [{"file_name": str(i), "width": 3 if i in wide else 2, "height": 2} for i in range(count)]


def _draw(record):
    """A mapper that draws from every generator that it may draw from."""
    return {"index": int(record["file_name"]), "draws": (random.random(), np.random.rand(), torch.rand(1).item())}


def test_batches_are_repeatable_and_resumable_for_any_number_of_workers(cfg):
    reference = _take(build_train_loader(cfg, seed=11), 8)
    assert len({d["image"].shape for batch in reference for d in batch}) > 1, "augmentation is on"
    for workers, start in ((0, 0), (0, 5), (2, 0), (2, 3)):
        cfg.DATALOADER.NUM_WORKERS = workers
        loader = build_train_loader(cfg, seed=11, start_iter=start)
        # what the process drew before must not matter
        random.random(), np.random.rand(), torch.rand(3)
        _assert_equal(_take(loader, 8 - start), reference[start:])


def test_another_seed_is_another_order_and_other_augmentations():
    first, second = (_take(TrainLoader(_records(6), _draw, 3, seed=s), 4) for s in (0, 1))
    assert [d["index"] for b in first for d in b] != [d["index"] for b in second for d in b]
    draws = [d["draws"] for batch in first + second for d in batch]
    assert len(set(draws)) == len(draws)
    assert all(len(set(values)) == len(values) for values in zip(*draws))


def test_start_iter_and_seed_can_be_set_until_the_first_batch():
    reference = _take(TrainLoader(_records(5), _draw, 2, seed=4), 6)
    loader = TrainLoader(_records(5), _draw, 2, seed=0)
    batches = iter(loader)
    loader.start_iter, loader.seed = 4, 4
    assert list(itertools.islice(batches, 2)) == reference[4:]
    for name in ("start_iter", "seed"):
        with pytest.raises(RuntimeError, match=f"started; {name} cannot be changed"):
            setattr(loader, name, 1)
    for name in ("start_iter", "seed"):
        with pytest.raises(ValueError, match=f"{name} .* must not be negative, got -1"):
            setattr(TrainLoader(_records(2), _draw, 1, seed=0), name, -1)


def test_fast_forward_loads_no_image():
    loaded = []
    loader = TrainLoader(_records(5), lambda r: loaded.append(r) or {}, 2, seed=0, start_iter=1000)
    next(iter(loader))
    assert len(loaded) == 2


def test_an_epoch_sees_every_image_once():
    batches = _take(TrainLoader(_records(6), _draw, 2, seed=0), 6)
    indices = [d["index"] for batch in batches for d in batch]
    assert sorted(indices[:6]) == sorted(indices[6:]) == list(range(6))


def test_the_generators_of_the_process_are_left_alone():
    for seed_all in (random.seed, np.random.seed, torch.manual_seed):
        seed_all(0)
    expected = (random.random(), np.random.rand(), torch.rand(1).item())
    for seed_all in (random.seed, np.random.seed, torch.manual_seed):
        seed_all(0)
    _take(TrainLoader(_records(4), _draw, 2, seed=9), 3)
    with pytest.raises(KeyError), seeded(1):
        raise KeyError
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_wide_and_tall_images_do_not_share_a_batch():
    wide = {0, 2, 3}
    records = _records(8, wide)
    for batch in _take(TrainLoader(records, _draw, 2, seed=0), 20):
        assert len({d["index"] in wide for d in batch}) == 1
    ungrouped = _take(TrainLoader(records, _draw, 2, seed=0, group_by_aspect=False), 20)
    assert any(len({d["index"] in wide for d in batch}) == 2 for batch in ungrouped)


@pytest.mark.parametrize("repeat_factors", [None, torch.tensor([1.0, 2.0, 1.5, 1.0, 1.0])])
def test_processes_share_the_stream_without_overlap(monkeypatch, repeat_factors):
    def stream(rank, world_size, batches):
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: world_size)
        loader = TrainLoader(_records(5), _draw, 4 // world_size, seed=2, repeat_factors=repeat_factors)
        return [d for batch in _take(loader, batches) for d in batch]

    joint, first, second = stream(0, 1, 6), stream(0, 2, 6), stream(1, 2, 6)
    # same images and the same augmentations, dealt out in turn
    assert first == joint[0::2] and second == joint[1::2]


def test_batch_size_must_be_a_multiple_of_the_processes(cfg, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 4)
    with pytest.raises(ValueError, match=r"SOLVER.IMS_PER_BATCH is 2; .* number of processes, 4"):
        build_train_loader(cfg, seed=0)


def test_repeat_factor_sampling_from_the_config(cfg):
    def one_image_of_the_second_class():
        dicts = DatasetCatalog.get("loader_test_train")
        for annotation in (a for d in dicts for a in d["annotations"]):
            annotation["category_id"] = 0
        dicts[4]["annotations"][0]["category_id"] = 1
        return dicts

    DatasetCatalog.register("loader_test_rare", one_image_of_the_second_class)
    MetadataCatalog.get("loader_test_rare").thing_classes = list("abcdef")
    cfg.DATASETS.TRAIN = ("loader_test_rare",)
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    cfg.DATALOADER.REPEAT_THRESHOLD = 1.0
    loader = build_train_loader(cfg, seed=0, mapper=lambda d: {"id": d["image_id"]})
    ids = [d["id"] for batch in _take(loader, 11) for d in batch]
    # present in one image of nine: repeated sqrt(1 / (1 / 9)) = 3 times, so an epoch has 11 samples
    for epoch in (ids[:11], ids[11:]):
        assert sorted(epoch) == sorted([1, 2, 3, 4, 5, 5, 5, 6, 7, 8, 9])
    cfg.DATALOADER.SAMPLER_TRAIN = "RandomSubsetTrainingSampler"
    with pytest.raises(ValueError, match="SAMPLER_TRAIN is 'RandomSubsetTrainingSampler'; supported are"):
        build_train_loader(cfg, seed=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_replaced_counted_and_named_once(cfg, tmp_path, caplog, workers):
    make_dataset(tmp_path, num_train=4, num_val=1, size=(48, 64), seed=3, objects=(3, 5), min_size=5)
    broken = tmp_path / "images/train_000001.jpg"
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 3])
    cfg.DATASETS.REGISTER = register_entries(tmp_path, "loader_test_broken")
    cfg.DATASETS.TRAIN = ("loader_test_broken_train",)
    cfg.DATALOADER.NUM_WORKERS = workers
    register_datasets(cfg)
    with caplog.at_level(logging.WARNING, logger="msad.data.loader"):
        samples = [d for batch in _take(build_train_loader(cfg, seed=0), 6) for d in batch]
    assert sum(d["skipped"] for d in samples) == 3  # 12 samples are three epochs
    assert {d["file_name"] for d in samples if d["skipped"]} == {str(tmp_path / "images/train_000002.jpg")}
    lines = [r.getMessage() for r in caplog.records if r.name == "msad.data.loader"]
    assert len(lines) == 1 and str(broken) in lines[0]


def test_a_mapper_that_returns_nothing_is_a_failure(caplog):
    loader = TrainLoader(_records(3), lambda r: None if r["file_name"] == "0" else dict(r), 3, seed=0)
    (batch,) = _take(loader, 1)
    assert sorted((d["file_name"], d["skipped"]) for d in batch) == [("1", 0), ("1", 1), ("2", 0)]


def _fail(record):
    raise ValueError("bad polygon")


# DataLoader waits 5 s for a worker that has failed
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_failures_without_end_stop_the_run(workers):
    loader = TrainLoader(_records(2), _fail, 1, seed=0, num_workers=workers)
    message = (
        rf"{MAX_CONSECUTIVE_FAILURES + 1} images in a row cannot be used, the last of them \d: ValueError: bad polygon"
    )
    with pytest.raises(RuntimeError, match=message):
        next(iter(loader))


def test_data_that_does_not_fit_the_config(cfg):
    cfg.MODEL.RETINANET.NUM_CLASSES = 80
    with pytest.raises(ValueError, match=r"MODEL.RETINANET.NUM_CLASSES is 80, but .* has 6 classes"):
        build_train_loader(cfg, seed=0)
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 5
    with pytest.raises(ValueError, match=r"MODEL.ROI_HEADS.NUM_CLASSES is 5"):
        build_train_loader(cfg, seed=0)
    cfg.MSAD.DETECTOR, cfg.MODEL.FCOS.NUM_CLASSES = "FCOS", 7
    for around in ("MultiScaleTeacher", "FusionStudent"):
        cfg.MODEL.META_ARCHITECTURE = around
        with pytest.raises(ValueError, match=r"MODEL.FCOS.NUM_CLASSES is 7"):
            build_train_loader(cfg, seed=0)
    cfg.DATASETS.TRAIN = ()
    with pytest.raises(ValueError, match=r"DATASETS.TRAIN is empty"):
        build_train_loader(cfg, seed=0)


def test_data_sets_of_ones_own_need_what_detectron2_needs(cfg):
    """Sizes may be left to the mapper and names be Paths; what has no name or no list of annotations is said."""
    records = [{**record, "file_name": Path(record["file_name"])} for record in DatasetCatalog.get("loader_test_train")]
    DatasetCatalog.register("loader_test_own", lambda: records)
    cfg.DATASETS.TRAIN = ("loader_test_own",)
    sized = build_train_loader(cfg, seed=1)
    records[1].pop("width"), records[1].pop("height")
    _assert_equal(_take(sized, 4), _take(build_train_loader(cfg, seed=1), 4))
    for key, said in (("annotations", "has no list of annotations, which 8 of 9"), ("file_name", "have no file_name")):
        del records[0][key]
        with pytest.raises(ValueError, match=said):
            build_train_loader(cfg, seed=1)


def test_masks_and_keypoints_arrive(cfg):
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 6
    cfg.MODEL.MASK_ON = cfg.MODEL.KEYPOINT_ON = True
    with pytest.raises(ValueError, match=r"NUM_KEYPOINTS is 17, but .* has 5 keypoints"):
        build_train_loader(cfg, seed=0)
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 5
    cfg.INPUT.CROP.ENABLED = False
    (batch,) = _take(build_train_loader(cfg, seed=0), 1)
    for sample in batch:
        instances = sample["instances"]
        assert len(instances) > 0
        assert instances.gt_keypoints.tensor.shape == (len(instances), 5, 3)
        assert len(instances.gt_masks) == len(instances)


def test_images_of_tests_need_nothing_of_the_training_set(cfg):
    """A model of keypoints is tested, timed and shown before anybody has read the set that it was trained on."""
    cfg.MODEL.KEYPOINT_ON = True
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.FORMAT = 24, "RGB"
    (record,) = DatasetCatalog.get("loader_test_val")
    assert MetadataCatalog.get("loader_test_train").get("keypoint_names") is None
    found = inference_mapper(cfg)(record)
    DatasetCatalog.get("loader_test_train")  # after which detectron2's own mapper knows what it asks for
    expected = DatasetMapper(cfg, False)(record)
    assert found.keys() == expected.keys() and "annotations" not in found
    assert found["image"].shape[1:] == (24, 32) and torch.equal(found["image"], expected["image"])


def test_mirroring_exchanges_left_and_right(cfg):
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 6
    cfg.MODEL.KEYPOINT_ON = True
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 5
    cfg.INPUT.CROP.ENABLED = False
    batches = _take(build_train_loader(cfg, seed=0), 5)
    for points in (d["instances"].gt_keypoints.tensor for batch in batches for d in batch):
        right, left = points[:, 2], points[:, 4]
        both = (right[:, 2] > 0) & (left[:, 2] > 0)
        assert (right[both, 0] > left[both, 0]).all()


def test_samples_can_be_sent_to_spawned_workers(cfg):
    loader = build_train_loader(cfg, seed=0)
    copy = pickle.loads(pickle.dumps(loader))
    _assert_equal(_take(copy, 2), _take(loader, 2))
