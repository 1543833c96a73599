"""Adapters of the detectors here that differ from the kinds of detectron2 in what adapters say."""

from __future__ import annotations

from .adapters import DenseAdapter, RCNNAdapter, UnfitDetector, adapt
from .detectors.htc import HTC
from .detectors.reppoints import RepPoints
from .head_outputs import DENSE, Head


class RepPointsAdapter(DenseAdapter):
    """RepPoints: classes are assigned with the second stage, and the last output are its points."""

    def heads(self) -> dict[str, Head]:
        detector = self.detector
        assigned = (detector, detector, "label_refined", self.levels, detector.num_classes)
        return {DENSE: Head(detector.head, *assigned, boxes=2)}


class HTCAdapter(RCNNAdapter):
    """HTC, but for its semantic branch, whose maps come with the inputs."""

    def check_whole(self) -> None:
        super().check_whole()
        if getattr(self.detector.roi_heads, "semantic_head", None) is not None:
            raise UnfitDetector(
                "an HTC cannot be run from features with its semantic branch: set MODEL.HTC.SEMANTIC_ON False"
            )


adapt.register(RepPoints, RepPointsAdapter)
adapt.register(HTC, HTCAdapter)
