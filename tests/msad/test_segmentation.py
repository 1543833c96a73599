"""Networks at stride 8, PSPNet's head and the poly schedule: worked examples, and segmentors that learn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY, build_backbone, build_model, build_sem_seg_head
from detectron2.structures import ImageList
from detectron2.utils.events import EventStorage
from torch import nn

from msad import load_config
from msad.distill.teachers import FrozenTeacher
from msad.engine.build import build_distiller
from msad.engine.solver import build_lr_scheduler
from msad.modeling.adapters import adapt, num_classes_key
from msad.modeling.backbones.dilated import stage_dilations
from msad.modeling.segmentation.head import PyramidPooling
from msad.modeling.segmentation.psp_head import PSPHead
from msad.modeling.segmentation.uper_head import UPerHead

CONFIGS = Path(__file__).parents[2] / "configs" / "Segmentation"


def psp_cfg(name="R_18_voc"):
    cfg = load_config(CONFIGS / f"pspnet_{name}.yaml")
    cfg.MODEL.DEVICE = "cpu"
    for node in (cfg.MODEL.RESNETS, cfg.MODEL.MOBILENETV2, cfg.MODEL.SEM_SEG_HEAD):
        node.NORM = "BN"
    return cfg


class TestNetworks:
    @pytest.mark.parametrize(
        "name, channels", [("R_101", (512, 1024, 2048)), ("R_18", (128, 256, 512)), ("MV2", (32, 96, 320))]
    )
    def test_three_maps_of_stride_8(self, name, channels):
        with torch.device("meta"):
            backbone = build_backbone(psp_cfg(f"{name}_cityscapes"))
            maps = backbone(torch.zeros(1, 3, 64, 96))
        assert {n: tuple(y.shape) for n, y in maps.items()} == {
            f"res{i}": (1, c, 8, 12) for i, c in zip((3, 4, 5), channels)
        }
        assert {n: (s.channels, s.stride) for n, s in backbone.output_shape().items()} == {
            f"res{i}": (c, 8) for i, c in zip((3, 4, 5), channels)
        }
        assert backbone.size_divisibility == 8

    def test_dilations_of_blocks(self):
        assert stage_dilations(4, 3, True) == [2, 4, 4] and stage_dilations(4, 3, False) == [4, 4, 4]
        assert stage_dilations(2, 2, True) == [1, 2] and stage_dilations(1, 2, True) == [1, 1]
        with torch.device("meta"):
            resnet = build_backbone(psp_cfg("R_101_voc"))
            small = build_backbone(psp_cfg("R_18_voc"))
            mobile = build_backbone(psp_cfg("MV2_voc"))
        assert [b.conv2.dilation[0] for b in resnet.res4][:3] == [1, 2, 2]
        assert [(b.conv2.dilation[0], b.conv2.padding[0]) for b in resnet.res5] == [(2, 2), (4, 4), (4, 4)]
        assert [[c.dilation[0] for c in (b.conv1, b.conv2)] for b in small.res5] == [[2, 1], [4, 1]]
        depthwise = [block.conv[1][0] for block in mobile.features[2:]]
        dilated = {i + 2: conv.dilation[0] for i, conv in enumerate(depthwise) if conv.dilation[0] > 1}
        assert dilated == {7: 2, 11: 2, 14: 4, 17: 4}
        assert sum(conv.stride[0] == 2 for conv in depthwise) == 2

    def test_undilated_is_the_stock_resnet(self):
        """Stride 32 with the plain stem: detectron2's own builder, of the same weights."""
        cfg = psp_cfg("R_101_voc")
        cfg.MODEL.RESNETS.update(DEPTH=50, STEM_TYPE="basic", OUT_FEATURES=["res3", "res4"])
        cfg.MODEL.RESNETS.update(RES4_DILATION=1, RES5_DILATION=1)
        ours = build_backbone(cfg).eval()
        cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
        stock = build_backbone(cfg).eval()
        stock.load_state_dict(ours.state_dict(), strict=True)
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            for name, y in stock(x).items():
                torch.testing.assert_close(ours(x)[name], y)
        assert ours.size_divisibility == 16

    def test_first_block_of_a_dilated_stage(self):
        """Contracted, it computes at every second cell what the strided one computes."""
        first = build_backbone(psp_cfg("R_18_voc")).res4[0]
        x = torch.randn(1, 128, 9, 9)
        strided = F.conv2d(x, first.conv1.weight, stride=2, padding=1)
        torch.testing.assert_close(F.conv2d(x, first.conv1.weight, padding=first.conv1.padding)[..., ::2, ::2], strided)

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"DEPTH": 20}, "DEPTH 20"), ({"STEM_TYPE": "v1d"}, "v1d"), ({"RES5_DILATION": 1}, "RES5_DILATION"),
            ({"RES4_DILATION": 0}, "RES4_DILATION"),
        ],
    )
    def test_wrong_options_are_named(self, options, message):
        cfg = psp_cfg()
        cfg.MODEL.RESNETS.update(options)
        with pytest.raises(ValueError, match=message):
            build_backbone(cfg)


class TestPSPHead:
    def head(self, **options):
        shapes = {"res4": ShapeSpec(channels=6, stride=8), "res5": ShapeSpec(channels=4, stride=8)}
        return PSPHead(shapes, **{"num_classes": 3, "channels": 8, "norm": "", "dropout": 0.0, **options})

    def features(self, n=2, h=6, w=12):
        return {"res4": torch.randn(n, 6, h, w), "res5": torch.randn(n, 4, h, w)}

    @pytest.mark.parametrize(
        "name, inner, aux", [("R_101", 4096, 256), ("R_18", 1024, 64), ("MV2", 2368, 256)]
    )
    def test_widths_of_the_zoo(self, name, inner, aux):
        cfg = psp_cfg(f"{name}_cityscapes")
        with torch.device("meta"):
            head = build_sem_seg_head(cfg, build_backbone(cfg).output_shape())
        channels = cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM
        assert tuple(head.bottleneck.weight.shape) == (channels, inner, 3, 3)
        assert head.auxiliary[0].out_channels == aux and head.predictor[1].out_channels == 19
        assert len(head.pooling.convs) == 4

    def test_pooling_by_hand(self):
        pooling = PyramidPooling(1, 1, (1, 2), "")
        for conv in pooling.convs:
            nn.init.ones_(conv.weight)
        x = torch.tensor([[[[0.0, 4.0, 8.0, 8.0], [0.0, 0.0, 8.0, 8.0], [2.0] * 4, [2.0] * 4]]])
        y = pooling(x)
        assert y.shape == (1, 3, 4, 4) and torch.equal(y[:, :1], x)
        torch.testing.assert_close(y[0, 1], torch.full((4, 4), 3.25))
        # The 2x2 grid [[1, 8], [2, 2]] resized without aligned corners: a quarter and three quarters of neighbours.
        torch.testing.assert_close(y[0, 2, 0], torch.tensor([1.0, 2.75, 6.25, 8.0]))
        torch.testing.assert_close(y[0, 2, :, 0], torch.tensor([1.0, 1.25, 1.75, 2.0]))

    def test_losses_by_hand(self):
        torch.manual_seed(0)
        head, features = self.head(loss_weight=0.5), self.features()
        targets = torch.randint(0, 3, (2, 48, 96))
        targets[:, :20] = 255
        nothing, losses = head(features, targets)
        assert nothing is None and list(losses) == ["loss_sem_seg", "loss_sem_seg_aux"]
        main = head.predictor(head.decode(features))
        for scores, loss, weight in (
            (main, losses["loss_sem_seg"], 0.5), (head.auxiliary(features["res4"]), losses["loss_sem_seg_aux"], 0.2)
        ):  # fmt: skip
            up = F.interpolate(scores, size=(48, 96), mode="bilinear", align_corners=False).log_softmax(dim=1)
            expected = -up.gather(1, targets.clamp(max=2)[:, None])[:, :, 20:].mean()
            torch.testing.assert_close(loss, weight * expected)

    def test_a_batch_without_labels_costs_nothing(self):
        losses = self.head()(self.features(), torch.full((2, 48, 96), 255))[1]
        total = sum(losses.values())
        assert float(total.detach()) == 0.0
        total.backward()

    def test_inference_scores_have_the_size_of_the_input(self):
        head = self.head().eval()
        scores, losses = head(self.features(1, 5, 7))
        assert scores.shape == (1, 3, 40, 56) and losses == {}
        assert head.predictor[1].weight.std() < 0.02 and float(head.predictor[1].bias.abs().sum()) == 0

    def test_losses_are_float32_with_amp(self):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = self.head()(self.features(), torch.zeros(2, 48, 96, dtype=torch.int64))[1]
        assert {loss.dtype for loss in losses.values()} == {torch.float32}

    def test_without_auxiliary_classifier(self):
        head = PSPHead({"res5": ShapeSpec(channels=4, stride=8)}, num_classes=3, channels=8, norm="", aux_weight=0.0)
        assert list(head(self.features(), torch.zeros(2, 48, 96, dtype=torch.int64))[1]) == ["loss_sem_seg"]
        assert not any("auxiliary" in name for name in head.state_dict())
        with pytest.raises(ValueError, match="AUX_WEIGHT 0"):
            PSPHead({"res5": ShapeSpec(channels=4, stride=8)}, num_classes=3, channels=8, norm="")
        with pytest.raises(ValueError, match="COMMON_STRIDE is 16, but res5 has 8"):
            self.head(common_stride=16)


class TestUPerHead:
    """Three maps of strides 4, 8 and 16."""

    def head(self, width=1, **options):
        shapes = {f"p{i}": ShapeSpec(channels=width * (i + 1), stride=4 * 2**i) for i in range(3)}
        defaults = {"num_classes": 3, "channels": 2 * width, "common_stride": 4, "norm": "", "dropout": 0.0}
        return UPerHead(shapes, **{**defaults, **options})

    def test_by_hand(self):
        """Convolutions that add their channels at each place, of maps x, 1 and 2, with the mean as the only pooling."""
        shapes = {f"p{i}": ShapeSpec(channels=1, stride=4 * 2**i) for i in range(3)}
        head = UPerHead(shapes, num_classes=3, channels=1, pool_scales=(1,), common_stride=4, norm="", aux_weight=0.0)
        for conv in (m for m in head.modules() if isinstance(m, nn.Conv2d)):
            nn.init.zeros_(conv.weight)
            conv.weight.data[..., conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] = 1.0
        head.bottleneck.weight.data *= torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1, 1)
        x = torch.rand(1, 1, 4, 8)
        features = {"p0": x, "p1": torch.ones(1, 1, 2, 4), "p2": torch.full((1, 1, 1, 2), 2.0)}
        # The top is 2 + 2; the next level 1 + 4, the finest x + 5; fused they are x + 5, ten 5 and a hundred 4.
        torch.testing.assert_close(head.decode(features), x + 5 + 50 + 400)

    def test_losses_and_scores(self):
        head = self.head(width=4)
        sizes = {"p0": (16, 24), "p1": (8, 12), "p2": (4, 6)}
        features = {n: torch.randn(2, 4 * (i + 1), *size) for i, (n, size) in enumerate(sizes.items())}
        losses = head(features, torch.randint(0, 3, (2, 64, 96)))[1]
        assert list(losses) == ["loss_sem_seg", "loss_sem_seg_aux"]
        assert head.auxiliary[0].in_channels == 8  # of the map before the last
        sum(losses.values()).backward()
        assert [name for name, p in head.named_parameters() if p.grad is None] == []
        assert head.eval()(features)[0].shape == (2, 3, 64, 96)

    def test_wrong_maps_are_named(self):
        with pytest.raises(ValueError, match="COMMON_STRIDE is 8, but p0 has 4"):
            self.head(common_stride=8)
        shapes = {"p1": ShapeSpec(channels=2, stride=8), "p0": ShapeSpec(channels=2, stride=4)}
        with pytest.raises(ValueError, match=r"\['p1', 'p0'\] \(strides \[8, 4\]\): UPerHead reads two maps or more"):
            UPerHead(shapes, num_classes=3, channels=2, common_stride=8)

    def test_swin_under_swin(self):
        """The paper's pair in small: a student of another width, compared at its stages and at the decoder."""
        cfg = load_config(CONFIGS / "upernet_Swin-T_CAD_voc.yaml")
        cfg.MODEL.DEVICE, cfg.DISTILL.WARMUP_ITERS = "cpu", 0
        models = []
        for width in (8, 4):
            tiny = {"DEPTHS": [1, 1, 1, 1], "NUM_HEADS": [1, 2, 2, 4], "WINDOW_SIZE": 2, "DROP_PATH_RATE": 0.0}
            cfg.MODEL.SWIN.update(EMBED_DIM=width, **tiny)
            cfg.MODEL.SEM_SEG_HEAD.update(NORM="BN", NUM_CLASSES=3, CONVS_DIM=8)
            models.append(build_model(cfg))
        distiller = build_distiller(cfg, models[1], [FrozenTeacher(models[0])])
        item = {"image": torch.rand(3, 64, 96) * 255, "sem_seg": torch.randint(0, 3, (64, 96))}
        with EventStorage(0):
            losses = distiller([item, item])
        assert {"loss_distill/CAD", "loss_distill/CAD_2", "loss_sem_seg", "loss_sem_seg_aux"} == set(losses)
        sum(losses.values()).backward()
        unused = [name for name, p in models[1].named_parameters() if p.grad is None]
        assert unused == []


class TestPolySchedule:
    @pytest.mark.parametrize("end, half", [(0.0, 0.005359), (1e-4, 0.005405)])
    def test_half_way_of_the_papers_schedule(self, end, half):
        cfg = psp_cfg()
        cfg.SOLVER.POLY_LR_END = end
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
        scheduler = build_lr_scheduler(cfg, optimizer)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
        scheduler.last_epoch = 39999
        optimizer.step()
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(half, abs=5e-7)
        scheduler.last_epoch = 79999
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(end, abs=1e-9)

    @pytest.mark.parametrize("name, key", [("WarmupPolyLR", "POLY_LR_END"), ("WarmupCosineLR", "BASE_LR_END")])
    def test_an_end_above_the_beginning_is_refused(self, name, key):
        cfg = psp_cfg()
        cfg.SOLVER.update({"LR_SCHEDULER_NAME": name, key: 0.1})
        with pytest.raises(ValueError, match=rf"SOLVER\.{key} is 0\.1; it must be from 0 to SOLVER\.BASE_LR, 0\.01"):
            build_lr_scheduler(cfg, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR))

    def test_warm_up_and_the_engines_own_schedules(self):
        cfg = psp_cfg()
        cfg.SOLVER.update(WARMUP_ITERS=800, WARMUP_FACTOR=0.1)
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.01)
        build_lr_scheduler(cfg, optimizer)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
        cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupCosineLR"
        scheduler = build_lr_scheduler(cfg, optimizer)
        scheduler.last_epoch = cfg.SOLVER.MAX_ITER // 2 - 1
        optimizer.step()
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.005, rel=1e-3)  # of a cosine, the half


class TestModel:
    def tiny(self):
        cfg = psp_cfg()
        cfg.MODEL.RESNETS.update(STEM_OUT_CHANNELS=16, RES2_OUT_CHANNELS=16)
        cfg.MODEL.SEM_SEG_HEAD.update(NUM_CLASSES=2, CONVS_DIM=16)
        torch.manual_seed(0)
        return cfg, build_model(cfg)

    def test_sides_that_do_not_divide_by_8(self):
        _, model = self.tiny()
        inputs = [
            {"image": torch.randint(0, 255, (3, h, w)), "sem_seg": torch.randint(0, 2, (h, w))}
            for h, w in ((45, 61), (50, 38))
        ]
        inputs = [{**x, "height": 30, "width": 20} for x in inputs]
        assert all(torch.isfinite(loss) for loss in model(inputs).values())
        assert [x["sem_seg"].shape for x in model.eval()(inputs)] == [(2, 30, 20)] * 2

    def test_adapter_gives_what_the_model_gives(self):
        cfg, model = self.tiny()
        assert num_classes_key(cfg) == "MODEL.SEM_SEG_HEAD.NUM_CLASSES"
        model.sem_seg_head.predictor[0].p = model.sem_seg_head.auxiliary[1][0].p = 0.0
        adapter = adapt(model)
        assert adapter.levels == [] and not adapter.two_stage
        inputs = [
            {"image": torch.randint(0, 255, (3, h, w)), "sem_seg": torch.randint(0, 2, (h, w))}
            for h, w in ((45, 61), (50, 38))
        ]
        def batch():
            pixels = [(x["image"] - model.pixel_mean) / model.pixel_std for x in inputs]
            return ImageList.from_tensors(pixels, model.backbone.size_divisibility)

        expected = model(inputs)
        images = batch()
        found = adapter.losses(images, model.backbone(images.tensor), adapter.targets(inputs))
        torch.testing.assert_close(found, expected)
        model.eval()
        with torch.no_grad():
            results = adapter.predict(images, model.backbone(images.tensor))
            for ours, theirs in zip(adapter.postprocess(results, inputs, images), model(inputs)):
                torch.testing.assert_close(ours["sem_seg"], theirs["sem_seg"])
        with pytest.raises(TypeError, match="SemanticSegmentor"):
            adapter.heads()

    def test_head_is_registered_for_yaml(self):
        assert SEM_SEG_HEADS_REGISTRY.get("PSPHead") is PSPHead
        cfg = psp_cfg()
        cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["res4", "p5"]
        with pytest.raises(ValueError, match=r"\['p5'\] are not made"):
            build_model(cfg)
