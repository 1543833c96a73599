"""Backbones of timm by name; the package is an extra."""

from __future__ import annotations

import builtins

import pytest
import torch
from detectron2.modeling import build_backbone

from msad import load_config


def timm_cfg(name="resnet10t", out_features=("res2", "res3", "res4", "res5")):
    cfg = load_config("")
    cfg.MODEL.DEVICE, cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "cpu", "build_timm_backbone", 0
    cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.OUT_FEATURES = name, list(out_features)
    return cfg


def test_missing_timm_is_said(monkeypatch):
    find = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "timm":
            raise ModuleNotFoundError("No module named 'timm'", name="timm")
        return find(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install timm"):
        build_backbone(timm_cfg())


class TestWithTimm:
    @pytest.fixture(autouse=True)
    def timm(self):
        return pytest.importorskip("timm", reason="the extra 'timm' is not installed")

    @pytest.mark.parametrize(
        "name, out_features, channels",
        [
            ("resnet10t", ("c1", "res3", "res5"), (64, 128, 512)),  # maps of strides 2, 4, 8, 16, 32
            ("convnext_atto", ("res2", "res4"), (40, 160)),  # 4, 8, 16, 32
            ("mobilenetv3_small_050", ("res5", "c1"), (16, 288)),  # another class of feature extractors
        ],
    )
    def test_strides_and_channels(self, name, out_features, channels):
        backbone = build_backbone(timm_cfg(name, out_features)).eval()
        maps = backbone(torch.zeros(1, 3, 64, 96))
        shapes = backbone.output_shape()
        assert set(maps) == set(out_features) and list(maps) == list(shapes)
        assert tuple(shape.channels for shape in shapes.values()) == channels
        for feature, y in maps.items():
            stride = shapes[feature].stride
            assert y.shape == (1, shapes[feature].channels, 64 // stride, 96 // stride)
        assert backbone.size_divisibility == max(shape.stride for shape in shapes.values())

    def test_nhwc_maps_are_turned(self):
        backbone = build_backbone(timm_cfg("swin_tiny_patch4_window7_224", ("res3", "res5"))).eval()
        maps = backbone(torch.randn(1, 3, 224, 224))
        assert {n: tuple(y.shape) for n, y in maps.items()} == {"res3": (1, 192, 28, 28), "res5": (1, 768, 7, 7)}

    def test_maps_are_those_of_timm(self, timm):
        backbone = build_backbone(timm_cfg()).eval()
        theirs = timm.create_model("resnet10t", features_only=True).eval()
        theirs.load_state_dict(backbone.net.state_dict(), strict=False)
        x = torch.randn(1, 3, 64, 64)
        for ours, expected in zip(backbone(x).values(), theirs(x)[1:]):
            torch.testing.assert_close(ours, expected)

    def test_under_a_pyramid(self):
        cfg = timm_cfg("convnext_atto", ("res3", "res4", "res5"))
        cfg.MODEL.BACKBONE.NAME, cfg.MODEL.FPN.BOTTOM_UP = "build_level_fpn_backbone", "build_timm_backbone"
        cfg.MODEL.FPN.IN_FEATURES, cfg.MODEL.FPN.OUT_CHANNELS = ["res3", "res4", "res5"], 8
        cfg.MODEL.FPN.LEVELS = ["p3", "p4", "p5", "p6", "p7"]
        model = build_backbone(cfg)
        sum(y.square().sum() for y in model(torch.randn(2, 3, 64, 64)).values()).backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []

    @pytest.mark.parametrize(
        "name, out_features, message",
        [
            ("resnet10x", ("res2",), "no model 'resnet10x'.*resnet"), ("", ("res2",), "no model ''"),
            ("convnext_atto", ("c1",), r"\['c1'\]: convnext_atto has \['res2', 'res3', 'res4', 'res5'\]"),
            ("convnext_atto", (), "convnext_atto has"),
        ],
    )
    def test_wrong_names_are_named(self, name, out_features, message):
        with pytest.raises(ValueError, match=message):
            build_backbone(timm_cfg(name, out_features))

    def test_freezing_is_refused(self):
        cfg = timm_cfg()
        cfg.MODEL.BACKBONE.FREEZE_AT = 2
        with pytest.raises(ValueError, match="FREEZE_AT"):
            build_backbone(cfg)
