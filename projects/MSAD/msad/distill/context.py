"""One training step of a distillation as losses, assistants and analysis see it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from detectron2.structures import Boxes

from ..modeling.adapters import Features


@dataclass
class HeadPair:
    """Predictions of student and teacher for R anchors of N images; all boxes are in H pixels.

    Anchors are those of a dense detector ("dense": all of the image), of an RPN ("rpn": all, some drawn for the step)
    or the proposals of the whole batch that the student drew for the step ("roi": N = 1; "roi0", "roi1", ... for the
    stages of a cascade). The student's predictions carry gradients, the teacher's do not.

    Attributes:
        name: "dense", "rpn", "roi" or that of a cascade's stage.
        classes: K; labels are 0..K-1, K for background, -1 for what the step leaves out (anchors not drawn, ignored
            regions).
        student_logits, teacher_logits: (N, R, K) of K sigmoids, "roi": (N, R, K + 1) of a softmax, background last.
        student_boxes, teacher_boxes: (N, R, B) raw box predictions; "roi": four for each class, or four.
        labels: (N, R).
        targets: (N, R, 4) matched ground truth boxes; meaningless but where the label is a class.
        anchors: (R, 4).
        encode: anchors (P, 4), boxes (P, 4) -> the four numbers (P, 4) that the head regresses for them.
        coordinates: raw box predictions (P, B) of one class -> what they say of those four numbers, (P, 4); of the
            student, and of the teacher, because for a point set that has a learned scale.
        decode: those four numbers (P, 4), anchors (P, 4) -> boxes (P, 4).
        level_sizes: anchors of each level.
        region: boxes (K, 4), their image (K,), options -> (N, R) weights of the anchors that nearly match a box (LD);
            None where the head's assignment has no such region.
        count: number of positives by which the detection losses of a dense head are divided, where it is not that of
            these labels.
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
    encode: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    coordinates: tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]
    decode: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    level_sizes: list[int] = field(default_factory=list)
    region: Callable[..., torch.Tensor] | None = None
    count: float | torch.Tensor | None = None

    @property
    def softmax(self) -> bool:
        """Whether classes exclude each other."""
        return self.name.startswith("roi")

    @cached_property
    def positives(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(image, anchor) indices (P,), (P,) of the anchors whose label is a class."""
        return ((self.labels >= 0) & (self.labels < self.classes)).nonzero(as_tuple=True)

    @cached_property
    def normalizer(self) -> torch.Tensor:
        """What the detection losses of this head are divided by, at least 1.

        The positives of a dense head; all anchors or proposals drawn for the others.
        """
        if self.name != "dense":
            return (self.labels >= 0).sum().clamp(min=1)
        count = len(self.positives[0]) if self.count is None else self.count
        if not isinstance(count, torch.Tensor):
            count = self.labels.new_full((), count, dtype=torch.float32)
        return count.clamp(min=1)

    def matched_deltas(self, shift: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Encoded boxes of the P positives: student's, teacher's and target, (P, 4).

        Args:
            shift: H pixels by which the teacher's boxes are moved along the diagonal, to the lower right.
        """
        image, anchor = self.positives
        target = self.encode(self.anchors[anchor], self.targets[image, anchor])
        kind = self.labels[image, anchor]
        sides = []
        for raw, coordinates in zip((self.student_boxes, self.teacher_boxes), self.coordinates):
            x = raw[image, anchor]
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            if self.softmax and x.shape[1] > 4:
                x = x.unflatten(1, (-1, 4))[torch.arange(len(x), device=x.device), kind]
            sides.append(coordinates(x))
        s, t = sides[0], sides[1].detach()  # what a point set says has a learned scale
        if shift:
            t = self.encode(self.anchors[anchor], self.decode(t, self.anchors[anchor]) + shift / math.sqrt(2))
        return s, t, target


@dataclass
class DistillContext:
    """One step. Features are maps (N, C, h, w) by level; images and ground truth are in H pixels.

    Attributes:
        inputs: detectron2's input dicts as the loader gave them, images on the device.
        iteration: of training, from 0.
        student: the student's neck features under H-frame names, with gradients.
        sources: neck features by name of the teacher, ensemble or assistant, without gradients; H-frame names, cut to
            the student's grid, where their strides are powers of two, and the teacher's own names elsewhere.
        detection: the student's own losses, weighted as they are trained.
        taps: {tap: {"student" or name of a teacher: features}} of taps other than the neck: the levels that losses
            read, under the names that the tapped module gives them.
        pair_heads: name of a source -> :meth:`heads` of it.
        run_losses: neck features under H-frame names -> losses of the student's heads on them, with the step's ground
            truth.
    """

    inputs: list[dict]
    iteration: int = 0
    student: Features = field(default_factory=dict)
    sources: dict[str, Features] = field(default_factory=dict)
    detection: dict[str, torch.Tensor] = field(default_factory=dict)
    taps: dict[str, dict[str, Features]] = field(default_factory=dict)
    pair_heads: Callable[[str], list[HeadPair]] | None = None
    run_losses: Callable[[Features], dict[str, torch.Tensor]] | None = None
    _pairs: dict[str, list[HeadPair]] = field(default_factory=dict, repr=False)
    _boxes: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, repr=False)

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """(h, w) of each image in H pixels, without padding."""
        return [tuple(item["image"].shape[-2:]) for item in self.inputs]

    def extents(self, maps: torch.Tensor, stride: float) -> list[tuple[int, int]]:
        """(rows, columns) of ``maps`` (N, C, h, w) of a stride in H pixels that each image covers."""
        return [
            tuple(min(math.ceil(side / stride - 1e-6), limit) for side, limit in zip(size, maps.shape[-2:]))
            for size in self.image_sizes
        ]

    def at(self, tap: str, name: str) -> Features:
        """Features of the student (``name`` "student") or of a source at a tap.

        Raises:
            KeyError: that network was not tapped there.
        """
        if tap != "neck":
            return self.taps[tap][name]
        return self.student if name == "student" else self.sources[name]

    def heads(self, source: str) -> list[HeadPair]:
        """Head predictions of student and source, one pair a head; the source's heads run when first asked.

        Raises:
            RuntimeError: no loss of this run declares that it needs them.
        """
        if self.pair_heads is None:
            raise RuntimeError("head predictions were not recorded: a loss that reads them needs ``heads``")
        if source not in self._pairs:
            self._pairs[source] = self.pair_heads(source)
        return self._pairs[source]

    def boxes(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Ground truth boxes of the whole batch, (K, 4) x0 y0 x1 y1 in H pixels, and their image index (K,).

        Copied to ``device`` once, however many losses and levels ask.
        """
        if device not in self._boxes:
            per_image: list[Boxes] = [item["instances"].gt_boxes.tensor for item in self.inputs]
            counts = torch.tensor([len(boxes) for boxes in per_image])
            image = torch.arange(len(per_image)).repeat_interleave(counts)
            boxes = torch.cat(per_image) if per_image else torch.zeros(0, 4)
            self._boxes[device] = boxes.to(device, non_blocking=True), image.to(device, non_blocking=True)
        return self._boxes[device]

    def detached(self) -> DistillContext:
        """The same step for whatever must not train the student: no tensor of it has a gradient."""

        def detach(features: Features) -> Features:
            return {name: x.detach() for name, x in features.items()}

        return dataclasses.replace(
            self,
            student=detach(self.student),
            detection=detach(self.detection),
            taps={tap: {name: detach(x) for name, x in of.items()} for tap, of in self.taps.items()},
            pair_heads=None,
            _pairs={},
        )
