"""Checks of detectron2's dataset dicts against what a model needs: classes, boxes, masks, keypoints."""

from __future__ import annotations

import math
import numbers
from collections import Counter

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode

from ..finding import ERROR, OK, WARNING, Finding
from .box_conventions import likely_convention, mask_extents, overlap
from .keypoint_checks import check_keypoint_metadata, check_keypoints
from .needs import Needs
from .sampling import at_equal_distances
from .sem_seg import is_segmentation
from .tally import Tally, shorten

# Annotation tools round to whole pixels, so boxes overhang by up to one without anything being wrong.
_OVERHANG = 1.0
# Boxes that are compared with their polygons.
_SAMPLE = 2000
_MODES = (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)


def judge_box(annotation: dict, record: dict) -> str:
    """One of "good", "clipped" (the mapper clips it to the image), "degenerate", "outside" (both are of no use)."""
    box, mode = annotation.get("bbox", ()), annotation.get("bbox_mode")
    if mode not in _MODES:
        return "good"  # other modes are left to the mapper that asked for them
    if len(box) != 4 or not all(math.isfinite(v) for v in box):
        return "degenerate"
    x0, y0, x1, y1 = box
    if mode == BoxMode.XYWH_ABS:
        x1, y1 = x0 + x1, y0 + y1
    if x1 <= x0 or y1 <= y0:
        return "degenerate"
    width, height = record.get("width", math.inf), record.get("height", math.inf)
    if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
        return "outside"
    if min(x0, y0) < -_OVERHANG or x1 > width + _OVERHANG or y1 > height + _OVERHANG:
        return "clipped"
    return "good"


def classes_of(name: str) -> list[str] | None:
    """Names of the classes of a registered data set: those of things, or of the label maps if it has only these."""
    metadata = MetadataCatalog.get(name)
    return metadata.get("thing_classes") or metadata.get("stuff_classes")


def check_records(records: list[dict], name: str, needs: Needs) -> list[Finding]:
    """Everything that can be said about a data set's dicts without looking at its images.

    Args:
        name: the registered name, whose metadata's classes and keypoints are compared.
    """
    tally = Tally(f"data set {name!r}")
    if not records:
        tally.add(ERROR, "is empty: it has no images", "it", "list images in its file, or name another")
        return tally.findings()
    classes = classes_of(name)
    if classes is not None and needs.classes is not None and len(classes) != needs.classes:
        reason = f"is {needs.classes}, but data set {name!r} has {len(classes)} classes: {shorten(classes)}"
        tally.add(ERROR, reason, needs.config_key, f"set {needs.config_key} {len(classes)}")
    pairs = [(record, a) for record in records for a in record.get("annotations", ())]
    if pairs:
        if (needs.training or needs.losses) and (bare := [r for r in records if "annotations" not in r]):
            seen = f"has no list of annotations, which {len(records) - len(bare)} of {len(records)} images have"
            fix = "give images without objects an empty list, and leave out those that are not labelled"
            tally.add(ERROR, seen, str(bare[0]["file_name"]), fix)
        _check_classes(tally, pairs, needs, classes)
        _check_boxes(tally, records, pairs, needs)
        if needs.masks:
            _check_masks(tally, pairs, needs)
    elif is_segmentation(records):  # the labels are looked at where the set is loaded
        tally.add(OK, f"{len(records)} images with label maps", "", "")
        ignored, key = MetadataCatalog.get(name).get("ignore_label"), "MODEL.SEM_SEG_HEAD.IGNORE_VALUE"
        if (needs.training or needs.losses) and ignored not in (None, needs.ignored):
            reason = f"is {needs.ignored}, but the label of data set {name!r} that does not count is {ignored}"
            tally.add(ERROR, reason, key, f"set {key} {ignored}")
    elif needs.classes is not None and needs.training:
        tally.add(ERROR, "has no annotations", "it", "train on a set that has some")
    elif needs.losses:
        reason = "has no annotations, which the losses of TEST.LOSS_IMAGES need"
        tally.add(ERROR, reason, "it", "set TEST.LOSS_IMAGES 0, or test on a set that has some")
    elif needs.classes is not None:
        tally.add(WARNING, "has no annotations: detections are written, AP is not computed", "it", "")
    if needs.keypoints is not None:
        check_keypoint_metadata(tally, name, needs)
        check_keypoints(tally, pairs, needs)
    return tally.findings()


def _check_classes(tally: Tally, pairs: list[tuple[dict, dict]], needs: Needs, classes: list[str] | None) -> None:
    add, used = tally.among(pairs), set()
    for record, a in pairs:
        category = a.get("category_id")
        if isinstance(category, numbers.Integral) and (needs.classes is None or 0 <= category < needs.classes):
            used.add(category)
        elif needs.classes is not None:
            seen = f"has the class index {category!r}, but {needs.config_key} is {needs.classes}"
            add(ERROR, "has a wrong class index", record, "correct the categories, or the number of classes", seen)
    unused = [c for i, c in enumerate(classes or ()) if i not in used]
    if unused and used:
        level, fix = (WARNING, "remove the classes, or add data") if needs.training else (OK, "")
        tally.add(level, f"never has {len(unused)} of its {len(classes)} classes: {shorten(unused)}", "it", fix)
    crowds = sum(bool(a.get("iscrowd")) for _, a in pairs)
    if crowds and needs.training:
        level = ERROR if crowds == len(pairs) else WARNING if 2 * crowds > len(pairs) else OK
        reason = f"has iscrowd 1 in {crowds} of {len(pairs)} annotations, which are not trained on"
        tally.add(level, reason, "it", "" if level == OK else "write iscrowd 0 for single objects")


def _check_boxes(tally: Tally, records: list[dict], pairs: list[tuple[dict, dict]], needs: Needs) -> None:
    add, counts, first, empty = tally.among(pairs), Counter(), {}, 0
    for record in records:
        verdicts = [judge_box(a, record) for a in record.get("annotations", ())]
        empty += not any(verdict in ("good", "clipped") for verdict in verdicts)
        counts.update(verdicts)
        for verdict in verdicts:
            first.setdefault(verdict, record)
    dropped, kept = counts["degenerate"] + counts["outside"], counts["good"] + counts["clipped"]
    text = (
        f"{len(records)} images ({empty} without instances), {kept} of {len(pairs)} instances kept "
        f"({counts['degenerate']} degenerate and {counts['outside']} outside the image dropped), "
        f"{counts['clipped']} clipped to the image"
    )
    tally.add(OK, text, "", "")
    _check_convention(tally, pairs)
    for verdict, reason in (("degenerate", "has no area or is not finite"), ("outside", "is outside of the image")):
        if counts[verdict]:
            level, fix = (ERROR if 2 * dropped >= len(pairs) else WARNING), "correct the box, or remove the annotation"
            uses = ["training leaves it out"] * needs.training + ["it can never be found"] * needs.testing
            add(level, f"has a box that {reason}; {' and '.join(uses)}", first[verdict], fix, count=counts[verdict])
    if 2 * counts["clipped"] >= len(pairs) > 2 * dropped:
        fix = "see whether boxes belong to images of another size"
        add(WARNING, "has a box over the border of its image", first["clipped"], fix, count=counts["clipped"])
    rows = Counter((id(r), a.get("category_id"), *a.get("bbox", ())) for r, a in pairs if not a.get("iscrowd"))
    twice = sum(count - 1 for count in rows.values())
    if twice:
        keys = set()
        record = next(
            r for r, a in pairs if (key := (id(r), a.get("category_id"), *a.get("bbox", ()))) in keys or keys.add(key)
        )
        add(WARNING, "has the class and box of another one of the image", record, "remove the second", count=twice)


def _check_convention(tally: Tally, pairs: list[tuple[dict, dict]]) -> None:
    """Boxes that are not x, y, width, height in pixels, by where they end and by the masks."""
    add = tally.among(pairs)
    chosen = [
        (record, a)
        for record, a in pairs
        if a.get("bbox_mode") == BoxMode.XYWH_ABS and len(a["bbox"]) == 4 and "width" in record and "height" in record
    ]
    boxes = np.array([a["bbox"] for _, a in chosen], dtype=float).reshape(-1, 4)
    finite = np.isfinite(boxes).all(axis=1)
    chosen, boxes = [pair for pair, good in zip(chosen, finite) if good], boxes[finite]
    sizes = np.array([(record["width"], record["height"]) for record, _ in chosen], dtype=float).reshape(-1, 2)
    fix = "write bbox: [x, y, width, height] in pixels of the image"
    convention = likely_convention(boxes, sizes)
    if convention is not None:
        name, share = convention
        seen = f"has bbox {chosen[0][1]['bbox']}; boxes look like {name}, not x, y, width, height"
        level = ERROR if share >= 0.2 else WARNING
        add(level, "boxes of another convention", chosen[0][0], fix, seen, round(share * len(chosen)))
        return
    masked = [i for i, (_, a) in enumerate(chosen) if isinstance(a.get("segmentation"), list) and a["segmentation"]]
    masked = at_equal_distances(masked, _SAMPLE)
    if not masked:
        return
    extents = np.array([mask_extents(chosen[i][1]["segmentation"]) for i in masked])
    boxes, corners = boxes[masked], np.concatenate([boxes[masked, :2], boxes[masked, :2] + boxes[masked, 2:]], axis=1)
    away = overlap(corners, extents) < 0.5
    if 2 * away.sum() > len(masked):
        record, a = chosen[masked[int(away.argmax())]]
        corner = (overlap(boxes, extents) > 0.9).mean() > 0.9
        what = "boxes are corners x0, y0, x1, y1" if corner else "boxes and polygons do not belong together"
        seen = f"has bbox {a['bbox']} and polygons from {extents[away.argmax()].tolist()}; {what}"
        add(ERROR if corner else WARNING, "boxes that are not around their masks", record, fix, seen, int(away.sum()))


def _check_masks(tally: Tally, pairs: list[tuple[dict, dict]], needs: Needs) -> None:
    single = [(record, a) for record, a in pairs if not a.get("iscrowd") or needs.testing]
    add = tally.among(single)
    without = [record for record, a in single if not a.get("segmentation")]
    if single and len(without) == len(single):
        tally.add(
            ERROR,
            f"has no mask in any of its {len(single)} instances, and MODEL.MASK_ON is set",
            "it",
            "set MODEL.MASK_ON False",
        )
        return
    if without:
        fix = "add the masks, remove these annotations, or set MODEL.MASK_ON False"
        add(ERROR, "has no mask, and MODEL.MASK_ON is set", without[0], fix, count=len(without))
    learned = [(record, a) for record, a in single if not a.get("iscrowd")]
    encoded = [record for record, a in learned if isinstance(a.get("segmentation"), dict)]
    if encoded and (needs.training or needs.losses) and needs.mask_format == "polygon":
        reason = "has a run-length mask, and INPUT.MASK_FORMAT is polygon"
        add(ERROR, reason, encoded[0], "set INPUT.MASK_FORMAT bitmask", count=len(encoded))
    looked_at = [a.get("segmentation") for _, a in at_equal_distances(single, _SAMPLE)]
    polygons = [p for outline in looked_at if isinstance(outline, list) for p in outline]
    if polygons and all(min(p) >= 0 and max(p) <= 1 for p in polygons):
        fix = "write polygons in pixels of the image"
        add(ERROR, "has polygons in fractions of the image", single[0][0], fix, count=len(single))
