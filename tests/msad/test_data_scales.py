"""Sizes of objects in training against those in tests: what is said, and that no shipped config is warned of."""

import glob
import math

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import BoxMode

from msad import load_config
from msad.data.checks import check_data
from msad.data.low_res import FILE
from msad.data.scales import check_scales, test_scale, training_scale

test_scale.__test__ = False
SIZES = {"diagrams": (448, 760), "aerial": (540, 960), "nuclei": (256, 320), "mouse": (400, 400)}


def image(height=448, width=448, sides=(16, 25), **extra):
    """An image with an object of this width and height, in pixels of the file."""
    box = {"bbox": [0, 0, *sides], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    return {"height": height, "width": width, "annotations": [box], **extra}


ONE = [image()]


def warned(cfg, train=ONE, test=ONE):
    return [*check_scales(cfg, train, test, "val")]


@pytest.fixture
def cfg():
    cfg = load_config("configs/diagrams/student_L.yaml")
    cfg.defrost()
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = False, (448,), 768
    return cfg


def test_a_students_yaml_without_its_teacher_learns_larger_objects(cfg):
    assert warned(cfg) == [] and training_scale(cfg, 448, 448) == test_scale(cfg, 448, 448) == 0.5
    cfg.DISTILL.TEACHERS = []
    (finding,) = warned(cfg)
    assert finding.check == "data set 'val'" and finding.level == "warning"
    assert finding.text == (
        "the model sees objects of 10 px in it (median side) and learns from objects of 20 px "
        "(INPUT.MIN_SIZE_TRAIN [448]; INPUT.MIN_SIZE_TEST 224)"
    )
    assert finding.fix.endswith("to train it without distillation, leave that and set DISTILL.LOSSES to []")


def test_the_shipped_student_without_its_teacher_is_warned_of():
    cfg = load_config("configs/diagrams/student_L.yaml")
    cfg.defrost()
    cfg.DISTILL.TEACHERS = []
    (finding,) = warned(cfg, [image(448, 760)], [image(448, 760)])
    assert "crops relative_range [0.4, 0.4]" in finding.text


def test_tests_at_twice_the_size(cfg):
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 448, 768
    (finding,) = warned(cfg)
    assert "objects of 20 px in it (median side) and learns from objects of 10 px" in finding.text
    assert "DISTILL" not in finding.fix


def test_files_of_another_size_with_objects_as_large_in_them(cfg):
    """Pixels as the model sees them count, not those of files; and patches of an image are not the image."""
    assert warned(cfg, train=[image(4480, 4480, (160, 250))]) == []
    assert len(warned(cfg, train=[image(224, 224)])) == 1


def test_the_median_object_of_those_that_are_learned_counts(cfg):
    crowd, empty, nothing = image(sides=(400, 400)), image(sides=(0, 0)), {"height": 448, "width": 448}
    crowd["annotations"][0]["iscrowd"] = 1
    without_a_size = {"annotations": image(sides=(400, 400))["annotations"]}
    assert warned(cfg, [image(), image(), image(sides=(400, 400)), *[crowd, empty, nothing, without_a_size] * 3]) == []
    assert len(warned(cfg, [image(), *[image(sides=(400, 400))] * 2])) == 1
    assert warned(cfg, [nothing]) == warned(cfg, test=[]) == warned(cfg, train=[]) == []


def test_sizes_that_are_none_are_left_to_other_checks(cfg):
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("learned",), ("tested",)
    try:
        for name in ("learned", "tested"):
            DatasetCatalog.register(name, lambda: [])
        known = {"learned": [image(file_name="a.png") | {"width": 0}], "tested": [image(file_name="b.png")]}
        assert check_data(cfg, images=False, known=known)[0] == {"learned": known["learned"]}
    finally:
        for name in ("learned", "tested"):
            DatasetCatalog.remove(name)
            MetadataCatalog.pop(name, None)


def test_two_files_of_an_image_are_not_judged(cfg):
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 448, 768
    assert warned(cfg) and warned(cfg, [image(**{FILE: "a.png"})]) == []


@pytest.mark.parametrize("kind, size", [
    ("relative", (0.5, 0.6)), ("relative_range", (0.4, 0.4)), ("absolute", (100, 900)), ("absolute_range", (100, 200)),
])  # fmt: skip
@pytest.mark.parametrize("sides", [(256,), (200, 300, 400), (0,)])
def test_scale_of_training_against_draws_of_the_augmentations(cfg, kind, size, sides):
    np.random.seed(0)
    cfg.DISTILL.TEACHERS, cfg.INPUT.CROP.ENABLED = [], True
    cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE, cfg.INPUT.MIN_SIZE_TRAIN = kind, list(size), sides
    augmentations = T.AugmentationList(DatasetMapper.from_config(cfg, True)["augmentations"])
    pixels, logs = np.zeros((448, 760, 3), np.uint8), []
    for _ in range(400):
        left, right = augmentations(T.AugInput(pixels)).apply_coords(np.array([[0.0, 0.0], [1.0, 0.0]]))
        logs.append(math.log(abs(right[0] - left[0])))
    assert math.exp(np.mean(logs)) == pytest.approx(training_scale(cfg, 448, 760), rel=0.03)


def test_crops_of_segmentors_are_not_resized():
    cfg = load_config("configs/nuclei_seg/teacher.yaml")
    cfg.defrost()
    cfg.INPUT.MIN_SIZE_TRAIN = (192,)
    assert cfg.INPUT.CROP.ENABLED and training_scale(cfg, 256, 320) == 192 / 256


def test_no_shipped_config_is_warned_of():
    judged = 0
    for file in sorted(glob.glob("configs/**/*.yaml", recursive=True)):
        height, width = next((size for name, size in SIZES.items() if f"/{name}" in file), (480, 640))
        config = load_config(file)
        patches = any(entry.get("PATCHES") for entry in config.DATASETS.REGISTER)
        train = image(height // 2, width // 2) if patches else image(height, width)
        assert warned(config, [train], [image(height, width)]) == [], file
        judged += 1
    assert judged > 400
