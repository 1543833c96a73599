"""Directions, moving along them, the loss that is looked at, and sharpness."""

from __future__ import annotations

import math

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from msad.evaluation.detection_loss import DetectionLoss
from msad.evaluation.flatness import loss_along, moved, random_direction, sharpness


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def test_filters_of_a_direction_have_the_norms_of_the_model():
    model = net()
    with torch.no_grad():
        model[0].weight[1].zero_()
    direction = random_direction(model, 3)
    assert list(direction) == ["0.weight", "3.weight"]  # no biases, no norm
    for name, parameter in (("0.weight", model[0].weight), ("3.weight", model[3].weight)):
        torch.testing.assert_close(direction[name].flatten(1).norm(dim=1), parameter.flatten(1).norm(dim=1))
    again, other = random_direction(model, 3), random_direction(model, 4)
    assert torch.equal(again["0.weight"], direction["0.weight"])
    assert not torch.equal(other["0.weight"], direction["0.weight"])


def test_a_network_of_scaled_weights_has_scaled_directions():
    model, scaled = net(), net()
    with torch.no_grad():
        scaled[0].weight.mul_(7)
    torch.testing.assert_close(random_direction(scaled, 1)["0.weight"], 7 * random_direction(model, 1)["0.weight"])


@pytest.mark.parametrize("groups", [1, 2])
def test_filters_of_a_transposed_convolution_are_its_output_channels(groups):
    """Output channels of other scales move by the same share: |d| = |w| for each, over all inputs of its group."""
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 6, 3, groups=groups)
    scales = torch.tensor([1.0, 10.0, 100.0, 2.0, 20.0, 200.0])

    def by_output(weight):
        """(6, in / groups * 9): what makes each output channel, group by group."""
        return torch.cat([part.transpose(0, 1).flatten(1) for part in weight.chunk(groups)])

    per_input = scales.view(groups, -1).repeat_interleave(4 // groups, 0)  # (in, out / groups), as the weight
    with torch.no_grad():
        layer.weight.mul_(per_input[..., None, None])
    found = random_direction(nn.Sequential(layer), 3)["0.weight"]
    torch.testing.assert_close(by_output(found).norm(dim=1), by_output(layer.weight.detach()).norm(dim=1))
    draw = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(3))
    ratio = by_output(found) / by_output(draw)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))


def test_moving_adds_and_puts_back_every_bit():
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    one, two = random_direction(model, 1), random_direction(model, 2)
    with moved(model, [one, two], [0.3, -2.0]):
        torch.testing.assert_close(model[0].weight, before["0.weight"] + 0.3 * one["0.weight"] - 2 * two["0.weight"])
        assert torch.equal(model[0].bias, before["0.bias"])
    with pytest.raises(KeyError), moved(model, [one], [0.1]):
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_quadratic_loss_by_hand():
    """L = |w|^2 for one filter w = (3, 4): L(w + s d) = 25 + 2 s w.d + 25 s^2, as |d| = |w|."""
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 4.0]]))
    direction = random_direction(model, 0)
    inner = float((direction["weight"] * model.weight).sum())
    steps = [-0.5, 0.0, 0.5]
    values = loss_along(model, lambda m: float(m.weight.square().sum()), direction, steps)
    assert values == pytest.approx([25 + 2 * s * inner + 25 * s * s for s in steps], rel=1e-5)
    assert sharpness([dict(zip(steps, values))]) == pytest.approx({0.5: 6.25}, rel=1e-4)


def test_sharpness_is_the_mean_over_signs_and_directions():
    lines = [{-0.1: 2.0, 0.0: 1.0, 0.1: 3.0, 0.5: 5.0}, {0.0: 2.0, -0.1: 2.0, 0.1: 6.0, 0.5: 4.0}]
    assert sharpness(lines) == pytest.approx({0.1: (1 + 2 + 0 + 4) / 4, 0.5: (4 + 2) / 2})


@pytest.mark.parametrize("arch", ["FCOS", "RetinaNet", "GFL", "FasterRCNN"])
def test_the_loss_is_repeatable_and_leaves_no_trace(tiny_model, make_batch, arch):
    model = tiny_model(arch).eval()
    if arch == "FasterRCNN":  # samples at random
        model.proposal_generator.batch_size_per_image = model.roi_heads.batch_size_per_image = 8
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kept = {module: dict(vars(module)) for module in model.modules()}
    batches = [make_batch([(64, 64)] * 2, seed=1), make_batch([(64, 96)] * 2, seed=2)]
    seen = []
    loss = DetectionLoss(batches, lambda: seen.append(1))
    random = torch.get_rng_state()
    first = loss(model)
    assert loss(model) == first and math.isfinite(first) and first > 0 and len(seen) == 4
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for module in model.modules():
        assert not module.training
        assert vars(module).keys() == kept[module].keys()
        assert vars(module).get("loss_normalizer") == kept[module].get("loss_normalizer")
    with moved(model, [random_direction(model, 0)], [0.5]):
        assert loss(model) != first
    if hasattr(model, "_ema_update"):  # of however many positives its training has seen
        for count in (5.0, 500.0):
            model.loss_normalizer = count
            assert loss(model) == first and model.loss_normalizer == count


@pytest.mark.parametrize("arch", ["FCOS", "RetinaNet"])
def test_losses_are_divided_by_the_positives_of_their_batch(tiny_model, make_batch, arch):
    model, batch = tiny_model(arch).train(), make_batch([(64, 64)] * 2)
    with EventStorage(), torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        for _ in range(200):  # until the running count is that of the batch
            total = float(sum(model(batch).values()))
    assert DetectionLoss([batch])(model) == pytest.approx(total, rel=1e-5)


def test_the_loss_is_the_models_own_with_fixed_norms(tiny_model, make_batch):
    model = tiny_model("GFL").train()  # divides by values of the batch alone
    batch = make_batch([(64, 64)] * 2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    with EventStorage(), torch.no_grad():
        expected = float(sum(model(batch).values()))
    assert DetectionLoss([batch])(model) == pytest.approx(expected, rel=1e-6)


def test_a_loss_that_diverges_is_infinite():
    class Diverging(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Linear(2, 2)

        def forward(self, batch):
            raise FloatingPointError("Predicted boxes or scores contain Inf/NaN")

    assert DetectionLoss([[{}]])(Diverging()) == math.inf
