"""Folders as three tools lay them out, and what is said of files that are no annotations in COCO's format."""

import json
import shutil
from pathlib import Path

import pytest

from msad.data.layouts import find_splits, read_coco, register_entries

CONTENT = {
    "images": [{"id": 1, "file_name": "a.png", "height": 8, "width": 9}],
    "annotations": [{"id": 7, "image_id": 1, "category_id": 2, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0}],
    "categories": [{"id": 2, "name": "cat"}],
}


def write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("files", "images"),
    [
        (("annotations_train.json", "annotations_val.json"), ("images", "images")),
        (("train/_annotations.coco.json", "valid/_annotations.coco.json"), ("train", "valid")),
        (("annotations/instances_train2017.json", "annotations/instances_val2017.json"), ("train2017", "val2017")),
        (("annotations/instances_train.json", "annotations/instances_val.json"), ("images/train", "images/val")),
    ],
)
def test_layouts(tmp_path, files, images):
    for file, folder in zip(files, images):
        write(tmp_path / file, CONTENT)
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    splits = find_splits(tmp_path)
    assert [splits[s].json for s in ("train", "val")] == [tmp_path / file for file in files]
    assert [splits[s].images for s in ("train", "val")] == [tmp_path / folder for folder in images]
    entries, content = register_entries(tmp_path, tmp_path / "work", "own")
    assert entries[1] == {"NAME": "own_val", "JSON": str(tmp_path / files[1]), "IMAGES": str(tmp_path / images[1])}
    assert content == {"classes": ["cat"], "masks": False, "keypoints": 0} and not (tmp_path / "work").exists()
    (tmp_path / files[1]).unlink()
    with pytest.raises(FileNotFoundError, match=r"(?s)there is no .*val.*json in it.*Roboflow"):
        find_splits(tmp_path)


def test_the_error_names_the_layouts(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"(?s)annotations_train\.json.*_annotations\.coco.*instances_train"):
        find_splits(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_splits(tmp_path / "nowhere")


def test_a_root_category_that_nobody_uses_is_no_class(tmp_path):
    content = {**CONTENT, "categories": [{"id": 0, "name": "pets", "supercategory": "none"}, *CONTENT["categories"]]}
    for split in ("train", "valid"):
        write(tmp_path / split / "_annotations.coco.json", content)
    entries, found = register_entries(tmp_path, tmp_path / "work", "own")
    assert found["classes"] == ["cat"]
    assert json.loads((tmp_path / "work/annotations_val.json").read_text()) == CONTENT
    assert entries[0]["JSON"] == str(tmp_path / "work/annotations_train.json")
    used = {**content, "annotations": [*CONTENT["annotations"], {**CONTENT["annotations"][0], "category_id": 0}]}
    write(tmp_path / "valid/_annotations.coco.json", used)  # one of the files uses it: it is a class of both
    shutil.rmtree(tmp_path / "work")
    entries, found = register_entries(tmp_path, tmp_path / "work", "own")
    assert found["classes"] == ["pets", "cat"] and not (tmp_path / "work").exists()


def test_a_byte_order_mark_is_taken_away(tmp_path):
    (tmp_path / "images").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"annotations_{split}.json").write_text(json.dumps(CONTENT), encoding="utf-8-sig")
    entries, _ = register_entries(tmp_path, tmp_path / "work", "own")
    assert all(json.loads(Path(entry["JSON"]).read_text()) == CONTENT for entry in entries)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c: [], "a list instead of an object"),
        (lambda c: c | {"categories": None}, "categories is None instead of a list"),
        (lambda c: c | {"categories": [{"id": 2}]}, "category 2 has no name, which must be a text"),
        (lambda c: c | {"categories": [{"id": 2, "name": 5}]}, "category 2 has name 5, which must be a text"),
        (lambda c: c | {"images": [{"id": 1, "file_name": "a", "width": 9}]}, "image 1 has no height"),
        (lambda c: c | {"annotations": [{"image_id": 1}]}, "annotation number 0 has no id"),
        (
            lambda c: c | {"annotations": [c["annotations"][0] | {"segmentation": [1, 1, 9, 1, 9, 9]}]},
            "annotation 7: segmentation is a list of numbers instead of a list of polygons",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, text):
    write(tmp_path / "a.json", change(json.loads(json.dumps(CONTENT))))
    with pytest.raises(ValueError, match=f"a\\.json: .*{text}"):
        read_coco(tmp_path / "a.json")


def test_no_json(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON"):
        read_coco(tmp_path / "a.json")
