"""Narrow ResNets by stock keys, MobileNetV2, and slimmable weights against a network that slices in its forward."""

from __future__ import annotations

import math
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import mobilenet_v2, resnet18, resnet34

from msad import load_config
from msad.engine.checkpoint import CheckedCheckpointer
from msad.engine.slimmable import from_slimmable
from msad.modeling.backbones.mobilenetv2 import MobileNetV2
from msad.modeling.backbones.resnet import ResNetC1

ALL = ["c1", "res2", "res3", "res4", "res5"]
RESNET_WIDTHS = (0.25, 0.5, 0.75, 1.0)
MOBILE_WIDTHS = (0.35, 0.5, 0.75, 1.0)
CONFIGS = Path(__file__).parents[2] / "configs" / "MSAD"


def resnet_cfg(width=1.0, out_features=ALL):
    """ResNet-50 of a width by detectron2's own keys."""
    cfg = load_config("")
    cfg.MODEL.BACKBONE.NAME = "build_resnet_c1_backbone" if "c1" in out_features else "build_resnet_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    options = cfg.MODEL.RESNETS
    options.NORM, options.STRIDE_IN_1X1, options.OUT_FEATURES = "BN", False, list(out_features)
    options.STEM_OUT_CHANNELS, options.WIDTH_PER_GROUP = int(64 * width), int(64 * width)
    options.RES2_OUT_CHANNELS = int(256 * width)
    return cfg


def mobile_cfg(width=1.0, out_features=ALL, **options):
    cfg = load_config("")
    cfg.MODEL.BACKBONE.NAME = "build_mobilenetv2_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = options.pop("FREEZE_AT", 0)
    cfg.MODEL.MOBILENETV2.update(WIDTH=width, OUT_FEATURES=list(out_features), **options)
    return cfg


def build(cfg):
    return build_backbone(cfg).eval()


# --- shapes -----------------------------------------------------------------------------------------------------------


def divisible(channels):
    """Multiple of 8 next to ``channels`` (halves up), at least 8; the next one if that is below 90 %."""
    rounded = max(8 * math.floor(channels / 8 + 0.5), 8)
    return rounded + 8 * (rounded < 0.9 * channels)


@pytest.mark.parametrize("width", RESNET_WIDTHS)
def test_narrow_resnet_50(width):
    net = build(resnet_cfg(width))
    assert isinstance(net, ResNetC1)
    channels = [int(c * width) for c in (64, 256, 512, 1024, 2048)]
    shapes = {name: (1, c, 64 // 2**i, 96 // 2**i) for i, (name, c) in enumerate(zip(ALL, channels), start=1)}
    assert {name: tuple(x.shape) for name, x in net(torch.zeros(1, 3, 64, 96)).items()} == shapes
    assert net.output_shape() == {
        name: ShapeSpec(channels=c, stride=2**i) for i, (name, c) in enumerate(zip(ALL, channels), start=1)
    }
    assert net.res3[0].conv2.stride == (2, 2) and net.res3[0].conv1.stride == (1, 1)
    assert net.res4[1].conv2.weight.shape == (int(256 * width), int(256 * width), 3, 3)


@pytest.mark.parametrize("width", MOBILE_WIDTHS)
def test_mobilenetv2_has_the_channels_of_its_width(width):
    net = build(mobile_cfg(width))
    channels = [*(divisible(c * width) for c in (16, 24, 32, 96)), 1280]
    specs = {name: ShapeSpec(channels=c, stride=2**i) for i, (name, c) in enumerate(zip(ALL, channels), start=1)}
    assert net.output_shape() == specs
    maps = net(torch.zeros(1, 3, 64, 96))
    assert {name: tuple(x.shape) for name, x in maps.items()} == {
        name: (1, s.channels, 64 // s.stride, 96 // s.stride) for name, s in specs.items()
    }


@pytest.mark.parametrize("depth", [18, 34])
@pytest.mark.parametrize("levels", [(1, 2, 3, 4, 5), (2, 3, 4, 5, 6)])
def test_shallow_resnets_under_the_pyramid(depth, levels):
    cfg = load_config("")
    names = ALL if levels[0] == 1 else ALL[1:]
    cfg.MODEL.BACKBONE.NAME = "build_level_fpn_backbone"
    cfg.MODEL.FPN.BOTTOM_UP = "build_resnet_c1_backbone"
    cfg.MODEL.RESNETS.merge_from_list(["DEPTH", depth, "RES2_OUT_CHANNELS", 64, "OUT_FEATURES", names])
    cfg.MODEL.FPN.merge_from_list(["IN_FEATURES", names, "LEVELS", [f"p{i}" for i in levels], "OUT_CHANNELS", 8])
    neck = build(cfg)
    assert len(neck.bottom_up.res4) == {18: 2, 34: 6}[depth]
    maps = neck(torch.zeros(1, 3, 64, 64))
    assert {name: tuple(x.shape) for name, x in maps.items()} == {
        f"p{i}": (1, 8, 64 // 2**i, 64 // 2**i) for i in levels
    }


@pytest.mark.parametrize(("depth", "network", "norm"), [(18, resnet18, "BN"), (34, resnet34, "FrozenBN")])
def test_shallow_resnets_take_torchvisions_weights(tmp_path, depth, network, norm):
    """In the layout of the file that detectron2's tools/convert-torchvision-to-d2.py writes."""
    GENERATOR.manual_seed(depth)
    whole = network(weights=None).eval().double()
    for module in whole.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for value in (module.weight, module.bias, module.running_mean, module.running_var):
                value.data = (0.5 + torch.rand(value.shape, generator=GENERATOR)).double()
    state = {}
    for name, value in whole.state_dict().items():
        name = re.sub(r"\bbn(\d)", r"conv\1.norm", name).replace("downsample.0", "shortcut")
        name = re.sub(r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}", name.replace("downsample.1", "shortcut.norm"))
        state[name if name.startswith("res") else f"stem.{name}"] = value.numpy()
    file = tmp_path / "torchvision.pkl"
    file.write_bytes(pickle.dumps({"model": state, "__author__": "torchvision", "matching_heuristics": True}))

    options = ["MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.NORM", norm, "MODEL.FPN.OUT_CHANNELS", 8]
    cfg = load_config(CONFIGS / "fcos_R_18_S_L_1x.yaml", options)
    neck = build(cfg).double()
    checkpointer = CheckedCheckpointer(neck)
    checkpointer.load(str(file))
    assert not [name for name in checkpointer.missing_or_mismatched if "bottom_up" in name]

    def normalised(image, mean, std):
        return (image - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).double().view(3, 1, 1)

    image = torch.rand(1, 3, 32, 32, generator=GENERATOR).double()
    maps = neck.bottom_up(normalised(255 * image, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
    y = normalised(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])  # torchvision's
    y = whole.maxpool(whole.relu(whole.bn1(whole.conv1(y))))
    assert list(maps) == ALL[1:] and cfg.INPUT.FORMAT == "RGB"
    for found, layer in zip(maps.values(), (whole.layer1, whole.layer2, whole.layer3, whole.layer4)):
        y = layer(y)
        torch.testing.assert_close(found, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [0.35, 1.0])
def test_mobilenetv2_under_the_pyramid(width):
    cfg = mobile_cfg(width)
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.FPN.BOTTOM_UP = "build_level_fpn_backbone", cfg.MODEL.BACKBONE.NAME
    cfg.MODEL.FPN.merge_from_list(["IN_FEATURES", ALL, "LEVELS", ["p1", "p3", "p6"], "OUT_CHANNELS", 8])
    neck = build_backbone(cfg).train()
    maps = neck(torch.randn(2, 3, 64, 64))
    assert {k: tuple(v.shape) for k, v in maps.items()} == {
        "p1": (2, 8, 32, 32), "p3": (2, 8, 8, 8), "p6": (2, 8, 1, 1)
    }  # fmt: skip
    sum(x.square().sum() for x in maps.values()).backward()
    assert [n for n, p in neck.named_parameters() if p.grad is None] == []


# --- MobileNetV2 ------------------------------------------------------------------------------------------------------


def test_mobilenetv2_takes_torchvisions_weights():
    whole = mobilenet_v2(weights=None, width_mult=0.5).eval()
    net = build(mobile_cfg(0.5))
    result = net.load_state_dict(whole.state_dict(), strict=False)
    assert result.missing_keys == [] and sorted(result.unexpected_keys) == ["classifier.1.bias", "classifier.1.weight"]
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(net(x)["res5"], whole.features(x))


def test_mobilenetv2_options():
    net = build(mobile_cfg(0.35, ["res3", "c1"]))
    assert list(net(torch.zeros(1, 3, 32, 32))) == ["c1", "res3"] and len(net.features) == 7
    assert all(p.requires_grad for p in net.parameters())
    frozen = build(mobile_cfg(0.35, FREEZE_AT=2))
    trained = {int(name.split(".")[1]) for name, p in frozen.named_parameters() if p.requires_grad}
    assert trained == set(range(4, 19))
    norms = [[isinstance(m, FrozenBatchNorm2d) for m in b.modules() if "Norm2d" in type(m).__name__
              and "Activation" not in type(m).__name__] for b in frozen.features]  # fmt: skip
    assert all(all(block) and block for block in norms[:4]) and not any(any(block) for block in norms[4:])
    assert any(isinstance(m, FrozenBatchNorm2d) for m in build(mobile_cfg(0.35, NORM="FrozenBN")).features[9].modules())
    assert all(p.requires_grad is False for p in build(mobile_cfg(0.35, ["res2"], FREEZE_AT=5)).parameters())


@pytest.mark.parametrize("freeze_at", [-1, 0])
@pytest.mark.parametrize(
    "builder, section",
    [("mobilenetv2", "MOBILENETV2"), ("efficientnet_lite", "EFFICIENTNET_LITE"), ("tiny_resnet", "RESNETS"),
     ("resnet_c1", "RESNETS")],
)  # fmt: skip
def test_nothing_is_frozen_below_1(builder, section, freeze_at):
    """As in detectron2's ResNets, where -1 is the usual way to say so."""
    cfg = load_config("")
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = f"build_{builder}_backbone", freeze_at
    cfg.MODEL[section].NORM, cfg.MODEL[section].OUT_FEATURES = "BN", ["res2", "res3", "res4", "res5"]
    net = build_backbone(cfg)
    assert all(p.requires_grad for p in net.parameters())
    assert not any(isinstance(m, FrozenBatchNorm2d) for m in net.modules())


def test_mobilenetv2_errors():
    with pytest.raises(ValueError, match=r"MODEL\.MOBILENETV2\.OUT_FEATURES \['res6'\] must name some of \['c1'"):
        build(mobile_cfg(out_features=["res6"]))
    with pytest.raises(ValueError, match=r"MODEL\.MOBILENETV2\.WIDTH must be positive, not -1"):
        build(mobile_cfg(-1.0))


# --- slimmable weights ------------------------------------------------------------------------------------------------
# The reference holds full-width tensors and slices them at every use, with the norm that belongs to the width.

GENERATOR = torch.Generator()


def rand(*shape):
    return torch.randn(*shape, generator=GENERATOR)


def put_conv(state, name, c_out, c_in, k):
    state[f"{name}.weight"] = rand(c_out, c_in, k, k) * (2 / (c_in * k * k)) ** 0.5


def put_norms(state, name, channels):
    for i, c in enumerate(channels):
        prefix = f"{name}.bn.{i}" if len(channels) > 1 else name
        state[f"{prefix}.weight"], state[f"{prefix}.bias"] = 0.5 + rand(c).abs(), rand(c)
        state[f"{prefix}.running_mean"], state[f"{prefix}.running_var"] = rand(c), 0.5 + rand(c).abs()
        state[f"{prefix}.num_batches_tracked"] = torch.tensor(i + 7)


class Sliced:
    """Convolution and norm of a slimmable network at the i-th width."""

    def __init__(self, state, index):
        self.state, self.index = state, index

    def __call__(self, conv, x, c_out, stride=1, depthwise=False):
        head, _, number = conv.rpartition(".")
        weight = self.state[f"{conv}.weight"][:c_out, : 1 if depthwise else x.shape[1]].double()
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=c_out if depthwise else 1)
        norm = f"{head}.{int(number) + 1}"
        if f"{norm}.weight" not in self.state:
            norm = f"{norm}.bn.{self.index}"
        stats = [self.state[f"{norm}.{n}"].double() for n in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *stats)


# Channels and stride of each block.
RESNET_BLOCKS = [
    (c, 2 if i == 0 and c > 256 else 1) for c, n in ((256, 3), (512, 4), (1024, 6), (2048, 3)) for i in range(n)
]


@pytest.fixture(scope="module")
def slim_resnet():
    GENERATOR.manual_seed(1)
    state = {}
    put_conv(state, "features.0.0", 64, 3, 7)
    put_norms(state, "features.0.1", [int(64 * w) for w in RESNET_WIDTHS])
    c_in = 64
    for i, (c_out, _) in enumerate(RESNET_BLOCKS, start=1):
        middle = c_out // 4
        shapes = {"body.0": (middle, c_in, 1), "body.3": (middle, middle, 3), "body.6": (c_out, middle, 1)}
        if c_in != c_out:
            shapes["shortcut.0"] = (c_out, c_in, 1)
        for name, shape in shapes.items():
            head, _, number = f"features.{i}.{name}".rpartition(".")
            put_conv(state, f"{head}.{number}", *shape)
            put_norms(state, f"{head}.{int(number) + 1}", [int(shape[0] * w) for w in RESNET_WIDTHS])
        c_in = c_out
    state["classifier.0.weight"], state["classifier.0.bias"] = rand(10, 2048), rand(10)
    return {f"module.{name}": value for name, value in state.items()}


def run_slim_resnet(checkpoint, index, x):
    state = {name.removeprefix("module."): value for name, value in checkpoint.items()}
    layer, width = Sliced(state, index), RESNET_WIDTHS[index]
    maps = {"c1": F.relu(layer("features.0.0", x, int(64 * width), 2))}
    x = F.max_pool2d(maps["c1"], 3, 2, 1)
    for i, (full, stride) in enumerate(RESNET_BLOCKS, start=1):
        block, c = f"features.{i}", int(full * width)
        y = F.relu(layer(f"{block}.body.0", x, c // 4))
        y = F.relu(layer(f"{block}.body.3", y, c // 4, stride))
        y = layer(f"{block}.body.6", y, c)
        x = F.relu(y + (layer(f"{block}.shortcut.0", x, c, stride) if f"{block}.shortcut.0.weight" in state else x))
        maps[f"res{full.bit_length() - 7}"] = x
    return maps


# Expansion, channels and stride of each block, in the notation of the paper's Table 2.
MOBILE_GROUPS = [
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)
]  # fmt: skip
MOBILE_BLOCKS = [(t, c, s if i == 0 else 1) for t, c, n, s in MOBILE_GROUPS for i in range(n)]
MOBILE_MAPS = {1: "c1", 3: "res2", 6: "res3", 13: "res4"}


def expansions(c_in, t):
    return [t * divisible(c_in * w) for w in MOBILE_WIDTHS]


@pytest.fixture(scope="module")
def slim_mobilenet():
    GENERATOR.manual_seed(2)
    state = {}
    put_conv(state, "features.0.0", 32, 3, 3)
    put_norms(state, "features.0.1", [divisible(32 * w) for w in MOBILE_WIDTHS])
    c_in = 32
    for i, (t, c_out, _) in enumerate(MOBILE_BLOCKS, start=1):
        wide, at = expansions(c_in, t), 0
        shapes = [(wide[-1], 1, 3), (c_out, wide[-1], 1)]
        channels = [wide, [divisible(c_out * w) for w in MOBILE_WIDTHS]]
        if t > 1:
            shapes.insert(0, (wide[-1], c_in, 1))
            channels.insert(0, wide)
        for shape, widths in zip(shapes, channels):
            put_conv(state, f"features.{i}.body.{at}", *shape)
            put_norms(state, f"features.{i}.body.{at + 1}", widths)
            at += 3
        c_in = c_out
    put_conv(state, "features.18.0", 1280, 320, 1)
    put_norms(state, "features.18.1", [1280])
    state["classifier.0.weight"], state["classifier.0.bias"] = rand(10, 1280), rand(10)
    return {"model": state, "last_epoch": 480}


def run_slim_mobilenet(checkpoint, index, x):
    layer, width = Sliced(checkpoint["model"], index), MOBILE_WIDTHS[index]
    x, c_in, maps = F.relu6(layer("features.0.0", x, divisible(32 * width), 2)), 32, {}
    for i, (t, c_out, stride) in enumerate(MOBILE_BLOCKS, start=1):
        wide, y, at = expansions(c_in, t)[index], x, 0
        if t > 1:
            y, at = F.relu6(layer(f"features.{i}.body.0", y, wide)), 3
        y = F.relu6(layer(f"features.{i}.body.{at}", y, wide, stride, depthwise=True))
        y = layer(f"features.{i}.body.{at + 3}", y, divisible(c_out * width))
        x = x + y if stride == 1 and c_in == c_out else y  # where the channels are equal at every width
        c_in = c_out
        if i in MOBILE_MAPS:
            maps[MOBILE_MAPS[i]] = x
    return {**maps, "res5": F.relu6(layer("features.18.0", x, 1280))}


def compare(net, converted, expected, x):
    net.load_state_dict(converted, strict=True)
    found = net.double()(x)
    assert list(found) == list(expected) == ALL
    for name, value in expected.items():
        assert value.std() > 0.1
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("index", range(4))
def test_converted_resnet_equals_the_slimmable_one(slim_resnet, index):
    x = torch.randn(1, 3, 32, 64, dtype=torch.float64)
    net = build(resnet_cfg(RESNET_WIDTHS[index]))
    converted = from_slimmable(slim_resnet, net)
    assert int(converted["stem.conv1.norm.num_batches_tracked"]) == index + 7
    compare(net, converted, run_slim_resnet(slim_resnet, index, x), x)


@pytest.mark.parametrize("index", range(4))
def test_converted_mobilenet_equals_the_slimmable_one(slim_mobilenet, index):
    x = torch.randn(1, 3, 32, 64, dtype=torch.float64)
    net = build(mobile_cfg(MOBILE_WIDTHS[index]))
    assert isinstance(net, MobileNetV2)
    compare(net, from_slimmable(slim_mobilenet, net), run_slim_mobilenet(slim_mobilenet, index, x), x)


def test_a_frozen_network_takes_them_too(slim_resnet):
    cfg = resnet_cfg(0.25, ALL[1:])
    cfg.MODEL.BACKBONE.FREEZE_AT = 2
    net = build(cfg)
    net.load_state_dict(from_slimmable(slim_resnet, net), strict=True)
    assert torch.equal(net.stem.conv1.norm.running_var, slim_resnet["module.features.0.1.bn.0.running_var"])


def test_a_checkpoint_of_something_else_is_refused(slim_resnet, slim_mobilenet):
    with pytest.raises(ValueError, match=r"no set of BatchNorms .* has \[16, 32, 48, 64\], the network 8"):
        from_slimmable(slim_resnet, build(resnet_cfg(0.125)))
    with pytest.raises(ValueError, match=r"no set of BatchNorms .* \[\d+, \d+, \d+, \d+\], the network \d+"):
        from_slimmable(slim_mobilenet, build(resnet_cfg(0.25)))
    with pytest.raises(ValueError, match=r"no features\.0\.0\.weight: it is not of a slimmable MobileNetV2"):
        from_slimmable({"fc.weight": torch.ones(1)}, build(mobile_cfg(0.5)))
    name = "features.2.body.0.weight"
    cut = {**slim_resnet, f"module.{name}": slim_resnet[f"module.{name}"][:8]}
    with pytest.raises(ValueError, match=rf"{name} has shape \(8, 256, 1, 1\), too small for res2\.1\.conv1\.weight"):
        from_slimmable(cut, build(resnet_cfg(0.25)))


# --- cost -------------------------------------------------------------------------------------------------------------


def macs(cfg, height, width):
    """Multiply-adds of the bottom-up network, from shapes alone."""
    with torch.device("meta"):
        net = build(cfg)
    with FlopCounterMode(display=False) as counter:
        net(torch.empty(1, 3, height, width, device="meta"))
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(
    ("width", "imagenet", "teacher", "student"),
    [(1.0, 4.1e9, 1.25, 0.25), (0.75, 2.3e9, 0.70, 0.14), (0.5, 1.1e9, 0.31, 0.06), (0.25, 278e6, 0.08, 0.02)],
)
def test_cost_of_the_widths_is_that_of_the_papers(width, imagenet, teacher, student):
    """MSAD's capacity column: bottom-up of the teacher (H and L) and of the L student, in units of width 1 at H.

    The column is width^2 times the number of pixels. The real networks are up to 0.012 above: their stem shrinks with
    the width and not with its square, and 1333 / 2 is rounded up.
    """
    assert macs(resnet_cfg(width), 224, 224) == pytest.approx(imagenet, rel=0.05)  # Slimmable Networks, Table 1
    unit = macs(resnet_cfg(1.0), 800, 1333)
    low = macs(resnet_cfg(width), 400, 667) / unit
    both = macs(resnet_cfg(width), 800, 1333) / unit + low
    assert width**2 * 1.25 == pytest.approx(teacher, abs=0.005) and width**2 / 4 == pytest.approx(student, abs=0.005)
    assert 0 <= both - width**2 * 1.25 < 0.0125
    assert 0 <= low - width**2 / 4 < 0.003


# --- the yaml files of supplementary Table 1 --------------------------------------------------------------------------



@pytest.mark.parametrize("role", ["T", "S_L", "S_H"])
@pytest.mark.parametrize("width", RESNET_WIDTHS)
def test_rows_of_table_1(width, role):
    name = f"SLR{round(100 * width):03d}_50"
    cfg = load_config(CONFIGS / f"fcos_{name}_{role}_1x.yaml")
    with torch.device("meta"):
        neck = build_backbone(cfg)
    shapes = neck.bottom_up.output_shape()
    assert [s.channels for s in shapes.values()] == [int(c * width) for c in (256, 512, 1024, 2048)]
    assert neck.bottom_up.stem.conv1.out_channels == 64 * width
    levels = {"T": range(3, 8), "S_L": range(2, 7), "S_H": range(3, 8)}[role]
    assert list(neck.output_shape()) == cfg.MODEL.FCOS.IN_FEATURES == [f"p{i}" for i in levels]
    assert cfg.INPUT.FORMAT == "RGB" and cfg.MODEL.PIXEL_STD[0] > 50, "as the slimmable weights were trained"
    assert cfg.MODEL.WEIGHTS.endswith(f"R-50_{round(100 * width):03d}.pkl")
    assert f"output/MSAD/fcos_{name}_{role}_1x" == cfg.OUTPUT_DIR
    assert (400 if role == "S_L" else 800) == cfg.INPUT.MIN_SIZE_TEST
    assert cfg.SOLVER.IMS_PER_BATCH * cfg.SOLVER.MAX_ITER == 16 * 90000
    if role == "T":
        assert cfg.MODEL.META_ARCHITECTURE == "MultiScaleTeacher"
    else:
        assert Path(cfg.DISTILL.TEACHERS[0]["CONFIG"]).name == f"fcos_{name}_T_1x.yaml"
        assert role[-1] == cfg.DISTILL.STUDENT_RESOLUTION


@pytest.mark.parametrize("role", ["T", "S_L"])
@pytest.mark.parametrize(("name", "width"), [("MV2", 1.0)] + [(f"SLMV2_{100 * w:03.0f}", w) for w in MOBILE_WIDTHS])
def test_mobilenetv2_configs(name, width, role):
    cfg = load_config(CONFIGS / f"fcos_{name}_{role}_1x.yaml")
    assert width == cfg.MODEL.MOBILENETV2.WIDTH
    assert cfg.MODEL.WEIGHTS.endswith(f"MobileNetV2_{100 * width:03.0f}.pkl") == name.startswith("SL")
    if role == "S_L":
        assert Path(cfg.DISTILL.TEACHERS[0]["CONFIG"]).name == f"fcos_{name}_T_1x.yaml"
    cfg.MODEL.MOBILENETV2.NORM = "BN"
    with torch.device("meta"):
        neck = build_backbone(cfg)
    assert isinstance(neck.bottom_up, MobileNetV2)
    assert list(neck.output_shape()) == cfg.MODEL.FCOS.IN_FEATURES
