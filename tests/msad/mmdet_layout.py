"""Files in the layout of mmdetection's checkpoints: names and shapes of narrow detectors for two classes.

Values follow from the names, so that mmdetection, run with the same values, could tell what its models detect.
"""

from __future__ import annotations

import functools
import math
import zlib

import torch

BASE, C, CLASSES, FC, STUFF = 4, 32, 2, 64, 5  # widths of the backbone, the neck and the boxes' heads
BLOCKS = (3, 4, 6, 3)
SWIN = {"embed": 12, "heads": (1, 2, 3, 4), "depths": (1, 2, 2, 1), "window": 4}

Shapes = dict[str, tuple[int, ...]]

# Layers whose outputs are read as they are; larger values would saturate them.
OUTPUTS = (
    "fc_cls", "fc_reg", "retina_cls", "retina_reg", "conv_cls", "conv_reg", "centerness", "gfl_cls", "gfl_reg",
    "rpn_cls", "rpn_reg", "conv_logits", "reppoints_cls_out", "pts_init_out", "pts_refine_out",
)  # fmt: skip


def value(name: str, shape: tuple[int, ...], dark: bool) -> torch.Tensor:
    """The tensor ``name``; ``dark`` for networks of images that are not divided by their deviation."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if name.endswith("running_var"):
        return 0.5 + x.sigmoid()
    if name.endswith("weight_gamma"):
        return 0.1 + 0.1 * x.sigmoid()
    if name.endswith(("weight_beta", "weight_diff")):
        return 0.02 * x
    if name.endswith("relative_position_bias_table"):
        return 0.3 * x
    if len(shape) <= 1:
        middle = (0.3 if ".bn3." in name else 1.0) if name.endswith(("weight", "scale")) else 0.0
        return middle + 0.1 * x
    gain = 0.5 if any(part in name for part in OUTPUTS) else 1.0
    if name == "backbone.conv1.weight" and dark:
        gain = 0.02
    if "offset" in name or "context" in name or "switch" in name:
        gain = 0.3
    return x * gain / math.sqrt(math.prod(shape[1:]))


def image() -> torch.Tensor:
    """(3, 128, 192), channels blue, green and red."""
    return torch.randint(0, 256, (3, 128, 192), generator=torch.Generator().manual_seed(5)).float()


def conv(name: str, out: int, into: int, size: int, bias: bool = True, aws: bool = False) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (out, into, size, size)}
    if aws:
        shapes |= dict.fromkeys((f"{name}.weight_gamma", f"{name}.weight_beta"), (out, 1, 1, 1))
    return shapes | ({f"{name}.bias": (out,)} if bias else {})


def linear(name: str, out: int, into: int) -> Shapes:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name: str, channels: int, batch: bool = True) -> Shapes:
    kinds = ("weight", "bias", *(("running_mean", "running_var") if batch else ()))
    return {f"{name}.{kind}": (channels,) for kind in kinds} | ({f"{name}.num_batches_tracked": ()} if batch else {})


def resnet(
    prefix: str = "backbone.", groups: int = 1, width: int = 64, offsets: int = 0, deformed: int = 1, sac: bool = False,
    rfp: bool = False, blocks: tuple[int, ...] = BLOCKS,
) -> Shapes:  # fmt: skip
    """ResNet; in the stages from ``deformed``, each deformable convolution predicts ``offsets`` numbers."""
    shapes = conv(f"{prefix}conv1", BASE, 3, 7, False, sac) | norm(f"{prefix}bn1", BASE)
    into = BASE
    for stage, count in enumerate(blocks):
        plain = BASE * 2**stage
        inner, out = plain * width // 64 * groups, 4 * plain
        if groups > 1:
            inner = int(plain * (width / BASE)) * groups
        for number in range(count):
            block = f"{prefix}layer{stage + 1}.{number}."
            switched = sac and stage > 0
            shapes |= conv(f"{block}conv1", inner, into, 1, False, sac) | norm(f"{block}bn1", inner)
            shapes |= conv(f"{block}conv2", inner, inner // groups, 3, False, sac) | norm(f"{block}bn2", inner)
            shapes |= conv(f"{block}conv3", out, inner, 1, False, sac) | norm(f"{block}bn3", out)
            if offsets and stage >= deformed:
                shapes |= conv(f"{block}conv2.conv_offset", offsets, inner, 3)
            if switched:
                shapes[f"{block}conv2.weight_diff"] = (inner, inner, 3, 3)
                shapes |= conv(f"{block}conv2.switch", 1, inner, 1)
                shapes |= conv(f"{block}conv2.pre_context", inner, inner, 1)
                shapes |= conv(f"{block}conv2.post_context", inner, inner, 1)
                shapes |= conv(f"{block}conv2.offset_s", 18, inner, 3) | conv(f"{block}conv2.offset_l", 18, inner, 3)
            if number == 0:
                shapes |= conv(f"{block}downsample.0", out, into, 1, False, sac) | norm(f"{block}downsample.1", out)
                if rfp and stage > 0:
                    shapes |= conv(f"{block}rfp_conv", out, C, 1)
            into = out
    return shapes


def swin(finest: int = 0) -> Shapes:
    """Swin Transformer whose maps from the stage ``finest`` are read, each through a norm of its own."""
    width, shapes = SWIN["embed"], {}
    shapes |= conv("backbone.patch_embed.projection", width, 3, 4) | norm("backbone.patch_embed.norm", width, False)
    for stage, (heads, depth) in enumerate(zip(SWIN["heads"], SWIN["depths"])):
        for number in range(depth):
            block = f"backbone.stages.{stage}.blocks.{number}."
            shapes |= norm(f"{block}norm1", width, False) | norm(f"{block}norm2", width, False)
            side = SWIN["window"]
            shapes[f"{block}attn.w_msa.relative_position_bias_table"] = ((2 * side - 1) ** 2, heads)
            shapes |= linear(f"{block}attn.w_msa.qkv", 3 * width, width)
            shapes |= linear(f"{block}attn.w_msa.proj", width, width)
            shapes |= linear(f"{block}ffn.layers.0.0", 4 * width, width)
            shapes |= linear(f"{block}ffn.layers.1", width, 4 * width)
        shapes |= norm(f"backbone.norm{stage}", width, False) if stage >= finest else {}
        if stage < 3:
            shapes |= norm(f"backbone.stages.{stage}.downsample.norm", 4 * width, False)
            shapes[f"backbone.stages.{stage}.downsample.reduction.weight"] = (2 * width, 4 * width)
            width *= 2
    return shapes


def fpn(sources: list[int], extra: int = 0, gn: bool = False, extra_from: int = 0) -> Shapes:
    """Laterals of maps with ``sources`` channels, and ``extra`` levels above, the first of ``extra_from`` channels."""
    shapes: Shapes = {}
    inputs = [C] * len(sources) + [extra_from, C][:extra]
    for k, into in enumerate(sources):
        shapes |= conv(f"neck.lateral_convs.{k}.conv", C, into, 1, not gn)
        shapes |= norm(f"neck.lateral_convs.{k}.gn", C, False) if gn else {}
    for k, into in enumerate(inputs):
        shapes |= conv(f"neck.fpn_convs.{k}.conv", C, into, 3, not gn)
        shapes |= norm(f"neck.fpn_convs.{k}.gn", C, False) if gn else {}
    return shapes


def towers(count: int, gn: bool, bias: bool, deform_last: bool = False) -> Shapes:
    shapes: Shapes = {}
    for k in range(count):
        for branch in ("cls_convs", "reg_convs"):
            shapes |= conv(f"bbox_head.{branch}.{k}.conv", C, C, 3, bias)
            shapes |= norm(f"bbox_head.{branch}.{k}.gn", C, False) if gn else {}
            if deform_last and k == count - 1:
                shapes |= conv(f"bbox_head.{branch}.{k}.conv.conv_offset", 27, C, 3)
    return shapes


def scales() -> Shapes:
    return {f"bbox_head.scales.{k}.scale": () for k in range(5)}


def box_heads(stages: list[str], each_class: bool) -> Shapes:
    shapes = conv("rpn_head.rpn_conv", C, C, 3) | conv("rpn_head.rpn_cls", 3, C, 1) | conv("rpn_head.rpn_reg", 12, C, 1)
    for stage in stages:
        head = f"roi_head.bbox_head{stage}."
        shapes |= linear(f"{head}shared_fcs.0", FC, C * 49) | linear(f"{head}shared_fcs.1", FC, FC)
        shapes |= linear(f"{head}fc_cls", CLASSES + 1, FC)
        shapes |= linear(f"{head}fc_reg", 4 * CLASSES if each_class else 4, FC)
    return shapes


def mask_heads(stages: list[str], htc: bool = False) -> Shapes:
    shapes: Shapes = {}
    for number, stage in enumerate(stages):
        head = f"roi_head.mask_head{stage}."
        for k in range(4):
            shapes |= conv(f"{head}convs.{k}.conv", C, C, 3)
        shapes |= conv(f"{head}upsample", C, C, 2) | conv(f"{head}conv_logits", CLASSES, C, 1)
        shapes |= conv(f"{head}conv_res.conv", C, C, 1) if htc and number else {}
    return shapes


def semantic() -> Shapes:
    head, shapes = "roi_head.semantic_head.", {}
    for k in range(5):
        shapes |= conv(f"{head}lateral_convs.{k}.conv", C, C, 1)
    for k in range(4):
        shapes |= conv(f"{head}convs.{k}.conv", C, C, 3)
    return shapes | conv(f"{head}conv_embedding.conv", C, C, 1) | conv(f"{head}conv_logits", STUFF, C, 1)


def rfp() -> Shapes:
    shapes = resnet("neck.rfp_modules.0.", sac=True, rfp=True)
    for k, size in enumerate((1, 3, 3, 1)):
        shapes |= conv(f"neck.rfp_aspp.aspp.{k}", C // 4, C, size)
    return shapes | conv("neck.rfp_weight", 1, C, 1)


ONE, THREE = [""], [".0", ".1", ".2"]
SAID = "model = dict(data_preprocessor=dict(mean={}, std={}, bgr_to_rgb={}), backbone=dict(style='{}'))\n"
CAFFE = SAID.format([103.53, 116.28, 123.675], [1.0, 1.0, 1.0], False, "caffe")
DETECTRON = CAFFE.replace("103.53, 116.28, 123.675", "102.9801, 115.9465, 122.7717")
RGB = SAID.format([123.675, 116.28, 103.53], [58.395, 57.12, 57.375], True, "pytorch")
RESNEXT = {"groups": 2, "width": 8}
# By the name behind the "+" of a case; none is ResNet-50. Deformable are the last three stages, or two ("_c45").
BODIES = {
    "": {}, "r101": {"blocks": (3, 4, 23, 3)}, "x": RESNEXT, "dcn1": {"offsets": 18}, "dcn2": {"offsets": 54},
    "dcn2_one": {"offsets": 27},  # one group of channels, the others two
    "x_dcn": {**RESNEXT, "offsets": 18}, "x_dcn_c45": {**RESNEXT, "offsets": 18, "deformed": 2}, "sac": {"sac": True},
}  # fmt: skip


def layout(case: str) -> tuple[Shapes, str]:
    """Names and shapes of a detector, "HEAD" or "HEAD+BODY", and what its config says."""
    head, _, body = case.partition("+")
    widths = [12, 24, 48, 96] if body == "swin" else [4 * BASE * 2**k for k in range(4)]
    dense, last = widths[1:], widths[-1]
    reads = 1 if head.split("_")[0] in ("retinanet", "fcos", "gfl", "reppoints") else 0
    recursive = rfp() if head.startswith("detectors") else {}
    backbone = swin(reads) if body == "swin" else resnet(**BODIES["sac" if recursive else body])
    retinanet = conv("bbox_head.retina_cls", 9 * CLASSES, C, 3) | conv("bbox_head.retina_reg", 36, C, 3)
    fcos = (
        fpn(dense, 2, extra_from=C) | scales() | conv("bbox_head.conv_cls", CLASSES, C, 3)
        | conv("bbox_head.conv_reg", 4, C, 3) | conv("bbox_head.conv_centerness", 1, C, 3)
    )  # fmt: skip
    two_stage = fpn(widths) | box_heads(ONE, True)
    cascade = fpn(widths) | box_heads(THREE, False) | recursive
    heads = {
        "retinanet": lambda: (fpn(dense, 2, extra_from=last) | towers(4, False, True) | retinanet, RGB),
        "fcos": lambda: (fcos | towers(4, True, False), DETECTRON),
        "fcos_normbbox": lambda: (fcos | towers(4, True, True), CAFFE),
        "fcos_deform": lambda: (fcos | towers(4, True, True, deform_last=True), CAFFE),
        "gfl": lambda: (
            fpn(dense, 2, extra_from=C) | towers(4, True, False) | scales()
            | conv("bbox_head.gfl_cls", CLASSES, C, 3) | conv("bbox_head.gfl_reg", 68, C, 3)
            | {"bbox_head.integral.project": (17,)}, RGB,
        ),
        "reppoints": lambda: (
            fpn(dense, 2, True, last) | towers(3, True, False) | {"bbox_head.moment_transfer": (2,)}
            | conv("bbox_head.reppoints_cls_conv", C, C, 3, False) | conv("bbox_head.reppoints_cls_out", CLASSES, C, 1)
            | conv("bbox_head.reppoints_pts_init_conv", C, C, 3) | conv("bbox_head.reppoints_pts_init_out", 18, C, 1)
            | conv("bbox_head.reppoints_pts_refine_conv", C, C, 3, False)
            | conv("bbox_head.reppoints_pts_refine_out", 18, C, 1), RGB,
        ),
        "faster": lambda: (two_stage, RGB),
        "mask": lambda: (two_stage | mask_heads(ONE), RGB),
        "cascade": lambda: (cascade, RGB),
        "cascade_mask": lambda: (cascade | mask_heads(THREE), RGB),
        "htc": lambda: (cascade | mask_heads(THREE, True) | semantic(), RGB),
        "htc_without": lambda: (cascade | mask_heads(THREE, True), RGB),
        "detectors_htc": lambda: (cascade | mask_heads(THREE, True) | semantic(), RGB),
        "detectors_cascade": lambda: (cascade, RGB),
    }  # fmt: skip
    shapes, text = heads[head]()
    return backbone | shapes, text


@functools.cache
def _values(case: str) -> tuple[dict[str, torch.Tensor], str]:
    shapes, text = layout(case)
    return {name: value(name, shape, "std=[1.0" in text) for name, shape in shapes.items()}, text


def tensors(case: str) -> tuple[dict[str, torch.Tensor], str]:
    """A state dict of mmdetection's layout, and the text of its config; the tensors must not be changed."""
    made, text = _values(case)
    return dict(made), text
