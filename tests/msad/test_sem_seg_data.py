"""``TYPE: sem_seg``: files, checks that name the file, crops, and a segmentor trained and evaluated by the tool."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.engine import default_argument_parser
from PIL import Image

from msad import cli, load_config
from msad.data import dataset_fingerprint
from msad.data.checks import check_data, check_test_sets
from msad.data.loader import build_train_loader
from msad.data.register import register_datasets
from msad.engine.setup import load_model

SCRIPT = Path(__file__).parents[2] / "tools" / "train_net.py"
CLASSES = ["ground", "disc"]


@pytest.fixture
def folder(tmp_path, monkeypatch, clean_catalogs):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return tmp_path


def write(folder, name, labels, image=None, image_suffix=".png", label_suffix=".png"):
    labels = np.asarray(labels, dtype=np.uint8)
    for kind, suffix, pixels in (("images", image_suffix, image), ("labels", label_suffix, labels)):
        path = folder / kind / f"{name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.zeros((*labels.shape, 3), np.uint8) if pixels is None else pixels)


def entry(name="segments", **options):
    kind = {"TYPE": "sem_seg", "IMAGES": "images", "LABELS": "labels", "CLASSES": CLASSES, "IMAGE_SUFFIX": ".png"}
    return {"NAME": name, **kind, **options}


def load(**options):
    cfg = load_config("")
    cfg.DATASETS.REGISTER = [entry(**options)]
    register_datasets(cfg)
    return DatasetCatalog.get("segments")


class TestFiles:
    def test_folders_and_suffixes_of_cityscapes(self, folder):
        suffixes = ("_leftImg8bit.png", "_gtFine_labelTrainIds.png")
        for name in ("ulm/ulm_1", "aachen/aachen_1"):
            write(folder, name, np.ones((4, 6)), None, *suffixes)
        (folder / "labels" / "ulm" / "ulm_1_gtFine_color.png").write_bytes(b"")
        first, second = load(IMAGE_SUFFIX=suffixes[0], LABEL_SUFFIX=suffixes[1])
        assert first == {
            "file_name": f"{folder}/images/aachen/aachen_1_leftImg8bit.png",
            "sem_seg_file_name": f"{folder}/labels/aachen/aachen_1_gtFine_labelTrainIds.png",
            "image_id": "aachen/aachen_1", "width": 6, "height": 4,
        }  # fmt: skip
        assert second["image_id"] == "ulm/ulm_1"
        metadata = MetadataCatalog.get("segments")
        assert metadata.stuff_classes == CLASSES and metadata.ignore_label == 255
        assert metadata.evaluator_type == "sem_seg"

    def test_links_to_folders_are_followed_and_hidden_ones_left(self, folder, tmp_path_factory):
        write(folder, "a", [[0]])
        write(folder, ".ipynb_checkpoints/a-checkpoint", [[0]])
        store = tmp_path_factory.mktemp("store")
        write(store, "b", [[1]])
        for kind in ("images", "labels"):
            (folder / kind / "night").symlink_to(store / kind)
        assert [record["image_id"] for record in load()] == ["a", "night/b"]

    def test_list_of_names(self, folder):
        for name in "abc":
            write(folder, name, [[0]])
        (folder / "val.txt").write_text("c\na\n\n")
        assert [r["image_id"] for r in load(LIST="val.txt")] == ["c", "a"]

    @pytest.mark.parametrize(
        "labels, options, message",
        [
            ([[0, 7]], {}, r"labels/x\.png has the label 7; classes are 0 to 1, ignored is 255"),
            ([[0, 255]], {"IGNORE_LABEL": 9}, r"x\.png has the label 255; .* ignored is 9"),
            ([[0, 1]], {"IMAGE_SUFFIX": ".jpg"}, r"IMAGES: 1 of 1 files are missing, the first is .*images/x\.jpg"),
            ([[0, 1]], {"LIST": "none.txt"}, r"LIST: no such file: .*none\.txt"),
            ([[0, 1]], {"LABELS": "nowhere"}, r"LABELS: no such folder: .*nowhere"),
            ([[0, 1]], {"IGNORE_LABEL": 1}, r"IGNORE_LABEL 1 is the number of the class 'disc'"),
            ([[0, 1]], {"IGNORE_LABEL": 300}, r"IGNORE_LABEL must be a number from 0 to 255"),
            ([[0, 1]], {"CLASES": CLASSES}, r"did you mean 'CLASSES'"),
        ],
    )
    def test_what_is_wrong_is_named(self, folder, labels, options, message):
        write(folder, "x", labels)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load(**options)

    def test_label_maps_of_another_form_are_named(self, folder):
        write(folder, "x", [[0, 1]], image=np.zeros((2, 2, 3), np.uint8))
        with pytest.raises(ValueError, match=r"labels/x\.png has \(2, 1\) pixels .*, its image \(2, 2\)"):
            load()
        cv2.imwrite(str(folder / "labels" / "x.png"), np.zeros((2, 2, 3), np.uint8))
        with pytest.raises(ValueError, match=r"x\.png has mode 'RGB'"):
            DatasetCatalog.get("segments")

    @pytest.mark.parametrize("palette", [False, True])
    def test_labels_belong_to_the_upright_image(self, folder, palette):
        """Which is turned as its EXIF data say; so is a label map that has some."""
        labels, exif = np.array([[0, 1, 1], [0, 0, 1]], np.uint8), Image.Exif()
        exif[0x0112] = 6  # the first row becomes the last column
        for turned in (False, True):
            write(folder, "x", labels)
            Image.fromarray(np.zeros((3, 2, 3), np.uint8)).save(folder / "images" / "x.png", exif=exif)
            image = Image.fromarray(np.rot90(labels).copy() if turned else labels, "P" if palette else "L")
            if palette:
                image.putpalette([0, 0, 0, 200, 10, 10])
            image.save(folder / "labels" / "x.png", **({"exif": exif} if turned else {}))
            os.utime(folder / "labels" / "x.png", ns=(1, 1 + turned))
            (record,) = load() if not turned else DatasetCatalog.get("segments")
            assert (record["width"], record["height"]) == (3, 2)
            mapped = DatasetMapper(load_config("", ["INPUT.MIN_SIZE_TEST", 0]), False)(record)
            assert mapped["image"].shape == (3, 2, 3) and mapped["sem_seg"].tolist() == labels.tolist()

    @pytest.mark.parametrize("size", [20, 60])
    def test_damaged_label_maps_are_named(self, folder, size):
        write(folder, "x", np.random.default_rng(0).integers(0, 2, (32, 32)))
        path = folder / "labels" / "x.png"
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(ValueError, match=r"label map .*labels/x\.png cannot be read: "):
            load()

    def test_indices_of_a_palette_are_the_classes(self, folder):
        """As VOC's label maps: detectron2's mapper alone would read how bright the colours are."""
        write(folder, "x", [[0, 0]])
        paletted = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
        paletted.putpalette([0, 0, 0, 200, 10, 10, 9, 200, 9])
        paletted.save(folder / "labels" / "x.png")
        (record,) = load()
        assert DatasetMapper(load_config("", ["INPUT.MIN_SIZE_TEST", 0]), False)(record)["sem_seg"].tolist() == [[0, 1]]
        assert record["sem_seg_file_name"] != str(folder / "labels" / "x.png")
        assert DatasetCatalog.get("segments")[0] == record
        paletted.putdata([1, 2])
        paletted.save(folder / "labels" / "x.png")
        os.utime(folder / "labels" / "x.png", ns=(1, 1))
        with pytest.raises(ValueError, match=r"labels/x\.png has the label 2"):
            DatasetCatalog.get("segments")

    def test_changed_files_are_looked_at_again(self, folder):
        write(folder, "x", [[0, 1]])
        load()
        write(folder, "x", [[0, 2]])
        os.utime(folder / "labels" / "x.png", ns=(1, 1))
        with pytest.raises(ValueError, match="label 2"):
            DatasetCatalog.get("segments")


class TestCocoMasks:
    """``TYPE: coco_sem_seg``."""

    SQUARE = [[0, 0, 4, 0, 4, 4, 0, 4]]

    def coco(self, folder, annotations, names=("disc", "ring"), ids=(7, 3)):
        (folder / "images").mkdir(exist_ok=True)
        content = {
            "images": [{"id": 5, "file_name": "a.png", "height": 4, "width": 6}],
            "annotations": [{"id": i, "image_id": 5, **a} for i, a in enumerate(annotations, start=1)],
            "categories": [{"id": number, "name": name} for number, name in zip(ids, names)],
        }
        (folder / "coco.json").write_text(json.dumps(content))
        cfg = load_config("")
        keys = {"TYPE": "coco_sem_seg", "JSON": "coco.json", "IMAGES": "images", "BACKGROUND": "ground"}
        cfg.DATASETS.REGISTER = [{"NAME": "masks", **keys}]
        register_datasets(cfg)
        return DatasetCatalog.get("masks")

    def annotation(self, category, polygons, **more):
        return {"category_id": category, "bbox": [0, 0, 4, 4], "segmentation": polygons, **more}

    def test_label_maps(self, folder):
        small = self.annotation(3, [[1, 1, 3, 1, 3, 3, 1, 3]], area=4.0)  # on the large one, whatever comes first
        crowd = {"size": [4, 6], "counts": [12, 12]}  # the last three columns, one of them the square's
        objects = [small, self.annotation(7, self.SQUARE, area=16.0), self.annotation(7, crowd, area=12.0, iscrowd=1)]
        (record,) = self.coco(folder, objects)
        labels = np.asarray(Image.open(record["sem_seg_file_name"]))
        assert labels.tolist() == [
            [2, 2, 2, 2, 255, 255], [2, 1, 1, 2, 255, 255], [2, 1, 1, 2, 255, 255], [2, 2, 2, 2, 255, 255]
        ]  # fmt: skip
        assert record["file_name"] == f"{folder}/images/a.png" and (record["width"], record["height"]) == (6, 4)
        metadata = MetadataCatalog.get("masks")
        assert metadata.stuff_classes == ["ground", "ring", "disc"] and metadata.evaluator_type == "sem_seg"

    def test_polygons_of_too_few_points_are_left_out(self, folder):
        """First or last, and an object that has no other."""
        line = [0, 0, 5, 3]
        objects = [self.annotation(7, [line, *self.SQUARE]), self.annotation(3, [line])]
        (record,) = self.coco(folder, objects)
        labels = np.asarray(Image.open(record["sem_seg_file_name"]))
        assert labels.tolist() == [[2, 2, 2, 2, 0, 0]] * 4

    @pytest.mark.parametrize("box", [{}, {"bbox": []}, {"bbox": [0, 0, float("nan"), 4]}, {"bbox": "none"}])
    def test_masks_need_no_box(self, folder, box):
        square = {"category_id": 7, "segmentation": self.SQUARE, **box}
        rest = {**square, "category_id": 3, "segmentation": [[4, 0, 6, 0, 6, 4, 4, 4]]}
        (record,) = self.coco(folder, [square, rest])
        labels = np.asarray(Image.open(record["sem_seg_file_name"]))
        assert labels.tolist() == [[2, 2, 2, 2, 1, 1]] * 4
        assert not MetadataCatalog.get("masks").findings

    def test_what_is_left_out_is_said_before_training(self, folder):
        self.coco(folder, [self.annotation(7, [[0, 0, 5, 3], *self.SQUARE]), self.annotation(3, self.SQUARE)])
        cfg = load_config("", ["DATASETS.TEST", "('masks',)", "MODEL.META_ARCHITECTURE", "SemanticSegmentor"])
        said = [str(finding) for finding in check_data(cfg, images=False)[1]]
        wanted = "annotation 1 has a polygon of fewer than three points, which is left out, in 'a.png'"
        assert sum("'masks'" in text and wanted in text for text in said) == 1, said

    def test_changed_annotations_are_drawn_again(self, folder):
        first = self.coco(folder, [self.annotation(7, self.SQUARE)])[0]["sem_seg_file_name"]
        assert DatasetCatalog.get("masks")[0]["sem_seg_file_name"] == first
        (second,) = self.coco(folder, [self.annotation(3, self.SQUARE)])
        assert second["sem_seg_file_name"] != first
        assert np.asarray(Image.open(second["sem_seg_file_name"]))[0, 0] == 1

    def test_an_object_without_mask_is_named(self, folder):
        with pytest.raises(ValueError, match=r"'masks': .*coco\.json: annotation 1 has no mask"):
            self.coco(folder, [{"category_id": 7, "bbox": [0, 0, 4, 4]}])

    def test_classes_of_train_and_test_sets_are_compared(self, folder):
        self.coco(folder, [self.annotation(7, self.SQUARE)])
        MetadataCatalog.get("masks").classes_like = "others"
        MetadataCatalog.get("others").stuff_classes = ["ground", "disc"]
        with pytest.raises(ValueError, match=r"coco\.json has the classes .*'disc'\], those of 'others'"):
            DatasetCatalog.get("masks")
        MetadataCatalog.remove("others")


def test_fingerprint_sees_corrected_labels(folder):
    write(folder, "x", [[0, 1, 0]])
    cfg = load_config("", ["DATASETS.REGISTER", [entry()], "DATASETS.TRAIN", ("segments",)])
    before = dataset_fingerprint(cfg)["segments"]
    write(folder, "x", [[1, 1, 0]])
    os.utime(folder / "labels" / "x.png", ns=(1, 1))
    after = dataset_fingerprint(cfg)["segments"]
    assert before["images"] == after["images"] and before["annotations"] != after["annotations"]


def scene(seed, size=64):
    """A bright disc on dark ground with noise; the outermost pixels are not labelled."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    centre, radius = rng.uniform(18, size - 18, 2), rng.uniform(10, 18)
    disc = np.hypot(y - centre[0], x - centre[1]) < radius
    image = np.where(disc[..., None], 180, 60) + rng.normal(0, 20, (size, size, 3))
    labels = disc.astype(np.uint8)
    labels[0] = 255
    return np.clip(image, 0, 255).astype(np.uint8), labels


@pytest.fixture
def project(folder):
    """Scenes to train on and to evaluate, and the yaml of a tiny PSPNet."""
    for seed in range(12):
        image, labels = scene(seed)
        write(folder, f"s{seed:02}", labels, image)
    for split, names in (("train", range(8)), ("val", range(8, 12))):
        (folder / f"{split}.txt").write_text("\n".join(f"s{i:02}" for i in names))
    config = {
        "_BASE_": str(SCRIPT.parents[1] / "configs" / "Segmentation" / "Base-PSPNet.yaml"),
        "SEED": 1,
        "OUTPUT_DIR": str(folder / "output"),
        "MODEL": {
            "DEVICE": "cpu",
            "BACKBONE": {"NAME": "build_dilated_resnet_backbone"},
            "RESNETS": {"DEPTH": 18, "STEM_OUT_CHANNELS": 16, "RES2_OUT_CHANNELS": 16, "NORM": "BN"},
            "SEM_SEG_HEAD": {"NUM_CLASSES": 2, "CONVS_DIM": 16, "NORM": "BN"},
        },
        "DATASETS": {
            "REGISTER": [entry(f"discs_{split}", LIST=f"{split}.txt") for split in ("train", "val")],
            "TRAIN": ("discs_train",), "TEST": ("discs_val",),
        },
        "INPUT": {
            "MIN_SIZE_TRAIN": (48, 80), "MAX_SIZE_TRAIN": 200, "MIN_SIZE_TEST": 64,
            "CROP": {"SIZE": [48, 40], "SINGLE_CATEGORY_MAX_AREA": 0.95},
        },
        "DATALOADER": {"NUM_WORKERS": 0},
        "SOLVER": {"IMS_PER_BATCH": 4, "MAX_ITER": 36, "OPTIMIZER": "AdamW", "BASE_LR": 0.005},
        "TEST": {"EVAL_PERIOD": 0},
    }  # fmt: skip
    (folder / "psp.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_training_crops_have_one_size_and_labels(project):
    cfg = load_config(project / "psp.yaml")
    register_datasets(cfg)
    batches = iter(build_train_loader(cfg, seed=3))
    seen = [sample for _ in range(5) for sample in next(batches)]
    assert {tuple(s["image"].shape[1:]) for s in seen} == {(48, 40)}
    assert {tuple(s["sem_seg"].shape) for s in seen} == {(48, 40)}
    assert set().union(*(s["sem_seg"].unique().tolist() for s in seen)) == {0, 1, 255}
    assert {s["file_name"][-7:-4] for s in seen} <= {f"s{i:02}" for i in range(8)}


def test_wrong_number_of_classes_is_said_before_training(project):
    cfg = load_config(project / "psp.yaml", ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3"])
    register_datasets(cfg)
    with pytest.raises(ValueError, match=r"MODEL\.SEM_SEG_HEAD\.NUM_CLASSES is 3.*2 classes: ground, disc"):
        build_train_loader(cfg, seed=0)


def test_labels_that_are_ignored_have_one_number_in_data_and_model(project):
    cfg = load_config(project / "psp.yaml", ["MODEL.SEM_SEG_HEAD.IGNORE_VALUE", "254"])
    register_datasets(cfg)
    with pytest.raises(ValueError, match=r"IGNORE_VALUE is 254.*'discs_train'.* is 255.*Fix: set .*IGNORE_VALUE 255"):
        build_train_loader(cfg, seed=0)
    check_test_sets(cfg)  # there the data's own number is used
    cfg.TEST.LOSS_IMAGES = 1
    with pytest.raises(ValueError, match=r"IGNORE_VALUE is 254.*'discs_val'"):
        check_test_sets(cfg)


@pytest.fixture
def run(project):
    """``run(*arguments, config=)``: tools/train_net.py."""
    spec = importlib.util.spec_from_file_location("train_net", SCRIPT)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def call(*arguments, config="psp.yaml"):
        argv = ["--config-file", str(project / config), *map(str, arguments)]
        return tool.work(cli.parse(default_argument_parser(), argv))

    return call


def test_mixed_precision(project, run):
    try:
        run("SOLVER.AMP.ENABLED", True, "SOLVER.MAX_ITER", 3, "SOLVER.IMS_PER_BATCH", 2)
    except AssertionError as error:
        assert "CUDA" in str(error)  # an engine whose AMP needs a GPU says so
        return
    state = torch.load(project / "output" / "model_final.pth", weights_only=True)["model"]
    assert all(torch.isfinite(value).all() and value.dtype != torch.bfloat16 for value in state.values())


def test_a_segmentor_trains_resumes_and_is_evaluated(project, run):
    final = project / "output" / "model_final.pth"

    def weights():
        return torch.load(final, weights_only=True)["model"]

    run("SOLVER.CHECKPOINT_PERIOD", 28)
    metrics = run("--eval-only", "MODEL.WEIGHTS", final)["sem_seg"]
    assert metrics["mIoU"] > 70 and {"IoU-ground", "IoU-disc", "pACC"} <= set(metrics)
    expected = weights()
    final.unlink()
    (project / "output" / "last_checkpoint").write_text("model_0000027.pth")
    run("--resume", "SOLVER.CHECKPOINT_PERIOD", 28)
    assert all(torch.equal(value, expected[name]) for name, value in weights().items())

    # A narrower student at half resolution under it; the checkpoint is the student's alone.
    text = yaml.safe_dump({
        "_BASE_": "psp.yaml",
        "MODEL": {"RESNETS": {"RES2_OUT_CHANNELS": 8}, "SEM_SEG_HEAD": {"CONVS_DIM": 8}},
        "DISTILL": {
            "TEACHERS": [{"CONFIG": "psp.yaml", "WEIGHTS": str(final)}],
            "STUDENT_RESOLUTION": "L", "INIT_STUDENT": "none", "WARMUP_ITERS": 0,
            "LOSSES": [{"NAME": "CWD", "TAP": "scores", "MATCH": "by_index", "WEIGHT": 3.0}],
        },
        "INPUT": {"MIN_SIZE_TEST": 32},
    })  # fmt: skip
    (project / "student.yaml").write_text(text)
    folder = project / "student"
    run("SOLVER.MAX_ITER", 4, "OUTPUT_DIR", folder, config="student.yaml")
    logged = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    assert any(row.get("loss_distill/CWD", 0) > 0 for row in logged)
    student = load_model(load_config(project / "student.yaml"), str(folder / "model_final.pth"))
    assert student.state_dict().keys() == torch.load(folder / "model_final.pth", weights_only=True)["model"].keys()
