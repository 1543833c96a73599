"""What a run says about pretrained weights that fit only in part."""

from __future__ import annotations

import logging
import pickle

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from msad.engine.checkpoint import CheckedCheckpointer, part_of

LOUD = "PRETRAINED WEIGHTS DO NOT FIT: "


@pytest.fixture
def warnings_of(tmp_path, caplog):
    """``warnings_of(model, tensors, backbone_file=False)``: our warnings when a file of these tensors is loaded.

    A backbone file has the names of the bottom-up network alone, which are matched by their ends.
    """

    def load(model, tensors, backbone_file=False):
        path = tmp_path / ("weights.pkl" if backbone_file else "weights.pth")
        if backbone_file:
            content = {name.rpartition("bottom_up.")[2]: value.numpy() for name, value in tensors.items()}
            path.write_bytes(pickle.dumps({"model": content, "__author__": "test", "matching_heuristics": True}))
        else:
            torch.save({"model": tensors}, path)
        caplog.clear()
        checkpointer = CheckedCheckpointer(model)
        checkpointer.logger.propagate = True
        with caplog.at_level(logging.INFO, checkpointer.logger.name):
            checkpointer.load(str(path))
        assert any("tensors of" in r.message and r.message.endswith("loaded") for r in caplog.records)
        warned = [r.message for r in caplog.records if r.levelname == "WARNING"]
        return [message[len(LOUD) :] for message in warned if message.startswith(LOUD)]

    return load


def bottom_up(state):
    return {name: value for name, value in state.items() if "bottom_up" in name}


@pytest.mark.parametrize("resolutions", [None, ["H", "L"]])
def test_weights_of_a_whole_backbone_are_no_reason_to_warn(tiny_model, warnings_of, resolutions):
    model, source = tiny_model(resolutions=resolutions), tiny_model(resolutions=resolutions, seed=1)
    assert warnings_of(model, bottom_up(source.state_dict()), backbone_file=True) == []
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in bottom_up(model.state_dict()).items())
    assert warnings_of(model, source.state_dict()) == []


def test_statistics_of_frozen_norms_may_be_absent(tiny_model, warnings_of):
    state = {name: v for name, v in bottom_up(tiny_model().state_dict()).items() if "running" not in name}
    assert warnings_of(tiny_model(), state, backbone_file=True) == []


def test_gaps_in_the_backbone_are_counted_and_named(tiny_model, warnings_of):
    state = bottom_up(tiny_model().state_dict())
    counted = [name for name in state if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    gone = [name for name in counted if "res4" in name]
    (line,) = warnings_of(tiny_model(), {n: v for n, v in state.items() if "res4" not in n}, backbone_file=True)
    assert line.startswith(f"{len(gone)} of the {len(counted)} tensors of backbone.bottom_up are not in the file")
    assert f"random values: {', '.join(gone[:5])}, ..." in line


def test_a_backbone_that_is_absent(tiny_model, warnings_of):
    model = tiny_model()
    state = {name: value for name, value in model.state_dict().items() if "bottom_up" not in name}
    (line,) = warnings_of(model, state)
    assert "tensors of backbone.bottom_up are not in the file" in line
    total, all_of_them = (int(word) for word in line.split() if word.isdigit())
    assert total == all_of_them > 20


def test_a_backbone_without_pyramid_counts_as_one(warnings_of):
    cfg = get_cfg()
    cfg.MODEL.DEVICE, cfg.MODEL.META_ARCHITECTURE = "cpu", "RetinaNet"
    cfg.MODEL.RESNETS.merge_from_list(["DEPTH", 18, "RES2_OUT_CHANNELS", 64, "OUT_FEATURES", ["res4"]])
    cfg.MODEL.RETINANET.merge_from_list(["IN_FEATURES", ["res4"], "NUM_CONVS", 1, "NUM_CLASSES", 2])
    model = build_model(cfg)
    head = {name: value for name, value in model.state_dict().items() if name.startswith("head.")}
    (line,) = warnings_of(model, head)
    assert "tensors of backbone are not in the file" in line


def test_another_number_of_classes(tiny_model, warnings_of):
    (line,) = warnings_of(tiny_model(MODEL__FCOS__NUM_CLASSES=9), tiny_model().state_dict())
    assert "tensors of head are not in the file or of another shape" in line
    assert line.startswith("2 of the ") and line.endswith(": head.cls_score.weight, head.cls_score.bias")


def test_parts():
    names = ["detector.backbone.bottom_up.stem.conv1.weight", "backbone.bottom_up.res2.0.conv1.weight",
             "backbone.fpn_lateral3.bias", "detector.head.cls_score.bias", "fusion.squeeze.weight"]  # fmt: skip
    assert list(map(part_of, names)) == ["backbone.bottom_up", "backbone.bottom_up", "backbone", "head", "fusion"]
