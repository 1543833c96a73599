"""tools/streaming_ap.py on small videos, with given runtimes, so that no number depends on the machine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from load_tool import load_tool

from msad import load_config
from msad.evaluation.streaming_detector import FrameDetector

VIDEOS = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).absolute() / "flying_video"


@pytest.fixture(scope="module")
def tool():
    return load_tool("streaming_ap")


@pytest.fixture(scope="module")
def videos(project, tmp_path_factory):
    """Two videos of six frames with a square that moves; a yaml of six classes and a checkpoint."""
    root = tmp_path_factory.mktemp("videos")
    content = {"images": [], "annotations": [], "sequences": ["right", "down"], "seq_dirs": ["right", "down"]}
    content["categories"] = [{"id": i, "name": name} for i, name in enumerate("abcdef")]
    for sid, name in enumerate(content["sequences"]):
        (root / name).mkdir()
        for fid in range(6):
            x, y = (8 + 6 * fid, 20) if sid == 0 else (20, 8 + 6 * fid)
            frame = np.full((64, 64, 3), 60, np.uint8)
            frame[y : y + 16, x : x + 16] = (30, 200, 250)
            cv2.imwrite(str(root / name / f"{fid}.png"), frame)
            image = {"id": 6 * sid + fid, "sid": sid, "fid": fid, "name": f"{fid}.png", "width": 64, "height": 64}
            content["images"].append(image)
            box = {"bbox": [x, y, 16, 16], "area": 256, "iscrowd": False, "category_id": 2}
            content["annotations"].append({"id": image["id"], "image_id": image["id"], **box})
    (root / "videos.json").write_text(json.dumps(content))
    (root / "fcos.yaml").write_text(
        f"_BASE_: {project}/fcos.yaml\nDATASETS:\n  TEST: [square_videos]\n  REGISTER:\n"
        f"    - {{NAME: square_videos, TYPE: argoverse_hd, JSON: {root}/videos.json, IMAGES: {root}}}\n"
    )
    torch.manual_seed(5)
    torch.save({"model": build_model(load_config(project / "fcos.yaml")).state_dict()}, root / "fcos.pth")
    yield root
    for name in {"square_videos"} & set(DatasetCatalog.list()):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def call(tool, videos, tmp_path, capsys):
    def run(*args, output=tmp_path):
        model = ["--model", videos / "fcos.yaml", videos / "fcos.pth", "--output", output]
        return tool.main([str(a) for a in [*model, *args]]), capsys.readouterr()

    return run


class Perfect(FrameDetector):
    """Finds the square by its colour."""

    def __call__(self, frame):
        rows, columns = np.nonzero(frame[..., 1] > 150)
        x, y = float(columns.min()), float(rows.min())
        return [{"category_id": 2, "bbox": [x, y, 16.0, 16.0], "score": 0.9}]


def test_accuracy_is_that_of_the_frames_that_were_ready(call, tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "FrameDetector", Perfect)
    # At 30 frames a second: within a frame; two frames; the results for single frames are the same.
    ap = {}
    for ms in (10, 60):
        status, printed = call("--runtime-ms", ms, "--sizes", 64, 32)
        assert status == 0 and "streaming AP" in printed.out
        found = json.loads((tmp_path / "streaming.json").read_text())
        assert [e["short_side"] for e in found["models"]["fcos"]] == [64, 32]
        for entry in found["models"]["fcos"]:
            assert entry["offline"]["AP"] == pytest.approx(100) and entry["milliseconds"] == ms
            ap[ms] = entry["streaming"]
            pairing = entry["pairing"]
        assert pairing["frames"] == 12 and pairing["missed"] == (2 if ms == 10 else 4)
    # A lag of one frame is 6 px: IoU 10 / 22; of two frames 4 / 28.
    assert ap[10]["AP50"] == 0.0 == ap[60]["AP50"]
    assert (tmp_path / "streaming.png").stat().st_size > 5000
    status, _ = call("--runtime-ms", 10, "--eta", -1)  # asked a frame later: every frame has its own result
    assert json.loads((tmp_path / "streaming.json").read_text())["models"]["fcos"][0]["streaming"]["AP"] > 99.9


def test_detections_are_kept_and_schedules_compared(call, tool, tmp_path, monkeypatch):
    status, printed = call("--runtime-ms", 50)
    assert status == 0, printed.err
    (kept,) = (tmp_path / "detections").glob("fcos_64_*.json")
    content = json.loads(kept.read_text())
    assert len(content["detections"]) == len(content["runtimes"]) == 12 and min(content["runtimes"]) > 0
    with monkeypatch.context() as elsewhere:  # another machine has runtimes of its own
        elsewhere.setattr(tool, "machine", lambda device: {"device": "a faster one"})
        assert call("--runtime-ms", 50)[0] == 0
    assert len(list((tmp_path / "detections").glob("fcos_64_*.json"))) == 2
    monkeypatch.setattr(tool, "detect_frames", lambda *args: pytest.fail("detected twice"))
    lags = {}
    for schedule in ("greedy", "shrinking-tail", "infinite"):
        assert call("--runtime-ms", 50, "--schedule", schedule)[0] == 0
        found = json.loads((tmp_path / "streaming.json").read_text())
        lags[schedule] = found["models"]["fcos"][0]["pairing"]
    # Six frames at 1.5 frames each: greedy (0,1.5) (1,3) (3,4.5), tail (0,1.5) (2,3.5) (4,5.5), a device each +1.5.
    assert [lags[s]["processed"] for s in lags] == [6, 6, 12]
    assert [lags[s]["mean_lag"] for s in lags] == [9 / 4, 10 / 4, 2.0]
    assert call()[0] == 0  # with the measured runtimes
    assert json.loads((tmp_path / "streaming.json").read_text())["models"]["fcos"][0]["milliseconds"] > 0


def test_real_time(call, tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "FrameDetector", Perfect)
    status, printed = call("--real-time", "--fps", 10)
    assert status == 0, printed.err
    pairing = json.loads((tmp_path / "streaming.json").read_text())["models"]["fcos"][0]["pairing"]
    assert pairing["frames"] == 12 and pairing["processed"] >= 1
    monkeypatch.setattr(tool, "play_sequences", lambda *args, **kwargs: pytest.fail("played twice"))
    assert call("--real-time", "--fps", 10)[0] == 0
    monkeypatch.setattr(tool, "machine", lambda device: {"device": "a faster one"})
    monkeypatch.setattr(tool, "play_sequences", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call("--real-time", "--fps", 10)


def test_videos_of_scenes(tool, project, tmp_path, monkeypatch, capsys):
    """Models of the demo's three classes, called by the folders of their runs."""
    monkeypatch.setattr(tool, "DEMO", {**tool.DEMO, "count": 1, "frames": 4, "size": (64, 64)})
    models = []
    for name in ("H", "L"):
        cfg = load_config(project / "fcos.yaml", ["MODEL.FCOS.NUM_CLASSES", 3])
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(cfg.dump())
        torch.save({"model": build_model(cfg).state_dict()}, tmp_path / name / "model_final.pth")
        models += ["--model", tmp_path / name / "config.yaml", tmp_path / name / "model_final.pth"]
    args = ["--scenes", *models, "--output", tmp_path / "out", "--runtime-ms", 5]
    assert tool.main(list(map(str, args))) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "streaming.json").read_text())
    assert list(found["models"]) == ["H", "L"] and found["sequences"] == {"video_000": 4} and found["fps"] == [30]
    assert len(list((tmp_path / "out" / "scenes" / "images" / "video_000").iterdir())) == 4
    with pytest.raises(SystemExit, match="2"):
        tool.main([*map(str, args), "DATASETS.TEST", "('tiny_val',)"])
    assert "so DATASETS.TEST would have no effect" in capsys.readouterr().err


def test_errors_are_one_sentence(call, videos, project, tmp_path):
    for args, words in (
        (["DATASETS.TEST", "('tiny_val',)"], "register 'tiny_val' as TYPE argoverse_hd"),
        (["--model", videos / "fcos.yaml", tmp_path / "none.pth"], "no checkpoint"),
        (["--model", videos / "fcos.yaml", videos / "fcos.pth"], "have the same name"),
        (["MODEL.FCOS.NUM_CLASSES", "4"], "the model has 4 classes; the data set has 6"),
    ):
        status, printed = call(*args)
        assert status == 2 and words in printed.err and len(printed.err.strip().splitlines()) == 1, printed.err
    with pytest.raises(SystemExit):
        call("--real-time", "--runtime-ms", 5)


@pytest.mark.parametrize("option", ["--performance", "--fps", "--stride", "--sizes", "--runtime-ms"])
def test_what_must_be_positive(call, capsys, option):
    with pytest.raises(SystemExit):
        call(option, 0)
    assert f"argument {option}: must be " in capsys.readouterr().err


@pytest.mark.skipif(not VIDEOS.is_dir(), reason=f"no data set in {VIDEOS}")
def test_real_videos(tool, videos, tmp_path, capsys):
    content = json.loads((VIDEOS / "annotations_val.json").read_text())  # the shortest of its sequences
    content["images"] = [i for i in content["images"] if content["sequences"][i["sid"]] == "v_bird_017"]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    (tmp_path / "birds.json").write_text(json.dumps(content))
    entry = {"NAME": "flying_val", "TYPE": "argoverse_hd", "JSON": str(tmp_path / "birds.json")}
    entry["IMAGES"] = str(VIDEOS / "images")
    overrides = ["DATASETS.REGISTER", str([entry]), "DATASETS.TEST", "('flying_val',)"]
    overrides += ["MODEL.FCOS.NUM_CLASSES", "4", "TEST.DETECTIONS_PER_IMAGE", "5"]
    torch.manual_seed(5)
    model = build_model(load_config(videos / "fcos.yaml", overrides[4:6]))
    torch.save({"model": model.state_dict()}, tmp_path / "four.pth")
    args = ["--model", videos / "fcos.yaml", tmp_path / "four.pth", "--output", tmp_path / "out", "--runtime-ms", 45]
    status = tool.main([str(a) for a in args] + overrides)
    printed = capsys.readouterr()
    assert status == 0, printed.err
    (found,) = json.loads((tmp_path / "out" / "streaming.json").read_text())["models"]["fcos"]
    assert found["pairing"]["frames"] == 69 and 0 <= found["streaming"]["AP"] <= 100
    DatasetCatalog.remove("flying_val")
    MetadataCatalog.remove("flying_val")
