"""DetectoRS: standardised weights, switchable convolutions and the recursive pyramid, by hand and against slow ones."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from detectron2.modeling import build_backbone, build_model
from detectron2.utils.events import EventStorage
from torch import nn

from msad import load_config
from msad.engine.preflight.model_checks import check_frozen
from msad.engine.resting import frozen_backbone
from msad.finding import ERROR
from msad.modeling.backbones.rfp import ASPP, RFP
from msad.modeling.backbones.switchable import ConvAWS, SwitchableAtrousConv

CONFIGS = Path(__file__).parents[2] / "configs"


def randomise(module, seed=0):
    """No parameter or statistic is zero or one; small, so that deep networks stay finite."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator)
                tensor.copy_(noise + 0.5 if "running_var" in name else tensor + 0.1 * (noise - 0.4))
    return module


# --- ConvAWS ----------------------------------------------------------------------------------------------------------


def test_standardised_filters_by_hand():
    conv = ConvAWS(1, 1, 3, bias=False)
    conv.weight.data = torch.arange(1.0, 10).view(1, 1, 3, 3)
    conv.keep_filters()
    assert conv.weight_beta.item() == 5 and conv.weight_gamma.item() == pytest.approx(2.73861, abs=1e-5)
    torch.testing.assert_close(conv.filters(), conv.weight.data)
    conv.weight_gamma.fill_(1)
    conv.weight_beta.fill_(0)
    filters = conv.filters()[0, 0]
    torch.testing.assert_close(filters[[0, 1, 2], [0, 1, 2]], torch.tensor([-1.46059, 0, 1.46059]), atol=1e-5, rtol=0)


def test_a_plain_checkpoint_sets_the_moments_and_a_full_one_is_kept():
    plain = nn.Sequential(Conv2d(3, 4, 3, bias=False), nn.ReLU(), Conv2d(4, 2, 1))
    aws = nn.Sequential(ConvAWS(3, 4, 3, bias=False), nn.ReLU(), ConvAWS(4, 2, 1))
    result = aws.load_state_dict(plain.state_dict(), strict=False)
    assert result.missing_keys == [] and result.unexpected_keys == []
    x = torch.randn(1, 3, 5, 5)
    torch.testing.assert_close(aws(x), plain(x))
    aws[0].weight.data.mul_(2).add_(0.3)  # as training does; the moments stay
    torch.testing.assert_close(aws(x), plain(x), rtol=1e-3, atol=1e-3)
    again = nn.Sequential(ConvAWS(3, 4, 3, bias=False), nn.ReLU(), ConvAWS(4, 2, 1))
    again.load_state_dict(aws.state_dict())
    assert torch.equal(again(x), aws(x)) and torch.equal(again[0].weight_beta, aws[0].weight_beta)
    assert aws.load_state_dict({}, strict=False).missing_keys == list(aws.state_dict())
    half = {k: v for k, v in aws.state_dict().items() if k != "0.weight_beta"}
    assert aws.load_state_dict(half, strict=False).missing_keys == ["0.weight_beta"]


# --- SAC --------------------------------------------------------------------------------------------------------------


def constant_sac(weight=1.0, diff=0.5, gamma=1e-5**0.5, beta=1.0, switch=1.0) -> SwitchableAtrousConv:
    sac = SwitchableAtrousConv(1, 1, 3, padding=1, bias=False, deform=False)
    for tensor, value in (
        (sac.weight, weight), (sac.weight_diff, diff), (sac.weight_gamma, gamma), (sac.weight_beta, beta),
        (sac.switch.bias, switch),
    ):  # fmt: skip
        nn.init.constant_(tensor, value)
    return sac


def test_switchable_convolution_by_hand():
    x = torch.ones(1, 1, 7, 7)
    y = constant_sac()(x)[0, 0]
    assert y[3, 3].item() == pytest.approx(9) and y[0, 0].item() == pytest.approx(4)
    quarter = constant_sac(switch=0.25)
    y = quarter(x)[0, 0]
    assert y[3, 3].item() == pytest.approx(12.375) and y[0, 0].item() == pytest.approx(5.5)
    assert y.mean().item() == pytest.approx(7.00765, abs=1e-5)
    quarter.pre_context.weight.data.fill_(1)
    assert quarter(x)[0, 0, 3, 3].item() == pytest.approx(24.75)
    quarter.pre_context.weight.data.fill_(0)
    quarter.post_context.weight.data.fill_(1)
    assert quarter(x)[0, 0, 3, 3].item() == pytest.approx(19.38265, abs=1e-4)


def test_the_switch_sees_a_reflected_mean():
    seen = []
    sac = constant_sac()
    sac.switch.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    x = torch.zeros(1, 1, 7, 7)
    x[0, 0, 3, 3] = 1
    sac(x)
    assert seen[0].shape == x.shape
    assert [seen[0][0, 0, i, i].item() for i in (3, 1, 0)] == pytest.approx([0.04, 0.04, 0])


@pytest.mark.parametrize("deform", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_it_starts_as_the_convolution_that_it_replaces(deform, stride):
    conv = Conv2d(4, 6, 3, stride=stride, padding=1, bias=False, norm=nn.BatchNorm2d(6), activation=F.relu).eval()
    sac = SwitchableAtrousConv.of(conv, deform=deform)
    x = torch.randn(2, 4, 7, 9)
    torch.testing.assert_close(sac(x), conv(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"at least 3 x 3 locations, not \(2, 9\)"):
        sac(x[:, :, :2])


def test_deformable_switchable_convolution_equals_a_slow_one():
    """Offsets come from the mean around a place; those of the dilated one are counted around taps 3 apart."""
    sac = randomise(SwitchableAtrousConv(2, 3, 3, stride=2, padding=1, bias=False), 1)
    x = torch.randn(1, 2, 8, 6)
    found = sac(x)
    y = x + F.conv2d(x.mean((2, 3), keepdim=True), sac.pre_context.weight, sac.pre_context.bias)
    around = F.avg_pool2d(F.pad(y, (2, 2, 2, 2), mode="reflect"), 5, stride=1)
    filters = sac.filters()

    def sampled(offset_conv, weight, dilation):
        offset = offset_conv(around)
        out = torch.zeros(1, 3, 4, 3)
        for i in range(4):
            for j in range(3):
                for tap in range(9):
                    v = 2 * i + dilation * (tap // 3 - 1) + offset[0, 2 * tap, i, j].item()
                    u = 2 * j + dilation * (tap % 3 - 1) + offset[0, 2 * tap + 1, i, j].item()
                    a, b = math.floor(v), math.floor(u)
                    for row, col, share in (
                        (a, b, (a + 1 - v) * (b + 1 - u)), (a, b + 1, (a + 1 - v) * (u - b)),
                        (a + 1, b, (v - a) * (b + 1 - u)), (a + 1, b + 1, (v - a) * (u - b)),
                    ):  # fmt: skip
                        if 0 <= row < 8 and 0 <= col < 6:
                            out[0, :, i, j] += share * (weight[:, :, tap // 3, tap % 3] @ y[0, :, row, col])
        return out

    switch = F.conv2d(around, sac.switch.weight, sac.switch.bias, stride=2)
    small = sampled(sac.offset_s, filters, 1)
    mixed = switch * small + (1 - switch) * sampled(sac.offset_l, filters + sac.weight_diff, 3)
    expected = mixed + F.conv2d(mixed.mean((2, 3), keepdim=True), sac.post_context.weight, sac.post_context.bias)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# --- RFP --------------------------------------------------------------------------------------------------------------


def test_atrous_pyramid_by_hand():
    aspp = ASPP(4)
    for layer in aspp.aspp:
        layer.weight.data.zero_()
        layer.weight.data[:, :1] = 1
    x = torch.zeros(1, 4, 7, 7)
    x[:, 0] = 1
    y = aspp(x)[0]
    assert y[:, 3, 3].tolist() == [1, 9, 1, 1] and y[:, 0, 0].tolist() == [1, 4, 4, 1]


def narrow_cfg(tiny_cfg, backbone="build_rfp_backbone", **options):
    narrow = {
        "MODEL__BACKBONE__NAME": backbone, "MODEL__FPN__BOTTOM_UP": "build_sac_resnet_backbone",
        "MODEL__RESNETS__DEPTH": 50, "MODEL__RESNETS__RES2_OUT_CHANNELS": 16, "MODEL__RESNETS__WIDTH_PER_GROUP": 4,
        "MODEL__BACKBONE__FREEZE_AT": 0, "MODEL__RPN__POST_NMS_TOPK_TRAIN": 20,
    }  # fmt: skip
    return tiny_cfg("HTC", **{**narrow, **options})


@pytest.mark.parametrize(("bias", "expected"), [(0.0, 3.0), (math.log(3), 3.5)])
def test_gate_by_hand(tiny_cfg, bias, expected):
    rfp = build_backbone(narrow_cfg(tiny_cfg)).eval()
    rfp.rfp_weight.bias.data.fill_(bias)
    made = iter([2.0, 4.0])
    rfp.pyramid = lambda maps, names: dict.fromkeys(names, torch.full((1, 8, 2, 2), next(made)))
    rfp.bottom_up.forward = rfp.rfp_bottom_up.forward = lambda x: {}
    found = rfp(torch.zeros(1, 3, 64, 64))
    assert list(found) == ["p2", "p3", "p4", "p5", "p6"]
    for value in found.values():
        torch.testing.assert_close(value, torch.full((1, 8, 2, 2), expected))


def test_recursive_pyramid_equals_a_slow_one(tiny_cfg):
    """Blocks written out: the feedback is added before a block's last ReLU."""
    rfp = randomise(build_backbone(narrow_cfg(tiny_cfg)), 4).double().eval()
    x = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    with torch.no_grad():
        found = rfp(x)
        first = rfp.pyramid(rfp.bottom_up(x), list(found))
        net, maps, y = rfp.rfp_bottom_up, {}, None
        y = net.stem(x)
        for level in range(2, 6):
            for number, block in enumerate(getattr(net, f"res{level}")):
                inner = block.conv3(block.conv2(block.conv1(y).relu()).relu())
                inner = inner + (y if block.shortcut is None else block.shortcut(y))
                if number == 0 and level > 2:
                    inner = inner + block.rfp_conv(rfp.rfp_aspp(first[f"p{level}"]))
                y = inner.relu()
            maps[f"res{level}"] = y
        second = rfp.pyramid(maps, list(found))
        for name, value in found.items():
            gate = rfp.rfp_weight(second[name]).sigmoid()
            torch.testing.assert_close(value, gate * second[name] + (1 - gate) * first[name])
            assert (second[name] - first[name]).abs().max() > 1e-3
        some = rfp(x, ["p2", "p6"])
        assert all(torch.equal(some[name], found[name]) for name in ("p2", "p6")) and len(some) == 2


def test_a_new_rfp_of_equal_networks_is_its_pyramid(tiny_cfg):
    rfp = build_backbone(narrow_cfg(tiny_cfg)).eval()
    rfp.rfp_bottom_up.load_state_dict(rfp.bottom_up.state_dict(), strict=False)
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        plain = rfp.pyramid(rfp.bottom_up(x), ["p2", "p4"])
        for name, value in rfp(x, ["p2", "p4"]).items():
            torch.testing.assert_close(value, plain[name], rtol=1e-4, atol=1e-5)


def test_batches_equal_single_images(tiny_cfg):
    rfp = randomise(build_backbone(narrow_cfg(tiny_cfg)), 4).double().eval()
    x = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    with torch.no_grad():
        together, alone = rfp(x), [rfp(image[None]) for image in x]
    for name, value in together.items():
        torch.testing.assert_close(value, torch.cat([y[name] for y in alone]))


def test_levels_that_the_feedback_needs_are_named(tiny_cfg):
    with pytest.raises(ValueError, match=r"feedback; missing \['p3'\]"):
        build_backbone(narrow_cfg(tiny_cfg, MODEL__FPN__LEVELS=["p4", "p5", "p6"]))


# --- the detector -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["CascadeMask", "HTC"])
def test_detectors_trains_in_mixed_precision_and_detects(tiny_cfg, make_batch, arch):
    cfg = narrow_cfg(tiny_cfg)
    if arch == "CascadeMask":
        cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.ROI_MASK_HEAD.NAME = "CascadeMaskROIHeads", "MaskRCNNConvUpsampleHead"
    torch.manual_seed(1)
    model = build_model(cfg)
    assert isinstance(model.backbone, RFP)
    batch = make_batch([(96, 96), (96, 96)])
    with EventStorage(), torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(batch)
    sum(losses.values()).backward()
    assert all(torch.isfinite(x) for x in losses.values())
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    with torch.no_grad():
        for found in model.eval()(batch):
            assert len(found["instances"]) > 0 and found["instances"].pred_masks.shape[1:] == (96, 96)


def test_frozen_stages_stay_frozen(tiny_cfg):
    cfg = narrow_cfg(tiny_cfg, "build_level_fpn_backbone", MODEL__BACKBONE__FREEZE_AT=2)
    backbone = build_backbone(cfg)
    trained = {name.split(".")[1] for name, p in backbone.named_parameters() if p.requires_grad and "bottom_up" in name}
    assert trained == {"res3", "res4", "res5"}
    assert {type(m) for m in backbone.modules() if isinstance(m, ConvAWS)} == {ConvAWS, SwitchableAtrousConv}


def test_both_networks_of_a_recursive_pyramid_are_in_front_of_it(tiny_cfg):
    """For what freezes the backbone, and for the check of layers that are frozen without having been trained."""
    cfg = tiny_cfg("FasterRCNN", MODEL__BACKBONE__NAME="build_rfp_backbone", MODEL__BACKBONE__FREEZE_AT=2)
    cfg.MODEL.FPN.BOTTOM_UP, cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = "build_resnet_backbone", 8
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 16, 8
    model = build_model(cfg)
    held = {id(p) for p in frozen_backbone(model, 10).parameters}
    both = [model.backbone.bottom_up, model.backbone.rfp_bottom_up]
    assert held == {id(p) for network in both for p in network.parameters()}
    first = {name for name, _ in model.named_parameters() if name.startswith("backbone.bottom_up.")}
    (finding,) = check_frozen(model, first, 2)
    assert finding.level == ERROR and "backbone.rfp_bottom_up." in finding.text


def test_deformable_blocks_cannot_be_switched(tiny_cfg):
    cfg = narrow_cfg(tiny_cfg, "build_level_fpn_backbone", MODEL__RESNETS__DEFORM_ON_PER_STAGE=[False, False, False, 1])
    cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False, False, False, True]
    with pytest.raises(ValueError, match=r"SAC_ON_PER_STAGE.*leave DEFORM_ON_PER_STAGE off"):
        build_backbone(cfg)


def test_an_image_network_loads_as_a_whole(tiny_cfg):
    """A plain ResNet's weights leave nothing but what SAC adds, and the network computes what it did."""
    plain_cfg = narrow_cfg(tiny_cfg, "build_level_fpn_backbone", MODEL__FPN__BOTTOM_UP="build_resnet_backbone")
    plain = randomise(build_backbone(plain_cfg), 3).eval()
    sac = build_backbone(narrow_cfg(tiny_cfg, "build_level_fpn_backbone")).eval()
    missing = sac.load_state_dict(copy.deepcopy(plain.state_dict()), strict=False).missing_keys
    kinds = ("weight_diff", "switch", "pre_context", "post_context", "offset_s", "offset_l")
    assert missing and all(any(f".conv2.{kind}" in name for kind in kinds) for name in missing)
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        for name, value in sac(x).items():
            torch.testing.assert_close(value, plain(x)[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        ("detectors_htc_R_50", [], 134754552),
        ("detectors_htc_R_50", ["MODEL.FPN.BOTTOM_UP", "build_resnet_backbone"], 105015606),
        ("detectors_htc_R_50", ["MODEL.BACKBONE.NAME", "build_level_fpn_backbone"], 95127766),
    ],
)
def test_number_of_parameters(name, options, parameters):
    """Of DetectoRS, of HTC with RFP alone and of HTC with SAC alone, counted in mmdetection."""
    cfg = load_config(CONFIGS / "Teachers" / f"{name}.yaml", ["MODEL.DEVICE", "meta", "MODEL.RESNETS.NORM", "BN"])
    cfg.merge_from_list(["MODEL.BACKBONE.FREEZE_AT", 0, *options])  # frozen normalisation has no parameters
    with torch.device("meta"):
        model = build_model(cfg)
    assert sum(p.numel() for p in model.parameters()) == parameters
    if name == "detectors_htc_R_50" and options == []:
        assert sum(p.numel() for p in model.backbone.bottom_up.parameters()) == 38377505
