"""Recursive feature pyramid (DetectoRS, CVPR 2021): a second bottom-up pass that sees the pyramid of the first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import nn

from ...resolution import level_of
from .fpn import LevelFPN, fpn_options

FEEDBACK = ("p3", "p4", "p5")  # go into the first blocks of res3, res4 and res5
DILATIONS = (3, 6)


class ASPP(nn.Module):
    """Atrous pyramid: a 1x1 convolution, two dilated 3x3 ones and the mean of the map, each with a quarter of C."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        quarter = channels // 4
        self.aspp = nn.ModuleList(
            [
                nn.Conv2d(channels, quarter, 1),
                *(nn.Conv2d(channels, quarter, 3, padding=d, dilation=d) for d in DILATIONS),
                nn.Conv2d(channels, quarter, 1),
            ]
        )
        for layer in self.aspp:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, h, w) -> (N, C, h, w)."""
        *local, over_all = self.aspp
        mean = F.relu(over_all(x.mean(dim=(2, 3), keepdim=True)))
        return torch.cat([*(F.relu(layer(x)) for layer in local), mean.expand(-1, -1, *x.shape[-2:])], dim=1)


class RFP(LevelFPN):
    """LevelFPN that is unrolled twice: P3 to P5 of the first pass feed a second network on the same image.

    Both passes share the convolutions of the pyramid; the result is a gated mean of the two pyramids. A new RFP starts
    with feedback of zero and equal shares.

    Args:
        bottom_up, second_bottom_up: ResNets of one architecture; the second has stages res3 to res5.
        kwargs: LevelFPN's; ``levels`` have P3 to P5 among them.
    """

    def __init__(self, bottom_up: Backbone, second_bottom_up: Backbone, **kwargs) -> None:
        super().__init__(bottom_up, **kwargs)
        absent = [name for name in FEEDBACK if name not in self._out_features]
        if absent:
            raise ValueError(f"MODEL.FPN.LEVELS must have {list(FEEDBACK)} for RFP's feedback; missing {absent}")
        channels = self._out_feature_channels["p3"]
        for name in FEEDBACK:
            stage = f"res{level_of(name)}"
            block = getattr(second_bottom_up, stage)[0]
            if getattr(block, "shortcut", None) is None:
                raise ValueError(f"RFP needs a shortcut convolution in the first block of {stage}")
            block.rfp_conv = nn.Conv2d(channels, block.out_channels, 1)
            nn.init.zeros_(block.rfp_conv.weight)
            nn.init.zeros_(block.rfp_conv.bias)
        self.rfp_bottom_up = second_bottom_up
        self.rfp_aspp = ASPP(channels)
        self.rfp_weight = nn.Conv2d(channels, 1, 1)
        nn.init.zeros_(self.rfp_weight.weight)
        nn.init.zeros_(self.rfp_weight.bias)

    def forward(self, x: torch.Tensor, levels: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        """As LevelFPN's."""
        names = self._checked(levels)
        first = self.pyramid(self.bottom_up(x), sorted({*names, *FEEDBACK}, key=level_of))
        with self._feedback({name: self.rfp_aspp(first[name]) for name in FEEDBACK}):
            maps = self.rfp_bottom_up(x)
        second = self.pyramid(maps, names)
        fused = {}
        for name, new in second.items():
            share = self.rfp_weight(new).sigmoid()
            fused[name] = share * new + (1 - share) * first[name]
        return fused

    @contextmanager
    def _feedback(self, maps: dict[str, torch.Tensor]) -> Iterator[None]:
        """Inside, ``maps`` are added to the shortcuts of the blocks that they go to: before their last ReLU."""
        handles = []
        for name, fed in maps.items():
            block = getattr(self.rfp_bottom_up, f"res{level_of(name)}")[0]
            added = block.rfp_conv(fed)
            hook = block.shortcut.register_forward_hook(lambda _module, _args, output, added=added: output + added)
            handles.append(hook)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@BACKBONE_REGISTRY.register()
def build_rfp_backbone(cfg, input_shape: ShapeSpec) -> RFP:
    """RFP of MODEL.FPN over two networks of MODEL.FPN.BOTTOM_UP."""
    build = BACKBONE_REGISTRY.get(cfg.MODEL.FPN.BOTTOM_UP)
    return RFP(build(cfg, input_shape), build(cfg, input_shape), **fpn_options(cfg))
