"""The program that goes with an ONNX file: equal to detectron2 around the network, and without torch."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.layers import paste_masks_in_image
from detectron2.modeling import build_model
from PIL import Image
from pycocotools import mask as coco_mask

pytest.importorskip("onnx", reason="pip install 'msad[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'msad[onnx]'")

from msad import load_config
from msad.data import media
from msad.export import onnx as exporter
from msad.export import runner
from msad.export.graph import detection_graph

# Imports of what a deployment does not have fail.
ALONE = """
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "detectron2", "msad", "fvcore", "PIL", "onnx"):
            raise ImportError(f"{name} is imported")
sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    "size", [(480, 640), (640, 480), (200, 75), (33, 47), (57, 160), (96, 96), (64, 64), (300, 1000), (1, 1)]
)
def test_resizes_as_for_training(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    wanted = T.ResizeShortestEdge(96, 160).get_transform(image).apply_image(image)
    resized = runner.resize_shortest_edge(image, 96, 160)
    assert resized.shape == wanted.shape
    apart = np.abs(resized.astype(int) - wanted)
    assert apart.max() <= 1  # where Pillow resizes the other side first and rounds in between
    linear = cv2.resize(image, wanted.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    if min(size) > 96:
        assert np.abs(linear.astype(int) - wanted).mean() > 20 * apart.mean()


def test_sizes_are_rounded_as_for_training():
    """Where the long side decides, products of two factors may end on either side of a half."""
    for size in [(302, 151), (151, 302), (638, 319), (319, 638), (500, 500), (1333, 800), (2000, 1200)]:
        image = np.zeros((*size, 3), np.uint8)
        wanted = T.ResizeShortestEdge.get_output_shape(*size, 800, 1333)
        assert runner.resize_shortest_edge(image, 800, 1333).shape[:2] == wanted, size


def test_no_resizing_where_the_model_wants_none():
    image = np.zeros((5, 7, 3), np.uint8)
    assert runner.resize_shortest_edge(image, 0, 100) is image


def test_the_order_of_channels_is_the_models():
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    size = {"min_size": 0, "max_size": 0}
    assert (runner.network_input(image, {"format": "BGR", **size}) == image).all()
    assert (runner.network_input(image, {"format": "RGB", **size}) == image[:, :, ::-1]).all()


def test_pastes_and_encodes_masks_as_detectron2_and_coco():
    rng = np.random.default_rng(0)
    masks = cv2.GaussianBlur(rng.random((28, 28, 20)).astype(np.float32), (9, 9), 0).transpose(2, 0, 1)
    masks = (masks - masks.min()) / (masks.max() - masks.min())
    corner = rng.uniform(-10, 60, (20, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0.3, 60, (20, 2))], axis=1).clip(0, [90, 70, 90, 70])
    solid = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    boxes, masks = boxes[solid].astype(np.float32), np.ascontiguousarray(masks[solid])
    assert len(boxes) > 10
    wanted = paste_masks_in_image(torch.from_numpy(masks), torch.from_numpy(boxes), (70, 90)).numpy()
    pasted = np.array([runner.paste(m, b, 70, 90) for m, b in zip(masks, boxes)])
    assert wanted.any() and (pasted != wanted).sum() <= 2  # a pixel on the threshold
    for mask in (*pasted, np.ones((3, 4), bool), np.zeros((3, 4), bool)):
        counts = runner.run_lengths(mask)
        assert sum(counts["counts"]) == mask.size
        encoded = coco_mask.frPyObjects(counts, *mask.shape)
        assert (coco_mask.decode(encoded) == mask).all()


@pytest.fixture(scope="module")
def shipped(project, tmp_path_factory):
    """Folder with an FCOS as model.onnx and run.py, and with photos/: two images, a broken one and a video."""
    torch.manual_seed(0)
    cfg = load_config(project / "student.yaml")
    graph = detection_graph(build_model(cfg))
    folder = tmp_path_factory.mktemp("shipped")
    (folder / "model.onnx").write_bytes(exporter.trace(graph, exporter.describe(cfg, graph, {})))
    shutil.copyfile(runner.__file__, folder / "run.py")
    (folder / "photos").mkdir()
    (folder / "albums" / "inside").mkdir(parents=True)
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (3, 70, 90, 3), dtype=np.uint8)
    cv2.imwrite(str(folder / "photos" / "a.jpg"), frames[0])
    cv2.imwrite(str(folder / "photos" / "a.png"), frames[1][:50])
    (folder / "photos" / "broken.jpg").write_bytes(b"no image")
    video = cv2.VideoWriter(str(folder / "photos" / "v.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (90, 70))
    for frame in frames:
        video.write(frame)
    video.release()
    return folder


def test_runs_without_torch(shipped, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", ALONE, "run.py", "model.onnx", "--input", "photos", "--output", tmp_path / "found",
         "--threshold", "0.01", "--threads", "1"],
        cwd=shipped, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "5 images" in done.stdout and "fps" in done.stdout
    said = "skipped: cannot read photos/broken.jpg (neither an image nor a video, or cut off)"
    assert done.stderr.splitlines()[-1] == said
    written = {p.name for p in (tmp_path / "found").iterdir()}
    assert written == {"000_a.jpg", "001_a.jpg", "003_v.mp4", "detections.json"}
    drawn = cv2.imread(str(tmp_path / "found" / "000_a.jpg"))
    assert drawn.shape == (70, 90, 3) and (drawn != cv2.imread(str(shipped / "photos" / "a.jpg"))).any()
    results = json.loads((tmp_path / "found" / "detections.json").read_text())
    assert [(r["file"], r["frame"], r["height"]) for r in results] == [
        ("photos/a.jpg", 0, 70), ("photos/a.png", 0, 50), *(("photos/v.avi", i, 70) for i in range(3)),
    ]  # fmt: skip
    detector = runner.Detector(shipped / "model.onnx", 1)
    found = detector([cv2.imread(str(shipped / "photos" / "a.jpg"))])[0]
    some = {name: value[found["scores"] >= 0.01] for name, value in found.items()}
    assert results[0]["detections"] == runner.records(some, detector.about["classes"]) != []


class Camera:
    """A cv2.VideoCapture of four frames; then somebody presses Ctrl-C."""

    def __init__(self, number):
        assert number == 2
        self.left = 4

    def read(self):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return True, np.full((40, 60, 3), 50 * self.left, np.uint8)

    def get(self, key):
        return 0.0


@pytest.mark.parametrize(("most", "count"), [("2", 2), ("9", 4)])
def test_a_camera_runs_until_it_is_told_to_stop(shipped, tmp_path, monkeypatch, capsys, most, count):
    monkeypatch.setattr(runner.cv2, "VideoCapture", Camera)
    arguments = [str(shipped / "model.onnx"), "--camera", "2", "--output", str(tmp_path), "--threads", "1"]
    assert runner.main([*arguments, "--frames", most]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"{count} images") and ("interrupted" in said.err) == (count == 4)
    assert [r["frame"] for r in json.loads((tmp_path / "detections.json").read_text())] == list(range(count))
    monkeypatch.undo()
    video = cv2.VideoCapture(str(tmp_path / "camera_2.mp4"))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == count and video.get(cv2.CAP_PROP_FPS) == 25


def test_an_error_keeps_what_was_found(shipped, tmp_path, capsys):
    """A drawing that cannot be written ends the run; detections and the video so far are there."""
    (tmp_path / "001_a.jpg").mkdir()
    inputs = [str(shipped / "photos" / name) for name in ("v.avi", "a.jpg", "a.png")]
    with pytest.raises(SystemExit) as stop:
        runner.main([str(shipped / "model.onnx"), "--input", *inputs, "--output", str(tmp_path)])
    assert stop.value.code == 2 and f"cannot write {tmp_path}/001_a" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "detections.json").read_text())) == 4
    assert cv2.VideoCapture(str(tmp_path / "000_v.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 3


def test_an_image_of_which_nothing_would_be_left_is_passed_over(shipped, tmp_path, capsys):
    inputs = [str(tmp_path / "line.png"), str(shipped / "photos" / "a.jpg")]
    cv2.imwrite(inputs[0], np.zeros((1, 600, 3), np.uint8))
    assert runner.main([str(shipped / "model.onnx"), "--input", *inputs, "--output", str(tmp_path / "out")]) == 0
    assert f"skipped: {inputs[0]}: 600x1 pixels would be" in capsys.readouterr().err
    (entry,) = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert entry["file"] == inputs[1]


def test_a_defect_is_no_unusable_image(shipped, tmp_path, monkeypatch):
    def fail(self, images):
        raise ValueError("a defect")

    monkeypatch.setattr(runner.Detector, "run", fail)
    photo = str(shipped / "photos" / "a.jpg")
    args = [str(shipped / "model.onnx"), "--input", photo, "--output", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="a defect"):
        runner.main(args)


def test_without_drawings_there_is_one_file(shipped, tmp_path):
    arguments = [str(shipped / "model.onnx"), "--input", str(shipped / "photos" / "a.jpg"), "--output", str(tmp_path)]
    assert runner.main([*arguments, "--no-drawing", "--threads", "1"]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["detections.json"]


def test_an_image_is_read_upright_or_not_at_all(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    small, large, exif = io.BytesIO(), io.BytesIO(), Image.Exif()
    Image.fromarray(pixels[::4, ::4]).save(small, "JPEG")
    exif[0x0112] = 6  # turned by a quarter
    header = exif.tobytes() + small.getvalue()  # a thumbnail has an end of its own
    Image.fromarray(pixels).save(large, "JPEG", exif=header)
    jpeg, png = large.getvalue(), cv2.imencode(".png", pixels)[1].tobytes()
    assert jpeg.count(b"\xff\xd9") == 2
    file = tmp_path / "image"
    for whole, upright in [(jpeg, (60, 40, 3)), (jpeg + b"a video of a phone" * 999, (60, 40, 3)), (png, (40, 60, 3))]:
        file.write_bytes(whole)
        assert runner.read_image(file).shape == upright
    for size in [0, 1, 3, 30, len(header) // 2, len(header) + 60, len(jpeg) - 200, len(jpeg) - 2]:
        file.write_bytes(jpeg[:size])
        assert runner.read_image(file) is None, size
        assert not (size > 3 and runner.is_complete(jpeg[:size])), size  # OpenCV 5.0 would not need it
    file.write_bytes(png[: len(png) // 2])
    assert runner.read_image(file) is None and not runner.is_complete(png[: len(png) // 2])
    assert runner.read_image(tmp_path / "absent") is runner.read_image(tmp_path) is None


def test_records_and_drawings_have_masks_and_keypoints():
    mask = np.zeros((1, 20, 30), bool)
    mask[0, 5:10, 6:12] = True
    found = {
        "boxes": np.array([[6.0, 5.0, 12.0, 10.0]]), "scores": np.array([0.5]), "classes": np.array([1]),
        "masks": mask, "keypoints": np.array([[[7.0, 6.0, 0.25], [25.0, 15.0, 0.5]]]),
    }  # fmt: skip
    assert runner.records(found, ["cat", "dog"]) == [{
        "category": "dog", "class": 1, "score": 0.5, "bbox": [6.0, 5.0, 6.0, 5.0],
        "segmentation": runner.run_lengths(mask[0]), "keypoints": [[7.0, 6.0, 0.25], [25.0, 15.0, 0.5]],
    }]  # fmt: skip
    drawn = runner.draw(np.zeros((20, 30, 3), np.uint8), found, {"classes": ["cat", "dog"], "skeleton": [[0, 1]]})
    assert drawn[8, 9].any() and drawn[15, 25].any() and drawn[11, 17].any() and not drawn[18, 2].any()


def test_never_writes_over_an_input(shipped, capsys):
    before = {p: p.read_bytes() for p in (shipped / "photos").iterdir()}
    arguments = [str(shipped / "model.onnx"), "--input", str(shipped / "photos"), "--output", str(shipped / "photos")]
    with pytest.raises(SystemExit) as stop:
        runner.main(arguments)
    assert stop.value.code == 2 and "has inputs in it, which might be overwritten" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in (shipped / "photos").iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/model.onnx"], "nothing to do: give --input or --camera"),
        (["{}/model.onnx", "--input", "{}/absent.jpg"], "no such file or folder: {}/absent.jpg"),
        (["{}/model.onnx", "--input", "{}/albums"], "no images or videos in {}/albums; folders inside"),
        (["{}/absent.onnx", "--input", "{}/photos"], "absent.onnx cannot be loaded"),
        (["{}/run.py", "--input", "{}/photos"], "run.py cannot be loaded"),
    ],
)
def test_errors_are_said_before_anything_is_written(shipped, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        runner.main([*(a.format(shipped) for a in arguments), "--output", str(tmp_path / "out")])
    assert stop.value.code == 2 and message.format(shipped) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_videos_are_those_of_the_demo():
    assert (runner.IMAGES, runner.VIDEOS) == (media.IMAGES, media.VIDEOS)
