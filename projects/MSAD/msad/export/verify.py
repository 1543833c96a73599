"""Whether an exported file finds what its model finds: compared once, before the file is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.modeling.postprocessing import detector_postprocess
from torch import Tensor, nn

from ..modeling.adapters import adapt
from .segmentation import check_scores

# Detections at a threshold may fall on either side of it.
LEAST_MATCHED = 0.95
# Probabilities of a mask; x and y of a keypoint in pixels, and its probability. Right graphs of small random networks
# were measured to be within 1e-6 and 1e-4.
LARGEST_APART = {"masks": 1e-4, "keypoints": (1e-2, 1e-2, 1e-4)}
# Objects that a check compares, where the model has so many.
FEWEST_FOUND = 20


def example_images(sizes: list[tuple[int, int]], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random blobs of these (height, width) as the inputs of a graph."""
    generator = torch.Generator().manual_seed(seed)
    height, width = (max(side) for side in zip(*sizes))
    coarse = torch.rand(len(sizes), 3, height // 16 + 1, width // 16 + 1, generator=generator) * 255
    images = F.interpolate(coarse, (height, width), mode="bilinear").permute(0, 2, 3, 1).to(torch.uint8)
    return images.contiguous(), torch.tensor(sizes)


def checked(make: Callable[[], bytes], check: Callable[..., None], detector: nn.Module) -> bytes:
    """The file that ``make`` gives, after ``check`` of it; with the arguments and errors of :func:`verify`.

    Where the detector finds too little in random images, the same graph is first made and checked with a lower score
    threshold, so that the check compares something.
    """
    lower = threshold_for_check(detector)
    if lower is not None:
        with score_threshold(detector, lower):
            check(make(), detector)
    content = make()
    check(content, detector, may_be_empty=lower is not None)
    return content


def threshold_for_check(detector: nn.Module) -> float | None:
    """A score threshold at which the detector finds at least FEWEST_FOUND objects in the images of :func:`verify`, or
    as many as it can; None if its own is low enough. It lies in a gap of the scores: rounding must not decide."""
    inputs = random_inputs()[2]
    with torch.no_grad():
        results = detector(inputs)
        if "sem_seg" in results[0] or sum(len(x["instances"]) for x in results) >= FEWEST_FOUND:
            return None
        with score_threshold(detector, 0.0):
            scores = torch.cat([x["instances"].scores for x in detector(inputs)]).sort(descending=True).values
    if len(scores) <= FEWEST_FOUND:
        return 0.0
    scores = scores[FEWEST_FOUND - 1 : 5 * FEWEST_FOUND]
    place = int((scores[:-1] / scores[1:]).argmax())
    return float(scores[place : place + 2].mean())


@contextmanager
def score_threshold(detector: nn.Module, value: float) -> Iterator[None]:
    """Within this context the score threshold of the detector is ``value``."""
    before = {x: x.test_score_thresh for x in detector.modules() if hasattr(x, "test_score_thresh")}
    try:
        for module in before:
            module.test_score_thresh = value
        yield
    finally:
        for module, own in before.items():
            module.test_score_thresh = own


def random_inputs() -> tuple[Tensor, Tensor, list[dict]]:
    """Images of three sizes, as inputs of a graph and as those of a model."""
    images, sizes = example_images([(150, 100), (70, 130), (97, 64)], seed=1)
    return images, sizes, [{"image": x[:h, :w].permute(2, 0, 1)} for x, (h, w) in zip(images, sizes.tolist())]


def verify(
    run: Callable[[Tensor, Tensor], list[np.ndarray]], detector: nn.Module, may_be_empty: bool = False
) -> None:
    """RuntimeError if an exported graph, ``run``, finds something else than the model itself in random images of three
    sizes. ``run`` takes images and sizes as :class:`DetectionGraph` does, and gives its outputs as arrays.

    Compared are boxes and classes, and of the objects that both find masks and keypoints. Unless ``may_be_empty``, it
    is an error too if there is nothing to compare.
    """
    images, sizes, inputs = random_inputs()
    values = run(images, sizes)
    with torch.no_grad():
        outputs = detector(inputs)
    if "sem_seg" in outputs[0]:
        return check_scores(values[0], [output["sem_seg"] for output in outputs])
    boxes = values[0]
    solid = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)  # the detector drops the others
    found = [value[solid] for value in values]
    results = [output["instances"] for output in outputs]
    columns = [(x.pred_boxes.tensor, x.scores, x.pred_classes, torch.full((len(x),), i)) for i, x in enumerate(results)]
    wanted = [torch.cat(column).numpy() for column in zip(*columns)]
    if len(found[0]) == len(wanted[0]) == 0:
        if may_be_empty:
            return
        raise RuntimeError("neither the file nor the model finds anything in random images: it cannot be checked")
    same, tied = matches(found[:4], wanted)
    shares = [(same.any(axis=1) | tied[0]).mean() if len(same) else 1.0]
    shares.append((same.any(axis=0) | tied[1]).mean() if len(wanted[0]) else 1.0)
    if min(shares) < LEAST_MATCHED:
        raise RuntimeError(
            f"the file finds {len(found[0])} objects in random images where the model finds {len(wanted[0])}; "
            f"{100 * min(shares):.0f} % are the same. The exported graph is wrong"
        )
    # Of objects that nearly coincide, the one with the nearest score.
    rows = np.flatnonzero(same.any(axis=1))
    columns = np.where(same, np.abs(found[1][:, None] - wanted[1]), np.inf)[rows].argmin(axis=1)
    names = [name for name in ("masks", "keypoints") if results[0].has(f"pred_{name}")]
    if names and not len(rows) and not may_be_empty:
        raise RuntimeError(f"the {names[0]} of no object can be compared in random images: they cannot be checked")
    for name, mine in zip(names, found[4:], strict=True):
        theirs = mask_probabilities(detector, inputs) if name == "masks" else [x.pred_keypoints for x in results]
        apart = np.abs(mine[rows] - torch.cat(theirs).numpy()[columns])
        share = (apart < LARGEST_APART[name]).reshape(len(rows), -1).all(axis=1).mean() if len(rows) else 1.0
        if share < LEAST_MATCHED:
            raise RuntimeError(
                f"of {len(rows)} objects that the file and the model find in random images, {100 * share:.0f} % have "
                f"the same {name}. The exported graph is wrong"
            )


@torch.no_grad()
def mask_probabilities(detector: nn.Module, inputs: list[dict]) -> list[Tensor]:
    """Of each image, (M, S, S) of the objects that the detector finds, inside their boxes."""
    if adapt(detector).two_stage:
        results = detector.inference(inputs, do_postprocess=False)
    else:
        images = detector.preprocess_image(inputs)
        features = detector.backbone(images.tensor)
        maps = [features[name] for name in detector.head_in_features]
        results = detector.forward_inference(images, maps, detector.head(maps))
    for found in results:
        found.probabilities = found.pred_masks[:, 0]
        found.remove("pred_masks")  # under this name they would be pasted into the image
    return [detector_postprocess(found, *found.image_size).probabilities for found in results]


def matches(some: list[np.ndarray], others: list[np.ndarray]) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Which of M detections (boxes, scores, classes, image) are which of L others, (M, L) bool: same image and class,
    nearly same box. And which of the M and of the L have the score of several on the other side, where rounding
    decides which of these survive."""
    same_image = some[3][:, None] == others[3]
    equal = same_image & (np.abs(some[1][:, None] - others[1]) < 1e-4)
    apart = np.abs(some[0][:, None] - others[0]).max(axis=2, initial=0.0)
    same = same_image & (some[2][:, None] == others[2]) & (apart < 0.1)
    return same, (equal.sum(axis=1) > 1, equal.sum(axis=0) > 1)
