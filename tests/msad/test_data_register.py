"""Data sets declared in yaml."""

import json
import os

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.detection_utils import transform_instance_annotations
from fvcore.common.registry import Registry

from msad.config import add_msad_config
from msad.data import make_dataset, register_datasets, register_entries, shapes
from msad.data import register as register_module
from msad.data.dataset_types import DATASET_TYPE_REGISTRY, PATH, TEXT, add_dataset, check_entry

pytestmark = pytest.mark.usefixtures("clean_catalogs")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    make_dataset(folder, num_train=2, num_val=1, size=(64, 64), seed=0)
    return folder


def _cfg(*entries):
    cfg = add_msad_config(get_cfg())
    cfg.DATASETS.REGISTER = list(entries)
    return cfg


def _entry(root, **extra):
    return {**register_entries(root, "t")[0], **extra}


def _variant(root, tmp_path, change):
    """An entry whose json is the data set's after ``change(content)``."""
    content = json.loads((root / "annotations_train.json").read_text())
    change(content)
    (tmp_path / "variant.json").write_text(json.dumps(content))
    return _entry(root, JSON=str(tmp_path / "variant.json"))


def test_from_yaml_to_dicts_and_metadata(root, tmp_path):
    yaml = tmp_path / "config.yaml"
    yaml.write_text(
        f"DATASETS:\n  REGISTER:\n  - {{NAME: t_train, JSON: {root}/annotations_train.json, IMAGES: {root}/images}}\n"
    )
    cfg = add_msad_config(get_cfg())
    cfg.merge_from_file(str(yaml))
    cfg.freeze()
    assert register_datasets(cfg) == ["t_train"]
    dicts = DatasetCatalog.get("t_train")
    assert len(dicts) == 2 and os.path.isfile(dicts[0]["file_name"])
    metadata = MetadataCatalog.get("t_train")
    assert tuple(metadata.thing_classes) == shapes.CLASSES
    assert metadata.evaluator_type == "coco" and metadata.json_file == f"{root}/annotations_train.json"
    assert tuple(metadata.keypoint_names) == shapes.KEYPOINTS
    assert [tuple(p) for p in metadata.keypoint_flip_map] == [("left", "right")]
    assert [rule[:2] for rule in metadata.keypoint_connection_rules] == [
        ("centre", point) for point in ("top", "right", "bottom", "left")
    ]
    assert metadata.keypoint_oks_sigmas == list(shapes.KEYPOINT_SIGMAS)


def test_whole_numbers_are_not_cut_off_by_resizing(root, tmp_path):
    """Boxes and polygons of integers, at half the size."""

    def change(content):
        first = content["annotations"][0]
        first.update(bbox=[7, 9, 20, 31], segmentation=[[7, 9, 27, 9, 27, 40, 7, 41]])

    register_datasets(_cfg(_variant(root, tmp_path, change)))
    (record, *_) = DatasetCatalog.get("t_train")
    halve = T.TransformList([T.ResizeTransform(64, 64, 32, 32)])
    moved = transform_instance_annotations(record["annotations"][0], halve, (32, 32))
    assert moved["bbox"].tolist() == [3.5, 4.5, 13.5, 20.0]
    assert moved["segmentation"][0].tolist() == [3.5, 4.5, 13.5, 4.5, 13.5, 20.0, 3.5, 20.5]


def test_paths_are_relative_to_the_environment_variable(root, monkeypatch):
    entry = {"NAME": "t_rel", "JSON": f"{root.name}/annotations_val.json", "IMAGES": f"{root.name}/images"}
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root.parent))
    register_datasets(_cfg(entry))
    assert len(DatasetCatalog.get("t_rel")) == 1
    monkeypatch.delenv("DETECTRON2_DATASETS")
    register_datasets(_cfg({**entry, "NAME": "t_default"}))
    assert MetadataCatalog.get("t_default").json_file == os.path.join("datasets", entry["JSON"])


def test_nothing_to_register(root):
    assert register_datasets(_cfg()) == []
    assert register_datasets(get_cfg()) == []


def test_same_definition_twice_is_fine_another_is_not(root):
    register_datasets(_cfg(_entry(root)))
    register_datasets(_cfg(_entry(root)))
    DatasetCatalog.get("t_train")
    register_datasets(_cfg(_entry(root)))
    with pytest.raises(ValueError, match=r"'t_train' is already registered with another JSON: .*train.*val"):
        register_datasets(_cfg(_entry(root, JSON=str(root / "annotations_val.json"))))
    with pytest.raises(ValueError, match="'coco_2017_train' is already taken"):
        register_datasets(_cfg(_entry(root, NAME="coco_2017_train")))


def test_all_entries_are_checked_before_any_is_registered(root):
    with pytest.raises(ValueError, match=r"REGISTER\[1\]"):
        register_datasets(_cfg(_entry(root), {"NAME": "u"}))
    assert "t_train" not in DatasetCatalog.list()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"NAME": "a", "JSON": "x", "IMAGE": "y"},
            r"REGISTER\[0\] \('a'\): unknown key 'IMAGE'.*mean 'IMAGES'",
        ),
        ({"NAME": "a", "json": "x", "IMAGES": "y"}, r"\('a'\): unknown key 'json'; did you mean 'JSON'"),
        (
            {"NAME": "a", "JSON": "x", "IMAGES": "y", "SIGMAS": []},
            "mean 'KEYPOINT_SIGMAS'",
        ),
        ({"NAME": "a", "JSON": "x"}, r"\('a'\): missing key 'IMAGES'; required are NAME, JSON, IMAGES"),
        ({"JSON": "x", "IMAGES": "y"}, r"REGISTER\[0\]: missing key 'NAME'"),
        ({"NAME": "a", "JSON": 3, "IMAGES": "y"}, "JSON must be a non-empty string, got 3"),
        ({"NAME": "a", "JSON": "x", "IMAGES": "y", "CLASSES": "car"}, "CLASSES must be a list of category names"),
        ({"NAME": "a", "JSON": "x", "IMAGES": "y", "KEYPOINT_FLIP_PAIRS": [["l"]]}, "must be a list of pairs"),
        ({"NAME": "a", "JSON": "x", "IMAGES": "y", "KEYPOINT_SIGMAS": [0.0]}, "a list of positive numbers"),
        ("a", r"REGISTER\[0\] must be a mapping"),
        ({"NAME": "a", "TYPE": "coko", "JSON": "x", "IMAGES": "y"}, r"\('a'\): unknown TYPE 'coko'; did you mean coco"),
        ({"NAME": "a", "TYPE": 3, "JSON": "x", "IMAGES": "y"}, "unknown TYPE 3. Known are .*coco"),
    ],
)
def test_wrong_entries(entry, message):
    with pytest.raises(ValueError, match=message):
        register_datasets(_cfg(entry))


def test_a_type_is_a_function_with_keys_of_its_own(monkeypatch):
    types = Registry("DATASET_TYPE")

    @types.register()
    def list_of_files(name, entry):
        entry = check_entry(entry, {"FOLDER": PATH, "PATTERN": TEXT.optional()})
        files = [f"{entry['FOLDER']}/{i}.png" for i in range(2)]
        add_dataset(name, entry, lambda: [{"file_name": f} for f in files], evaluator_type="none")

    monkeypatch.setattr(register_module, "DATASET_TYPE_REGISTRY", types)
    assert register_datasets(_cfg({"NAME": "files", "TYPE": "list_of_files", "FOLDER": "/here"})) == ["files"]
    assert DatasetCatalog.get("files") == [{"file_name": "/here/0.png"}, {"file_name": "/here/1.png"}]
    assert MetadataCatalog.get("files").evaluator_type == "none"
    with pytest.raises(ValueError, match=r"\('b'\): unknown key 'PATERN'; did you mean 'PATTERN'"):
        register_datasets(_cfg({"NAME": "b", "TYPE": "list_of_files", "FOLDER": "/here", "PATERN": "x"}))
    with pytest.raises(ValueError, match="unknown TYPE 'coco'"):
        register_datasets(_cfg({"NAME": "b", "JSON": "x", "IMAGES": "y"}))
    assert "coco" in DATASET_TYPE_REGISTRY


@pytest.mark.parametrize(("key", "kind"), [("JSON", "file"), ("IMAGES", "folder")])
def test_missing_paths_are_named_when_the_data_is_loaded(root, key, kind):
    register_datasets(_cfg(_entry(root, **{key: "/nowhere/at/all"})))
    with pytest.raises(FileNotFoundError, match=f"'t_train'.*{key}: no such {kind}: /nowhere/at/all"):
        DatasetCatalog.get("t_train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("categories"), "variant.json is not in COCO format: it has no list 'categories'"),
        (lambda c: c["annotations"][0].update(category_id=99), "annotation 1 has category_id 99, which is not listed"),
        (lambda c: c["annotations"][0].update(image_id=99), "annotation 1 has image_id 99, which is not listed"),
        (lambda c: c["categories"][1].update(keypoints=["other"]), "'disc' and 'ring' have different keypoints"),
    ],
)
def test_wrong_files(root, tmp_path, change, message):
    register_datasets(_cfg(_variant(root, tmp_path, change)))
    with pytest.raises(ValueError, match=message):
        DatasetCatalog.get("t_train")


def test_a_file_that_is_not_json(root, tmp_path):
    (tmp_path / "broken.json").write_text('{"images": [')
    register_datasets(_cfg(_entry(root, JSON=str(tmp_path / "broken.json"))))
    with pytest.raises(ValueError, match=r"'t_train': .*broken.json is not valid JSON"):
        DatasetCatalog.get("t_train")


def test_declared_classes_are_known_early_and_compared(root):
    register_datasets(_cfg(_entry(root, CLASSES=list(shapes.CLASSES)), _entry(root, NAME="u", CLASSES=["car"])))
    assert MetadataCatalog.get("t_train").thing_classes == list(shapes.CLASSES)
    assert len(DatasetCatalog.get("t_train")) == 2
    with pytest.raises(ValueError, match=r"'u': CLASSES are \['car'\], but .* has by ascending id \['disc'"):
        DatasetCatalog.get("u")


def test_keypoint_keys_of_the_entry_win(root):
    pairs, sigmas = [["top", "bottom"]], [0.1, 0.2, 0.3, 0.4, 0.5]
    register_datasets(_cfg(_entry(root, KEYPOINT_FLIP_PAIRS=pairs, KEYPOINT_SIGMAS=sigmas)))
    DatasetCatalog.get("t_train")
    metadata = MetadataCatalog.get("t_train")
    assert [tuple(p) for p in metadata.keypoint_flip_map] == [("top", "bottom")]
    assert metadata.keypoint_oks_sigmas == sigmas


def test_keypoint_keys_that_do_not_fit(root, tmp_path):
    without = _variant(root, tmp_path, lambda c: [category.pop("keypoints") for category in c["categories"]])
    register_datasets(
        _cfg(
            _entry(root, NAME="pairs", KEYPOINT_FLIP_PAIRS=[["left", "rihgt"]]),
            _entry(root, NAME="sigmas", KEYPOINT_SIGMAS=[0.1]),
            {**without, "NAME": "none", "KEYPOINT_SIGMAS": [0.1]},
        )
    )
    with pytest.raises(ValueError, match="'pairs': KEYPOINT_FLIP_PAIRS: no keypoint 'rihgt'; did you mean 'right'"):
        DatasetCatalog.get("pairs")
    with pytest.raises(ValueError, match="'sigmas': KEYPOINT_SIGMAS has 1 values for 5 keypoints"):
        DatasetCatalog.get("sigmas")
    with pytest.raises(ValueError, match=r"'none': KEYPOINT_SIGMAS is given, but no category .* has keypoints"):
        DatasetCatalog.get("none")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [("sigmas", [None, 0.1], "instead of numbers"), ("skeleton", [1, 2], r"skeleton\[0\] is 1"),
     ("skeleton", 7, r"skeleton\[0\] is 7")],
)  # fmt: skip
def test_keypoint_fields_of_another_kind(root, tmp_path, key, value, said):
    entry = _variant(root, tmp_path, lambda c: [category.update({key: value}) for category in c["categories"]])
    register_datasets(_cfg(entry))
    with pytest.raises(ValueError, match=said):
        DatasetCatalog.get("t_train")


def test_flip_pairs_are_inferred_from_left_and_right(root, tmp_path):
    def plain(content):
        for category in content["categories"]:
            del category["flip_pairs"], category["sigmas"]
            category["keypoints"] = ["nose", "left_eye", "right_eye", "left_ear", "right_ear"]

    register_datasets(_cfg(_variant(root, tmp_path, plain)))
    DatasetCatalog.get("t_train")
    metadata = MetadataCatalog.get("t_train")
    expected = [("left_eye", "right_eye"), ("left_ear", "right_ear")]
    assert [tuple(p) for p in metadata.keypoint_flip_map] == expected
    assert metadata.get("keypoint_oks_sigmas") is None
