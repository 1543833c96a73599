"""Swin Transformers (Liu et al., ICCV 2021) by yaml: detectron2 has the network, but no builder of it."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, SwinTransformer
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7

# Stages by the name of their map; "p0" has stride 4. Not the levels of an FPN, whose "p3" has stride 8.
STAGES = {"p0": 0, "p1": 1, "p2": 2, "p3": 3}
# Parameters that are not decayed, as norms are not (official detectors); see engine/solver.py.
NOT_DECAYED = ("relative_position_bias_table", "absolute_pos_embed")


class Swin(SwinTransformer):
    """detectron2's SwinTransformer, whose ``size_divisibility`` can be asked for."""

    @property
    def size_divisibility(self) -> int:
        """Sides that divide by the stride of the last map need no padding inside."""
        return 32


@BACKBONE_REGISTRY.register()
def build_swin_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Swin:
    """The Swin Transformer of MODEL.SWIN; maps "p0" to "p3" of strides 4 to 32.

    Raises:
        ValueError: MODEL.SWIN.OUT_FEATURES names no or other maps.
        ImportError: the real detectron2 takes stochastic depth from timm, which is not installed.
    """
    options = cfg.MODEL.SWIN
    unknown = [name for name in options.OUT_FEATURES if name not in STAGES]
    if unknown or not options.OUT_FEATURES:
        raise ValueError(f"MODEL.SWIN.OUT_FEATURES {list(options.OUT_FEATURES)} must name some of {list(STAGES)}")
    try:
        return Swin(
            in_chans=input_shape.channels,
            embed_dim=options.EMBED_DIM,
            depths=options.DEPTHS,
            num_heads=options.NUM_HEADS,
            window_size=options.WINDOW_SIZE,
            mlp_ratio=options.MLP_RATIO,
            drop_path_rate=options.DROP_PATH_RATE,
            ape=options.APE,
            patch_norm=options.PATCH_NORM,
            out_indices=sorted(STAGES[name] for name in options.OUT_FEATURES),
            frozen_stages=options.FROZEN_STAGES,
            use_checkpoint=options.CHECKPOINT,
        )
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise ImportError(
            "detectron2's SwinTransformer needs timm (pip install timm) unless MODEL.SWIN.DROP_PATH_RATE is 0"
        ) from None


def _fpn(cfg: CfgNode, bottom_up: Swin, top_block) -> FPN:
    options = cfg.MODEL.FPN
    shapes = bottom_up.output_shape()
    if not options.IN_FEATURES or any(name not in shapes for name in options.IN_FEATURES):
        raise ValueError(f"MODEL.FPN.IN_FEATURES {list(options.IN_FEATURES)} must name maps of Swin, {list(shapes)}")
    return FPN(bottom_up, options.IN_FEATURES, options.OUT_CHANNELS, options.NORM, top_block, options.FUSE_TYPE)


@BACKBONE_REGISTRY.register()
def build_swin_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """FPN for R-CNNs on MODEL.FPN.IN_FEATURES, "p0" to "p3" of Swin: levels p2 to p5, and p6 pooled from p5."""
    return _fpn(cfg, build_swin_backbone(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_swin_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """FPN for dense detectors, of "p1" to "p3" of Swin: levels p3 to p5, and p6, p7 by convolutions of Swin's "p3"."""
    bottom_up = build_swin_backbone(cfg, input_shape)
    channels = bottom_up.output_shape()["p3"].channels if "p3" in cfg.MODEL.SWIN.OUT_FEATURES else 0
    if not channels:
        raise ValueError(f"MODEL.SWIN.OUT_FEATURES {list(cfg.MODEL.SWIN.OUT_FEATURES)}: P6 is made from 'p3'")
    # FPN looks for the name among the bottom-up's maps first, so this is Swin's p3, of stride 32.
    return _fpn(cfg, bottom_up, LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS, in_feature="p3"))
