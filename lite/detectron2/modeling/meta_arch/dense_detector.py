"""Common part of the detectors that predict boxes at every cell of a feature pyramid."""

import torch
from torch import nn

from detectron2.layers import batched_nms
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances

from .image_model import ImageModel, draw_training_image, ground_truth_of, to_output_size

__all__ = ["DenseDetector", "permute_to_N_HWA_K"]


def permute_to_N_HWA_K(tensor: torch.Tensor, K: int) -> torch.Tensor:
    """(N, A * K, H, W) -> (N, H * W * A, K)."""
    if tensor.dim() != 4:
        raise ValueError(f"permute_to_N_HWA_K takes a tensor (N, A * K, H, W), not {tuple(tensor.shape)}")
    n = tensor.shape[0]
    return tensor.permute(0, 2, 3, 1).reshape(n, -1, K)


class DenseDetector(ImageModel):
    """Backbone, shared head and the way from images to losses or detections.

    A subclass implements ``forward_training(images, features, predictions, gt_instances) -> dict of losses`` and
    ``forward_inference(images, features, predictions) -> list[Instances]``.

    Args:
        backbone: gives a dict of feature maps.
        head: takes the list of the maps ``head_in_features`` and returns a list (tuple) of predictions, each a
            list with one tensor (N, A * K, H, W) a level.
        head_in_features: names of maps; default: all that the backbone gives.
        pixel_mean, pixel_std: a number for each image channel.
    """

    def __init__(
        self, backbone: Backbone, head: nn.Module, head_in_features: list[str] | None = None, *,
        pixel_mean, pixel_std,
    ):
        super().__init__(backbone, pixel_mean, pixel_std)
        self.head = head
        if head_in_features is None:
            by_stride = sorted(backbone.output_shape().items(), key=lambda item: item[1].stride)
            head_in_features = [name for name, _ in by_stride]
        self.head_in_features = head_in_features

    def forward(self, batched_inputs: list[dict]) -> dict[str, torch.Tensor] | list[dict]:
        """
        Args:
            batched_inputs: a dict for each image with ``image``, a tensor (C, H, W) of the format that
                ``pixel_mean`` belongs to; for training ``instances`` with ``gt_boxes`` and ``gt_classes``, in
                pixels of ``image``; for inference optionally ``height`` and ``width`` of the wanted output.

        Returns:
            In training a dict of scalar losses, else for each image ``{"instances": Instances}`` with
            ``pred_boxes``, ``scores`` and ``pred_classes`` in pixels of the wanted output.
        """
        images = self.preprocess_image(batched_inputs)
        maps = self.backbone(images.tensor)
        features = [maps[name] for name in self.head_in_features]
        predictions = self.head(features)
        if not self.training:
            return to_output_size(self.forward_inference(images, features, predictions), batched_inputs)
        gt_instances = ground_truth_of(batched_inputs, self.device)
        return self.forward_training(images, features, predictions, gt_instances)

    def forward_training(self, images, features, predictions, gt_instances) -> dict[str, torch.Tensor]:
        raise NotImplementedError(f"{type(self).__name__} does not implement forward_training")

    def forward_inference(self, images, features, predictions) -> list[Instances]:
        raise NotImplementedError(f"{type(self).__name__} does not implement forward_inference")

    def _transpose_dense_predictions(
        self, predictions: list[list[torch.Tensor]], dims_per_anchor: list[int]
    ) -> list[list[torch.Tensor]]:
        """Apply :func:`permute_to_N_HWA_K` to every level of every prediction, K from ``dims_per_anchor``."""
        if len(predictions) != len(dims_per_anchor):
            raise ValueError(f"the head made {len(predictions)} predictions, {len(dims_per_anchor)} are expected")
        return [[permute_to_N_HWA_K(level, k) for level in p] for p, k in zip(predictions, dims_per_anchor)]

    def _ema_update(self, name: str, value: float, initial_value: float, momentum: float = 0.9) -> float:
        """Move the attribute ``name`` towards ``value`` (from ``initial_value`` at first) and return it.

        A moving average of the number of foreground anchors normalises the losses: the number of a single small
        batch varies too much.
        """
        average = momentum * getattr(self, name, initial_value) + (1 - momentum) * value
        setattr(self, name, average)
        return average

    def _decode_per_level_predictions(
        self, anchors: Boxes, pred_scores: torch.Tensor, pred_deltas: torch.Tensor, score_thresh: float,
        topk_candidates: int, image_size: tuple[int, int],
    ) -> Instances:
        """Best ``topk_candidates`` pairs of anchor and class above ``score_thresh`` of one level of one image.

        Args:
            anchors: (R, 4) boxes; pred_scores: (R, K) in [0, 1]; pred_deltas: (R, 4).

        Returns:
            Instances with ``pred_boxes`` (not clipped), ``scores`` (descending) and ``pred_classes``.
        """
        num_classes = pred_scores.shape[1]
        flat = pred_scores.flatten()
        above = (flat > score_thresh).nonzero().squeeze(1)
        scores, order = flat[above].topk(min(topk_candidates, above.numel()))
        chosen = above[order]
        anchor = chosen.div(num_classes, rounding_mode="floor")
        # In float32 under mixed precision too: 16 bits do not resolve pixels of a large image.
        boxes = self.box2box_transform.apply_deltas(pred_deltas[anchor].float(), anchors.tensor[anchor])
        return Instances(image_size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=chosen % num_classes)

    def inference_single_image(
        self, anchors: list[Boxes], box_cls: list[torch.Tensor], box_delta: list[torch.Tensor],
        image_size: tuple[int, int],
    ) -> Instances:
        """Decode and suppress the predictions of one image: per level scores (R_l, K) in [0, 1] and deltas (R_l, 4).

        For subclasses that have the thresholds ``test_*`` and ``max_detections_per_image``.
        """
        found = self._decode_multi_level_predictions(
            anchors, box_cls, box_delta, self.test_score_thresh, self.test_topk_candidates, image_size
        )
        kept = batched_nms(found.pred_boxes.tensor, found.scores, found.pred_classes, self.test_nms_thresh)
        return found[kept[: self.max_detections_per_image]]

    def _decode_multi_level_predictions(
        self, anchors: list[Boxes], pred_scores: list[torch.Tensor], pred_deltas: list[torch.Tensor],
        score_thresh: float, topk_candidates: int, image_size: tuple[int, int],
    ) -> Instances:
        """:meth:`_decode_per_level_predictions` of all levels of one image, concatenated."""
        decoded = [
            self._decode_per_level_predictions(*level, score_thresh, topk_candidates, image_size)
            for level in zip(anchors, pred_scores, pred_deltas)
        ]
        return Instances.cat(decoded)

    def visualize_training(self, batched_inputs: list[dict], results: list[Instances]) -> None:
        """Draw the first image into the event storage: ground truth above, the 20 best of ``results`` below.

        Args:
            results: detections in pixels of the network's input, best first. Needs ``self.input_format``.
        """
        first = batched_inputs[0]
        found = detector_postprocess(results[0], *first["image"].shape[1:])
        tag = "Top: GT bounding boxes; Bottom: 20 Highest Scoring Results"
        draw_training_image(first, found.pred_boxes.tensor, self.input_format, tag, axis=0)
