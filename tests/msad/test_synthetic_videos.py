"""Synthetic videos: a camera over a scene, in Argoverse-HD's form."""

import json

import cv2
import numpy as np
import pytest

from msad.data.argoverse_hd import read_content, sequences_of
from msad.data.scenes import draw_scene
from msad.data.synthetic_videos import _inside, _path, make_videos

SMALL = {"count": 2, "frames": 5, "size": (48, 64), "min_size": 8.0, "classes": ("disc", "ring")}


def test_the_camera_turns_back_at_the_borders():
    for seed in range(20):
        path = _path(np.random.default_rng(seed), 200, 3.0, (48, 64))
        assert path.min() >= 0 and (path.max(axis=0) <= [64, 48]).all()
        steps = np.linalg.norm(np.diff(path, axis=0), axis=1)
        assert steps.max() <= 3 + np.sqrt(2) and abs(np.median(steps) - 3) < 1  # whole pixels, and turns
    resting = _path(np.random.default_rng(0), 4, 0.0, (48, 64))
    assert (resting == resting[0]).all()


def test_boxes_are_cut_at_the_frame_by_hand():
    """A frame of 20 x 10 px at (10, 5); a box counts from 35 % of its area on."""
    boxes = {"whole": [12, 6, 4, 4], "half": [8, 6, 4, 4], "a third": [7.2, 6, 4, 4], "outside": [50, 50, 4, 4]}
    found = {record["name"]: box for box, record in _inside([{"name": n, "bbox": b} for n, b in boxes.items()],
                                                            (10, 5), (10, 20))}  # fmt: skip
    assert found == {"whole": [2, 1, 4, 4], "half": [0, 1, 2, 4]}


def test_frames_are_windows_of_a_scene_and_their_annotations_fit(tmp_path):
    entry = make_videos(tmp_path, **SMALL)
    content = read_content(entry["JSON"])
    assert [(s.name, len(s.image_ids), s.fps) for s in sequences_of(content)] == [
        ("video_000", 5, 30), ("video_001", 5, 30)
    ]  # fmt: skip
    rng = np.random.default_rng((0, 1))
    scene, records = draw_scene(rng, [96, 128], [12, 28], 8.0, 1 / 6, ["disc", "ring"])
    x, y = _path(rng, 5, 3.0, (48, 64))[3]
    (image,) = (i for i in content["images"] if (i["sid"], i["fid"]) == (1, 3))
    _, window = cv2.imencode(".jpg", scene[y : y + 48, x : x + 64], [cv2.IMWRITE_JPEG_QUALITY, 93])
    assert np.array_equal(cv2.imread(f"{entry['IMAGES']}/{image['file_name']}"), cv2.imdecode(window, cv2.IMREAD_COLOR))
    mine = [a for a in content["annotations"] if a["image_id"] == image["id"]]
    assert [a["category_id"] for a in mine] == [r["category_id"] - 1 for _, r in _inside(records, (x, y), (48, 64))]
    for annotation in content["annotations"]:
        left, top, width, height = annotation["bbox"]
        assert left >= 0 and top >= 0 and left + width <= 64.01 and top + height <= 48.01 and width * height > 0


def test_they_are_drawn_once_and_anew_with_other_parameters(tmp_path):
    make_videos(tmp_path, **SMALL)
    file, frame = tmp_path / "annotations.json", tmp_path / "images" / "video_000" / "0000.jpg"
    text, pixels, stamp = file.read_text(), frame.read_bytes(), frame.stat().st_mtime_ns
    make_videos(tmp_path, **SMALL)
    assert frame.stat().st_mtime_ns == stamp
    make_videos(tmp_path, **{**SMALL, "count": 1})
    assert frame.read_bytes() == pixels and not (tmp_path / "images" / "video_001").exists()
    file.write_text(text[:50])  # cut off
    make_videos(tmp_path, **SMALL)
    assert file.read_text() == text and len(json.loads(text)["images"]) == 10
    with pytest.raises(ValueError, match="speed must not be negative"):
        make_videos(tmp_path, **{**SMALL, "speed": -1.0})
    with pytest.raises(ValueError, match="count and frames must be positive"):
        make_videos(tmp_path, **{**SMALL, "frames": 0})
