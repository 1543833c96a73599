"""What a student will cost at inference, against the detector at full resolution; known before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from detectron2.config import CfgNode

from ..experiments.costs import macs_of_file
from ..modeling.student_config import student_config
from .advice import Objects, typical_image
from .choices import Choices

MAX_SHARE = 0.7  # of the full-resolution detector's multiply-adds; a student that costs more is warned of
NEARLY = 0.9  # of a cost: what is not less costs nearly as much
PADDED = 32  # pixels that inputs are padded to multiples of


class InferenceCost(NamedTuple):
    """GMACs of the whole model for the data's commonest image.

    Attributes:
        image: height, width of its file.
        full, student: of the detector at H and of the student.
        half: of a student at 1/2, where this one is at 1/4.
        ways: options with which the student would cost less of what the detector costs at their H, and how much.
    """

    image: tuple[int, int]
    full: float
    student: float
    half: float | None = None
    ways: dict[str, float] = {}

    @property
    def share(self) -> float:
        return self.student / self.full

    def lines(self) -> list[str]:
        """For people."""
        lines = [f"inference: the student takes {self.share:.2f} times the multiply-adds of the full-resolution "
                 f"detector ({self.student:.3g} and {self.full:.3g} GMACs, of an image of "
                 f"{' x '.join(map(str, self.image))} px)"]  # fmt: skip
        if self.share > MAX_SHARE:
            better = [f"{option} ({value:.2f} times the detector at that H)" for option, value in self.ways.items()]
            way = f"better are {', '.join(better)}" if better else "no size nearby and no other --scale is much better"
            lines.append(f"warning: that is more than {MAX_SHARE:g}: the head reads as many locations as at full "
                         f"resolution, and inputs are padded to multiples of {PADDED} px; {way}")  # fmt: skip
        if self.half and self.student > NEARLY * self.half:
            lines.append(f"warning: at 1/4 the student costs nearly what it costs at 1/2 ({self.half:.3g} GMACs), "
                         "where it sees more: --scale 1/2")  # fmt: skip
        return lines


def expected_cost(
    choices: Choices, short: int, objects: Objects, detector: Callable[[Choices, int], CfgNode]
) -> InferenceCost:
    """Count the multiply-adds of student and full-resolution detector, and of other choices where the student is dear.

    Regions of R-CNNs are as many as RPN.POST_NMS_TOPK_TEST, their masks and keypoints as objects in the mean image.

    Args:
        short: short side of H in pixels.
        detector: gives the config at H for choices and a short side.
    """
    image = typical_image(objects)
    found = max(round(len(objects.sides) / len(objects.images)), 1)

    def count(choices: Choices, short: int) -> tuple[float, float]:
        base = detector(choices, short)
        configs = base, student_config(base, choices.resolution)
        for cfg in configs:
            cfg.TEST.DETECTIONS_PER_IMAGE = min(cfg.TEST.DETECTIONS_PER_IMAGE, found)
        full, student = (macs_of_file(cfg, image) for cfg in configs)
        return full, student

    full, student = count(choices, short)
    other = {"1/2": "1/4", "1/4": "1/2"}[choices.scale]
    half = count(replace(choices, scale=other), short)[1] if other == "1/2" else None
    step = PADDED * int(choices.scale[2:])
    sides = [side for side in ((short - 1) // step * step, short // step * step + step) if side]
    options = {f"--short-side {side}": (replace(choices, short_side=side), side) for side in sides}
    options[f"--scale {other}"] = replace(choices, scale=other), short
    ways = {}
    for option, changed in options.items() if student > MAX_SHARE * full else ():
        try:
            their_full, their_student = count(*changed)
        except ValueError:  # there is no such student
            continue
        if (share := their_student / their_full) < NEARLY * student / full:
            ways[option] = share
    return InferenceCost(image, full, student, half, dict(sorted(ways.items(), key=lambda item: item[1])))
