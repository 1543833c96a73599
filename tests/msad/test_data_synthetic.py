"""Synthetic scenes: reproducible, honest about what is visible, and valid COCO."""

import contextlib
import io
import json

import cv2
import numpy as np
import pytest
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from msad.data import shapes
from msad.data.scenes import draw_scene
from msad.data.synthetic import make_dataset


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    make_dataset(folder, num_train=3, num_val=12, size=(96, 128), seed=5)
    return folder


def _coco(path):
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


def _scene(index, **kwargs):
    return draw_scene(np.random.default_rng((7, 0, index)), (128, 160), **kwargs)


def test_a_scene_depends_on_seed_and_index_only(root, tmp_path):
    make_dataset(tmp_path, num_train=1, num_val=2, size=(96, 128), seed=5)
    for name in ("train_000000.jpg", "val_000000.jpg", "val_000001.jpg"):
        assert (tmp_path / "images" / name).read_bytes() == (root / "images" / name).read_bytes()
    few, many = (json.loads((r / "annotations_val.json").read_text()) for r in (tmp_path, root))
    assert few["annotations"] == [a for a in many["annotations"] if a["image_id"] <= 2]
    assert (root / "images/train_000000.jpg").read_bytes() != (root / "images/val_000000.jpg").read_bytes()


def test_equal_parameters_do_nothing_others_draw_again(tmp_path):
    make_dataset(tmp_path, 2, 1, size=(64, 64), seed=1)
    image = tmp_path / "images/train_000000.jpg"
    image.write_bytes(b"marker")
    make_dataset(tmp_path, 2, 1, size=(64, 64), seed=1)
    assert image.read_bytes() == b"marker"
    make_dataset(tmp_path, 1, 1, size=(64, 64), seed=2)
    assert cv2.imread(str(image)).shape == (64, 64, 3)
    assert not (tmp_path / "images/train_000001.jpg").exists()
    assert json.loads((tmp_path / "dataset.json").read_text())["seed"] == 2


def test_an_interrupted_run_is_not_taken_for_complete(tmp_path, monkeypatch):
    make_dataset(tmp_path, 1, 1, size=(64, 64), seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(cv2, "imwrite", lambda *_: False)
        with pytest.raises(OSError, match=r"train_000000.jpg"):
            make_dataset(tmp_path, 1, 1, size=(64, 64), seed=2)
    assert not (tmp_path / "dataset.json").exists()
    make_dataset(tmp_path, 1, 1, size=(64, 64), seed=2)
    assert (tmp_path / "dataset.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed must not be negative"),
        ({"objects": (5, 2)}, "1 <= least <= most"),
        ({"min_size": 2}, "at least 4 pixels"),
        ({"max_fraction": 0.01}, "allow objects of min_size"),
        ({"classes": ("disc", "cube")}, "different ones of disc, ring"),
        ({"classes": ("disc", "disc")}, "different ones of disc, ring"),
    ],
)
def test_impossible_parameters(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        make_dataset(tmp_path / "new", 1, 1, **change)
    assert not (tmp_path / "new").exists()


def test_polygons_cover_the_visible_region_and_boxes_fit_them():
    for index in range(12):
        image, annotations = _scene(index, objects=(8, 12))
        assert image.shape == (128, 160, 3) and image.dtype == np.uint8
        total = np.zeros((128 * 4, 160 * 4), int)
        for a in annotations:
            x, y, w, h = a["bbox"]
            points = np.concatenate([np.reshape(p, (-1, 2)) for p in a["segmentation"]])
            np.testing.assert_allclose(points.min(axis=0), (x, y), atol=0.011)
            np.testing.assert_allclose(points.max(axis=0), (x + w, y + h), atol=0.011)
            assert x >= 0 and y >= 0 and x + w <= 160 and y + h <= 128
            fine = [(4 * np.array(p)).tolist() for p in a["segmentation"]]
            mask = mask_utils.decode(mask_utils.merge(mask_utils.frPyObjects(fine, 128 * 4, 160 * 4)))
            # the polygons may leave the drawn outline by 0.2 pixels
            perimeter = 2 * (w + h)
            assert abs(mask.sum() / 16 - a["area"]) < 0.2 * perimeter
            total += cv2.erode(mask, np.ones((3, 3), np.uint8))
        assert total.max() == 1, "visible regions must not overlap"


@pytest.mark.parametrize("name", shapes.CLASSES)
def test_polygons_keep_holes_and_follow_the_outline(name):
    outlines, _ = shapes.place(name, np.array([20.3, 19.8]), 12, 1.1, 0.5 * shapes.max_rotation(name))
    mask, origin = shapes.raster(outlines)
    polygons = [(8 * np.array(p)).tolist() for p in shapes.to_polygons(mask, origin)]
    assert len(polygons) == (2 if name == "ring" else 1), "a ring is cut in two, because polygons cannot have holes"
    drawn = mask_utils.decode(mask_utils.merge(mask_utils.frPyObjects(polygons, 320, 320)))
    assert drawn[158, 162] == (name != "ring")
    contours = [o.astype(np.float32) for o in outlines]
    area = cv2.contourArea(contours[0]) - sum(map(cv2.contourArea, contours[1:]))
    length = sum(cv2.arcLength(c, True) for c in contours)
    assert abs(drawn.sum() / 64 - area) < 0.1 * length, "a tenth of a pixel off on average"


def test_outlines_run_along_the_cells_edges():
    mask = np.zeros((16, 24), bool)
    mask[4:12, 8:20] = True
    (polygon,) = shapes.to_polygons(mask, (10, 20))
    points = np.reshape(polygon, (-1, 2))
    assert points.min(axis=0).tolist() == [12, 21] and points.max(axis=0).tolist() == [15, 23]


def test_keypoints_turn_with_the_object():
    _, upright = shapes.place("square", np.zeros(2), 10, 1.0, 0)
    _, turned = shapes.place("square", np.zeros(2), 10, 1.0, 30)
    top = shapes.KEYPOINTS.index("top")
    np.testing.assert_allclose(upright[top], (0, -8.5), atol=1e-9)
    np.testing.assert_allclose(turned[top], (8.5 * 0.5, -8.5 * np.sqrt(0.75)), atol=1e-9)


def test_visibility_of_keypoints_and_minimum_visible_fraction():
    seen = set()
    for index in range(20):
        _, annotations = _scene(index, objects=(10, 14))
        for a in annotations:
            triples = np.reshape(a["keypoints"], (-1, 3))
            assert len(triples) == 5 and a["num_keypoints"] == (triples[:, 2] > 0).sum()
            assert (triples[triples[:, 2] == 0] == 0).all()
            inside = triples[triples[:, 2] > 0]
            assert (inside[:, 0] < 160).all() and (inside[:, 1] < 128).all()
            seen |= set(triples[:, 2].astype(int))
            # the least object: a plus of 6 pixels of which 35 % are seen
            assert a["area"] > 0.35 * 0.5 * 3**2
    assert seen == {0, 1, 2}


def test_every_class_and_a_wide_range_of_sizes_occur():
    annotations = [a for i in range(40) for a in _scene(i)[1]]
    assert {a["category_id"] for a in annotations} == set(range(1, len(shapes.CLASSES) + 1))
    sides = [max(a["bbox"][2:]) for a in annotations]
    assert min(sides) < 8 and max(sides) > 35


def test_chosen_classes_are_numbered_as_named(tmp_path):
    make_dataset(tmp_path, 4, 1, size=(96, 96), classes=("star", "disc"))
    data = json.loads((tmp_path / "annotations_train.json").read_text())
    assert [(c["id"], c["name"]) for c in data["categories"]] == [(1, "star"), (2, "disc")]
    assert {a["category_id"] for a in data["annotations"]} == {1, 2}
    # A disc fills more of its box than a star does.
    star, disc = (
        np.median([a["area"] / np.prod(a["bbox"][2:]) for a in data["annotations"] if a["category_id"] == number])
        for number in (1, 2)
    )
    assert disc > 0.7 > 0.5 > star


@pytest.mark.parametrize("kind", ["bbox", "segm", "keypoints"])
def test_ground_truth_scored_against_itself_is_perfect(root, kind):
    truth = _coco(root / "annotations_val.json")
    assert len(truth.imgs) == 12 and len(truth.anns) > 30
    detections = []
    for a in truth.anns.values():
        rle = mask_utils.merge(mask_utils.frPyObjects(a["segmentation"], 96, 128))
        extra = {"bbox": {"bbox": a["bbox"]}, "segm": {"segmentation": rle}, "keypoints": {"keypoints": a["keypoints"]}}
        detections.append({k: a[k] for k in ("image_id", "category_id")} | {"score": 0.9} | extra[kind])
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOeval(truth, truth.loadRes(detections), kind)
        if kind == "keypoints":
            evaluator.params.kpt_oks_sigmas = np.array(shapes.KEYPOINT_SIGMAS)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    assert evaluator.stats[0] == pytest.approx(1.0)
