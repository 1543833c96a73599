"""Multi-scale fusion students: backbones of different width and resolution under one head (MSAD suppl., A and D)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from torch import nn

from ..resolution import Resolution, downsample, downsampled_size, get_resolution, shift_levels, shift_names
from .adapters import Features, adapt
from .features import run_neck
from .fusion import CrossFeatureLevelFusion

KEY = "MSAD.FUSION_STUDENT.BRANCHES"


class FusionBackbone(Backbone):
    """A backbone that reads H images and returns the C-FF of several networks' maps, under H-frame names.

    To its detector it is a pyramid like any other. What it must be told beside the padded batch is where each image
    ends: :attr:`image_sizes`. Low-resolution inputs are then made image by image, as they are for a teacher or an L
    student, and the gate does not see padding, so that an image's maps do not depend on the rest of its batch.

    Args:
        branches: networks, finest resolution (H) first; each makes the levels of its own input that stand for
            ``levels``.
        resolutions: of the branches.
        levels: H-frame names.
        fusion: the gate.
        downsample_mode: see :func:`msad.resolution.downsample`.
        streams: run the branches behind the first on CUDA streams of their own; without effect on a CPU.
    """

    selects_levels = False

    def __init__(
        self,
        branches: list[nn.Module],
        resolutions: list[Resolution],
        levels: list[str],
        fusion: CrossFeatureLevelFusion,
        downsample_mode: str = "antialias",
        streams: bool = False,
    ) -> None:
        super().__init__()
        self.resolutions = list(resolutions)
        self.branches = nn.ModuleDict({r.name: branch for r, branch in zip(resolutions, branches)})
        self.fusion = fusion
        self.downsample_mode = downsample_mode
        self.streams = streams
        self.image_sizes: list[tuple[int, int]] | None = None
        shapes = branch_shapes(branches, self.resolutions, levels)
        self._out_features = list(levels)
        self._out_feature_strides = {name: shape.stride for name, shape in shapes.items()}
        self._out_feature_channels = {name: shape.channels for name, shape in shapes.items()}

    @property
    def max_shift(self) -> int:
        """Shift of the smallest input that a branch reads."""
        return max(r.shift for r in self.resolutions)

    @property
    def size_divisibility(self) -> int:
        """Of H sides: every branch's input must divide by what that branch needs."""
        needs = [max(self.branches[r.name].size_divisibility, 1) << r.shift for r in self.resolutions]
        return max(needs)

    def branch_input(self, x: torch.Tensor, shift: int) -> torch.Tensor:
        """The normalised batch (N, 3, H, W), padded with zeros, as a branch at ``shift`` sees it: (N, 3, H/k, W/k)."""
        if shift == 0:
            return x
        sizes = self.image_sizes or [tuple(x.shape[-2:])] * len(x)
        reduced = x.new_zeros(*x.shape[:2], *downsampled_size(tuple(x.shape[-2:]), shift))
        for image, (h, w), target in zip(x, sizes, reduced):
            rows, columns = downsampled_size((h, w), shift)
            target[:, :rows, :columns] = downsample(image[:, :h, :w], shift, self.downsample_mode)
        return reduced

    def _branch(self, x: torch.Tensor, resolution: Resolution) -> Features:
        own = shift_names(self._out_features, -resolution.shift)
        features = run_neck(self.branches[resolution.name], self.branch_input(x, resolution.shift), own)
        return shift_levels(features, resolution.shift)

    def branch_features(self, x: torch.Tensor) -> list[Features]:
        """Maps of every branch before fusion, H-frame names."""
        if not (self.streams and x.is_cuda):
            return [self._branch(x, resolution) for resolution in self.resolutions]
        here = torch.cuda.current_stream(x.device)
        output, sides = [], [_side_stream(x.device, i) for i in range(1, len(self.resolutions))]
        for side in sides:
            side.wait_stream(here)
        # The side streams are given their work first: the host returns at once and goes on with H.
        for resolution, side in zip(self.resolutions[1:], sides):
            with torch.cuda.stream(side):
                output.append(self._branch(x, resolution))
            x.record_stream(side)
        output.insert(0, self._branch(x, self.resolutions[0]))
        for features, side in zip(output[1:], sides):
            here.wait_stream(side)
            for tensor in features.values():
                tensor.record_stream(here)
        return output

    def forward(self, x: torch.Tensor) -> Features:
        """(N, 3, H, W), normalised, padded with zeros to :attr:`size_divisibility` -> fused maps by H-frame name."""
        return self.fusion.fuse(self.branch_features(x), self._out_features, self.image_sizes)


_STREAMS: dict[tuple[torch.device, int], torch.cuda.Stream] = {}


def _side_stream(device: torch.device, number: int) -> torch.cuda.Stream:
    # Not part of the module, which can be copied and pickled; kept, because memory is cached by stream.
    if (device, number) not in _STREAMS:
        _STREAMS[device, number] = torch.cuda.Stream(device)
    return _STREAMS[device, number]


def branch_shapes(
    branches: list[nn.Module], resolutions: list[Resolution], levels: list[str]
) -> dict[str, ShapeSpec]:
    """H-frame shapes of the maps that all branches make; ValueError names a branch that does not make them."""
    found: dict[str, ShapeSpec] = {}
    for resolution, branch in zip(resolutions, branches):
        made = branch.output_shape()
        own = shift_names(levels, -resolution.shift)
        absent = [name for name in own if name not in made]
        if absent:
            raise ValueError(f"{KEY}: branch {resolution.name} needs {absent}, but its backbone makes {list(made)}")
        for name, own_name in zip(levels, own):
            shape = ShapeSpec(channels=made[own_name].channels, stride=made[own_name].stride << resolution.shift)
            first = found.setdefault(name, shape)
            if first.channels != shape.channels:
                raise ValueError(
                    f"{KEY}: {name} (H frame) has {shape.channels} channels in branch {resolution.name} and "
                    f"{first.channels} in branch {resolutions[0].name}; only equal ones can be fused "
                    "(MODEL.FPN.OUT_CHANNELS)"
                )
    return found


def branch_configs(cfg: CfgNode) -> list[tuple[Resolution, CfgNode]]:
    """Resolution and config of each branch of MSAD.FUSION_STUDENT.BRANCHES.

    Raises:
        ValueError: fewer than two branches, not H first, a resolution twice, a wrong entry; says which.
    """
    entries = cfg.MSAD.FUSION_STUDENT.BRANCHES
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict) or "RESOLUTION" not in entry or set(entry) - {"RESOLUTION", "WEIGHTS", "MODEL"}:
            raise ValueError(f"{KEY}[{i}] must be {{RESOLUTION: ..., WEIGHTS: ..., MODEL: {{...}}}}, got {entry}")
    resolutions = [get_resolution(entry["RESOLUTION"]) for entry in entries]
    names = [r.name for r in resolutions]
    if len(names) < 2 or resolutions[0].shift != 0 or len(set(names)) != len(names):
        raise ValueError(f"{KEY} must be at least two distinct resolutions, H first, got {names}")
    configs = []
    for resolution, entry in zip(resolutions, entries):
        branch = cfg.clone()
        branch.defrost()
        if branch.MODEL.FPN.LEVELS:
            branch.MODEL.FPN.LEVELS = shift_names(cfg.MODEL.FPN.LEVELS, -resolution.shift)
        try:
            branch.merge_from_other_cfg(CfgNode({"MODEL": entry.get("MODEL", {})}))
        except (KeyError, ValueError) as error:
            raise ValueError(f"{KEY}, branch {resolution.name}: {error.args[0]}") from None
        configs.append((resolution, branch))
    return configs


def FusionStudent(cfg: CfgNode) -> nn.Module:
    """The detector MSAD.DETECTOR of ``cfg`` in the H frame, whose backbone is a :class:`FusionBackbone`.

    It is a stock detector in everything but its backbone, so it is trained, distilled, evaluated and measured as one.
    """
    (_, first), *others = configs = branch_configs(cfg)
    first.MODEL.META_ARCHITECTURE = cfg.MSAD.DETECTOR
    detector = META_ARCH_REGISTRY.get(cfg.MSAD.DETECTOR)(first)
    levels = adapt(detector).levels
    resolutions = [resolution for resolution, _ in configs]
    branches = [detector.backbone, *(build_backbone(config) for _, config in others)]
    shapes = branch_shapes(branches, resolutions, levels)
    options = cfg.MSAD.FUSION
    fusion = CrossFeatureLevelFusion.from_shapes(
        shapes, len(branches), reduction=options.REDUCTION, mask_padding=options.MASK_PADDING,
        normalize=options.NORMALIZE,
    )  # fmt: skip
    detector.backbone = FusionBackbone(
        branches, resolutions, levels, fusion, cfg.MSAD.DOWNSAMPLE, cfg.MSAD.FUSION_STUDENT.STREAMS
    )
    detector.register_forward_pre_hook(_tell_sizes)
    detector.register_forward_hook(_forget_sizes, always_call=True)
    return detector


META_ARCH_REGISTRY.register(FusionStudent)


@contextmanager
def told_sizes(backbone: nn.Module, sizes: list[tuple[int, int]]) -> Iterator[None]:
    """Inside, a :class:`FusionBackbone` that is called without its detector knows where each image (h, w) ends."""
    if not isinstance(backbone, FusionBackbone):
        yield
        return
    backbone.image_sizes = sizes
    try:
        yield
    finally:
        backbone.image_sizes = None


def _tell_sizes(detector: nn.Module, args: tuple) -> None:
    detector.backbone.image_sizes = [tuple(item["image"].shape[-2:]) for item in args[0]]


def _forget_sizes(detector: nn.Module, args: tuple, output: Any) -> None:
    detector.backbone.image_sizes = None
