"""The multi-resolution teacher of MSAD: one detector, several input resolutions, fused aligned features."""

from __future__ import annotations

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.structures import ImageList
from torch import nn

from ..resolution import (
    Resolution,
    batch_images,
    downsampled_image,
    get_resolution,
    pad_divisibility,
    shift_levels,
    shift_names,
)
from .adapters import Features, adapt
from .features import run_neck
from .fusion import CrossFeatureLevelFusion
from .scalars import scalars_under

FUSED = "fused"


def _check_resolutions(resolutions: list[Resolution]) -> None:
    names = [r.name for r in resolutions]
    if not names or resolutions[0].shift != 0 or len(set(names)) != len(names):
        raise ValueError(f"MSAD.RESOLUTIONS must be distinct and start with H, got {names}")


def teacher_levels(levels: list[str], resolutions: list[Resolution]) -> list[str]:
    """Levels a shared neck must be able to make so that every branch has H-frame ``levels``."""
    names = {name for r in resolutions for name in shift_names(levels, -r.shift)}
    return sorted(names)


@META_ARCH_REGISTRY.register()
class MultiScaleTeacher(nn.Module):
    """Aligned multi-scale teacher (MSAD, CVPR 2021, stage 1) around a dense detector or an R-CNN.

    One backbone and one head serve all branches. Each branch sees the image at its resolution; its pyramid levels are
    renamed to the H frame, where one set of anchors and targets fits all of them. C-FF fuses the aligned maps.
    Training loss: the sum of the branches' detection losses plus ``w_fuse`` times that of the fused maps.

    Args:
        detector: a dense detector or an R-CNN whose levels, strides and ranges are those of H.
        resolutions: branches, H first.
        fusion: the gate.
        w_fuse: weight of the fused branch's losses.
        eval_branch: what inference uses: "fused" or the name of a resolution.
        downsample_mode: see :func:`msad.resolution.downsample`.
    """

    @configurable
    def __init__(
        self,
        *,
        detector: nn.Module,
        resolutions: list[Resolution],
        fusion: CrossFeatureLevelFusion,
        w_fuse: float = 0.4,
        eval_branch: str = FUSED,
        downsample_mode: str = "antialias",
    ) -> None:
        super().__init__()
        _check_resolutions(resolutions)
        self.detector = detector
        self.resolutions = list(resolutions)
        self.fusion = fusion
        self.w_fuse = w_fuse
        self.downsample_mode = downsample_mode
        self.adapter = adapt(detector)
        self.adapter.check_preprocessing()
        self.adapter.check_whole()
        self.levels = self.adapter.levels
        made = detector.backbone.output_shape()
        absent = [name for name in teacher_levels(self.levels, self.resolutions) if name not in made]
        if absent:
            raise ValueError(
                f"the branches {[r.name for r in resolutions]} of a head on {self.levels} need {absent}, "
                f"which the backbone does not make (it has {list(made)})"
            )
        self.set_eval_branch(eval_branch)

    @classmethod
    def from_config(cls, cfg) -> dict:
        resolutions = [get_resolution(name) for name in cfg.MSAD.RESOLUTIONS]
        _check_resolutions(resolutions)  # before the backbone, whose levels follow from them
        inner = cfg.clone()
        inner.defrost()
        inner.MODEL.META_ARCHITECTURE = cfg.MSAD.DETECTOR
        if inner.MODEL.FPN.LEVELS:
            inner.MODEL.FPN.LEVELS = teacher_levels(cfg.MODEL.FPN.LEVELS, resolutions)
        detector = build_model(inner)
        shapes = detector.backbone.output_shape()
        return {
            "detector": detector,
            "resolutions": resolutions,
            "fusion": CrossFeatureLevelFusion.from_shapes(
                {name: shapes[name] for name in adapt(detector).levels},
                len(resolutions),
                reduction=cfg.MSAD.FUSION.REDUCTION,
                mask_padding=cfg.MSAD.FUSION.MASK_PADDING,
                normalize=cfg.MSAD.FUSION.NORMALIZE,
            ),
            "w_fuse": cfg.MSAD.W_FUSE,
            "eval_branch": cfg.MSAD.EVAL_BRANCH,
            "downsample_mode": cfg.MSAD.DOWNSAMPLE,
        }

    @property
    def device(self) -> torch.device:
        return self.detector.pixel_mean.device

    @property
    def branches(self) -> list[str]:
        """Names that :meth:`set_eval_branch` knows."""
        return [FUSED, *(r.name for r in self.resolutions)]

    def set_eval_branch(self, name: str) -> None:
        """Choose what inference uses: "fused" or one resolution; ValueError for anything else."""
        if name not in self.branches:
            raise ValueError(f"MSAD.EVAL_BRANCH {name!r} is not one of this teacher's branches: {self.branches}")
        self.eval_branch = name

    def branch_images(self, batched_inputs: list[dict], resolution: Resolution, max_shift: int = 0) -> ImageList:
        """Normalised padded batch of one branch from inputs in H pixels.

        The padded areas of all branches, and of any other network at up to ``max_shift``, are the same part of the
        H frame, so that their grids are equal.
        """
        images = [
            downsampled_image(item, resolution.shift, self.device, self.downsample_mode) for item in batched_inputs
        ]
        base = max(self.detector.backbone.size_divisibility, 1)
        max_shift = max(max_shift, *(r.shift for r in self.resolutions))
        divisibility = pad_divisibility(base, resolution.shift, max_shift)
        return batch_images(images, self.detector.pixel_mean, self.detector.pixel_std, divisibility)

    def branch_features(
        self, batched_inputs: list[dict], resolution: Resolution, max_shift: int = 0
    ) -> tuple[ImageList, Features]:
        """Images of the branch and its features under H-frame names, level l: (N, C, h_l, w_l)."""
        images = self.branch_images(batched_inputs, resolution, max_shift)
        own_levels = shift_names(self.levels, -resolution.shift)
        features = run_neck(self.detector.backbone, images.tensor, own_levels)
        return images, shift_levels(features, resolution.shift)

    def fuse(self, branches: list[Features], image_sizes: list[tuple[int, int]]) -> Features:
        """C-FF per level; ``image_sizes`` (h, w) in H pixels tell the gate where padding begins."""
        return self.fusion.fuse(branches, self.levels, image_sizes)

    def neck_features(self, batched_inputs: list[dict], max_shift: int = 0) -> Features:
        """What a student at up to ``max_shift`` learns: fused maps under H-frame names, from inputs in H pixels."""
        return self._fused(batched_inputs, max_shift)[1]

    def _fused(self, batched_inputs: list[dict], max_shift: int = 0) -> tuple[ImageList, Features]:
        images, features = zip(*(self.branch_features(batched_inputs, r, max_shift) for r in self.resolutions))
        return images[0], self.fuse(list(features), images[0].image_sizes)

    def forward(self, batched_inputs: list[dict]) -> dict[str, torch.Tensor] | list[dict]:
        """detectron2's contract: a dict of losses in training, detections in original pixels otherwise.

        Losses are named ``{branch}/{loss of the detector}``.
        """
        if not self.training:
            if self.eval_branch == FUSED:
                images, features = self._fused(batched_inputs)
            else:
                images, features = self.branch_features(batched_inputs, get_resolution(self.eval_branch))
                images = _in_h_frame(images, batched_inputs)
            return self.adapter.postprocess(self.adapter.predict(images, features), batched_inputs, images)

        targets = self.adapter.targets(batched_inputs)
        images, features = zip(*(self.branch_features(batched_inputs, r) for r in self.resolutions))
        branches = {r.name: (f, 1.0) for r, f in zip(self.resolutions, features)}
        branches[FUSED] = (self.fuse(list(features), images[0].image_sizes), self.w_fuse)
        output = {}
        with self.adapter.assign_once():
            for branch, (maps, weight) in branches.items():
                with scalars_under(branch):
                    losses = self.adapter.losses(images[0], maps, targets)
                output.update({f"{branch}/{name}": weight * value for name, value in losses.items()})
        return output


def _in_h_frame(images: ImageList, batched_inputs: list[dict]) -> ImageList:
    """The same batch with image sizes in H pixels, the frame in which detections are decoded."""
    return ImageList(images.tensor, [tuple(item["image"].shape[-2:]) for item in batched_inputs])
