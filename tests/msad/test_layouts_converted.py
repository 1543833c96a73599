"""YOLO and Pascal VOC folders: what becomes of every line, by hand, and what is said of those that are left out."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from msad import load_config
from msad.data.checks import check_data
from msad.data.layouts import entries_of, find_splits, read_contents, register_entries
from msad.data.register import registered
from msad.finding import WARNING


def image(file: Path, height: int = 50, width: int = 100) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(file), np.full((height, width, 3), 99, np.uint8))


def text(file: Path, content: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)


def yolo(root: Path, train: str, val: str = "0 0.5 0.5 0.2 0.4\n", /, **spec) -> Path:
    for split, lines in (("train", train), ("val", val)):
        image(root / "images" / split / "a.png")
        text(root / "labels" / split / "a.txt", lines)
    names = {"train": "images/train", "val": "images/val", "names": ["cat", "dog"], **spec}
    text(root / "data.yaml", yaml.safe_dump(names))
    return root


def read(splits, split="train"):
    content = json.loads(splits[split].json.read_text())
    return content, [str(finding) for finding in splits[split].changes]


def test_yolo_boxes_and_what_is_left_out(tmp_path, caplog):
    lines = (
        "1 0.5 0.5 0.2 0.4\n"  # centre (50, 25), 20 x 20
        "0 0.05 0.5 0.2 0.4\n"  # from -5 to 15: cut off
        "7 0.5 0.5 0.2 0.4\n"  # no such class
        "0 0.5 0.5 0.0 0.4\n"  # no area
        "0 50 25 20 20\n"  # pixels
        "0 50 25 20 20\n"
        "0 0.5 0.5\n"
        "cat 0.5 0.5 0.2 0.4\n\n"
    )
    root = yolo(tmp_path / "set", lines)
    image(root / "images/train/empty.jpg", 8, 8)
    (root / "images/train/broken.png").write_bytes(b"no image")
    splits = find_splits(root, tmp_path / "out")
    content, said = read(splits)
    assert splits["train"].json == tmp_path / "out/annotations_train.json"
    assert [(a["category_id"], a["bbox"], a["area"]) for a in content["annotations"]] == [
        (2, [40, 15, 20, 20], 400),
        (1, [0, 15, 15, 20], 300),
    ]
    assert [c["name"] for c in content["categories"]] == ["cat", "dog"]
    assert [i["file_name"] for i in content["images"]] == ["a.png", "empty.jpg"]
    label = root / "labels/train/a.txt"
    for expected in (
        f"{label}:2 has a box that reaches out of the image, cut off (1 in all)",
        f"{label}:3 has a class that is none of 0 to 1, left out (1 in all)",
        f"{label}:4 has a box without area in the image, left out (1 in all)",
        f"{label}:5 has coordinates that are no fractions of the image, left out (2 in all)",
        f"{label}:7 has not 4 (box) or an even number from 6 on (polygon) numbers behind the class, left out",
        f"{label}:8 is no label: not all are numbers, left out (1 in all)",
        "empty.jpg has no label file: taken as an image without objects (1 in all)",
        "broken.png cannot be read",
    ):
        assert sum(expected in line for line in said) == 1, (expected, said)
    assert len(said) == 8
    assert register_entries(root, "boxes")[0]["IMAGES"] == str(splits["train"].images)
    assert all(line in caplog.text for line in said)
    assert read(splits, "val")[1] == []

    stamp = splits["train"].json.stat().st_mtime_ns
    find_splits(root, tmp_path / "out")
    assert splits["train"].json.stat().st_mtime_ns == stamp  # the same content is not written again


def test_yolo_polygons(tmp_path):
    lines = "0 0.1 0.2 0.3 0.2 0.3 0.8 0.1 0.8\n0 0.0 0.0 0.2 0.0 0.0 0.4\n"
    root = yolo(tmp_path, lines, "0 0.1 0.1 0.2 0.1 0.2 0.2\n")
    content, said = read(find_splits(root, tmp_path / "out"))
    square, triangle = content["annotations"]
    assert square["segmentation"] == [[10, 10, 30, 10, 30, 40, 10, 40]]
    assert (square["bbox"], square["area"]) == ([10, 10, 20, 30], 600)
    assert (triangle["bbox"], triangle["area"]) == ([0, 0, 20, 20], 200)
    assert said == []
    assert read_contents(register_entries(root, "polygons"))[0]["masks"]
    # Polygons for a part only: the data would teach masks of some objects and none of others.
    text(root / "labels/train/a.txt", "0 0.5 0.5 0.2 0.4\n0 0.0 0.0 0.2 0.0 0.0 0.4\n")
    content, said = read(find_splits(root, tmp_path / "out"))
    assert ["segmentation" in a for a in content["annotations"]] == [False, False]
    assert content["annotations"][1]["area"] == 400
    assert "has polygons for 1 of 2 objects: masks left out" in said[0]


def test_yolo_keypoints(tmp_path):
    line = "0 0.5 0.5 0.2 0.4 0.5 0.5 2 0.1 0.2 1 0.9 0.9 0\n"
    root = yolo(tmp_path, line, line, names=["mouse"], kpt_shape=[3, 3], flip_idx=[1, 0, 2])
    splits = find_splits(root, tmp_path / "out")
    content, said = read(splits)
    (annotation,) = content["annotations"]
    assert annotation["keypoints"] == [50, 25, 2, 10, 10, 1, 0, 0, 0] and annotation["num_keypoints"] == 2
    assert content["categories"][0]["flip_pairs"] == [["point_0", "point_1"]] and said == []
    entries = entries_of(splits, "points")
    assert read_contents(entries)[0] == {"classes": ["mouse"], "masks": False, "keypoints": 3}
    text(root / "labels/train/a.txt", "0 0.5 0.5 0.2 0.4 0.5 0.5\n")
    assert "has not 4 + 3 x 3 numbers behind the class" in read(find_splits(root, tmp_path / "out"))[1][0]


def test_yolo_keypoints_without_visibility(tmp_path):
    """Only the corner (0, 0) stands for a point that is not there, not every place on the left or upper border."""
    root = yolo(
        tmp_path / "set", "0 0.5 0.5 1 1 0 0.5 0.4 0 0 0\n", "0 0.5 0.5 0.2 0.4 0.5 0.5 0.5 0.5 0.5 0.5\n",
        names=["mouse"], kpt_shape=[3, 2],
    )  # fmt: skip
    content, said = read(find_splits(root, tmp_path / "out"))
    (annotation,) = content["annotations"]
    assert annotation["keypoints"] == [0, 25, 2, 40, 0, 2, 0, 0, 0] and annotation["num_keypoints"] == 2
    assert said == []


@pytest.mark.parametrize(("count", "first"), [(17, [0.026, 0.025]), (16, [1 / 16] * 2)])
def test_yolo_sigmas_are_those_that_its_own_metric_takes(tmp_path, count, first):
    line = f"0 0.5 0.5 0.2 0.4{' 0.5 0.5 2' * count}\n"
    root = yolo(tmp_path / "set", line, line, names=["person"], kpt_shape=[count, 3])
    (category,) = read(find_splits(root, tmp_path / "out"))[0]["categories"]
    assert category["sigmas"][:2] == pytest.approx(first) and len(category["sigmas"]) == count
    assert category["sigmas"][-1] == pytest.approx(0.089 if count == 17 else 1 / 16)


@pytest.mark.parametrize(
    ("flip", "pairs"), [(None, None), ([], None), ([0, 2, 1], [["point_1", "point_2"]]), ([0, 1, 2], [])]
)
def test_what_a_mirrored_image_exchanges_is_known_only_if_it_is_said(tmp_path, flip, pairs):
    """Without flip_idx nobody says that left and right are not exchanged: the data are checked as COCO's are."""
    line = "0 0.5 0.5 0.2 0.4 0.5 0.5 0.4 0.5 0.6 0.5\n"
    more = {} if flip is None else {"flip_idx": flip}
    root = yolo(tmp_path / "set", line, line, names=["mouse"], kpt_shape=[3, 2], **more)
    (category,) = read(splits := find_splits(root, tmp_path / "out"))[0]["categories"]
    assert category.get("flip_pairs") == pairs
    entries = entries_of(splits, "mirrored")
    options = ["DATASETS.REGISTER", entries, "DATASETS.TRAIN", ("mirrored_train",), "MODEL.KEYPOINT_ON", True,
               "MODEL.ROI_HEADS.NUM_CLASSES", 1, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 3]  # fmt: skip
    cfg = load_config("", options)
    with registered(cfg):
        said = [f for f in check_data(cfg)[1] if "no pair of left and right" in f.text]
    assert [(f.level, "flip_idx" in f.fix) for f in said] == ([] if pairs is not None else [(WARNING, True)])


def test_yolo_keypoints_that_cannot_be_used_are_said(tmp_path):
    """Confidences for visibilities (save_txt writes these), pixels for fractions, and NaN."""
    rows = ("0.5 0.5 0.97", "0.5 0.5 nan", "50 25 2", "nan 0.5 2", "0.5 inf 1", "nan nan 0", "1.2 0.5 1")
    root = yolo(
        tmp_path / "set", "".join(f"0 0.5 0.5 0.2 0.4 {row}\n" for row in rows), "0 0.5 0.5 0.2 0.4 0.5 0.5 2\n",
        names=["mouse"], kpt_shape=[1, 3],
    )  # fmt: skip
    splits = find_splits(root, tmp_path / "out")
    content, said = read(splits)
    assert [a["keypoints"] for a in content["annotations"]] == [[0, 0, 0]] * 6 + [[120, 25, 1]]
    assert [a["num_keypoints"] for a in content["annotations"]] == [0] * 6 + [1]
    label = f"{root}/data.yaml, train: {root}/labels/train/a.txt"
    assert said == [
        f"{label}:1 has a keypoint whose visibility is none of 0, 1 and 2, taken as not labelled (2 in all)",
        f"{label}:3 has a keypoint that is no fraction of the image, taken as not labelled (3 in all)",
    ]


def test_yolo_lists_moved_files_and_numbered_names(tmp_path):
    root = yolo(tmp_path / "set", "0 0.5 0.5 0.2 0.4\n")
    text(root / "train.txt", "./images/train/a.png\n")
    spec = {"path": "/not/here", "train": "train.txt", "val": ["../images/val"], "names": {0: "cat", 1: "dog"}, "nc": 2}
    text(root / "data.yaml", yaml.safe_dump(spec))
    for given in (root, root / "data.yaml"):
        splits = find_splits(given, tmp_path / "out")
        assert [len(read(splits, s)[0]["annotations"]) for s in ("train", "val")] == [1, 1]
        assert splits["val"].images == (root / "images/val").resolve()


@pytest.mark.parametrize("listed", [False, True])
def test_yolo_labels_lie_beside_links(tmp_path, listed):
    """And not beside the images that they point to; a byte order mark is no part of a number or a path."""
    root = yolo(tmp_path / "set", "\ufeff0 0.5 0.5 0.2 0.4\n1 0.5 0.5 0.2 0.4\n")
    (root / "images").rename(tmp_path / "store")
    (root / "images").mkdir()
    if listed:
        for split in ("train", "val"):
            (root / "images" / split).mkdir()
            (root / "images" / split / "a.png").symlink_to(tmp_path / "store" / split / "a.png")
        text(root / "train.txt", "\ufeffimages/train/a.png\n")
        text(root / "data.yaml", yaml.safe_dump({"train": "train.txt", "val": "images/val", "names": ["cat", "dog"]}))
    else:
        for split in ("train", "val"):
            (root / "images" / split).symlink_to(tmp_path / "store" / split)
    content, said = read(find_splits(root, tmp_path / "out"))
    assert [a["category_id"] for a in content["annotations"]] == [1, 2] and not said


def test_yolo_images_behind_links_to_folders(tmp_path):
    """A split that is put together of several recordings; what editors hide beside the images is none of it."""
    root = yolo(tmp_path / "set", "0 0.5 0.5 0.2 0.4\n")
    for part in ("images", "labels"):
        (tmp_path / "store" / part).mkdir(parents=True)
        (root / part / "train/night").symlink_to(tmp_path / "store" / part)
    image(tmp_path / "store/images/b.png")
    text(tmp_path / "store/labels/b.txt", "1 0.5 0.5 0.2 0.4\n")
    image(root / "images/train/.ipynb_checkpoints/a-checkpoint.png")
    image(root / "images/train/._a.png")
    content, said = read(find_splits(root, tmp_path / "out"))
    assert [i["file_name"] for i in content["images"]] == ["a.png", "night/b.png"] and not said
    assert [a["category_id"] for a in content["annotations"]] == [1, 2]


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"names": ["cat"], "nc": 2}, ValueError, "nc is 2, but there are 1 names"),
        ({"names": {1: "cat"}}, ValueError, "names must be numbered 0, 1"),
        ({"names": []}, ValueError, "names must be a list of different names"),
        ({"val": None}, ValueError, "val must name a folder of images, got None"),
        ({"val": "images/nowhere"}, FileNotFoundError, "val: there is no .*images/nowhere"),
        ({"val": "labels"}, FileNotFoundError, "there are no images"),
        ({"kpt_shape": [3]}, ValueError, "kpt_shape must be"),
        ({"kpt_shape": [3, 2], "flip_idx": [1, 2, 0]}, ValueError, "flip_idx must exchange pairs"),
        ({"kpt_shape": [3, 2], "flip_idx": 3}, ValueError, "flip_idx must exchange pairs"),
        ({"kpt_shape": ["two", 3]}, ValueError, "kpt_shape must be"),
        ({"names": {0: "cat", "b": "dog"}}, ValueError, "names must be numbered 0, 1"),
    ],
)
def test_yolo_errors_name_the_key(tmp_path, change, error, said):
    with pytest.raises(error, match=said):
        find_splits(yolo(tmp_path, "0 0.5 0.5 0.2 0.4\n", **change), tmp_path / "out")


@pytest.mark.parametrize("name", ["data.yaml", "labels/val/a.txt", "images/train.txt"])
def test_files_that_are_no_text_are_named(tmp_path, name):
    more = {"train": name} if name.endswith("train.txt") else {}
    root = yolo(tmp_path, "0 0.5 0.5 0.2 0.4\n", **more)
    (root / name).write_bytes("names: [Straße]".encode("cp1252"))
    with pytest.raises(ValueError, match=f"{name} is no text in UTF-8"):
        find_splits(root, tmp_path / "out")


def test_yolo_without_labels_is_no_set_of_empty_images(tmp_path):
    root = yolo(tmp_path, "")
    (root / "labels/val/a.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"val: there is no label file, e\.g\. .*labels/val/a\.txt"):
        find_splits(root, tmp_path / "out")


OBJECT = (
    "<object><name>{}</name>{}<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


def voc_xml(*objects: str, size: str = "<size><width>100</width><height>50</height></size>") -> str:
    return f"<annotation><filename>elsewhere.jpg</filename>{size}{''.join(objects)}</annotation>"


def test_voc(tmp_path):
    root = tmp_path / "VOCdevkit/VOC2012"
    for name in ("one", "two", "three"):
        image(root / "JPEGImages" / f"{name}.jpg")
    dog = OBJECT.format("dog", "", 11, 6, 30, 25)  # pixels 10 to 29, 5 to 24 from 0
    cat = OBJECT.format("cat", "<difficult>1</difficult>", 1, 1, 100, 50)
    text(root / "Annotations/one.xml", voc_xml(dog, cat, "<object><name>cow</name></object>"))
    text(root / "Annotations/two.xml", "<annotation>")
    horse, size = OBJECT.format("horse", "", 1, 1, 9, 9), "<size><width>7</width><height>8</height></size>"
    text(root / "Annotations/three.xml", voc_xml(dog, horse, size=size))
    text(root / "ImageSets/Main/trainval.txt", "one 1\ntwo -1\nfour\n")
    with pytest.raises(FileNotFoundError, match=r"there is no ImageSets/Main/val\.txt"):
        find_splits(tmp_path, tmp_path / "out")
    text(root / "ImageSets/Main/val.txt", "three\n")
    splits = find_splits(tmp_path, tmp_path / "out")
    content, said = read(splits)
    assert [c["name"] for c in content["categories"]] == ["cat", "cow", "dog"]
    assert [(a["category_id"], a["bbox"], a["iscrowd"]) for a in content["annotations"]] == [
        (3, [10, 5, 20, 20], 0),
        (1, [0, 0, 100, 50], 1),
    ]
    assert [i["file_name"] for i in content["images"]] == ["one.jpg"]
    for expected in ("difficult: kept as a crowd", "without a box", "two.xml is no XML", "four.xml does not exist"):
        assert sum(expected in line for line in said) == 1, (expected, said)
    content, said = read(splits, "val")
    assert [a["bbox"] for a in content["annotations"]] == [[10, 5, 20, 20]]
    assert "without a class of the training split, left out" in said[1] and "(horse)" in said[1]
    assert "says another size than its image has" in said[0] and content["images"][0]["width"] == 100

    entries = entries_of(splits, "voc")
    sets = {"REGISTER": entries, "TRAIN": ("voc_train",), "TEST": ("voc_val",)}
    with registered(CfgNode({"DATASETS": sets})):
        (record,) = DatasetCatalog.get("voc_train")
        assert record["annotations"][0]["bbox"] == [10, 5, 20, 20]


def test_voc_of_several_years_is_refused(tmp_path):
    for year in ("VOC2007", "VOC2012"):
        voc_image(tmp_path / "VOCdevkit" / year, f"of_{year}")
        for part in ("train", "val"):
            text(tmp_path / "VOCdevkit" / year / f"ImageSets/Main/{part}.txt", f"of_{year}\n")
    for folder, inside in ((tmp_path, "VOCdevkit/"), (tmp_path / "VOCdevkit", "")):
        names = f"{inside}VOC2007, {inside}VOC2012"
        with pytest.raises(ValueError, match=rf"several data sets, {names}: name the folder of one, e\.g\. .*VOC2012$"):
            find_splits(folder, tmp_path / "out")
    splits = find_splits(tmp_path / "VOCdevkit/VOC2007", tmp_path / "out")
    assert [i["file_name"] for i in read(splits)[0]["images"]] == ["of_VOC2007.jpg"]


def test_voc_as_roboflow_writes_it(tmp_path):
    for folder in ("train", "valid"):
        image(tmp_path / folder / "a.jpg")
        text(tmp_path / folder / "a.xml", voc_xml(OBJECT.format("dog", "", 1, 1, 10, 20)))
    splits = find_splits(tmp_path, tmp_path / "out")
    assert splits["val"].images == tmp_path / "valid"
    assert read(splits, "val")[0]["annotations"][0]["bbox"] == [0, 0, 10, 20]
    (tmp_path / "valid/a.xml").unlink()
    with pytest.raises(FileNotFoundError, match="no XML file in valid/"):
        find_splits(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("encoding", ["gb2312", "shift_jis", "gbk", "utf-16", "iso-8859-1"])
def test_voc_in_the_encoding_of_its_header(tmp_path, encoding):
    name = "chat" if encoding == "iso-8859-1" else "\u732b"
    xml = f'<?xml version="1.0" encoding="{encoding}"?>\n' + voc_xml(OBJECT.format(name, "", 1, 1, 10, 20))
    for split in ("train", "valid"):
        image(tmp_path / split / "a.jpg")
        (tmp_path / split / "a.xml").write_bytes(xml.encode(encoding))
    content, said = read(find_splits(tmp_path, tmp_path / "out"))
    assert [c["name"] for c in content["categories"]] == [name] and not said
    assert [a["bbox"] for a in content["annotations"]] == [[0, 0, 10, 20]]


@pytest.mark.parametrize(("encoding", "said"), [("ansi", "ansi"), ("gb2312", "gb2312"), ("gbk", "not well-formed")])
def test_voc_in_an_encoding_that_is_not_known_is_counted(tmp_path, encoding, said):
    """Or that is not that of the file, or of what is no XML anyhow."""
    for split in ("train", "valid"):
        for stem in "ab":
            image(tmp_path / split / f"{stem}.jpg")
            text(tmp_path / split / f"{stem}.xml", voc_xml(OBJECT.format("dog", "", 1, 1, 10, 20)))
    bad = f'<?xml version="1.0" encoding="{encoding}"?><annotation>'.encode()
    bad += b"<<" if encoding == "gbk" else b"\xff\xff</annotation>"
    (tmp_path / "train/b.xml").write_bytes(bad)
    content, (found,) = read(find_splits(tmp_path, tmp_path / "out"))
    assert [i["file_name"] for i in content["images"]] == ["a.jpg"]
    assert f"{tmp_path}/train/b.xml is no XML (" in found and said in found and "left out (1 in all)" in found


def voc_image(root: Path, name: str) -> None:
    image(root / f"JPEGImages/{name}.jpg")
    text(root / f"Annotations/{name}.xml", voc_xml(OBJECT.format("dog", "", 1, 1, 10, 20)))


@pytest.mark.parametrize(
    ("size", "box", "said"),
    [
        ((50, 100), (1, 60, 20, 90), "another size than its image has, sides exchanged as by an EXIF orientation"),
        ((200, 100), (1, 1, 150, 90), "another size than its image has, and its boxes fit into that"),
        ((102, 51), (1, 1, 100, 50), ""),  # rounded
        ((20, 10), (1, 1, 90, 40), ""),  # the size is wrong, not the box
        ((0, 0), (1, 1, 90, 40), ""),
    ],
)
def test_voc_boxes_of_another_size_are_refused(tmp_path, size, box, said):
    """Of an image that was resized, or is turned by its EXIF orientation, after it was annotated."""
    told = "<size><width>{}</width><height>{}</height></size>".format(*size)
    xml = voc_xml(OBJECT.format("dog", "", *box), size=told)
    for split in ("train", "valid"):
        image(tmp_path / split / "a.jpg")
        text(tmp_path / split / "a.xml", xml)
    if said:
        with pytest.raises(ValueError, match=rf"train/a\.xml says {said}.* \(1 in all\). Fix: correct size and boxes"):
            find_splits(tmp_path, tmp_path / "out")
    else:
        (annotation,) = read(find_splits(tmp_path, tmp_path / "out"))[0]["annotations"]
        assert annotation["bbox"][2:] == [box[2] - box[0] + 1, box[3] - box[1] + 1]


@pytest.mark.parametrize("column", ["", "  1"])
def test_voc_names_that_end_in_a_number(tmp_path, column):
    """Which is no column of a list of one class, also where every line has one."""
    for number in (0, 1, 2):
        voc_image(tmp_path, f"frame {number}")
    text(tmp_path / "ImageSets/Main/train.txt", f"frame 0{column}\nframe 1{column}\nframe 7{column}\n")
    text(tmp_path / "ImageSets/Main/val.txt", f"frame 1{column}\n")
    splits = find_splits(tmp_path, tmp_path / "out")
    content, said = read(splits)
    assert [i["file_name"] for i in content["images"]] == ["frame 0.jpg", "frame 1.jpg"]
    assert len(said) == 1 and "Annotations/frame 7.xml does not exist" in said[0]
    assert [i["file_name"] for i in read(splits, "val")[0]["images"]] == ["frame 1.jpg"]


@pytest.mark.parametrize("ending", ["", ".jpg", " 1", ".JPG  -1"])
def test_voc_names_with_blanks(tmp_path, ending):
    """Lines of image lists are file names, with the column of a list of one class or an ending if they have it."""
    for number in (8, 9):
        voc_image(tmp_path, f"photo {number}.v1")
    names = [f"photo {number}.v1{ending}" for number in (8, 9)]
    text(tmp_path / "ImageSets/Main/train.txt", "\ufeff" + "\n".join(names) + "\n")
    text(tmp_path / "ImageSets/Main/val.txt", f"{names[0]}\n")
    content, said = read(find_splits(tmp_path, tmp_path / "out"))
    assert [i["file_name"] for i in content["images"]] == ["photo 8.v1.jpg", "photo 9.v1.jpg"] and not said
    text(tmp_path / "ImageSets/Main/train.txt", "elsewhere\nnowhere\n")
    with pytest.raises(ValueError, match=r"train.txt: none of its 2 XML files has .*elsewhere.xml does not exist"):
        find_splits(tmp_path, tmp_path / "out2")
