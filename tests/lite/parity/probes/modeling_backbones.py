"""ResNet and FPN variants: names, initial weights under a seed, outputs."""

import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, ResNet, build_backbone, build_model
from detectron2.modeling.backbone import BasicStem, BottleneckBlock
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.backbone.resnet import BasicBlock, DeformBottleneckBlock, build_resnet_backbone, make_stage

VARIANTS = {
    "r50_c4": {},
    "r50_caffe_stride": {"STRIDE_IN_1X1": False},
    "r50_dilated": {"RES5_DILATION": 2, "OUT_FEATURES": ["stem", "res4", "res5"]},
    "r18": {"DEPTH": 18, "RES2_OUT_CHANNELS": 64, "OUT_FEATURES": ["res2", "res5"]},
    "r34_bn": {"DEPTH": 34, "RES2_OUT_CHANNELS": 64, "NORM": "BN", "OUT_FEATURES": ["res3"]},
    "x50": {"NUM_GROUPS": 32, "WIDTH_PER_GROUP": 4, "STRIDE_IN_1X1": False, "OUT_FEATURES": ["res3"]},
    "x50_64x4d": {"NUM_GROUPS": 64, "WIDTH_PER_GROUP": 4, "STRIDE_IN_1X1": False, "OUT_FEATURES": ["res4"]},
    "r50_dcn": {"DEFORM_ON_PER_STAGE": [False, True, True, True], "OUT_FEATURES": ["res5"]},
    "x50_dcn": {
        "DEFORM_ON_PER_STAGE": [False, False, True, True], "NUM_GROUPS": 32, "WIDTH_PER_GROUP": 4,
        "STRIDE_IN_1X1": False, "RES5_DILATION": 2, "OUT_FEATURES": ["res3", "res5"],
    },
    "r50_gn": {"NORM": "GN", "OUT_FEATURES": ["res2", "res3"]},
    "stem_only": {"OUT_FEATURES": ["stem"]},
}


def described(model, x):
    shapes = {name: [s.channels, s.stride] for name, s in model.output_shape().items()}
    model.eval()
    with torch.no_grad():
        output = model(x)
    return [
        list(model.state_dict()), [float(v.double().sum()) for v in model.state_dict().values()],
        [n for n, p in model.named_parameters() if not p.requires_grad], shapes, model.size_divisibility,
        dict(model.padding_constraints), {k: v / v.abs().max() for k, v in output.items()},
        [float(v.abs().max().log()) for v in output.values()],
    ]


def probe(workdir):
    out = {}
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    for name, settings in VARIANTS.items():
        cfg = get_cfg()
        cfg.MODEL.RESNETS.merge_from_list([x for item in settings.items() for x in item])
        torch.manual_seed(4)
        model = build_resnet_backbone(cfg, ShapeSpec(channels=3))
        out[f"{name}.next random number"] = torch.rand(1)  # of what is built behind the backbone
        for part, module in model.named_modules():
            if part.endswith("conv2_offset"):  # starts at zero: no displacement
                torch.nn.init.normal_(module.weight, std=0.1)
        out[name] = described(model, image)
        out[f"{name}.stages"] = [list(model.stage_names), len(model.stages), model.num_classes]

    for modulated, groups in ((False, 4), (True, 1), (True, 2)):  # detectron2's operator for these needs a GPU
        torch.manual_seed(9)
        options = {"deform_modulated": modulated, "deform_num_groups": groups, "num_groups": 2, "dilation": 2}
        block = DeformBottleneckBlock(8, 16, bottleneck_channels=8, stride=2, stride_in_1x1=True, **options)
        shapes = {name: list(value.shape) for name, value in block.state_dict().items()}
        out[f"deform_block_{modulated}_{groups}"] = [shapes, [float(v.double().sum()) for v in block.parameters()]]

    for freeze_at in range(7):
        model = ResNet(BasicStem(norm="BN"), ResNet.make_default_stages(18, norm="BN"), freeze_at=freeze_at)
        out[f"freeze_{freeze_at}"] = [
            [n for n, p in model.named_parameters() if not p.requires_grad],
            [n for n, m in model.named_modules() if type(m).__name__ == "FrozenBatchNorm2d"],
        ]
    torch.manual_seed(6)
    model = ResNet(BasicStem(norm="BN"), ResNet.make_default_stages(18, norm="BN"), num_classes=5).eval()
    out["classifier"] = [model(image)["linear"], list(model.state_dict()), [n for n, _ in model.named_children()]]
    blocks = make_stage(BasicBlock, 3, in_channels=4, out_channels=8, stride_per_block=[2, 1, 1], norm="")
    out["make_stage"] = [[b.in_channels, b.out_channels, b.stride] for b in blocks]
    for depth in (50, 101, 152):
        stages = ResNet.make_default_stages(depth, block_class=BottleneckBlock, norm="")
        out[f"stages_{depth}"] = [[[b.in_channels, b.out_channels, b.stride] for b in s] for s in stages]

    for depth in (18, 34, 50, 101):
        for name in ("build_resnet_fpn_backbone", "build_retinanet_resnet_fpn_backbone"):
            cfg = get_cfg()
            inputs = ["res3", "res4", "res5"] if "retinanet" in name else ["res2", "res3", "res4", "res5"]
            cfg.MODEL.BACKBONE.NAME = name
            cfg.MODEL.RESNETS.DEPTH = depth
            cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth < 50 else 256
            cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = inputs
            if depth == 101:
                out[f"{name}.{depth}"] = list(build_backbone(cfg).state_dict())
                continue
            torch.manual_seed(depth)
            out[f"{name}.{depth}"] = described(build_backbone(cfg), image)
            out[f"{name}.registered"] = name in BACKBONE_REGISTRY

    for depth in (18, 34, 50, 101):
        cfg = get_cfg()
        cfg.MODEL.DEVICE = "cpu"
        cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
        cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
        cfg.MODEL.RESNETS.DEPTH = depth
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth < 50 else 256
        cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
        torch.manual_seed(depth)
        state = build_model(cfg).state_dict()
        out[f"retinanet_{depth}"] = [list(state), [float(v.double().sum()) for v in state.values()]]

    bottom_up = ResNet(
        BasicStem(norm="FrozenBN"), ResNet.make_default_stages(18, norm="FrozenBN"),
        out_features=["res2", "res3", "res4", "res5"],
    )
    for name, options in {
        "sum": {"in_features": ["res2", "res3", "res4", "res5"], "top_block": LastLevelMaxPool()},
        "avg_gn_p5": {
            "in_features": ["res3", "res4", "res5"], "fuse_type": "avg", "norm": "GN",
            "top_block": LastLevelP6P7(32, 32, "p5"),
        },
        "square": {"in_features": ["res3"], "square_pad": 128},
        "inner": {"in_features": ["res3", "res4"]},
    }.items():
        torch.manual_seed(9)
        fpn = FPN(bottom_up, out_channels=32, **options)
        # The state of the shared ResNet depends on what was drawn before it, which differs in no variant.
        out[f"fpn_{name}"] = [
            list(fpn.state_dict()), [list(c.weight.shape) for c in fpn.lateral_convs],
            [list(c.weight.shape) for c in fpn.output_convs], list(fpn.in_features),
            [n for n, _ in fpn.named_children()], described(fpn, image),
        ]
    return out
