"""Folders as three tools lay them out, and what they hold."""

import json

import pytest
from detectron2.data import DatasetCatalog

from msad.data.layouts import find_splits, read_contents, register_entries

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
    entry = {"NAME": "own_val", "JSON": str(tmp_path / files[1]), "IMAGES": str(tmp_path / images[1])}
    assert register_entries(tmp_path, "own")[1] == entry
    (tmp_path / files[1]).unlink()
    with pytest.raises(FileNotFoundError, match=r"(?s)there is no .*val.*json in it.*Roboflow"):
        find_splits(tmp_path)


def test_several_files_for_one_split_are_refused(tmp_path):
    for name in ("train2014", "train2017", "val2017"):
        write(tmp_path / f"annotations/instances_{name}.json", CONTENT)
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=r"one split, instances_train2014.json, instances_train2017.json: leave one"):
        find_splits(tmp_path)


def test_the_error_names_the_layouts(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"(?s)annotations_train\.json.*_annotations\.coco.*instances_train"):
        find_splits(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_splits(tmp_path / "nowhere")


def test_contents(project, tmp_path):
    entries = register_entries(project / "data", "scenes")
    content, loaded = read_contents(entries)
    assert len(content["classes"]) == 6 and content["masks"] and content["keypoints"] == 5
    assert {name: len(records) > 0 for name, records in loaded.items()} == {"scenes_train": True, "scenes_val": True}
    assert "scenes_train" not in DatasetCatalog.list()
    for split in ("train", "valid"):  # Roboflow's root category, which nobody uses, and a byte order mark
        cat = {"id": 2, "name": "cat", "supercategory": "pets"}
        content = {**CONTENT, "categories": [{"id": 0, "name": "pets"}, cat]}
        (tmp_path / split).mkdir()
        (tmp_path / split / "_annotations.coco.json").write_text(json.dumps(content), encoding="utf-8-sig")
    assert read_contents(register_entries(tmp_path, "own"))[0] == {"classes": ["cat"], "masks": False, "keypoints": 0}
    write(tmp_path / "train/_annotations.coco.json", {**CONTENT, "categories": [{"id": 2}]})
    with pytest.raises(ValueError, match=r"train/_annotations\.coco\.json.*category 2 has name None"):
        read_contents(register_entries(tmp_path, "own"))
