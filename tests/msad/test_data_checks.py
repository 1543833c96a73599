"""Checks before training."""

import copy

import pytest
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode

from msad.data import check_dataset, clean


def _instance(*box, category=0, mode=BoxMode.XYWH_ABS, **extra):
    return {"bbox": list(box), "bbox_mode": mode, "category_id": category, **extra}


@pytest.fixture
def image(tmp_path):
    (tmp_path / "a.jpg").touch()
    return lambda *annotations: {
        "file_name": str(tmp_path / "a.jpg"), "width": 100, "height": 80, "annotations": list(annotations)
    }  # fmt: skip


@pytest.fixture
def name():
    name = "checks_test"
    MetadataCatalog.get(name).set(thing_classes=["a", "b"], keypoint_names=["nose"])
    yield name
    MetadataCatalog.remove(name)


def test_counts_and_clean(image, name):
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
    report = check_dataset(dicts, name, 2)
    assert (report.images, report.instances, report.empty_images) == (5, 10, 3)
    assert (report.degenerate, report.outside, report.clipped) == (4, 3, 1)
    assert str(report) == (
        "data set 'checks_test': 5 images (3 without instances), 3 of 10 instances kept (4 degenerate and 3 outside "
        "the image dropped), 1 clipped to the image"
    )
    cleaned = clean(dicts)
    boxes = [[a["bbox"] for a in d.get("annotations", [])] for d in cleaned]
    assert boxes == [[[10, 10, 5, 5]], [[-5, 10, 30, 5], [-0.5, 0, 100.9, 80]], [], [], []]
    assert len(clean(dicts, drop_empty=True)) == 2
    assert repr(dicts) == repr(before)
    again = check_dataset(cleaned, name, 2)
    assert (again.instances, again.degenerate, again.outside) == (3, 0, 0)


def test_errors_name_the_culprit(image, name, tmp_path):
    good = [image(_instance(10, 10, 5, 5))]
    with pytest.raises(ValueError, match="'checks_test' is empty"):
        check_dataset([], name, 2)
    with pytest.raises(ValueError, match=r"MODEL.FCOS.NUM_CLASSES is 80, but .*'checks_test' has 2 classes: a, b"):
        check_dataset(good, name, 80, config_key="MODEL.FCOS.NUM_CLASSES")
    with pytest.raises(ValueError, match=r"class index 2 in .*a.jpg, but MODEL.ROI_HEADS.NUM_CLASSES is 2"):
        check_dataset([image(_instance(10, 10, 5, 5, category=2))], name, 2)
    with pytest.raises(ValueError, match="NUM_KEYPOINTS is 17, but data set 'checks_test' has 1 keypoints: nose"):
        check_dataset(good, name, 2, num_keypoints=17)
    with pytest.raises(ValueError, match="KEYPOINT_ON is set, but data set 'other_checks_test' has no keypoint names"):
        check_dataset(good, "other_checks_test", 2, num_keypoints=17)
    with pytest.raises(ValueError, match="MASK_ON is set, but none of the 1 instances of data set 'checks_test'"):
        check_dataset(good, name, 2, need_masks=True)
    gone = {**good[0], "file_name": str(tmp_path / "gone.jpg")}
    with pytest.raises(FileNotFoundError, match=r"'checks_test': 1 of 2 image files do not exist, .*gone.jpg"):
        check_dataset([*good, gone], name, 2)


def test_what_is_not_known_is_not_compared(image, name):
    assert check_dataset([image(_instance(1, 1, 2, 2, category=7))], name, None).instances == 1
    assert check_dataset([image(_instance(1, 1, 2, 2))], "checks_without_metadata", 5).instances == 1
