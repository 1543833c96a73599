"""Checks of dataset dicts before training: every finding names the culprit, counts, and has a fix."""

import copy

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from msad import load_config
from msad.data import clean
from msad.data.checks import check_data
from msad.data.needs import Needs
from msad.data.record_checks import check_records
from msad.experiments.data_facts import describe_data
from msad.finding import ERROR, OK, WARNING

TWO = Needs(classes=2)


def _instance(*box, category=0, mode=BoxMode.XYWH_ABS, **extra):
    return {"bbox": list(box), "bbox_mode": mode, "category_id": category, **extra}


def image(*annotations, file="a.jpg"):
    return {"file_name": file, "width": 100, "height": 80, "annotations": list(annotations)}


@pytest.fixture
def name():
    name = "checks_test"
    MetadataCatalog.get(name).set(thing_classes=["a", "b"], keypoint_names=["nose"])
    yield name
    MetadataCatalog.remove(name)


def found(records, name, needs, level):
    return [finding for finding in check_records(records, name, needs) if finding.level == level]


def test_counts_and_clean(name):
    nan = float("nan")
    dicts = [
        image(_instance(10, 10, 5, 5), _instance(10, 10, 0, 5), _instance(10, 10, 5, -1), _instance(nan, 0, 5, 5)),
        image(
            _instance(100, 10, 5, 5), _instance(-9, 10, 5, 5), _instance(-5, 10, 30, 5), _instance(-0.5, 0, 100.9, 80)
        ),
        image(_instance(50, 90, 60, 100, mode=BoxMode.XYXY_ABS), _instance(60, 60, 50, 70, mode=BoxMode.XYXY_ABS)),
        image(),
        {k: v for k, v in image().items() if k != "annotations"},
    ]
    before = copy.deepcopy(dicts)
    (counts,) = found(dicts, name, TWO, OK)
    assert counts.text == (
        "5 images (3 without instances), 3 of 10 instances kept (4 degenerate and 3 outside the image dropped), "
        "1 clipped to the image"
    )
    cleaned = clean(dicts)
    boxes = [[a["bbox"] for a in d.get("annotations", [])] for d in cleaned]
    assert boxes == [[[10, 10, 5, 5]], [[-5, 10, 30, 5], [-0.5, 0, 100.9, 80]], [], [], []]
    assert repr(dicts) == repr(before)
    (counts,) = found(cleaned, name, TWO, OK)
    assert "3 of 3 instances kept (0 degenerate and 0 outside" in counts.text


def test_a_box_may_overhang_by_one_pixel(name):
    """Which is a matter of rounding."""
    for overhang, clipped in ((1, 0), (1.5, 4)):
        sides = [(-overhang, 5, 20, 20), (5, -overhang, 20, 20), (5, 5, 100 + overhang, 20), (5, 5, 20, 80 + overhang)]
        record = image(*(_instance(*box, mode=BoxMode.XYXY_ABS) for box in sides))
        (counts,) = found([record], name, TWO, OK)
        assert counts.text.endswith(f", {clipped} clipped to the image"), overhang


def test_useless_boxes_are_warned_of_and_refused_where_they_are_most(name):
    good = [image(_instance(10, 10, 5 + i, 5)) for i in range(4)]
    (warning,) = [
        f for f in found([*good, image(_instance(9, 9, 0, 5), file="b.jpg")], name, TWO, WARNING) if "box" in f.text
    ]
    assert "b.jpg has a box that has no area" in warning.text and "(1 of 5 annotations)" in warning.text
    (error,) = found([image(_instance(200, 10, 5, 5), file="c.jpg")], name, TWO, ERROR)
    assert "c.jpg has a box that is outside of the image" in error.text and error.fix


def test_errors_name_the_culprit(name):
    good = [image(_instance(10, 10, 5, 5), _instance(1, 1, 9, 9, category=1))]
    cases = [
        ([], name, TWO, "it is empty"),
        (good, name, Needs(classes=80, config_key="MODEL.FCOS.NUM_CLASSES"),
         "MODEL.FCOS.NUM_CLASSES is 80, but data set 'checks_test' has 2 classes: a, b"),
        ([image(_instance(10, 10, 5, 5, category=2))], name, TWO, "a.jpg has the class index 2, but MODEL.ROI_HEADS"),
        ([image()], name, TWO, "it has no annotations"),
        (good, name, TWO._replace(masks=True), "no mask in any of its 2 instances, and MODEL.MASK_ON is set"),
        ([image(_instance(10, 10, 5, 5, iscrowd=1))], name, TWO, "iscrowd 1 in 1 of 1 annotations"),
    ]  # fmt: skip
    for records, data_set, needs, text in cases:
        errors = found(records, data_set, needs, ERROR)
        assert len(errors) == 1 and text in errors[0].text and errors[0].fix, (text, errors)
    assert not found(good, name, TWO, ERROR)
    texts = [f.text for f in found(good, name, TWO._replace(keypoints=17), ERROR)]
    assert any("NUM_KEYPOINTS is 17, but data set 'checks_test' has 1 keypoints: nose" in text for text in texts)
    texts = [f.text for f in found(good, "other_checks_test", TWO._replace(keypoints=17), ERROR)]
    assert any("MODEL.KEYPOINT_ON is set, but the data set has no keypoint names" in text for text in texts)


def test_what_is_not_known_is_not_compared(name):
    assert not found([image(_instance(1, 1, 2, 2, category=7))], name, Needs(), ERROR)
    assert not found([image(_instance(1, 1, 2, 2))], "checks_without_metadata", Needs(classes=5), ERROR)


def test_a_test_set_without_annotations_is_no_error(name):
    (warning,) = found([image()], name, TWO._replace(training=False), WARNING)
    assert "detections are written, AP is not computed" in warning.text


def test_classes_that_only_the_test_set_has(name):
    """Crowds are neither learned from nor counted; a class that is nowhere is no matter of the test set."""
    train = [image(_instance(5, 5, 20, 20, category=0), _instance(5, 5, 20, 20, category=1, iscrowd=1))]
    test = [image(_instance(5, 5, 20, 20, category=1), _instance(30, 5, 20, 20, category=1), file="b.jpg")]
    cfg = load_config("", ["DATASETS.TRAIN", (name,), "DATASETS.TEST", ("checks_val",)])
    MetadataCatalog.get("checks_val").set(thing_classes=["a", "b"])
    try:
        for data_set, records in ((name, train), ("checks_val", test)):
            DatasetCatalog.register(data_set, lambda records=records: records)

        def said():
            return [f for f in check_data(cfg, images=False)[1] if "never trained on" in f.text]

        (finding,) = said()
        assert finding.level == WARNING and finding.check == "data set 'checks_val'"
        assert finding.text.endswith("whose AP of 0 counts in the mean: b (2)")
        train[0]["annotations"][1]["iscrowd"] = 0
        assert describe_data(cfg)["instances_train"] == 2
        train[0]["annotations"][0]["iscrowd"] = 1
        assert describe_data(cfg)["instances_train"] == 1
        train[0]["annotations"][0]["iscrowd"] = 0
        assert not said()
    finally:
        for data_set in (name, "checks_val"):
            DatasetCatalog.remove(data_set)
        MetadataCatalog.remove("checks_val")
