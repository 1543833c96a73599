"""tools/demo.py on tiny random models: what it writes, what it passes over, what it says."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.transforms import ResizeTransform
from detectron2.modeling import build_model
from load_tool import load_tool
from pycocotools import mask as rle

from msad import load_config
from msad.data import make_dataset, register_entries
from msad.data.register import register_datasets
from msad.visualization import draw_objects, predictions

SCRIPT = Path(__file__).parents[2] / "tools" / "demo.py"
DETECTOR = """
VERSION: 2
MODEL:
  META_ARCHITECTURE: FCOS
  DEVICE: cpu
  BACKBONE: {NAME: build_level_fpn_backbone}
  FPN:
    BOTTOM_UP: build_tiny_resnet_backbone
    IN_FEATURES: [res2, res3, res4, res5]
    OUT_CHANNELS: 16
    LEVELS: [p3, p4, p5, p6, p7]
  RESNETS: {OUT_FEATURES: [res2, res3, res4, res5], STEM_OUT_CHANNELS: 8, RES2_OUT_CHANNELS: 8, NORM: BN}
  FCOS: {CONV_DIMS: [16], NORM: "", NUM_CLASSES: 6, SCORE_THRESH_TEST: 0.0}
TEST: {DETECTIONS_PER_IMAGE: 4}
INPUT: {MIN_SIZE_TEST: 96, MAX_SIZE_TEST: 160}
"""
STUDENT = """
_BASE_: detector.yaml
MODEL:
  FPN: {LEVELS: [p2, p3, p4, p5, p6]}
  FCOS: {IN_FEATURES: [p2, p3, p4, p5, p6]}
INPUT: {MIN_SIZE_TEST: 48, MAX_SIZE_TEST: 80}
"""
TEACHER = "_BASE_: detector.yaml\nMODEL: {META_ARCHITECTURE: MultiScaleTeacher}\n"


@pytest.fixture(scope="module")
def demo():
    module = load_tool("demo")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Configs, random checkpoints, three scenes of 96 x 128 pixels with annotations, a video of 7 frames."""
    root = tmp_path_factory.mktemp("demo")
    for name, text in (("detector", DETECTOR), ("student", STUDENT), ("teacher", TEACHER)):
        (root / f"{name}.yaml").write_text(text)
        torch.manual_seed(0)
        model = build_model(load_config(root / f"{name}.yaml"))
        torch.save({"model": model.state_dict()}, root / f"{name}.pth")
    make_dataset(root / "data", 0, 3, size=(96, 128), seed=1)
    video = cv2.VideoWriter(str(root / "drive.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 12.0, (128, 96))
    scenes = sorted((root / "data" / "images").glob("*.jpg"))
    for i in range(7):
        video.write(cv2.imread(str(scenes[i % 3])))
    video.release()
    return root


def call(demo, world, *arguments, threshold="0", model="student"):
    return demo.main(
        ["--config-file", str(world / f"{model}.yaml"), "--weights", str(world / f"{model}.pth")]
        + ["--threshold", threshold, *map(str, arguments)]
    )


def frames(path):
    capture, found = cv2.VideoCapture(str(path)), []
    while True:
        good, frame = capture.read()
        if not good:
            return found, capture.get(cv2.CAP_PROP_FPS)
        found.append(frame)


def test_folder_of_images(demo, world, tmp_path, capsys):
    assert call(demo, world, "--input", world / "data" / "images", "--output", tmp_path / "out") == 0
    written = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in written] == ["val_000000.jpg", "val_000001.jpg", "val_000002.jpg"]
    for path in written:
        picture = cv2.imread(str(path))
        assert picture.shape == (480, 640, 3)
        plain = cv2.resize(cv2.imread(str(world / "data" / "images" / path.name)), (640, 480))
        assert (np.abs(picture.astype(int) - plain).max(axis=2) > 60).mean() > 0.001  # something is drawn
    assert "3 of 3 inputs" in capsys.readouterr().out


def test_the_threshold_decides_what_is_drawn(demo, world, tmp_path):
    image = world / "data" / "images" / "val_000000.jpg"
    assert call(demo, world, "--input", image, "--output", tmp_path / "a.png", threshold="0.999") == 0
    rgb = cv2.imread(str(image))[:, :, ::-1]
    found = {"height": 96, "width": 128, "annotations": []}
    plain = draw_objects(rgb, found, MetadataCatalog.get("unnamed classes"))
    assert np.array_equal(cv2.imread(str(tmp_path / "a.png"))[:, :, ::-1], plain)


def test_the_student_sees_small_images_and_answers_in_original_pixels(demo, world):
    predictor = demo.load_predictor(str(world / "student.yaml"), str(world / "student.pth"), "cpu", [])
    seen = []
    predictor.model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[-2:]))
    found = predictor(cv2.imread(str(world / "data" / "images" / "val_000000.jpg")))["instances"]
    assert seen == [(64, 64)]  # 48 x 64 padded to multiples of 32
    assert found.image_size == (96, 128)
    state = torch.load(world / "student.pth")["model"]
    assert all(torch.equal(value, state[name]) for name, value in predictor.model.state_dict().items())


def test_the_student_sees_the_files_of_a_second_folder(demo, world, tmp_path, capsys):
    """A second file that is what the student would see anyway changes nothing, another one does."""
    (tmp_path / "low").mkdir()
    pixels = cv2.imread(str(world / "data" / "images" / "val_000000.jpg"))
    half = ResizeTransform(96, 128, 48, 64).apply_image(pixels)
    cv2.imwrite(str(tmp_path / "a.png"), pixels)
    arguments = ["--teacher-config", world / "teacher.yaml", "--teacher-weights", world / "teacher.pth"]
    arguments += ["--low-res-images", tmp_path / "low", "--input", tmp_path / "a.png"]

    def detections(name, *arguments):
        file = tmp_path / f"{name}.json"
        assert call(demo, world, *arguments, "--output", tmp_path / name, "--json", file) == 0
        (found,) = json.loads(file.read_text())
        assert (found["width"], found["height"]) == (128, 96)
        return found["detections"]

    plain = detections("plain", "--input", tmp_path / "a.png")
    cv2.imwrite(str(tmp_path / "low" / "a.png"), half)
    assert len(plain) > 0 and detections("same", *arguments) == plain
    cv2.imwrite(str(tmp_path / "low" / "a.png"), 255 - half)
    assert detections("other", *arguments) != plain
    (tmp_path / "low" / "a.png").unlink()
    assert call(demo, world, *arguments, "--output", tmp_path / "none") != 0
    assert "a.png cannot be read: it does not exist" in capsys.readouterr().err


def test_panels_ground_truth_teacher_student(demo, world, tmp_path):
    annotations = world / "data" / "annotations_val.json"
    arguments = ["--teacher-config", world / "teacher.yaml", "--teacher-weights", world / "teacher.pth"]
    arguments += ["--ground-truth", annotations, "--input", world / "data" / "images" / "val_00000[01].jpg"]
    assert call(demo, world, *arguments, "--output", tmp_path) == 0
    pages = [cv2.imread(str(tmp_path / f"val_00000{i}.jpg")) for i in (0, 1)]
    assert all(page.shape[1] == 3 * 488 + 8 for page in pages)
    # The first column is the ground truth of this very image: boxes, as the detector finds no more.
    truth = demo.GroundTruth(str(annotations))
    record = truth.find(world / "data" / "images" / "val_000001.jpg")
    counts = [a["image_id"] for a in json.loads(annotations.read_text())["annotations"]]
    assert len(record["annotations"]) == counts.count(2)
    rgb = np.ascontiguousarray(cv2.imread(record["file_name"].replace("/data/", "/data/images/"))[:, :, ::-1])
    boxes = [{k: a[k] for k in ("bbox", "bbox_mode", "category_id")} for a in record["annotations"]]
    drawn = draw_objects(rgb, {**record, "annotations": boxes}, truth.metadata, width=480, labels=True)
    plain = cv2.resize(rgb, (480, 360), interpolation=cv2.INTER_CUBIC).astype(int)
    marks = np.abs(drawn - plain).max(axis=2) > 80
    shown = pages[1][40:400, 8:488, ::-1].astype(int)
    assert marks.sum() > 300
    assert np.abs(shown - drawn)[marks].mean() < 0.4 * np.abs(shown - plain)[marks].mean()  # not 0: it is a JPEG


def test_ground_truth_finds_the_right_folder(demo, world, tmp_path):
    image = {"height": 4, "width": 4}
    content = {
        "images": [{"id": 1, "file_name": "a/x.jpg", **image}, {"id": 2, "file_name": "b/x.jpg", **image}],
        "annotations": [],
        "categories": [{"id": 5, "name": "thing"}],
    }
    (tmp_path / "gt.json").write_text(json.dumps(content))
    truth = demo.GroundTruth(str(tmp_path / "gt.json"))
    assert truth.find(Path("photos/b/x.jpg"))["image_id"] == 2 and truth.find(Path("photos/a/x.jpg"))["image_id"] == 1
    assert truth.find(Path("photos/a/y.jpg")) is None
    assert truth.metadata.thing_classes == ["thing"]


def test_video_keeps_its_frames_and_rate(demo, world, tmp_path):
    target = tmp_path / "out.mp4"
    assert call(demo, world, "--input", world / "drive.mp4", "--output", target) == 0
    found, rate = frames(target)
    assert len(found) == 7 and rate == pytest.approx(12.0)
    assert found[0].shape == (536, 640, 3)  # the frame, its title and the legend
    assert (found[-1][508:].astype(int).max(axis=2) - found[-1][508:].min(axis=2) > 60).any()  # a patch of colour
    arguments = ["--teacher-config", world / "teacher.yaml", "--teacher-weights", world / "teacher.pth"]
    assert call(demo, world, *arguments, "--input", world / "drive.mp4", "--output", tmp_path / "both") == 0
    found, _ = frames(tmp_path / "both" / "drive.mp4")
    assert len(found) == 7 and found[0].shape == (536, 1280, 3)


def test_unreadable_inputs_are_named_and_passed_over(demo, world, tmp_path, capsys):
    good = world / "data" / "images" / "val_000000.jpg"
    broken, cut, movie = tmp_path / "broken.png", tmp_path / "cut.jpg", tmp_path / "broken.mp4"
    broken.write_bytes(b"no image")
    cut.write_bytes(good.read_bytes()[:700])
    movie.write_bytes(b"no video")
    bad = [broken, cut, movie, tmp_path / "missing.jpg"]
    assert call(demo, world, "--input", *bad, good, "--output", tmp_path / "out") == 0
    output = capsys.readouterr()
    assert all(f"skipped {path}: " in output.err for path in bad)
    assert "1 of 5 inputs" in output.out and "4 skipped" in output.out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["val_000000.jpg"]
    assert call(demo, world, "--input", *bad, "--output", tmp_path / "none") == 1
    assert "0 of 4 inputs" in capsys.readouterr().out and not (tmp_path / "none").exists()


def test_images_of_more_than_8_bits_are_passed_over(demo, world, tmp_path, capsys):
    """Of which all values above 255 would be white, also where the student has images of its own."""
    (tmp_path / "low").mkdir()
    good, deep, real = world / "data" / "images" / "val_000000.jpg", tmp_path / "deep.png", tmp_path / "real.tif"
    grey = cv2.imread(str(good), cv2.IMREAD_GRAYSCALE)
    cv2.imwrite(str(deep), grey.astype(np.uint16) * 256)
    cv2.imwrite(str(real), grey.astype(np.float32))
    cv2.imwrite(str(tmp_path / "low" / deep.name), grey.astype(np.uint16) * 256)
    assert call(demo, world, "--input", deep, real, good, "--output", tmp_path / "out") == 0
    said = capsys.readouterr()
    assert "1 of 3 inputs" in said.out
    assert all(f"skipped {file}: it has 16-bit or float pixels: convert to 8 bits" in said.err for file in (deep, real))
    cv2.imwrite(str(deep), grey)
    low = ["--low-res-images", tmp_path / "low"]
    assert call(demo, world, "--input", deep, "--output", tmp_path / "none", *low) == 1
    assert "it has 16-bit or float pixels" in capsys.readouterr().err


def test_annotations_of_another_size_are_not_drawn(demo, world, tmp_path, capsys):
    cv2.imwrite(str(tmp_path / "val_000000.jpg"), np.zeros((50, 70, 3), np.uint8))
    arguments = ["--ground-truth", world / "data" / "annotations_val.json"]
    assert call(demo, world, *arguments, "--input", tmp_path / "val_000000.jpg", "--output", tmp_path / "o") == 1
    assert "70x50" in capsys.readouterr().err


def test_outputs_do_not_overwrite_each_other(demo, tmp_path):
    inputs = [Path("a/x.jpg"), Path("b/x.jpg"), Path("b/x.png"), Path("c/x.bmp"), Path("c/x.mov"), Path("d/x.PNG")]
    names = [path.name for path in demo.choose_outputs(inputs, tmp_path)]
    assert names == ["x.jpg", "x_2.jpg", "x.png", "x_2.png", "x.mp4", "x_3.png"]
    with pytest.raises(ValueError, match="6 inputs"):
        demo.choose_outputs(inputs, tmp_path / "one.png")
    with pytest.raises(ValueError, match=r"cannot hold"):
        demo.choose_outputs([Path("a.mp4")], tmp_path / "a.png")


def test_ctrl_c_keeps_what_is_done(demo, world, tmp_path, monkeypatch, capsys):
    detect, calls = demo.Demo.detect, []

    def interrupted(self, *images):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return detect(self, *images)

    monkeypatch.setattr(demo.Demo, "detect", interrupted)
    assert call(demo, world, "--input", world / "drive.mp4", "--output", tmp_path / "cut.mp4") == 130
    assert len(frames(tmp_path / "cut.mp4")[0]) == 3
    calls.clear()
    calls.append(1)
    assert call(demo, world, "--input", world / "data" / "images", "--output", tmp_path / "out") == 130
    assert len(list((tmp_path / "out").iterdir())) == 2
    assert "stopped, 2 of 3 inputs" in capsys.readouterr().out


def test_an_error_keeps_what_was_found(demo, world, tmp_path, capsys):
    """A drawing that cannot be written ends the run, with the detections of the images so far."""
    (tmp_path / "out" / "val_000001.jpg").mkdir(parents=True)
    out = tmp_path / "found.json"
    images = world / "data" / "images"
    assert call(demo, world, "--input", images, "--output", tmp_path / "out", "--json", out) == 2
    assert "val_000001.jpg" in capsys.readouterr().err
    assert [Path(record["file"]).stem for record in json.loads(out.read_text())] == ["val_000000", "val_000001"]


def test_the_folder_of_the_detections_is_made_before_the_work(demo, world, tmp_path, capsys):
    image, out = world / "data" / "images" / "val_000000.jpg", tmp_path / "out"
    assert call(demo, world, "--input", image, "--output", out, "--json", tmp_path / "a" / "b" / "found.json") == 0
    assert len(json.loads((tmp_path / "a" / "b" / "found.json").read_text())) == 1
    for wrong in (tmp_path / "a", image / "found.json"):
        assert call(demo, world, "--input", image, "--output", tmp_path / "none", "--json", wrong) == 2
        assert "error: " in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_an_image_of_which_nothing_would_be_left_is_passed_over(demo, world, tmp_path, capsys):
    images = [world / "data" / "images" / "val_000000.jpg", tmp_path / "line.png"]
    cv2.imwrite(str(images[1]), np.zeros((1, 600, 3), np.uint8))
    assert call(demo, world, "--input", *images, "--output", tmp_path / "out") == 0
    said = capsys.readouterr()
    assert "1 of 2 inputs" in said.out and "600x1 pixels are too narrow" in said.err


def test_class_names(demo, world, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    entries = register_entries(world / "data", f"demo_{tmp_path.name}")
    known = load_config(world / "student.yaml", ["DATASETS.REGISTER", entries, "DATASETS.TEST", (entries[1]["NAME"],)])
    register_datasets(known)
    assert demo.class_metadata(known, None).thing_classes[:2] == ["disc", "ring"]
    gone = [{"NAME": f"gone_{tmp_path.name}", "JSON": str(tmp_path / "no.json"), "IMAGES": str(tmp_path)}]
    unknown = load_config(world / "student.yaml", ["DATASETS.REGISTER", gone, "DATASETS.TEST", (gone[0]["NAME"],)])
    register_datasets(unknown)
    assert demo.class_metadata(unknown, None).get("thing_classes") is None
    assert "no.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--weights": "nowhere.pth"}, "nowhere.pth"),
        ({"--config-file": "nowhere.yaml"}, "nowhere.yaml"),
        ({"--ground-truth": "nowhere.json"}, "nowhere.json"),
        ({"--opts": "MODEL.FCOS.NUM_CLASES"}, "NUM_CLASSES"),
    ],
)
def test_wrong_calls_get_one_clear_line(demo, world, tmp_path, capsys, change, message):
    options = {
        "--config-file": world / "student.yaml",
        "--weights": world / "student.pth",
        "--input": world / "drive.mp4",
        "--output": tmp_path / "out.mp4",
        **change,
    }
    arguments = [str(part) for pair in options.items() for part in pair]
    assert demo.main(arguments + (["6"] if "--opts" in options else [])) == 2
    error = capsys.readouterr().err
    assert ": error: " in error and message in error.splitlines()[-1] and "Traceback" not in error
    assert not (tmp_path / "out.mp4").exists()


def test_wrong_options_are_rejected(demo, world, capsys):
    for extra in (["--threshold", "7"], ["--teacher-config", "x.yaml"]):
        with pytest.raises(SystemExit) as stopped:
            demo.main(["--config-file", "a", "--weights", "b", "--input", "c", "--output", "d", *extra])
        assert stopped.value.code == 2
        assert extra[0] in capsys.readouterr().err


@pytest.mark.parametrize("other, message", [("nothing", "no tensor of the checkpoint"), ("detector", "fpn_lateral2")])
def test_weights_of_another_model_are_an_error(demo, world, tmp_path, capsys, other, message):
    """A partly random model would draw nonsense: the detector has no P2, which the student has."""
    torch.save({"model": {"other.weight": torch.zeros(3)}}, tmp_path / "nothing.pth")
    weights = tmp_path / "nothing.pth" if other == "nothing" else world / "detector.pth"
    options = ["--config-file", str(world / "student.yaml"), "--weights", str(weights)]
    assert demo.main([*options, "--input", str(world / "drive.mp4"), "--output", str(tmp_path / "o.mp4")]) == 2
    error = capsys.readouterr().err
    assert "error: " in error and message in error and not (tmp_path / "o.mp4").exists()


def test_help_has_examples(demo, capsys):
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and text.count("--config-file") >= 4 and "MIN_SIZE_TEST" in text


def test_inputs_are_not_overwritten(demo, world, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for file in (world / "data" / "images").glob("*.jpg"):
        (photos / file.name).write_bytes(file.read_bytes())
    (tmp_path / "link").symlink_to(photos)
    before = {path: path.read_bytes() for path in photos.iterdir()}
    one = next(iter(before))
    labels = tmp_path / "labels.json"
    labels.write_bytes((world / "data" / "annotations_val.json").read_bytes())
    for arguments in (
        ["--input", photos, "--output", photos],
        ["--input", photos, "--output", tmp_path / "link"],
        ["--input", f"{photos}/*.jpg", "--output", photos],
        ["--input", one, "--output", one],
        ["--input", one, "--output", tmp_path / "link" / one.name],
        ["--input", one, "--output", tmp_path / "out", "--json", labels, "--ground-truth", labels],
        ["--input", one, "--output", tmp_path / "out", "--json", world / "student.yaml"],
    ):
        assert call(demo, world, *arguments) == 2, arguments
        assert "would overwrite an input" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in photos.iterdir()} == before
    assert call(demo, world, "--input", photos, "--output", photos / "drawn") == 0


def test_json_of_the_detections(demo, world, tmp_path):
    images = world / "data" / "images"
    out = tmp_path / "found.json"
    assert call(demo, world, "--input", images, world / "drive.mp4", "--output", tmp_path, "--json", out) == 0
    records = json.loads(out.read_text())
    assert len(records) == 3 + 7 and [r.get("frame") for r in records[2:5]] == [None, 0, 1]
    predictor = demo.load_predictor(str(world / "student.yaml"), str(world / "student.pth"), "cpu", [])
    found = predictions(predictor(cv2.imread(records[0]["file"]))["instances"]).above(0)
    assert (records[0]["width"], records[0]["height"]) == (128, 96) and len(found) == 4
    expected = zip(found.boxes, found.scores, found.classes)
    for entry, ((x0, y0, x1, y1), score, index) in zip(records[0]["detections"], expected):
        assert entry["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=0.01)
        assert entry["score"] == pytest.approx(score, abs=1e-5) and entry["category_id"] == index


def test_ground_truth_of_other_classes_is_an_error(demo, world, tmp_path, capsys):
    entries = register_entries(world / "data", f"gt_{tmp_path.name}")
    labels = json.loads((world / "data" / "annotations_val.json").read_text())
    labels["categories"][0]["name"] = "saucer"
    (tmp_path / "gt.json").write_text(json.dumps(labels))
    arguments = ["--input", world / "data" / "images", "--output", tmp_path / "out", "--ground-truth"]
    data = ["DATASETS.REGISTER", entries, "DATASETS.TEST", (entries[1]["NAME"],)]
    assert call(demo, world, *arguments, tmp_path / "gt.json", *data) == 2
    error = capsys.readouterr().err
    assert "saucer, ring" in error and "disc, ring" in error and not (tmp_path / "out").exists()
    assert call(demo, world, *arguments, world / "data" / "annotations_val.json", *data) == 0


def test_names_beside_an_exported_config(demo, world, tmp_path):
    (tmp_path / "metadata.json").write_text(json.dumps({"thing_classes": ["a", "b"]}))
    metadata = demo.class_metadata(load_config(world / "student.yaml"), None, str(tmp_path / "config.yaml"))
    assert metadata.thing_classes == ["a", "b"]


def test_boxes_of_one_pixel_can_be_seen(demo):
    image = np.zeros((480, 640, 3), np.uint8)
    record = {"height": 480, "width": 640, "annotations": [
        {"bbox": [300.0, 200.0, 1.0, 1.0], "bbox_mode": 1, "category_id": 0, "iscrowd": 0}]}  # fmt: skip
    drawn = draw_objects(image, record, MetadataCatalog.get("unnamed classes"), labels=False)
    marks = np.argwhere(drawn.max(axis=2) > 80)
    assert (marks.max(axis=0) - marks.min(axis=0) >= 5).all()
    assert np.abs(marks.mean(axis=0) - (200.5, 300.5)).max() < 1.5


SEGMENTOR = """
_BASE_: %s
MODEL:
  DEVICE: cpu
  RESNETS: {STEM_OUT_CHANNELS: 8, RES2_OUT_CHANNELS: 8, NORM: BN}
  SEM_SEG_HEAD: {CONVS_DIM: 8, NUM_CLASSES: 7, NORM: BN}
DATASETS: {REGISTER: [], TRAIN: [], TEST: []}
INPUT: {MIN_SIZE_TEST: 96, MAX_SIZE_TEST: 160}
"""


@pytest.fixture(scope="module")
def segments(world):
    """A segmentor of the scenes' shapes and one at half resolution, and a folder of label maps."""
    psp = SCRIPT.parents[1] / "configs" / "Segmentation" / "pspnet_R_18_voc.yaml"
    (world / "segmentor.yaml").write_text(SEGMENTOR % psp)
    (world / "segmentor_L.yaml").write_text("_BASE_: segmentor.yaml\nINPUT: {MIN_SIZE_TEST: 48, MAX_SIZE_TEST: 80}\n")
    for seed, name in enumerate(("segmentor", "segmentor_L")):
        torch.manual_seed(seed)
        model = build_model(load_config(world / f"{name}.yaml"))
        torch.nn.init.normal_(model.sem_seg_head.predictor[1].weight)
        torch.save({"model": model.state_dict()}, world / f"{name}.pth")
    (world / "labels").mkdir()
    for number in range(3):
        labels = np.full((96, 128), 255, np.uint8)
        labels[:, 64:] = number
        cv2.imwrite(str(world / "labels" / f"val_00000{number}.png"), labels)
    return world


def test_segmentors_beside_label_maps(demo, segments, tmp_path):
    teacher = ["--teacher-config", segments / "segmentor.yaml", "--teacher-weights", segments / "segmentor.pth"]
    image, out = segments / "data" / "images" / "val_000001.jpg", tmp_path / "found.json"
    arguments = [*teacher, "--input", image, "--output", tmp_path, "--json", out]
    assert call(demo, segments, *arguments, "--ground-truth", segments / "labels", model="segmentor_L") == 0
    page = cv2.imread(str(tmp_path / "val_000001.jpg"))[:, :, ::-1].astype(int)
    assert page.shape[1] == 3 * 488 + 8
    plain = cv2.resize(cv2.imread(str(image)), (480, 360), interpolation=cv2.INTER_CUBIC)[:, :, ::-1].astype(int)
    shown = page[40:400, 8:488]
    # Ignored pixels are the photograph's own, the others have the colour of class 1.
    assert np.abs(shown[:, :230] - plain[:, :230]).mean() < 4
    colour = np.array([0x3F, 0xB8, 0xFF])
    assert np.abs(shown[:, 250:] - (0.45 * plain[:, 250:] + 0.55 * colour)).mean() < 4
    predictor = demo.load_predictor(str(segments / "segmentor_L.yaml"), str(segments / "segmentor_L.pth"), "cpu", [])
    labels = predictor(cv2.imread(str(image)))["sem_seg"].argmax(dim=0).numpy()
    assert labels.shape == (96, 128)
    (record,) = json.loads(out.read_text())
    assert {d["category_id"]: d["pixels"] for d in record["detections"]} == dict(
        zip(*map(np.ndarray.tolist, np.unique(labels, return_counts=True)))
    )
    for found in record["detections"]:
        assert np.array_equal(rle.decode(found["segmentation"]).astype(bool), labels == found["category_id"])


def test_a_segmentor_beside_the_masks_of_annotations(demo, segments, tmp_path):
    annotations = segments / "data" / "annotations_val.json"
    arguments = ["--input", segments / "data" / "images", "--output", tmp_path, "--ground-truth", annotations]
    assert call(demo, segments, *arguments, model="segmentor") == 0
    assert len(list(tmp_path.iterdir())) == 3
    truth = demo.GroundTruth(str(annotations), True)
    assert truth.metadata.stuff_classes[:3] == ["background", "disc", "ring"]
    record = truth.find(segments / "data" / "images" / "val_000002.jpg")
    found = {a["category_id"] for a in json.loads(annotations.read_text())["annotations"] if a["image_id"] == 3}
    assert set(cv2.imread(record["sem_seg_file_name"], cv2.IMREAD_UNCHANGED).ravel().tolist()) == {0, *found}


def test_json_of_a_segmentor_names_the_classes(demo, segments, tmp_path):
    truth, out = segments / "data" / "annotations_val.json", tmp_path / "found.json"
    image = segments / "data" / "images" / "val_000000.jpg"
    arguments = ["--input", image, "--output", tmp_path / "out", "--ground-truth", truth, "--json", out]
    assert call(demo, segments, *arguments, model="segmentor") == 0
    (record,) = json.loads(out.read_text())
    names = demo.GroundTruth(str(truth), True).metadata.stuff_classes
    assert record["detections"]
    assert all(found["category"] == names[found["category_id"]] for found in record["detections"])


def test_a_segmentor_on_a_video(demo, segments, tmp_path):
    assert call(demo, segments, "--input", segments / "drive.mp4", "--output", tmp_path, model="segmentor") == 0
    found, _ = frames(tmp_path / "drive.mp4")
    assert len(found) == 7 and found[0].shape == (536, 640, 3)


def test_what_does_not_fit_a_segmentor_is_said(demo, segments, tmp_path, capsys):
    image = segments / "data" / "images" / "val_000000.jpg"
    options = ["--input", image, "--output", tmp_path / "out", "--ground-truth", segments / "labels"]
    assert call(demo, segments, *options) == 2
    assert "folder of label maps, but the model is no segmentor" in capsys.readouterr().err
    teacher = ["--teacher-config", segments / "teacher.yaml", "--teacher-weights", segments / "teacher.pth"]
    assert call(demo, segments, *options, *teacher, model="segmentor") == 2
    assert "a segmentor and a detector" in capsys.readouterr().err
    cv2.imwrite(str(tmp_path / "val_000000.jpg"), np.zeros((50, 70, 3), np.uint8))
    options[1] = tmp_path / "val_000000.jpg"
    assert call(demo, segments, *options, model="segmentor") == 1
    assert "it has 70x50 pixels, but its annotations are for 128x96" in capsys.readouterr().err
