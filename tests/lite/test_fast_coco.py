"""The adapter of COCO evaluation packages (in detectron2-lite alone): all give the numbers of pycocotools."""

import json
import sys

import numpy as np
import pycocotools.mask as mask_util
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

fast_coco = pytest.importorskip(
    "detectron2.evaluation.fast_coco", reason="the adapter belongs to detectron2-lite, this is another engine"
)


def box_polygon(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def random_coco(seed, images=12, keypoints=17):
    """Annotations (with crowds and a category without objects) and detections (with many equal scores)."""
    rng = np.random.RandomState(seed)
    categories = [{"id": 3 * i + 2, "name": str(i)} for i in range(4)]
    truth = {"images": [], "annotations": [], "categories": categories}
    detections = []
    for image_id in rng.permutation(images).tolist():
        truth["images"].append({"id": image_id, "height": 150, "width": 150})
        for _ in range(rng.randint(0, 9)):
            size = rng.uniform(5, 120, 2)
            corner = rng.uniform(0, 150 - size)
            points = np.concatenate(
                [corner + rng.rand(keypoints, 2) * size, rng.randint(0, 3, (keypoints, 1))], 1
            )
            category_id = categories[rng.randint(3)]["id"]
            annotation = {
                "id": len(truth["annotations"]) + 1,
                "image_id": image_id,
                "category_id": category_id,
                "bbox": [*corner.tolist(), *size.tolist()],
                "area": float(size.prod()),
                "iscrowd": int(rng.rand() < 0.1),
                "segmentation": box_polygon(*corner.tolist(), *size.tolist()),
                "keypoints": points.ravel().tolist(),
                "num_keypoints": int((points[:, 2] > 0).sum()),
            }
            truth["annotations"].append(annotation)
            for _ in range(rng.randint(0, 5)):
                x, y, w, h = (np.array(annotation["bbox"]) + rng.randn(4) * 0.1 * np.tile(size, 2)).tolist()
                w, h = max(w, 2.0), max(h, 2.0)
                near = points + rng.randn(keypoints, 3) * [4, 4, 0]
                detections.append(
                    {
                        "image_id": image_id,
                        "category_id": category_id if rng.rand() < 0.8 else categories[rng.randint(4)]["id"],
                        "bbox": [x, y, w, h],
                        "score": round(rng.rand(), 1),
                        "segmentation": rle(x, y, w, h),
                        "keypoints": near.ravel().tolist(),
                    }
                )
    if truth["annotations"]:
        # A crowd's mask in the annotation files is run-length coded.
        first = truth["annotations"][0]
        first["iscrowd"] = 1
        first["segmentation"] = {"size": [150, 150], "counts": [0, 3000, 19500]}
    api = COCO()
    api.dataset = truth
    api.createIndex()
    return api, detections


def rle(x, y, w, h):
    code = mask_util.merge(mask_util.frPyObjects(box_polygon(x, y, w, h), 150, 150))
    return {"size": code["size"], "counts": code["counts"].decode()}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("iou_type", ["bbox", "segm", "keypoints"])
@pytest.mark.parametrize("limits", [None, "few", "many"])
def test_fast_backend_is_exact(seed, iou_type, limits):
    pytest.importorskip("hotcoco", reason="hotcoco, the optional fast backend, is not installed")
    if limits is not None:
        few = limits == "few"
        limits = ([2] if few else [50]) if iou_type == "keypoints" else ([1, 2, 3] if few else [1, 10, 300])
    truth, detections = random_coco(seed)
    some = sorted(truth.imgs)[::2]
    for img_ids in (None, some):
        slow, fast = (
            fast_coco.evaluate_coco(truth, detections, iou_type, limits=limits, img_ids=img_ids, fast=fast)
            for fast in (False, True)
        )
        np.testing.assert_array_equal(slow.precision, fast.precision)
        np.testing.assert_array_equal(slow.recall, fast.recall)
        np.testing.assert_array_equal(slow.stats(), fast.stats())
        assert slow.areas == fast.areas
        assert str(slow) == str(fast)
    assert 0 < slow.stats()[0] < 1


@pytest.mark.parametrize("iou_type", ["bbox", "segm", "keypoints"])
def test_fast_backend_is_exact_for_empty_detections(iou_type):
    """Masks without a pixel, boxes without area, keypoints all in one place, people without visible keypoints."""
    pytest.importorskip("hotcoco", reason="hotcoco, the optional fast backend, is not installed")
    truth, detections = random_coco(3)
    blank = mask_util.encode(np.zeros((150, 150), np.uint8, order="F"))
    for detection in detections[::5]:
        detection["segmentation"] = {"size": [150, 150], "counts": blank["counts"].decode()}
        detection["keypoints"] = [0.0] * 51
        detection["bbox"] = [1.0, 2.0, 0.0, 0.0]
    for annotation in truth.dataset["annotations"][1::4]:
        annotation.update(keypoints=[0] * 51, num_keypoints=0)
    slow, fast = (fast_coco.evaluate_coco(truth, detections, iou_type, fast=fast) for fast in (False, True))
    np.testing.assert_array_equal(slow.precision, fast.precision)
    np.testing.assert_array_equal(slow.recall, fast.recall)
    np.testing.assert_array_equal(slow.stats(), fast.stats())
    assert 0 < slow.stats()[0] < 1


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("iou_type", ["bbox", "segm", "keypoints"])
def test_summary_is_that_of_pycocotools(iou_type, fast, capsys):
    truth, detections = random_coco(5)
    used = [{k: v for k, v in d.items() if k != "bbox" or iou_type != "segm"} for d in detections]
    sigmas = np.linspace(0.03, 0.1, 17) if iou_type == "keypoints" else ()
    reference = COCOeval(truth, truth.loadRes(used), iou_type)
    if len(sigmas):
        reference.params.kpt_oks_sigmas = sigmas
    reference.evaluate()
    reference.accumulate()
    reference.summarize()
    metrics = fast_coco.evaluate_coco(truth, detections, iou_type, oks_sigmas=sigmas, fast=fast)
    np.testing.assert_array_equal(metrics.stats(), reference.stats)


def test_odd_ids_go_to_the_reference():
    """Text ids and the object id 0 are read differently by the packages; the numbers must not change."""
    for change in ("text", "zero", "double"):
        truth, detections = random_coco(1)
        objects = truth.dataset["annotations"]
        if change == "zero":
            for item in objects:
                item["id"] -= 1
        elif change == "double":
            objects[1]["id"] = objects[2]["id"]
        else:
            for item in [*objects, *detections]:
                item["image_id"] = f"image {item['image_id']}"
            for item in truth.dataset["images"]:
                item["id"] = f"image {item['id']}"
        truth.createIndex()
        slow, fast = (
            fast_coco.evaluate_coco(truth, detections, "bbox", fast=fast).stats() for fast in (False, True)
        )
        np.testing.assert_array_equal(slow, fast)


def test_detections_that_cannot_be_evaluated():
    truth, detections = random_coco(1)
    with pytest.raises(ValueError, match="'nowhere'"):
        fast_coco.evaluate_coco(truth, [{**detections[0], "image_id": "nowhere"}], "bbox")
    with pytest.raises(ValueError, match=f"image {detections[0]['image_id']} .*not a number"):
        fast_coco.evaluate_coco(truth, [{**detections[0], "score": float("nan")}], "bbox")


def test_detections_are_left_alone():
    truth, detections = random_coco(2)
    before = json.dumps(detections)
    for iou_type in ("bbox", "segm", "keypoints"):
        for fast in (False, True):
            fast_coco.evaluate_coco(truth, detections, iou_type, fast=fast)
    assert json.dumps(detections) == before


def test_without_the_fast_package(monkeypatch):
    truth, detections = random_coco(3)
    expected = fast_coco.evaluate_coco(truth, detections, "bbox", fast=True).stats()
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    np.testing.assert_array_equal(
        fast_coco.evaluate_coco(truth, detections, "bbox", fast=True).stats(), expected
    )
