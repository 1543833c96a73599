"""detectron2's SemanticSegmentor as the rest of the package sees detectors."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import SemanticSegmentor
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.structures import ImageList
from torch import nn

from ..adapters import DetectorAdapter, Features, adapt


class SegmentorAdapter(DetectorAdapter):
    """Backbone maps in, class scores of every pixel out; targets are label maps."""

    needs = (*DetectorAdapter.needs, "sem_seg_head")

    @property
    def levels(self) -> list[str]:
        return list(self.detector.sem_seg_head.in_features)

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


adapt.register(SemanticSegmentor, SegmentorAdapter)
