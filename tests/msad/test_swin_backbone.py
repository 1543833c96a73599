"""Swin Transformers by yaml, under detectron2's FPNs and ours, and how AdamW decays them."""

from __future__ import annotations

import detectron2
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from msad import load_config
from msad.engine.solver import build_optimizer


def swin_cfg(builder="build_swin_fpn_backbone", **options):
    """A Swin of 8 channels and one or two blocks a stage."""
    cfg = load_config("")
    cfg.MODEL.DEVICE, cfg.MODEL.BACKBONE.NAME = "cpu", builder
    tiny = {"EMBED_DIM": 8, "DEPTHS": [1, 2, 1, 1], "NUM_HEADS": [1, 2, 2, 4], "WINDOW_SIZE": 2, "DROP_PATH_RATE": 0.0}
    cfg.MODEL.SWIN.update({**tiny, **options})
    cfg.MODEL.FPN.OUT_CHANNELS = 12
    cfg.MODEL.FPN.IN_FEATURES = list(cfg.MODEL.SWIN.OUT_FEATURES)
    return cfg


def shapes(maps):
    return {name: tuple(y.shape[1:]) for name, y in maps.items()}


class TestBuilders:
    def test_fpn_of_rcnns(self):
        fpn = build_backbone(swin_cfg())
        assert shapes(fpn(torch.randn(1, 3, 64, 96))) == {
            "p2": (12, 16, 24), "p3": (12, 8, 12), "p4": (12, 4, 6), "p5": (12, 2, 3), "p6": (12, 1, 2)
        }

    def test_p6_of_dense_detectors_comes_from_the_last_map_of_swin(self):
        """Named "p3" there, which is also a level of the pyramid, with other channels and another stride."""
        fpn = build_backbone(swin_cfg("build_retinanet_swin_fpn_backbone", OUT_FEATURES=["p1", "p2", "p3"]))
        x = torch.randn(1, 3, 64, 128)
        maps = fpn(x)
        assert shapes(maps) == {
            "p3": (12, 8, 16), "p4": (12, 4, 8), "p5": (12, 2, 4), "p6": (12, 1, 2), "p7": (12, 1, 1)
        }
        torch.testing.assert_close(maps["p6"], fpn.top_block.p6(fpn.bottom_up(x)["p3"]))
        assert not any(name.startswith("bottom_up.norm0") for name in fpn.state_dict())

    def test_under_our_pyramid_and_alone(self):
        cfg = swin_cfg("build_level_fpn_backbone")
        cfg.MODEL.FPN.BOTTOM_UP, cfg.MODEL.FPN.LEVELS = "build_swin_backbone", ["p2", "p4", "p6"]
        assert shapes(build_backbone(cfg)(torch.randn(1, 3, 64, 64))) == {
            "p2": (12, 16, 16), "p4": (12, 4, 4), "p6": (12, 1, 1)
        }
        cfg.MODEL.BACKBONE.NAME = "build_swin_backbone"
        swin = build_backbone(cfg)
        assert swin.size_divisibility == 32
        assert swin.output_shape()["p2"] == ShapeSpec(channels=32, stride=16)

    @pytest.mark.parametrize(
        "builder, options, message",
        [
            ("build_swin_backbone", {"OUT_FEATURES": ["p0", "res5"]}, "OUT_FEATURES.*res5"),
            ("build_swin_backbone", {"OUT_FEATURES": []}, "must name some of"),
            ("build_retinanet_swin_fpn_backbone", {"OUT_FEATURES": ["p1", "p2"]}, "P6 is made from 'p3'"),
        ],
    )
    def test_wrong_options_are_named(self, builder, options, message):
        with pytest.raises(ValueError, match=message):
            build_backbone(swin_cfg(builder, **options))

    def test_wrong_maps_of_the_pyramid_are_named(self):
        cfg = swin_cfg()
        cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3"]
        with pytest.raises(ValueError, match=r"IN_FEATURES.*res2.*p0"):
            build_backbone(cfg)

    @pytest.mark.skipif("lite" in detectron2.__version__, reason="detectron2-lite does not use timm")
    def test_missing_timm_is_said(self):
        try:
            import timm  # noqa: F401
        except ModuleNotFoundError:
            with pytest.raises(ImportError, match=r"DROP_PATH_RATE is 0"):
                build_backbone(swin_cfg(DROP_PATH_RATE=0.1))
        else:
            assert build_backbone(swin_cfg(DROP_PATH_RATE=0.1)).training


def test_adamw_decays_neither_norms_nor_positions():
    cfg = swin_cfg(APE=True)
    cfg.SOLVER.OPTIMIZER, cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY = "AdamW", 1e-4, 0.05
    model = build_backbone(cfg)
    optimizer = build_optimizer(cfg, model)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        free = "norm" in name or name.endswith(("relative_position_bias_table", "absolute_pos_embed"))
        assert decay[id(parameter)] == (0.0 if free else 0.05), name
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.999)}


def test_a_detector_learns():
    torch.manual_seed(0)
    cfg = swin_cfg("build_retinanet_swin_fpn_backbone", OUT_FEATURES=["p1", "p2", "p3"])
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.RETINANET.NUM_CLASSES, cfg.MODEL.RETINANET.NUM_CONVS = "RetinaNet", 2, 1
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64], [128], [256]]
    model = build_model(cfg)
    truth = Instances((64, 96), gt_boxes=Boxes([[10, 10, 40, 50]]), gt_classes=torch.tensor([1]))
    inputs = [{"image": torch.randint(0, 255, (3, 64, 96)), "instances": truth}]
    cfg.SOLVER.OPTIMIZER, cfg.SOLVER.BASE_LR = "AdamW", 1e-3
    optimizer = build_optimizer(cfg, model)
    history = []
    for _ in range(40):
        with EventStorage():
            loss = sum(model(inputs).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert history[-1] < 0.2 * history[0]
