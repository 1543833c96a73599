"""R-CNNs in teacher and student: the second adapter, levels P2-P6 of H as P1-P5 of L, one frame for boxes and masks."""

from __future__ import annotations

import copy

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes, ImageList
from detectron2.utils.events import EventStorage

from msad.distill.distiller import student_shapes
from msad.distill.init import init_student
from msad.distill.losses import DISTILL_LOSS_REGISTRY
from msad.evaluation import cost
from msad.evaluation.region_limits import fill_regions
from msad.modeling.adapters import adapt
from msad.modeling.features import run_neck
from msad.resolution import RESOLUTIONS, downsample_batch, scale_instances

H, L = RESOLUTIONS["H"], RESOLUTIONS["L"]
RCNNS = ["FasterRCNN", "MaskRCNN", "KeypointRCNN", "CascadeRCNN", "CascadeMask", "HTC"]
SIZES = [(64, 96), (50, 127)]
RPN = {"loss_rpn_cls", "loss_rpn_loc"}
LOSSES = {
    "FasterRCNN": RPN | {"loss_cls", "loss_box_reg"},
    "MaskRCNN": RPN | {"loss_cls", "loss_box_reg", "loss_mask"},
    "KeypointRCNN": RPN | {"loss_cls", "loss_box_reg", "loss_keypoint"},
    "CascadeRCNN": RPN | {f"loss_{term}_stage{k}" for term in ("cls", "box_reg") for k in range(3)},
}
LOSSES["CascadeMask"] = LOSSES["HTC"] = LOSSES["CascadeRCNN"] | {f"loss_mask_stage{k}" for k in range(3)}
OUTPUTS = dict.fromkeys(["MaskRCNN", "CascadeMask", "HTC"], "pred_masks") | {"KeypointRCNN": "pred_keypoints"}


def ground_truth(batch):
    return [item["instances"] for item in batch]


# --- the adapter ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", RCNNS)
def test_losses_equal_the_detectors_forward(tiny_model, make_batch, arch):
    detector, batch = tiny_model(arch), make_batch(SIZES)
    with EventStorage(0):
        torch.manual_seed(3)
        expected = detector(batch)
        images = detector.preprocess_image(batch)
        maps = run_neck(detector.backbone, images.tensor, adapt(detector).levels)
        torch.manual_seed(3)
        found = adapt(detector).losses(images, maps, ground_truth(batch))
    assert found.keys() == expected.keys() == LOSSES[arch] and all(value > 0 for value in expected.values())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("arch", RCNNS)
def test_predictions_equal_the_detectors_forward(tiny_model, make_batch, same_detections, arch):
    detector, batch = tiny_model(arch).eval(), make_batch(SIZES)
    batch[0].update(height=128, width=192)
    images = detector.preprocess_image(batch)
    maps = run_neck(detector.backbone, images.tensor, adapt(detector).levels)
    with torch.no_grad():
        adapter = adapt(detector)
        found, expected = adapter.postprocess(adapter.predict(images, maps), batch, images), detector(batch)
    same_detections(found, expected)
    if arch in OUTPUTS:
        for a, b in zip(found, expected):
            a, b = a["instances"].get(OUTPUTS[arch]), b["instances"].get(OUTPUTS[arch])
            torch.testing.assert_close(a, b)


def test_levels_are_those_of_all_heads(tiny_model):
    assert adapt(tiny_model("MaskRCNN")).levels == ["p2", "p3", "p4", "p5", "p6"]
    only_fine = tiny_model("KeypointRCNN", MODEL__RPN__IN_FEATURES=["p5", "p6"], MODEL__ANCHOR_GENERATOR__SIZES=[[32]])
    assert adapt(only_fine).levels == ["p2", "p3", "p4", "p5", "p6"]


def test_without_proposal_generator_it_is_refused(tiny_model):
    detector = tiny_model("FasterRCNN")
    detector.proposal_generator = None
    with pytest.raises(TypeError, match="GeneralizedRCNN cannot be run from features"):
        adapt(detector)


# --- the teacher ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", RCNNS)
def test_teacher_trains_on_every_branch(tiny_model, make_batch, arch):
    teacher = tiny_model(arch, resolutions=["H", "L"])
    with EventStorage(0) as storage:
        found = teacher(make_batch(SIZES))
        sum(found.values()).backward()
    assert set(found) == {f"{branch}/{name}" for branch in ("H", "L", "fused") for name in LOSSES[arch]}
    assert all(torch.isfinite(value) for value in found.values())
    assert [name for name, p in teacher.named_parameters() if p.grad is None] == []

    for branch in teacher.branches:
        assert f"{branch}/rpn/num_pos_anchors" in storage.latest()
    assert all(len(storage.history(name).values()) == 1 for name in storage.latest())


@pytest.mark.parametrize("arch", ["MaskRCNN", "KeypointRCNN"])
def test_branch_losses_are_the_detectors_in_the_h_frame(tiny_model, make_batch, arch):
    """Each branch against the plain detector run on that branch's renamed maps with H ground truth."""
    teacher, batch = tiny_model(arch, resolutions=["H", "L"], MSAD__W_FUSE=0.3), make_batch(SIZES)
    alone = copy.deepcopy(teacher)
    with EventStorage(0):
        found = teacher(batch)
        images, h_maps = alone.branch_features(batch, H)
        _, l_maps = alone.branch_features(batch, L)
        fused = alone.fuse([h_maps, l_maps], images.image_sizes)
        assert {name: tuple(x.shape) for name, x in h_maps.items()} == {n: tuple(x.shape) for n, x in l_maps.items()}
        for branch, maps, weight in (("H", h_maps, 1.0), ("L", l_maps, 1.0), ("fused", fused, 0.3)):
            for name, value in adapt(alone.detector).losses(images, maps, ground_truth(batch)).items():
                torch.testing.assert_close(found[f"{branch}/{name}"], weight * value, rtol=1e-3, atol=1e-5)


def test_anchors_are_assigned_once_a_step(tiny_model, make_batch, monkeypatch):
    teacher = tiny_model("FasterRCNN", resolutions=["H", "L"])
    cls, calls = type(teacher.detector.proposal_generator), []
    original = cls.label_and_sample_anchors
    monkeypatch.setattr(cls, "label_and_sample_anchors", lambda self, *a: calls.append(1) or original(self, *a))
    for step in (1, 2):
        with EventStorage(0):
            teacher(make_batch(SIZES, seed=step))
        assert len(calls) == step


def test_p1_is_made_in_the_low_resolution_branch_only(tiny_model, make_batch):
    teacher, batch = tiny_model("FasterRCNN", resolutions=["H", "L"]).eval(), make_batch(SIZES)
    calls = []
    for name in ("fpn_lateral1", "fpn_output1"):
        module = getattr(teacher.detector.backbone, name)
        module.register_forward_hook(lambda _module, args, _output: calls.append(args[0].shape))
    with torch.no_grad():
        teacher.branch_features(batch, H)
        assert calls == []
        teacher.branch_features(batch, L)
    # H is padded to (64, 128): C1 and P1 of L have a quarter of its sides.
    assert [tuple(shape[-2:]) for shape in calls] == [(16, 32), (16, 32)]


def test_quarter_resolution_is_refused(tiny_model):
    with pytest.raises(ValueError, match="p1"):
        tiny_model("FasterRCNN", resolutions=["H", "L", "EL"])


@pytest.mark.parametrize("branch", ["H", "L", "fused"])
@pytest.mark.parametrize("arch", RCNNS)
def test_teacher_inference_is_independent_of_the_batch(tiny_model, make_batch, same_detections, arch, branch):
    teacher, batch = tiny_model(arch, resolutions=["H", "L"]).eval(), make_batch([(64, 128), (64, 128)])
    teacher.set_eval_branch(branch)
    with torch.no_grad():
        together, single = teacher(batch), [teacher([item])[0] for item in batch]
    same_detections(together, single, tolerance=1e-3)
    for item in together:
        assert item["instances"].image_size == (64, 128)
        if arch == "MaskRCNN":
            assert item["instances"].pred_masks.shape[1:] == (64, 128)


# --- the student ------------------------------------------------------------------------------------------------------


def l_frame_student(tiny_model, arch):
    """The detector at half the input: levels P1-P5, anchors halved."""
    return tiny_model(arch, levels=range(1, 6), seed=1)


@pytest.mark.parametrize("arch", RCNNS)
def test_student_learns_from_aligned_levels(tiny_model, make_distiller, make_batch, arch):
    teacher = tiny_model(arch, resolutions=["H", "L"])
    distiller = make_distiller("L", teacher=teacher, student=l_frame_student(tiny_model, arch))
    before = copy.deepcopy(teacher.state_dict())
    with EventStorage(0):
        found = distiller(make_batch(SIZES))
        sum(found.values()).backward()
    assert set(found) == LOSSES[arch] | {"loss_distill/AlignedL1"} and found["loss_distill/AlignedL1"] > 0
    assert distiller.student.backbone.fpn_output1.weight.grad.abs().sum() > 0
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("arch", ["MaskRCNN", "KeypointRCNN"])
def test_every_loss_teaches_students_of_every_task(tiny_model, make_distiller, make_batch, arch):
    names = [n for n, cls in DISTILL_LOSS_REGISTRY if cls.__module__.startswith("msad.") and n != "LD"]  # LD: GFL's
    student, teacher = l_frame_student(tiny_model, arch), tiny_model(arch, resolutions=["H", "L"])
    distiller = make_distiller("L", teacher=teacher, student=student, losses=[{"NAME": name} for name in names])
    with EventStorage(0):
        found = distiller(make_batch(SIZES))
        sum(found.values()).backward()
    assert {name.split("/")[1] for name in found if name.startswith("loss_distill/")} >= set(names)
    assert all(torch.isfinite(value) for value in found.values())
    assert all(p.grad is not None for p in distiller.losses.parameters() if p.requires_grad)


def test_student_levels_in_the_h_frame(tiny_model):
    shapes = student_shapes(l_frame_student(tiny_model, "MaskRCNN"), L)
    assert {name: shape.stride for name, shape in shapes.items()} == {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}


def test_initialised_student_is_the_teachers_low_resolution_branch(tiny_model, make_batch):
    """Same weights: the student on L images sees what the teacher's L branch sees, and finds the same objects."""
    teacher = tiny_model("MaskRCNN", resolutions=["H", "L"]).eval()
    student = l_frame_student(tiny_model, "MaskRCNN").eval()
    counts = init_student(student, teacher.detector, "full")
    assert counts["copied"] > 20 and counts["kept"] == 0
    batch = make_batch([(64, 128)])
    reduced = downsample_batch(batch, 1, "cpu")
    with torch.no_grad():
        _, expected = teacher.branch_features(batch, L)
        images = student.preprocess_image(reduced)
        found = run_neck(student.backbone, images.tensor, adapt(student).levels)
        for name, h_name in zip(found, expected):
            torch.testing.assert_close(found[name], expected[h_name])
        teacher.set_eval_branch("L")
        (a,), (b,) = teacher(batch), student(reduced)
    a, b = a["instances"], b["instances"]  # both in original pixels: 64 x 128
    assert len(a) == len(b) > 0
    torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(a.scores, b.scores, rtol=1e-3, atol=1e-4)


def test_boxes_fall_one_pooler_level_at_half_size(tiny_model):
    """floor(4 + log2(sqrt(area) / 224)): halving a box lowers its level by one, so pairs of levels stay pairs."""
    h, student = tiny_model("FasterRCNN"), l_frame_student(tiny_model, "FasterRCNN")
    boxes = torch.tensor([[0.0, 0, 60, 60], [0, 0, 130, 130], [0, 0, 300, 300], [0, 0, 500, 500]])
    used = {}
    for name, detector, scale in (("H", h, 1.0), ("L", student, 0.5)):
        # Level l is a constant map of value l (in the H frame): pooling tells which level a box was given.
        levels = adapt(detector).levels[:-1]
        strides = [detector.backbone.output_shape()[level].stride for level in levels]
        side = int(512 * scale)
        maps = [torch.full((1, 1, side // s, side // s), float(k)) for k, s in enumerate(strides)]
        used[name] = detector.roi_heads.box_pooler(maps, [Boxes(boxes * scale)]).mean((1, 2, 3)).round().tolist()
    assert used["H"] == used["L"] == [0.0, 1.0, 2.0, 3.0]


def test_losses_of_the_l_frame_equal_those_of_the_h_frame(tiny_model, make_batch):
    """Halved boxes, anchors and strides give the same losses as H ground truth on renamed maps."""
    teacher = tiny_model("FasterRCNN", resolutions=["H", "L"])
    student = l_frame_student(tiny_model, "FasterRCNN")
    init_student(student, teacher.detector, "full")
    batch = make_batch([(64, 128), (128, 64)], seed=4)
    with EventStorage(0):
        images, maps = teacher.branch_features(batch, H)
        in_h = adapt(teacher.detector).losses(images, maps, ground_truth(batch))
        small = ImageList(torch.zeros(2, 3, *(s // 2 for s in images.tensor.shape[-2:])), [(32, 64), (64, 32)])
        renamed = dict(zip(adapt(student).levels, maps.values()))
        in_l = adapt(student).losses(small, renamed, [scale_instances(x, 1) for x in ground_truth(batch)])
    for name in in_h:
        torch.testing.assert_close(in_l[name], in_h[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


# --- cost -------------------------------------------------------------------------------------------------------------


def test_cost_of_the_heads(tiny_model):
    """Multiply-adds of the proposal head on every cell and of the box head on every proposal, written out."""
    proposals, channels, classes = 30, 8, 3
    detector = tiny_model("FasterRCNN", MODEL__RPN__NMS_THRESH=1.0, MODEL__RPN__POST_NMS_TOPK_TEST=proposals).eval()
    cells = sum((64 // 2**level) * (128 // 2**level) for level in range(2, 7))
    rpn = cells * channels * (channels * 9 + 1 + 4)
    box = proposals * (channels * 9 * 16 + 16 * (classes + 1) + 16 * 4 * classes)
    macs, parameters = cost.count_macs(detector, cost.random_inputs(64, 128)), cost.count_parameters(detector)
    assert macs["head"] * 1e9 == pytest.approx(rpn + box)
    assert macs["total"] == pytest.approx(sum(macs[part] for part in cost.PARTS))
    assert parameters["total"] == sum(p.numel() for p in detector.parameters()) == sum(
        parameters[part] for part in cost.PARTS
    )  # fmt: skip


def test_cascade_stages_belong_to_the_head(tiny_model):
    parameters = cost.count_parameters(tiny_model("CascadeRCNN", resolutions=["H", "L"]))
    assert parameters["total"] == sum(parameters[part] for part in cost.PARTS) and parameters["fusion"] > 0


@pytest.mark.parametrize("arch", RCNNS)
def test_untrained_models_have_as_many_regions_as_their_limits_allow(tiny_cfg, arch):
    cfg, seen = tiny_cfg(arch), []
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST, cfg.TEST.DETECTIONS_PER_IMAGE = 50, 7
    detector = fill_regions(build_model(cfg).eval())
    for module in detector.modules():
        if isinstance(module, FastRCNNOutputLayers):
            module.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    with torch.no_grad():
        found = detector(cost.random_inputs(128, 192))[0]["instances"]
    assert seen == [50] * (1 if arch in RCNNS[:3] else 3)
    assert len(found) == 7 and found.pred_classes.tolist() == [0] * 7
    assert arch not in OUTPUTS or len(found.get(OUTPUTS[arch])) == 7


def test_other_detectors_keep_their_weights(tiny_model):
    for arch in ("FCOS", "RetinaNet"):
        detector = tiny_model(arch)
        before = {name: value.clone() for name, value in detector.state_dict().items()}
        assert all(torch.equal(value, before[name]) for name, value in fill_regions(detector).state_dict().items())
