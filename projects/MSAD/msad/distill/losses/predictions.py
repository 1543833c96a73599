"""What a head of the student and the same head of the teacher say about the same boxes. Tensors only."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ...modeling.head_outputs import DENSE, ROI, coordinates
from .shared import at_least_float32


@dataclass
class HeadPair:
    """Predictions of student and teacher for R anchors of N images; all boxes are in H pixels.

    Anchors are those of a dense detector ("dense": all of the image), of an RPN ("rpn": all, some drawn for the step)
    or the proposals of the whole batch that the student drew for the step ("roi": N = 1). The student's predictions
    carry gradients, the teacher's do not.

    Attributes:
        name: "dense", "rpn" or "roi".
        classes: K; labels are 0..K-1, K for background, -1 for what the step leaves out.
        student_logits, teacher_logits: (N, R, K) of K sigmoids, "roi": (N, R, K + 1) of a softmax, background last.
        student_boxes, teacher_boxes: (N, R, B) raw box predictions; "roi": four for each class, or four.
        labels: (N, R).
        targets: (N, R, 4) matched ground truth boxes; meaningless but where the label is a class.
        anchors: (R, 4).
        transform: detectron2's ``box2box_transform`` of the head.
        level_sizes: anchors of each level.
        assignment: further settings of the student's assigner.
    """

    name: str
    classes: int
    student_logits: torch.Tensor
    teacher_logits: torch.Tensor
    student_boxes: torch.Tensor
    teacher_boxes: torch.Tensor
    labels: torch.Tensor
    targets: torch.Tensor
    anchors: torch.Tensor
    transform: Any
    level_sizes: list[int] = field(default_factory=list)
    assignment: dict[str, float] = field(default_factory=dict)

    @property
    def softmax(self) -> bool:
        """Whether classes exclude each other."""
        return self.name == ROI

    @cached_property
    def positives(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(image, anchor) indices (P,), (P,) of the anchors whose label is a class."""
        return ((self.labels >= 0) & (self.labels < self.classes)).nonzero(as_tuple=True)

    @cached_property
    def normalizer(self) -> torch.Tensor:
        """What detection losses of this head are divided by, at least 1.

        The positives of a dense head; all anchors or proposals drawn for the others.
        """
        if self.name == DENSE:
            return self.labels.new_full((), len(self.positives[0]), dtype=torch.float32).clamp(min=1)
        return (self.labels >= 0).sum().clamp(min=1)

    def matched_deltas(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Encoded boxes of the P positives in the units of ``transform``: student's, teacher's and target, (P, 4)."""
        image, place = self.positives
        target = self.transform.get_deltas(self.anchors[place], self.targets[image, place])
        kind = self.labels[image, place]
        sides = []
        for raw in (self.student_boxes, self.teacher_boxes):
            x = at_least_float32(raw[image, place])
            if self.name == ROI and x.shape[1] > 4:
                x = x.unflatten(1, (-1, 4))[torch.arange(len(x), device=x.device), kind]
            sides.append(coordinates(self.transform, x))
        return sides[0], sides[1], target
