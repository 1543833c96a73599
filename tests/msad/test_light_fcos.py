"""FCOS with a light head: what its options cost, and that it is trained, distilled and exported as FCOS is."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.utils.events import EventStorage
from torch import nn

from msad.modeling.detectors.light_fcos import LightFCOSHead, make_tower

C, K = 8, 3
COMMON = {"num_classes": K, "conv_dims": [C, C], "norm": "", "prior_prob": 0.01}
LEVELS = [ShapeSpec(channels=C, stride=s) for s in (4, 8, 16)]
MAPS = [torch.randn(2, C, s, s + 1, generator=torch.Generator().manual_seed(s)) for s in (8, 4, 2)]


def light(separable=False, shared=False, finest_width=0, **options) -> LightFCOSHead:
    arguments = {**COMMON, "separable": separable, "shared": shared, "finest_width": finest_width, **options}
    return LightFCOSHead(input_shape=LEVELS, **arguments)


def weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() > 1)


def test_without_options_it_is_detectron2s_head():
    head, plain = light(), FCOSHead(input_shape=LEVELS, **COMMON)
    plain.load_state_dict(head.state_dict(), strict=True)
    for mine, theirs in zip(head(MAPS), plain(MAPS)):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_a_separable_tower_by_hand():
    tower = make_tower(C, [6], "", separable=True)
    depthwise, pointwise, _ = tower
    x = MAPS[0]
    with torch.no_grad():
        wanted = torch.stack([
            nn.functional.conv2d(x[:, c : c + 1], depthwise.weight[c : c + 1], padding=1)[:, 0] for c in range(C)
        ], dim=1)  # fmt: skip
        mixed = torch.einsum("oc,nchw->nohw", pointwise.weight[:, :, 0, 0], wanted) + pointwise.bias[:, None, None]
        torch.testing.assert_close(tower(x), mixed.relu())


def test_weights_of_every_option():
    predictions = 9 * C * (K + 5)
    assert weights(light()) == 2 * 2 * 9 * C * C + predictions
    assert weights(light(shared=True)) == 2 * 9 * C * C + predictions
    assert weights(light(separable=True)) == 2 * 2 * (9 * C + C * C) + predictions
    finest = 2 * 2 * 9 * 4 * 4 + 9 * 4 * (K + 5)
    assert weights(light(finest_width=4)) == weights(light()) + C * 4 + finest


def test_only_the_finest_level_is_narrow():
    head = light(finest_width=4)
    with torch.no_grad():
        before = head(MAPS)
        for parameter in (*head.finest.parameters(), *head.narrow.parameters()):
            parameter.add_(0.5)
        after = head(MAPS)
    for a, b in zip(before, after):
        assert a[0].shape == b[0].shape and not torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])


@pytest.mark.parametrize("options", [{"norm": "BN"}, {"conv_dims": []}])
def test_wrong_options_are_named(options):
    with pytest.raises(ValueError, match=r"MODEL\.FCOS\.(NORM|CONV_DIMS)"):
        light(**options)


@pytest.mark.parametrize("options", [{"SHARED": True}, {"FINEST_WIDTH": 4, "SEPARABLE": False}])
def test_trains_every_parameter(options, tiny_model, make_batch):
    keys = {f"MODEL__LIGHTFCOS__{key}": value for key, value in options.items()}
    model = tiny_model("LightFCOS", MODEL__FCOS__PRIOR_DISTANCE=1.5, **keys)
    with EventStorage(0):
        losses = model(make_batch([(96, 96), (64, 128)], boxes=3))
    assert set(losses) == {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"}
    sum(losses.values()).backward()
    dead = [name for name, p in model.head.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not dead
    assert len(model.eval()(make_batch([(96, 96)]))[0]["instances"]) > 0


def test_is_distilled(make_distiller, tiny_model, make_batch):
    distiller = make_distiller(student=tiny_model("LightFCOS", range(2, 7), seed=1))
    with EventStorage(0):
        losses = distiller(make_batch([(64, 96)]))
    (name,) = set(losses) - {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"}
    assert losses[name] > 0
