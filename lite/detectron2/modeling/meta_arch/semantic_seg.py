"""Semantic segmentation: a class for every pixel."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn

from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling.backbone import Backbone, build_backbone
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.structures import ImageList
from detectron2.utils.registry import Registry

from .build import META_ARCH_REGISTRY
from .image_model import ImageModel, pixel_statistics

__all__ = ["SEM_SEG_HEADS_REGISTRY", "SemSegFPNHead", "SemanticSegmentor", "build_sem_seg_head"]

SEM_SEG_HEADS_REGISTRY = Registry("SEM_SEG_HEADS")
SEM_SEG_HEADS_REGISTRY.__doc__ = """
Heads by name; each is called as ``constructor(cfg, input_shape)``, ``input_shape`` being name -> ShapeSpec. The module
is called with (features, targets): see :meth:`SemSegFPNHead.forward`. Padding gets its ``ignore_value`` as label.
"""


def build_sem_seg_head(cfg, input_shape: dict[str, ShapeSpec]) -> nn.Module:
    """Build the head that ``cfg.MODEL.SEM_SEG_HEAD.NAME`` names."""
    return SEM_SEG_HEADS_REGISTRY.get(cfg.MODEL.SEM_SEG_HEAD.NAME)(cfg, input_shape)


@META_ARCH_REGISTRY.register()
class SemanticSegmentor(ImageModel):
    """A backbone and a head that scores the classes of every pixel.

    Args:
        backbone, pixel_mean, pixel_std: see :class:`ImageModel`.
        sem_seg_head: (features, targets) -> (class scores, losses); see :meth:`SemSegFPNHead.forward`.
    """

    @configurable
    def __init__(self, *, backbone: Backbone, sem_seg_head: nn.Module, pixel_mean, pixel_std):
        super().__init__(backbone, pixel_mean, pixel_std)
        self.sem_seg_head = sem_seg_head

    @classmethod
    def from_config(cls, cfg) -> dict:
        backbone = build_backbone(cfg)
        head = build_sem_seg_head(cfg, backbone.output_shape())
        return {"backbone": backbone, "sem_seg_head": head, **pixel_statistics(cfg)}

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """
        Args:
            batched_inputs: a dict for each image with ``image``, a tensor (C, H, W) of the format that ``pixel_mean``
                belongs to; for training ``sem_seg``, its labels (H, W) int64; for inference optionally ``height`` and
                ``width`` of the wanted output.

        Returns:
            In training a dict of scalar losses, else for each image ``{"sem_seg": (classes, height, width)}``, scores.
        """
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        targets = self._targets(batched_inputs) if self.training else None
        scores, losses = self.sem_seg_head(features, targets)
        if self.training:
            return losses
        results = []
        for one, size, asked in zip(scores, images.image_sizes, batched_inputs):
            height, width = asked.get("height", size[0]), asked.get("width", size[1])
            results.append({"sem_seg": sem_seg_postprocess(one, size, height, width)})
        return results

    def _targets(self, batched_inputs: list[dict]) -> Tensor:
        """(N, H, W) labels, padded as the images are."""
        without = [i for i, x in enumerate(batched_inputs) if "sem_seg" not in x]
        if without:
            raise ValueError(f"training needs 'sem_seg', the labels of each image; missing in inputs {without}")
        return ImageList.from_tensors(
            [x["sem_seg"].to(self.device) for x in batched_inputs], self.backbone.size_divisibility,
            self.sem_seg_head.ignore_value, self.backbone.padding_constraints,
        ).tensor


@SEM_SEG_HEADS_REGISTRY.register()
class SemSegFPNHead(nn.Module):
    """The semantic branch of Panoptic FPN (Kirillov et al., arXiv:1901.02446, Sec. 3.2).

    Every level gets a 3x3 convolution and, until it has ``common_stride``, more of them with bilinear upsampling by 2
    between; the sum of the levels is classified by a 1x1 convolution.

    Args:
        input_shape: name -> channels and stride of the levels to use.
        num_classes: K.
        conv_dims: channels of all 3x3 convolutions.
        common_stride: pixels of the input per element of the sum.
        loss_weight: factor of the loss.
        norm: normalisation of the 3x3 convolutions, see ``get_norm``.
        ignore_value: label without loss.
    """

    @configurable
    def __init__(
        self, input_shape: dict[str, ShapeSpec], *, num_classes: int, conv_dims: int, common_stride: int,
        loss_weight: float = 1.0, norm: str | Callable[[int], nn.Module] | None = None, ignore_value: int = -1,
    ):
        super().__init__()
        if not input_shape:
            raise ValueError("SemSegFPNHead needs at least one level")
        self.in_features = sorted(input_shape, key=lambda name: input_shape[name].stride)
        self.ignore_value, self.common_stride, self.loss_weight = ignore_value, common_stride, loss_weight
        self.scale_heads: list[nn.Sequential] = []
        for name in self.in_features:
            branch = self._branch(input_shape[name], conv_dims, norm)
            self.scale_heads.append(branch)
            self.add_module(name, branch)
        self.predictor = Conv2d(conv_dims, num_classes, kernel_size=1)
        c2_msra_fill(self.predictor)

    def _branch(self, shape: ShapeSpec, conv_dims: int, norm) -> nn.Sequential:
        """From a level to the common stride."""
        halvings = shape.stride.bit_length() - self.common_stride.bit_length()
        layers: list[nn.Module] = []
        channels = shape.channels
        for _ in range(max(1, halvings)):
            conv = Conv2d(
                channels, conv_dims, kernel_size=3, padding=1, bias=not norm, norm=get_norm(norm, conv_dims),
                activation=F.relu,
            )
            c2_msra_fill(conv)
            layers.append(conv)
            if shape.stride != self.common_stride:
                layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            channels = conv_dims
        return nn.Sequential(*layers)

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict:
        node = cfg.MODEL.SEM_SEG_HEAD
        missing = [name for name in node.IN_FEATURES if name not in input_shape]
        if missing:
            raise ValueError(f"MODEL.SEM_SEG_HEAD.IN_FEATURES: {missing} are not made; there are {list(input_shape)}")
        return {
            "input_shape": {name: input_shape[name] for name in node.IN_FEATURES}, "num_classes": node.NUM_CLASSES,
            "conv_dims": node.CONVS_DIM, "common_stride": node.COMMON_STRIDE, "norm": node.NORM,
            "loss_weight": node.LOSS_WEIGHT, "ignore_value": node.IGNORE_VALUE,
        }

    def forward(
        self, features: dict[str, Tensor], targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """
        Args:
            features: name -> (N, C, H / stride, W / stride).
            targets: labels (N, H, W), for training.

        Returns:
            In training (None, losses), else (class scores (N, K, H, W), {}).
        """
        x = self.layers(features)
        if self.training:
            return None, self.losses(x, targets)
        return self._to_input_size(x), {}

    def layers(self, features: dict[str, Tensor]) -> Tensor:
        """Class scores (N, K, H / common_stride, W / common_stride)."""
        x = sum(branch(features[name]) for name, branch in zip(self.in_features, self.scale_heads))
        return self.predictor(x)

    def losses(self, predictions: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Cross entropy, mean over all pixels that are not ignored, of what :meth:`layers` gives."""
        scores = self._to_input_size(predictions.float())  # float32 also with AMP: sums over very many pixels
        loss = F.cross_entropy(scores, targets, ignore_index=self.ignore_value)
        return {"loss_sem_seg": loss * self.loss_weight}

    def _to_input_size(self, scores: Tensor) -> Tensor:
        return F.interpolate(scores, scale_factor=self.common_stride, mode="bilinear", align_corners=False)
