"""Image files as people have them: faults are found before training, and named."""

from __future__ import annotations

import logging
import os

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, DatasetMapper
from PIL import Image
from spoiled_data import HEIGHT, WIDTH, Data

from msad import load_config
from msad.data import build_train_loader
from msad.data.checks import check_data
from msad.finding import ERROR, OK, WARNING


@pytest.fixture
def data(tmp_path, clean_catalogs):
    return Data(tmp_path)


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


def test_frames_of_16_bits_are_no_smaller_fault_than_one(data):
    """As microscopes and thermal cameras write them: a TIFF of several pages."""
    data.splits["val"]["images"][1]["file_name"] = "val_1.tif"
    pages = [Image.fromarray(np.full((HEIGHT, WIDTH), 4000, np.uint16)) for _ in range(2)]
    pages[0].save(data.image("val_1.tif"), save_all=True, append_images=pages[1:])
    (error,) = data.texts(ERROR)
    assert "val_1.tif has 16-bit or float pixels" in error and "convert to 8 bits" in error
    pages = [page.convert("L") for page in pages]
    pages[0].save(data.image("val_1.tif"), save_all=True, append_images=pages[1:])
    (warning,) = data.texts(WARNING)
    assert "val_1.tif has several frames" in warning and "only the first is used" in warning


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


PALETTE = [value for index in range(256) for value in (index // 2, 255 - index, 9)]


@pytest.fixture
def stuff(data):
    """``stuff(labels, mode)``: label maps of all images, for a semantic branch of 5 classes."""

    def write(labels, mode="L"):
        (data.root / "stuff").mkdir(exist_ok=True)
        for content in data.splits.values():
            for record in content["images"]:
                image = Image.fromarray(labels).convert(mode) if mode == "RGB" else Image.fromarray(labels, mode)
                if mode == "P":
                    image.putpalette(PALETTE)
                image.save(data.root / "stuff" / record["file_name"])
        data.entry = {"STUFF": str(data.root / "stuff")}
        data.cfg.MODEL.HTC.SEMANTIC_ON, data.cfg.MODEL.HTC.SEMANTIC_CLASSES = True, 5

    return write


def labels_of(*values):
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[0, : len(values)] = values
    return labels


@pytest.mark.parametrize("mode", ["L", "P"])
def test_labels_beyond_the_classes_of_the_semantic_branch(data, stuff, mode):
    stuff(labels_of(0, 4, 255), mode)
    assert data.texts(ERROR) == []
    image = Image.fromarray(labels_of(0, 5, 255), mode)
    if mode == "P":
        image.putpalette(PALETTE)
    image.save(data.root / "stuff" / "train_2.png")
    os.utime(data.root / "stuff" / "train_2.png", ns=(1, 1))
    wanted = (
        f"{data.image('train_2.png')} has a label map that cannot be used: it has the label 5; classes are 0 to 4, "
        "ignored is 255 (1 of 4 label maps). correct it, or MODEL.HTC.SEMANTIC_CLASSES"
    )
    assert data.texts(ERROR) == [wanted]
    data.cfg.MODEL.HTC.SEMANTIC_ON = False
    assert data.texts(ERROR) == []


def test_images_without_a_label_map_are_named_before_training(data, stuff):
    """Some of those that are trained on, or of a test set on which the branch has a loss."""
    stuff(labels_of(0, 4))
    data.register()
    whole = {name: DatasetCatalog.get(name) for name in ("d_train", "d_val")}
    bare = {name: [{k: v for k, v in r.items() if k != "sem_seg_file_name"} for r in rs] for name, rs in whole.items()}

    def errors(train, val):
        findings = check_data(data.cfg, known={"d_train": train, "d_val": val})[1]
        return [(finding.check, finding.text) for finding in findings if finding.level == ERROR]

    assert errors(whole["d_train"], bare["d_val"]) == errors(bare["d_train"], bare["d_val"]) == []
    ((check, text),) = errors([*whole["d_train"][:3], *bare["d_train"][3:]], whole["d_val"])
    assert check == "data set 'd_train'" and "has no label map, which HTC's semantic branch learns from (1 of 4" in text
    data.cfg.TEST.LOSS_IMAGES = 1
    ((check, text),) = errors(whole["d_train"], bare["d_val"])
    assert check == "data set 'd_val'" and "has no label map" in text
    data.cfg.DATASETS.TRAIN, data.cfg.DATASETS.TEST, data.cfg.TEST.LOSS_IMAGES = ("d_train", "d_val"), (), 0
    ((check, text),) = errors(whole["d_train"], bare["d_val"])
    assert check == "data set 'd_val'" and "has no label map" in text


def test_indices_of_a_palette_are_the_labels_of_the_semantic_branch(data, stuff):
    stuff(labels_of(0, 1, 2), "P")
    data.register()
    (record, *_) = DatasetCatalog.get("d_train")
    mapped = DatasetMapper(load_config("", ["INPUT.MIN_SIZE_TEST", 0]), False)(record)["sem_seg"]
    assert mapped.tolist() == labels_of(0, 1, 2).tolist()


def test_label_maps_of_another_form_are_named_before_training(data, stuff):
    stuff(labels_of(0, 1), "RGB")
    assert "train_0.png has mode 'RGB', not one channel of 8 bits" in data.texts(ERROR)[0]
    stuff(labels_of(0, 1)[:-1])
    assert f"train_0.png has ({WIDTH}, {HEIGHT - 1}) pixels (width, height), its image" in data.texts(ERROR)[0]
    stuff(labels_of(0, 1))
    path = data.root / "stuff" / "train_3.png"
    path.write_bytes(path.read_bytes()[:60])
    (said,) = data.texts(ERROR)
    assert "cannot be used: label map" in said and "train_3.png cannot be read: " in said
