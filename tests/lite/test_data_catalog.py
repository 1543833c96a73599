import pickle

import pytest
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.detection_utils import check_metadata_consistency, create_keypoint_hflip_indices


@pytest.fixture
def names():
    """Names that are free before and after a test."""
    free = ["catalog_test_a", "catalog_test_b"]
    yield free
    for name in free:
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)


def test_a_registered_function_loads_the_data_set(names):
    DatasetCatalog.register(names[0], lambda: [{"image_id": 3}])
    assert DatasetCatalog.get(names[0]) == [{"image_id": 3}]
    assert names[0] in DatasetCatalog.list()
    DatasetCatalog.remove(names[0])
    assert names[0] not in DatasetCatalog


def test_registering_is_strict(names):
    DatasetCatalog.register(names[0], list)
    with pytest.raises(AssertionError, match=names[0]):
        DatasetCatalog.register(names[0], list)
    with pytest.raises(AssertionError):
        DatasetCatalog.register(names[1], [1, 2])
    with pytest.raises(KeyError, match=names[1]):
        DatasetCatalog.get(names[1])


def test_metadata_is_one_object_for_a_name(names):
    MetadataCatalog.get(names[0]).set(thing_classes=["x"], evaluator_type="coco")
    again = MetadataCatalog.get(names[0])
    assert (again.name, again.thing_classes) == (names[0], ["x"])
    assert again.as_dict() == {"name": names[0], "thing_classes": ["x"], "evaluator_type": "coco"}
    assert again.get("json_file") is None and again.get("json_file", "f") == "f"
    assert pickle.loads(pickle.dumps(again)) == again


def test_metadata_cannot_change_or_be_made_up(names):
    metadata = MetadataCatalog.get(names[0])
    metadata.thing_classes = ["a", "b"]
    metadata.thing_classes = ["a", "b"]
    with pytest.raises(AssertionError, match="thing_classes"):
        metadata.thing_classes = ["b", "a"]
    with pytest.raises(AttributeError, match="thing_colors"):
        metadata.thing_colors  # noqa: B018
    assert not hasattr(metadata, "thing_colors")
    with pytest.raises(AssertionError):
        MetadataCatalog.get("")
    assert Metadata(name="q", z=1) == Metadata(name="q", z=1)


def test_the_old_name_of_classes(names, caplog):
    metadata = MetadataCatalog.get(names[0])
    assert not hasattr(metadata, "class_names") and metadata.get("class_names", 3) == 3
    metadata.class_names = ["a", "b"]
    assert metadata.thing_classes == metadata.class_names == metadata.get("class_names") == ["a", "b"]
    assert metadata.as_dict() == {"name": names[0], "thing_classes": ["a", "b"]}
    assert "thing_classes" in caplog.text
    with pytest.raises(AssertionError, match="thing_classes"):
        metadata.class_names = ["b"]


def test_data_sets_used_together_must_agree(names):
    MetadataCatalog.get(names[0]).thing_classes = ["a"]
    MetadataCatalog.get(names[1]).thing_classes = ["a", "b"]
    check_metadata_consistency("thing_classes", names[:1])
    check_metadata_consistency("thing_classes", [])
    with pytest.raises(ValueError, match="thing_classes"):
        check_metadata_consistency("thing_classes", names)


def test_mirrored_keypoints(names):
    MetadataCatalog.get(names[0]).set(
        keypoint_names=["tail", "left_paw", "nose", "right_paw"], keypoint_flip_map=[("left_paw", "right_paw")]
    )
    assert create_keypoint_hflip_indices(names[0]) == [0, 3, 2, 1]
    assert create_keypoint_hflip_indices([names[0], names[0]]) == [0, 3, 2, 1]


def test_coco_is_registered():
    coco = MetadataCatalog.get("coco_2017_val")
    assert len(coco.thing_classes) == len(coco.thing_colors) == 80
    assert coco.thing_classes[:2] == ["person", "bicycle"] and coco.thing_classes[-1] == "toothbrush"
    ids = coco.thing_dataset_id_to_contiguous_id
    assert (ids[1], ids[13], ids[90]) == (0, 11, 79) and 12 not in ids
    assert coco.thing_colors[0] == [220, 20, 60]
    assert coco.json_file.endswith("coco/annotations/instances_val2017.json")
    assert coco.image_root.endswith("coco/val2017")
    minival = MetadataCatalog.get("coco_2014_minival")
    assert minival.json_file.endswith("instances_minival2014.json") and minival.image_root.endswith("val2014")
    test = MetadataCatalog.get("coco_2017_test-dev")
    assert test.json_file.endswith("image_info_test-dev2017.json") and test.image_root.endswith("test2017")
    assert {"coco_2017_train", "keypoints_coco_2017_val_100"} <= set(DatasetCatalog.list())


def test_coco_person_keypoints():
    person = MetadataCatalog.get("keypoints_coco_2017_train")
    assert person.thing_classes == ["person"] and len(person.keypoint_names) == 17
    flips = create_keypoint_hflip_indices("keypoints_coco_2017_train")
    assert flips[:5] == [0, 2, 1, 4, 3] and sorted(flips) == list(range(17))
    for first, second, color in person.keypoint_connection_rules:
        assert {first, second} <= set(person.keypoint_names) and len(color) == 3
