"""detectron2's SemanticSegmentor as the rest of the package sees detectors, and where its features are read."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import SemanticSegmentor
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.structures import ImageList
from torch import nn

from ..adapters import DetectorAdapter, Features, adapt
from ..taps import TAPS, Tap


class SegmentorAdapter(DetectorAdapter):
    """Backbone maps in, class scores of every pixel out; targets are label maps.

    A segmentor has no pyramid whose levels could be aligned by renaming: distillation reads it at the taps "bottom_up",
    "decoder" and "scores".
    """

    needs = (*DetectorAdapter.needs, "sem_seg_head")

    @property
    def levels(self) -> list[str]:
        return []

    def run_decoder(self, features: Features) -> None:
        """Run the head as far as its taps."""
        self.detector.sem_seg_head.layers(features)

    def targets(self, inputs: list[dict]) -> list[torch.Tensor]:
        """Labels (h, w) int64 of each image, not padded."""
        return [item["sem_seg"].to(self.detector.pixel_mean.device) for item in inputs]

    def losses(self, images: ImageList, features: Features, targets: list[Any]) -> dict[str, torch.Tensor]:
        backbone, head = self.detector.backbone, self.detector.sem_seg_head
        labels = ImageList.from_tensors(
            targets, backbone.size_divisibility, head.ignore_value, backbone.padding_constraints
        ).tensor
        return head(features, labels)[1]

    def predict(self, images: ImageList, features: Features) -> list[torch.Tensor]:
        """Scores (K, H, W) of each image on the grid of the padded batch."""
        return list(self.detector.sem_seg_head(features, None)[0])

    def postprocess(self, results: list[torch.Tensor], inputs: list[dict], images: ImageList) -> list[dict]:
        output = []
        for scores, item, size in zip(results, inputs, images.image_sizes):
            height, width = item.get("height", size[0]), item.get("width", size[1])
            output.append({"sem_seg": sem_seg_postprocess(scores, size, height, width)})
        return output

    def head_modules(self) -> list[nn.Module]:
        return [self.detector.sem_seg_head]

    @classmethod
    def num_classes_key(cls, cfg: CfgNode) -> str:
        return "MODEL.SEM_SEG_HEAD.NUM_CLASSES"


def count_classes(segmentor: nn.Module) -> int:
    """K, the channels of the scores."""
    *_, last = (module for module in segmentor.sem_seg_head.predictor.modules() if isinstance(module, nn.Conv2d))
    return last.out_channels


def _scores_shape(segmentor: nn.Module) -> dict[str, ShapeSpec]:
    return {"scores": ShapeSpec(channels=count_classes(segmentor), stride=segmentor.sem_seg_head.common_stride)}


def _decoder_shape(segmentor: nn.Module) -> dict[str, ShapeSpec]:
    head = segmentor.sem_seg_head
    return {"decoder": ShapeSpec(channels=head.bottleneck.out_channels, stride=head.common_stride)}


adapt.register(SemanticSegmentor, SegmentorAdapter)
TAPS["decoder"] = Tap(lambda d: d.sem_seg_head.bottleneck, _decoder_shape, lambda output: {"decoder": output})
TAPS["scores"] = Tap(lambda d: d.sem_seg_head.predictor, _scores_shape, lambda output: {"scores": output})
