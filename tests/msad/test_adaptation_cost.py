"""Adaptation costs: least squares against numpy, linear maps, resizing, and resuming."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.data import MetadataCatalog
from detectron2.layers import ShapeSpec

from msad import load_config
from msad.config import default_config
from msad.distill.progressive.cost import AdaptationCosts, common_levels, image_maps
from msad.distill.progressive.least_squares import FeatureSums, SGDFit, SGDOptions, with_ones
from msad.experiments import adaptation
from msad.modeling.features import tap_neck
from msad.resolution import downsample_batch, resample, shift_names


class Fixed:
    """A network of given levels: name -> (channels, stride in H pixels)."""

    def __init__(self, name, levels):
        self.name = name
        self._shapes = {level: ShapeSpec(channels=c, stride=s) for level, (c, s) in levels.items()}

    def shapes(self):
        return self._shapes

    def features(self, inputs, max_shift):
        h, w = (-(-side // 32) * 32 for side in inputs[0]["image"].shape[-2:])  # padded
        return {name: torch.ones(1, s.channels, h // s.stride, w // s.stride) for name, s in self._shapes.items()}


def images(seed, number=3, size=(12, 9), channels=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(channels, *size, generator=generator) for _ in range(number)]


def costs_between(maps_a, maps_b, val_a=None, val_b=None, **options):
    """C(A, B) and C(B, A) of single-level networks from their maps."""
    a = Fixed("a", {"p3": (maps_a[0].shape[0], 8)})
    b = Fixed("b", {"p3": (maps_b[0].shape[0], 8)})
    study = AdaptationCosts([a, b], options.pop("pairing", "by_stride"), sgd=options.pop("sgd", None))
    for x, y in zip(maps_a, maps_b):
        study.add("train", {"a": {"p3": x}, "b": {"p3": y}})
    for x, y in zip(val_a or maps_a, val_b or maps_b):
        study.add("val", {"a": {"p3": x}, "b": {"p3": y}})
    return study.result(**options)


def test_least_squares_is_numpys():
    a, b, val_a, val_b = images(0), images(1, channels=4), images(2), images(3, channels=4)
    found = costs_between(a, b, val_a, val_b, ridge=0.0)

    def rows(maps, ones):
        flat = np.concatenate([m.flatten(1).T.double().numpy() for m in maps])
        return np.column_stack([flat, np.ones(len(flat))]) if ones else flat

    weight = np.linalg.lstsq(rows(a, True), rows(b, False), rcond=None)[0]
    expected = np.mean((rows(val_b, False) - rows(val_a, True) @ weight) ** 2)
    assert found["costs"]["a"]["b"] == pytest.approx(expected, rel=1e-10)
    variance = rows(val_b, False).var(axis=0).mean()
    assert found["normalized_costs"]["a"]["b"] == pytest.approx(expected / variance, rel=1e-10)
    details = found["levels"]["a"]["b"]["p3>p3"]
    assert (details["locations"], details["unknowns"]) == (3 * 12 * 9, 6)
    assert details["train_cost"] == pytest.approx(np.mean((rows(b, False) - rows(a, True) @ weight) ** 2), rel=1e-10)


def test_the_cost_to_a_linear_map_is_zero_and_back_is_not():
    a, val_a = images(0, channels=6), images(5, channels=6)
    matrix, bias = torch.randn(3, 6), torch.tensor([5.0, -1.0, 2.0])[:, None, None]

    def to_b(maps):
        return [torch.einsum("dc,chw->dhw", matrix.double(), m.double()) + bias for m in maps]

    found = costs_between(a, to_b(a), val_a, to_b(val_a), ridge=1e-9)
    assert found["normalized_costs"]["a"]["b"] < 1e-9
    assert found["normalized_costs"]["b"]["a"] > 0.2  # three of six dimensions are lost
    assert found["costs"]["b"]["a"] > 0.2


def test_a_ridge_settles_dead_channels():
    a, b = images(0), images(1)
    for features in a:
        features[2] = 0.0
    with pytest.raises(ValueError, match="from a p3 to b p3: least squares has no finite solution"):
        costs_between(a, b, ridge=0.0)
    without = [features[[0, 1, 3, 4]] for features in a]
    dead, alive = costs_between(a, b, ridge=1e-9), costs_between(without, b, ridge=1e-9)
    assert dead["costs"]["a"]["b"] == pytest.approx(alive["costs"]["a"]["b"], rel=1e-6)


def test_the_ridge_is_numpys_and_leaves_the_bias_alone():
    """lstsq of rows to which a penalty row is added for each weight: sqrt(ridge * sum over channels / channels)."""
    maps, targets, ridge = images(0), [m + 50 for m in images(1, channels=2)], 0.3
    x, y = (np.concatenate([m.flatten(1).T.double().numpy() for m in found]) for found in (maps, targets))
    penalty = np.sqrt(ridge * (x**2).sum(axis=0).mean()) * np.eye(5, 6)
    design = np.vstack([np.column_stack([x, np.ones(len(x))]), penalty])
    weight = np.linalg.lstsq(design, np.vstack([y, np.zeros((5, 2))]), rcond=None)[0]
    sums = FeatureSums(5, 2)
    for features, target in zip(maps, targets):
        sums.add(with_ones(features), target.flatten(1).T)
    np.testing.assert_allclose(sums.solve(ridge).numpy(), weight, rtol=1e-9, atol=1e-12)
    # However large it is, the mean of the target is free: what is left is its variance.
    assert sums.error(sums.solve(1e12)) == pytest.approx(sums.variance(), rel=1e-6)


def test_a_constant_target_has_no_normalized_cost():
    found = costs_between(images(0), [torch.full((2, 12, 9), 3.0)] * 3)
    assert found["costs"]["a"]["b"] == pytest.approx(0, abs=1e-9)
    assert math.isnan(found["normalized_costs"]["a"]["b"]) and math.isfinite(found["normalized_costs"]["b"]["a"])


def test_sgd_approaches_least_squares():
    a = images(0, number=300, size=(6, 6))
    matrix = torch.randn(4, 5, generator=torch.Generator().manual_seed(3))
    noise = images(9, number=300, size=(6, 6), channels=4)
    b = [torch.einsum("dc,chw->dhw", matrix, m) + 0.3 * n for m, n in zip(a, noise)]
    exact = costs_between(a, b)["costs"]["a"]["b"]
    trained = costs_between(a, b, sgd=SGDOptions(lr=0.05))["costs"]["a"]["b"]
    assert exact < trained < 1.05 * exact
    assert costs_between(a[:5], b[:5], a, b, sgd=SGDOptions(lr=0.05))["costs"]["a"]["b"] > 2 * exact


def test_sgd_that_diverges_is_refused():
    """Features of a root mean square of 40 in 64 channels are too much for the learning rate, and can be learned."""
    a, b = [40 * m for m in images(0, number=40, channels=64)], images(9, number=40)
    with pytest.raises(ValueError, match=r"from a p3 to b p3: SGD has diverged.*\(--lr\)"):
        costs_between(a, b, sgd=SGDOptions(lr=0.1))
    (entry,) = costs_between(a, b, sgd=SGDOptions(lr=1e-5))["levels"]["a"]["b"].values()
    assert math.isfinite(entry["cost"]) and entry["train_variance"] == pytest.approx(1, abs=0.1)


def test_convolution_and_upsampling_change_places():
    x, weight, bias = torch.randn(5, 4, 6), torch.randn(3, 5), torch.randn(3)
    first = F.conv2d(resample(x[None], (8, 12), 0.5), weight[..., None, None], bias)
    last = F.interpolate(F.conv2d(x[None], weight[..., None, None], bias), size=(8, 12), mode="bilinear")
    torch.testing.assert_close(first, last)


def test_networks_of_other_scales_and_channels():
    """A at half the input: its maps are upsampled to B's; B is a linear map of them, so the cost is zero."""
    a = Fixed("a", {"p3": (4, 16), "p4": (4, 32)})
    b = Fixed("b", {"p3": (6, 8), "p4": (6, 16)})
    study = AdaptationCosts([a, b], "by_index")
    matrix = torch.randn(6, 4).double()
    for split in ("train", "val"):
        for _ in range(3):
            small = {"p3": torch.randn(4, 4, 5).double(), "p4": torch.randn(4, 2, 3).double()}
            sizes = {"p3": (8, 9), "p4": (4, 5)}
            finer = {level: resample(m[None], sizes[level], 0.5)[0] for level, m in small.items()}
            large = {level: torch.einsum("dc,chw->dhw", matrix, m) for level, m in finer.items()}
            study.add(split, {"a": small, "b": large})
    found = study.result(ridge=1e-10)
    assert set(found["levels"]["a"]["b"]) == {"p3>p3", "p4>p4"}
    assert found["normalized_costs"]["a"]["b"] < 1e-8 < 0.01 < found["normalized_costs"]["b"]["a"]


def test_maps_are_compared_where_they_are():
    """Both are the position that they show: of strides that do not divide the image, only the border costs.

    Maps that are resized to equal sizes cost 1.9."""
    a, b = Fixed("a", {"p3": (2, 8)}), Fixed("b", {"p3": (2, 32 / 3)})
    study = AdaptationCosts([a, b], "by_index")
    for split in ("train", "val"):
        maps = {
            source.name: {"p3": torch.stack(torch.meshgrid(
                *((torch.arange(-(-side // stride)) + 0.5) * stride for side in (600, 1000)), indexing="ij"))}
            for source in (a, b) for stride in [source.shapes()["p3"].stride]
        }  # fmt: skip
        study.add(split, maps)
    assert max(study.result()["costs"][x][y] for x, y in ("ab", "ba")) < 0.4


@pytest.mark.parametrize("mode", ["antialias", "nearest"])
def test_networks_see_the_images_that_they_are_made_for(tiny_model, make_batch, monkeypatch, mode):
    model = tiny_model(levels=range(2, 7)).eval()
    monkeypatch.setattr(adaptation, "load_model", lambda cfg, weights: model)
    (student,) = adaptation.networks_of(load_config("", ["MSAD.DOWNSAMPLE", mode]), "student.pth", [])
    batch = make_batch([(64, 96)])
    with torch.no_grad(), tap_neck(model) as expected:
        model(downsample_batch(batch, 1, "cpu", mode))
    found = student.features(batch, 1)
    assert list(found) == shift_names(list(expected), 1)
    for ours, theirs in zip(found.values(), expected.values()):
        torch.testing.assert_close(ours, theirs)


def test_images_of_another_sensor_are_refused(tmp_path):
    cfg = load_config("", ["DATASETS.TRAIN", ("two_sensors",), "DATASETS.TEST", ()])
    MetadataCatalog.get("two_sensors").definition = {"LOW_RES_IMAGES": "small"}
    try:
        with pytest.raises(ValueError, match="two_sensors has LOW_RES_IMAGES"):
            adaptation.measure_adaptation(cfg, "student.pth", [], tmp_path)
    finally:
        MetadataCatalog.remove("two_sensors")


def test_levels_pair_by_stride_or_index():
    retina = Fixed("retina", {"p3": (8, 8), "p4": (8, 16), "p5": (8, 32)})
    rcnn = Fixed("rcnn", {"p2": (8, 4), "p3": (8, 8), "p4": (8, 16)})
    assert common_levels(retina, rcnn, "by_stride") == [("p3", "p3"), ("p4", "p4")]
    assert common_levels(retina, rcnn, "by_index") == [("p3", "p2"), ("p4", "p3"), ("p5", "p4")]
    with pytest.raises(ValueError, match=r"retina and odd have no level of equal stride .* pair them by_index"):
        common_levels(retina, Fixed("odd", {"p3": (8, 10.5)}), "by_stride")
    with pytest.raises(ValueError, match="unknown pairing"):
        common_levels(retina, rcnn, "by_name")
    for pair in ((retina, Fixed("psp", {})), (Fixed("psp", {}), retina)):
        for pairing in ("by_stride", "by_index"):
            with pytest.raises(ValueError, match="psp has no pyramid"):
                common_levels(*pair, pairing)


@pytest.mark.parametrize("losses, expected", [
    ([], "by_stride"),
    ([{"NAME": "PKD"}], "by_stride"),
    ([{"NAME": "PKD", "MATCH": "by_index"}], "by_index"),
    ([{"NAME": "PKD", "MATCH": "by_index"}, {"NAME": "CWD"}], "by_stride"),
    ([{"NAME": "PKD", "MATCH": "by_index"}, {"NAME": "Chen"}], "by_index"),
    ([{"NAME": "SDF", "MATCH": "by_index", "TAP": "bottom_up"}, {"NAME": "CWD"}], "by_stride"),
    ([{"NAME": "SDF", "TAP": "bottom_up"}, {"NAME": "CWD", "MATCH": "by_index"}], "by_index"),
])  # fmt: skip
def test_levels_pair_as_the_losses_pair_them(losses, expected):
    cfg = default_config()
    cfg.DISTILL.LOSSES = losses
    assert adaptation.pairing_of(cfg) == expected


def test_padding_does_not_count():
    source = Fixed("a", {"p3": (2, 8), "p5": (2, 32)})
    maps = image_maps(source, {"image": torch.zeros(3, 40, 70)})
    assert maps["p3"].shape == (2, 5, 9) and maps["p5"].shape == (2, 2, 3)


def test_sums_do_not_depend_on_the_order_and_resume():
    a, b = images(0, number=4), images(1, number=4)
    networks = [Fixed(name, {"p3": (5, 8)}) for name in "ab"]

    def study_of(parts, resumed=None):
        study = AdaptationCosts(networks, sgd=SGDOptions())
        if resumed is not None:
            study.load_state_dict(resumed)
        for i in parts:
            for split in ("train", "val"):
                study.add(split, {"a": {"p3": a[i]}, "b": {"p3": b[i]}})
        return study

    half = copy.deepcopy(study_of([0, 1]).state_dict())
    resumed, whole = study_of([2, 3], half), study_of([0, 1, 2, 3])
    assert resumed.result() == whole.result()


def test_an_image_that_was_interrupted_half_way_counts_once(tmp_path, monkeypatch):
    maps = {name: images(i) for i, name in enumerate("ab")}
    networks = [Fixed(name, {"p3": (5, 8)}) for name in "ab"]
    monkeypatch.setattr(adaptation, "networks_of", lambda *args: networks)
    monkeypatch.setattr(adaptation, "fingerprint", lambda *args: "x")
    monkeypatch.setattr(adaptation, "FixedInputs", lambda *args, **kwargs: [0, 1, 2])
    monkeypatch.setattr(adaptation, "image_maps", lambda network, item: {"p3": maps[network.name][item]})
    cfg = load_config("", ["DATASETS.TRAIN", ("t",), "DATASETS.TEST", ("v",)])
    whole = adaptation.measure_adaptation(cfg, "", [], tmp_path / "whole")
    add, calls = FeatureSums.add, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 4:  # the first image is in both sums, the second in one of them
            raise KeyboardInterrupt
        add(*args)

    monkeypatch.setattr(FeatureSums, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adaptation.measure_adaptation(cfg, "", [], tmp_path / "resumed")
    assert adaptation.measure_adaptation(cfg, "", [], tmp_path / "resumed") == whole


def test_sgd_goes_on_where_the_features_are():
    """What was saved lies in the CPU's memory; "meta" stands for a GPU."""
    before, resumed = (SGDFit(5, 4, SGDOptions()) for _ in range(2))
    before.step(torch.randn(9, 5), torch.randn(9, 4))
    resumed.load_state_dict(before.state_dict())
    resumed.step(torch.empty(9, 5, device="meta"), torch.empty(9, 4, device="meta"))
    assert {s["momentum_buffer"].device.type for s in resumed.optimizer.state.values()} == {"meta"}


def test_sums_of_an_image_are_those_of_its_rows():
    sums = FeatureSums(5, 5)
    (x,) = images(4, number=1)
    sums.add(with_ones(x), x.flatten(1).T)
    assert sums.count == 108 and sums.xx[-1, -1] == 108
    assert sums.variance() == pytest.approx(float(x.flatten(1).var(dim=1, unbiased=False).mean()), rel=1e-5)
    assert sums.error(torch.cat([torch.eye(5), torch.zeros(1, 5)])) == pytest.approx(0, abs=1e-12)


def test_bad_features_and_names():
    networks = [Fixed(name, {"p3": (5, 8)}) for name in "ab"]
    study = AdaptationCosts(networks)
    x = images(0, number=1)[0]
    bad = x.clone()
    bad[0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="the features of b at p3 are not finite"):
        study.add("train", {"a": {"p3": x}, "b": {"p3": bad}})
    with pytest.raises(ValueError, match="no features to fit"):
        study.result()
    with pytest.raises(ValueError, match="different names, got a, a"):
        AdaptationCosts([networks[0], networks[0]])
