"""Evaluation loop, COCO evaluator and its backends on small data made here."""

import json
import logging
import pickle

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    inference_context,
    inference_on_dataset,
    print_csv_format,
    verify_results,
)
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.structures import Boxes, BoxMode, Instances

SIZE = 60
CLASSES = ["cat", "dog"]
CATEGORY_IDS = {7: 0, 9: 1}


def box_polygon(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def write_truth(path, objects, keypoints=0, with_annotations=True, first_id=1):
    """objects: (image id, category id, XYWH box)."""
    categories = [{"id": i, "name": CLASSES[c]} for i, c in CATEGORY_IDS.items()]
    annotations = []
    for number, (image_id, category_id, (x, y, w, h)) in enumerate(objects):
        points = [[x + w * t, y + h * t, 2] for t in np.linspace(0.2, 0.8, keypoints)]
        annotations.append(
            {
                "id": number + first_id,
                "image_id": image_id,
                "category_id": category_id,
                "bbox": [x, y, w, h],
                "area": w * h,
                "iscrowd": 0,
                "segmentation": box_polygon(x, y, w, h),
                "keypoints": [v for point in points for v in point],
                "num_keypoints": keypoints,
            }
        )
    for category in categories:
        category.update(keypoints=[f"k{i}" for i in range(keypoints)], skeleton=[])
    images = [{"id": i, "height": SIZE, "width": SIZE, "file_name": f"{i}.jpg"} for i in (3, 5, 8)]
    content = {"images": images, "categories": categories}
    if with_annotations:
        content["annotations"] = annotations
    path.write_text(json.dumps(content))


OBJECTS = [(3, 7, (5, 5, 20, 20)), (3, 9, (30, 30, 20, 10)), (5, 7, (0, 0, 40, 40)), (8, 9, (10, 20, 12, 12))]


@pytest.fixture
def dataset(tmp_path, request):
    name = f"toy_{request.node.name}"
    write_truth(tmp_path / "truth.json", OBJECTS, keypoints=3)
    MetadataCatalog.get(name).set(
        json_file=str(tmp_path / "truth.json"),
        thing_classes=CLASSES,
        thing_dataset_id_to_contiguous_id=CATEGORY_IDS,
    )
    yield name
    MetadataCatalog.remove(name)


def found(rows, masks=False, keypoints=0):
    """rows: (class, score, XYWH box)."""
    result = Instances((SIZE, SIZE))
    boxes = torch.tensor([row[2] for row in rows], dtype=torch.float32).reshape(-1, 4)
    result.pred_boxes = Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))
    result.scores = torch.tensor([row[1] for row in rows], dtype=torch.float32)
    result.pred_classes = torch.tensor([row[0] for row in rows], dtype=torch.int64)
    if masks:
        result.pred_masks = torch.zeros(len(rows), SIZE, SIZE, dtype=torch.bool)
        for mask, (_, _, (x, y, w, h)) in zip(result.pred_masks, rows):
            mask[y : y + h, x : x + w] = True
    if keypoints:
        t = torch.linspace(0.2, 0.8, keypoints)[None]
        points = [boxes[:, i, None] + boxes[:, i + 2, None] * t + 0.5 for i in range(2)]
        result.pred_keypoints = torch.stack([*points, torch.ones_like(points[0])], dim=2)
    return result


def perfect(shift=0, **kwargs):
    by_image = {3: [], 5: [], 8: []}
    for image_id, category_id, (x, y, w, h) in OBJECTS:
        by_image[image_id].append((CATEGORY_IDS[category_id], 0.9, (x + shift, y, w, h)))
    return {image_id: found(rows, **kwargs) for image_id, rows in by_image.items()}


def evaluate(evaluator, outputs, **kwargs):
    evaluator.reset()
    for image_id, instances in outputs.items():
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    return evaluator.evaluate(**kwargs)


@pytest.mark.parametrize("fast", [False, True])
def test_perfect_detections(dataset, tmp_path, fast):
    evaluator = COCOEvaluator(
        dataset, output_dir=str(tmp_path / "out"), use_fast_impl=fast, kpt_oks_sigmas=[0.05, 0.1, 0.1]
    )
    results = evaluate(evaluator, perfect(masks=True, keypoints=3))
    assert list(results) == ["bbox", "keypoints", "segm"]
    assert list(results["bbox"]) == ["AP", "AP50", "AP75", "APs", "APm", "APl", "AP-cat", "AP-dog"]
    assert list(results["keypoints"]) == ["AP", "AP50", "AP75", "APm", "APl", "AP-cat", "AP-dog"]
    for task in results.values():
        for name in ("AP", "AP50", "AP75", "AP-cat", "AP-dog"):
            assert task[name] == pytest.approx(100)
    # 40 x 40 is medium, the others are small, none is large.
    assert np.isnan(results["bbox"]["APl"])
    assert results["bbox"]["APm"] == pytest.approx(100)
    assert results["bbox"]["APs"] == pytest.approx(100)
    assert (tmp_path / "out" / "instances_predictions.pth").is_file()
    rows = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert {row["category_id"] for row in rows} == set(CATEGORY_IDS)
    assert len(rows) == len(OBJECTS)
    assert rows[0]["bbox"] == [5, 5, 20, 20]
    assert isinstance(rows[0]["segmentation"]["counts"], str)
    # The annotated pixel centres, half a pixel before those of the prediction.
    np.testing.assert_allclose(rows[0]["keypoints"][:3], [9, 9, 1], atol=1e-5)


def test_shifted_boxes_by_hand(dataset):
    """A 20 wide box moved by 5 has IoU 0.6: right at the thresholds 0.50, 0.55 and 0.60, wrong above."""
    results = evaluate(COCOEvaluator(dataset), {3: found([(0, 0.9, (10, 5, 20, 20))])}, img_ids=[3])
    # One of the two objects of image 3 is a cat; nothing was found of the dog.
    assert results["bbox"]["AP-cat"] == pytest.approx(30)
    assert results["bbox"]["AP-dog"] == 0
    assert results["bbox"]["AP"] == pytest.approx(15)
    assert results["bbox"]["AP50"] == pytest.approx(50)
    assert results["bbox"]["AP75"] == 0


@pytest.mark.parametrize("fast", [False, True])
def test_no_detections_and_no_images(dataset, fast):
    evaluator = COCOEvaluator(dataset, use_fast_impl=fast)
    results = evaluate(evaluator, {3: found([]), 5: found([])})
    assert list(results) == ["bbox"]
    assert all(np.isnan(value) for value in results["bbox"].values())
    assert evaluate(evaluator, {}) == {}
    asked = COCOEvaluator(dataset, tasks=("bbox", "segm"), use_fast_impl=fast)
    assert list(evaluate(asked, {3: found([])})) == ["bbox", "segm"]


def test_limit_on_detections(dataset):
    """150 false boxes before the true one hide it behind the usual limit of 100."""
    noise = [(0, 0.9, (50, 50, 5, 5))] * 150
    outputs = {3: found([*noise, (0, 0.1, (5, 5, 20, 20))])}
    assert evaluate(COCOEvaluator(dataset), outputs, img_ids=[3])["bbox"]["AP-cat"] == 0
    results = evaluate(COCOEvaluator(dataset, max_dets_per_image=200), outputs, img_ids=[3])
    # Precision is 1/151 at every recall.
    assert results["bbox"]["AP-cat"] == pytest.approx(100 / 151)
    assert results["bbox"]["AP"] == pytest.approx(50 / 151)


def test_an_unknown_class_is_an_error(dataset):
    with pytest.raises((ValueError, AssertionError), match="class"):
        evaluate(COCOEvaluator(dataset), {3: found([(2, 0.5, (1, 1, 5, 5))])})


def test_wrong_number_of_sigmas_is_an_error(dataset):
    evaluator = COCOEvaluator(dataset, tasks=("keypoints",), kpt_oks_sigmas=[0.1])
    with pytest.raises((ValueError, AssertionError), match="KEYPOINT_OKS_SIGMAS"):
        evaluate(evaluator, perfect(keypoints=3))


def test_a_config_in_place_of_tasks(dataset, tmp_path, caplog):
    cfg = get_cfg()
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.05, 0.1, 0.1]
    with caplog.at_level(logging.WARNING):
        older = COCOEvaluator(dataset, cfg, False, output_dir=str(tmp_path))
    assert "deprecated" in caplog.text
    sigmas = {"kpt_oks_sigmas": cfg.TEST.KEYPOINT_OKS_SIGMAS}

    def results(evaluator):
        return flatten_results_dict(evaluate(evaluator, perfect(shift=2, masks=True, keypoints=3)))

    assert results(older) == pytest.approx(results(COCOEvaluator(dataset, **sigmas)), nan_ok=True)
    # What is said explicitly counts.
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [9.0, 9.0, 9.0]
    said = results(COCOEvaluator(dataset, cfg, False, **sigmas))["keypoints/AP"]
    assert said < results(COCOEvaluator(dataset, cfg, False))["keypoints/AP"] == pytest.approx(100)


def proposals(boxes, logits):
    """boxes: XYWH."""
    corners = BoxMode.convert(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), 1, 0)
    return Instances((SIZE, SIZE), proposal_boxes=Boxes(corners), objectness_logits=torch.tensor(logits))


def test_recall_of_proposals_by_hand(dataset, tmp_path):
    evaluator = COCOEvaluator(dataset, ("bbox",), output_dir=str(tmp_path / "out"))
    evaluator.reset()
    # 20 x 20 moved by 5: IoU 0.6, found at 0.50, 0.55, 0.60. Nothing is near the 20 x 10.
    first = proposals([(10, 5, 20, 20), (40, 0, 5, 5)], [0.0, 5.0])
    # 40 x 40 exactly.
    second = proposals([(0, 0, 40, 40)], [1.0])
    evaluator.process([{"image_id": 3}, {"image_id": 5}], [{"proposals": first}, {"proposals": second}])
    results = evaluator.evaluate()
    assert list(results) == ["box_proposals"]
    expected = {"AR": (0.3 + 0 + 1) / 3, "ARs": (0.3 + 0) / 2, "ARm": 1, "ARl": np.nan}
    expected = {f"{name}@{n}": 100 * value for n in (100, 1000) for name, value in expected.items()}
    assert list(results["box_proposals"]) == list(expected)
    assert results["box_proposals"] == pytest.approx(expected, nan_ok=True)
    with open(tmp_path / "out" / "box_proposals.pkl", "rb") as f:
        written = pickle.load(f)
    assert written["ids"] == [3, 5] and written["bbox_mode"] == BoxMode.XYXY_ABS
    np.testing.assert_array_equal(written["boxes"][0], first.proposal_boxes.tensor)
    np.testing.assert_array_equal(written["objectness_logits"][0], [0, 5])


def test_a_proposal_finds_one_object(dataset, tmp_path):
    path = tmp_path / "truth.json"
    write_truth(path, [(3, 7, (0, 0, 50, 45)), (3, 9, (0, 0, 50, 50)), (3, 9, (0, 0, 60, 60))])
    content = json.loads(path.read_text())
    content["annotations"][2]["iscrowd"] = 1
    path.write_text(json.dumps(content))
    evaluator = COCOEvaluator(dataset)
    evaluator.reset()
    evaluator.process([{"image_id": 3}], [{"proposals": proposals([(0, 0, 50, 50), (50, 50, 9, 9)], [1.0, 0.0])}])
    assert evaluator.evaluate()["box_proposals"]["AR@100"] == pytest.approx(50)


def test_proposals_beside_detections(dataset):
    evaluator = COCOEvaluator(dataset, ("bbox",))
    evaluator.reset()
    for image_id, instances in perfect().items():
        found = Instances((SIZE, SIZE), proposal_boxes=instances.pred_boxes, objectness_logits=instances.scores)
        evaluator.process([{"image_id": image_id}], [{"instances": instances, "proposals": found}])
    results = evaluator.evaluate()
    assert results["bbox"]["AP"] == pytest.approx(100) == results["box_proposals"]["AR@100"]


def test_without_annotations_files_are_written(dataset, tmp_path):
    write_truth(tmp_path / "truth.json", [], with_annotations=False)
    assert evaluate(COCOEvaluator(dataset, output_dir=str(tmp_path)), perfect()) == {}
    assert len(json.loads((tmp_path / "coco_instances_results.json").read_text())) == len(OBJECTS)


def test_a_data_set_without_file_is_converted(tmp_path):
    name = "toy_converted"
    record = {"file_name": "x.jpg", "image_id": 4, "height": SIZE, "width": SIZE}
    record["annotations"] = [{"bbox": [5, 5, 20, 20], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}]
    DatasetCatalog.register(name, lambda: [record])
    MetadataCatalog.get(name).set(thing_classes=["one"])
    try:
        evaluator = COCOEvaluator(name, output_dir=str(tmp_path))
        results = evaluate(evaluator, {4: found([(0, 0.5, (5, 5, 20, 20))])})
        assert results["bbox"]["AP"] == pytest.approx(100)
        assert "AP-one" not in results["bbox"]
        assert (tmp_path / f"{name}_coco_format.json").is_file()
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_coco_json_of_nothing():
    assert instances_to_coco_json(found([]), 1) == []


class Model(torch.nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs
        self.modes = []

    def forward(self, batch):
        self.modes.append((self.training, torch.is_grad_enabled()))
        return [{"instances": self.outputs[item["image_id"]]} for item in batch]


class Count(DatasetEvaluator):
    def __init__(self, name, results=True):
        self.name, self.results, self.calls = name, results, []

    def reset(self):
        self.calls.append("reset")

    def process(self, inputs, outputs):
        self.calls.append([item["image_id"] for item in inputs])
        assert len(inputs) == len(outputs)

    def evaluate(self):
        return {self.name: {"n": len(self.calls) - 1}} if self.results else None


def test_inference_loop(dataset, caplog):
    model = Model(perfect()).train()
    loader = [[{"image_id": 3}, {"image_id": 5}], [{"image_id": 8}]]
    first, second, silent = Count("first"), Count("second"), Count("silent", results=False)
    happened = []
    events = ("on_start", "before_inference", "after_inference", "on_end")
    callbacks = {event: (lambda event=event: happened.append(event)) for event in events}
    with caplog.at_level(logging.INFO, logger="detectron2"):
        results = inference_on_dataset(model, loader, DatasetEvaluators([first, second, silent]), callbacks)
    assert results == {"first": {"n": 2}, "second": {"n": 2}}
    assert first.calls == second.calls == silent.calls == ["reset", [3, 5], [8]]
    assert happened == ["on_start", *["before_inference", "after_inference"] * 2, "on_end"]
    assert model.modes == [(False, False)] * 2
    assert model.training
    assert inference_on_dataset(model, loader, [Count("listed")]) == {"listed": {"n": 2}}
    assert inference_on_dataset(model, loader, None) == {}
    assert inference_on_dataset(model, loader, Count("silent", results=False)) == {}
    assert inference_on_dataset(lambda batch: [{} for _ in batch], loader, Count("function")) == {
        "function": {"n": 2}
    }


def test_inference_loop_reports_time(caplog):
    loader = [[{"image_id": 3}]] * 12
    logging.getLogger("detectron2").propagate = True
    with caplog.at_level(logging.INFO, logger="detectron2"):
        inference_on_dataset(Model(perfect()), loader, Count("n"))
    assert "12" in caplog.text
    assert "ETA" in caplog.text


def test_inference_context():
    for training in (True, False):
        model = Model({}).train(training)
        with inference_context(model):
            assert not model.training
        assert model.training == training


def test_joined_results_must_differ_in_name():
    both = DatasetEvaluators([Count("same"), Count("same")])
    with pytest.raises((ValueError, AssertionError), match="same"):
        both.evaluate()


def test_csv_lines(caplog):
    results = {"bbox": {"AP": 12.34567, "AP50": float("nan"), "AP-cat": 3.0}, "speed": 2}
    logging.getLogger("detectron2").propagate = True
    with caplog.at_level(logging.INFO, logger="detectron2"):
        print_csv_format(results)
    assert [record.getMessage() for record in caplog.records] == [
        "copypaste: Task: bbox",
        "copypaste: AP,AP50",
        "copypaste: 12.3457,nan",
        "copypaste: speed=2",
    ]


def test_expected_results():
    cfg = get_cfg()
    results = {"bbox": {"AP": 40.0}, "segm": {"AP": float("nan")}}
    assert verify_results(cfg, results) is True
    cfg.TEST.EXPECTED_RESULTS = [["bbox", "AP", 40.05, 0.1]]
    assert verify_results(cfg, results) is True
    for wrong in (["bbox", "AP", 41, 0.5], ["segm", "AP", 1, 100]):
        cfg.TEST.EXPECTED_RESULTS = [["bbox", "AP", 40.05, 0.1], wrong]
        with pytest.raises(SystemExit) as ended:
            verify_results(cfg, results)
        assert ended.value.code == 1


def test_flat_names():
    nested = {"bbox": {"AP": 1, "by": {"size": 2}}, "speed": 3}
    assert flatten_results_dict(nested) == {"bbox/AP": 1, "bbox/by/size": 2, "speed": 3}
