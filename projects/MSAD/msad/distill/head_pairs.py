"""Pairs the head predictions of a student and its teacher for the losses that ask for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.structures import Boxes, Instances
from torch import nn

from ..modeling.adapters import adapt
from ..modeling.detectors import atss
from ..modeling.detectors.dense import SURELY_BACKGROUND, mean_of_processes
from ..modeling.detectors.distribution import DistributionTransform
from ..modeling.head_outputs import (
    DENSE,
    ROI,
    RPN,
    Head,
    HeadRecord,
    box_code,
    cell_anchors,
    coordinates,
    decode,
    prediction_size,
    proposal_targets,
)
from ..resolution import shift_names
from .context import Features, HeadPair


def head_kind(detector: nn.Module) -> str:
    """What losses declare in ``heads``: "distributions" (GFL), "dense" (RetinaNet, FCOS) or "rcnn"."""
    head = adapt(detector).heads().get(DENSE)
    if head is None:
        return "rcnn"
    return "distributions" if isinstance(head.owner.box2box_transform, DistributionTransform) else "dense"


def check_kind(detector: nn.Module, side: str, kinds: tuple[str, ...], loss: str) -> None:
    """ValueError if a loss cannot compare heads of the kind that ``detector`` has."""
    if head_kind(detector) not in kinds:
        raise ValueError(
            f"DISTILL.LOSSES: {loss} compares the predictions of {' or '.join(kinds)} heads; "
            f"the {side} {type(detector).__name__} has {head_kind(detector)}"
        )


def check_heads(student: nn.Module, teacher: nn.Module, shift: int, kinds: tuple[str, ...], loss: str) -> None:
    """Make sure that student (at ``shift``) and teacher (H frame) predict the same things for the same anchors.

    Raises:
        ValueError: another kind of heads than ``kinds``, or heads that differ in kind, levels, classes, box encoding
            or anchors; names the loss and both sides.
    """
    both = {"student": student, "teacher": teacher}
    for side, detector in both.items():
        check_kind(detector, side, kinds, loss)
    ours, theirs = (adapt(detector).heads() for detector in both.values())
    if ours.keys() != theirs.keys():
        names = " and ".join(f"a {type(detector).__name__} {side}" for side, detector in both.items())
        raise ValueError(f"DISTILL.LOSSES: {loss} needs heads of one kind, not those of {names}")
    for name, s in ours.items():
        t = theirs[name]
        differing = {
            "levels (H frame)": (shift_names(s.levels, shift), t.levels),
            "classes": (s.classes, t.classes),
            "box encoding": (box_code(s), box_code(t)),
        }
        if not name.startswith(ROI):
            scale = float(2**shift)
            rounded = ([(scale * x).tolist() for x in cell_anchors(s)], [x.tolist() for x in cell_anchors(t)])
            if not _nearly_equal(*rounded):
                differing["anchors (H pixels)"] = rounded
            differing["offset of the anchors"] = tuple(x.owner.anchor_generator.offset for x in (s, t))
        else:
            del differing["levels (H frame)"]  # every proposal finds its level in either pyramid
        for what, (a, b) in differing.items():
            if a != b:
                raise ValueError(
                    f"DISTILL.LOSSES: {loss} needs equal {what} in the {name} heads; student: {a}, teacher: {b}"
                )


def _nearly_equal(a: list, b: list) -> bool:
    if len(a) != len(b) or [len(x) for x in a] != [len(x) for x in b]:
        return False
    return all(torch.allclose(torch.tensor(x), torch.tensor(y), atol=0.5, rtol=0.01) for x, y in zip(a, b))


def _rows(levels: list[torch.Tensor], width: int) -> torch.Tensor:
    """(N, A width, h, w) of each level -> (N, R, width) in the order of detectron2's anchors."""
    if all(x.shape[1] == width for x in levels):  # one anchor a location: one copy instead of two
        return torch.cat([x.flatten(2) for x in levels], dim=2).transpose(1, 2)
    return torch.cat([permute_to_N_HWA_K(x, width) for x in levels], dim=1)


def _count_positives(student: nn.Module, labels: torch.Tensor, classes: int) -> float | torch.Tensor:
    """What the losses of a dense detector were divided by in this step: a running count of its own, as RetinaNet and
    FCOS keep, or the mean over processes, in which an image of RepPoints has at least one.

    Args:
        labels: (N, R), class indices of positives.
    """
    running = vars(student).get("loss_normalizer")
    if running is not None:
        return running
    counts = ((labels >= 0) & (labels < classes)).flatten(1).sum(dim=1)
    return mean_of_processes(counts.clamp(min=getattr(student, "least_positives", 0)).sum().float())


def pair_heads(
    record: HeadRecord,
    student: nn.Module,
    source: nn.Module,
    run_head: Callable[[str, Features, list[Boxes]], tuple],
    features: Features,
    shift: int,
) -> list[HeadPair]:
    """One pair a head.

    Args:
        record: of the student's step.
        source: the detector whose heads run_head runs.
        run_head: name of a head, features and boxes (H pixels) of each image -> the source's output.
        features: of the source, H-frame names, on the student's grid.
        shift: of the student.
    """
    pairs, theirs = [], adapt(source).heads()
    for name, head in adapt(student).heads().items():
        transform = head.owner.box2box_transform
        both = (side.owner.box2box_transform for side in (head, theirs[name]))
        known = {
            "name": name, "classes": head.classes, "encode": transform.get_deltas, "decode": partial(decode, transform),
            "coordinates": tuple(partial(coordinates, of_side) for of_side in both),
        }  # fmt: skip
        ours, run = record.outputs[name], partial(run_head, name, features)
        if name.startswith(ROI):
            (_, proposals, *_), _ = record.assigned[name]
            pairs.append(_region_pair(known, head, ours, proposals, run, 2**shift))
        else:
            pairs.append(_dense_pair(known, head, ours, record.assigned[name], run, 2**shift, student))
    return pairs


def _region_pair(
    known: dict, head: Head, ours: tuple, proposals: list[Instances], run: Callable, scale: int
) -> HeadPair:
    """Of a head on proposals, all in one "image"; ``known`` is what pairs of both kinds have."""
    with torch.no_grad():
        theirs = run([Boxes(p.proposal_boxes.tensor * scale) for p in proposals])
    anchors, labels, targets = proposal_targets(proposals)
    return HeadPair(
        student_logits=ours[0][None], teacher_logits=theirs[0][None],
        student_boxes=ours[head.boxes][None], teacher_boxes=theirs[head.boxes][None],
        labels=labels[None], targets=targets[None] * scale, anchors=anchors * scale, level_sizes=[len(anchors)],
        **known,
    )  # fmt: skip


def _dense_pair(
    known: dict, head: Head, ours: tuple, assigned: tuple, run: Callable, scale: int, student: nn.Module
) -> HeadPair:
    """Of a dense detector or an RPN; ``known`` is what pairs of both kinds have."""
    (levels, *_), (labels, targets, *_) = assigned  # MEInst assigns codes too
    labels, targets = torch.stack(list(labels)), torch.stack(list(targets))
    if known["name"] == RPN:  # 1 object, 0 background, -1 not drawn
        labels = torch.where(labels < 0, -1, 1 - labels.long())
    with torch.no_grad():
        theirs = run([])
    width = prediction_size(head.owner.box2box_transform)
    logits, boxes = ([_rows(side[i], size) for side in (ours, theirs)]
                     for i, size in ((0, head.classes), (head.boxes, width)))  # fmt: skip
    in_regions = logits[0][..., 0] == SURELY_BACKGROUND  # of all classes alike
    labels = torch.where(in_regions, -1, labels)
    anchors, sizes = torch.cat([level.tensor for level in levels]) * scale, [len(level) for level in levels]
    region = None
    if hasattr(student, "atss_topk"):
        options = {"topk": student.atss_topk, "size": student.anchor_size}
        region = partial(atss.valuable_region, list(anchors.split(sizes)), len(labels), **options)
    return HeadPair(
        student_logits=logits[0], teacher_logits=logits[1], student_boxes=boxes[0], teacher_boxes=boxes[1],
        labels=labels, targets=targets * scale, anchors=anchors, level_sizes=sizes, region=region,
        count=_count_positives(student, labels, head.classes) if known["name"] == DENSE else None, **known,
    )  # fmt: skip
