"""Data that changed are recognised, and data that did not are not."""

import json
import os
import shutil

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from msad.config import add_msad_config
from msad.data import dataset_fingerprint, make_dataset, register_entries

pytestmark = pytest.mark.usefixtures("clean_catalogs")


@pytest.fixture
def root(tmp_path):
    make_dataset(tmp_path / "data", num_train=2, num_val=2, size=(48, 48))
    return tmp_path / "data"


def config(root, prefix="fp"):
    cfg = add_msad_config(get_cfg())
    cfg.DATASETS.REGISTER = register_entries(root, prefix)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (f"{prefix}_train",), (f"{prefix}_val",)
    return cfg


def test_equal_on_another_machine(root, tmp_path):
    first = dataset_fingerprint(config(root))
    assert set(first) == {"fp_train", "fp_val"} and first["fp_train"] != first["fp_val"]
    shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)  # other folder, other times
    copy = dataset_fingerprint(config(tmp_path / "copy", "other"))
    assert [*copy.values()] == [*first.values()]
    json.dumps(first)


def test_visdrone_may_move_and_is_known_by_all_of_its_lines(tmp_path):
    def found(folder):
        cfg = add_msad_config(get_cfg())
        entry = {"NAME": f"vd_{folder}", "TYPE": "visdrone"}
        paths = {"IMAGES": str(tmp_path / folder / "images"), "ANNOTATIONS": str(tmp_path / folder / "lines")}
        cfg.DATASETS.REGISTER, cfg.DATASETS.TRAIN = [{**entry, **paths}], (entry["NAME"],)
        return dataset_fingerprint(cfg)[entry["NAME"]]

    for name in ("images", "lines"):
        (tmp_path / "one" / name).mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "one/images/x.png")
    (tmp_path / "one/lines/x.txt").write_text("1,2,10,10,1,4,0,0\n5,5,9,9,1,11,0,0\n")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert found("one") == found("two")
    # The evaluator also reads what is no object to learn: "others".
    (tmp_path / "two/lines/x.txt").write_text("1,2,10,10,1,4,0,0\n5,5,9,8,1,11,0,0\n")
    assert found("one")["annotations"] != found("two")["annotations"]


def test_each_change_is_seen_in_its_place(root):
    cfg = config(root)
    before = dataset_fingerprint(cfg)
    file = root / "annotations_val.json"
    status = file.stat()
    text = file.read_text()
    file.write_text(text.replace('"category_id": 1', '"category_id": 2', 1))  # of the same size
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    labels = dataset_fingerprint(cfg)
    assert labels["fp_train"] == before["fp_train"]
    assert labels["fp_val"]["annotations"] != before["fp_val"]["annotations"]
    assert labels["fp_val"]["images"] == before["fp_val"]["images"]

    (root / "images" / "train_000001.jpg").write_bytes(b"another image")
    (root / "images" / "in_no_set.jpg").write_bytes(b"")
    images = dataset_fingerprint(cfg)
    assert images["fp_val"] == labels["fp_val"]
    assert images["fp_train"]["annotations"] == before["fp_train"]["annotations"]
    assert images["fp_train"]["images"] != before["fp_train"]["images"]


def test_what_is_not_there(root):
    cfg = config(root)
    (root / "annotations_val.json").unlink()
    cfg.DATASETS.TEST = ("fp_val", "fp_valid")
    found = dataset_fingerprint(cfg)
    assert found["fp_val"] == {"annotations": "missing"} and found["fp_valid"] == {"annotations": "unknown"}
    assert len(found["fp_train"]["annotations"]) == 64


def test_a_set_that_is_no_file(root):
    records = [
        {"file_name": f"{root}/images/train_00000{i}.jpg", "annotations": [{"bbox": [0, 0, i + 1, 1]}]} for i in (0, 1)
    ]
    DatasetCatalog.register("fp_list", lambda: records)
    MetadataCatalog.get("fp_list").image_root = f"{root}/images"
    cfg = add_msad_config(get_cfg())
    cfg.DATASETS.TRAIN = ("fp_list",)
    before = dataset_fingerprint(cfg)["fp_list"]
    records[0]["annotations"][0]["bbox"][2] = 9
    after = dataset_fingerprint(cfg)["fp_list"]
    assert before["annotations"] != after["annotations"] and before["images"] == after["images"]
