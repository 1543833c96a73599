"""The gallery of a report: what it stores, and what a browser makes of it."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import torch
from chromium import BROWSER, Page
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.catalog import Metadata
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from msad.data.sampling import at_equal_distances
from msad.experiments.gallery import describe, write_gallery
from msad.experiments.panels import draw_panels
from msad.experiments.report import write_report
from msad.export import pareto
from msad.visualization.objects import Objects

SIZE = (60, 80)


def instances(boxes, scores, classes, **fields) -> Instances:
    found = Instances(SIZE, pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)))
    found.scores, found.pred_classes = torch.tensor(scores), torch.tensor(classes, dtype=torch.int64)
    for name, value in fields.items():
        found.set(name, torch.tensor(value))
    return found


def test_images_that_only_training_reads_are_shown(tmp_path):
    """Formats that PIL knows and OpenCV does not."""
    pixels, records = np.random.default_rng(0).integers(0, 255, (*SIZE, 3), np.uint8), []
    for file in (tmp_path / "a.tga", tmp_path / "b.pcx"):
        Image.fromarray(pixels).save(file)
        assert cv2.imread(str(file)) is None
        records.append({"file_name": str(file), "annotations": [], "height": 60, "width": 80})
    seen: list[np.ndarray] = []

    def look(_record, image):
        seen.append(image)
        return instances([], [], [])

    models = {"student": ("student_L", look)}
    file = write_gallery(tmp_path / "out", records, Metadata(thing_classes=["cat"]), models)
    assert [shown["name"] for shown in json.loads(file.read_text())["images"]] == ["a.tga", "b.pcx"]
    assert len(seen) == 2 and all(np.array_equal(image, pixels[:, :, ::-1]) for image in seen)
    DatasetCatalog.register("read by PIL", lambda: records)
    try:
        cfg = CfgNode({"DATASETS": {"REGISTER": [], "TEST": ["read by PIL"]}})
        draw_panels(cfg, tmp_path / "panels.jpg", {})
        about = {"format": "BGR", "min_size": 60, "max_size": 80}
        assert pareto._test_images(about, "read by PIL", 2, False)[0].shape == (*SIZE, 3)
    finally:
        DatasetCatalog.remove("read by PIL")
    assert cv2.imread(str(tmp_path / "panels.jpg")).std() > 30


def test_an_object_has_what_its_source_says():
    mask = np.zeros(SIZE, bool)
    mask[10:30, 20:50] = True
    mask[15:25, 30:40] = False
    objects = Objects(
        np.array([[0, 0, 5, 5], [20, 10, 50, 30], [1, 1, 2, 2]], float), np.array([0, 1, 1]),
        np.array([0.3, 0.94321, 0.04]), [mask, mask, mask], np.full((3, 2, 3), 7.25),
    )  # fmt: skip
    best, second = describe(objects)  # the third has too low a score
    assert best["box"] == [20, 10, 50, 30] and (best["class"], best["score"]) == (1, 0.943) and second["score"] == 0.3
    assert best["points"] == [[7.2, 7.2, 7.2]] * 2
    filled = np.zeros(SIZE, np.uint8)
    cv2.fillPoly(filled, [np.array(p).reshape(-1, 2).astype(int) for p in best["polygons"]], 1)
    assert len(best["polygons"]) == 2 and (filled.astype(bool) != mask).sum() <= 4 * 10  # the edge of the hole
    truth = describe(Objects(np.array([[0, 0, 5, 5.0]]), np.array([2]), masks=[[np.array([0, 0, 5, 0, 5, 5.04])]]))
    assert truth == [{"box": [0, 0, 5, 5], "class": 2, "polygons": [[0, 0, 5, 0, 5, 5]]}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A report with a gallery. Image 0 has a cat and a dog, image 1 a dog; the student misses the cat."""
    root = tmp_path_factory.mktemp("report")
    boxes = [[[5, 5, 25, 25], [40, 20, 70, 50]], [[10, 10, 40, 40]]]
    classes, records = [[0, 1], [1]], []
    for i, (mine, labels) in enumerate(zip(boxes, classes)):
        cv2.imwrite(str(root / f"{i}.png"), np.full((*SIZE, 3), 40 * (i + 1), np.uint8))
        annotations = [
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": label, "keypoints": [12, 12, 2, 20, 20, 0]}
            for box, label in zip(mine, labels)
        ]
        records.append({"file_name": str(root / f"{i}.png"), "annotations": annotations, "height": 60, "width": 80})
    (root / "gone.png").write_bytes(b"no image")
    records.append({**records[0], "file_name": str(root / "gone.png")})

    def teacher(_record, image):
        i = int(image[0, 0, 0] > 60)
        masks = np.zeros((len(boxes[i]), *SIZE), bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes[i]):
            mask[y0:y1, x0:x1] = True
        return instances(boxes[i], [0.9] * len(boxes[i]), classes[i], pred_masks=masks)

    def student(_record, image):
        i = int(image[0, 0, 0] > 60)
        points = np.full((2, 2, 3), 30.0, np.float32)
        # The dog, and a wrong one of a lower score.
        return instances([boxes[i][-1], [2, 40, 20, 58]], [0.8, 0.4], [1, 1], pred_keypoints=points)

    metadata = Metadata(thing_classes=["cat", "dog"], keypoint_names=["nose", "tail"],
                        keypoint_connection_rules=[("nose", "tail", (0, 0, 0))])  # fmt: skip
    models = {"teacher": ("teacher_H", teacher), "student": ("student_L", student)}
    write_gallery(root / "out", records, metadata, models)
    runs = [{"variant": v, "seed": 0, "results": {v: {"bbox": {"AP": ap}}}} for v, ap in (("a", 9.5), ("b", 30.0))]
    write_report({"runs": runs}, root / "out", "A <study>")
    return root / "out"


def test_files_of_a_gallery(folder):
    data = json.loads((folder / "gallery.json").read_text())
    assert (data["classes"], data["skeleton"]) == (["cat", "dog"], [[0, 1]])
    assert data["sources"] == [
        {"role": "ground truth", "name": "ground truth"}, {"role": "teacher", "name": "teacher_H"},
        {"role": "student", "name": "student_L"},
    ]  # fmt: skip
    assert [(i["name"], i["width"], i["height"]) for i in data["images"]] == [("0.png", 80, 60), ("1.png", 80, 60)]
    assert [{r: len(o) for r, o in i["objects"].items()} for i in data["images"]] == [
        {"ground truth": 2, "teacher": 2, "student": 2}, {"ground truth": 1, "teacher": 1, "student": 2},
    ]  # fmt: skip
    assert all(cv2.imread(str(folder / image["file"])).shape == (60, 80, 3) for image in data["images"])
    text = (folder / "report.html").read_text()
    assert "://" not in text and "{{" not in text and "A &lt;study&gt;" in text


def test_a_gallery_shows_images_from_all_over_the_set(tmp_path):
    records = []
    for i in range(5):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.zeros((*SIZE, 3), np.uint8))
        records.append({"file_name": str(tmp_path / f"{i}.png"), "annotations": [], "height": 60, "width": 80})
    data = json.loads(write_gallery(tmp_path / "out", records, Metadata(thing_classes=["cat"]), {}, 3).read_text())
    assert [image["name"] for image in data["images"]] == ["0.png", "1.png", "3.png"]


@pytest.mark.parametrize("sought", [{}, {"pred_masks"}, {"pred_keypoints"}, {"pred_masks", "pred_keypoints"}])
def test_of_the_ground_truth_it_shows_what_models_look_for(tmp_path, sought):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((*SIZE, 3), np.uint8))
    one = {"bbox": [5, 5, 25, 25], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "keypoints": [12, 12, 2],
           "segmentation": [[5, 5, 25, 5, 25, 25]]}  # fmt: skip
    record = {"file_name": str(tmp_path / "a.png"), "annotations": [one], "height": 60, "width": 80}
    fields = {"pred_masks": np.zeros((0, *SIZE), bool), "pred_keypoints": np.zeros((0, 1, 3), np.float32)}
    models = {
        "teacher": ("T", lambda *_: instances([], [], [])),
        "student": ("S", lambda *_: instances([], [], [], **{k: v for k, v in fields.items() if k in sought})),
    }
    file = write_gallery(tmp_path / "out", [record], Metadata(thing_classes=["cat"]), models)
    (truth,) = json.loads(file.read_text())["images"][0]["objects"]["ground truth"]
    names = {"pred_masks": "polygons", "pred_keypoints": "points"}
    assert truth.keys() == {"box", "class", *(names[part] for part in sought)}


@pytest.mark.parametrize("length, count, expected", [(5, 3, [0, 1, 3]), (4, 2, [0, 2]), (2, 3, [0, 1]), (0, 3, [])])
def test_what_stands_for_all(length, count, expected):
    assert at_equal_distances(range(length), count) == expected


def test_a_page_without_a_gallery_says_nothing_of_it(tmp_path):
    text = write_report({}, tmp_path, "t").read_text()
    assert '<section id="gallery"' not in text and ">null</script>" in text


# Pixels that are drawn on, and what is written, of every image; false for those that are hidden.
LOOK = """[...document.querySelectorAll("#shots figure")].map((figure) => {
  const canvas = figure.querySelector("canvas");
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  let drawn = 0;
  for (let i = 3; i < pixels.length; i += 4) drawn += pixels[i] > 0;
  return !figure.hidden && [drawn, figure.querySelector("figcaption").lastChild.textContent];
})"""
COUNTS = "[...document.querySelectorAll('#counts tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
NAMES = "[...document.querySelector('table').tBodies[0].rows].map(r => r.cells[0].textContent)"


@pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium")
def test_in_a_browser(folder):
    with Page((folder / "report.html").as_uri()) as page:
        assert page.run("getComputedStyle(document.querySelector('#gallery')).display") == "block"
        page.wait("[...document.querySelectorAll('#shots img')].every((i) => i.naturalWidth === 80)")
        first, second = page.run(LOOK)
        assert first[1] == "ground truth 2 \u00b7 teacher 2 \u00b7 student 1" and first[0] > second[0] > 100
        assert page.run(COUNTS) == [["teacher", "3", "0", "0", "100 %"], ["student", "2", "1", "0", "67 %"]]

        page.press("#score", "Home", 36)  # the lowest score: the wrong detections appear
        lower, _ = page.run(LOOK)
        assert lower[1].endswith("student 2") and lower[0] > first[0]
        assert page.run(COUNTS)[1] == ["student", "2", "1", "2", "67 %"]
        page.press("#score", "End", 35)  # the highest: only the ground truth is left
        alone, _ = page.run(LOOK)
        assert alone[1] == "ground truth 2 \u00b7 teacher 0 \u00b7 student 0" and 0 < alone[0] < first[0]
        assert page.run("document.querySelector('#threshold').value") == "1.00"

        page.click("input[value='ground truth']")
        assert page.run(LOOK)[0][0] == 0
        page.click("input[value='ground truth']")
        page.press("#score", "Home", 36)
        with_all = page.run(LOOK)[0][0]
        for role in ("teacher", "student"):
            page.click(f"input[value='{role}']")
            assert 0 < page.run(LOOK)[0][0] < with_all
            page.click(f"input[value='{role}']")

        page.click("#missed")  # the student misses the cat of the first image
        assert page.run(LOOK)[0][0] > 0 and page.run(LOOK)[1] is False
        page.run("(() => { const s = document.querySelector('#class'); s.value = '1';"
                 " s.dispatchEvent(new Event('input', {bubbles: true})); })()")  # fmt: skip
        assert page.run(LOOK) == [False, False] and not page.run("document.querySelector('#none').hidden")
        page.click("#missed")
        assert page.run(LOOK)[0][1] == "ground truth 1 \u00b7 teacher 1 \u00b7 student 2"

        small = page.run("document.querySelector('#shots figure').offsetWidth")
        page.click("#shots .stage")
        assert page.run("document.querySelector('#shots figure').offsetWidth") > 2 * small

        assert page.run(NAMES) == ["a", "b"]
        page.click("table th:nth-child(2) button")  # by AP, the highest first: 9.5 is not above 30.0
        assert page.run(NAMES) == ["b", "a"]
        page.click("table th:nth-child(2) button")
        assert page.run(NAMES) == ["a", "b"]

        page.resize(380, 800)
        page.wait("document.querySelector('#shots').offsetWidth < 380")
        assert page.run("document.documentElement.scrollWidth") <= 380, "the page scrolls sideways"
        assert page.errors == []


@pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium")
def test_an_error_of_a_page_is_noticed(tmp_path):
    (tmp_path / "bad.html").write_text("<script>nothing.at.all()</script><img src='absent.png'>")
    with Page((tmp_path / "bad.html").as_uri()) as page:
        page.run("1")
        assert len(page.errors) == 2
