"""Any backbone of timm (the extra "timm") by its name."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone


class TimmBackbone(Backbone):
    """A network of timm with the last map of each stride; strides and channels are those that timm states.

    Maps are named as everywhere here: "c1" has stride 2, "res2" to "res5" have 4 to 32. Networks that timm builds for
    one size of images (vision transformers) are no use as backbones; MODEL.SWIN takes all sizes.

    Args:
        name: model name of timm, as "convnext_tiny" or "resnet50.a1_in1k".
        out_features: names of the maps that are returned.
        pretrained: take timm's weights of that name, downloaded where they are not cached.
        in_channels: of the images.

    Raises:
        ImportError: timm is not installed.
        ValueError: timm has no such model, or it has no such maps.
    """

    def __init__(self, name: str, out_features: list[str], pretrained: bool = False, in_channels: int = 3) -> None:
        super().__init__()
        try:
            import timm
        except ModuleNotFoundError:
            raise ImportError("MODEL.BACKBONE build_timm_backbone needs timm: pip install timm") from None
        if not timm.is_model(name):
            near = timm.list_models(f"*{name[:6]}*")[:5] if name else []
            raise ValueError(f"MODEL.TIMM.NAME: timm has no model {name!r}" + (f"; it has {near}, ..." if near else ""))
        create = {"features_only": True, "in_chans": in_channels}
        info = timm.create_model(name, **create).feature_info
        # The last of each stride; nobody reads maps of stride 1.
        index = {_name(stride): i for i, stride in enumerate(info.reduction()) if stride > 1}
        unknown = [feature for feature in out_features if feature not in index]
        if unknown or not out_features:
            raise ValueError(f"MODEL.TIMM.OUT_FEATURES {list(out_features)}: {name} has {list(index)}")
        self._out_features = sorted(out_features, key=index.get)
        wanted = [index[feature] for feature in self._out_features]
        self.net = timm.create_model(name, pretrained=pretrained, out_indices=wanted, **create)
        self._channels_last = str(getattr(self.net, "output_fmt", "NCHW")).endswith("NHWC")
        self._out_feature_channels = dict(zip(self._out_features, self.net.feature_info.channels()))
        self._out_feature_strides = dict(zip(self._out_features, self.net.feature_info.reduction()))

    @property
    def size_divisibility(self) -> int:
        """Stride of the coarsest map."""
        return max(self._out_feature_strides.values())

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """(N, in_channels, H, W) -> maps (N, C, H / stride, W / stride) by name, finest first."""
        maps = self.net(x)
        if self._channels_last:
            maps = [y.permute(0, 3, 1, 2).contiguous() for y in maps]
        return dict(zip(self._out_features, maps))


def _name(stride: int) -> str:
    return "c1" if stride == 2 else f"res{stride.bit_length() - 1}"


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """The network of MODEL.TIMM; MODEL.BACKBONE.FREEZE_AT must be 0, as timm's networks have no stages in common."""
    if cfg.MODEL.BACKBONE.FREEZE_AT:
        raise ValueError("MODEL.BACKBONE.FREEZE_AT must be 0 with build_timm_backbone, which freezes nothing")
    options = cfg.MODEL.TIMM
    return TimmBackbone(options.NAME, options.OUT_FEATURES, options.PRETRAINED, input_shape.channels)
