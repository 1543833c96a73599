"""Boxes, masks and keypoints as people's annotations have them: faults are found before training, and named."""

from __future__ import annotations

import pytest
from spoiled_data import HEIGHT, WIDTH, Data

from msad.data.checks import load_train_dicts
from msad.data.keypoints import mirrored_pairs, sided_without_partner
from msad.evaluation.detection_loss import fixed_batches
from msad.finding import ERROR, OK, WARNING


@pytest.fixture
def data(tmp_path, clean_catalogs):
    return Data(tmp_path)


def corners(a):
    x, y, w, h = a["bbox"]
    a["bbox"] = [x, y, x + w, y + h]


def centre(a):
    x, y, w, h = a["bbox"]
    a["bbox"] = [x + w / 2, y + h / 2, w, h]


def fractions(a):
    x, y, w, h = a["bbox"]
    a["bbox"] = [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT]


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("change", "text"),
    [(corners, "corners x0, y0, x1, y1"), (centre, "centre and size"), (fractions, "fractions of the image")],
)
def test_boxes_of_another_convention(data, split, change, text):
    """Without masks, which a set of boxes does not have."""
    for a in data.splits[split]["annotations"]:
        a.pop("segmentation")
        a.pop("area")
        if change is centre:  # at the right and lower border
            a["bbox"] = [WIDTH - a["bbox"][2], HEIGHT - a["bbox"][3], *a["bbox"][2:]]
        change(a)
    errors = data.texts(ERROR)
    assert any(f"boxes look like {text}" in error for error in errors), errors


def test_corners_of_small_boxes_are_recognised_by_their_masks(data):
    def small(a):
        a.pop("area")
        a.update(bbox=[5, 6, 9, 11], segmentation=[[5, 6, 9, 6, 9, 11, 5, 11]], keypoints=[])

    data.each(small, "train")
    (error,) = data.texts(ERROR)
    assert "has bbox [5.0, 6.0, 9.0, 11.0] and polygons from [5.0, 6.0, 9.0, 11.0]; boxes are corners" in error


def test_boxes_over_the_border_are_named_if_most_are(data):
    def over(a):
        a.update(bbox=[-5, -5, 40, 35], area=1400, segmentation=[])

    data.each(over, "train", start=7)
    assert not any("over the border" in w for w in data.texts(WARNING))
    data.each(over, "train", start=6)
    (warning,) = (w for w in data.texts(WARNING) if "over the border" in w)
    assert "6 of 12 annotations" in warning


def test_boxes_without_use_are_counted(data):
    data.splits["train"]["annotations"][0]["bbox"] = [5, 5, 0, 4]
    data.splits["train"]["annotations"][1]["bbox"] = [100, 5, 4, 4]
    data.splits["train"]["annotations"][2]["bbox"] = [float("nan"), 5, 4, 4]
    warnings = data.texts(WARNING)
    for text in ("box that has no area", "box that is outside of the image", "annotation 3 has a bbox with NaN"):
        assert any(text in w for w in warnings), (text, warnings)
    assert not data.texts(ERROR)
    data.each(lambda a: a.update(bbox=[5, 5, 0, 4]), "train", start=5)
    assert any("has no area" in error for error in data.texts(ERROR))


def test_areas_that_their_boxes_cannot_have(data):
    data.splits["val"]["annotations"][1]["area"] = 5000
    (warning,) = data.texts(WARNING)
    assert "annotation 2 has area 5000, in a box of 11 x 9" in warning


def test_a_wrong_number_of_labelled_keypoints(data):
    data.splits["val"]["annotations"][1]["num_keypoints"] = 3
    (warning,) = data.texts(WARNING)
    assert "annotation 2 has num_keypoints 3, but 2 of its points are labelled" in warning


def test_objects_twice(data):
    content = data.splits["train"]
    content["annotations"].append({**content["annotations"][0], "id": 99})
    (warning,) = data.texts(WARNING)
    assert "the class and box of another one" in warning and "(1 of 13 annotations)" in warning


def test_crowds(data):
    data.each(lambda a: a.update(iscrowd=1), "train", start=9)
    assert not data.texts(WARNING) and any("iscrowd 1 in 3 of 12" in text for text in data.texts(OK))
    data.each(lambda a: a.update(iscrowd=1), "train", start=3)
    assert any("iscrowd 1 in 9 of 12" in text for text in data.texts(WARNING))
    data.each(lambda a: a.update(iscrowd=1), "train")
    assert any("iscrowd 1 in 12 of 12" in text for text in data.texts(ERROR))


# --- masks and keypoints --------------------------------------------------------------------------------------------

RLE = {"size": [HEIGHT, WIDTH], "counts": [45, 7, HEIGHT * WIDTH - 52]}


def test_images_of_which_only_a_crowd_is_left_are_not_trained_on(data):
    annotations = data.splits["train"]["annotations"]
    annotations[0]["bbox"], annotations[1]["bbox"] = [30, 20, 0, 8], [WIDTH + 5, 20, 9, 8]
    annotations[2]["iscrowd"] = 1
    annotations[3]["bbox"] = [30, 20, 0, 8]  # of the second image, which has two others
    data.register()
    left = [(record["image_id"], len(record["annotations"])) for record in load_train_dicts(data.cfg)]
    assert left == [(2, 2), (3, 3), (4, 3)]
    data.cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    left = [(record["image_id"], len(record["annotations"])) for record in load_train_dicts(data.cfg)]
    assert left == [(1, 1), (2, 2), (3, 3), (4, 3)]


def test_run_length_masks_need_bitmasks(data):
    data.cfg.MODEL.MASK_ON = True
    data.each(lambda a: a.update(segmentation=RLE), "train", start=6)
    (error,) = data.texts(ERROR)
    assert (
        "run-length mask, and INPUT.MASK_FORMAT is polygon (6 of 12 annotations). set INPUT.MASK_FORMAT bitmask"
        in error
    )
    data.cfg.INPUT.MASK_FORMAT = "bitmask"
    assert not data.texts(ERROR)
    data.cfg.INPUT.MASK_FORMAT, data.cfg.MODEL.MASK_ON = "polygon", False
    assert not data.texts(ERROR)
    data.cfg.MODEL.MASK_ON = True
    data.each(lambda a: a.update(iscrowd=1), "train", start=6)  # crowds are not trained on
    assert not data.texts(ERROR)


def test_run_length_masks_of_a_test_set_need_bitmasks_for_its_losses(data):
    """COCO's crowds are run lengths: losses are computed without them."""
    data.cfg.MODEL.MASK_ON = True
    data.each(lambda a: a.update(segmentation=RLE), start=4)
    assert not data.texts(ERROR)
    data.cfg.TEST.LOSS_IMAGES = 2
    (error,) = data.texts(ERROR)
    assert "val_1.png has a run-length mask, and INPUT.MASK_FORMAT is polygon (2 of 6 annotations)" in error
    data.cfg.INPUT.MASK_FORMAT = "bitmask"
    assert not data.texts(ERROR)
    data.cfg.INPUT.MASK_FORMAT = "polygon"
    data.each(lambda a: a.update(iscrowd=1), start=4)
    assert not data.texts(ERROR)
    assert fixed_batches(data.cfg, "d_val", 2, 2)


def test_masks_on_a_part_of_the_instances(data):
    data.cfg.MODEL.MASK_ON = True
    data.each(lambda a: a.pop("segmentation"), start=2)
    (error,) = data.texts(ERROR)
    assert "has no mask, and MODEL.MASK_ON is set (4 of 6 annotations)" in error and "val_0.png" in error
    data.each(lambda a: a.pop("segmentation", None))
    (error,) = data.texts(ERROR)
    assert "in any of its 6 instances" in error


def test_polygons_in_fractions_of_the_image(data):
    data.cfg.MODEL.MASK_ON = True
    data.each(lambda a: a.update(segmentation=[[0.1, 0.2, 0.5, 0.2, 0.5, 0.6]]), "train")
    assert any("polygons in fractions of the image" in error for error in data.texts(ERROR))


@pytest.fixture
def points(data):
    data.cfg.MODEL.KEYPOINT_ON, data.cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = True, 3
    return data


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda a: a.pop("keypoints"), "has no keypoints, and MODEL.KEYPOINT_ON is set (3 of 6"),
        (lambda a: a.update(keypoints=[35, 25, 2] * 2), "has 2 keypoints instead of 3 (3 of 6"),
        (lambda a: a.update(keypoints=[0.5, 0.5, 2] * 3), "a labelled keypoint"),
        (lambda a: a.update(keypoints=[500, 20, 2] * 3), "a labelled keypoint outside of its image (3 of 6"),
    ],
)
def test_keypoints(points, change, text):
    points.each(change, start=3)
    points.each(lambda a: a.pop("num_keypoints"))
    if text == "a labelled keypoint":
        points.each(change)
        text = "keypoints in fractions of the image (6 of 6"
    assert any(text in said for said in points.texts(ERROR) + points.texts(WARNING))


def test_keypoints_without_sigmas_cannot_be_evaluated(points):
    for category in points.splits["val"]["categories"]:
        del category["sigmas"]
    (error,) = points.texts(ERROR)
    assert "has 3 keypoints and 0 OKS sigmas" in error and "TEST.KEYPOINT_OKS_SIGMAS" in error
    points.cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.1, 0.1, 0.1]
    assert not points.texts(ERROR)


@pytest.mark.parametrize(
    ("names", "level", "text"),
    [
        (["nose", "left_eye", "right_ear"], ERROR, "without a counterpart: left_eye, right_ear"),
        (["nose", "a", "b"], WARNING, "no pair of left and right"),
        (["Nose", "Left_eye", "Right_eye"], OK, ""),
    ],
)
def test_sides_that_mirrored_images_exchange(points, names, level, text):
    for category in points.splits["train"]["categories"]:
        category["keypoints"] = names
    points.cfg.DATASETS.TEST = ()
    findings = [f for f in points.check() if f.level != OK]
    assert [f.level for f in findings] == ([] if level == OK else [level])
    assert all(text in f.text and "KEYPOINT_FLIP_PAIRS" in f.fix for f in findings)
    points.cfg.INPUT.RANDOM_FLIP = "none"
    assert not points.texts(ERROR) + points.texts(WARNING)


def test_no_pairs_are_a_statement_too(points):
    for category in points.splits["train"]["categories"]:
        category.update(keypoints=["nose", "left_eye", "tail"], flip_pairs=[])
    points.cfg.DATASETS.TEST = ()
    assert not points.texts(ERROR) + points.texts(WARNING)


def test_keypoints_in_another_order_than_in_training(points):
    for category in points.splits["val"]["categories"]:
        category["keypoints"] = ["nose", "right_eye", "left_eye"]
    (error,) = points.texts(ERROR)
    assert "different keypoints: ['nose', 'left_eye', 'right_eye'], ['nose', 'right_eye', 'left_eye']" in error


def test_pairs_that_are_only_a_part(points):
    names = ["left_eye", "right_eye", "left_ear"]
    for content in points.splits.values():
        for category in content["categories"]:
            category.update(keypoints=names, flip_pairs=[["left_eye", "right_eye"]])
    (warning,) = points.texts(WARNING)
    assert "without a counterpart: left_ear" in warning
    for category in points.splits["train"]["categories"]:
        category.update(flip_pairs=[["left_eye", "right_eye"], ["left_ear", "left_eye"]])
    assert any("'left_eye' is named twice" in error for error in points.texts(ERROR))


PAIRS = [
    "left_eye right_eye", "Left_Eye Right_Eye", "LEFTEYE RIGHTEYE", "l_eye r_eye", "L_eye R_eye", "eye_l eye_r",
    "eyeL eyeR", "LEye REye", "lEye rEye", "lefteye righteye", "EyeLeft EyeRight", "leye reye", "left right", "L R",
    "eye.L eye.R", "2l 2r", "Eye(left) Eye(right)", "left_eye Right_Eye", "tl tr", "l-hip r-hip",
]  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS)
def test_left_and_right_in_any_spelling(pair):
    first, second = pair.split()
    names = ["nose", first, "tail", second, "Neck"]
    assert mirrored_pairs(names) == [(first, second)] and not sided_without_partner(names, [(first, second)])


def test_names_that_are_no_sides():
    assert mirrored_pairs(["nose", "tail", "bright", "leg", "root"]) == []
    assert mirrored_pairs(["fl", "fr", "rl", "rr"]) == [("fl", "fr"), ("rl", "rr")]
    assert mirrored_pairs(["ll", "lr", "rl", "rr"]) == []  # each would have two partners
    assert sided_without_partner(["left_eye", "nose", "R", "bright"], []) == ["left_eye", "R"]
