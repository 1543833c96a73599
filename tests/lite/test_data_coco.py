import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import convert_to_coco_json, load_coco_json, register_coco_instances
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.structures import BoxMode

SQUARE = [1, 1, 5, 1, 5, 5, 1, 5]
IMAGES = [
    {"id": 5, "file_name": "b.jpg", "height": 20, "width": 30},
    {"id": 2, "file_name": "a.jpg", "height": 10, "width": 15},
]
CATEGORIES = [{"id": 7, "name": "seven"}, {"id": 1, "name": "one"}, {"id": 3, "name": "three"}]


def annotation(number, image_id=5, category_id=3, **more):
    return {"id": number, "image_id": image_id, "category_id": category_id, "bbox": [1, 2, 3, 4], "area": 12, **more}


@pytest.fixture
def name():
    yield "coco_file_test"
    DatasetCatalog.pop("coco_file_test", None)
    MetadataCatalog.pop("coco_file_test", None)


@pytest.fixture
def write(tmp_path):
    def write_file(annotations, file_name="annotations.json", categories=CATEGORIES):
        path = tmp_path / file_name
        path.write_text(json.dumps({"images": IMAGES, "annotations": annotations, "categories": categories}))
        return str(path)

    return write_file


def test_images_come_in_order_with_their_annotations(write):
    path = write([annotation(1), annotation(2, iscrowd=1), annotation(3, image_id=2, category_id=7)])
    samples = load_coco_json(path, "root")
    assert [s["image_id"] for s in samples] == [2, 5]
    assert samples[1]["file_name"] == "root/b.jpg"
    assert (samples[1]["height"], samples[1]["width"]) == (20, 30)
    assert samples[0]["annotations"] == [{"bbox": [1, 2, 3, 4], "category_id": 7, "bbox_mode": BoxMode.XYWH_ABS}]
    assert [a.get("iscrowd") for a in samples[1]["annotations"]] == [None, 1]


def test_categories_are_mapped_in_the_order_of_their_ids(write, name):
    path = write([annotation(1, category_id=7), annotation(2, category_id=1)])
    samples = load_coco_json(path, "root", name)
    assert [a["category_id"] for a in samples[1]["annotations"]] == [2, 0]
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["one", "three", "seven"]
    assert metadata.thing_dataset_id_to_contiguous_id == {1: 0, 3: 1, 7: 2}


def test_extra_keys_are_kept_on_request(write):
    path = write([annotation(1, score=0.5)])
    assert "score" not in load_coco_json(path, "")[1]["annotations"][0]
    kept = load_coco_json(path, "", extra_annotation_keys=["score", "absent"])[1]["annotations"][0]
    assert kept["score"] == 0.5 and "absent" not in kept


def test_invalid_polygons_are_dropped(write, caplog):
    line, odd = [1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7]
    path = write(
        [
            annotation(1, segmentation=[line, SQUARE, odd]),
            annotation(2, segmentation=[line]),
            annotation(3, segmentation=[]),
        ]
    )
    with caplog.at_level("WARNING", logger="detectron2"):
        annotations = load_coco_json(path, "")[1]["annotations"]
    assert [a.get("segmentation") for a in annotations] == [[SQUARE], None]
    assert "1 instances" in caplog.text


def test_run_lengths_are_compressed(write):
    mask = np.zeros((20, 30), np.uint8)
    mask[3:7, 10] = 1
    runs = [10 * 20 + 3, 4, 600 - 207]
    path = write([annotation(1, iscrowd=1, segmentation={"size": [20, 30], "counts": runs})])
    encoded = load_coco_json(path, "")[1]["annotations"][0]["segmentation"]
    assert isinstance(encoded["counts"], bytes)
    np.testing.assert_array_equal(mask_util.decode(encoded), mask)


def test_keypoints_move_to_pixel_centres(write):
    path = write([annotation(1, keypoints=[1, 2, 2, 0, 0, 0])])
    assert load_coco_json(path, "")[1]["annotations"][0]["keypoints"] == [1.5, 2.5, 2, 0.5, 0.5, 0]


def test_bad_files_are_named(write, name):
    with pytest.raises(AssertionError, match=r"duplicates\.json"):
        load_coco_json(write([annotation(1), annotation(1)], "duplicates.json"), "", name)
    with pytest.raises(KeyError, match="99"):
        load_coco_json(write([annotation(1, category_id=99)]), "", name)
    with pytest.raises(ValueError, match="bbox"):
        load_coco_json(write([annotation(1) | {"bbox": []}]), "", name)
    with pytest.raises(AssertionError, match="ignore"):
        load_coco_json(write([annotation(1, ignore=1)]), "", name)
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):
        load_coco_json("absent.json", "")


def test_stray_annotations_are_reported(write, caplog):
    with caplog.at_level("WARNING", logger="detectron2"):
        samples = load_coco_json(write([annotation(1), annotation(2, image_id=77)], "stray.json"), "")
    assert sum(len(s["annotations"]) for s in samples) == 1
    assert "stray.json" in caplog.text


def test_registering(write, name):
    path = write([annotation(1)])
    register_coco_instances(name, {"thing_colors": [[1, 2, 3]] * 3}, path, "root")
    metadata = MetadataCatalog.get(name)
    assert (metadata.json_file, metadata.image_root, metadata.evaluator_type) == (path, "root", "coco")
    assert not hasattr(metadata, "thing_classes")
    assert DatasetCatalog.get(name)[1]["annotations"][0]["category_id"] == 1
    assert metadata.thing_classes == ["one", "three", "seven"]
    register_coco_instances(name, {}, path, "root")
    with pytest.raises(AssertionError, match="json_file"):
        register_coco_instances(name, {}, "other.json", "root")
    with pytest.raises(AssertionError):
        register_coco_instances(3, {}, path, "root")


def custom_samples():
    mask = np.zeros((10, 15), np.uint8, order="F")
    mask[2:4, 3:8] = 1
    annotations = [
        {
            "bbox": [1, 2, 6, 8],
            "bbox_mode": BoxMode.XYXY_ABS,
            "category_id": 1,
            "segmentation": [SQUARE],
            "keypoints": [1.5, 2.5, 2, 3.5, 4.5, 0],
        },
        {
            "bbox": [1, 2, 6, 8],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": 0,
            "iscrowd": 1,
            "segmentation": mask_util.encode(mask),
        },
        {"bbox": [1.123456, 2, 6, 8], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0,
         "keypoints": [1, 2, 2], "num_keypoints": 0},
    ]
    return [
        {"file_name": "a.jpg", "image_id": 4, "height": 10, "width": 15, "annotations": annotations},
        {"file_name": "b.jpg", "height": 20, "width": 25},
    ]


def test_converting_to_coco(name):
    DatasetCatalog.register(name, custom_samples)
    MetadataCatalog.get(name).thing_classes = ["p", "q"]
    content = convert_to_coco_dict(name)
    assert content["categories"] == [{"id": 0, "name": "p"}, {"id": 1, "name": "q"}]
    assert content["images"][0] == {"id": 4, "width": 15, "height": 10, "file_name": "a.jpg"}
    assert content["images"][1]["id"] == 1
    square, crowd, box = content["annotations"]
    assert square["bbox"] == [1, 2, 5, 6] and square["segmentation"] == [SQUARE] and square["area"] == 16
    assert square["keypoints"] == [1, 2, 2, 3, 4, 0] and square["num_keypoints"] == 1
    assert crowd["iscrowd"] == 1 and crowd["area"] == 10 and isinstance(crowd["segmentation"]["counts"], str)
    assert box["bbox"] == [1.123, 2, 6, 8] and box["area"] == pytest.approx(48)
    assert box["num_keypoints"] == 0  # as the sample says: COCO ignores such objects in its keypoint metrics
    assert [a["id"] for a in content["annotations"]] == [1, 2, 3]
    assert {a["image_id"] for a in content["annotations"]} == {4}


def test_converting_restores_original_category_ids(name):
    DatasetCatalog.register(name, custom_samples)
    MetadataCatalog.get(name).set(thing_classes=["p", "q"], thing_dataset_id_to_contiguous_id={3: 0, 9: 1})
    content = convert_to_coco_dict(name)
    assert [c["id"] for c in content["categories"]] == [3, 9]
    assert [a["category_id"] for a in content["annotations"]] == [9, 3, 3]


def test_converting_to_a_file_round_trips(name, tmp_path):
    DatasetCatalog.register(name, custom_samples)
    MetadataCatalog.get(name).thing_classes = ["p", "q"]
    path = tmp_path / "new" / "file.json"
    convert_to_coco_json(name, str(path))
    samples = load_coco_json(str(path), "")
    by_id = {s["image_id"]: s["annotations"] for s in samples}
    assert [a["category_id"] for a in by_id[4]] == [1, 0, 0] and by_id[1] == []
    assert by_id[4][0]["keypoints"] == [1.5, 2.5, 2, 3.5, 4.5, 0]

    path.write_text("kept")
    convert_to_coco_json(name, str(path))
    assert path.read_text() == "kept"
    convert_to_coco_json(name, str(path), allow_cached=False)
    assert json.loads(path.read_text())["categories"]
