"""The one place that knows the COCO evaluation packages.

pycocotools defines the numbers and is always there. hotcoco computes the same numbers, to the last bit, some
hundred times faster; it is optional. Both give arrays of precision and recall, which are summarised here,
because the summaries of the packages disagree once the limit on detections is not 100.
"""

import io
import math
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from warnings import catch_warnings, simplefilter

import numpy as np
from pycocotools import coco, cocoeval
from tabulate import tabulate

BOX_LIMITS = (1, 10, 100)
KEYPOINT_LIMITS = (20,)


@dataclass
class CocoMetrics:
    """Precision and recall of one evaluation; -1 marks cells without ground truth.

    Attributes:
        precision: (T, R, K, A, M): 10 IoU thresholds 0.50..0.95, 101 recalls, categories in the order
            of their ids, areas, limits on detections.
        recall: (T, K, A, M).
        areas: names of the areas, in the order of axis A.
        limits: detections an image and category, in the order of axis M.
    """

    precision: np.ndarray
    recall: np.ndarray
    areas: tuple[str, ...]
    limits: tuple[int, ...]

    def average(
        self, values: np.ndarray, area: str = "all", limit: int = -1, iou: int | None = None
    ) -> float:
        """Mean of `precision` or `recall` over what has ground truth, -1 if nothing has.

        Args:
            area: "all", "small", "medium" or "large".
            limit: index into `limits`.
            iou: index of one threshold (0 is 0.50, 5 is 0.75); by default all of them.
        """
        cells = values[..., self.areas.index(area), limit]
        cells = cells if iou is None else cells[iou]
        cells = cells[cells > -1]
        return float(np.mean(cells)) if cells.size else -1.0

    def rows(self) -> list[tuple[str, str, int, float]]:
        """The COCO summary in its order, each as (name, area, limit on detections, value in 0..1 or -1).

        12 rows for boxes and masks: AP, AP50, AP75, AP by area, AR by limit, AR by area. 10 rows for
        keypoints, where there is one limit and no small area: AR, AR50, AR75 in place of AR by limit.
        """
        last = len(self.limits) - 1
        rows = []
        for kind, values in (("AP", self.precision), ("AR", self.recall)):
            if kind == "AP" or last == 0:
                cells = [
                    (kind + suffix, "all", last, iou) for suffix, iou in (("", None), ("50", 0), ("75", 5))
                ]
            else:
                cells = [(kind, "all", limit, None) for limit in range(last + 1)]
            cells += [(kind, area, last, None) for area in self.areas[1:]]
            rows += [
                (name, area, self.limits[m], self.average(values, area, m, iou))
                for name, area, m, iou in cells
            ]
        return rows

    def stats(self) -> np.ndarray:
        """The values of `rows`."""
        return np.array([row[-1] for row in self.rows()])

    def __str__(self) -> str:
        return tabulate(self.rows(), headers=["metric", "area", "detections", "value"], floatfmt=".4f")


def load_annotations(path: str) -> coco.COCO:
    """The annotations in a COCO json file."""
    with redirect_stdout(io.StringIO()):
        return coco.COCO(path)


def _load_hotcoco():
    try:
        import hotcoco
    except ImportError:
        return None
    return hotcoco


def _are_ordinary_ids(ground_truth: coco.COCO) -> bool:
    """Whether both packages read the ids alike.

    hotcoco takes non-negative integers alone. pycocotools takes an object with the id 0 for "no match", and
    of objects with one id the last; such files get the numbers that they always got.
    """
    objects = ground_truth.dataset.get("annotations", ())
    ids = [*ground_truth.anns, *ground_truth.imgs]
    return (
        len(ground_truth.anns) == len(objects)
        and all(isinstance(i, int) and i >= 0 for i in ids)
        and 0 not in ground_truth.anns
    )


def _check_detections(ground_truth: coco.COCO, detections: list[dict]) -> None:
    for detection in detections:
        if detection["image_id"] not in ground_truth.imgs:
            raise ValueError(
                f"There are detections for image {detection['image_id']!r}, but no such annotated image."
            )
        if math.isnan(detection["score"]):
            raise ValueError(
                f"A detection in image {detection['image_id']!r} has a score that is not a number."
            )


def evaluate_coco(
    ground_truth: coco.COCO,
    detections: list[dict],
    iou_type: str,
    *,
    limits: Sequence[int] | None = None,
    oks_sigmas: Sequence[float] = (),
    img_ids: Sequence | None = None,
    fast: bool = True,
) -> CocoMetrics:
    """COCO precision and recall.

    Args:
        ground_truth: the annotations.
        detections: in COCO's result format, not empty. For "segm" the area comes from the mask, any "bbox"
            is ignored.
        iou_type: "bbox", "segm" or "keypoints".
        limits: increasing numbers of detections an image and category; by default 1, 10, 100 (20 for
            keypoints).
        oks_sigmas: for keypoints, the sigma of each; by default COCO's 17.
        img_ids: use these images only.
        fast: use hotcoco, if it is installed.

    Raises:
        ValueError: a detection in an image that has no annotations entry, or with a NaN score.
    """
    _check_detections(ground_truth, detections)
    # Copies, because pycocotools writes into the detections.
    unused = "bbox" if iou_type == "segm" else None
    detections = [{key: value for key, value in d.items() if key != unused} for d in detections]
    limits = tuple(limits or (KEYPOINT_LIMITS if iou_type == "keypoints" else BOX_LIMITS))

    hotcoco = _load_hotcoco() if fast and _are_ordinary_ids(ground_truth) else None
    with redirect_stdout(io.StringIO()), catch_warnings():
        # pycocotools prints its progress, hotcoco warns of parameters that are not COCO's.
        simplefilter("ignore", UserWarning)
        if hotcoco is not None:
            truth = hotcoco.COCO(ground_truth.dataset)
            run = hotcoco.COCOeval(truth, truth.loadRes(detections), iou_type)
        else:
            run = cocoeval.COCOeval(ground_truth, ground_truth.loadRes(detections), iou_type)
        run.params.maxDets = list(limits)
        if len(oks_sigmas):
            run.params.kpt_oks_sigmas = np.asarray(oks_sigmas, dtype=np.float64)
        if img_ids is not None:
            run.params.imgIds = list(img_ids)
        run.evaluate()
        run.accumulate()
    return CocoMetrics(
        precision=np.asarray(run.eval["precision"]),
        recall=np.asarray(run.eval["recall"]),
        areas=tuple(run.params.areaRngLbl),
        limits=limits,
    )
