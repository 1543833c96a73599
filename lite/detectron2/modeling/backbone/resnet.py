"""Residual networks (He et al., arXiv:1512.03385) and ResNeXt (Xie et al., arXiv:1611.05431)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from fvcore.nn.weight_init import c2_msra_fill
from torch import nn

from detectron2.layers import CNNBlockBase, Conv2d, DeformConv, ModulatedDeformConv, ShapeSpec, get_norm

from .backbone import Backbone
from .build import BACKBONE_REGISTRY

__all__ = [
    "BasicBlock", "BasicStem", "BottleneckBlock", "DeformBottleneckBlock", "ResNet", "ResNetBlockBase",
    "build_resnet_backbone", "make_stage",
]

ResNetBlockBase = CNNBlockBase  # the name that older code imports

# Depth -> number of blocks in res2, res3, res4, res5.
BLOCKS_PER_STAGE = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
BASIC_DEPTHS = (18, 34)  # these are made of BasicBlock, the deeper ones of BottleneckBlock


def _conv(c_in: int, c_out: int, kernel: int, norm, **kwargs) -> Conv2d:
    """A bias-free convolution with its normalisation, padded so that stride 1 keeps the size."""
    padding = kernel // 2 * kwargs.get("dilation", 1)
    return Conv2d(c_in, c_out, kernel, padding=padding, bias=False, norm=get_norm(norm, c_out), **kwargs)


def _blocks_of(depth: int) -> tuple[int, ...]:
    if depth not in BLOCKS_PER_STAGE:
        raise KeyError(f"no ResNet of depth {depth}; known depths: {', '.join(map(str, BLOCKS_PER_STAGE))}")
    return BLOCKS_PER_STAGE[depth]


class BasicStem(CNNBlockBase):
    """7x7 convolution of stride 2 and 3x3 max pooling of stride 2: (N, C, H, W) -> (N, out, H/4, W/4)."""

    def __init__(self, in_channels: int = 3, out_channels: int = 64, norm="BN"):
        super().__init__(in_channels, out_channels, 4)
        self.conv1 = _conv(in_channels, out_channels, 7, norm, stride=2)
        c2_msra_fill(self.conv1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(F.relu_(self.conv1(x)), kernel_size=3, stride=2, padding=1)


class _ResidualBlock(CNNBlockBase):
    """``relu(body(x) + shortcut(x))``; the shortcut is a 1x1 convolution where the channels change."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm):
        super().__init__(in_channels, out_channels, stride)
        self.shortcut = None
        if in_channels != out_channels:
            self.shortcut = _conv(in_channels, out_channels, 1, norm, stride=stride)

    def _init_convs(self) -> None:
        # The shortcut last, as detectron2 does: the same seed then gives the same weights.
        for name in ("conv1", "conv2", "conv3", "shortcut"):
            conv = getattr(self, name, None)
            if conv is not None:
                c2_msra_fill(conv)

    def _join(self, branch: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        # In place: the last convolution of the branch needs only its input for its gradient.
        branch += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(branch)


class BasicBlock(_ResidualBlock):
    """Two 3x3 convolutions, the block of ResNet-18 and -34."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, norm="BN"):
        super().__init__(in_channels, out_channels, stride, norm)
        self.conv1 = _conv(in_channels, out_channels, 3, norm, stride=stride)
        self.conv2 = _conv(out_channels, out_channels, 3, norm)
        self._init_convs()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._join(self.conv2(F.relu_(self.conv1(x))), x)


class BottleneckBlock(_ResidualBlock):
    """1x1, 3x3 and 1x1 convolution, the block of ResNet-50 and deeper and of ResNeXt.

    ``stride_in_1x1`` puts the stride into the first 1x1 convolution (the original MSRA weights) instead of the
    3x3 one (torchvision, ResNeXt); ``num_groups`` and ``dilation`` apply to the 3x3 convolution.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, bottleneck_channels: int, stride: int = 1,
        num_groups: int = 1, norm="BN", stride_in_1x1: bool = False, dilation: int = 1,
    ):
        super().__init__(in_channels, out_channels, stride, norm)
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        width = bottleneck_channels
        self.conv1 = _conv(in_channels, width, 1, norm, stride=first)
        self.conv2 = _conv(width, width, 3, norm, stride=second, groups=num_groups, dilation=dilation)
        self.conv3 = _conv(width, out_channels, 1, norm)
        self._init_convs()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.relu_(self.conv2(F.relu_(self.conv1(x))))
        return self._join(self.conv3(hidden), x)


class DeformBottleneckBlock(_ResidualBlock):
    """A :class:`BottleneckBlock` whose 3x3 convolution is deformable (arXiv:1703.06211; modulated: 1811.11168).

    Offsets and, if ``deform_modulated``, factors are predicted by a 3x3 convolution beside it, ``conv2_offset``, that
    starts at zero: the block starts as a plain one (modulated: with half of the 3x3 convolution, as sigmoid(0) = 0.5).
    ``deform_num_groups`` groups of channels have offsets of their own.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, bottleneck_channels: int, stride: int = 1,
        num_groups: int = 1, norm="BN", stride_in_1x1: bool = False, dilation: int = 1,
        deform_modulated: bool = False, deform_num_groups: int = 1,
    ):
        super().__init__(in_channels, out_channels, stride, norm)
        self.deform_modulated = deform_modulated
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        width = bottleneck_channels
        window = {"stride": second, "padding": dilation, "dilation": dilation}
        self.conv1 = _conv(in_channels, width, 1, norm, stride=first)
        # For each group and each of the 9 taps dy and dx, and behind all of these the factors.
        self.conv2_offset = Conv2d(width, (27 if deform_modulated else 18) * deform_num_groups, 3, **window)
        self.conv2 = (ModulatedDeformConv if deform_modulated else DeformConv)(
            width, width, 3, **window, bias=False, groups=num_groups, deformable_groups=deform_num_groups,
            norm=get_norm(norm, width),
        )
        self.conv3 = _conv(width, out_channels, 1, norm)
        self._init_convs()
        nn.init.zeros_(self.conv2_offset.weight)
        nn.init.zeros_(self.conv2_offset.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.relu_(self.conv1(x))
        where = self.conv2_offset(hidden)
        if self.deform_modulated:
            split = where.shape[1] // 3 * 2
            hidden = self.conv2(hidden, where[:, :split], where[:, split:].sigmoid())
        else:
            hidden = self.conv2(hidden, where)
        return self._join(self.conv3(F.relu_(hidden)), x)


class ResNet(Backbone):
    """A stem and a list of stages, named res2, res3, ... in their order.

    Args:
        stem: module with attributes ``stride`` and ``out_channels``.
        stages: each a list of :class:`CNNBlockBase`, applied one after another.
        num_classes: if given, average pooling and a linear classifier follow the last stage.
        out_features: names of what ``forward`` returns: "stem", "res2", ..., "linear". Default: the last one.
        freeze_at: see :meth:`freeze`.
    """

    def __init__(
        self, stem: nn.Module, stages: list[list[CNNBlockBase]], num_classes: int | None = None,
        out_features: Sequence[str] | None = None, freeze_at: int = 0,
    ):
        super().__init__()
        self.stem = stem
        self.num_classes = num_classes
        self.stages: list[nn.Sequential] = []
        stage_names = [f"res{i}" for i in range(2, len(stages) + 2)]
        if out_features is not None:
            # Stages behind the last wanted one would only hold weights that never see a gradient. Whoever made them has
            # drawn their random numbers, though, as with detectron2: what is built later is then equal, too.
            stage_names = _needed_stages(stage_names, out_features, num_classes)

        stride, channels = stem.stride, stem.out_channels
        self._out_feature_strides = {"stem": stride}
        self._out_feature_channels = {"stem": channels}
        for name, blocks in zip(stage_names, stages):
            _check_stage(name, blocks)
            stage = nn.Sequential(*blocks)
            self.add_module(name, stage)
            self.stages.append(stage)
            for block in blocks:
                stride *= block.stride
            channels = blocks[-1].out_channels
            self._out_feature_strides[name] = stride
            self._out_feature_channels[name] = channels
        self.stage_names = tuple(stage_names)

        last = stage_names[-1] if stage_names else "stem"
        if num_classes is not None:
            self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
            self.linear = nn.Linear(channels, num_classes)
            nn.init.normal_(self.linear.weight, std=0.01)
            last = "linear"
        self._out_features = [last] if out_features is None else out_features
        self.freeze(freeze_at)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """(N, C, H, W) -> the feature maps named in ``out_features``; "linear" has shape (N, num_classes)."""
        if x.dim() != 4:
            raise ValueError(f"a ResNet takes images of shape (N, C, H, W), not {tuple(x.shape)}")
        x = self.stem(x)
        computed = {"stem": x}
        for name, stage in zip(self.stage_names, self.stages):
            computed[name] = x = stage(x)
        if self.num_classes is not None and "linear" in self._out_features:
            computed["linear"] = self.linear(self.avgpool(x).flatten(1))
        return {name: value for name, value in computed.items() if name in self._out_features}

    def freeze(self, freeze_at: int = 0) -> "ResNet":
        """Fix the weights of the stem (``freeze_at`` >= 1) and of the first ``freeze_at - 1`` stages.

        Their batch normalisation becomes FrozenBatchNorm2d. Returns the network itself.
        """
        frozen = [[self.stem], *self.stages][: max(freeze_at, 0)]
        for group in frozen:
            for block in group:
                block.freeze()
        return self

    @staticmethod
    def make_stage(
        block_class: type[CNNBlockBase], num_blocks: int, *, in_channels: int, out_channels: int, **kwargs
    ) -> list[CNNBlockBase]:
        """Make the ``num_blocks`` blocks of one stage; all give out ``out_channels`` channels.

        An argument ``foo_per_block=[...]`` gives each block its own ``foo``; any other one goes to all blocks.
        """
        shared = {}
        own: list[dict] = [{} for _ in range(num_blocks)]
        for key, value in kwargs.items():
            name = key.removesuffix("_per_block")
            if name == key:
                shared[key] = value
                continue
            if name in kwargs:
                raise ValueError(f"make_stage got both '{name}' and '{key}'")
            if len(value) != num_blocks:
                raise ValueError(f"make_stage: '{key}' has {len(value)} entries for {num_blocks} blocks")
            for block_args, item in zip(own, value):
                block_args[name] = item
        inputs = [in_channels] + [out_channels] * (num_blocks - 1)
        return [block_class(c, out_channels, **args, **shared) for c, args in zip(inputs, own)]

    @staticmethod
    def make_default_stages(
        depth: int, block_class: type[CNNBlockBase] | None = None, **kwargs
    ) -> list[list[CNNBlockBase]]:
        """Make res2 to res5 of a standard ResNet of that depth (18, 34, 50, 101 or 152).

        ``kwargs`` go to :meth:`make_stage`; strides and channels follow from the depth.
        """
        counts = _blocks_of(depth)
        basic = depth in BASIC_DEPTHS
        if block_class is None:
            block_class = BasicBlock if basic else BottleneckBlock
        made, c_in = [], 64
        for level, count in enumerate(counts):
            width = 64 << level
            c_out = width if basic else 4 * width
            extra = dict(kwargs) if basic else {"bottleneck_channels": width, **kwargs}
            strides = [1 if level == 0 else 2] + [1] * (count - 1)
            made.append(
                ResNet.make_stage(
                    block_class, count, in_channels=c_in, out_channels=c_out, stride_per_block=strides, **extra
                )
            )
            c_in = c_out
        return made


def _needed_stages(stage_names: list[str], wanted: Sequence[str], num_classes: int | None) -> list[str]:
    """The leading part of ``stage_names`` that computes all of ``wanted``; ValueError for an unknown name."""
    known = ["stem", *stage_names] + (["linear"] if num_classes is not None else [])
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise ValueError(f"ResNet: out_features {list(wanted)} must name some of {', '.join(known)}")
    if "linear" in wanted:
        return stage_names
    return stage_names[: max(known.index(name) for name in wanted)]


def _check_stage(name: str, blocks: Sequence[nn.Module]) -> None:
    if not blocks:
        raise ValueError(f"ResNet: stage {name} has no blocks")
    for block in blocks:
        if not isinstance(block, CNNBlockBase):
            raise TypeError(f"ResNet: stage {name} contains a {type(block).__name__}, which is no CNNBlockBase")


def make_stage(*args, **kwargs) -> list[CNNBlockBase]:
    """Older name of :meth:`ResNet.make_stage`."""
    return ResNet.make_stage(*args, **kwargs)


def _stage_settings(node) -> list[dict]:
    """Arguments of ``make_stage`` for res2 to res5 from a ``cfg.MODEL.RESNETS`` node, checked."""
    depth, dilation = node.DEPTH, node.RES5_DILATION
    counts = _blocks_of(depth)
    if len(node.DEFORM_ON_PER_STAGE) != len(counts):
        raise ValueError(f"MODEL.RESNETS.DEFORM_ON_PER_STAGE must have {len(counts)} entries, for res2 to res5")
    if dilation not in (1, 2):
        raise ValueError(f"MODEL.RESNETS.RES5_DILATION must be 1 or 2, not {dilation}")
    basic = depth in BASIC_DEPTHS
    if basic:
        for key, needed in (("RES2_OUT_CHANNELS", 64), ("RES5_DILATION", 1), ("NUM_GROUPS", 1)):
            if node[key] != needed:
                raise ValueError(f"MODEL.RESNETS.{key} must be {needed} for ResNet-{depth}, not {node[key]}")
        if any(node.DEFORM_ON_PER_STAGE):
            raise ValueError(f"MODEL.RESNETS.DEFORM_ON_PER_STAGE: ResNet-{depth} has no deformable blocks")

    settings, c_in = [], node.STEM_OUT_CHANNELS
    for level, count in enumerate(counts):
        c_out = node.RES2_OUT_CHANNELS << level
        dilated = level == 3 and dilation == 2
        first_stride = 1 if level == 0 or dilated else 2
        stage = {
            "block_class": BasicBlock if basic else BottleneckBlock,
            "num_blocks": count,
            "stride_per_block": [first_stride] + [1] * (count - 1),
            "in_channels": c_in,
            "out_channels": c_out,
            "norm": node.NORM,
        }
        if not basic:
            stage |= {
                "bottleneck_channels": (node.NUM_GROUPS * node.WIDTH_PER_GROUP) << level,
                "num_groups": node.NUM_GROUPS,
                "stride_in_1x1": node.STRIDE_IN_1X1,
                "dilation": 2 if dilated else 1,
            }
        if node.DEFORM_ON_PER_STAGE[level]:
            stage |= {
                "block_class": DeformBottleneckBlock,
                "deform_modulated": node.DEFORM_MODULATED,
                "deform_num_groups": node.DEFORM_NUM_GROUPS,
            }
        settings.append(stage)
        c_in = c_out
    return settings


@BACKBONE_REGISTRY.register()
def build_resnet_backbone(cfg, input_shape: ShapeSpec) -> ResNet:
    """Build the ResNet that ``cfg.MODEL.RESNETS`` describes, frozen as ``cfg.MODEL.BACKBONE.FREEZE_AT`` says.

    Only the stages up to the last one in ``OUT_FEATURES`` are kept.
    """
    node = cfg.MODEL.RESNETS
    settings = _stage_settings(node)
    stem = BasicStem(input_shape.channels, node.STEM_OUT_CHANNELS, node.NORM)
    stages = [ResNet.make_stage(**stage) for stage in settings]
    return ResNet(stem, stages, out_features=node.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)
