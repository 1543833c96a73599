"""What can be wrong with a data set is said before training starts, not by a crash in the middle of it."""

import math
import numbers
from collections.abc import Iterable
from dataclasses import dataclass

from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

# Annotation tools round to whole pixels, so boxes overhang by up to one without anything being wrong.
_OVERHANG = 1.0


@dataclass(frozen=True)
class DatasetReport:
    """Counts of one data set; ``str()`` is the line for the log."""

    name: str
    images: int = 0
    instances: int = 0
    empty_images: int = 0  # without annotations, or with none that is usable
    degenerate: int = 0  # boxes without area or with non-finite numbers, dropped by clean()
    outside: int = 0  # boxes wholly outside the image, dropped by clean()
    clipped: int = 0  # boxes more than a pixel over the border; the mapper clips them

    def __str__(self) -> str:
        kept = self.instances - self.degenerate - self.outside
        return (
            f"data set {self.name!r}: {self.images} images ({self.empty_images} without instances), "
            f"{kept} of {self.instances} instances kept ({self.degenerate} degenerate and {self.outside} outside the "
            f"image dropped), {self.clipped} clipped to the image"
        )


def check_dataset(
    dicts: list[dict],
    name: str,
    num_classes: int | None,
    *,
    config_key: str = "MODEL.ROI_HEADS.NUM_CLASSES",
    num_keypoints: int | None = None,
    need_masks: bool = False,
) -> DatasetReport:
    """Check detectron2 dataset dicts against the model's configuration, and count what ``clean`` would change.

    Args:
        name: the registered name; its metadata's ``thing_classes`` and ``keypoint_names`` are compared.
        num_classes: number of classes of the model; None leaves out the comparison.
        config_key: where ``num_classes`` comes from, for the messages.
        num_keypoints: number of keypoints of the model, None for a model without.
        need_masks: the model trains on masks.

    Raises:
        ValueError: no images, wrong number of classes or keypoints, a class index out of range, no masks.
        FileNotFoundError: an image file does not exist (files are not opened).
    """
    if not dicts:
        raise ValueError(f"data set {name!r} is empty: no image (with annotations, if empty ones are filtered out)")
    _check_metadata(name, num_classes, config_key, num_keypoints)
    _check_instances(dicts, name, num_classes, config_key, need_masks)
    _check_files(dicts, name)

    counts = {"instances": 0, "empty_images": 0, "degenerate": 0, "outside": 0, "clipped": 0}
    for record in dicts:
        verdicts = [_judge(a, record) for a in record.get("annotations", ())]
        counts["instances"] += len(verdicts)
        counts["empty_images"] += not any(verdict in ("good", "clipped") for verdict in verdicts)
        for verdict in verdicts:
            if verdict != "good":
                counts[verdict] += 1
    return DatasetReport(name=name, images=len(dicts), **counts)


def clean(dicts: Iterable[dict], *, drop_empty: bool = False) -> list[dict]:
    """Dataset dicts without degenerate boxes and boxes wholly outside the image; the input is left as it is.

    Args:
        drop_empty: leave out images that have no instance (left).
    """
    cleaned = []
    for record in dicts:
        annotations = record.get("annotations")
        if annotations is not None:
            kept = [a for a in annotations if _judge(a, record) in ("good", "clipped")]
            if len(kept) < len(annotations):
                record = {**record, "annotations": kept}
        if record.get("annotations") or not drop_empty:
            cleaned.append(record)
    return cleaned


def _judge(annotation: dict, record: dict) -> str:
    """One of "good", "clipped", "degenerate", "outside"."""
    box, mode = annotation.get("bbox", ()), annotation.get("bbox_mode")
    if mode not in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS):
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


def _check_metadata(name: str, num_classes: int | None, config_key: str, num_keypoints: int | None) -> None:
    metadata = MetadataCatalog.get(name)
    classes = metadata.get("thing_classes")
    if classes is not None and num_classes is not None and len(classes) != num_classes:
        raise ValueError(
            f"{config_key} is {num_classes}, but data set {name!r} has {len(classes)} classes: {_shorten(classes)}"
        )
    if num_keypoints is not None:
        points = metadata.get("keypoint_names")
        if points is None:
            raise ValueError(f"MODEL.KEYPOINT_ON is set, but data set {name!r} has no keypoint names in its metadata")
        if len(points) != num_keypoints:
            raise ValueError(
                f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {num_keypoints}, "
                f"but data set {name!r} has {len(points)} keypoints: {_shorten(points)}"
            )


def _check_instances(dicts: list[dict], name: str, num_classes: int | None, config_key: str, need_masks: bool) -> None:
    instances = masks = 0
    for record in dicts:
        for annotation in record.get("annotations", ()):
            category = annotation.get("category_id")
            if num_classes is not None and not (isinstance(category, numbers.Integral) and 0 <= category < num_classes):
                raise ValueError(
                    f"data set {name!r}: class index {category!r} in the annotations of {record['file_name']}, "
                    f"but {config_key} is {num_classes}"
                )
            instances += 1
            masks += "segmentation" in annotation
    if need_masks and instances and not masks:
        raise ValueError(f"MODEL.MASK_ON is set, but none of the {instances} instances of data set {name!r} has a mask")


def _check_files(dicts: list[dict], name: str) -> None:
    missing = [record["file_name"] for record in dicts if not PathManager.isfile(record["file_name"])]
    if missing:
        raise FileNotFoundError(
            f"data set {name!r}: {len(missing)} of {len(dicts)} image files do not exist, the first is {missing[0]}"
        )


def _shorten(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(str, names[:8])) + (", ..." if len(names) > 8 else "")
