"""Deformable convolutions and the ResNets made of them. Passes on detectron2 and on detectron2-lite."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.layers import DeformConv, ModulatedDeformConv, ShapeSpec
from detectron2.modeling.backbone.resnet import DeformBottleneckBlock, build_resnet_backbone
from refusals import LITE, refused
from torch import nn

lite_only = pytest.mark.skipif(
    not LITE, reason="detectron2's operator runs without gradients or groups on a CPU"
)


def sample(plane, y, x):
    """Bilinear value of an (H, W) plane at a real position, 0 outside, by the four neighbours."""
    value = 0.0
    for row in (int(torch.floor(torch.tensor(y))), int(torch.floor(torch.tensor(y))) + 1):
        for col in (int(torch.floor(torch.tensor(x))), int(torch.floor(torch.tensor(x))) + 1):
            if 0 <= row < plane.shape[0] and 0 <= col < plane.shape[1]:
                value += max(0.0, 1 - abs(y - row)) * max(0.0, 1 - abs(x - col)) * float(plane[row, col])
    return value


def slow(x, weight, offset, mask, groups):
    """3x3, stride 1, padding 1, one image: the definition, tap by tap."""
    c_out, per_group = weight.shape[:2]
    deformable = offset.shape[1] // 18
    out = torch.zeros(1, c_out, *x.shape[2:])
    for o in range(c_out):
        for i in range(per_group):
            c = o // (c_out // groups) * per_group + i
            g = c // (x.shape[1] // deformable)
            for row in range(x.shape[2]):
                for col in range(x.shape[3]):
                    for tap in range(9):
                        dy, dx = offset[0, 18 * g + 2 * tap : 18 * g + 2 * tap + 2, row, col].tolist()
                        value = sample(x[0, c], row + tap // 3 - 1 + dy, col + tap % 3 - 1 + dx)
                        out[0, o, row, col] += weight[o, i, tap // 3, tap % 3] * value * mask[0, 9 * g + tap, row, col]
    return out


class TestDeformConv:
    def test_one_pixel_to_the_right_worked_by_hand(self):
        layer = DeformConv(1, 1, 1)
        nn.init.constant_(layer.weight, 2.0)
        x = torch.tensor([[[[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]]]])
        offset = torch.zeros(1, 2, 2, 3)
        offset[:, 1] = 1.0  # dx
        assert layer(x, offset).tolist() == [[[[4.0, 8.0, 0.0], [32.0, 64.0, 0.0]]]]
        offset[:, 0], offset[:, 1] = 0.5, 0.0  # dy: half of the row below
        assert layer(x, offset).tolist() == [[[[9.0, 18.0, 36.0], [8.0, 16.0, 32.0]]]]

    def test_zero_offsets_are_a_convolution(self):
        layer = DeformConv(4, 6, 3, stride=2, padding=2, dilation=2, groups=2)
        x = torch.randn(2, 4, 9, 11)
        expected = F.conv2d(x, layer.weight, None, 2, 2, 2, 2)
        torch.testing.assert_close(layer(x, torch.zeros(2, 18, *expected.shape[2:])), expected)

    def test_norm_then_activation(self):
        layer = DeformConv(2, 3, 1, norm=nn.BatchNorm2d(3), activation=torch.tanh)
        x, offset = torch.randn(2, 2, 4, 4), torch.zeros(2, 2, 4, 4)
        expected = torch.tanh(nn.BatchNorm2d(3)(F.conv2d(x, layer.weight)))
        torch.testing.assert_close(layer(x, offset), expected)

    def test_wrong_arguments_are_refused(self):
        with refused("4 input channels do not divide by groups=3"):
            DeformConv(4, 6, 3, groups=3)
        with refused("DeformConv has no bias"):
            DeformConv(4, 6, 3, bias=True)
        with refused("offset has 17 channels, but 1 groups of a 3x3 kernel need 18"):
            DeformConv(4, 6, 3, padding=1)(torch.zeros(1, 4, 5, 5), torch.zeros(1, 17, 5, 5))

    @lite_only
    @pytest.mark.parametrize("groups, deformable", [(1, 1), (2, 1), (1, 2), (2, 4)])
    def test_modulated_equals_the_definition(self, groups, deformable):
        torch.manual_seed(0)
        layer = ModulatedDeformConv(4, 4, 3, padding=1, groups=groups, deformable_groups=deformable)
        nn.init.uniform_(layer.bias)
        x = torch.randn(1, 4, 4, 5)
        offset, mask = torch.randn(1, 18 * deformable, 4, 5), torch.rand(1, 9 * deformable, 4, 5)
        with torch.no_grad():
            expected = slow(x, layer.weight, offset, mask, groups) + layer.bias.view(1, -1, 1, 1)
            torch.testing.assert_close(layer(x, offset, mask), expected, atol=1e-5, rtol=1e-5)

    @lite_only
    def test_gradients_of_all_inputs(self):
        torch.manual_seed(1)
        layer = ModulatedDeformConv(2, 2, 3, padding=1, deformable_groups=2).double()
        x, mask = torch.randn(1, 2, 4, 4).double(), torch.rand(1, 18, 4, 4).double()
        # Away from whole pixels, where bilinear sampling has a kink.
        offset = torch.randint(-1, 2, (1, 36, 4, 4)) + 0.2 + 0.6 * torch.rand(1, 36, 4, 4).double()
        inputs = [t.requires_grad_() for t in (x, offset, mask)]
        assert torch.autograd.gradcheck(layer, inputs)

    @lite_only
    def test_half_precision_samples_in_float32(self):
        layer = ModulatedDeformConv(4, 6, 3, padding=1)
        x, offset, mask = (torch.randn(1, c, 5, 5).bfloat16() for c in (4, 18, 9))
        expected = layer(x.float(), offset.float(), mask.float())
        for inputs in ((x, offset, mask), (x.float(), offset, mask)):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = layer(*inputs)
            assert y.dtype == inputs[0].dtype
            torch.testing.assert_close(y, expected.to(y.dtype))

    @lite_only
    def test_nan_offsets_are_named_and_infinite_ones_are_outside(self):
        layer = DeformConv(1, 1, 1)
        offset = torch.zeros(1, 2, 4, 4)
        offset[0, 0, 1, 1] = float("nan")
        with pytest.raises(ValueError, match="DeformConv: the offsets contain NaN"):
            layer(torch.ones(1, 1, 4, 4), offset)
        offset[0, 0, 1, 1] = float("inf")
        assert float(layer(torch.ones(1, 1, 4, 4), offset).detach()[0, 0, 1, 1]) == 0.0

    @lite_only
    def test_number_of_factors_is_checked(self):
        layer = ModulatedDeformConv(1, 1, 1, deformable_groups=1)
        with pytest.raises(ValueError, match="mask has 2 channels"):
            layer(torch.ones(1, 1, 4, 4), torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4))


def resnet(**settings):
    cfg = get_cfg()
    for key, value in settings.items():
        cfg.MODEL.RESNETS[key] = value
    return build_resnet_backbone(cfg, ShapeSpec(channels=3))


class TestResNets:
    def test_deformable_stages(self):
        with torch.device("meta"):
            model = resnet(DEFORM_ON_PER_STAGE=[False, True, False, True], OUT_FEATURES=["res5"])
        kinds = [{type(b).__name__ for b in stage} for stage in model.stages]
        assert kinds == [{"BottleneckBlock"}, {"DeformBottleneckBlock"}] * 2
        assert model.res3[0].conv2_offset.weight.shape == (18, 128, 3, 3)

    @pytest.mark.parametrize(
        "settings, parameters",
        [
            ({"DEPTH": 50}, 23508032),
            ({"DEPTH": 50, "DEFORM_ON_PER_STAGE": [False, True, True, True]}, 24088874),
            ({"DEPTH": 50, "DEFORM_ON_PER_STAGE": [False, True, True, True], "DEFORM_MODULATED": True}, 24379295),
            ({"DEPTH": 101, "NUM_GROUPS": 32, "WIDTH_PER_GROUP": 4}, 42128704),
            ({"DEPTH": 101, "NUM_GROUPS": 64, "WIDTH_PER_GROUP": 4}, 81406272),
        ],
    )
    def test_numbers_of_parameters(self, settings, parameters):
        """Those of the networks that mmdetection's zoo has, counted there."""
        cfg = get_cfg()
        cfg.MODEL.BACKBONE.FREEZE_AT = 0
        cfg.MODEL.RESNETS.update(NORM="BN", OUT_FEATURES=["res5"], STRIDE_IN_1X1=False, **settings)
        with torch.device("meta"):
            model = build_resnet_backbone(cfg, ShapeSpec(channels=3))
        assert sum(p.numel() for p in model.parameters()) == parameters

    def test_block_starts_as_a_plain_one(self):
        torch.manual_seed(0)
        block = DeformBottleneckBlock(8, 8, bottleneck_channels=4, norm="")
        x = torch.rand(1, 8, 6, 6)
        hidden = F.conv2d(F.conv2d(x, block.conv1.weight).relu(), block.conv2.weight, padding=1).relu()
        torch.testing.assert_close(block(x), (F.conv2d(hidden, block.conv3.weight) + x).relu())

    @lite_only
    def test_modulated_block_starts_with_half_of_its_convolution(self):
        torch.manual_seed(0)
        block = DeformBottleneckBlock(8, 8, bottleneck_channels=4, norm="", deform_modulated=True, deform_num_groups=2)
        assert block.conv2_offset.weight.shape[0] == 54
        x = torch.rand(1, 8, 6, 6)
        hidden = F.conv2d(F.conv2d(x, block.conv1.weight).relu(), block.conv2.weight, padding=1).relu() / 2
        torch.testing.assert_close(block(x), (F.conv2d(hidden, block.conv3.weight) + x).relu())

    @lite_only
    def test_offsets_and_factors_come_from_the_right_channels(self):
        block = DeformBottleneckBlock(4, 4, bottleneck_channels=4, norm="", deform_modulated=True)
        nn.init.constant_(block.conv2_offset.bias[:18], 100.0)  # all samples outside
        assert torch.equal(block(torch.ones(1, 4, 5, 5)), torch.ones(1, 4, 5, 5))
        nn.init.constant_(block.conv2_offset.bias[:18], 0.0)
        nn.init.constant_(block.conv2_offset.bias[18:], -100.0)  # all factors 0
        assert torch.equal(block(torch.ones(1, 4, 5, 5)), torch.ones(1, 4, 5, 5))

    @lite_only
    @pytest.mark.parametrize("modulated", [False, True])
    def test_every_weight_learns(self, modulated):
        torch.manual_seed(0)
        block = DeformBottleneckBlock(
            8, 16, bottleneck_channels=8, stride=2, num_groups=2, deform_modulated=modulated, deform_num_groups=2
        )
        block(torch.randn(2, 8, 8, 8)).square().sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in block.parameters())

    def test_shallow_networks_have_no_deformable_block(self):
        with refused("ResNet-18 has no deformable blocks"):
            resnet(DEPTH=18, RES2_OUT_CHANNELS=64, DEFORM_ON_PER_STAGE=[False, False, False, True])
