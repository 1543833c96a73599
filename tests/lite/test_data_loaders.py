import itertools

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import (
    DatasetCatalog,
    DatasetFromList,
    MapDataset,
    MetadataCatalog,
    ToIterableDataset,
    build_batch_data_loader,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
    print_instances_class_histogram,
)
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import (
    InferenceSampler,
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.structures import BoxMode
from detectron2.utils import comm
from PIL import Image


def head(iterable, n):
    return list(itertools.islice(iter(iterable), n))


class Numbers(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from range(7)


# -------------------------------------------------------------------------------------------- samplers


def test_training_sampler_repeats_whole_passes():
    stream = head(TrainingSampler(5, seed=3), 20)
    assert [sorted(stream[i : i + 5]) for i in range(0, 20, 5)] == [list(range(5))] * 4
    assert stream[:5] != stream[5:10]
    assert head(TrainingSampler(5, seed=3), 20) == stream
    assert head(TrainingSampler(3, shuffle=False), 7) == [0, 1, 2, 0, 1, 2, 0]
    generator = torch.Generator().manual_seed(3)
    assert stream[:5] == torch.randperm(5, generator=generator).tolist()
    with pytest.raises(ValueError):
        TrainingSampler(0)
    with pytest.raises(TypeError):
        TrainingSampler(2.5)


@pytest.fixture
def as_rank(monkeypatch):
    """Call a function as each of several processes would and return all results."""

    def run(world_size, function):
        results = []
        for rank in range(world_size):
            with monkeypatch.context() as patch:
                patch.setattr(comm, "get_world_size", lambda: world_size)
                patch.setattr(comm, "get_rank", lambda rank=rank: rank)
                results.append(function())
        return results

    return run


def test_processes_share_one_stream(as_rank):
    whole = head(TrainingSampler(7, seed=4), 30)
    parts = as_rank(3, lambda: head(TrainingSampler(7, seed=4), 10))
    assert [parts[i % 3][i // 3] for i in range(30)] == whole
    factors = torch.tensor([1.0, 2.5, 1.25])
    repeated = head(RepeatFactorTrainingSampler(factors, seed=4), 20)
    parts = as_rank(2, lambda: head(RepeatFactorTrainingSampler(factors, seed=4), 10))
    assert [parts[i % 2][i // 2] for i in range(20)] == repeated
    assert as_rank(2, lambda: list(InferenceSampler(5))) == [[0, 1, 2], [3, 4]]


def test_subset_sampler_stays_within_its_part():
    stream = head(RandomSubsetTrainingSampler(10, 0.4, seed_shuffle=1, seed_subset=2), 40)
    assert len(set(stream)) == 4 and sorted(stream[:4]) == sorted(stream[36:])
    ordered = head(RandomSubsetTrainingSampler(10, 0.4, shuffle=False, seed_subset=2), 8)
    assert ordered[:4] == ordered[4:] and set(ordered) == set(stream)
    with pytest.raises(AssertionError):
        RandomSubsetTrainingSampler(10, 1.5)


def test_repeat_factors():
    classes = [[0, 0, 1], [0], [0], [2, 1], [], [0]]
    samples = [{"annotations": [{"category_id": c} for c in row]} for row in classes]
    plain = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(samples, 0.5, sqrt=False)
    assert plain.tolist() == pytest.approx([1.5, 1, 1, 3, 1, 1])
    roots = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(samples, 0.5)
    assert roots.tolist() == pytest.approx([1.5**0.5, 1, 1, 3**0.5, 1, 1])
    stream = head(RepeatFactorTrainingSampler(torch.tensor([1.0, 2.0, 1.5]), seed=0), 4500)
    shares = np.bincount(stream) / 1000
    np.testing.assert_allclose(shares, [1, 2, 1.5], atol=0.03)


def test_inference_sampler_covers_everything_once():
    assert list(InferenceSampler(4)) == [0, 1, 2, 3] and len(InferenceSampler(4)) == 4
    for size in range(9):
        parts = [list(InferenceSampler._get_local_indices(size, 3, rank)) for rank in range(3)]
        assert [i for part in parts for i in part] == list(range(size))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


# -------------------------------------------------------------------------------------------- wrappers


@pytest.mark.parametrize("serialize", [True, False])
def test_list_data_set_protects_its_samples(serialize):
    original = [{"a": [1]}, {"a": [2]}]
    dataset = DatasetFromList(original, serialize=serialize)
    dataset[0]["a"].append(9)
    assert dataset[0] == {"a": [1]} and dataset[1] == {"a": [2]} and len(dataset) == 2
    with pytest.raises(IndexError):
        dataset[2]


def test_mapping_replaces_what_fails():
    dataset = MapDataset(DatasetFromList(list(range(10))), lambda x: None if x % 2 else x * 10)
    assert len(dataset) == 10
    results = [dataset[i] for i in range(10)]
    assert results[::2] == [0, 20, 40, 60, 80]
    assert all(r % 20 == 0 for r in results)
    assert list(MapDataset(Numbers(), lambda x: None if x % 2 else x * 10)) == [0, 20, 40, 60]


def test_iterating_over_a_sampler():
    dataset = ToIterableDataset(DatasetFromList(list(range(10))), InferenceSampler(10))
    assert list(dataset) == list(range(10)) and len(dataset) == 10
    for chunk in (1, 3):
        sharded = ToIterableDataset(DatasetFromList(list(range(10))), InferenceSampler(10), shard_chunk_size=chunk)
        seen = list(torch.utils.data.DataLoader(sharded, num_workers=2, batch_size=None))
        assert sorted(seen) == list(range(10))
        assert seen[:3] == ([0, 1, 2] if chunk == 1 else [0, 3, 1])
    with pytest.raises(AssertionError):
        ToIterableDataset(Numbers(), InferenceSampler(7))


def test_wide_and_tall_images_are_kept_apart():
    sizes = [(1, 2), (2, 1), (3, 3), (5, 4), (4, 5), (6, 7), (9, 1)]
    batches = list(AspectRatioGroupedDataset([{"width": w, "height": h} for w, h in sizes], 2))
    assert [[(s["width"], s["height"]) for s in batch] for batch in batches] == [
        [(1, 2), (3, 3)],
        [(2, 1), (5, 4)],
        [(4, 5), (6, 7)],
    ]


# --------------------------------------------------------------------------------------------- loaders


def test_batches_do_not_depend_on_workers():
    samples = [{"i": i, "width": 1 + i % 3, "height": 2} for i in range(11)]

    def stream(workers):
        loader = build_detection_train_loader(
            samples,
            mapper=None,
            sampler=TrainingSampler(11, seed=1),
            total_batch_size=3,
            num_workers=workers,
            aspect_ratio_grouping=False,
        )
        return [[s["i"] for s in batch] for batch in head(loader, 8)]

    expected = head(TrainingSampler(11, seed=1), 24)
    assert [i for batch in stream(0) for i in batch] == expected
    assert stream(2) == stream(0)


def test_grouped_batches():
    samples = [{"i": i, "width": 1 + i % 3, "height": 2} for i in range(11)]
    loader = build_detection_train_loader(samples, mapper=None, total_batch_size=2)
    batches = head(loader, 30)
    assert all(len(batch) == 2 for batch in batches)
    assert all(len({s["width"] > s["height"] for s in batch}) == 1 for batch in batches)
    assert {s["i"] for batch in batches for s in batch} == set(range(11))


def test_workers_draw_different_numbers():
    loader = build_batch_data_loader(
        MapDataset(DatasetFromList([0] * 8), lambda _: float(np.random.rand())),
        InferenceSampler(8),
        1,
        num_workers=2,
        seed=0,
    )
    drawn = [batch[0] for batch in loader]
    assert len(set(drawn)) == 8
    assert [batch[0] for batch in loader] != drawn


def test_batch_options():
    def batches(**options):
        return list(build_batch_data_loader(DatasetFromList([1, 2, 3, 4, 5]), InferenceSampler(5), **options))

    assert batches(total_batch_size=2) == [[1, 2], [3, 4]]
    assert batches(total_batch_size=2, drop_last=False) == [[1, 2], [3, 4], [5]]
    assert batches(total_batch_size=2, collate_fn=sum) == [3, 7]
    assert batches(total_batch_size=None, single_gpu_batch_size=4) == [[1, 2, 3, 4]]
    with pytest.raises(ValueError):
        batches(total_batch_size=2, single_gpu_batch_size=4)
    with pytest.raises(AssertionError):
        batches(total_batch_size=0)


def test_iterable_data_sets():
    def build(**options):
        return build_detection_train_loader(
            Numbers(), mapper=None, total_batch_size=2, aspect_ratio_grouping=False, **options
        )

    assert list(build()) == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(AssertionError, match="sampler"):
        build(sampler=TrainingSampler(7))
    with pytest.raises(AssertionError):
        build_detection_train_loader([1, 2], mapper=None, total_batch_size=2, sampler=[0, 1])


def test_test_loader_visits_each_sample_once():
    assert list(build_detection_test_loader([1, 2, 3], mapper=lambda x: -x)) == [[-1], [-2], [-3]]
    assert list(build_detection_test_loader([1, 2, 3], mapper=lambda x: -x, batch_size=2)) == [[-1, -2], [-3]]
    assert list(build_detection_test_loader([1, 2, 3], mapper=lambda x: x, collate_fn=len)) == [1, 1, 1]
    assert len(build_detection_test_loader([1, 2, 3], mapper=lambda x: x)) == 3
    assert list(build_detection_test_loader(Numbers(), mapper=lambda x: x, batch_size=4)) == [[0, 1, 2, 3], [4, 5, 6]]


# ------------------------------------------------------------------------------------ named data sets


def annotation(category_id=0, **more):
    return {"bbox": [1, 2, 6, 8], "bbox_mode": BoxMode.XYXY_ABS, "category_id": category_id, **more}


@pytest.fixture
def name(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(path)
    annotations = [
        [annotation(1, keypoints=[1, 1, 2, 2, 2, 0])],
        [],
        [annotation(2, iscrowd=1)],
        [annotation(0, keypoints=[1, 1, 2, 2, 2, 1]), annotation(1)],
    ]
    samples = [
        {"file_name": str(path), "image_id": i, "height": 20, "width": 30, "annotations": annos}
        for i, annos in enumerate(annotations)
    ]
    DatasetCatalog.register("loader_test", lambda: samples)
    MetadataCatalog.get("loader_test").thing_classes = ["a", "b", "c"]
    yield "loader_test"
    for used in [n for n in DatasetCatalog.list() if n.startswith("loader_test")]:
        DatasetCatalog.pop(used)
        MetadataCatalog.pop(used, None)


def test_filters(name):
    def ids(*args, **options):
        return [s["image_id"] for s in get_detection_dataset_dicts(*args, **options)]

    assert ids(name) == [0, 3]
    assert ids(name, filter_empty=False) == [0, 1, 2, 3]
    assert ids([name, name]) == [0, 3, 0, 3]
    assert ids(name, min_keypoints=2) == [3]


def test_unusable_data_sets_are_named(name):
    DatasetCatalog.register("loader_test_empty", list)
    DatasetCatalog.register("loader_test_crowd", lambda: [{"annotations": [annotation(iscrowd=1)]}])
    for unusable in ("loader_test_empty", "loader_test_crowd"):
        with pytest.raises(AssertionError, match=unusable):
            get_detection_dataset_dicts(unusable)
    with pytest.raises(AssertionError):
        get_detection_dataset_dicts([])
    with pytest.raises(KeyError, match="loader_test_unknown"):
        get_detection_dataset_dicts("loader_test_unknown")


def test_classes_must_agree(name):
    DatasetCatalog.register("loader_test_other", lambda: [{"annotations": [annotation()]}])
    MetadataCatalog.get("loader_test_other").thing_classes = ["z"]
    with pytest.raises(ValueError, match="thing_classes"):
        get_detection_dataset_dicts([name, "loader_test_other"])
    with pytest.raises(AssertionError, match="category_id=2"):
        print_instances_class_histogram([{"annotations": [annotation(2)]}], ["a", "b"])


def test_histogram_counts_instances(name, caplog):
    with caplog.at_level("INFO", logger="detectron2"):
        print_instances_class_histogram(DatasetCatalog.get(name), ["a", "b", "crowd only here"])
    cells = [cell.strip() for line in caplog.text.splitlines() for cell in line.split("|")]
    assert cells[cells.index("a") + 1] == "1" and cells[cells.index("b") + 1] == "2"
    assert cells[cells.index("total") + 1] == "3"


def test_loaders_from_a_config(name):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (10,), 40
    for sampler in ("TrainingSampler", "RepeatFactorTrainingSampler"):
        cfg.DATALOADER.SAMPLER_TRAIN = sampler
        batch = next(iter(build_detection_train_loader(cfg)))
        assert {s["image_id"] for s in batch} <= {0, 3} and len(batch) == 2
        assert all(s["image"].shape == (3, 10, 15) and len(s["instances"]) for s in batch)
    cfg.DATALOADER.SAMPLER_TRAIN = "GuessingSampler"
    with pytest.raises(ValueError, match="GuessingSampler"):
        build_detection_train_loader(cfg)
    cfg.DATALOADER.SAMPLER_TRAIN = "TrainingSampler"
    replaced = build_detection_train_loader(cfg, mapper=lambda s: s["image_id"], aspect_ratio_grouping=False)
    assert set(next(iter(replaced))) <= {0, 3}

    test_loader = build_detection_test_loader(cfg, name)
    assert [batch[0]["image_id"] for batch in test_loader] == [0, 1, 2, 3]
    assert next(iter(test_loader))[0]["image"].shape == (3, 40, 60)
