"""How large objects are where a model learns them and where it is tested, in pixels as it sees them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from statistics import geometric_mean, median

from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.structures import BoxMode

from ..config import detector_architecture
from ..finding import WARNING, Finding
from .low_res import FILE, reads_low_res, student_shift
from .record_checks import judge_box

_FAR = 1.45  # training at the sizes of H and L alike is 1.41 away from tests at one of them
_IMAGES = 500  # of a set that are looked at
_PLACES = [(i + 0.5) / 8 for i in range(8)]  # in the range of a random size


def check_scales(cfg: CfgNode, train: Sequence[dict], test: Sequence[dict], name: str) -> Iterator[Finding]:
    """Whether the objects of a test set have about the size that those of the training sets have.

    A student's yaml has the size of H for training and its own for tests, and without its teachers nothing makes
    training images smaller.

    Args:
        train, test: dataset dicts; images without a size or objects are passed over.
        name: of the test set.
    """
    if reads_low_res(cfg) and any(FILE in record for record in itertools.chain(train, test)):
        return  # of two files of an image, INPUT is about one or the other
    learned, tested = _object_sizes(cfg, train, training_scale), _object_sizes(cfg, test, test_scale)
    if not learned or not tested:
        return
    learned, tested = median(learned), median(tested)
    if max(learned, tested) <= _FAR * min(learned, tested):
        return
    size = cfg.INPUT
    crop = f", crops {size.CROP.TYPE} {list(size.CROP.SIZE)}" if _crops_the_file(cfg) else ""
    fix = "choose INPUT.MIN_SIZE_TRAIN and INPUT.MIN_SIZE_TEST so that both are alike"
    if not cfg.DISTILL.TEACHERS and learned > tested:
        fix += (". A student's training images are made smaller while DISTILL.TEACHERS has its teacher: to train it "
                "without distillation, leave that and set DISTILL.LOSSES to []")  # fmt: skip
    yield Finding(
        WARNING, f"data set {name!r}", f"the model sees objects of {tested:.0f} px in it (median side) and learns from "
        f"objects of {learned:.0f} px (INPUT.MIN_SIZE_TRAIN {list(size.MIN_SIZE_TRAIN)}{crop}; INPUT.MIN_SIZE_TEST "
        f"{size.MIN_SIZE_TEST})", fix,
    )  # fmt: skip


def training_scale(cfg: CfgNode, height: int, width: int) -> float:
    """Pixels that the model of a config sees in training for a pixel of a file of (height, width).

    That is the geometric mean over INPUT.MIN_SIZE_TRAIN and over random crops, where they are cut out of the file. A
    student's images are those of H, made smaller.
    """
    crops = _crops(cfg.INPUT.CROP, height, width) if _crops_the_file(cfg) else [(height, width)]
    size = cfg.INPUT
    scales = [_scale(side, size.MAX_SIZE_TRAIN, *crop) for side in size.MIN_SIZE_TRAIN for crop in crops]
    smaller = 2 ** student_shift(cfg) if cfg.DISTILL.TEACHERS else 1
    return geometric_mean(scales) / smaller


def test_scale(cfg: CfgNode, height: int, width: int) -> float:
    """Pixels that the model of a config sees in tests for a pixel of a file of (height, width)."""
    return _scale(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, height, width)


def _object_sizes(cfg: CfgNode, records: Sequence[dict], scale: Callable[[CfgNode, int, int], float]) -> list[float]:
    """Square roots of the areas of boxes as the model sees them, in pixels."""
    sizes = []
    for record in records[:: len(records) // _IMAGES + 1]:
        boxes = [
            BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYWH_ABS)
            for a in record.get("annotations", ())
            if a.get("bbox_mode") in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS) and not a.get("iscrowd")
            and judge_box(a, record) in ("good", "clipped")
        ]  # fmt: skip
        if boxes and "height" in record and "width" in record:
            factor = scale(cfg, record["height"], record["width"])
            sizes += [factor * (width * height) ** 0.5 for _, _, width, height in boxes]
    return sizes


def _scale(short_side: int, longest: int, height: int, width: int) -> float:
    """A short side of 0 leaves the image as it is."""
    return T.ResizeShortestEdge.get_output_shape(height, width, short_side, longest)[0] / height if short_side else 1.0


def _crops_the_file(cfg: CfgNode) -> bool:
    """Crops of detectors are cut out of the file and resized then, those of segmentors have their size at last."""
    return cfg.INPUT.CROP.ENABLED and detector_architecture(cfg) != "SemanticSegmentor"


def _crops(crop: CfgNode, height: int, width: int) -> list[tuple[int, int]]:
    """(height, width) of crops, by the types of detectron2's RandomCrop; of random sizes a grid of them."""
    first, second = crop.SIZE
    if crop.TYPE == "relative":
        return [(round(height * first), round(width * second))]
    if crop.TYPE == "absolute":
        return [(min(height, first), min(width, second))]
    if crop.TYPE == "relative_range":
        least, greatest = (height * first, width * second), (height, width)
    else:
        least, greatest = ([min(side, bound) for side in (height, width)] for bound in (first, second))
    return [
        tuple(round(low + (high - low) * place) for low, high, place in zip(least, greatest, places))
        for places in itertools.product(_PLACES, repeat=2)
    ]
