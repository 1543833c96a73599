"""Every kind of fault that people's annotation files had: found before training, and named.

The same files go to whichever engine is installed, so that both say the same.
"""

from __future__ import annotations

import base64
import json
import uuid
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from spoiled_data import HEIGHT, WIDTH, Data

from msad.data import build_train_loader, check_data
from msad.data.coco_annotations import bitmap, read_counts
from msad.finding import ERROR, OK, WARNING


@pytest.fixture
def data(tmp_path, clean_catalogs):
    return Data(tmp_path)


def test_good_data_have_no_complaints(data):
    data.cfg.MODEL.MASK_ON = data.cfg.MODEL.KEYPOINT_ON = True
    data.cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 3
    findings = data.check()
    assert {f.level for f in findings} == {OK} and len(findings) == 2, findings
    assert MetadataCatalog.get("d_val").json_file == str(data.root / "annotations_val.json")  # used as it is


def test_records_are_those_of_the_engine(data):
    content = data.splits["val"]
    content["annotations"][1]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": [5, 7, HEIGHT * WIDTH - 12]}
    content["annotations"][2]["segmentation"].append([1, 2, 3, 4])
    content["annotations"][4]["iscrowd"] = 1
    data.register()
    ours = DatasetCatalog.get("d_val")
    theirs = load_coco_json(str(data.root / "annotations_val.json"), str(data.root / "images"), "d_other")
    assert ours == theirs and len(ours[1]["annotations"]) == 3


@pytest.mark.parametrize("polygon", [[], [6, 6], [6, 6, 20, 20], [1, 2, 3, 4, 5, 6, 7]])
@pytest.mark.parametrize("alone", [False, True])
def test_what_is_no_polygon_is_left_out_of_training_and_evaluation(data, polygon, alone, tmp_path):
    """A stray click or a rectangle by two corners: pycocotools fails on it, and the box beside it is good."""
    for split in data.splits.values():
        for a in split["annotations"]:
            a["segmentation"].insert(0, polygon)
        if alone:
            split["annotations"][2]["segmentation"] = [polygon]
    data.cfg.MODEL.MASK_ON = not alone
    findings = data.check()
    said = [str(f) for f in findings if f.level == WARNING]
    assert len(said) == 2 and all("annotation 1 has a polygon of fewer than three points" in text for text in said)
    records = DatasetCatalog.get("d_val")
    assert sum(len(record["annotations"]) for record in records) == 6
    evaluator = COCOEvaluator("d_val", tasks=("bbox",) if alone else ("bbox", "segm"), output_dir=str(tmp_path / "out"))
    evaluator.reset()
    for record in records:
        found = Instances((HEIGHT, WIDTH))
        x, y, w, h = np.array([a["bbox"] for a in record["annotations"]]).T
        found.pred_boxes = Boxes(np.stack([x, y, x + w, y + h], 1))
        found.scores = torch.ones(len(x))
        found.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]])
        if not alone:
            outlines = [a["segmentation"] for a in record["annotations"]]
            found.pred_masks = torch.from_numpy(np.stack([bitmap(o, HEIGHT, WIDTH) for o in outlines]))
        evaluator.process([record], [{"instances": found}])
    assert all(result["AP"] == pytest.approx(100) for result in evaluator.evaluate().values())


def test_an_object_whose_only_outline_is_no_polygon_needs_a_mask(data):
    data.splits["train"]["annotations"][2]["segmentation"] = [[6, 6, 20, 20]]
    data.cfg.MODEL.MASK_ON = True
    assert any("has no mask, and MODEL.MASK_ON is set" in str(f) for f in data.check() if f.level == ERROR)


# --- annotation files -----------------------------------------------------------------------------------------------


def rle(content, spoil):
    """Give the third annotation a run-length mask, its compressed counts as ``spoil`` makes them of the bytes."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[9:30, 7:50] = np.random.default_rng(0).integers(0, 2, (21, 43))
    counts = spoil(mask_util.encode(mask)["counts"])
    content["annotations"][2]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": counts}


VALUES = {
    "text ids": (lambda d: [c.update(id=str(c["id"])) for c in d["categories"]], "category '1' has no whole number"),
    "text category_id": (lambda d: [a.update(category_id="1") for a in d["annotations"]],
                         "annotation 1 has category_id '1', not a whole number, in 'val_0.png' (6 of 6 annotations)"),
    "text image ids": (lambda d: [i.update(id=i["file_name"]) for i in d["images"]], "has id 'val_0.png', not a whole"),
    "text box": (lambda d: d["annotations"][2].update(bbox=["1", "2", "3", "4"]),
                 "annotation 3 has bbox ['1', '2', '3', '4']: texts instead of numbers"),
    "null in a box": (lambda d: d["annotations"][2].update(bbox=[1, None, 3, 4]), "null instead of numbers"),
    "true in a box": (lambda d: d["annotations"][2].update(bbox=[1, True, 3, 4]), "truth values instead of numbers"),
    "short box": (lambda d: d["annotations"][2].update(bbox=[1, 2, 3]), "annotation 3 has bbox [1, 2, 3], 3 numbers"),
    "box is a mapping": (lambda d: d["annotations"][0].update(bbox={"x": 1}), "annotation 1 has bbox {'x': 1}"),
    "uuid ids": (lambda d: [a.update(id=str(uuid.uuid4())) for a in d["annotations"]], "number the annotations"),
    "no annotation ids": (lambda d: [a.pop("id") for a in d["annotations"]], "annotation number 0 has no id"),
    "ids twice": (lambda d: d["annotations"][1].update(id=1), "annotation 1 has the id of another annotation"),
    "stray category": (lambda d: d["annotations"][1].update(category_id=7), "2 has category_id 7, which is not listed"),
    "stray image": (lambda d: d["annotations"][1].update(image_id=7), "2 has image_id 7, which is not listed"),
    "images twice": (lambda d: d["images"][1].update(id=1), "image 'val_1.png' has the id of another"),
    "category twice": (lambda d: d["categories"][1].update(id=1), "category 1 is listed twice"),
    "iscrowd null": (lambda d: [a.update(iscrowd=None) for a in d["annotations"]], "annotation 1 has iscrowd None"),
    "iscrowd text": (lambda d: [a.update(iscrowd="0") for a in d["annotations"]], "annotation 1 has iscrowd '0'"),
    "ignore": (lambda d: d["annotations"][0].update(ignore=1), "'ignore', which is not supported"),
    "area text": (lambda d: d["annotations"][0].update(area="80"), "annotation 1 has area '80'"),
    "area null": (lambda d: d["annotations"][0].update(area=None), "annotation 1 has area None"),
    "area nan": (lambda d: d["annotations"][0].update(area=float("nan")), "annotation 1 has area nan"),
    "size text": (lambda d: d["images"][1].update(width="60"), "image 'val_1.png' has width '60'"),
    "size zero": (lambda d: d["images"][1].update(height=0), "image 'val_1.png' has height 0"),
    "no height": (lambda d: d["images"][0].pop("height"), "image 'val_0.png' has no height"),
    "no file_name": (lambda d: d["images"][0].pop("file_name"), "images[0] has no file_name"),
    "name is a number": (lambda d: d["categories"][0].update(name=1), "category 1 has name 1, not a text"),
    "no name": (lambda d: d["categories"][0].pop("name"), "category 1 has name None"),
    "no categories": (lambda d: d.update(categories=[], annotations=[]), "the list 'categories' is empty"),
    "categories null": (lambda d: d.update(categories=None), "it has no list 'categories' (it is null)"),
    "annotation is a list": (lambda d: d["annotations"].append([1]), "annotations[6] is [1], not an object"),
    "flat polygon": (lambda d: d["annotations"][0].update(segmentation=[1, 1, 9, 1, 9, 9]),
                     "annotation 1 has segmentation [1, 1, 9, 1, 9, 9]"),
    "polygon of points": (lambda d: d["annotations"][0].update(segmentation=[[[1, 1], [9, 1], [9, 9]]]),
                          "lists instead of numbers"),
    "polygon of texts": (lambda d: d["annotations"][0].update(segmentation=[["1", "1", "9", "1", "9", "9"]]), "texts"),
    "polygon nan": (lambda d: d["annotations"][0].update(segmentation=[[1, 1, float("nan"), 1, 9, 9]]), "with NaN"),
    "rle turned": (lambda d: d["annotations"][0].update(segmentation={"size": [WIDTH, HEIGHT], "counts": [2400]}),
                   "run-length mask of size [60, 40] in an image of [40, 60]"),
    "rle too short": (lambda d: d["annotations"][0].update(segmentation={"size": [HEIGHT, WIDTH], "counts": [5, 5]}),
                      "do not sum up to its image"),
    "rle negative": (lambda d: d["annotations"][0].update(
        segmentation={"size": [HEIGHT, WIDTH], "counts": [-5, 5, HEIGHT * WIDTH]}), "do not sum up to its image"),
    "rle as bytes": (lambda d: rle(d, lambda counts: str(counts)), "annotation 3 has run-length counts \"b'"),
    "rle in base64": (lambda d: rle(d, lambda counts: base64.b64encode(counts).decode()), "which are damaged"),
    "rle cut off": (lambda d: rle(d, lambda counts: counts.decode()[:-3]), "neither str(counts) nor base64"),
    "rle cut at a number": (lambda d: rle(d, lambda counts: counts.decode()[:4]), "which are damaged, in 'val_0.png'"),
    "rle empty": (lambda d: rle(d, lambda counts: ""), "which are damaged"),
    "rle of other letters": (lambda d: rle(d, lambda counts: "\ud800" + counts.decode()), "which are damaged"),
    "keypoints odd": (lambda d: d["annotations"][0].update(keypoints=[1, 2]), "annotation 1 has keypoints [1, 2]"),
    "keypoint texts": (lambda d: d["annotations"][0].update(keypoints=["1"] * 9), "texts instead of numbers"),
    "keypoint nan": (lambda d: d["annotations"][0].update(keypoints=[float("inf"), 1, 2] * 3), "keypoint with NaN or"),
    "probabilities": (lambda d: d["annotations"][0].update(keypoints=[31, 21, 0.87] * 3), "keypoint visibility 0.87"),
    "visibility 3": (lambda d: d["annotations"][0].update(keypoints=[31, 21, 3] * 3), "keypoint visibility 3"),
    "skeleton from 0": (lambda d: d["categories"][0].update(skeleton=[[0, 1]]), "skeleton[0] is [0, 1]"),
    "keypoints differ": (lambda d: d["categories"][0].update(keypoints=["a"]), "'cat' and 'dog' have different"),
}  # fmt: skip


@pytest.mark.parametrize("case", VALUES)
def test_values_of_a_wrong_type_or_range_are_named(data, case):
    change, text = VALUES[case]
    change(data.splits["val"])
    findings = [finding for finding in data.check() if finding.level == ERROR]
    assert len(findings) == 1 and text in findings[0].text + findings[0].fix, findings
    assert findings[0].check == "data set 'd_val'"


@pytest.mark.parametrize("share", [0, 0.02, 0.5, 1])
@pytest.mark.parametrize("size", [(1, 1), (40, 60), (333, 217)])
def test_compressed_run_lengths_are_read_as_they_were_written(size, share):
    mask = np.asfortranarray(np.random.default_rng(0).random(size) < share, np.uint8)
    column = mask.ravel(order="F").astype(int)
    changes = np.flatnonzero(np.diff(column, prepend=0))
    wanted = np.diff(changes, prepend=0, append=column.size).tolist()
    assert read_counts(mask_util.encode(mask)["counts"].decode()) == wanted


def test_whole_run_lengths_have_no_complaints(data):
    rle(data.splits["val"], lambda counts: counts.decode())
    assert data.texts(ERROR) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[]", "it has no list 'images' (its content is a list)"),
        (b"", "is not valid JSON"),
        (b'{"images": [', "is not valid JSON"),
        (b"\xff\xfe{\x00", "is not valid JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
    ],
)
def test_files_that_are_no_coco_files(data, text, message):
    data.register()
    (data.root / "annotations_val.json").write_bytes(text)
    (error,) = [f for f in check_data(data.cfg)[1] if f.level == ERROR]
    assert message in error.text and "annotations_val.json" in error.text


def test_several_faults_are_told_at_once(data):
    data.each(lambda a: a.update(bbox=["0"] * 4), "train")
    data.each(lambda a: a.update(iscrowd=None))
    data.splits["val"]["images"][0].pop("width")
    said = "\n".join(data.texts(ERROR))
    assert "(12 of 12 annotations)" in said and "has iscrowd None" in said and "has no width" in said
    with pytest.raises(ValueError, match=r"(?s)'d_train'.*'d_val'.*iscrowd None"):
        build_train_loader(data.cfg, seed=0)


# --- what is absent is filled in, equally on both engines -----------------------------------------------------------


def evaluate(name, shift=0.0):
    """AP of detections that are the boxes of the records, moved by ``shift`` pixels."""
    evaluator = COCOEvaluator(name, tasks=("bbox",), distributed=False)
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        found = Instances((HEIGHT, WIDTH))
        boxes = np.array([a["bbox"] for a in record["annotations"]], dtype=np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        found.pred_boxes = Boxes(boxes + np.float32(shift))
        found.scores = found.pred_boxes.tensor.new_ones(len(boxes))
        found.pred_classes = found.scores.new_tensor([a["category_id"] for a in record["annotations"]]).long()
        evaluator.process([{"image_id": record["image_id"]}], [{"instances": found}])
    return evaluator.evaluate()


@pytest.mark.parametrize(
    "change",
    [
        lambda d: [a.pop("iscrowd") for a in d["annotations"]],
        lambda d: [a.pop("area") for a in d["annotations"]],
        lambda d: [a.update(id=a["id"] - 1) for a in d["annotations"]],
        lambda d: d.pop("info"),
        lambda d: [a.update(image_id=float(a["image_id"])) for a in d["annotations"]],
        lambda d: [a.pop("num_keypoints") for a in d["annotations"]],
        lambda d: d["annotations"].append({**d["annotations"][0], "id": 99, "bbox": None}),
        lambda d: d["annotations"].append({**d["annotations"][0], "id": 99, "bbox": [1, float("nan"), 2, 2]}),
    ],
    ids=["iscrowd", "area", "id 0", "info", "floats", "num_keypoints", "no box", "nan"],
)
def test_absent_values_do_not_change_the_metric(data, change):
    data.register()
    expected = evaluate("d_val", shift=0.6)
    DatasetCatalog.remove("d_val")
    MetadataCatalog.remove("d_val")
    change(data.splits["val"])
    assert not data.texts(ERROR)
    found = evaluate("d_val", shift=0.6)
    assert found["bbox"] == pytest.approx(expected["bbox"], nan_ok=True) and 20 < found["bbox"]["AP"] < 90
    assert evaluate("d_val")["bbox"]["AP"] == pytest.approx(100)


def test_absent_areas_are_those_of_the_masks(data):
    triangle = [[30, 20, 38, 20, 30, 28]]
    data.each(lambda a: a.update(segmentation=triangle, bbox=[30, 20, 8, 8]))
    data.each(lambda a: a.pop("area"))
    data.register()
    DatasetCatalog.get("d_val")
    file = json.loads(Path(MetadataCatalog.get("d_val").json_file).read_text())
    assert 28 <= file["annotations"][0]["area"] <= 40  # 32 square pixels, 64 of the box
    assert str(data.root) not in MetadataCatalog.get("d_val").json_file  # nothing is written beside the user's files


def test_byte_order_marks_are_read_over(data):
    data.register()
    file = data.root / "annotations_val.json"
    file.write_text(file.read_text(), encoding="utf-8-sig")
    assert not [f for f in check_data(data.cfg)[1] if f.level == ERROR]
    assert evaluate("d_val")["bbox"]["AP"] == pytest.approx(100)


@pytest.mark.parametrize("absent", [True, False])
def test_test_sets_without_annotations(data, absent, tmp_path):
    data.splits["val"]["annotations"] = []
    if absent:
        del data.splits["val"]["annotations"]
    (warning,) = data.texts(WARNING)
    assert "detections are written, AP is not computed" in warning and not data.texts(ERROR)
    evaluator = COCOEvaluator("d_val", distributed=False, output_dir=str(tmp_path / "out"))
    evaluator.reset()
    boxes = Boxes([[1.0, 2, 3, 4]])
    found = Instances(
        (HEIGHT, WIDTH), pred_boxes=boxes, scores=boxes.tensor[:, 0], pred_classes=boxes.tensor[:, 0].long()
    )
    evaluator.process([{"image_id": 2}], [{"instances": found}])
    assert evaluator.evaluate() == {}
    (written,) = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert written["bbox"] == [1.0, 2.0, 2.0, 2.0] and written["category_id"] == 2 and written["image_id"] == 2


def test_training_on_a_set_without_annotations_is_refused(data):
    data.splits["train"]["annotations"] = []
    (error,) = data.texts(ERROR)
    assert "no annotations" in error
    data.splits["train"]["images"] = []
    (error,) = data.texts(ERROR)
    assert "it is empty" in error


# --- classes --------------------------------------------------------------------------------------------------------


def rename(content, names, ids):
    old = {c["id"]: c["name"] for c in content["categories"]}
    number = dict(zip(names, ids))
    content["categories"] = [{**content["categories"][0], "id": number[n], "name": n} for n in names]
    content["annotations"] = [
        {**a, "category_id": number[old[a["category_id"]]]}
        for a in content["annotations"]
        if old[a["category_id"]] in names
    ]


@pytest.mark.parametrize(("names", "ids"), [(["cat", "dog"], [2, 1]), (["dog"], [1]), (["dog", "cat"], [10, 90])])
def test_classes_of_the_validation_set_are_mapped_by_name(data, names, ids):
    rename(data.splits["val"], names, ids)
    assert not data.texts(ERROR)
    assert list(MetadataCatalog.get("d_val").thing_classes) == ["cat", "dog"]
    used = {a["category_id"] for record in DatasetCatalog.get("d_val") for a in record["annotations"]}
    assert used == {("cat", "dog").index(name) for name in names}
    result = evaluate("d_val")["bbox"]
    assert result["AP"] == pytest.approx(100)
    assert result["AP-dog"] == pytest.approx(100) and (np.isnan(result["AP-cat"]) == ("cat" not in names))


def test_second_training_sets_are_mapped_too_and_others_are_refused(data):
    data.cfg.DATASETS.TRAIN, data.cfg.DATASETS.TEST = ("d_train", "d_val"), ()
    rename(data.splits["val"], ["dog", "cat"], [1, 2])
    assert not data.texts(ERROR) and list(MetadataCatalog.get("d_val").thing_classes) == ["cat", "dog"]


def test_a_class_that_training_does_not_know_shows_both_lists(data):
    data.splits["val"]["categories"][1]["name"] = "Dog"
    (error,) = data.texts(ERROR)
    assert "'Dog'" in error and "['cat', 'Dog']" in error and "['cat', 'dog']" in error
    assert "annotations_val.json" in error


def test_classes_are_known_from_a_training_file_that_was_not_loaded(data):
    """As in --eval-only, where the training set is only registered."""
    rename(data.splits["val"], ["dog", "cat"], [1, 2])
    data.register()
    DatasetCatalog.get("d_val")
    assert list(MetadataCatalog.get("d_val").thing_classes) == ["cat", "dog"]


def test_roboflows_unused_category_is_no_class(data):
    for content in data.splits.values():
        for category in content["categories"]:
            category["supercategory"] = "animals"
        content["categories"].insert(0, {"id": 0, "name": "animals", "supercategory": "none"})
    found = data.check()
    assert {f.level for f in found} == {OK}
    assert any("'animals' with id 0" in f.text for f in found)
    assert list(MetadataCatalog.get("d_train").thing_classes) == ["cat", "dog"]
    assert evaluate("d_val")["bbox"]["AP"] == pytest.approx(100)


def test_roboflows_category_stays_if_it_is_declared_or_used(data):
    data.splits["val"]["categories"].insert(0, {"id": 0, "name": "animals"})  # not the others' supercategory
    assert not data.texts(ERROR)
    data.cfg.DATASETS.TRAIN = ()
    content = data.splits["train"]
    for category in content["categories"]:
        category["supercategory"] = "animals"
    content["categories"].insert(0, {"id": 0, "name": "animals"})
    data.entry = {"CLASSES": ["animals", "cat", "dog"]}
    for name in ("d_train", "d_val"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    data.register()
    DatasetCatalog.get("d_train")
    assert list(MetadataCatalog.get("d_train").thing_classes) == ["animals", "cat", "dog"]


def test_classes_without_an_instance_are_said(data):
    data.each(lambda a: a.update(category_id=1), "train")
    unused, unlearned = data.texts(WARNING)
    assert "never has 1 of its 2 classes: dog" in unused
    assert unlearned.startswith("has objects of classes that are never trained on") and ": dog (2)" in unlearned


def test_names_that_no_data_set_has(data):
    data.cfg.DATASETS.TEST = ("d_vall",)
    (error,) = data.texts(ERROR)
    assert "no data set is called 'd_vall'; did you mean d_val?" in error


@pytest.fixture
def both(data):
    """A set of masks and keypoints that is trained on and tested on, with a crowd in run lengths."""
    data.cfg.MODEL.KEYPOINT_ON = data.cfg.MODEL.MASK_ON = True
    data.cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 3
    data.cfg.DATASETS.TEST = ("d_train",)
    crowd = {"iscrowd": 1, "segmentation": {"size": [HEIGHT, WIDTH], "counts": [5, 7, HEIGHT * WIDTH - 12]}, "area": 7}
    data.splits["train"]["annotations"][0].update(crowd)
    return data


def test_a_good_set_that_is_trained_and_tested_on(both):
    said = [(f.level, f.text) for f in both.check() if "trained on too" not in f.text]
    assert [level for level, _ in said] == [OK, OK] and "12 of 12 instances" in said[1][1], said


def test_a_set_that_is_trained_and_tested_on_is_checked_as_both(both):
    """As in the check whether a model learns a few images by heart: what a test set lacks is an error, said once."""
    content = both.splits["train"]
    for category in content["categories"]:
        del category["sigmas"]
    content["annotations"][1]["bbox"], content["annotations"][1]["area"] = [30, 20, 0, 8], 0
    content["annotations"][2]["iscrowd"] = 1
    del content["annotations"][2]["segmentation"]
    both.image("train_1.png").write_bytes(both.image("train_1.png").read_bytes()[:2000])
    found = [f for f in both.check() if f.level != OK and "trained on too" not in f.text]
    texts = {level: [f.text for f in found if f.level == level] for level in (ERROR, WARNING)}
    mask, sigmas, image = texts[ERROR]
    assert "has no mask, and MODEL.MASK_ON is set (1 of 12 annotations)" in mask
    assert "has 3 keypoints and 0 OKS sigmas for evaluation" in sigmas
    assert "train_1.png cannot be read" in image and "takes another" not in image
    (box,) = texts[WARNING]
    assert "not finite; training leaves it out and it can never be found (1 of 12 annotations)" in box
    both.cfg.DATASETS.TEST = ()
    assert not both.texts(ERROR)


def test_images_that_are_trained_and_tested_on(data):
    data.cfg.DATASETS.TEST = ("d_train",)
    (warning,) = data.texts(WARNING)
    assert "4 of its 4 images are trained on too" in warning
