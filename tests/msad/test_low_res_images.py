"""Students that see the files of another sensor: the same region, the same augmentations, the annotations of H."""

from __future__ import annotations

import json
import shutil

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from PIL import Image
from runs import config

from msad import load_config
from msad.data import build_train_loader, check_data, register_datasets
from msad.data.low_res import build_test_loader, follow, size_problem, to_low_res
from msad.data.mappers import inference_mapper
from msad.engine import DistillTrainer
from msad.engine.preflight.model_checks import box_ap, check_test_size
from msad.experiments.panels import draw_pictures
from msad.export.plain import by_itself
from msad.finding import ERROR, OK, WARNING
from msad.resolution import downsample, downsample_batch, downsample_labels


def scene(height, width):
    """A smooth image (h, w, 3) uint8 in which every place looks different."""
    ys, xs = np.mgrid[:height, :width].astype(np.float32)
    waves = [np.sin(xs / 17 + i) + np.cos(ys / 13 - i) + np.sin((xs + 2 * ys) / 29) for i in range(3)]
    return np.clip(128 + 40 * np.stack(waves, axis=2), 0, 255).astype(np.uint8)


def half(image, shift=1):
    """What ``downsample`` makes of an image (h, w, 3), rounded to uint8."""
    small = downsample(torch.from_numpy(image.transpose(2, 0, 1).copy()), shift)
    return small.round().byte().numpy().transpose(1, 2, 0)


GEOMETRY = {
    "nothing": [],
    "flip": [T.HFlipTransform(96)],
    "vertical flip": [T.VFlipTransform(64)],
    "crop": [T.CropTransform(20, 10, 50, 40)],
    "odd crop": [T.CropTransform(21, 13, 51, 37)],
    "resize": [T.ResizeTransform(64, 96, 100, 150)],
    "smaller": [T.ResizeTransform(64, 96, 43, 64)],
    "all": [T.CropTransform(11, 7, 61, 51), T.ResizeTransform(51, 61, 77, 92), T.HFlipTransform(92)],
}


@pytest.mark.parametrize("shift", [1, 2])
@pytest.mark.parametrize("name", GEOMETRY)
def test_the_students_image_is_what_downsampling_would_make(name, shift):
    """If the second file is H downsampled, both ways to the student's image agree."""
    image = scene(64, 96)
    transforms = T.TransformList(GEOMETRY[name])
    moved = transforms.apply_image(image.copy())
    ours = follow(half(image, shift), transforms, (64, 96), moved.shape[:2], shift).astype(float)
    wanted = half(np.ascontiguousarray(moved), shift).astype(float)
    assert ours.shape == wanted.shape
    inner = np.abs(ours - wanted)[1:-1, 1:-1]
    # Two ways of resampling; a shift of half of the student's pixel would differ by 5 and more.
    assert inner.mean() < 1.5 and inner.max() < 8
    if name in ("nothing", "flip", "vertical flip"):  # no resampling
        mirrored = {"nothing": np.s_[:], "flip": np.s_[:, ::-1], "vertical flip": np.s_[::-1]}[name]
        assert np.array_equal(ours, half(image, shift)[mirrored])


def test_places_stay_where_the_annotations_are():
    image, low = np.zeros((60, 80, 3), np.uint8), np.zeros((30, 40, 3), np.uint8)
    image[20:24, 30:34], low[10:12, 15:17] = 255, 255
    transforms = T.TransformList(GEOMETRY["nothing"] + [T.CropTransform(13, 9, 41, 33), T.HFlipTransform(41)])
    ours = follow(low, transforms, (60, 80), (33, 41), 1)
    moved = transforms.apply_image(image)
    centre = [(np.argwhere(m[..., 0] > 0) * m[..., 0][m[..., 0] > 0][:, None]).sum(0) / m[..., 0].sum() + 0.5
              for m in (ours.astype(float), moved.astype(float))]  # fmt: skip
    assert np.abs(centre[0] * 2 - centre[1]).max() < 0.15


def test_colours_change_alike_and_what_cannot_be_followed_is_refused():
    low, size = half(scene(64, 96)), (64, 96)
    brighter = T.BlendTransform(src_image=0, src_weight=-0.2, dst_weight=1.2)
    ours = follow(low, T.TransformList([brighter]), size, size, 1)
    assert np.array_equal(ours, brighter.apply_image(low)) and ours.mean() > low.mean() + 5
    with pytest.raises(ValueError, match="resizing, cropping and flipping only"):
        follow(low, T.TransformList([T.RotationTransform(64, 96, 30)]), size, size, 1)
    with pytest.raises(ValueError, match="adds a border"):
        follow(low, T.TransformList([T.PadTransform(20, 0, 0, 0)]), size, (64, 116), 1)
    with pytest.raises(ValueError, match="mixes in an H image"):
        mixed = T.BlendTransform(src_image=scene(64, 96), src_weight=0.5, dst_weight=0.5)
        follow(low, T.TransformList([mixed]), size, size, 1)


def test_sizes_up_to_rounding():
    for low in ((34, 51), (33, 50), (34, 50)):
        assert not size_problem((67, 101), low, 1)
    assert "is 52 x 34 (width x height), but the image is 101 x 67: 1/2 of that is 51 x 34" in size_problem(
        (67, 101), (34, 52), 1
    )
    assert size_problem((67, 101), (34, 51), 2) and not size_problem((67, 101), (17, 25), 2)


def test_batches_take_the_image_that_is_there(make_batch):
    (item,) = make_batch([(31, 40)])
    low = torch.randint(0, 256, (3, 16, 20), dtype=torch.uint8)
    (small,) = downsample_batch([{**item, "low_res_image": low}], 1, torch.device("cpu"))
    assert torch.equal(small["image"], low.float()) and "low_res_image" not in small
    assert small["instances"].image_size == (16, 20)
    alike = torch.randint(0, 256, (3, 31, 40), dtype=torch.uint8)  # another sensor's, of the same size
    (large,) = downsample_batch([{**item, "low_res_image": alike}], 0, torch.device("cpu"))
    assert torch.equal(large["image"], alike.float()) and large["instances"].image_size == (31, 40)
    with pytest.raises(ValueError, match=r"low_res_image is \(16, 20\).* must be \(8, 10\)"):
        downsample_batch([{**item, "low_res_image": low}], 2, torch.device("cpu"))


@pytest.fixture
def thermal(project, teacher_weights, tmp_path, clean_catalogs):
    """A student's config whose data sets have a second folder: inverted images of half the size."""
    low = tmp_path / "low"
    low.mkdir()
    for path in sorted((project / "data" / "images").iterdir()):
        cv2.imwrite(str(low / path.name), 255 - half(cv2.imread(str(path))), [cv2.IMWRITE_JPEG_QUALITY, 100])
    cfg = config(project, teacher_weights, "student", tmp_path / "out")
    names = {"tiny_train": f"low_train_{tmp_path.name}", "tiny_val": f"low_val_{tmp_path.name}"}
    register = [{**e, "NAME": names[e["NAME"]], "LOW_RES_IMAGES": str(low)} for e in cfg.DATASETS.REGISTER]
    cfg.DATASETS.REGISTER = register
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (names["tiny_train"],), (names["tiny_val"],)
    register_datasets(cfg)
    return cfg, low


def test_panels_show_what_a_student_finds_in_its_own_files(thermal, tmp_path, monkeypatch):
    """A model without LOW_RES_IMAGES beside it sees the H images; all answers are in their pixels."""
    cfg, low = thermal
    plain = cfg.clone()
    plain.DISTILL.TEACHERS = []
    predictors, seen, drawn = {}, {}, []
    for title, config_ in (("student", cfg), ("plain", plain)):
        predictors[title] = DefaultPredictor(config_)
        seen[title] = []
        predictors[title].model.register_forward_pre_hook(lambda _, args, own=seen[title]: own.extend(args[0]))
    monkeypatch.setattr("msad.experiments.panels.save_panels", lambda path, panels, *_, **__: drawn.extend(panels))
    monkeypatch.setattr("msad.experiments.panels.load_predictor", lambda _, title: predictors[title])
    models = {"S": (cfg, "student"), "P": (plain, "plain")}
    draw_pictures(tmp_path / "pictures", models, {"student": "S", "conventional": "P"})
    assert len(drawn) == 2 and len(seen["student"]) == len(seen["plain"]) == 4  # also in the gallery
    for panel, ours, theirs in zip(drawn * 2, seen["student"], seen["plain"]):
        small = inference_mapper(cfg)({"file_name": str(low / panel.caption)})["image"]
        assert torch.equal(ours["image"], small) and not torch.equal(theirs["image"].byte(), small)
        sizes = {panel.columns[title]["instances"].image_size for title in models}
        assert sizes == {panel.image.shape[:2]}


def test_loader_gives_both_images(thermal):
    cfg, _ = thermal
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.MIN_SIZE_TRAIN = (51, 64)
    loader = build_train_loader(cfg, seed=0)
    for _, batch in zip(range(3), loader):
        for item in batch:
            wanted = 255 - downsample(item["image"], 1)
            assert item["low_res_image"].shape == wanted.shape and item["low_res_image"].dtype == torch.uint8
            assert (item["low_res_image"].float() - wanted).abs().mean() < 12  # one is near 255 - the other
            (small,) = downsample_batch([item], 1, torch.device("cpu"))
            assert torch.equal(small["image"], item["low_res_image"].float())


def test_student_trains_and_is_evaluated_on_its_own_files(thermal, monkeypatch):
    cfg, low = thermal
    cfg.SOLVER.MAX_ITER = 2
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(False)
    seen = {"student": [], "teacher": []}
    distiller = trainer.distiller
    distiller.student.register_forward_pre_hook(
        lambda _, args: seen["student"].extend(item["image"].cpu().float() for item in args[0])
    )
    features = distiller.teacher.features

    def watch(items, *rest):
        seen["teacher"].extend(items)
        return features(items, *rest)

    monkeypatch.setattr(distiller.teacher, "features", watch)
    trainer.run_step_count = 0
    trainer.train()
    train = seen["student"][: len(seen["teacher"])]
    assert len(seen["teacher"]) == 4
    for ours, item in zip(train, seen["teacher"]):
        assert torch.equal(ours, item["low_res_image"].float())
        assert "downsampled_images" not in item  # the teacher's small branch sees H, downsampled
        assert (ours - (255 - downsample(item["image"].cpu().float(), 1))).abs().mean() < 12

    (batch, *_) = build_test_loader(cfg, cfg.DATASETS.TEST[0])
    record = DatasetCatalog.get(cfg.DATASETS.TEST[0])[0]
    expected = cv2.imread(str(low / record["file_name"].rsplit("/", 1)[1]))
    assert np.array_equal(batch[0]["image"].numpy().transpose(1, 2, 0), expected)
    assert (batch[0]["height"], batch[0]["width"]) == (64, 64)
    plain = cfg.clone()
    plain.DISTILL.TEACHERS = []
    (batch, *_) = build_test_loader(plain, cfg.DATASETS.TEST[0])
    assert batch[0]["file_name"] == record["file_name"]
    plain.DATASETS.LOW_RES = True
    (batch, *_) = build_test_loader(plain, cfg.DATASETS.TEST[0])
    assert batch[0]["file_name"] == record["low_res_file_name"]


def test_a_detector_without_a_teacher_is_trained_on_the_second_folder(thermal):
    cfg, low = thermal
    cfg.DISTILL.TEACHERS, cfg.DATASETS.LOW_RES = [], True
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (32,), "none"
    (item, *_) = next(iter(build_train_loader(cfg, seed=0)))
    assert item["image"].shape[-2:] == (32, 32) and str(low) in item["file_name"]
    records = {r["low_res_file_name"]: r for r in DatasetCatalog.get(cfg.DATASETS.TRAIN[0])}
    boxes = np.array([a["bbox"] for a in records[item["file_name"]]["annotations"]])
    boxes[:, 2:] += boxes[:, :2]
    np.testing.assert_allclose(item["instances"].gt_boxes.tensor.numpy(), np.clip(boxes / 2, 0, 32), atol=1e-4)


def test_an_exported_file_sees_what_its_student_sees(thermal, tmp_path, monkeypatch):
    pytest.importorskip("onnx", reason="pip install 'msad[onnx]'")
    pytest.importorskip("onnxruntime", reason="pip install 'msad[onnx]'")
    from msad.export import evaluate
    from msad.export.graph import detection_graph
    from msad.export.onnx import describe, trace
    from msad.export.pareto import _test_images

    cfg, _ = thermal
    cfg.INPUT.MIN_SIZE_TEST = 32  # the size of the files
    torch.manual_seed(0)
    model = build_model(by_itself(cfg)).eval()
    for name, parameter in model.head.named_parameters():  # scores that are apart, so that their order is known
        if name.endswith("weight"):
            torch.nn.init.normal_(parameter, std=0.1)
    graph = detection_graph(model)
    (tmp_path / "model.onnx").write_bytes(trace(graph, describe(cfg, graph, {})))
    given = []

    class Recorded(evaluate.ExportedModel):
        def __call__(self, inputs):
            given.extend(found := super().__call__(inputs))
            return found

    monkeypatch.setattr(evaluate, "ExportedModel", Recorded)
    timed = _test_images({"format": "BGR", "min_size": 0, "max_size": 0}, cfg.DATASETS.TEST[0], 2, True)
    assert [image.shape[:2] for image in timed] == [(32, 32)] * 2
    for source in (cfg, by_itself(cfg)):
        given.clear()
        evaluate.evaluate_exported(source, tmp_path / "model.onnx", threads=1)
        loader = build_test_loader(source, cfg.DATASETS.TEST[0])
        with torch.no_grad():
            wanted = [model(batch)[0]["instances"] for batch in loader]
        assert len(given) == len(wanted) > 0
        for one, theirs in zip((x["instances"] for x in given), wanted):
            assert one.image_size == theirs.image_size == (64, 64) and len(one) == len(theirs) > 20
            torch.testing.assert_close(one.scores, theirs.scores, rtol=0, atol=1e-4)
            torch.testing.assert_close(one.pred_boxes.tensor, theirs.pred_boxes.tensor, rtol=1e-4, atol=1e-3)


def test_preflight_measures_every_model_on_its_own_files(thermal, monkeypatch):
    cfg, low = thermal
    teacher = cfg.clone()
    teacher.DISTILL.TEACHERS = []
    seen = []

    def run(_model, loader, _evaluator):
        seen.extend(item for batch in loader for item in batch)
        return {"bbox": {"AP": 50.0}}

    monkeypatch.setattr("msad.engine.preflight.model_checks.inference_on_dataset", run)
    for source in (cfg, teacher):
        assert box_ap(source, torch.nn.Identity(), cfg.DATASETS.TEST[0], 1) == 50
    student, other = seen
    assert student["file_name"] == str(low / other["file_name"].rsplit("/", 1)[1]) != other["file_name"]
    image = cv2.imread(student["file_name"])
    assert torch.equal(student["image"], inference_mapper(cfg)({"file_name": student["file_name"]})["image"])
    assert (
        (student["height"], student["width"])
        == (other["height"], other["width"])
        == tuple(2 * np.array(image.shape[:2]))
    )


def test_the_smallest_image_of_a_test_is_that_of_the_second_folder(thermal):
    cfg, _ = thermal
    cfg.INPUT.MIN_SIZE_TEST, seen = 0, []

    class Model(torch.nn.GroupNorm):
        def forward(self, inputs):
            seen.extend(tuple(item["image"].shape[-2:]) for item in inputs)

    for source in (cfg, by_itself(cfg)):
        assert check_test_size(source, Model(2, 2))[0].level == OK
    cfg.DISTILL.TEACHERS = []
    assert check_test_size(cfg, Model(2, 2))[0].level == OK
    assert seen == [(32, 32), (32, 32), (64, 64)]


def test_annotations_are_scaled_with_the_file(tmp_path):
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "low.png")
    record = {"file_name": "h.png", "low_res_file_name": str(tmp_path / "low.png"), "width": 60, "height": 40}
    annotation = {"bbox": [10, 20, 4, 8], "segmentation": [[10, 20, 14, 20, 14, 28]], "keypoints": [11.5, 21, 2]}
    scaled = to_low_res({**record, "annotations": [annotation]})
    assert (scaled["width"], scaled["height"]) == (30, 20)
    assert scaled["annotations"] == [
        {"bbox": [5, 10, 2, 4], "segmentation": [[5, 10, 7, 10, 7, 14]], "keypoints": [5.75, 10.5, 2]}
    ]


def encoded(mask):
    return {"size": [*mask.shape], "counts": mask_util.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()}


@pytest.fixture
def encoded_masks(tmp_path, clean_catalogs):
    """A detector's config for LOW_RES_IMAGES, 40 x 33 of 80 x 66; one object and a crowd, both as run lengths."""
    mask = np.zeros((66, 80), bool)
    mask[10:30, 21:40] = True  # starts in the middle of a small pixel
    stuff = np.random.default_rng(0).integers(0, 3, mask.shape).astype(np.uint8)
    for folder, pixels in (("H", scene(66, 80)), ("L", half(scene(66, 80))), ("S", stuff)):
        (tmp_path / folder).mkdir()
        cv2.imwrite(str(tmp_path / folder / "a.png"), pixels)
    annotations = [{"id": i + 1, "image_id": 1, "category_id": 1, "bbox": [21, 10, 19, 20], "iscrowd": i,
                    "segmentation": encoded(mask)} for i in (0, 1)]  # fmt: skip
    images = [{"id": 1, "file_name": "a.png", "width": 80, "height": 66}]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    folders = {"IMAGES": str(tmp_path / "H"), "LOW_RES_IMAGES": str(tmp_path / "L"), "STUFF": str(tmp_path / "S")}
    name = f"encoded_{tmp_path.name}"
    cfg = load_config("", [
        "DATASETS.REGISTER", [{"NAME": name, "JSON": str(tmp_path / "a.json"), **folders}],
        "DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,), "DATASETS.LOW_RES", True, "DATALOADER.NUM_WORKERS", 0,
        "MODEL.MASK_ON", True, "MODEL.ROI_HEADS.NUM_CLASSES", 1, "INPUT.MASK_FORMAT", "bitmask",
        "INPUT.MIN_SIZE_TRAIN", (33,), "INPUT.MIN_SIZE_TEST", 33, "INPUT.RANDOM_FLIP", "none",
        "SOLVER.IMS_PER_BATCH", 1,
    ])  # fmt: skip
    register_datasets(cfg)
    return cfg, mask, stuff


def test_run_lengths_and_label_maps_are_scaled_for_training(encoded_masks):
    cfg, mask, stuff = encoded_masks
    (item,) = next(iter(build_train_loader(cfg, seed=0)))
    wanted = mask.reshape(33, 2, 40, 2).mean(axis=(1, 3)) >= 0.5
    assert item["instances"].gt_masks.tensor.tolist() == [wanted.tolist()]  # and no crowd
    assert item["instances"].gt_boxes.tensor.tolist() == [[10.5, 5, 20, 15]]
    assert torch.equal(item["sem_seg"], downsample_labels(torch.from_numpy(stuff), 1).long())


def test_evaluation_needs_no_masks(encoded_masks):
    cfg, *_ = encoded_masks
    ((item,),) = build_test_loader(cfg, cfg.DATASETS.TEST[0])
    assert item["image"].shape == (3, 33, 40) and (item["height"], item["width"]) == (66, 80)


def test_wrong_files_are_found_before_training(thermal):
    cfg, low = thermal
    assert not [f for f in check_data(cfg)[1] if f.level == ERROR]
    cv2.imwrite(str(low / "train_000001.jpg"), np.zeros((64, 64, 3), np.uint8))
    (low / "val_000001.jpg").unlink()
    errors = [f for f in check_data(cfg)[1] if f.level == ERROR]
    assert len(errors) == 2
    assert (
        "train_000001.jpg is 64 x 64 (width x height), but the image is 64 x 64: 1/2 of that is 32 x 32"
        in errors[0].text
    )
    assert "val_000001.jpg cannot be used: it does not exist (1 of 2" in errors[1].text
    cfg.DISTILL.TEACHERS = []  # a teacher does not read them
    assert not [f for f in check_data(cfg)[1] if f.level == ERROR]
    shutil.rmtree(low)
    assert any("LOW_RES_IMAGES: no such folder" in f.text for f in check_data(cfg)[1])


def test_pixels_of_the_files_are_looked_at_as_those_of_images_are(thermal):
    """A thermal camera's 16 bits would all be white; faults count among these files, not among the images."""
    cfg, low = thermal
    Image.fromarray(np.full((32, 32), 4000, np.uint16)).save(low / "train_000001.jpg", format="PNG")
    Image.fromarray(np.zeros((32, 32, 4), np.uint8)).save(low / "val_000001.jpg", format="PNG")
    findings = check_data(cfg)[1]
    (error,) = [f for f in findings if f.level == ERROR]
    assert "train_000001.jpg has 16-bit or float pixels (1 of 6 files of LOW_RES_IMAGES)" in error.text
    assert "convert to 8 bits: values above 255 would all be white" in error.fix
    (warning,) = [f for f in findings if "alpha" in f.text]
    assert warning.level == WARNING and "val_000001.jpg has an alpha channel (1 of 2 files of LOW_RES_" in warning.text


def test_an_exported_student_is_evaluated_on_its_own_files(thermal):
    cfg, low = thermal
    alone = by_itself(cfg)
    (name,) = alone.DATASETS.TEST
    seen = [item["file_name"] for batch in build_test_loader(alone, name) for item in batch]
    assert seen and all(file.startswith(str(low)) for file in seen)
    assert not by_itself(load_config("")).DATASETS.LOW_RES
