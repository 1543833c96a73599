"""What every detector does before its backbone and after its last layer."""

import numpy as np
import torch
from torch import nn

from detectron2.modeling.backbone import Backbone
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage

__all__ = ["ImageModel", "draw_training_image", "ground_truth_of", "pixel_statistics", "to_output_size"]


class ImageModel(nn.Module):
    """A backbone and the normalisation of its images.

    Args:
        backbone: gives a dict of feature maps.
        pixel_mean, pixel_std: a number for each image channel.
    """

    def __init__(self, backbone: Backbone, pixel_mean, pixel_std):
        super().__init__()
        if len(pixel_mean) != len(pixel_std):
            raise ValueError(f"pixel_mean has {len(pixel_mean)} channels and pixel_std {len(pixel_std)}")
        self.backbone = backbone
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Move the images to the device, normalise them and pad them into one batch."""
        normalized = [(self._move_to_current_device(x["image"]) - self.pixel_mean) / self.pixel_std
                      for x in batched_inputs]
        return ImageList.from_tensors(
            normalized, self.backbone.size_divisibility,
            padding_constraints=self.backbone.padding_constraints,
        )

    def _move_to_current_device(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.device)


def pixel_statistics(cfg) -> dict:
    """The arguments of :class:`ImageModel` that ``cfg.MODEL`` has: mean and deviation of each channel."""
    return {"pixel_mean": cfg.MODEL.PIXEL_MEAN, "pixel_std": cfg.MODEL.PIXEL_STD}


def ground_truth_of(batched_inputs: list[dict], device: torch.device) -> list[Instances]:
    """The "instances" of every input, on ``device``; ValueError names the inputs that have none."""
    without = [i for i, x in enumerate(batched_inputs) if "instances" not in x]
    if without:
        raise ValueError(f"training needs 'instances' with each image; missing in inputs {without}")
    return [x["instances"].to(device) for x in batched_inputs]


def to_output_size(results: list[Instances], batched_inputs: list[dict], key: str = "instances") -> list[dict]:
    """Results in pixels of the network's input -> ``{key: Instances}`` in pixels of the output that each input asks for
    with "height" and "width"."""
    processed = []
    for found, asked in zip(results, batched_inputs):
        height, width = found.image_size
        processed.append({key: detector_postprocess(found, asked.get("height", height), asked.get("width", width))})
    return processed


def draw_training_image(batched_input: dict, found: torch.Tensor, input_format: str, tag: str, axis: int) -> None:
    """Draw an image into the event storage, once with its ground truth and once with the 20 best of ``found``.

    Args:
        found: boxes (R, 4) in pixels of ``batched_input["image"]``, best first.
        tag: name of the picture; event files of detectron2 are compared by it.
        axis: 0 puts ``found`` below the ground truth, 1 to its right.
    """
    # Imported here: drawing needs matplotlib and OpenCV, training without pictures does not.
    from detectron2.data.detection_utils import convert_image_to_rgb
    from detectron2.utils.visualizer import Visualizer

    image = convert_image_to_rgb(batched_input["image"].permute(1, 2, 0), input_format)
    panels = [
        Visualizer(image, None).overlay_instances(boxes=boxes).get_image()
        for boxes in (batched_input["instances"].gt_boxes, found[:20].detach().cpu().numpy())
    ]
    get_event_storage().put_image(tag, np.concatenate(panels, axis=axis).transpose(2, 0, 1))
