"""Every kind of fault that people's annotation and image files had: found before training, and named.

The same files go to whichever engine is installed, so that both say the same.
"""

from __future__ import annotations

import json
import logging
import uuid
from pathlib import Path

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from PIL import Image

from msad.config import add_msad_config
from msad.data import build_train_loader, check_data, register_datasets, register_entries
from msad.data.keypoints import mirrored_pairs, sided_without_partner
from msad.finding import ERROR, OK, WARNING

POINTS = ["nose", "left_eye", "right_eye"]
WIDTH, HEIGHT = 60, 40


@pytest.fixture(autouse=True)
def clean_catalogs():
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


class Data:
    """A data set of 4 + 2 images of 60 x 40 pixels with 3 objects each, to be spoiled."""

    def __init__(self, root):
        self.root = root
        (root / "images").mkdir()
        self.splits = {"train": self._split("train", 4), "val": self._split("val", 2)}
        self.entry = {}
        self.cfg = add_msad_config(get_cfg())
        self.cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
        self.cfg.DATALOADER.NUM_WORKERS = 0
        self.cfg.DATASETS.TRAIN, self.cfg.DATASETS.TEST = ("d_train",), ("d_val",)
        self.cfg.SOLVER.IMS_PER_BATCH = 2

    def _split(self, split, count):
        rng = np.random.default_rng(len(split))
        content = {"info": {}, "images": [], "annotations": [], "categories": [
            {"id": i + 1, "name": name, "keypoints": list(POINTS), "sigmas": [0.1, 0.1, 0.1]}
            for i, name in enumerate(("cat", "dog"))
        ]}  # fmt: skip
        for i in range(count):
            name = f"{split}_{i}.png"
            pixels = rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(self.root / "images" / name)
            content["images"].append({"id": i + 1, "file_name": name, "height": HEIGHT, "width": WIDTH})
            for j in range(3):
                # Far enough to the right and down that corners could not be taken for a size.
                x, y, w, h = 30 + 4 * j + i, 20 + 3 * j, 10 + j, 8 + j
                content["annotations"].append({
                    "id": len(content["annotations"]) + 1, "image_id": i + 1, "category_id": 1 + j % 2,
                    "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0,
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                    "keypoints": [x + 1, y + 1, 2, x + 2, y + 1, 1, 0, 0, 0], "num_keypoints": 2,
                })  # fmt: skip
        return content

    def image(self, name):
        return self.root / "images" / name

    def each(self, change, split="val", start=0):
        for a in self.splits[split]["annotations"][start:]:
            change(a)

    def register(self):
        for split, content in self.splits.items():
            (self.root / f"annotations_{split}.json").write_text(json.dumps(content))
        self.cfg.DATASETS.REGISTER = [{**entry, **self.entry} for entry in register_entries(self.root, "d")]
        register_datasets(self.cfg)

    def check(self):
        self.register()
        return check_data(self.cfg)[1]

    def texts(self, level):
        return [f"{finding.text}. {finding.fix}" for finding in self.check() if finding.level == level]


@pytest.fixture
def data(tmp_path):
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
    content["annotations"][3]["segmentation"] = [[1, 2, 3, 4]]
    content["annotations"][4]["iscrowd"] = 1
    data.register()
    ours = DatasetCatalog.get("d_val")
    theirs = load_coco_json(str(data.root / "annotations_val.json"), str(data.root / "images"), "d_other")
    assert ours == theirs and len(ours[1]["annotations"]) == 2


# --- annotation files -----------------------------------------------------------------------------------------------

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
    (warning,) = data.texts(WARNING)
    assert "never has 1 of its 2 classes: dog" in warning


def test_names_that_no_data_set_has(data):
    data.cfg.DATASETS.TEST = ("d_vall",)
    (error,) = data.texts(ERROR)
    assert "no data set is called 'd_vall'; did you mean d_val?" in error


def test_images_that_are_trained_and_tested_on(data):
    data.cfg.DATASETS.TEST = ("d_train",)
    (warning,) = data.texts(WARNING)
    assert "4 of its 4 images are trained on too" in warning


# --- boxes ----------------------------------------------------------------------------------------------------------


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


# --- image files ----------------------------------------------------------------------------------------------------


def save(data, pixels=None, mode=None, name="val_1.png", **options):
    if pixels is None:
        pixels = np.full((HEIGHT, WIDTH, 3), 100, np.uint8)
    picture = Image.fromarray(pixels)
    (picture if mode is None else picture.convert(mode)).save(data.image(name), **options)


def deep(data):
    save(data, np.full((HEIGHT, WIDTH), 4000, np.uint16))


def turned(data):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(data, exif=exif, format="JPEG")


@pytest.mark.parametrize(
    ("spoil", "level", "text"),
    [
        (lambda d: d.image("val_1.png").unlink(), ERROR, "val_1.png does not exist (1 of 2 image files)"),
        (lambda d: d.image("val_1.png").rename(d.image("VAL_1.PNG")), ERROR, "there is"),
        (lambda d: d.image("val_1.png").write_bytes(d.image("val_1.png").read_bytes()[:2000]), ERROR, "cannot be read"),
        (lambda d: d.image("val_1.png").write_bytes(b""), ERROR, "val_1.png cannot be read"),
        (lambda d: d.image("val_1.png").write_bytes(b"<html>404</html>"), ERROR, "val_1.png cannot be read"),
        (lambda d: d.image("val_1.png").write_bytes(b"version https://git-lfs"), ERROR, "Git LFS pointer"),
        (lambda d: save(d, np.zeros((WIDTH, HEIGHT, 3), np.uint8)), ERROR, "the sides are exchanged"),
        (lambda d: save(d, np.zeros((80, 120, 3), np.uint8)), ERROR, "is 120 x 80 (width x height), but"),
        (turned, ERROR, "EXIF orientation"),
        (deep, ERROR, "16-bit or float pixels"),
        (lambda d: save(d, np.zeros((HEIGHT, WIDTH), np.float32), name="val_1.tif"), None, ""),
        (lambda d: save(d, mode="RGBA"), WARNING, "an alpha channel"),
        (lambda d: save(d, mode="P"), WARNING, "a palette"),
        (lambda d: save(d, mode="CMYK", format="JPEG"), WARNING, "CMYK pixels"),
        (lambda d: save(d, mode="L"), None, ""),
        (lambda d: save(d, format="JPEG"), None, ""),
        (lambda d: save(d, format="BMP"), None, ""),
    ],
    ids=["missing", "misnamed", "truncated", "empty", "html", "lfs", "turned", "other size", "exif", "16 bit", "unused",
         "alpha", "palette", "cmyk", "grey", "jpeg", "bmp"],
)  # fmt: skip
def test_image_files(data, spoil, level, text):
    spoil(data)
    findings = [finding for finding in data.check() if finding.level != OK]
    assert [f.level for f in findings] == ([] if level is None else [level])
    assert all(text in f.text + f.fix and "val_1.png" in f.text and f.fix for f in findings)


def test_float_images(data):
    data.splits["val"]["images"][1]["file_name"] = "val_1.tif"
    save(data, np.zeros((HEIGHT, WIDTH), np.float32), name="val_1.tif")
    (error,) = data.texts(ERROR)
    assert "16-bit or float pixels" in error and "convert to 8 bits" in error


def test_a_few_broken_images_are_skipped_in_training_but_not_most(data, caplog):
    whole = data.image("train_1.png").read_bytes()
    data.image("train_1.png").write_bytes(whole[:2000])
    data.register()
    with caplog.at_level(logging.WARNING, logger="msad"):
        loader = build_train_loader(data.cfg, seed=0)
    assert "train_1.png cannot be read" in caplog.text and "takes another image instead" in caplog.text
    batches = [batch for _, batch in zip(range(4), loader)]
    assert sum(sample["skipped"] for batch in batches for sample in batch) == 2
    for i in (0, 2):
        data.image(f"train_{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cannot be read .*\(3 of 4 image files\)"):
        build_train_loader(data.cfg, seed=0)


def test_what_the_checks_did_not_see_stops_training_and_is_no_broken_image(data):
    data.cfg.DATASETS.CHECK_IMAGES = 1  # the first alone
    save(data, np.zeros((80, 120, 3), np.uint8), name="train_3.png")
    data.register()
    loader = build_train_loader(data.cfg, seed=0)
    with pytest.raises(ValueError, match=r"train_3.png is read without a fault.*SizeMismatchError"):
        for _, _batch in zip(range(4), loader):
            pass


def test_a_sample_of_many_files_is_stated(data):
    data.cfg.DATASETS.CHECK_IMAGES = 2
    save(data, mode="RGBA", name="train_1.png")
    assert any("2 of 4 image files were looked into" in text for text in data.texts(OK)) and not data.texts(WARNING)
    data.cfg.DATASETS.CHECK_IMAGES = 0
    assert any("an alpha channel" in text for text in data.texts(WARNING))


def test_files_are_looked_into_once(data, monkeypatch):
    data.check()
    opened = []
    monkeypatch.setattr("msad.data.image_files.inspect_image", lambda path: opened.append(path))
    assert {f.level for f in data.check()} == {OK} and not opened
    monkeypatch.undo()
    save(data, mode="RGBA")
    assert len(data.texts(WARNING)) == 1  # it has another size and time
