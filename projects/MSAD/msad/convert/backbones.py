"""Backbones and necks: ResNets (plain, ResNeXt, deformable, DetectoRS), Swin, FPN and RFP."""

from __future__ import annotations

import re

import torch

from .rules import Rule, Tensors, reorder

# By the blocks of each stage and whether these are of two convolutions.
DEPTHS = {
    ((2, 2, 2, 2), True): 18, ((3, 4, 6, 3), True): 34, ((3, 4, 6, 3), False): 50, ((3, 4, 23, 3), False): 101,
    ((3, 8, 36, 3), False): 152,
}  # fmt: skip
NORM = "(weight|bias|running_mean|running_var)"
WEIGHT = "(weight|bias|weight_gamma|weight_beta|weight_diff)"


def resnet_rules(source: str, target: str) -> list[Rule]:
    """Rules of the ResNet whose names begin with ``source``; those of the new names begin with ``target``."""
    block = re.escape(source) + r"layer(\d)\.(\d+)\."

    def place(match: re.Match) -> str:
        return f"{target}res{int(match[1]) + 1}.{match[2]}."

    return [
        Rule(re.escape(source) + r"conv1\." + WEIGHT, rf"{target}stem.conv1.\1"),
        Rule(re.escape(source) + r"bn1\." + NORM, rf"{target}stem.conv1.norm.\1"),
        Rule(block + r"(conv[123])\." + WEIGHT, lambda m: f"{place(m)}{m[3]}.{m[4]}"),
        Rule(block + r"bn([123])\." + NORM, lambda m: f"{place(m)}conv{m[3]}.norm.{m[4]}"),
        Rule(block + r"conv2(?:\.conv|)_offset\.(weight|bias)", lambda m: f"{place(m)}conv2_offset.{m[3]}"),
        Rule(
            block + r"conv2\.(switch|pre_context|post_context|offset_s|offset_l)\.(weight|bias)",
            lambda m: f"{place(m)}conv2.{m[3]}.{m[4]}",
        ),
        Rule(block + r"downsample\.0\." + WEIGHT, lambda m: f"{place(m)}shortcut.{m[3]}"),
        Rule(block + r"downsample\.1\." + NORM, lambda m: f"{place(m)}shortcut.norm.{m[3]}"),
        Rule(block + r"rfp_conv\.(weight|bias)", lambda m: f"{place(m)}rfp_conv.{m[3]}"),
    ]


def resnet_config(tensors: Tensors, stride_in_1x1: bool) -> dict:
    """MODEL.RESNETS of a ResNet in mmdetection's names, and the name of its builder.

    Raises:
        ValueError: stages that no ResNet of detectron2 has.
    """
    blocks = tuple(_count(tensors, rf"backbone\.layer{k}\.(\d+)\..*") for k in range(1, 5))
    basic = "backbone.layer1.0.conv3.weight" not in tensors
    if (blocks, basic) not in DEPTHS:
        raise ValueError(f"the file has a ResNet with stages of {blocks} blocks, which is none of {DEPTHS.values()}")
    conv2 = tensors["backbone.layer1.0.conv2.weight"]
    options = {
        "DEPTH": DEPTHS[blocks, basic], "NORM": "FrozenBN", "STRIDE_IN_1X1": stride_in_1x1,
        "STEM_OUT_CHANNELS": tensors["backbone.conv1.weight"].shape[0],
        "RES2_OUT_CHANNELS": tensors[f"backbone.layer1.0.conv{2 if basic else 3}.weight"].shape[0],
    }  # fmt: skip
    if not basic:
        groups = conv2.shape[0] // conv2.shape[1]
        options |= {"NUM_GROUPS": groups, "WIDTH_PER_GROUP": conv2.shape[0] // groups}
    options |= _deformable(tensors)
    builder = "build_resnet_backbone"
    if "backbone.conv1.weight_gamma" in tensors or "backbone.layer2.0.conv2.weight_diff" in tensors:
        builder = "build_sac_resnet_backbone"
        options |= {
            "CONV_AWS": "backbone.conv1.weight_gamma" in tensors,
            "SAC_ON_PER_STAGE": [f"backbone.layer{k}.0.conv2.weight_diff" in tensors for k in range(1, 5)],
            "SAC_DEFORM": "backbone.layer4.0.conv2.offset_s.weight" in tensors,
        }
    return {"MODEL": {"RESNETS": options, "FPN": {"BOTTOM_UP": builder}}}


def _deformable(tensors: Tensors) -> dict:
    """Keys of MODEL.RESNETS for deformable stages, none if there are none."""
    found = {}
    for k in range(1, 5):
        block = f"backbone.layer{k}.0."
        offset = next((tensors[n] for n in (f"{block}conv2.conv_offset.weight", f"{block}conv2_offset.weight")
                       if n in tensors), None)  # fmt: skip
        if offset is not None:
            found[k] = offset.shape[0], tensors[f"{block}conv1.weight"].shape[0]
    if not found:
        return {}
    offsets, channels = next(iter(found.values()))
    # Two numbers for each of nine taps, and with modulation (v2) three, times groups, which share the channels.
    fits = [(n, offsets // n) for n in (18, 27) if offsets % n == 0 and channels % (offsets // n) == 0]
    if len(fits) != 1:
        raise ValueError(f"cannot tell which deformable convolution has {offsets} offsets for {channels} channels")
    per_group, groups = fits[0]
    return {
        "DEFORM_ON_PER_STAGE": [k in found for k in range(1, 5)], "DEFORM_MODULATED": per_group == 27,
        "DEFORM_NUM_GROUPS": groups,
    }  # fmt: skip


# Patch merging: mmdetection gathers the four neighbours channel by channel and row by row, detectron2 neighbour by
# neighbour and column by column.
NEIGHBOURS = torch.tensor([0, 2, 1, 3])


def merging_order(size: int) -> torch.Tensor:
    """Where detectron2's 4 C merged channels are among mmdetection's."""
    channels = size // 4
    return (4 * torch.arange(channels)[None] + NEIGHBOURS[:, None]).flatten()


def swin_rules() -> list[Rule]:
    """Rules of mmdetection's Swin Transformer, and of the official detectors', whose names are detectron2's."""
    source, target = r"backbone\.", "backbone.bottom_up."
    block = source + r"stages\.(\d)\.blocks\.(\d+)\."
    place = target + r"layers.\1.blocks.\2."
    return [
        Rule(source + r"patch_embed\.projection\.(weight|bias)", target + r"patch_embed.proj.\1"),
        Rule(source + r"(patch_embed\.norm\..*|norm[0-3]\..*|absolute_pos_embed)", target + r"\1"),
        Rule(block + r"(norm[12]\..*)", place + r"\3"),
        Rule(block + r"attn\.w_msa\.(.*)", place + r"attn.\3"),
        Rule(block + r"ffn\.layers\.0\.0\.(.*)", place + r"mlp.fc1.\3"),
        Rule(block + r"ffn\.layers\.1\.(.*)", place + r"mlp.fc2.\3"),
        Rule(
            source + r"stages\.(\d)\.downsample\.(norm\.(?:weight|bias))", target + r"layers.\1.downsample.\2",
            reorder(merging_order),
        ),
        Rule(
            source + r"stages\.(\d)\.downsample\.reduction\.weight", target + r"layers.\1.downsample.reduction.weight",
            reorder(merging_order, dim=1),
        ),
        Rule(source + r"(patch_embed\.proj\..*|layers\..*)", target + r"\1"),
    ]  # fmt: skip


def swin_indices(tensors: Tensors) -> Tensors:
    """For each block of detectron2's Swin its buffer of relative positions, (w w, w w) for windows of w tokens.

    A query at (y, x) and a key at (v, u) have the row (y - v + w - 1)(2 w - 1) + x - u + w - 1 of the table.
    """
    found = {}
    for name, table in tensors.items():
        if name.startswith("backbone.bottom_up.") and name.endswith(".relative_position_bias_table"):
            side = (round(table.shape[0] ** 0.5) + 1) // 2
            y, x = (axis.flatten() for axis in torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"))
            rows = (y[:, None] - y + side - 1) * (2 * side - 1) + x[:, None] - x + side - 1
            found[name.replace("_bias_table", "_index")] = rows
    return found


def swin_config(tensors: Tensors) -> dict:
    """MODEL.SWIN of a Swin Transformer in mmdetection's or the official names."""
    stage = "stages" if "backbone.patch_embed.projection.weight" in tensors else "layers"
    attention = "attn.w_msa" if stage == "stages" else "attn"
    depths, heads, window = [], [], 0
    for k in range(4):
        depths.append(_count(tensors, rf"backbone\.{stage}\.{k}\.blocks\.(\d+)\..*"))
        table = tensors[f"backbone.{stage}.{k}.blocks.0.{attention}.relative_position_bias_table"]
        heads.append(table.shape[1])
        window = (round(table.shape[0] ** 0.5) + 1) // 2
    embed = next(tensors[n] for n in tensors if re.fullmatch(r"backbone\.patch_embed\.proj(ection)?\.weight", n))
    hidden = "ffn.layers.0.0" if stage == "stages" else "mlp.fc1"
    options = {
        "EMBED_DIM": embed.shape[0], "DEPTHS": depths, "NUM_HEADS": heads, "WINDOW_SIZE": window,
        "MLP_RATIO": tensors[f"backbone.{stage}.0.blocks.0.{hidden}.weight"].shape[0] / embed.shape[0],
        "APE": "backbone.absolute_pos_embed" in tensors, "PATCH_NORM": "backbone.patch_embed.norm.weight" in tensors,
        "OUT_FEATURES": [f"p{k}" for k in range(4) if f"backbone.norm{k}.weight" in tensors],
        "DROP_PATH_RATE": 0.0,  # for inference; training has 0.2 (Swin-B: 0.3)
    }  # fmt: skip
    return {"MODEL": {"SWIN": options, "FPN": {"BOTTOM_UP": "build_swin_backbone"}}}


def neck_rules(tensors: Tensors) -> list[Rule]:
    """Rules of FPN, and of the rest of RFP."""
    count = _count(tensors, r"neck\.lateral_convs\.(\d+)\..*")
    start = 6 - count  # the last lateral is of C5

    def output(match: re.Match) -> str:
        level = int(match[1]) + start
        norm = "norm." if match[2] in ("gn", "bn") else ""
        return f"backbone.{'fpn_output' if level <= 5 else 'top_block.p'}{level}.{norm}{match[3]}"

    def lateral(match: re.Match) -> str:
        norm = "norm." if match[2] in ("gn", "bn") else ""
        return f"backbone.fpn_lateral{int(match[1]) + start}.{norm}{match[3]}"

    return [
        Rule(r"neck\.lateral_convs\.(\d+)\.(conv|gn|bn)\.(\w+)", lateral),
        Rule(r"neck\.fpn_convs\.(\d+)\.(conv|gn|bn)\.(\w+)", output),
        Rule(r"neck\.(rfp_aspp\.aspp\.\d\.(?:weight|bias)|rfp_weight\.(?:weight|bias))", r"backbone.\1"),
        *resnet_rules("neck.rfp_modules.0.", "backbone.rfp_bottom_up."),
    ]


def neck_config(tensors: Tensors, in_features: list[str], relu: bool) -> dict:
    """MODEL.FPN and the neck's builder.

    Args:
        in_features: names of the bottom-up's maps that the laterals read, as many of the last as there are laterals.
        relu: whether P7 is made of ReLU(P6).
    """
    laterals = _count(tensors, r"neck\.lateral_convs\.(\d+)\..*")
    outputs = _count(tensors, r"neck\.fpn_convs\.(\d+)\..*")
    start = 6 - laterals
    norm = "GN" if "neck.lateral_convs.0.gn.weight" in tensors else ""
    channels = tensors["neck.lateral_convs.0.conv.weight"].shape[0]
    last = start + outputs - 1 if outputs > laterals else 6
    options = {
        "IN_FEATURES": in_features[-laterals:], "OUT_CHANNELS": channels, "NORM": norm,
        "LEVELS": [f"p{level}" for level in range(start, last + 1)], "TOP_BLOCK": "maxpool",
    }  # fmt: skip
    if outputs > laterals:
        reads = tensors[f"neck.fpn_convs.{laterals}.conv.weight"].shape[1]
        c5 = tensors[f"neck.lateral_convs.{laterals - 1}.conv.weight"].shape[1]
        if reads not in (c5, channels):
            raise ValueError(f"neck.fpn_convs.{laterals} reads {reads} channels, neither C5 ({c5}) nor P5 ({channels})")
        source = "c5" if reads == c5 else "p5"
        options |= {"TOP_BLOCK": "conv", "TOP_SOURCE": source, "TOP_RELU": relu, "TOP_NORM": norm}
    recursive = any(name.startswith("neck.rfp_modules.") for name in tensors)
    name = "build_rfp_backbone" if recursive else "build_level_fpn_backbone"
    return {"MODEL": {"BACKBONE": {"NAME": name, "FREEZE_AT": 2}, "FPN": options}}


def _count(tensors: Tensors, pattern: str) -> int:
    return 1 + max((int(m[1]) for m in (re.fullmatch(pattern, name) for name in tensors) if m), default=-1)
