"""Fusion students: what they compute, cost and learn, and what they say about bad branches."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from runs import assert_equal_weights, train
from torch import nn

from msad import load_config
from msad.distill.distiller import student_shapes
from msad.distill.init import init_student
from msad.distill.teachers import FrozenTeacher
from msad.engine import DistillTrainer
from msad.engine.gates import gate_loggers
from msad.engine.preflight import examine
from msad.engine.resting import frozen_backbone
from msad.engine.setup import prepare
from msad.evaluation.cost import TOTAL, count_macs, count_parameters, random_inputs
from msad.export.plain import export
from msad.finding import ERROR, OK
from msad.modeling.adapters import adapt
from msad.modeling.features import freeze_unused_levels, tap_neck
from msad.modeling.fusion_student import FusionBackbone, branch_configs
from msad.resolution import batch_images, downsample_batch, get_resolution, shift_names

CONFIGS = Path(__file__).parents[2] / "configs"
LEVELS = ["p3", "p4", "p5", "p6", "p7"]
SIZES = [(64, 128), (125, 70), (101, 33)]


@pytest.fixture
def fusion_cfg(tiny_cfg):
    """``fusion_cfg(branches, **options)``: a fusion student of FCOS, default H and L of equal width."""

    def make(branches=({"RESOLUTION": "H"}, {"RESOLUTION": "L"}), **options):
        cfg = tiny_cfg(**options)
        cfg.MODEL.META_ARCHITECTURE = "FusionStudent"
        cfg.MSAD.FUSION_STUDENT.BRANCHES = [dict(branch) for branch in branches]
        return cfg

    return make


@pytest.fixture
def fused_as(tiny_model, fusion_cfg):
    """A teacher on H and L, and a fusion student that has taken over all of its weights."""
    teacher = tiny_model(resolutions=["H", "L"])
    torch.nn.init.normal_(teacher.fusion.excite.weight, std=3.0)  # gates that differ between images and levels
    student = build_model(fusion_cfg())
    assert init_student(student, teacher, "full") == {"copied": len(student.state_dict()), "kept": 0}
    return teacher.eval(), student.eval()


# --- what it computes -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_fused_maps_by_hand(fused_as, make_batch):
    """Each branch on its own image; global means over the image; two linear layers; softmax; weighted sum."""
    _, student = fused_as
    backbone, batch = student.backbone, make_batch(SIZES[1:2])
    with tap_neck(student) as taken:
        student(batch)
    assert list(taken) == LEVELS
    maps = []
    for shift, branch in enumerate(backbone.branches.values()):
        images = [item["image"] for item in downsample_batch(batch, shift, "cpu")]
        images = batch_images(images, student.pixel_mean, student.pixel_std, 64 >> shift)
        maps.append(branch(images.tensor, shift_names(LEVELS, -shift)))
    w1, w2 = backbone.fusion.squeeze.weight.numpy(), backbone.fusion.excite.weight.numpy()
    for level, name in enumerate(LEVELS, start=3):
        high, low = maps[0][name].numpy(), maps[1][f"p{level - 1}"].numpy()
        rows, columns = -(-125 // 2**level), -(-70 // 2**level)
        pooled = np.concatenate([x[0, :, :rows, :columns].mean((1, 2)) for x in (high, low)])
        logits = w2 @ np.maximum(w1 @ pooled, 0)
        gate = np.exp(logits) / np.exp(logits).sum()
        assert 0.01 < gate[0] < 0.99
        np.testing.assert_allclose(taken[name].numpy(), gate[0] * high + gate[1] * low, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_with_a_teachers_weights_it_is_the_teacher(fused_as, make_batch, same_detections):
    """Losses and detections of the fused branch, for a batch of odd sizes."""
    teacher, student = fused_as
    batch = make_batch(SIZES)
    same_detections(student(batch), teacher(batch))
    for module in (*teacher.modules(), *student.modules()):
        module.training = not isinstance(module, torch.nn.BatchNorm2d)  # whose batches would differ: H alone, then L
    with EventStorage(0):
        losses = student(batch)
        images, gt = student.preprocess_image(batch), [item["instances"] for item in batch]
        expected = adapt(teacher.detector).losses(images, teacher.neck_features(batch), gt)
    assert losses.keys() == expected.keys()
    for name, value in losses.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_batch_is_its_images(fused_as, make_batch, same_detections):
    """Images of one padded size, together and alone."""
    _, student = fused_as
    batch = make_batch([(100, 120), (128, 128), (71, 93)])
    same_detections(student(batch), [student([item])[0] for item in batch])
    assert student.backbone.image_sizes is None


@pytest.mark.parametrize("mode", ["antialias", "nearest"])
def test_low_resolution_input_is_that_of_an_l_student(fusion_cfg, make_batch, mode):
    student = build_model(fusion_cfg(MSAD__DOWNSAMPLE=mode))
    batch = make_batch(SIZES)
    images = student.preprocess_image(batch)
    assert images.tensor.shape[-2:] == (128, 128)
    student.backbone.image_sizes = images.image_sizes
    expected = [item["image"] for item in downsample_batch(batch, 1, "cpu", mode)]
    expected = batch_images(expected, student.pixel_mean, student.pixel_std, 32).tensor
    torch.testing.assert_close(student.backbone.branch_input(images.tensor, 1), expected, rtol=1e-5, atol=1e-5)


def test_sizes_are_forgotten_even_after_an_error(fusion_cfg, make_batch):
    student = build_model(fusion_cfg()).train()
    batch = make_batch([(64, 64), (64, 64)])
    del batch[0]["instances"]
    with EventStorage(0), pytest.raises((AssertionError, ValueError), match="nstance"):
        student(batch)
    assert student.backbone.image_sizes is None


@torch.no_grad()
def test_branches_have_their_own_width_and_weights(fusion_cfg, make_batch):
    narrow = {"RESOLUTION": "H", "MODEL": {"RESNETS": {"RES2_OUT_CHANNELS": 2, "STEM_OUT_CHANNELS": 2}}}
    cfg = fusion_cfg([narrow, {"RESOLUTION": "L"}])
    student = build_model(cfg).eval()
    stems = {name: branch.bottom_up.stem.conv1.out_channels for name, branch in student.backbone.branches.items()}
    assert stems == {"H": 2, "L": 4}
    assert student.backbone.size_divisibility == 64 and student.backbone.max_shift == 1
    shapes = student.backbone.output_shape()
    assert {name: shape.stride for name, shape in shapes.items()} == dict(zip(LEVELS, (8, 16, 32, 64, 128)))
    clone = copy.deepcopy(student)
    batch = make_batch(SIZES)
    with tap_neck(student) as a, tap_neck(clone) as b:
        student(batch), clone(batch)
    assert all(torch.equal(a[name], b[name]) for name in LEVELS)
    assert clone.backbone.image_sizes is None


def test_three_branches(fusion_cfg, make_batch):
    c1 = {"RESNETS": {"OUT_FEATURES": ["c1", "res2", "res3", "res4", "res5"]}}
    c1["FPN"] = {"IN_FEATURES": c1["RESNETS"]["OUT_FEATURES"]}
    cfg = fusion_cfg([{"RESOLUTION": "H"}, {"RESOLUTION": "L"}, {"RESOLUTION": "EL", "MODEL": c1}])
    student = build_model(cfg)
    assert student.backbone.size_divisibility == 128
    with EventStorage(0):
        sum(student(make_batch(SIZES)).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


@torch.no_grad()
def test_mask_rcnn(tiny_model, tiny_cfg, make_batch, same_detections):
    """Levels P2-P6 at H, P1-P5 at L: P1 from C1, which the L branch alone needs."""
    teacher = tiny_model("MaskRCNN", resolutions=["H", "L"]).eval()
    cfg = tiny_cfg("MaskRCNN")
    features = ["c1", "res2", "res3", "res4", "res5"]
    low = {"RESNETS": {"OUT_FEATURES": features}, "FPN": {"IN_FEATURES": features}}
    cfg.MODEL.META_ARCHITECTURE, cfg.MSAD.DETECTOR = "FusionStudent", "GeneralizedRCNN"
    cfg.MSAD.FUSION_STUDENT.BRANCHES = [{"RESOLUTION": "H"}, {"RESOLUTION": "L", "MODEL": low}]
    student = build_model(cfg).eval()
    assert init_student(student, teacher, "full")["copied"] == len(student.state_dict())
    batch = make_batch(SIZES)
    found, expected = student(batch), teacher(batch)
    same_detections(found, expected)
    masks = [[x["instances"].pred_masks for x in output] for output in (found, expected)]
    # Rounding may move single pixels over the threshold of a mask.
    assert all((a != b).float().mean() < 1e-3 and a.any() for a, b in zip(*masks))
    assert count_parameters(student)["fusion"] == 16 + 2


def test_retinanet_with_stock_backbones(tiny_cfg, make_batch):
    """detectron2's own FPN makes P7 with P6: that of the L branch is read by nobody, and not trained."""
    cfg = tiny_cfg("RetinaNet", MODEL__BACKBONE__NAME="build_retinanet_resnet_fpn_backbone", MODEL__FPN__LEVELS=[])
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 2, 8
    cfg.MODEL.META_ARCHITECTURE, cfg.MSAD.DETECTOR = "FusionStudent", "RetinaNet"
    cfg.MSAD.FUSION_STUDENT.BRANCHES = [{"RESOLUTION": "H"}, {"RESOLUTION": "L"}]
    student = build_model(cfg)
    frozen = freeze_unused_levels(student)
    assert frozen == [f"backbone.branches.L.top_block.p7.{kind}" for kind in ("weight", "bias")]
    with EventStorage(0):
        sum(student(make_batch(SIZES[:1])).values()).backward()
    without = [name for name, p in student.named_parameters() if p.requires_grad and p.grad is None]
    assert not [name for name in without if "top_block" in name]


@torch.no_grad()
def test_streams_change_nothing(fused_as, make_batch):
    """On a CPU the option has no effect; on a GPU it has none on the numbers."""
    _, student = fused_as
    batch = make_batch(SIZES)
    with tap_neck(student) as one_by_one:
        student(batch)
    student.backbone.streams = True
    with tap_neck(student) as beside:
        student(batch)
    assert all(torch.equal(one_by_one[name], beside[name]) for name in LEVELS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA streams need a GPU")
def test_streams_on_a_gpu_give_the_same_losses_and_gradients(fusion_cfg, make_batch):
    cfg = fusion_cfg()
    student, batch, results = build_model(cfg).cuda(), make_batch(SIZES), []
    for streams in (False, True):
        student.backbone.streams = streams
        student.zero_grad()
        losses = copy.deepcopy(student)(batch)
        twin = copy.deepcopy(student)
        sum(twin(batch).values()).backward()
        results.append((losses, {name: p.grad for name, p in twin.named_parameters()}))
    (losses, grads), (beside, beside_grads) = results
    torch.testing.assert_close(beside, losses)
    torch.testing.assert_close(beside_grads, grads, rtol=1e-3, atol=1e-4)


# --- cost -------------------------------------------------------------------------------------------------------------


def test_the_gate_is_logged_in_training(fusion_cfg, tiny_model):
    student = build_model(fusion_cfg())
    (logger,) = gate_loggers(student)
    assert logger.fusion is student.backbone.fusion and "change nothing" in logger.consequence
    assert gate_loggers(tiny_model()) == []


def test_cost_counts_both_branches(fusion_cfg, tiny_model):
    wide = {"RESOLUTION": "L", "MODEL": {"RESNETS": {"RES2_OUT_CHANNELS": 8}}}
    student = build_model(fusion_cfg([{"RESOLUTION": "H"}, wide]))
    high, low = tiny_model(), tiny_model(levels=range(2, 7), MODEL__RESNETS__RES2_OUT_CHANNELS=8)
    counts = [count_parameters(model) for model in (student, high, low)]
    for part in ("bottom_up", "neck"):
        assert counts[0][part] == counts[1][part] + counts[2][part] > 0
    assert counts[0]["fusion"] == 16 * 1 + 1 * 2 and counts[0]["head"] == counts[1]["head"]
    assert counts[0][TOTAL] == sum(value for part, value in counts[0].items() if part != TOTAL)
    large, small = random_inputs(128, 192), random_inputs(64, 96)
    macs = [count_macs(model, image) for model, image in ((student, large), (high, large), (low, small))]
    for part in ("bottom_up", "neck"):
        assert macs[0][part] == pytest.approx(macs[1][part] + macs[2][part])
    assert macs[0]["head"] == pytest.approx(macs[1]["head"]) and macs[0]["fusion"] > 0


# --- training ---------------------------------------------------------------------------------------------------------

STUDENT = """
_BASE_: fcos.yaml
MODEL: {META_ARCHITECTURE: FusionStudent}
MSAD:
  FUSION_STUDENT:
    BRANCHES:
      - {RESOLUTION: H, MODEL: {RESNETS: {STEM_OUT_CHANNELS: 4, RES2_OUT_CHANNELS: 4}}}
      - {RESOLUTION: L}
DISTILL: {STUDENT_RESOLUTION: H, WARMUP_ITERS: 0}
"""


@pytest.fixture
def run_cfg(project, tmp_path):
    """The yaml of a fusion student that trains two steps; its H branch is half as wide as the teacher."""
    file = project / "fusion_student.yaml"
    file.write_text(STUDENT)

    def make(**options):
        keys = {"OUTPUT_DIR": str(tmp_path / "run"), "SOLVER.MAX_ITER": 2, "SOLVER.CHECKPOINT_PERIOD": 1}
        keys.update((key.replace("__", "."), value) for key, value in options.items())
        cfg = load_config(file, [x for pair in keys.items() for x in pair])
        prepare(cfg)
        return cfg

    return make


def test_trains_alone_exports_and_reloads(run_cfg, tmp_path, make_batch, same_detections):
    cfg = run_cfg()
    run, trace, _ = train(cfg)
    assert len(trace.steps) == 2
    folder = tmp_path / "run"
    assert "msad.load_config" in export(cfg, str(folder / "model_final.pth"), tmp_path / "exported")
    again = load_config(tmp_path / "exported" / "config.yaml")
    model = build_model(again)
    model.load_state_dict(torch.load(again.MODEL.WEIGHTS, weights_only=True)["model"])
    assert_equal_weights(model.state_dict(), run.checkpointer.model.state_dict())
    assert isinstance(model.backbone, FusionBackbone)


def test_trains_under_a_teacher(run_cfg, project, teacher_weights, caplog):
    teachers = [{"CONFIG": str(project / "teacher.yaml"), "WEIGHTS": teacher_weights["teacher"]}]
    cfg = run_cfg(DISTILL__TEACHERS=teachers, DISTILL__LOSSES=[{"NAME": "AlignedL1"}])
    with caplog.at_level(logging.INFO, logger="msad.distill.init"):
        run = DistillTrainer(cfg)
        run.resume_or_load(False)
    start = {name: value.clone() for name, value in run.distiller.student.state_dict().items()}
    source = run.distiller.teacher.model.state_dict()
    low = "backbone.branches.L.bottom_up.stem.conv1.weight"
    assert torch.equal(start[low], source["detector.backbone.bottom_up.stem.conv1.weight"])
    assert torch.equal(start["backbone.fusion.excite.weight"], source["fusion.excite.weight"])
    assert "do not fit the teacher" in caplog.text and "backbone.branches.H.fpn_lateral3.weight" in caplog.text
    run.train()
    storage = {name for name, _ in run.storage.latest().items()}
    assert {"loss_fcos_cls", "loss_distill/AlignedL1"} <= storage
    trained = run.distiller.student.state_dict()
    for name in (low, "backbone.branches.H.bottom_up.stem.conv1.weight", "backbone.fusion.excite.weight"):
        assert not torch.equal(trained[name], start[name]), name


def test_the_bottom_up_of_every_branch_is_frozen(fusion_cfg):
    student = build_model(fusion_cfg())
    frozen = {id(p) for p in frozen_backbone(student, 1).parameters}
    names = {name for name, p in student.named_parameters() if id(p) in frozen}
    assert names == {name for name, _ in student.named_parameters() if ".bottom_up." in name}
    assert {name.split(".")[2] for name in names} == {"H", "L"}


def test_there_is_no_one_bottom_up_to_read(fusion_cfg):
    with pytest.raises(ValueError, match=r"TAP bottom_up: .* nothing to read there .its backbone has 2 branches"):
        student_shapes(build_model(fusion_cfg()), get_resolution("H"), "bottom_up")


def test_freezing_without_a_teacher_is_said(run_cfg, caplog):
    with caplog.at_level(logging.WARNING, logger="msad"):
        DistillTrainer(run_cfg(DISTILL__FREEZE_BACKBONE_ITERS=1))
    assert "FREEZE_BACKBONE_ITERS has no effect without DISTILL.TEACHERS" in caplog.text


def test_loaded_branches_are_known_to_preflight(run_cfg, project, teacher_weights, tmp_path, caplog):
    """A branch that comes from its own WEIGHTS is not called random, neither in training nor by preflight."""
    teachers = [{"CONFIG": str(project / "teacher.yaml"), "WEIGHTS": teacher_weights["teacher"]}]
    cfg = run_cfg(DISTILL__TEACHERS=teachers, DISTILL__LOSSES=[{"NAME": "AlignedL1"}])
    holder = nn.Module()
    holder.backbone = build_model(cfg).backbone.branches["H"]
    torch.save({"model": holder.state_dict()}, tmp_path / "narrow.pth")
    for entry in cfg.MSAD.FUSION_STUDENT.BRANCHES:
        if entry["RESOLUTION"] == "H":
            entry["WEIGHTS"] = str(tmp_path / "narrow.pth")
    (start,) = [f for f in examine(cfg, images=0) if f.check == "student's start"]
    assert start.level == OK, start
    with caplog.at_level(logging.INFO, logger="msad"):
        DistillTrainer(cfg).resume_or_load(False)
    assert "random" not in caplog.text
    cfg.MSAD.FUSION_STUDENT.BRANCHES[0]["WEIGHTS"] = "nowhere.pth"
    assert "student's weights" in {f.check for f in examine(cfg, images=0) if f.level == ERROR}


def test_a_stock_teacher_pads_for_the_lowest_branch(make_distiller, tiny_model, fusion_cfg, make_batch):
    """A 32-pixel grid of a plain teacher would be too small for an image of 65 rows, which the student pads to 128."""
    distiller = make_distiller("H", teacher=tiny_model(), student=build_model(fusion_cfg()))
    assert distiller.max_shift == 1
    with EventStorage(0):
        losses = distiller(make_batch([(65, 70)]))
    assert losses["loss_distill/AlignedL1"] > 0


@torch.no_grad()
@pytest.mark.parametrize("together", [False, True])
def test_as_a_teacher_it_has_the_maps_of_its_own_forward_pass(fused_as, make_batch, together):
    """Which know where images end, whatever else is in the batch."""
    _, student = fused_as
    batch = make_batch([(64, 64), (128, 192)][: 2 if together else 1])
    with tap_neck(student) as own:
        student(batch)
    found = FrozenTeacher(student).features(batch, 0)
    assert list(found) == LEVELS and student.backbone.image_sizes is None
    torch.testing.assert_close(found, own)


def test_branch_weights(run_cfg, project, tmp_path):
    """A branch takes over a trained detector's backbone where training begins, and not on resuming."""
    torch.manual_seed(7)
    file = tmp_path / "student.pth"
    weights = build_model(load_config(project / "student.yaml")).state_dict()
    torch.save({"model": weights}, file)
    branches = copy.deepcopy(run_cfg().MSAD.FUSION_STUDENT.BRANCHES)
    branches[1]["WEIGHTS"] = str(file)
    cfg = run_cfg(MSAD__FUSION_STUDENT__BRANCHES=branches)
    run = DistillTrainer(cfg)
    run.resume_or_load(False)
    loaded = run.checkpointer.model.state_dict()
    backbone = {name: value for name, value in weights.items() if name.startswith("backbone.")}
    assert backbone
    for name, value in backbone.items():
        assert torch.equal(loaded[name.replace("backbone.", "backbone.branches.L.")], value), name
    run.train()
    final = {name: value.clone() for name, value in run.checkpointer.model.state_dict().items()}
    run = DistillTrainer(cfg)
    run.resume_or_load(True)
    assert_equal_weights(run.checkpointer.model.state_dict(), final)


@pytest.mark.parametrize(("high", "low"), [("050", "100"), ("050", "075"), ("050", "050"), ("025", "050")])
def test_rows_of_table_3(high, low):
    """Widths, pretrained weights and levels of the branches; the teacher is as wide as the L branch."""
    cfg = load_config(CONFIGS / "MSAD" / f"fusion_H{high}_L{low}_1x.yaml")
    (first, h_cfg), (second, l_cfg) = branch_configs(cfg)
    assert (first.name, second.name, cfg.DISTILL.STUDENT_RESOLUTION) == ("H", "L", "H")
    assert h_cfg.MODEL.FPN.LEVELS == ["p3", "p4", "p5", "p6", "p7"]
    assert l_cfg.MODEL.FPN.LEVELS == ["p2", "p3", "p4", "p5", "p6"]
    for branch, width in ((h_cfg, high), (l_cfg, low)):
        resnets = branch.MODEL.RESNETS
        channels = [resnets.STEM_OUT_CHANNELS, resnets.WIDTH_PER_GROUP, resnets.RES2_OUT_CHANNELS]
        assert channels == [full * int(width) // 100 for full in (64, 64, 256)]
    weights = [entry["WEIGHTS"] for entry in cfg.MSAD.FUSION_STUDENT.BRANCHES]
    assert weights == [f"output/pretrained/slimmable_R-50_{width}.pkl" for width in (high, low)]
    assert cfg.MODEL.WEIGHTS == "" and cfg.INPUT.MIN_SIZE_TEST == 800 and cfg.INPUT.FORMAT == "RGB"
    assert f"SLR{low}_50_T" in cfg.DISTILL.TEACHERS[0]["CONFIG"]


def test_nuclei_student_is_its_parts():
    fused, high, low = (
        build_model(load_config(CONFIGS / "nuclei/fusion" / f"{name}.yaml"))
        for name in ("fusion_student", "student_H_narrow", "student_L")
    )
    for name, part in (("H", high), ("L", low)):
        branch = fused.backbone.branches[name].state_dict()
        assert {k: v.shape for k, v in branch.items()} == {k: v.shape for k, v in part.backbone.state_dict().items()}


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("branches", "message"),
    [
        ([{"RESOLUTION": "H"}], r"at least two distinct resolutions, H first, got \['H'\]"),
        ([{"RESOLUTION": "L"}, {"RESOLUTION": "H"}], r"H first, got \['L', 'H'\]"),
        ([{"RESOLUTION": "H"}, {"RESOLUTION": "H"}], "distinct"),
        ([{"RESOLUTION": "H"}, {"RESOLUTION": 0.75}], r"unknown resolution 0\.75"),
        ([{"RESOLUTION": "H"}, {"MODEL": {}}], r"BRANCHES\[1\] must be .*got \{'MODEL'"),
        ([{"RESOLUTION": "H"}, {"RESOLUTION": "L", "OPTS": []}], r"BRANCHES\[1\] must be"),
        ([{"RESOLUTION": "H"}, {"RESOLUTION": "L", "MODEL": {"RESNETS": {"DEPHT": 1}}}], "branch L: .*DEPHT"),
        ([{"RESOLUTION": "H"}, {"RESOLUTION": "L", "MODEL": {"FPN": {"OUT_CHANNELS": "a"}}}], "branch L: "),
        ([{"RESOLUTION": "H"}, {"RESOLUTION": "L", "MODEL": {"FPN": {"OUT_CHANNELS": 16}}}],
         r"p3 \(H frame\) has 16 channels in branch L and 8 in branch H"),
        ([{"RESOLUTION": "H"}, {"RESOLUTION": "L", "MODEL": {"FPN": {"LEVELS": ["p3", "p4"]}}}],
         r"branch L needs \['p2', 'p5', 'p6'\]"),
    ],
)  # fmt: skip
def test_wrong_branches_are_named(fusion_cfg, branches, message):
    with pytest.raises(ValueError, match=message):
        build_model(fusion_cfg(branches))
