"""Detectors run in two halves against their own forward."""

from __future__ import annotations

import copy

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.backbone.fpn import FPN, LastLevelP6P7
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from msad.modeling.adapters import adapt
from msad.modeling.features import freeze_unused_levels, run_neck, tap_neck

ARCHITECTURES = ["FCOS", "RetinaNet"]


@pytest.fixture
def stock_student(tiny_cfg):
    """A detector on P2-P6 of detectron2's own FPN, which makes P7 as well."""
    cfg = tiny_cfg(levels=range(2, 7))
    detector = build_model(cfg)
    bottom_up = detector.backbone.bottom_up
    detector.backbone = FPN(bottom_up, cfg.MODEL.FPN.IN_FEATURES, 8, top_block=LastLevelP6P7(32, 8))
    return detector


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_losses_equal_the_detectors_forward(tiny_model, make_batch, arch):
    whole, halves = tiny_model(arch), tiny_model(arch)
    batch = make_batch([(64, 96), (96, 50)])
    with EventStorage(0):
        expected = whole(batch)
        images = halves.preprocess_image(batch)
        maps = run_neck(halves.backbone, images.tensor, adapt(halves).levels)
        found = adapt(halves).losses(images, maps, [item["instances"] for item in batch])
    assert found.keys() == expected.keys() and all(value > 0 for value in expected.values())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_predictions_equal_the_detectors_forward(tiny_model, make_batch, same_detections, arch):
    detector = tiny_model(arch).eval()
    batch = make_batch([(64, 96), (96, 50)])
    batch[0].update(height=128, width=192)
    images = detector.preprocess_image(batch)
    maps = run_neck(detector.backbone, images.tensor, adapt(detector).levels)
    found = adapt(detector).postprocess(adapt(detector).predict(images, maps), batch, images)
    same_detections(found, detector(batch), tolerance=0)


def test_postprocess_goes_to_original_pixels(tiny_model):
    def result():
        boxes = Boxes(torch.tensor([[10.0, 5.0, 90.0, 45.0]]))
        return Instances((50, 100), pred_boxes=boxes, scores=torch.ones(1))

    adapter, images = adapt(tiny_model()), ImageList(torch.zeros(1, 3, 64, 128), [(50, 100)])
    (scaled,) = adapter.postprocess([result()], [{"height": 200, "width": 300}], images)
    assert scaled["instances"].image_size == (200, 300)
    assert scaled["instances"].pred_boxes.tensor.tolist() == [[30.0, 20.0, 270.0, 180.0]]
    (kept,) = adapter.postprocess([result()], [{}], images)
    assert kept["instances"].image_size == (50, 100)
    assert kept["instances"].pred_boxes.tensor.tolist() == [[10.0, 5.0, 90.0, 45.0]]


def test_levels_are_those_of_the_head(tiny_model):
    assert adapt(tiny_model(levels=range(2, 7))).levels == ["p2", "p3", "p4", "p5", "p6"]


def test_other_architectures_are_refused_by_name():
    class Rcnn(nn.Module):
        pass

    with pytest.raises(TypeError, match="Rcnn cannot be run from features"):
        adapt(Rcnn())


# --- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_targets_are_assigned_once(tiny_model, make_batch, monkeypatch, arch):
    detector, fresh = tiny_model(arch), tiny_model(arch)
    calls = []
    original = type(detector).label_anchors
    monkeypatch.setattr(type(detector), "label_anchors", lambda self, *a: calls.append(1) or original(self, *a))
    images = ImageList(torch.zeros(2, 3, 64, 64), [(64, 64)] * 2)
    gt = [item["instances"] for item in make_batch([(64, 64)] * 2)]
    sides = {"p3": 8, "p4": 4, "p5": 2, "p6": 1, "p7": 1}
    first, second = ({name: torch.randn(2, 8, n, n) for name, n in sides.items()} for _ in range(2))
    with EventStorage(0):
        with adapt(detector).assign_once():
            found = [adapt(detector).losses(images, maps, gt) for maps in (first, second)]
        assert len(calls) == 1
        expected = [adapt(copy.deepcopy(fresh)).losses(images, maps, gt) for maps in (first, second)]
        assert len(calls) == 3
        adapt(fresh).losses(images, first, gt)
    for a, b in zip(found, expected):
        assert all(torch.equal(a[name], b[name]) for name in b)
    assert detector.loss_normalizer == fresh.loss_normalizer  # one update of the running mean for both
    with EventStorage(0):  # other ground truth after the block: assigned anew
        adapt(detector).losses(images, first, gt)
    assert len(calls) == 5 and "label_anchors" not in vars(detector)


def test_targets_are_forgotten_after_an_error(tiny_model):
    detector = tiny_model()
    with pytest.raises(RuntimeError, match="boom"), adapt(detector).assign_once():
        assert "label_anchors" in vars(detector)
        raise RuntimeError("boom")
    assert "label_anchors" not in vars(detector)


# --- the neck ---------------------------------------------------------------------------------------------------------


def test_neck_that_cannot_select_is_filtered(stock_student, tiny_model):
    x = torch.randn(1, 3, 64, 64)
    stock = stock_student.backbone.eval()
    assert list(run_neck(stock, x, ["p6", "p3"])) == ["p6", "p3"]
    assert torch.equal(run_neck(stock, x, ["p3"])["p3"], stock(x)["p3"])
    ours = tiny_model().backbone.eval()
    ours.fpn_output3.forward = None  # calling it would fail
    assert list(run_neck(ours, x, ["p4", "p7"])) == ["p4", "p7"]


def test_tap_yields_what_the_head_reads(tiny_model, make_batch):
    detector = tiny_model()
    read = []
    detector.head.register_forward_pre_hook(lambda _module, args: read.extend(args[0]))
    with EventStorage(0), tap_neck(detector) as taken:
        assert taken == {}
        detector(make_batch([(64, 64)]))
    assert list(taken) == adapt(detector).levels
    assert all(a is b for a, b in zip(taken.values(), read)) and taken["p3"].requires_grad


def test_tap_leaves_no_hook(tiny_model, make_batch):
    detector = tiny_model()
    with tap_neck(detector):
        assert len(detector.backbone._forward_hooks) == 1
    assert len(detector.backbone._forward_hooks) == 0
    with pytest.raises(RuntimeError, match="boom"), tap_neck(detector):
        raise RuntimeError("boom")
    assert len(detector.backbone._forward_hooks) == 0


# --- levels that nobody reads -----------------------------------------------------------------------------------------


def test_unread_levels_of_a_stock_fpn_are_not_trained(stock_student, make_batch):
    assert freeze_unused_levels(stock_student) == [
        "backbone.top_block.p7.weight",
        "backbone.top_block.p7.bias",
    ]
    with EventStorage(0):
        sum(stock_student(make_batch([(64, 64)])).values()).backward()
    # DistributedDataParallel stops if a trained parameter gets no gradient.
    assert [n for n, p in stock_student.named_parameters() if p.requires_grad and p.grad is None] == []


def test_nothing_is_frozen_where_all_levels_are_read(tiny_model):
    for levels in (range(3, 8), range(2, 7)):
        detector = tiny_model(levels=levels)
        assert freeze_unused_levels(detector) == []
        assert all(p.requires_grad for p in detector.parameters())


def test_a_model_of_another_kind_is_left_alone():
    """A baseline may be any detectron2 model."""
    assert freeze_unused_levels(nn.Sequential(nn.Linear(2, 2))) == []
