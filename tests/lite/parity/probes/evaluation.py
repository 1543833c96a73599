"""COCO metrics of fixed random detections, the result files and the inference loop."""

import json
import logging
import pathlib
import pickle

import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluators, inference_on_dataset, verify_results
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.structures import Boxes, Instances

TOLERANCE = 1e-9

SIZE = 160
KEYPOINTS = 5
SIGMAS = [0.05, 0.1, 0.025, 0.07, 0.09]
NAMES = ["bike", "car", "van", "bus", "tram"]
CATEGORY_IDS = [1, 3, 4, 8, 9]


def _ellipse(box):
    """Polygon (24 corners) of the ellipse in an XYXY box."""
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    x = (box[0] + box[2]) / 2 + np.cos(angle) * (box[2] - box[0]) / 2
    y = (box[1] + box[3]) / 2 + np.sin(angle) * (box[3] - box[1]) / 2
    return np.stack([x, y], 1).ravel().tolist()


def _mask(box):
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    width, height = box[2] - box[0], box[3] - box[1]
    inside = ((x - (box[0] + box[2]) / 2) / width) ** 2 + ((y - (box[1] + box[3]) / 2) / height) ** 2
    return inside <= 0.25


def make_data(seed: int, images: int = 14):
    """COCO annotations (with crowds, empty images, a category without objects) and noisy detections."""
    rng = np.random.RandomState(seed)
    names = [f"k{i}" for i in range(KEYPOINTS)]
    categories = [
        {"id": i, "name": n, "keypoints": names, "skeleton": []} for i, n in zip(CATEGORY_IDS, NAMES)
    ]
    truth = {"info": {}, "licenses": [], "images": [], "annotations": [], "categories": categories}
    detections = {}
    for index in range(images):
        image_id = 500 - 7 * index
        truth["images"].append(
            {"id": image_id, "height": SIZE, "width": SIZE, "file_name": f"{image_id}.jpg"}
        )
        found = []
        for _ in range(rng.randint(0, 9)):
            size = rng.uniform(6, 130, 2)
            corner = rng.uniform(0, SIZE - size)
            box = np.concatenate([corner, corner + size])
            points = np.concatenate(
                [corner + rng.rand(KEYPOINTS, 2) * size, rng.randint(0, 3, (KEYPOINTS, 1))], 1
            )
            category = rng.randint(len(NAMES) - 1)
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": CATEGORY_IDS[category],
                    "bbox": [*corner.tolist(), *size.tolist()],
                    "area": float(np.pi / 4 * size.prod()),
                    "iscrowd": 0,
                    "segmentation": [_ellipse(box)],
                    "keypoints": points.ravel().tolist(),
                    "num_keypoints": int((points[:, 2] > 0).sum()),
                }
            )
            for _ in range(rng.randint(0, 4)):
                moved = box + rng.randn(4) * 0.08 * np.tile(size, 2)
                moved[2:] = np.maximum(moved[2:], moved[:2] + 2)
                near = points + np.array([3, 3, 0]) * rng.randn(KEYPOINTS, 3)
                label = category if rng.rand() < 0.85 else rng.randint(len(NAMES))
                # Two decimals: equal scores happen.
                found.append((moved, round(rng.rand(), 2), label, near))
        detections[image_id] = found
    if truth["annotations"]:
        truth["annotations"][0]["iscrowd"] = 1
    return truth, detections


def to_instances(found, masks=True, keypoints=True):
    result = Instances((SIZE, SIZE))
    result.pred_boxes = Boxes(
        torch.tensor(np.array([f[0] for f in found]).reshape(-1, 4), dtype=torch.float32)
    )
    result.scores = torch.tensor([f[1] for f in found], dtype=torch.float32)
    result.pred_classes = torch.tensor([f[2] for f in found], dtype=torch.int64)
    if masks:
        result.pred_masks = torch.from_numpy(np.array([_mask(f[0]) for f in found]).reshape(-1, SIZE, SIZE))
    if keypoints:
        points = np.array([f[3] for f in found]).reshape(-1, KEYPOINTS, 3)
        result.pred_keypoints = torch.tensor(points, dtype=torch.float32)
    return result


def register(workdir: pathlib.Path, name: str, truth) -> None:
    path = workdir / f"{name}.json"
    path.write_text(json.dumps(truth))
    meta = MetadataCatalog.get(name)
    meta.set(
        json_file=str(path),
        thing_classes=NAMES,
        thing_dataset_id_to_contiguous_id={c: i for i, c in enumerate(CATEGORY_IDS)},
    )


def run(evaluator, detections, img_ids=None, **kwargs):
    evaluator.reset()
    for image_id, found in detections.items():
        evaluator.process([{"image_id": image_id}], [{"instances": to_instances(found, **kwargs)}])
    return evaluator.evaluate(img_ids=img_ids) if img_ids else evaluator.evaluate()


def make_proposals(truth, count):
    """Random boxes, many around objects."""
    rng = np.random.RandomState(count)
    found = {}
    for image in truth["images"]:
        corners = rng.uniform(0, SIZE, (count, 2))
        boxes = [np.concatenate([corners, corners + rng.uniform(2, 90, (count, 2))], 1)]
        for x, y, w, h in [a["bbox"] for a in truth["annotations"] if a["image_id"] == image["id"]]:
            boxes.append(np.array([x, y, x + w, y + h]) + rng.randn(count // 10, 4) * 0.1 * np.array([w, h, w, h]))
        boxes = torch.tensor(np.concatenate(boxes), dtype=torch.float32)
        logits = torch.from_numpy(rng.permutation(len(boxes)) / 10.0).float()
        found[image["id"]] = Instances((SIZE, SIZE), proposal_boxes=Boxes(boxes), objectness_logits=logits)
    return found


def _record_proposals(out, workdir, truth):
    for count in (10, 60, 1500):
        evaluator = COCOEvaluator("probe_eval", output_dir=str(workdir / f"proposals {count}"))
        evaluator.reset()
        for image_id, found in make_proposals(truth, count).items():
            found = found[:0] if image_id == 486 else found  # an image without proposals
            evaluator.process([{"image_id": image_id}], [{"proposals": found}])
        _record(out, f"{count} proposals", evaluator.evaluate())
        with open(workdir / f"proposals {count}" / "box_proposals.pkl", "rb") as f:
            written = pickle.load(f)
        out[f"{count} proposals/mode"] = int(written["bbox_mode"])
        order = np.argsort(written["ids"])
        for key in ("ids", "boxes", "objectness_logits"):
            out[f"{count} proposals/{key}"] = [written[key][i] for i in order]


def _record(out, name, results):
    out[f"{name}/keys"] = json.dumps({task: list(metrics) for task, metrics in results.items()})
    for key, value in flatten_results_dict(results).items():
        out[f"{name}/{key}"] = -1.0 if np.isnan(value) else float(value)


class _Echo(torch.nn.Module):
    def __init__(self, detections):
        super().__init__()
        self.detections = detections

    def forward(self, batch):
        assert not self.training and not torch.is_grad_enabled()
        return [{"instances": to_instances(self.detections[item["image_id"]])} for item in batch]


def probe(workdir: pathlib.Path) -> dict[str, object]:
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    out: dict[str, object] = {}
    truth, detections = make_data(0)
    register(workdir, "probe_eval", truth)

    written = workdir / "results"
    evaluator = COCOEvaluator("probe_eval", output_dir=str(written), kpt_oks_sigmas=SIGMAS)
    _record(out, "all", run(evaluator, detections))
    rows = json.loads((written / "coco_instances_results.json").read_text())
    rows.sort(key=lambda row: (row["image_id"], row["score"], row["bbox"]))
    out["json/rows"] = json.dumps(rows)
    out["json/files"] = sorted(path.name for path in written.iterdir())
    saved = torch.load(written / "instances_predictions.pth", weights_only=False)
    out["pth/keys"] = sorted({key for item in saved for key in item})
    out["pth/images"] = sorted(item["image_id"] for item in saved)

    _record(
        out, "slow", run(COCOEvaluator("probe_eval", use_fast_impl=False, kpt_oks_sigmas=SIGMAS), detections)
    )
    for limit in (2, 15, 100, 250):
        evaluator = COCOEvaluator("probe_eval", max_dets_per_image=limit, kpt_oks_sigmas=SIGMAS)
        _record(out, f"limit {limit}", run(evaluator, detections))
    some = sorted(detections)[:6]
    _record(out, "six images", run(COCOEvaluator("probe_eval"), detections, img_ids=some, keypoints=False))
    plain = COCOEvaluator("probe_eval")
    _record(out, "boxes alone", run(plain, detections, masks=False, keypoints=False))
    _record(out, "no detections", run(plain, {image_id: [] for image_id in detections}))
    _record(out, "no images", run(plain, {}))
    cfg = get_cfg()
    cfg.TEST.KEYPOINT_OKS_SIGMAS = SIGMAS
    logging.disable(logging.WARNING)
    _record(out, "config for tasks", run(COCOEvaluator("probe_eval", cfg, False), detections))
    logging.disable(logging.INFO)
    asked = COCOEvaluator("probe_eval", tasks=("bbox",))
    _record(out, "asked for boxes", run(asked, detections))
    asked = COCOEvaluator("probe_eval", tasks=("segm", "bbox"))
    _record(out, "asked, none found", run(asked, {image_id: [] for image_id in detections}))

    _record_proposals(out, workdir, truth)

    batches = [[{"image_id": image_id}] for image_id in detections]
    model = _Echo(detections).train()
    both = DatasetEvaluators([COCOEvaluator("probe_eval", kpt_oks_sigmas=SIGMAS)])
    results = inference_on_dataset(model, batches, both)
    _record(out, "loop", results)
    out["loop/training again"] = model.training
    out["loop/nothing"] = json.dumps(inference_on_dataset(model, batches, None))

    cfg = get_cfg()
    cfg.TEST.EXPECTED_RESULTS = [["bbox", "AP", results["bbox"]["AP"] + 0.01, 0.02]]
    out["verify/right"] = verify_results(cfg, results)
    cfg.TEST.EXPECTED_RESULTS = [["bbox", "AP", results["bbox"]["AP"] + 1, 0.5]]
    logging.disable(logging.CRITICAL)
    try:
        verify_results(cfg, results)
    except SystemExit as error:
        out["verify/wrong"] = int(error.code)
    logging.disable(logging.NOTSET)

    found = instances_to_coco_json(to_instances(detections[max(detections)]), 12)
    out["coco json"] = json.dumps([{key: row[key] for key in sorted(row)} for row in found])
    return out
