"""Costs against sums over convolutions that are written out here, independently of any model code."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from helpers import between
from torch import nn

from msad import load_config
from msad.distill.distiller import Distiller, student_shapes
from msad.distill.teachers import FrozenTeacher
from msad.evaluation import cost
from msad.evaluation.memory import TensorMemory, peak_memory, resident_bytes
from msad.resolution import RESOLUTIONS

CONFIGS = Path(__file__).parents[2] / "configs"

C = 16  # channels of the pyramid
WIDTHS = {2: 8, 3: 16, 4: 32, 5: 64}  # of the tiny bottom-up's stages, by level
CONV_DIMS = [16, 24]
CLASSES = 3
SIZE = (128, 192)  # needs no padding at H, nor at L after halving
HALF = (64, 96)
H_LEVELS = (3, 4, 5, 6, 7)
L_LEVELS = (2, 3, 4, 5, 6)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def names(levels):
    return [f"p{level}" for level in levels]


def tiny_cfg(levels=H_LEVELS, arch="FCOS"):
    cfg = load_config("")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = arch
    cfg.MODEL.BACKBONE.NAME = "build_level_fpn_backbone"
    cfg.MODEL.FPN.BOTTOM_UP = "build_tiny_resnet_backbone"
    cfg.MODEL.FPN.OUT_CHANNELS = C
    cfg.MODEL.FPN.IN_FEATURES = cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.LEVELS = cfg.MODEL.FCOS.IN_FEATURES = names(levels)
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = WIDTHS[2]
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.FCOS.NORM = ""
    cfg.MODEL.FCOS.CONV_DIMS = CONV_DIMS
    cfg.MODEL.FCOS.NUM_CLASSES = CLASSES
    return cfg


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return build_model(tiny_cfg(arch="MultiScaleTeacher"))


@pytest.fixture(scope="module")
def fcos():
    torch.manual_seed(0)
    return build_model(tiny_cfg())


def cells(size, level):
    k = 2**level
    return -(-size[0] // k) * -(-size[1] // k)


def bottom_up_macs(size):
    macs = 3 * WIDTHS[2] * 49 * cells(size, 1) + 2 * WIDTHS[2] ** 2 * 9 * cells(size, 2)
    for level in (3, 4, 5):
        narrow, wide = WIDTHS[level - 1], WIDTHS[level]
        macs += (narrow * wide + narrow * wide * 9 + wide * wide * 9) * cells(size, level)  # shortcut, conv1, conv2
    return macs


def neck_macs(size, levels, channels=C, widths=WIDTHS):
    macs = sum(widths[level] * channels * cells(size, level) for level in range(min(levels), 6))
    macs += sum(channels * channels * 9 * cells(size, level) for level in levels if level <= 5)
    macs += widths[5] * channels * 9 * cells(size, 6)
    if 7 in levels:
        macs += channels * channels * 9 * cells(size, 7)
    return macs


def fcos_head_macs(size, levels):
    tower = C * CONV_DIMS[0] + CONV_DIMS[0] * CONV_DIMS[1]
    per_cell = 9 * (2 * tower + CONV_DIMS[1] * (CLASSES + 4 + 1))
    return per_cell * sum(cells(size, level) for level in levels)


def fusion_macs(size, branches=2, reduction=16):
    hidden = branches * C // reduction
    macs = 0
    for level in H_LEVELS:
        rows = -(-size[0] // 2**level)
        macs += branches * C * (cells(size, level) + rows)  # mean over columns, then over rows
        macs += branches * C * hidden + hidden * branches
    return macs


def macs(model, size):
    return {part: round(value * 1e9) for part, value in cost.count_macs(model, cost.random_inputs(*size)).items()}


def expected(bottom_up, neck, head, fusion=0):
    return {
        "preprocessing": 0,
        "bottom_up": bottom_up,
        "neck": neck,
        "fusion": fusion,
        "head": head,
        "postprocessing": 0,
        "total": bottom_up + neck + fusion + head,
    }


@pytest.mark.parametrize("size, levels", [(SIZE, H_LEVELS), (HALF, L_LEVELS)])
def test_fcos_macs_equal_the_sum_over_its_convolutions(size, levels):
    model = build_model(tiny_cfg(levels))
    assert macs(model, size) == expected(bottom_up_macs(size), neck_macs(size, levels), fcos_head_macs(size, levels))


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_counted(fcos, monkeypatch, masked):
    """torch's counter knows that of GPUs alone."""
    q, k, v = torch.zeros(2, 3, 40, 8), torch.zeros(2, 3, 50, 8), torch.zeros(2, 3, 50, 8)
    mask, forward, before = torch.zeros(40, 50) if masked else None, fcos.forward, macs(fcos, SIZE)["total"]

    def attending(inputs):
        torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
        return forward(inputs)

    monkeypatch.setattr(fcos, "forward", attending)
    assert macs(fcos, SIZE)["preprocessing"] == macs(fcos, SIZE)["total"] - before == 2 * 3 * 40 * 50 * (8 + 8)


def test_macs_are_those_of_the_padded_image(fcos):
    assert macs(fcos, (SIZE[0] - 20, SIZE[1] - 31)) == macs(fcos, SIZE)


def test_unread_p2_has_neither_macs_nor_parameters(fcos):
    # Lateral and output convolution of P2 are most of a full pyramid; nothing of them may be left.
    p2 = (WIDTHS[2] * C + C * C * 9) * cells(SIZE, 2)
    everything = neck_macs(SIZE, (2, *H_LEVELS))
    assert p2 > everything / 2
    assert macs(fcos, SIZE)["neck"] == everything - p2
    lateral = sum(WIDTHS[level] * C + C for level in (3, 4, 5))
    output = 3 * (C * C * 9 + C)
    top = WIDTHS[5] * C * 9 + C + C * C * 9 + C
    assert cost.count_parameters(fcos)["neck"] == lateral + output + top


@pytest.mark.parametrize("branch, size, levels", [("H", SIZE, H_LEVELS), ("L", HALF, L_LEVELS)])
def test_teacher_branch_costs_what_a_detector_at_its_resolution_does(teacher, branch, size, levels):
    seen = []
    handle = teacher.detector.backbone.bottom_up.register_forward_pre_hook(
        lambda _, args: seen.append(tuple(args[0].shape))
    )
    teacher.set_eval_branch(branch)
    try:
        result = macs(teacher, SIZE)
    finally:
        handle.remove()
        teacher.set_eval_branch("fused")
    assert result == expected(bottom_up_macs(size), neck_macs(size, levels), fcos_head_macs(size, levels))
    assert seen == [(1, 3, *size)]


def test_fused_teacher_costs_both_branches_and_the_gate(teacher):
    assert macs(teacher, SIZE) == expected(
        bottom_up_macs(SIZE) + bottom_up_macs(HALF),
        neck_macs(SIZE, H_LEVELS) + neck_macs(HALF, L_LEVELS),
        fcos_head_macs(SIZE, H_LEVELS),
        fusion_macs(SIZE),
    )


@pytest.mark.parametrize(
    ("folder", "high", "light"),
    [
        ("MSAD", "fcos_R_50_H_1x", "fcos_R_50_S_L_light_1x"),
        ("quickstart", "baseline_H", "student_L_light"),
        ("nuclei", "baseline_H", "student_L_light"),
    ],
)
def test_light_student_costs_less_than_a_third_of_h(folder, high, light):
    total = {}
    for name, size in ((high, (256, 448)), (light, (128, 224))):
        cfg = load_config(CONFIGS / folder / f"{name}.yaml")
        cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", "cpu"
        total[name] = cost.count_macs(build_model(cfg), cost.random_inputs(*size))["total"]
    assert 0.2 < total[light] / total[high] <= 0.30


def test_stock_retinanet_student_wastes_less_than_a_thousandth_on_its_unread_p7():
    cfg = load_config("")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.RETINANET.IN_FEATURES = names(L_LEVELS)
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64], [128], [256]]
    result = macs(build_model(cfg), SIZE)
    widths = {2: 64, 3: 128, 4: 256, 5: 512}
    assert result["neck"] == neck_macs(SIZE, (*L_LEVELS, 7), channels=256, widths=widths)
    anchors = 3
    per_cell = 9 * (2 * 4 * 256 * 256 + 256 * anchors * (80 + 4))
    assert result["head"] == per_cell * sum(cells(SIZE, level) for level in L_LEVELS)
    unread = 256 * 256 * 9 * cells(SIZE, 7)
    assert 0 < unread < 1e-3 * result["total"]


def test_backbone_without_bottom_up_counts_as_one():
    cfg = tiny_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_tiny_resnet_backbone"
    cfg.MODEL.FCOS.IN_FEATURES = ["res4"]
    model = build_model(cfg)
    result = macs(model, SIZE)
    # What the single level does not need is still computed, except stages after the last output.
    assert result["neck"] == 0
    assert result["bottom_up"] == bottom_up_macs(SIZE)
    parameters = cost.count_parameters(model)
    assert parameters["neck"] == 0
    assert parameters["bottom_up"] == sum(p.numel() for p in model.backbone.parameters())


def test_parameters_of_the_parts_add_up(teacher):
    counts = cost.count_parameters(teacher)
    total = counts.pop("total")
    assert total == sum(p.numel() for p in teacher.parameters()) == sum(counts.values())
    assert counts["fusion"] == sum(p.numel() for p in teacher.fusion.parameters()) > 0
    assert counts["head"] == sum(p.numel() for p in teacher.detector.head.parameters()) > 0


def test_other_models_are_refused_by_name():
    with pytest.raises(TypeError, match="Linear cannot be run from features"):
        cost.count_parameters(nn.Linear(1, 1))


@pytest.fixture
def slowed(monkeypatch):
    """``slowed(function, seconds)`` takes so long, and all else no time."""
    now = 0.0
    monkeypatch.setattr(cost.time, "perf_counter", lambda: now)

    def slow(function, seconds):
        def timed(*args, **kwargs):
            nonlocal now
            now += seconds
            return function(*args, **kwargs)

        return timed

    return slow


@pytest.mark.parametrize(
    "part, owner, method",
    [
        ("preprocessing", "", "preprocess_image"),
        ("bottom_up", "backbone.bottom_up", "forward"),
        ("neck", "backbone", "forward"),
        ("head", "head", "forward"),
        ("postprocessing", "", "forward_inference"),
    ],
)
def test_time_is_attributed_to_the_part_that_spends_it(fcos, monkeypatch, slowed, part, owner, method):
    module = fcos.get_submodule(owner)
    monkeypatch.setattr(module, method, slowed(getattr(module, method), 0.25))
    times = cost.time_parts(fcos, cost.random_inputs(64, 64))
    assert times == {**dict.fromkeys(cost.PARTS, 0), part: 250, "total": 250}


def test_measuring_leaves_the_model_as_it_was(fcos, monkeypatch):
    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in fcos.modules())

    before = hooks()
    fcos.train()
    cost.time_parts(fcos, cost.random_inputs(64, 64))
    assert fcos.training and hooks() == before
    with monkeypatch.context() as patched:
        patched.setattr(fcos.head, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cost.count_macs(fcos, cost.random_inputs(64, 64))
    assert hooks() == before


def test_random_inputs_are_valid_ground_truth():
    inputs = cost.random_inputs(50, 70, batch=3, boxes=20)
    assert len(inputs) == 3
    for item in inputs:
        assert item["image"].shape == (3, 50, 70) and item["image"].dtype == torch.uint8
        boxes = item["instances"].gt_boxes
        assert len(boxes) == 20 and bool(boxes.nonempty().all())
        assert bool((boxes.tensor >= 0).all()) and bool((boxes.tensor <= torch.tensor([70, 50, 70, 50])).all())
    assert not torch.equal(inputs[0]["image"], inputs[1]["image"])


def make_distiller(teacher, losses=({"NAME": "AlignedL1", "WEIGHT": 0.6},)):
    student, frozen = build_model(tiny_cfg(L_LEVELS)), FrozenTeacher(teacher)
    resolution = RESOLUTIONS["L"]
    return Distiller(
        student, [frozen], between(list(losses), student_shapes(student, resolution), frozen.shapes()), resolution
    )


def test_random_objects_have_masks_and_keypoints_in_their_boxes():
    (item,) = cost.random_inputs(40, 60, boxes=5, masks=True, keypoints=3)
    gt = item["instances"]
    assert torch.allclose(gt.gt_masks.get_bounding_boxes().tensor, gt.gt_boxes.tensor)
    points = gt.gt_keypoints.tensor
    assert points.shape == (5, 3, 3) and (points[..., 2] == 2).all()
    low, high = gt.gt_boxes.tensor[:, None, :2], gt.gt_boxes.tensor[:, None, 2:]
    assert ((points[..., :2] >= low) & (points[..., :2] <= high)).all()
    assert (low >= 0).all() and (high <= torch.tensor([60, 40])).all()


def test_training_step_cost_times_the_three_in_every_round(slowed):
    distiller = make_distiller(build_model(tiny_cfg(arch="MultiScaleTeacher")))
    parameters = {name: p.clone() for name, p in distiller.student.named_parameters()}
    calls = []

    def count(label, function):
        def counted(*args):
            calls.append(label)
            return function(*args)

        return slowed(counted, {"teacher": 0.5, "student": 0.25}[label])

    distiller.teacher.features = count("teacher", distiller.teacher.features)
    distiller.student.forward = count("student", distiller.student.forward)
    finished = []
    result = cost.training_step_cost(
        distiller,
        cost.random_inputs(64, 96, batch=2, boxes=3),
        1,
        warmup=1,
        on_round=lambda: finished.append(len(calls)),
    )
    assert finished == [4, 8]
    assert sorted(calls) == ["student"] * 4 + ["teacher"] * 4
    assert result == {"student_step": 250, "teacher_neck": 500, "distillation_step": 750, "ratio": 1}
    for name, p in distiller.student.named_parameters():
        assert p.grad is None and torch.equal(p, parameters[name])


def test_training_step_cost_needs_distillation(teacher):
    with pytest.raises(ValueError, match=r"DISTILL\.LOSSES"):
        cost.training_step_cost(make_distiller(teacher, losses=()), cost.random_inputs(64, 64, boxes=1))


def test_resident_memory_follows_what_is_allocated():
    now, highest = resident_bytes()
    assert 0 < now <= highest
    size = 64 * 2**20
    with mmap.mmap(-1, size) as block:  # new pages, whatever the allocator has kept from earlier
        block.write(b"x" * size)
        after, highest = resident_bytes()
    assert after - now > 60 * 2**20 and highest >= after


def test_tensors_are_counted_while_they_live():
    weight = torch.ones(256, requires_grad=True)  # older: neither it nor its views count
    with TensorMemory() as memory:
        scaled = weight[None] * 2  # 1 KiB
        assert memory.bytes == 1024
        views = scaled.reshape(16, 16).t(), scaled.detach(), weight.view(2, 128)
        assert memory.bytes == 1024
        twice = torch.cat([scaled, scaled])  # 2 KiB
        assert (memory.bytes, memory.peak) == (3072, 3072)
        del twice
        assert (memory.bytes, memory.peak) == (1024, 3072)
        scaled.add_(1)
        del scaled
        assert memory.bytes == 1024, "views hold it"
        del views
        assert memory.bytes == 0
        kept = torch.ones(256).requires_grad_().exp()  # the leaf and what the gradient needs
        assert memory.bytes == 2048
        kept.sum().backward()  # the sum, its gradient, and the leaf's
        del kept
    assert memory.bytes == 0 and memory.peak == 2048 + 2 * 4 + 1024


def test_peak_memory_holds_the_weights():
    cfg = tiny_cfg()
    cfg.MODEL.FCOS.CONV_DIMS = [1024, 1024]
    weights = 4 * cost.count_parameters(build_model(cfg))["total"]
    assert weights > 70 * 2**20
    peak = peak_memory(cfg, 64, 64, threads=1)
    assert weights < peak < weights + 200 * 2**20


def test_peak_memory_reports_why_it_failed(tmp_path, monkeypatch):
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\necho first >&2\necho 'MemoryError: too large' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(failing))
    with pytest.raises(RuntimeError, match="MemoryError: too large"):
        peak_memory(tiny_cfg(), 64, 64)
