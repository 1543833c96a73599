"""ResNet and FPN: structure, arithmetic, freezing and refusals."""

import gc

import pytest
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone, ResNet, build_backbone
from detectron2.modeling.backbone import BasicStem, BottleneckBlock
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.backbone.resnet import BasicBlock, build_resnet_backbone
from refusals import refused

torch.set_num_threads(1)


def resnet_cfg(**settings):
    cfg = get_cfg()
    for key, value in settings.items():
        cfg.MODEL.RESNETS[key] = value
    return cfg


def tiny_resnet(**kwargs):
    """A stem and three stages of strides 4, 8 and 16 with 8, 16 and 32 channels."""
    stages = [
        ResNet.make_stage(
            BasicBlock, 2, in_channels=c_in, out_channels=c_out, stride_per_block=[stride, 1], norm="BN"
        )
        for c_in, c_out, stride in [(8, 8, 1), (8, 16, 2), (16, 32, 2)]
    ]
    return ResNet(BasicStem(out_channels=8, norm="BN"), stages, **kwargs)


class Given(Backbone):
    """Returns fixed maps: res{l} of stride 2^l, filled with the number ``values[l]``."""

    def __init__(self, values, channels=2):
        super().__init__()
        self.values = values
        self._out_features = [f"res{level}" for level in values]
        self._out_feature_channels = dict.fromkeys(self._out_features, channels)
        self._out_feature_strides = {f"res{level}": 2**level for level in values}

    def forward(self, x):
        n, _, h, w = x.shape
        return {
            f"res{level}": torch.full((n, 2, h >> level, w >> level), float(value))
            for level, value in self.values.items()
        }


def make_identity(fpn):
    for conv in [*fpn.lateral_convs, *fpn.output_convs]:
        torch.nn.init.zeros_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
        middle = conv.kernel_size[0] // 2
        for c in range(conv.out_channels):
            conv.weight.data[c, c, middle, middle] = 1.0


class TestBackbone:
    def test_defaults_and_output_shape(self):
        backbone = Given({3: 1.0, 4: 1.0})
        assert backbone.size_divisibility == 0 and backbone.padding_constraints == {}
        assert backbone.output_shape() == {
            "res3": ShapeSpec(channels=2, stride=8), "res4": ShapeSpec(channels=2, stride=16)
        }

    def test_is_abstract(self):
        with pytest.raises(TypeError):
            Backbone()

    def test_build_backbone_from_registry(self):
        seen = []

        def build_probe_backbone_ok(cfg, input_shape):
            seen.append(input_shape.channels)
            return Given({3: 0.0})

        def build_probe_backbone_bad(cfg, input_shape):
            return torch.nn.Identity()

        for function in (build_probe_backbone_ok, build_probe_backbone_bad):
            BACKBONE_REGISTRY.register(function)
        cfg = get_cfg()
        cfg.MODEL.PIXEL_MEAN = [0.0]
        cfg.MODEL.BACKBONE.NAME = "build_probe_backbone_ok"
        assert isinstance(build_backbone(cfg), Given)
        build_backbone(cfg, ShapeSpec(channels=7))
        assert seen == [1, 7]
        cfg.MODEL.BACKBONE.NAME = "build_probe_backbone_bad"
        with refused("'build_probe_backbone_bad' made a Identity, which is no Backbone"):
            build_backbone(cfg)


class TestResNet:
    @pytest.mark.parametrize("depth", [18, 50])
    def test_equals_torchvision(self, depth):
        theirs = getattr(torchvision.models, f"resnet{depth}")(weights=None).eval()
        g = torch.Generator().manual_seed(0)
        state = {}
        for name, value in theirs.state_dict().items():
            if "running_var" in name or ("bn" in name and name.endswith("weight")):
                value = value.uniform_(0.5, 1.0, generator=g)
            parts = name.split(".")
            if parts[0] == "fc":
                continue
            if parts[0] in ("conv1", "bn1"):
                parts.insert(0, "stem")
            else:
                parts[0] = f"res{int(parts[0][-1]) + 1}"
            new = ".".join(parts).replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
            for i in (1, 2, 3):
                new = new.replace(f"bn{i}", f"conv{i}.norm")
            state[new] = value
        ours = ResNet(BasicStem(norm="BN"), ResNet.make_default_stages(depth, norm="BN")).eval()
        ours.load_state_dict(state, strict=True)
        x = torch.randn(1, 3, 64, 96, generator=g)
        with torch.no_grad():
            expected = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
            for stage in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
                expected = stage(expected)
            found = ours(x)
        assert list(found) == ["res5"]
        torch.testing.assert_close(found["res5"], expected)

    def test_shapes_are_as_announced(self):
        model = tiny_resnet(out_features=["stem", "res2", "res4"])
        output = model(torch.zeros(2, 3, 64, 96))
        assert {k: tuple(v.shape) for k, v in output.items()} == {
            "stem": (2, 8, 16, 24), "res2": (2, 8, 16, 24), "res4": (2, 32, 4, 6)
        }
        shapes = model.output_shape()
        assert {k: (s.channels, s.stride) for k, s in shapes.items()} == {
            "stem": (8, 4), "res2": (8, 4), "res4": (32, 16)
        }

    def test_stages_nobody_needs_are_not_kept(self):
        def blocks_in_memory() -> int:
            gc.collect()
            return sum(type(x) is BottleneckBlock for x in gc.get_objects())

        before = blocks_in_memory()
        model = build_resnet_backbone(resnet_cfg(OUT_FEATURES=["res3"]), ShapeSpec(channels=3))
        assert model.stage_names == ("res2", "res3")
        assert not any(name.startswith(("res4", "res5")) for name in model.state_dict())
        assert blocks_in_memory() - before == 3 + 4

    def test_a_seed_gives_the_same_numbers_whatever_stages_are_kept(self):
        built = []
        for wanted in ("res4", "res5"):
            torch.manual_seed(0)
            model = build_resnet_backbone(resnet_cfg(OUT_FEATURES=[wanted]), ShapeSpec(channels=3))
            built.append((model.res4[0].conv1.weight, torch.rand(1)))
        torch.testing.assert_close(*built, rtol=0, atol=0)

    def test_classifier(self):
        model = tiny_resnet(num_classes=5)
        assert model(torch.zeros(2, 3, 32, 32))["linear"].shape == (2, 5)
        assert 0.005 < model.linear.weight.std() < 0.015

    def test_make_stage(self):
        blocks = ResNet.make_stage(
            BottleneckBlock, 3, in_channels=4, out_channels=8, bottleneck_channels=6, norm="",
            stride_per_block=[2, 1, 1], dilation_per_block=[1, 2, 2],
        )
        assert [(b.in_channels, b.out_channels, b.stride) for b in blocks] == [(4, 8, 2), (8, 8, 1), (8, 8, 1)]
        assert [b.conv2.dilation[0] for b in blocks] == [1, 2, 2]
        assert [b.shortcut is None for b in blocks] == [False, True, True]
        with pytest.raises((AssertionError, ValueError), match="stride_per_block"):
            ResNet.make_stage(BasicBlock, 2, in_channels=4, out_channels=8, stride_per_block=[2])
        with pytest.raises((AssertionError, ValueError), match="stride_per_block"):
            ResNet.make_stage(BasicBlock, 1, in_channels=4, out_channels=8, stride_per_block=[2], stride=2)

    def test_options_reach_the_right_convolution(self):
        block = BottleneckBlock(4, 8, bottleneck_channels=4, stride=2, num_groups=2, dilation=3, stride_in_1x1=True)
        assert (block.conv1.stride, block.conv2.stride) == ((2, 2), (1, 1))
        assert block.conv2.groups == 2 and block.conv2.dilation == block.conv2.padding == (3, 3)
        block = BottleneckBlock(4, 8, bottleneck_channels=4, stride=2)
        assert (block.conv1.stride, block.conv2.stride) == ((1, 1), (2, 2))

        cfg = resnet_cfg(RES5_DILATION=2, OUT_FEATURES=["res4", "res5"], NUM_GROUPS=2, WIDTH_PER_GROUP=32)
        model = build_resnet_backbone(cfg, ShapeSpec(channels=3))
        assert model.output_shape()["res5"].stride == 16
        assert [b.conv2.dilation for b in model.res5] == [(2, 2)] * 3
        assert model.res3[0].conv2.groups == 2

    @pytest.mark.parametrize(
        "freeze_at, frozen", [(0, ""), (1, "stem"), (3, "stem res2 res3"), (9, "stem res2 res3 res4")]
    )
    def test_freeze(self, freeze_at, frozen):
        model = tiny_resnet(freeze_at=freeze_at)
        for name in ("stem", "res2", "res3", "res4"):
            part = getattr(model, name)
            is_frozen = name in frozen.split()
            assert all(p.requires_grad != is_frozen for p in part.parameters())
            kinds = {type(m).__name__ for m in part.modules()}
            assert ("FrozenBatchNorm2d" in kinds) == is_frozen and ("BatchNorm2d" in kinds) != is_frozen
        assert model.freeze(1) is model

    def test_gradients_reach_all_trainable_weights(self):
        model = tiny_resnet(freeze_at=1)
        model(torch.randn(2, 3, 32, 32))["res4"].square().mean().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == (not name.startswith("stem")), name

    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"DEPTH": 20}, "no ResNet of depth 20"),
            ({"RES5_DILATION": 3}, "RES5_DILATION must be 1 or 2, not 3"),
            ({"DEPTH": 18}, "RES2_OUT_CHANNELS must be 64 for ResNet-18, not 256"),
            ({"OUT_FEATURES": ["res9"]}, "out_features ['res9'] must name some of stem, res2, res3, res4, res5"),
            ({"OUT_FEATURES": []}, "out_features [] must name some of stem, res2, res3, res4, res5"),
            ({"DEPTH": 34, "RES2_OUT_CHANNELS": 64, "NUM_GROUPS": 2}, "NUM_GROUPS must be 1 for ResNet-34, not 2"),
            ({"DEPTH": 34, "RES2_OUT_CHANNELS": 64, "RES5_DILATION": 2}, "RES5_DILATION must be 1 for ResNet-34"),
        ],
    )
    def test_bad_settings_are_refused(self, settings, message):
        with refused(message):
            build_resnet_backbone(resnet_cfg(**settings), ShapeSpec(channels=3))

    def test_bad_input_is_refused(self):
        with pytest.raises((AssertionError, ValueError), match="3, 32, 32"):
            tiny_resnet()(torch.zeros(3, 32, 32))
        with refused("out_features ['res5'] must name some of stem, res2, res3, res4"):
            tiny_resnet(out_features=["res5"])


class TestFPN:
    @pytest.mark.parametrize("fuse_type, expected", [("sum", (1 + 10 + 100, 10 + 100, 100)), ("avg", (28.0, 55, 100))])
    def test_top_down_path(self, fuse_type, expected):
        fpn = FPN(Given({3: 1, 4: 10, 5: 100}), ["res3", "res4", "res5"], 2, fuse_type=fuse_type)
        make_identity(fpn)
        output = fpn(torch.zeros(1, 3, 64, 32))
        assert list(output) == ["p3", "p4", "p5"]
        for level, value in zip((3, 4, 5), expected):
            p = output[f"p{level}"]
            assert p.shape == (1, 2, 64 >> level, 32 >> level)
            torch.testing.assert_close(p, torch.full_like(p, value))

    def test_attributes(self):
        bottom_up = Given({2: 0, 3: 0, 4: 0})
        fpn = FPN(bottom_up, ["res3", "res4"], 2, top_block=LastLevelP6P7(2, 2, "p4"))
        assert fpn.bottom_up is bottom_up and fpn.in_features == ("res3", "res4")
        assert fpn.lateral_convs == [fpn.fpn_lateral4, fpn.fpn_lateral3]
        assert fpn.output_convs == [fpn.fpn_output4, fpn.fpn_output3]
        assert {k: (s.channels, s.stride) for k, s in fpn.output_shape().items()} == {
            "p3": (2, 8), "p4": (2, 16), "p5": (2, 32), "p6": (2, 64)
        }
        assert fpn.size_divisibility == 16
        assert FPN(bottom_up, ["res2"], 2, square_pad=64).padding_constraints["square_size"] == 64

    def test_top_block_from_bottom_up_or_pyramid(self):
        fpn = FPN(Given({4: 1, 5: 2}), ["res4", "res5"], 2, top_block=LastLevelMaxPool())
        make_identity(fpn)
        output = fpn(torch.zeros(1, 3, 64, 96))
        torch.testing.assert_close(output["p6"], output["p5"][..., ::2, ::2])

        block = LastLevelP6P7(2, 2)
        fpn = FPN(Given({4: 1, 5: 2}), ["res4", "res5"], 2, top_block=block)
        output = fpn(torch.zeros(1, 3, 64, 96))
        torch.testing.assert_close(output["p6"], block.p6(torch.full((1, 2, 2, 3), 2.0)))
        torch.testing.assert_close(output["p7"], block.p7(output["p6"].relu()))

    def test_hooked_features_are_not_changed_later(self):
        fpn = FPN(Given({3: 1, 4: 2}), ["res3", "res4"], 2)
        make_identity(fpn)
        seen = {}
        for name in ("fpn_lateral3", "fpn_lateral4", "fpn_output4"):
            getattr(fpn, name).register_forward_hook(lambda m, i, o, name=name: seen.update({name: o}))
        fpn(torch.zeros(1, 3, 32, 32))
        assert [seen[n].unique().tolist() for n in ("fpn_lateral3", "fpn_lateral4", "fpn_output4")] == [[1], [2], [2]]

    def test_norm_replaces_bias(self):
        fpn = FPN(Given({3: 1}), ["res3"], 32, norm="GN")
        assert fpn.fpn_lateral3.bias is None and isinstance(fpn.fpn_output3.norm, torch.nn.GroupNorm)

    @pytest.mark.parametrize(
        "features, options, message",
        [
            ([], {}, "in_features [] must name outputs of bottom_up"),
            (["res9"], {}, "in_features ['res9'] must name outputs of bottom_up"),
            (["res2", "res4"], {}, "must be powers of two that double each time: res2 (4), res4 (16)"),
            (["res4", "res3"], {}, "must be powers of two that double each time: res4 (16), res3 (8)"),
            (["res3"], {"fuse_type": "max"}, "fuse_type must be 'sum' or 'avg', not 'max'"),
        ],
    )
    def test_bad_arguments_are_refused(self, features, options, message):
        with refused(message):
            FPN(Given({2: 0, 3: 0, 4: 0}), features, 2, **options)

    def test_from_cfg(self):
        cfg = resnet_cfg(DEPTH=18, RES2_OUT_CHANNELS=64, OUT_FEATURES=["res3", "res4", "res5"])
        cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
        cfg.MODEL.FPN.OUT_CHANNELS = 16
        cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
        assert list(build_backbone(cfg).output_shape()) == ["p3", "p4", "p5", "p6", "p7"]
        cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
        fpn = build_backbone(cfg)
        assert list(fpn.output_shape()) == ["p3", "p4", "p5", "p6"]
        assert isinstance(fpn.top_block, LastLevelMaxPool)
