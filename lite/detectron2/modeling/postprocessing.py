"""Bring the raw output of a model to the resolution that the user wants."""

import torch
import torch.nn.functional as F

from detectron2.structures import Instances, ROIMasks

__all__ = ["detector_postprocess", "sem_seg_postprocess"]


def detector_postprocess(
    results: Instances, output_height: int, output_width: int, mask_threshold: float = 0.5
) -> Instances:
    """Rescale detections from the network's input to an image of ``output_height`` x ``output_width`` pixels.

    Boxes (``pred_boxes``, or ``proposal_boxes`` where there are none) are scaled and clipped, and detections whose
    box is then empty are dropped; keypoints are scaled; masks, a (N, 1, M, M) tensor or ROIMasks, are
    pasted into bitmaps (N, H, W).
    """
    height, width = results.image_size
    new_height, new_width = (x.item() if isinstance(x, torch.Tensor) else x for x in (output_height, output_width))
    scale_x, scale_y = float(new_width) / width, float(new_height) / height

    scaled = Instances((new_height, new_width), **results.get_fields())
    field = next((name for name in ("pred_boxes", "proposal_boxes") if scaled.has(name)), None)
    if field is None:
        raise ValueError("detector_postprocess needs a field 'pred_boxes' or 'proposal_boxes'")
    boxes = scaled.get(field).clone()
    boxes.scale(scale_x, scale_y)
    boxes.clip(scaled.image_size)
    scaled.set(field, boxes)
    scaled = scaled[boxes.nonempty()]

    if scaled.has("pred_masks"):
        masks = scaled.pred_masks if isinstance(scaled.pred_masks, ROIMasks) else ROIMasks(scaled.pred_masks[:, 0])
        scaled.pred_masks = masks.to_bitmasks(scaled.get(field), *scaled.image_size, mask_threshold).tensor
    if scaled.has("pred_keypoints"):
        factors = scaled.pred_keypoints.new_tensor((scale_x, scale_y, 1.0))
        scaled.pred_keypoints = scaled.pred_keypoints * factors
    return scaled


def sem_seg_postprocess(
    result: torch.Tensor, img_size: tuple[int, int], output_height: int, output_width: int
) -> torch.Tensor:
    """Cut the padding off class scores (C, H, W) and resize them: -> (C, output_height, output_width).

    ``img_size`` is the (height, width) of the image before padding.
    """
    height, width = img_size
    cut = result[None, :, :height, :width]
    return F.interpolate(cut, (output_height, output_width), mode="bilinear", align_corners=False)[0]
