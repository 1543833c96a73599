"""LevelFPN against detectron2's FPN, the stride-2 map C1, and the tiny ResNet."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelP6P7

from msad.modeling.backbones.fpn import LevelFPN
from msad.modeling.backbones.resnet import ResNetC1

C = 8
RES = ["res2", "res3", "res4", "res5"]


def names(*levels):
    return [f"p{level}" for level in levels]


@pytest.fixture
def tiny_resnet(tiny_cfg):
    """``tiny_resnet(out_features)``: four stages of 4, 8, 16, 32 channels, in eval mode."""

    def make(out_features=RES, **options):
        cfg = tiny_cfg(**options)
        cfg.MODEL.BACKBONE.NAME = "build_tiny_resnet_backbone"
        cfg.MODEL.RESNETS.OUT_FEATURES = list(out_features)
        return build_backbone(cfg).eval()

    return make


def randomise(module):
    """No parameter or statistic is zero or one."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5) if "running_var" in name else tensor.normal_(0, 0.2)
    return module


# --- against detectron2's FPN -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["", "BN"])
@pytest.mark.parametrize("levels", [(2, 3, 4, 5, 6, 7), (3, 4, 5, 6, 7), (2, 3, 4, 5, 6), (3, 5), (2,), (6, 7), (7,)])
def test_equals_detectron2(tiny_resnet, levels, norm):
    reference = FPN(tiny_resnet(), RES, C, norm=norm, top_block=LastLevelP6P7(32, C))
    reference = randomise(reference).eval()
    ours = LevelFPN(tiny_resnet(), RES, C, names(*levels), norm).eval()
    assert set(ours.state_dict()) <= set(reference.state_dict()), "detectron2's parameter names"
    ours.load_state_dict({k: reference.state_dict()[k] for k in ours.state_dict()})
    x = torch.randn(2, 3, 96, 160)
    expected, found = reference(x), ours(x)
    assert list(found) == names(*levels)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
    shapes = ours.output_shape()
    assert shapes == {name: reference.output_shape()[name] for name in found}
    assert ours.size_divisibility == reference.size_divisibility == 32


def test_stock_weights_fit_strictly(tiny_resnet):
    """P3-P7 has the names of detectron2's RetinaNet FPN; P2-P6 those of an FPN from res2 on, without P7."""
    stock = FPN(tiny_resnet(RES[1:]), RES[1:], C, top_block=LastLevelP6P7(32, C))
    LevelFPN(tiny_resnet(), RES, C, names(3, 4, 5, 6, 7)).load_state_dict(stock.state_dict(), strict=True)
    with_p2 = FPN(tiny_resnet(), RES, C, top_block=LastLevelP6P7(32, C))
    result = LevelFPN(tiny_resnet(), RES, C, names(2, 3, 4, 5, 6)).load_state_dict(with_p2.state_dict(), strict=False)
    assert result.missing_keys == []
    assert sorted(result.unexpected_keys) == ["top_block.p7.bias", "top_block.p7.weight"]


def test_shared_neck_holds_both_branches(tiny_resnet):
    """A teacher's P2-P7 takes the weights of P3-P7 and of P2-P6 networks together."""
    shared = set(LevelFPN(tiny_resnet(), RES, C, names(2, 3, 4, 5, 6, 7)).state_dict())
    h, student = (LevelFPN(tiny_resnet(), RES, C, names(*levels)) for levels in ((3, 4, 5, 6, 7), (2, 3, 4, 5, 6)))
    assert set(h.state_dict()) | set(student.state_dict()) == shared


# --- levels on request ------------------------------------------------------------------------------------------------


def test_computes_only_what_is_asked_for(tiny_resnet):
    neck = randomise(LevelFPN(tiny_resnet(), RES, C, names(2, 3, 4, 5, 6, 7))).eval()
    calls = []
    for name, module in neck.named_modules():
        if name.startswith(("fpn_", "top_block.")):
            module.register_forward_hook(lambda _m, _i, _o, name=name: calls.append(name))
    x = torch.randn(1, 3, 64, 64)
    everything = neck(x)
    assert len(calls) == len(set(calls)) == 4 + 4 + 2
    calls.clear()
    some = neck(x, ["p6", "p4"])
    assert sorted(calls) == ["fpn_lateral4", "fpn_lateral5", "fpn_output4", "top_block.p6"]
    assert list(some) == ["p4", "p6"], "finest first, whatever the order of the request"
    assert all(torch.equal(some[name], everything[name]) for name in some)


@pytest.mark.parametrize("size", [(32, 96), (96, 160), (224, 32)])
def test_level_sizes_round_up(tiny_resnet, size):
    neck = LevelFPN(tiny_resnet(), RES, C, names(2, 3, 4, 5, 6, 7)).eval()
    for level, value in zip(range(2, 8), neck(torch.randn(1, 3, *size)).values()):
        assert value.shape == (1, C, *(-(-side // 2**level) for side in size))


def test_every_parameter_of_a_built_level_learns(tiny_resnet):
    neck = LevelFPN(tiny_resnet(), RES, C, names(2, 3, 4, 5, 6)).train()
    sum(x.square().sum() for x in neck(torch.randn(2, 3, 64, 64)).values()).backward()
    without = [name for name, p in neck.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize("source", ["c5", "p5"])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("norm", ["", "BN"])
def test_extra_levels_as_other_detectors_make_them(tiny_resnet, source, relu, norm):
    neck = LevelFPN(
        tiny_resnet(), RES, C, names(3, 4, 6, 7), top_source=source, top_relu=relu, top_norm=norm
    )  # fmt: skip
    randomise(neck.eval())
    x = torch.randn(1, 3, 64, 96)
    maps = neck.bottom_up(x)
    start = maps["res5"] if source == "c5" else neck.fpn_output5(neck.fpn_lateral5(maps["res5"]))
    assert hasattr(neck, "fpn_output5") == (source == "p5")  # P5 itself is not asked for

    def strided(x, conv):
        y = F.conv2d(x, conv.weight, conv.bias, stride=2, padding=1)
        return conv.norm(y) if norm else y

    p6 = strided(start, neck.top_block.p6)
    p7 = strided(p6.relu() if relu else p6, neck.top_block.p7)
    found = neck(x)
    assert list(found) == names(3, 4, 6, 7)
    torch.testing.assert_close(found["p6"], p6)
    torch.testing.assert_close(found["p7"], p7)
    assert (neck.top_block.p6.bias is None) == bool(norm) and p6.min() < 0
    with pytest.raises(ValueError, match=r"MODEL.FPN.TOP_SOURCE must be 'c5' or 'p5', not 'p6'"):
        LevelFPN(tiny_resnet(), RES, C, names(3, 6), top_source="p6")


def test_p1_is_made_from_c1(tiny_resnet):
    """P1 = conv3x3(conv1x1(C1) + nearest upsampling of the top-down map of level 2) (MSAD supplementary, Sec. E)."""
    bottom_up = tiny_resnet(["c1", *RES])
    neck = randomise(LevelFPN(bottom_up, ["c1", *RES], C, names(1, 2, 3, 4, 5))).eval()
    assert not hasattr(neck, "top_block")
    x = torch.randn(1, 3, 64, 96)
    maps = bottom_up(x)
    top_down = None
    for level, source in zip((5, 4, 3, 2, 1), ("res5", "res4", "res3", "res2", "c1")):
        lateral = getattr(neck, f"fpn_lateral{level}")
        side = F.conv2d(maps[source], lateral.weight, lateral.bias)
        if top_down is not None:
            side = side + top_down.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        top_down = side
    expected = F.conv2d(top_down, neck.fpn_output1.weight, neck.fpn_output1.bias, padding=1)
    p1 = neck(x)["p1"]
    assert p1.shape == (1, C, 32, 48) and neck.output_shape()["p1"] == ShapeSpec(channels=C, stride=2)
    torch.testing.assert_close(p1, expected)


def test_errors_name_the_levels(tiny_resnet):
    with pytest.raises(ValueError, match=r"p1..p5.*missing \['p1'\]"):
        LevelFPN(tiny_resnet(), RES, C, names(1, 2))
    with pytest.raises(ValueError, match=r"missing \['p4'\]"):
        LevelFPN(tiny_resnet(), ["res2", "res3", "res5"], C, names(3, 4))
    with pytest.raises(ValueError, match="p7 is the coarsest"):
        LevelFPN(tiny_resnet(), RES, C, names(3, 8))
    with pytest.raises(ValueError, match=r"IN_FEATURES: \['res6'\]"):
        LevelFPN(tiny_resnet(), [*RES, "res6"], C, names(3))
    with pytest.raises(ValueError, match="'res3' is not a pyramid level"):
        LevelFPN(tiny_resnet(), RES, C, ["res3"])
    neck = LevelFPN(tiny_resnet(), RES, C, names(3, 4))
    with pytest.raises(ValueError, match=r"\['p2'\] were not built.*'p3', 'p4'"):
        neck(torch.zeros(1, 3, 32, 32), names(2, 3))


def test_from_yaml(tiny_cfg):
    cfg = tiny_cfg(levels=range(2, 7))
    neck = build_backbone(cfg)
    assert isinstance(neck, LevelFPN) and list(neck.output_shape()) == names(2, 3, 4, 5, 6)
    assert {s.channels for s in neck.output_shape().values()} == {C}
    cfg.MODEL.FPN.LEVELS = []
    with pytest.raises(ValueError, match=r"MODEL\.FPN\.LEVELS is empty"):
        build_backbone(cfg)


# --- bottom-up networks -----------------------------------------------------------------------------------------------


def test_tiny_resnet_has_the_configured_shape(tiny_resnet):
    net = tiny_resnet(MODEL__RESNETS__BLOCKS=[1, 2, 3, 1], MODEL__BACKBONE__FREEZE_AT=2)
    x = torch.randn(1, 3, 64, 96)
    expected = {f"res{i}": (4 * 2 ** (i - 2), 2**i) for i in range(2, 6)}
    assert {k: (s.channels, s.stride) for k, s in net.output_shape().items()} == expected
    assert {k: tuple(v.shape) for k, v in net(x).items()} == {
        k: (1, c, 64 // stride, 96 // stride) for k, (c, stride) in expected.items()
    }
    assert [len(getattr(net, name)) for name in expected] == [1, 2, 3, 1]
    assert all(p.requires_grad for p in net.parameters()), "trained from scratch"
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())


def test_c1_is_the_stem_before_pooling(tiny_resnet):
    plain = randomise(tiny_resnet(RES)).eval()
    with_c1 = tiny_resnet(["c1", "res2", "res5"]).eval()
    assert isinstance(with_c1, ResNetC1)
    with_c1.load_state_dict(plain.state_dict(), strict=True)  # the same names
    x = torch.randn(2, 3, 64, 64)
    found, expected = with_c1(x), plain(x)
    assert list(found) == ["c1", "res2", "res5"]
    assert torch.equal(found["res2"], expected["res2"]) and torch.equal(found["res5"], expected["res5"])
    stem = plain.stem.conv1
    normalised = stem.norm(F.conv2d(x, stem.weight, stem.bias, stride=2, padding=3))
    torch.testing.assert_close(found["c1"], normalised.clamp(min=0))
    assert with_c1.output_shape()["c1"] == ShapeSpec(channels=4, stride=2)


def test_c1_on_a_stock_resnet_from_yaml(tiny_cfg):
    """Depth, weights' names and freezing are detectron2's."""
    cfg = tiny_cfg()
    cfg.MODEL.RESNETS.merge_from_list(
        ["DEPTH", 18, "RES2_OUT_CHANNELS", 64, "STEM_OUT_CHANNELS", 8, "NORM", "FrozenBN"]
    )
    cfg.MODEL.BACKBONE.FREEZE_AT = 1
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3"]
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    plain = build_backbone(cfg).eval()
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "c1"]
    cfg.MODEL.BACKBONE.NAME = "build_resnet_c1_backbone"
    net = build_backbone(cfg).eval()
    net.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(1, 3, 32, 32)
    found = net(x)
    assert {k: tuple(v.shape) for k, v in found.items()} == {"res3": (1, 128, 4, 4), "c1": (1, 8, 16, 16)}
    assert torch.equal(found["res3"], plain(x)["res3"])
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    assert frozen == {"stem.conv1.weight"}


def test_unknown_output_of_the_c1_network(tiny_resnet):
    with pytest.raises(ValueError, match=r"OUT_FEATURES: unknown \['res7'\]"):
        ResNetC1(tiny_resnet(), ["c1", "res7"])
