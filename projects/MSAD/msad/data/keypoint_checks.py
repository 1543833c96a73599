"""Checks of keypoints in detectron2's dataset dicts and metadata."""

from __future__ import annotations

import math

from detectron2.data import MetadataCatalog

from ..finding import ERROR, WARNING
from .keypoints import sided_without_partner
from .needs import Needs
from .tally import Tally, shorten


def check_keypoint_metadata(tally: Tally, name: str, needs: Needs) -> None:
    """Number of keypoints, what a mirrored image exchanges, and the sigmas of the evaluation."""
    metadata = MetadataCatalog.get(name)
    names = metadata.get("keypoint_names")
    if names is None:
        fix = "add the list keypoints to the file's categories, or set MODEL.KEYPOINT_ON False"
        tally.add(ERROR, "is set, but the data set has no keypoint names in its metadata", "MODEL.KEYPOINT_ON", fix)
        return
    key = "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"
    if len(names) != needs.keypoints:
        reason = f"is {needs.keypoints}, but data set {name!r} has {len(names)} keypoints: {shorten(names)}"
        tally.add(ERROR, reason, key, f"set {key} {len(names)}")
    pairs = metadata.get("keypoint_flip_map") or ()
    if needs.training and needs.flips:
        given = metadata.get("keypoint_flip_pairs_given", bool(pairs))
        alone = sided_without_partner(names, pairs) if pairs or not given else []
        fix = (
            "set DATASETS.REGISTER[].KEYPOINT_FLIP_PAIRS ([] if there are none), or flip_idx in the data.yaml of YOLO, "
            "or INPUT.RANDOM_FLIP none"
        )
        if alone:
            reason = f"has keypoints of a side without a counterpart: {shorten(alone)}; a mirrored image would mislead"
            tally.add(WARNING if given else ERROR, reason, "it", fix)
        elif not pairs and not given:
            reason = f"has no pair of left and right, which mirrored images exchange, among {shorten(names)}"
            tally.add(WARNING, reason, "it", fix)
    sigmas = needs.sigmas or metadata.get("keypoint_oks_sigmas") or ()
    fix = "set TEST.KEYPOINT_OKS_SIGMAS, or DATASETS.REGISTER[].KEYPOINT_SIGMAS"
    if needs.testing and len(sigmas or range(17)) != len(names):
        reason = f"has {len(names)} keypoints and {len(sigmas)} OKS sigmas for evaluation"
        tally.add(ERROR, reason, "it", f"{fix}: {len(names)} numbers, e.g. {[0.05] * min(len(names), 3)}...")
    elif needs.testing and not sigmas and names[0] != "nose":
        tally.add(WARNING, "has no OKS sigmas: those of COCO's 17 body points are used", "it", fix)


def check_keypoints(tally: Tally, pairs: list[tuple[dict, dict]], needs: Needs) -> None:
    """Keypoints of all (record, annotation) pairs: absent, too few or many, not in pixels."""
    single = [(record, a) for record, a in pairs if not a.get("iscrowd") or needs.testing]
    add, wanted = tally.among(single), 3 * needs.keypoints
    without = [record for record, a in single if not a.get("keypoints")]
    if without:
        fix = "write 0, 0, 0 for every point that is not labelled, or remove these annotations"
        add(ERROR, "has no keypoints, and MODEL.KEYPOINT_ON is set", without[0], fix, count=len(without))
    other, fractions, outside = [], [], []
    for record, a in single:
        points = a.get("keypoints") or ()
        if len(points) != wanted and points:
            other.append((record, len(points) // 3))
        labelled = [(x, y) for x, y, v in zip(points[::3], points[1::3], points[2::3]) if v > 0]
        if labelled and max(map(max, labelled)) <= 1.5:  # half a pixel has been added
            fractions.append(record)
        width, height = record.get("width", math.inf), record.get("height", math.inf)
        if any(not (-1 <= x <= width + 1 and -1 <= y <= height + 1) for x, y in labelled):
            outside.append(record)
    if other:
        seen = f"has {other[0][1]} keypoints instead of {needs.keypoints}"
        add(ERROR, "has a wrong number of keypoints", other[0][0], "write all of them", seen, len(other))
    if fractions and 2 * len(fractions) > len(single):
        fix = "write keypoints in pixels of the image"
        add(ERROR, "has keypoints in fractions of the image", fractions[0], fix, count=len(fractions))
    if outside:
        level = ERROR if 2 * len(outside) > len(single) else WARNING
        fix = "see whether keypoints are x, y, visibility in pixels of the image"
        add(level, "has a labelled keypoint outside of its image", outside[0], fix, count=len(outside))
