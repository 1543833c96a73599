"""COCO metrics of a model's detections (average precision of boxes, masks, keypoints) and proposals (recall)."""

import json
import logging
import os
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import pycocotools.mask as mask_util
import torch
from tabulate import tabulate

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_json
from detectron2.structures import BoxMode, Instances
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import create_small_table

from .evaluator import DatasetEvaluator
from .fast_coco import BOX_LIMITS, CocoMetrics, evaluate_coco, load_annotations
from .proposals import proposal_recall, save_proposals

__all__ = ["COCOEvaluator"]

METRICS = {
    "bbox": ["AP", "AP50", "AP75", "APs", "APm", "APl"],
    "segm": ["AP", "AP50", "AP75", "APs", "APm", "APl"],
    "keypoints": ["AP", "AP50", "AP75", "APm", "APl"],
}


class COCOEvaluator(DatasetEvaluator):
    """COCO average precision, and recall of proposals, 0 to 100, NaN where it cannot be computed.

    Args:
        dataset_name: a registered data set. Its metadata has `json_file`, COCO annotations; if not, the
            data set is converted to such a file in `output_dir`.
        tasks: from "bbox", "segm", "keypoints"; by default bbox and whatever else the predictions have. Older code
            gives a config here: it means the default, and the config has the sigmas if `kpt_oks_sigmas` does not.
        distributed: gather the predictions of all processes; otherwise each evaluates its own.
        output_dir: gets instances_predictions.pth (`torch.load`) and coco_instances_results.json (COCO's
            result format); of proposals box_proposals.pkl. By default nothing is written.
        max_dets_per_image: limit on boxes and masks an image and category, for AP; by default 100.
            COCO's other two limits (1 and 10, for AR) stay, so that values below 10 act as 10.
            Keypoints keep COCO's limit, 20.
        use_fast_impl: use hotcoco, if it is installed; the numbers are the same.
        kpt_oks_sigmas: for keypoints, the sigma of each; by default COCO's 17.
        allow_cached_coco: an annotation file from an earlier conversion may be used again.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | CfgNode | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        max_dets_per_image: int | None = None,
        use_fast_impl: bool = True,
        kpt_oks_sigmas: Sequence[float] = (),
        allow_cached_coco: bool = True,
    ) -> None:
        self._logger = logging.getLogger(__name__)
        self._oks_sigmas = list(kpt_oks_sigmas)
        if isinstance(tasks, CfgNode):
            self._logger.warning("COCOEvaluator(name, cfg, ...) is deprecated: give it tasks and kpt_oks_sigmas.")
            self._oks_sigmas = self._oks_sigmas or list(tasks.TEST.KEYPOINT_OKS_SIGMAS)
            tasks = None
        unknown = sorted(set(tasks or ()) - set(METRICS))
        if unknown:
            raise ValueError(f"COCOEvaluator has no task {unknown[0]!r}; the tasks are {', '.join(METRICS)}.")
        self._tasks = tuple(tasks) if tasks is not None else None
        self._distributed = distributed
        self._output_dir = output_dir
        self._use_fast_impl = use_fast_impl
        self._limits = sorted([*BOX_LIMITS[:2], max_dets_per_image or BOX_LIMITS[2]])
        self._cpu = torch.device("cpu")

        self._metadata = MetadataCatalog.get(dataset_name)
        if not hasattr(self._metadata, "json_file"):
            if not output_dir:
                raise ValueError(f"{dataset_name!r} has no json_file; its conversion needs output_dir.")
            path = os.path.join(output_dir, f"{dataset_name}_coco_format.json")
            convert_to_coco_json(dataset_name, path, allow_cached=allow_cached_coco)
            self._metadata.json_file = path
        self._coco_api = load_annotations(PathManager.get_local_path(self._metadata.json_file))
        # Test sets are published without annotations; then only files are written.
        self._do_evaluation = "annotations" in self._coco_api.dataset
        self.reset()

    def reset(self) -> None:
        self._predictions: list[dict] = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Take the detections or proposals of a batch.

        Args:
            inputs: each with "image_id", that of the annotations.
            outputs: each with "instances": pred_boxes (pixels of the image in the annotations), scores,
                pred_classes and, where there are such, pred_masks and pred_keypoints; or "proposals":
                proposal_boxes, objectness_logits; or both.
        """
        for item, output in zip(inputs, outputs):
            image = item["image_id"]
            found = {kind: output[kind].to(self._cpu) for kind in ("instances", "proposals") if kind in output}
            if "instances" in found:
                found["instances"] = instances_to_coco_json(found["instances"], image)
            self._predictions += [{"image_id": image, **found}] if found else []

    def evaluate(self, img_ids: Sequence | None = None) -> OrderedDict | None:
        """The metrics.

        Args:
            img_ids: evaluate on these images; by default on all in the annotations.

        Returns:
            {task: {metric: value}}; per category as "AP-<name>", if there are several. Proposals are the task
            "box_proposals", on all images. Empty without any prediction. None in processes other than the main one.
        """
        predictions = self._predictions
        if self._distributed:
            comm.synchronize()
            predictions = [one for part in comm.gather(predictions, dst=0) for one in part]
            if not comm.is_main_process():
                return None
        if not predictions:
            self._logger.warning("COCOEvaluator has got not a single prediction.")
            return OrderedDict()
        # One order for any number of processes.
        predictions = sorted(predictions, key=lambda prediction: prediction["image_id"])
        if self._output_dir:
            PathManager.mkdirs(self._output_dir)
            with PathManager.open(os.path.join(self._output_dir, "instances_predictions.pth"), "wb") as f:
                torch.save(predictions, f)
        kinds = predictions[0].keys()
        recalls = self._evaluate_proposals(predictions) if "proposals" in kinds else {}
        return OrderedDict(recalls, **(self._evaluate_instances(predictions, img_ids) if "instances" in kinds else {}))

    def _evaluate_proposals(self, predictions: list[dict]) -> dict[str, dict[str, float]]:
        if self._output_dir:
            save_proposals(predictions, os.path.join(self._output_dir, "box_proposals.pkl"))
        if not self._do_evaluation:
            self._logger.info("%s has no annotations: nothing to evaluate.", self._metadata.json_file)
            return {}
        recalls = proposal_recall(self._coco_api, predictions)
        self._logger.info("Recall of proposals:\n%s", create_small_table(recalls))
        return {"box_proposals": recalls}

    def _evaluate_instances(self, predictions: list[dict], img_ids: Sequence | None) -> OrderedDict:
        detections = self._with_dataset_categories(predictions)
        if self._output_dir:
            path = os.path.join(self._output_dir, "coco_instances_results.json")
            self._logger.info("Writing %d detections to %s", len(detections), path)
            with PathManager.open(path, "w") as f:
                json.dump(detections, f)
        results: OrderedDict = OrderedDict()
        if not self._do_evaluation:
            self._logger.info("%s has no annotations: nothing to evaluate.", self._metadata.json_file)
            return results
        for task in sorted(self._tasks or _tasks_in(detections)):
            metrics = None
            if detections:
                self._check_task(task, detections)
                metrics = evaluate_coco(
                    self._coco_api,
                    detections,
                    task,
                    limits=None if task == "keypoints" else self._limits,
                    oks_sigmas=self._oks_sigmas if task == "keypoints" else (),
                    img_ids=img_ids,
                    fast=self._use_fast_impl,
                )
            results[task] = self._summarize(task, metrics)
        return results

    def _with_dataset_categories(self, predictions: list[dict]) -> list[dict]:
        """All detections, with the category ids of the annotation file."""
        detections = [dict(d) for prediction in predictions for d in prediction["instances"]]
        to_contiguous = getattr(self._metadata, "thing_dataset_id_to_contiguous_id", None)
        if to_contiguous is None:
            return detections
        to_dataset = {contiguous: dataset_id for dataset_id, contiguous in to_contiguous.items()}
        for detection in detections:
            category = detection["category_id"]
            if category not in to_dataset:
                raise ValueError(
                    f"A detection in image {detection['image_id']} has class {category}, but the data set "
                    f"{self._metadata.name!r} has the {len(to_dataset)} classes 0..{len(to_dataset) - 1}."
                )
            detection["category_id"] = to_dataset[category]
        return detections

    def _check_task(self, task: str, detections: list[dict]) -> None:
        field = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}[task]
        if field not in detections[0]:
            raise ValueError(f"Task {task!r} was asked for, but the predictions have no {field}.")
        if task == "keypoints":
            found = len(detections[0]["keypoints"]) // 3
            expected = len(self._oks_sigmas) or 17
            if found != expected:
                raise ValueError(
                    f"The predictions have {found} keypoints, but there are OKS sigmas for {expected}: "
                    "set kpt_oks_sigmas (TEST.KEYPOINT_OKS_SIGMAS)."
                )

    def _summarize(self, task: str, metrics: CocoMetrics | None) -> dict[str, float]:
        names = METRICS[task]
        if metrics is None:
            self._logger.warning("The model has not detected anything: %s metrics are NaN.", task)
            return dict.fromkeys(names, float("nan"))
        self._logger.info("COCO summary for %s:\n%s", task, metrics)
        results = {name: _percent(value) for name, value in zip(names, metrics.stats())}
        self._logger.info("Results for %s:\n%s", task, create_small_table(results))

        classes = self._metadata.get("thing_classes")
        if classes is None or len(classes) <= 1:
            return results
        if len(classes) != metrics.precision.shape[2]:
            raise ValueError(
                f"{self._metadata.name!r} has {len(classes)} thing_classes, "
                f"its annotation file {metrics.precision.shape[2]} categories."
            )
        per_class = {
            name: _percent(metrics.average(metrics.precision[:, :, index]))
            for index, name in enumerate(classes)
        }
        self._logger.info("AP for %s by category:\n%s", task, _class_table(per_class))
        results.update({f"AP-{name}": value for name, value in per_class.items()})
        return results


def _tasks_in(detections: list[dict]) -> list[str]:
    present = {key for detection in detections for key in detection}
    return ["bbox"] + [
        t for t, key in (("segm", "segmentation"), ("keypoints", "keypoints")) if key in present
    ]


def _percent(value: float) -> float:
    return value * 100 if value >= 0 else float("nan")


def _class_table(per_class: dict[str, float], pairs: int = 3) -> str:
    cells = [cell for name, value in per_class.items() for cell in (name, f"{value:.3f}")]
    width = 2 * min(pairs, len(per_class))
    rows = [cells[start : start + width] for start in range(0, len(cells), width)]
    return tabulate(rows, headers=["category", "AP"] * (width // 2), tablefmt="pipe", numalign="left")


def instances_to_coco_json(instances: Instances, img_id) -> list[dict]:
    """Detections of one image in COCO's result format.

    Args:
        instances: on the CPU, with pred_boxes, scores, pred_classes and, optionally, pred_masks
            (N, H, W) bool and pred_keypoints (N, K, 3), all in pixels of the image.
        img_id: id of the image.

    Returns:
        A dict a detection; "bbox" is [x, y, width, height], "segmentation" a compressed RLE, "keypoints"
        x, y, score K times.
    """
    count = len(instances)
    if count == 0:
        return []
    boxes = BoxMode.convert(instances.pred_boxes.tensor.numpy(), BoxMode.XYXY_ABS, BoxMode.XYWH_ABS).tolist()
    columns = {
        "category_id": instances.pred_classes.tolist(),
        "bbox": boxes,
        "score": instances.scores.tolist(),
    }
    if instances.has("pred_masks"):
        columns["segmentation"] = [_encode(mask) for mask in instances.pred_masks]
    if instances.has("pred_keypoints"):
        keypoints = instances.pred_keypoints.clone()
        # Predictions are continuous, COCO's annotations are pixel indices: the middle of a pixel is 0 there.
        keypoints[:, :, :2] -= 0.5
        columns["keypoints"] = keypoints.flatten(1).tolist()
    return [
        {"image_id": img_id, **{name: values[index] for name, values in columns.items()}}
        for index in range(count)
    ]


def _encode(mask: torch.Tensor) -> dict:
    rle = mask_util.encode(np.asfortranarray(mask.numpy(), dtype=np.uint8))
    # Bytes do not go into json.
    rle["counts"] = rle["counts"].decode("ascii")
    return rle
