"""A feature pyramid that makes only the levels somebody reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from fvcore.nn import weight_init
from torch import nn

from ...resolution import level_of
from ..deformable import use_torchvision


class _ExtraLevels(nn.Module):
    """P6 and P7 by stride-2 convolutions, as many as are wanted.

    RetinaNet (Sec. 4) makes P6 of C5 and P7 of ReLU(P6); other detectors start from P5, or leave out the ReLU.
    """

    def __init__(self, in_channels: int, out_channels: int, last_level: int, relu: bool, norm: str) -> None:
        super().__init__()
        self.relu = relu
        for level in range(6, last_level + 1):
            source = in_channels if level == 6 else out_channels
            conv = Conv2d(
                source, out_channels, 3, stride=2, padding=1, bias=norm == "", norm=get_norm(norm, out_channels)
            )
            weight_init.c2_xavier_fill(conv)
            self.add_module(f"p{level}", conv)

    def forward(self, x: torch.Tensor, last_level: int) -> dict[str, torch.Tensor]:
        outputs = {}
        for level in range(6, last_level + 1):
            x = getattr(self, f"p{level}")(F.relu(x) if level > 6 and self.relu else x)
            outputs[f"p{level}"] = x
        return outputs


class LevelFPN(Backbone):
    """FPN (Lin et al., CVPR 2017) on chosen levels P1..P7, with detectron2's parameter names.

    Lateral and output convolutions exist for the chosen levels only, and a call can ask for fewer. A branch that
    reads P3-P7 never pays for P2, whose 3x3 convolution at stride 4 alone costs more than half of a ResNet-50.

    Args:
        bottom_up: network whose outputs, named in ``in_features``, have strides 2, 4, ..., 32 without gaps.
        in_features: finest first; the last has stride 32.
        out_channels: C of every level.
        levels: levels that can be asked for, e.g. ["p2", ..., "p6"].
        norm: normalisation of the lateral and output convolutions, "" for none.
        top_block: how P6 and P7 are made: "conv" (convolutions, dense detectors) or "maxpool" (P6 is every second
            element of P5 and there is no P7, R-CNNs).
        top_source: what "conv" makes P6 from: "c5" or "p5".
        top_relu: whether "conv" applies a ReLU to P6 before the convolution to P7.
        top_norm: normalisation of these convolutions, "" for none.
    """

    selects_levels = True

    def __init__(
        self,
        bottom_up: Backbone,
        in_features: Sequence[str],
        out_channels: int,
        levels: Sequence[str],
        norm: str = "",
        top_block: str = "conv",
        top_source: str = "c5",
        top_relu: bool = True,
        top_norm: str = "",
    ) -> None:
        super().__init__()
        if top_block not in ("conv", "maxpool"):
            raise ValueError(f"MODEL.FPN.TOP_BLOCK must be 'conv' or 'maxpool', not {top_block!r}")
        if top_source not in ("c5", "p5"):
            raise ValueError(f"MODEL.FPN.TOP_SOURCE must be 'c5' or 'p5', not {top_source!r}")
        shapes = bottom_up.output_shape()
        absent = [name for name in in_features if name not in shapes]
        if absent:
            raise ValueError(f"MODEL.FPN.IN_FEATURES: {absent} are not made by the bottom-up, which has {list(shapes)}")
        sources = {shapes[name].stride.bit_length() - 1: name for name in in_features}
        wanted = sorted(level_of(name) for name in levels)
        self._finest = min(wanted[0], 5)
        missing = [f"p{level}" for level in range(self._finest, 6) if level not in sources]
        self._pools_p5 = top_block == "maxpool"
        self._extends_p5 = top_source == "p5" and not self._pools_p5 and wanted[-1] > 5
        if self._pools_p5 and (wanted[-1] > 6 or (wanted[-1] == 6 and 5 not in wanted)):
            raise ValueError(f"MODEL.FPN: TOP_BLOCK 'maxpool' makes P6 from P5 and no P7, not levels {list(levels)}")
        if missing or wanted[-1] > 7:
            raise ValueError(
                f"MODEL.FPN: levels {list(levels)} need a bottom-up map for each of p{self._finest}..p5, "
                f"but {list(in_features)} have strides {[shapes[name].stride for name in in_features]}"
                + (f"; missing {missing}" if missing else "; p7 is the coarsest level")
            )
        self._sources = {level: sources[level] for level in range(self._finest, 6)}
        for level, name in self._sources.items():
            bias = norm == ""
            lateral = Conv2d(shapes[name].channels, out_channels, 1, bias=bias, norm=get_norm(norm, out_channels))
            weight_init.c2_xavier_fill(lateral)
            self.add_module(f"fpn_lateral{level}", lateral)
            if level in wanted or (level == 5 and self._extends_p5):
                output = Conv2d(out_channels, out_channels, 3, padding=1, bias=bias, norm=get_norm(norm, out_channels))
                weight_init.c2_xavier_fill(output)
                self.add_module(f"fpn_output{level}", output)
        self.bottom_up = bottom_up
        if wanted[-1] > 5 and not self._pools_p5:
            source = out_channels if self._extends_p5 else shapes[sources[5]].channels
            self.top_block = _ExtraLevels(source, out_channels, wanted[-1], top_relu, top_norm)
        self._out_features = [f"p{level}" for level in wanted]
        self._out_feature_strides = {f"p{level}": 2**level for level in wanted}
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)

    @property
    def size_divisibility(self) -> int:
        """Input sides must divide by the stride of C5."""
        return 32

    def forward(self, x: torch.Tensor, levels: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        """Pyramid of ``x``.

        Args:
            x: (N, 3, H, W), H and W multiples of 32.
            levels: what to compute; default all. ValueError if one is not among the constructor's ``levels``.

        Returns:
            level name -> (N, C, ceil(H / 2^l), ceil(W / 2^l)), finest first.
        """
        return self.pyramid(self.bottom_up(x), self._checked(levels))

    def _checked(self, levels: Sequence[str] | None) -> list[str]:
        names = self._out_features if levels is None else sorted(levels, key=level_of)
        unknown = [name for name in names if name not in self._out_features]
        if unknown:
            raise ValueError(f"levels {unknown} were not built; this FPN has {self._out_features}")
        return names

    def pyramid(self, bottom_up: dict[str, torch.Tensor], names: Sequence[str]) -> dict[str, torch.Tensor]:
        """The levels ``names``, finest first, of the maps that the bottom-up network gave."""
        wanted = [level_of(name) for name in names]
        outputs = {}
        top_down = None
        needs_p5 = wanted[-1] > 5 and (self._pools_p5 or self._extends_p5)
        for level in range(5, wanted[0] - 1, -1):
            lateral = getattr(self, f"fpn_lateral{level}")(bottom_up[self._sources[level]])
            if top_down is not None:
                lateral = lateral + F.interpolate(top_down, scale_factor=2.0, mode="nearest")
            top_down = lateral
            if level in wanted or (level == 5 and needs_p5):
                outputs[f"p{level}"] = getattr(self, f"fpn_output{level}")(top_down)
        if wanted[-1] > 5 and self._pools_p5:
            outputs["p6"] = F.max_pool2d(outputs["p5"], kernel_size=1, stride=2)
        elif wanted[-1] > 5:
            source = outputs["p5"] if self._extends_p5 else bottom_up[self._sources[5]]
            outputs.update(self.top_block(source, wanted[-1]))
        return {name: outputs[name] for name in names}


@BACKBONE_REGISTRY.register()
def build_level_fpn_backbone(cfg, input_shape: ShapeSpec) -> LevelFPN:
    """LevelFPN of MODEL.FPN.LEVELS over the bottom-up network that MODEL.FPN.BOTTOM_UP names."""
    bottom_up = use_torchvision(BACKBONE_REGISTRY.get(cfg.MODEL.FPN.BOTTOM_UP)(cfg, input_shape))
    return LevelFPN(bottom_up, **fpn_options(cfg))


def fpn_options(cfg) -> dict:
    """Arguments of LevelFPN, without its bottom-up network, of MODEL.FPN."""
    options = cfg.MODEL.FPN
    if not options.LEVELS:
        raise ValueError("MODEL.FPN.LEVELS is empty: list the levels the head reads, e.g. [p3, p4, p5, p6, p7]")
    if options.FUSE_TYPE != "sum":
        raise ValueError(f"MODEL.FPN.FUSE_TYPE {options.FUSE_TYPE!r}: {cfg.MODEL.BACKBONE.NAME} adds levels up ('sum')")
    return {
        "in_features": options.IN_FEATURES,
        "out_channels": options.OUT_CHANNELS,
        "levels": options.LEVELS,
        "norm": options.NORM,
        "top_block": options.TOP_BLOCK,
        "top_source": options.TOP_SOURCE,
        "top_relu": options.TOP_RELU,
        "top_norm": options.TOP_NORM,
    }
