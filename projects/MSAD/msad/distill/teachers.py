"""Sources of features that a student is compared with and that are not trained: frozen teachers and their mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes
from torch import nn

from ..modeling.adapters import DetectorAdapter, Features, UnfitDetector, adapt, detector_of
from ..modeling.features import batch_norms, keep_statistics, run_neck
from ..modeling.fusion_student import told_sizes
from ..modeling.taps import NECK, tap_shapes
from ..resolution import batch_images, downsampled_image, pad_divisibility, shift_levels, shift_names


class FrozenTeacher:
    """A teacher that cannot change: outside every module tree, without gradients, always in evaluation mode.

    It is deliberately not an ``nn.Module``: assigned to a module it stays invisible to ``train()``, ``state_dict()``,
    ``parameters()``, optimizers and DistributedDataParallel.

    Args:
        model: a MultiScaleTeacher or a detector.
        batch_norm: "eval" (running statistics) or "batch" (statistics of the batch, buffers untouched).
        reverse_channels: images are in the other order, RGB for BGR, than the model's.
        name: by which losses name it.
        scale: size of the model's input relative to H, the loader's image: any positive number.
        downsample_mode: how an input at a halving of H is made, see :func:`msad.resolution.downsample`.

    Raises:
        UnfitDetector: a detector of no known kind, or one that makes its images otherwise than by ``pixel_mean``,
            ``pixel_std`` and padding.

    Attributes:
        shift: m where ``scale`` is ``2**-m``, so that levels can be aligned; None for other scales.
    """

    def __init__(
        self,
        model: nn.Module,
        batch_norm: str = "eval",
        reverse_channels: bool = False,
        *,
        name: str = "teacher",
        scale: float = 1.0,
        downsample_mode: str = "antialias",
    ) -> None:
        if batch_norm not in ("eval", "batch"):
            raise ValueError(f"DISTILL.TEACHER_BN must be 'eval' or 'batch', not {batch_norm!r}")
        if not 0 < scale < math.inf:
            raise ValueError(f"DISTILL.TEACHERS: {name}: SCALE must be above 0, not {scale}")
        if not hasattr(model, "neck_features"):
            try:
                adapt(model).check_preprocessing()
            except UnfitDetector as error:
                raise UnfitDetector(f"DISTILL.TEACHERS: {name}: {error}") from None
        self.model = model.eval().requires_grad_(False)
        self.reverse_channels = reverse_channels
        self.name, self.scale, self.downsample_mode = name, scale, downsample_mode
        shift = -math.log2(scale)
        self.shift = round(shift) if shift == round(shift) else None
        if batch_norm == "batch":
            for norm in batch_norms(model):
                keep_statistics(norm)
                norm.train()

    @property
    def detector(self) -> nn.Module:
        """The detector itself, inside a multi-resolution teacher or not."""
        return detector_of(self.model)

    @property
    def adapter(self) -> DetectorAdapter:
        return adapt(self.detector)

    def shapes(self, tap: str = NECK) -> dict[str, ShapeSpec]:
        """Channels and strides (H pixels) by level, finest first; at the neck under H-frame names if aligned."""
        if tap != NECK:
            return tap_shapes(self.detector, tap, self.scale)
        made, levels = self.detector.backbone.output_shape(), self.adapter.levels
        names = levels if self.shift is None else shift_names(levels, self.shift)
        strides = [made[level].stride / self.scale for level in levels]
        return {
            name: ShapeSpec(channels=made[level].channels, stride=int(stride) if stride == int(stride) else stride)
            for name, level, stride in zip(names, levels, strides)
        }

    @torch.no_grad()
    def features(self, inputs: list[dict], max_shift: int) -> Features:
        """Neck features, level l: (N, C, h_l, w_l).

        Args:
            inputs: images in H pixels.
            max_shift: of the student; grids of aligned levels cover what a student at that shift pads H to.
        """
        if self.reverse_channels:
            inputs = [_with_reversed_channels(item) for item in inputs]
        if self.scale != 1:
            inputs = [{"image": self._scaled(item)} for item in inputs]
        features = self._neck(inputs, max(max_shift - (self.shift or 0), 0))
        return shift_levels(features, self.shift) if self.shift else features

    def _scaled(self, item: dict) -> torch.Tensor:
        device = self.detector.pixel_mean.device
        if self.shift is not None and self.shift > 0:
            return downsampled_image(item, self.shift, device, self.downsample_mode)
        image = item["image"].to(device, non_blocking=True)
        size = [max(round(side * self.scale), 1) for side in image.shape[-2:]]
        return F.interpolate(image[None].float(), size=size, mode="bilinear", antialias=self.scale < 1)[0]

    def _neck(self, inputs: list[dict], max_shift: int) -> Features:
        if hasattr(self.model, "neck_features"):
            return self.model.neck_features(inputs, max_shift)
        detector = self.model
        device = detector.pixel_mean.device
        images = batch_images(
            [item["image"].to(device, non_blocking=True) for item in inputs],
            detector.pixel_mean,
            detector.pixel_std,
            pad_divisibility(max(detector.backbone.size_divisibility, 1), 0, max_shift),
        )
        if not self.adapter.levels:  # a segmentor, which is read at taps alone
            self.adapter.run_decoder(detector.backbone(images.tensor))
            return {}
        with told_sizes(detector.backbone, images.image_sizes):
            return run_neck(detector.backbone, images.tensor, self.adapter.levels)

    def run_head(self, name: str, features: Features, boxes: list[Boxes]) -> tuple:
        """Output of the teacher's head ``name`` on ``features``; ``boxes`` of each image are in H pixels."""
        return self.adapter.run_head(name, features, boxes)


def _with_reversed_channels(item: dict) -> dict:
    """A model input whose images (3, h, w), also downsampled ones, have their channels reversed (RGB <-> BGR)."""
    downsampled = {key: image.flip(0) for key, image in item.get("downsampled_images", {}).items()}
    return dict(item, image=item["image"].flip(0), downsampled_images=downsampled)


class Ensemble:
    """The weighted mean of the neck features of several sources of equal levels, channels and strides.

    Args:
        name: by which losses name it.
        members: names of the sources, at least two.
        weights: of the members, made to sum to 1; None: equal ones.

    Raises:
        ValueError: fewer than two members, or weights that do not fit them.
    """

    def __init__(self, name: str, members: Sequence[str], weights: Sequence[float] | None = None) -> None:
        weights = [1.0] * len(members) if weights is None else [float(w) for w in weights]
        if len(members) < 2 or len(weights) != len(members) or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(
                f"DISTILL.TEACHERS: {name}: MEAN_OF needs two names or more and as many WEIGHTS_OF, not negative and "
                f"not all 0, got {list(members)} and {weights}"
            )
        self.name, self.members = name, list(members)
        self.weights = [weight / sum(weights) for weight in weights]

    def shapes(self, sources: Mapping[str, dict[str, ShapeSpec]]) -> dict[str, ShapeSpec]:
        """Those of every member, given the shapes of the sources.

        Raises:
            ValueError: members that differ; names them.
        """
        first, *others = self.members
        for other in others:
            if sources[other] != sources[first]:
                found = {
                    name: {level: (s.channels, s.stride) for level, s in sources[name].items()}
                    for name in (first, other)
                }
                raise ValueError(
                    f"DISTILL.TEACHERS: the mean {self.name} needs equal levels, channels and strides (H pixels), not "
                    f"{found}"
                )
        return sources[first]

    def features(self, sources: Mapping[str, Features]) -> Features:
        """Mean of the members' features, cut to the smallest padding."""
        mean = {}
        for level in sources[self.members[0]]:
            maps = [sources[name][level] for name in self.members]
            h, w = (min(x.shape[axis] for x in maps) for axis in (-2, -1))
            mean[level] = sum(weight * x[..., :h, :w] for x, weight in zip(maps, self.weights))
        return mean
