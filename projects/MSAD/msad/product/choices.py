"""What a user of ``msad distill`` chooses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .backbones import choose_backbone, require_weights

DETECTORS = ("fcos", "retinanet", "faster_rcnn", "mask_rcnn", "keypoint_rcnn")
SCALES = {"1/2": "L", "1/4": "EL"}
METHODS = ("msad", "scalekd", "progressive", "none")


@dataclass(frozen=True)
class Choices:
    """What a user chooses; see ``msad distill --help``.

    Attributes:
        detector, backbone: of teacher and student; not used with ``checkpoint``, whose own they are.
        scale, method: of SCALES and METHODS.
        checkpoint, config: a trained detectron2 model that teaches.
        short_side: of H in pixels; None: as recommended for the data.
        iterations: of every training; None: as many as the data need.
        controls: also train what the student is to be compared with.
        opts: KEY, VALUE, ... overrides of the detector's config at H, from which all others follow; those of MSAD and
            DISTILL, which the method fills, are of its teacher and its student.
    """

    detector: str = "fcos"
    backbone: str = "efficientnet_lite0"
    scale: str = "1/2"
    method: str = "msad"
    checkpoint: str = ""
    config: str = ""
    short_side: int | None = None
    iterations: int | None = None
    controls: bool = False
    opts: tuple = ()

    def check(self) -> None:
        """ValueError or FileNotFoundError if the choices do not go together."""
        for name, value, known in (("detector", self.detector, DETECTORS), ("scale", self.scale, SCALES),
                                   ("method", self.method, METHODS)):  # fmt: skip
            if value not in known:
                raise ValueError(f"--{name} {value}: not known; choose from {', '.join(known)}")
        for name in ("short_side", "iterations"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if bool(self.checkpoint) != bool(self.config):
            raise ValueError("--from CHECKPOINT and --config YAML belong together: weights and what they are of")
        if self.checkpoint and not Path(self.checkpoint).is_file():
            raise FileNotFoundError(f"--from: no such file: {self.checkpoint}")
        if self.checkpoint and self.method == "progressive":
            raise ValueError("--method progressive trains its two teachers; with --from use msad, scalekd or none")
        choice = choose_backbone(self.backbone)
        if not self.checkpoint:
            given = "MODEL.WEIGHTS" in self.opts[::2]
            require_weights(self.backbone, given)
            if self.method == "progressive":
                if not choice.larger:
                    raise ValueError(f"--method progressive: there is no larger backbone than {self.backbone}")
                require_weights(choice.larger, given)
        if self.scale == "1/4" and "rcnn" in self.detector and not self.checkpoint:
            raise ValueError(f"--scale 1/4: a {self.detector} reads P2 at H, and no network makes a map 4 times finer; "
                             "choose --scale 1/2, or --detector fcos or retinanet")  # fmt: skip

    @property
    def resolution(self) -> str:
        return SCALES[self.scale]

    @property
    def conventional(self) -> str:
        """Name of the control that is the detector with its stock levels, at the student's input."""
        return f"baseline_{self.resolution}"

    @property
    def alone(self) -> str:
        """Name of the control that is the student's architecture, trained without a teacher."""
        return f"{self.conventional}_shifted"
