"""Light heads of dense detectors: what their options cost, and that they are trained and distilled as others are."""

from __future__ import annotations

import itertools

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.utils.events import EventStorage
from torch import nn

from msad import load_config
from msad.modeling.detectors.gfl import GFLHead
from msad.modeling.detectors.light_heads import LightFCOSHead, LightGFLHead, LightRetinaNetHead, make_separable

C, K = 8, 3
COMMON = {"num_classes": K, "conv_dims": [C, C], "norm": ""}
LEVELS = [ShapeSpec(channels=C, stride=s) for s in (4, 8, 16)]
MAPS = [torch.randn(2, C, s, s + 1, generator=torch.Generator().manual_seed(s)) for s in (8, 4, 2)]
# light class, the one without "Light", its own arguments, channels of all its outputs
HEADS = {
    "RetinaNet": (LightRetinaNetHead, RetinaNetHead, {"num_anchors": 2}, 2 * (K + 4)),
    "FCOS": (LightFCOSHead, FCOSHead, {}, K + 4 + 1),
    "GFL": (LightGFLHead, GFLHead, {"reg_max": 5}, K + 4 * 6),
}
KINDS = pytest.mark.parametrize("kind", HEADS)


def light(kind: str, **options) -> nn.Module:
    made, _, arguments, _ = HEADS[kind]
    return made(input_shape=LEVELS, **{**COMMON, **arguments, **options})


def weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() > 1)


@KINDS
def test_without_options_it_is_the_head_of_the_detector(kind):
    _, plain_class, arguments, _ = HEADS[kind]
    head, plain = light(kind), plain_class(input_shape=LEVELS, **COMMON, **arguments)
    plain.load_state_dict(head.state_dict(), strict=True)
    for mine, theirs in zip(head(MAPS), plain(MAPS), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_a_separable_tower_by_hand():
    tower = nn.Sequential(nn.Conv2d(C, 6, 3, padding=1), nn.ReLU())
    make_separable(tower)
    (depthwise, pointwise), _ = tower
    x = MAPS[0]
    with torch.no_grad():
        wanted = torch.stack([
            nn.functional.conv2d(x[:, c : c + 1], depthwise.weight[c : c + 1], padding=1)[:, 0] for c in range(C)
        ], dim=1)  # fmt: skip
        mixed = torch.einsum("oc,nchw->nohw", pointwise.weight[:, :, 0, 0], wanted) + pointwise.bias[:, None, None]
        torch.testing.assert_close(tower(x), mixed.relu())


def test_a_separable_tower_keeps_the_variance():
    torch.manual_seed(0)
    tower = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())))
    make_separable(tower)
    with torch.no_grad():
        second = [float(tower[: 2 * depth](torch.randn(1, 64, 32, 32).relu()).square().mean()) for depth in range(5)]
    assert all(0.5 < after / before < 2 for before, after in itertools.pairwise(second))


@KINDS
def test_weights_of_every_option(kind):
    channels = HEADS[kind][3]
    predictions = 9 * C * channels
    assert weights(light(kind)) == 2 * 2 * 9 * C * C + predictions
    assert weights(light(kind, conv_dims=[C])) == 2 * 9 * C * C + predictions
    assert weights(light(kind, shared=True)) == 2 * 9 * C * C + predictions
    assert weights(light(kind, separable=True)) == 2 * 2 * (9 * C + C * C) + predictions
    finest = 2 * 2 * 9 * 4 * 4 + 9 * 4 * channels
    assert weights(light(kind, finest_width=4)) == weights(light(kind)) + C * 4 + finest
    both = 2 * (9 * 4 + 4 * 4) + 9 * 4 * channels
    options = {"shared": True, "separable": True}
    assert weights(light(kind, finest_width=4, **options)) == weights(light(kind, **options)) + C * 4 + both


@KINDS
def test_a_shared_tower_runs_once_and_feeds_both(kind):
    head, runs = light(kind, shared=True), []
    head.tower.register_forward_hook(lambda *_: runs.append(1))
    logits, sides, *_ = head(MAPS)
    assert len(runs) == len(MAPS)
    x = head.tower(MAPS[1])
    scale = getattr(head, "scales", torch.ones(3))[1]
    torch.testing.assert_close(logits[1], head.cls_score(x))
    torch.testing.assert_close(sides[1], scale * head.bbox_pred(x))


@KINDS
def test_only_the_finest_level_is_narrow(kind):
    head = light(kind, finest_width=4)
    with torch.no_grad():
        before = head(MAPS)
        for parameter in (*head.finest.parameters(), *head.narrow.parameters()):
            parameter.add_(0.5)
        after = head(MAPS)
    for a, b in zip(before, after, strict=True):
        assert len(a) == len(MAPS) and a[0].shape == b[0].shape and not torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "BN"}, "NORM 'BN': a light head has 'GN' or ''"),
        ({"conv_dims": []}, "at least one convolution"),
        ({"norm": "GN", "conv_dims": [32], "finest_width": 24}, r"FINEST_WIDTH 24: GN has 32 groups"),
        ({"input_shape": LEVELS[:1], "finest_width": 4}, "FINEST_WIDTH: the head reads one level"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LightFCOSHead(**{"input_shape": LEVELS, **COMMON, **options})


def test_options_without_effect_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("MODEL: {META_ARCHITECTURE: RetinaNet, LIGHT_HEAD: {SHARED: True}}")
    with pytest.raises(ValueError, match=r"MODEL\.LIGHT_HEAD has no effect on RetinaNet: use LightRetinaNet"):
        load_config(tmp_path / "a.yaml")
    assert load_config(tmp_path / "a.yaml", ["MODEL.META_ARCHITECTURE", "LightRetinaNet"]).MODEL.LIGHT_HEAD.SHARED


@pytest.mark.parametrize("options", [{"SHARED": True}, {"SEPARABLE": True}, {"FINEST_WIDTH": 4}])
@KINDS
def test_trains_every_parameter(kind, options, tiny_model, make_batch):
    keys = {f"MODEL__LIGHT_HEAD__{key}": value for key, value in options.items()}
    # Coarse levels that no object falls to would leave their factors (GFL) without a gradient.
    model = tiny_model(f"Light{kind}", range(3, 5), MODEL__FCOS__PRIOR_DISTANCE=1.5, **keys)
    with EventStorage(0):
        losses = model(make_batch([(96, 96), (64, 128)], boxes=6))
    sum(losses.values()).backward()
    dead = [name for name, p in model.head.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert losses and not dead


@KINDS
def test_is_distilled(kind, make_distiller, tiny_model, make_batch):
    options = {"MODEL__LIGHT_HEAD__SHARED": True, "MODEL__LIGHT_HEAD__FINEST_WIDTH": 4}
    distiller = make_distiller(student=tiny_model(f"Light{kind}", range(2, 7), seed=1, **options))
    with EventStorage(0):
        losses = distiller(make_batch([(64, 96)]))
    (name,) = {name for name in losses if name.startswith("loss_distill")}
    assert losses[name] > 0
