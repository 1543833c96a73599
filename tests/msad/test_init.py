"""A student that starts from its teacher."""

from __future__ import annotations

import logging

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from msad.distill.init import init_student
from msad.modeling.backbones.switchable import ConvAWS, SwitchableAtrousConv
from msad.resolution import downsample_batch


@pytest.fixture
def teacher(tiny_model):
    return tiny_model(resolutions=["H", "L"])


def values(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("levels", "branch", "shift"), [(range(2, 7), "L", 1), (range(3, 8), "H", 0)])
def test_full_copy_is_the_teachers_branch(tiny_model, teacher, make_batch, same_detections, levels, branch, shift):
    """A student made from the whole teacher detects what the teacher detects on that resolution, untrained."""
    student = tiny_model(levels=levels, seed=1)
    counts = init_student(student, teacher.detector, "full")
    assert counts == {"copied": len(student.state_dict()), "kept": 0}
    source = teacher.detector.state_dict()
    assert all(torch.equal(value, source[name]) for name, value in student.state_dict().items())
    batch = make_batch([(64, 128), (125, 60)])
    batch = [dict(item, height=200, width=300) for item in batch]
    teacher.set_eval_branch(branch)
    with torch.no_grad():
        found, expected = student.eval()(downsample_batch(batch, shift, "cpu")), teacher.eval()(batch)
    # Both are clipped to their input, which for an odd side ends half an H pixel apart.
    same_detections(found[:1], expected[:1], tolerance=1e-3)
    assert len(found[1]["instances"]) == len(expected[1]["instances"])


def test_student_becomes_no_alias_of_the_teacher(tiny_model, teacher):
    student = tiny_model(levels=range(2, 7), seed=1)
    init_student(student, teacher.detector, "full")
    before = values(teacher)
    with torch.no_grad():
        for tensor in (*student.parameters(), *student.buffers()):
            tensor.zero_()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_neck_and_head_leaves_the_bottom_up_alone(tiny_model, teacher):
    student = tiny_model(levels=range(2, 7), seed=1, MODEL__RESNETS__BLOCKS=[2, 1, 1, 1])
    before, source = values(student), teacher.detector.state_dict()
    counts = init_student(student, teacher.detector, "neck_and_head")
    copied = 0
    for name, value in student.state_dict().items():
        if "bottom_up" in name:
            assert torch.equal(value, before[name]), name
        else:
            assert torch.equal(value, source[name]), name
            copied += 1
    assert any(name.startswith("backbone.top_block.p6") for name in before)
    assert counts == {"copied": copied, "kept": 0}
    student = tiny_model(levels=range(2, 7), seed=1)
    init_student(student, teacher.detector, "full")
    name = "backbone.bottom_up.res3.0.conv1.weight"
    assert torch.equal(student.state_dict()[name], source[name])


def test_none_leaves_everything(tiny_model, teacher):
    student = tiny_model(levels=range(2, 7), seed=1)
    before = values(student)
    assert init_student(student, teacher.detector, "none") == {"copied": 0, "kept": 0}
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_what_does_not_fit_is_counted_and_named(tiny_model, teacher, caplog):
    """A light head keeps its own initialisation in every part that differs, and a deeper network in its own blocks."""
    student = tiny_model(levels=range(2, 7), seed=1, MODEL__FCOS__CONV_DIMS=[4], MODEL__RESNETS__BLOCKS=[1, 2, 1, 1])
    before, source = values(student), teacher.detector.state_dict()
    with caplog.at_level(logging.INFO, logger="msad.distill.init"):
        counts = init_student(student, teacher.detector, "full")
    kept = {name for name in before if name not in source or source[name].shape != before[name].shape}
    # The outputs' biases would fit, but not their weights.
    kept |= {name for name in before if name.startswith(("head.cls_score.", "head.bbox_pred.", "head.ctrness."))}
    assert any("res3.1" in name for name in kept) and not any("backbone" in n and "res3.1" not in n for n in kept)
    assert counts == {"copied": len(before) - len(kept), "kept": len(kept)}
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name] if name in kept else source[name]), name
    assert f"{counts['copied']} tensors copied" in caplog.text and "(teacher (8, " in caplog.text


def test_heads_of_other_classes_share_nothing(tiny_model, caplog):
    """FCOS's tower has normalisation layers between its convolutions, so that equal names mean other layers."""
    teacher = tiny_model(MODEL__FCOS__NORM="GN", MODEL__FCOS__CONV_DIMS=[32, 32], MODEL__FPN__OUT_CHANNELS=32)
    student = tiny_model("RetinaNet", seed=1, MODEL__RETINANET__NUM_CONVS=2, MODEL__FPN__OUT_CHANNELS=32)
    before = values(student)
    assert before["head.cls_subnet.2.bias"].shape != () and "head.cls_subnet.0.weight" in teacher.state_dict()
    init_student(student, teacher, "full")
    after = student.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("head."))
    assert all(torch.equal(after[n], v) for n, v in teacher.state_dict().items() if n.startswith("backbone."))
    assert "RetinaNetHead (teacher FCOSHead)" in caplog.text


def test_parts_of_a_head_are_copied_whole(tiny_model):
    """Same class, towers with and without normalisation: their numbering differs."""
    teacher = tiny_model(MODEL__FCOS__NORM="GN", MODEL__FCOS__CONV_DIMS=[32, 32], MODEL__FPN__OUT_CHANNELS=32)
    student = tiny_model(seed=1, MODEL__FCOS__CONV_DIMS=[32, 32], MODEL__FPN__OUT_CHANNELS=32)
    before, source = values(student), teacher.state_dict()
    init_student(student, teacher, "full")
    for name, value in student.state_dict().items():
        expected = before[name] if "_subnet" in name else source[name]
        assert torch.equal(value, expected), name
    assert not torch.equal(before["head.cls_score.weight"], source["head.cls_score.weight"])


def test_cascade_gives_its_proposals_and_not_its_boxes(tiny_model):
    teacher, student = tiny_model("CascadeRCNN"), tiny_model("FasterRCNN", seed=1)
    before, source = values(student), teacher.state_dict()
    init_student(student, teacher, "full")
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name] if name.startswith("roi_heads.") else source[name]), name


@pytest.fixture
def resnets(tiny_cfg):
    """``resnets(name, seed, sac)``: a detector on a plain ResNet or one whose weights are standardised."""

    def make(name, seed, sac=(False, True, True, True)):
        cfg = tiny_cfg(MODEL__FPN__BOTTOM_UP=name, MODEL__RESNETS__DEPTH=50, MODEL__RESNETS__STEM_OUT_CHANNELS=8)
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 16, 8
        cfg.MODEL.RESNETS.NORM, cfg.MODEL.BACKBONE.FREEZE_AT = "FrozenBN", 0
        cfg.MODEL.RESNETS.SAC_ON_PER_STAGE = list(sac)
        torch.manual_seed(seed)
        return build_model(cfg).eval()

    return make


def same_maps(one, other):
    x = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        maps = [model.backbone.bottom_up(x) for model in (one, other)]
    for name, value in maps[0].items():
        torch.testing.assert_close(maps[1][name], value, rtol=1e-3, atol=1e-3 * value.abs().max().item())


def test_standardised_weights_compute_what_the_teachers_do(resnets):
    """Also when they have moved away from the moments that they keep."""
    plain = resnets("build_resnet_backbone", 0)
    student = resnets("build_sac_resnet_backbone", 1)
    init_student(student, plain, "full")
    same_maps(plain, student)
    teacher = resnets("build_sac_resnet_backbone", 2, [False] * 4)
    with torch.no_grad():
        for module in teacher.modules():
            if isinstance(module, ConvAWS):
                module.weight.mul_(1.3).add_(0.1 * module.weight.std())
    for student in (resnets("build_resnet_backbone", 3), resnets("build_sac_resnet_backbone", 4)):
        init_student(student, teacher, "full")
        same_maps(teacher, student)


def test_switchable_convolutions_give_plain_ones_nothing(resnets):
    teacher, student = resnets("build_sac_resnet_backbone", 0), resnets("build_resnet_backbone", 1)
    switchable = [name for name, module in teacher.named_modules() if isinstance(module, SwitchableAtrousConv)]
    before = values(student)
    counts = init_student(student, teacher, "full")
    after = values(student)
    assert counts["kept"] == len(switchable) > 0
    assert all(torch.equal(after[f"{name}.weight"], before[f"{name}.weight"]) for name in switchable)


def test_nothing_fits_is_an_error(teacher):
    with pytest.raises(ValueError, match=r"'full': no tensor of the teacher fits.*2 differ: weight absent"):
        init_student(nn.Linear(2, 2), teacher.detector, "full")


def test_unknown_mode_names_the_key(tiny_model, teacher):
    with pytest.raises(ValueError, match=r"DISTILL\.INIT_STUDENT.*'head'"):
        init_student(tiny_model(), teacher.detector, "head")
