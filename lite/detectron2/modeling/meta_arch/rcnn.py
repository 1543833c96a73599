"""Two-stage detectors: proposals first, then what is in them (Faster R-CNN, Ren et al., arXiv:1506.01497)."""

import torch
from torch import nn

from detectron2.config import configurable
from detectron2.modeling.backbone import Backbone, build_backbone
from detectron2.modeling.proposal_generator import build_proposal_generator
from detectron2.modeling.roi_heads import build_roi_heads
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage

from .build import META_ARCH_REGISTRY
from .image_model import ImageModel, draw_training_image, ground_truth_of, pixel_statistics, to_output_size

__all__ = ["GeneralizedRCNN", "ProposalNetwork"]


@META_ARCH_REGISTRY.register()
class GeneralizedRCNN(ImageModel):
    """Backbone, proposal generator and RoI heads: Faster, Mask, Keypoint and Cascade R-CNN.

    Args:
        backbone, pixel_mean, pixel_std: see :class:`ImageModel`.
        proposal_generator: (images, features, ground truth) -> (proposals, losses). None if every input brings its
            "proposals".
        roi_heads: (images, features, proposals, ground truth) -> (results, losses).
        input_format: channel order of the images, needed for training images.
        vis_period: iterations between training images; 0 for none.
    """

    @configurable
    def __init__(
        self, *, backbone: Backbone, proposal_generator: nn.Module | None, roi_heads: nn.Module, pixel_mean, pixel_std,
        input_format: str | None = None, vis_period: int = 0,
    ):
        super().__init__(backbone, pixel_mean, pixel_std)
        if vis_period > 0 and input_format is None:
            raise ValueError("GeneralizedRCNN: vis_period needs input_format")
        self.proposal_generator, self.roi_heads = proposal_generator, roi_heads
        self.input_format, self.vis_period = input_format, vis_period

    @classmethod
    def from_config(cls, cfg) -> dict:
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        return {
            "backbone": backbone, "proposal_generator": build_proposal_generator(cfg, shapes),
            "roi_heads": build_roi_heads(cfg, shapes), "input_format": cfg.INPUT.FORMAT,
            "vis_period": cfg.VIS_PERIOD, **pixel_statistics(cfg),
        }

    def forward(self, batched_inputs: list[dict]) -> dict[str, torch.Tensor] | list[dict]:
        """
        Args:
            batched_inputs: a dict for each image with ``image``, a tensor (C, H, W) of the format that ``pixel_mean``
                belongs to; for training ``instances`` with ``gt_boxes``, ``gt_classes`` and what else the heads learn
                from, in pixels of ``image``; without a proposal generator ``proposals`` with ``proposal_boxes`` and
                ``objectness_logits``; for inference optionally ``height`` and ``width`` of the wanted output.

        Returns:
            In training a dict of scalar losses, else what :meth:`inference` returns.
        """
        return self._losses(batched_inputs) if self.training else self.inference(batched_inputs)

    def _losses(self, batched_inputs: list[dict]) -> dict[str, torch.Tensor]:
        images = self.preprocess_image(batched_inputs)
        gt_instances = ground_truth_of(batched_inputs, self.device)
        features = self.backbone(images.tensor)
        proposals, proposal_losses = self._proposals(images, features, batched_inputs, gt_instances)
        _, losses = self.roi_heads(images, features, proposals, gt_instances)
        if self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0:
            self.visualize_training(batched_inputs, proposals)
        return {**losses, **proposal_losses}

    def inference(
        self, batched_inputs: list[dict], detected_instances: list[Instances] | None = None, do_postprocess: bool = True
    ) -> list[dict] | list[Instances]:
        """
        Args:
            batched_inputs: see :meth:`forward`.
            detected_instances: if given, no boxes are looked for: these, with ``pred_boxes`` and ``pred_classes`` in
                pixels of the network's input, get masks and keypoints.
            do_postprocess: bring the results to the wanted output.

        Returns:
            for each image ``{"instances": Instances}`` in pixels of the wanted output, or, without postprocessing,
            Instances in pixels of the network's input.
        """
        if self.training:
            raise RuntimeError("GeneralizedRCNN.inference is for inference; call eval() first")
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        if detected_instances is None:
            proposals, _ = self._proposals(images, features, batched_inputs, None)
            results, _ = self.roi_heads(images, features, proposals, None)
        else:
            detected = [x.to(self.device) for x in detected_instances]
            results = self.roi_heads.forward_with_given_boxes(features, detected)
        return self._postprocess(results, batched_inputs, images.image_sizes) if do_postprocess else results

    def _proposals(self, images, features, batched_inputs: list[dict], gt_instances: list[Instances] | None):
        if self.proposal_generator is not None:
            return self.proposal_generator(images, features, gt_instances)
        without = [i for i, x in enumerate(batched_inputs) if "proposals" not in x]
        if without:
            raise ValueError(f"a model without proposal generator needs 'proposals'; missing in inputs {without}")
        return [x["proposals"].to(self.device) for x in batched_inputs], {}

    @staticmethod
    def _postprocess(instances: list[Instances], batched_inputs: list[dict], image_sizes) -> list[dict]:
        """:meth:`inference`'s last step; ``image_sizes`` are the (height, width) wanted of inputs that do not say."""
        wanted = [{"height": h, "width": w, **x} for x, (h, w) in zip(batched_inputs, image_sizes)]
        return to_output_size(instances, wanted)

    def visualize_training(self, batched_inputs: list[dict], proposals: list[Instances]) -> None:
        """Draw the first image into the event storage: ground truth to the left, the 20 best proposals to the right."""
        tag = "Left: GT bounding boxes;  Right: Predicted proposals"
        draw_training_image(batched_inputs[0], proposals[0].proposal_boxes.tensor, self.input_format, tag, axis=1)


@META_ARCH_REGISTRY.register()
class ProposalNetwork(ImageModel):
    """Backbone and proposal generator alone; arguments as those of :class:`GeneralizedRCNN`."""

    @configurable
    def __init__(self, *, backbone: Backbone, proposal_generator: nn.Module, pixel_mean, pixel_std):
        super().__init__(backbone, pixel_mean, pixel_std)
        self.proposal_generator = proposal_generator

    @classmethod
    def from_config(cls, cfg) -> dict:
        backbone = build_backbone(cfg)
        generator = build_proposal_generator(cfg, backbone.output_shape())
        return {"backbone": backbone, "proposal_generator": generator, **pixel_statistics(cfg)}

    def forward(self, batched_inputs: list[dict]) -> dict[str, torch.Tensor] | list[dict]:
        """As :meth:`GeneralizedRCNN.forward`; at inference ``{"proposals": Instances}`` for each image, with
        ``proposal_boxes`` in pixels of the wanted output and ``objectness_logits``."""
        images = self.preprocess_image(batched_inputs)
        gt_instances = ground_truth_of(batched_inputs, self.device) if self.training else None
        features = self.backbone(images.tensor)
        proposals, losses = self.proposal_generator(images, features, gt_instances)
        return losses if self.training else to_output_size(proposals, batched_inputs, key="proposals")
