"""The distiller against its parts: detection losses, aligned features, weights, schedules."""

from __future__ import annotations

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from detectron2.utils.events import EventStorage
from helpers import between

from msad import resolution
from msad.distill.distiller import Distiller, student_shapes
from msad.distill.schedules import distillation_factor
from msad.resolution import RESOLUTIONS, batch_images, downsample, downsample_batch

SIZES = [(64, 96), (90, 128)]
LEVELS = [f"p{level}" for level in range(3, 8)]


def run(distiller, batch, iteration=0):
    with EventStorage(iteration):
        return distiller(batch)


def student_features(distiller, batch, divisibility=32):
    """H-frame level -> map, without tap or view: the student's backbone on reduced, normalised, padded images."""
    shift, student = distiller.resolution.shift, distiller.student
    images = [downsample(item["image"], shift) for item in batch]
    padded = batch_images(images, student.pixel_mean, student.pixel_std, divisibility)
    return {f"p{int(name[1:]) + shift}": value for name, value in student.backbone(padded.tensor).items()}


def manual_l1(student, teacher, levels=LEVELS):
    total = 0.0
    for name in levels:
        s, t = student[name].detach().double(), teacher[name].double()
        h, w = s.shape[-2:]
        total += (s - t[..., :h, :w]).abs().sum().item() / s.numel()
    return total


@pytest.fixture
def make_teacher(tiny_model):
    return lambda *resolutions, **options: tiny_model(resolutions=list(resolutions), **options)


# --- the sum ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", ["H", "L", "EL"])
def test_losses_are_detection_plus_distillation(make_distiller, tiny_model, make_batch, resolution):
    shift = RESOLUTIONS[resolution].shift
    distiller = make_distiller(
        resolution, losses=[{"NAME": "AlignedL1", "WEIGHT": 0.6}], w_det=0.8, factor=lambda iteration: 0.25
    )
    plain = tiny_model(levels=range(3 - shift, 8 - shift), seed=1)
    batch = make_batch(SIZES)
    found = run(distiller, batch)
    with EventStorage(0):
        detection = plain(downsample_batch(batch, shift, "cpu"))
    assert list(found) == [*detection, "loss_distill/AlignedL1"]
    for name, value in detection.items():
        torch.testing.assert_close(found[name], 0.8 * value)
    teacher = distiller.teacher.model.neck_features(batch, shift)
    expected = 0.25 * 0.6 * manual_l1(student_features(distiller, batch), teacher)
    assert expected > 0.01
    assert found["loss_distill/AlignedL1"].item() == pytest.approx(expected, rel=1e-4)


def test_total_is_what_the_gradient_is_of(make_distiller, make_batch):
    """Gradients of w_det L_det + factor L_KD, each term by itself."""
    gradients = []
    for w_det, factor in ((0.5, 0.25), (1.0, 0.0), (0.0, 1.0)):
        distiller = make_distiller(w_det=w_det, factor=lambda iteration, factor=factor: factor)
        sum(run(distiller, make_batch(SIZES)).values()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in distiller.student.parameters()]))
    both, detection, distillation = gradients
    assert detection.norm() > 0 and distillation.norm() > 0
    torch.testing.assert_close(both, 0.5 * detection + 0.25 * distillation, rtol=1e-4, atol=1e-6)


def test_factor_follows_the_iteration(make_distiller, make_batch):
    factor = partial(distillation_factor, max_iter=100, warmup_iters=10, decay_from=0.5, decay_to=1.0)
    distiller = make_distiller(factor=factor)
    value = {i: run(distiller, make_batch(SIZES), i)["loss_distill/AlignedL1"].item() for i in (0, 5, 10, 50, 75, 99)}
    full = value[10]
    assert full > 0.01
    expected = {0: 0.0, 5: 0.5, 10: 1.0, 50: 1.0, 75: 0.5, 99: 0.02}
    assert value == pytest.approx({i: f * full for i, f in expected.items()}, rel=1e-4)


def test_several_losses_at_once(make_distiller, make_batch):
    distiller = make_distiller(
        losses=[
            {"NAME": "AlignedL1", "WEIGHT": 1.0, "LEVELS": ["p3"]},
            {"NAME": "AlignedL1", "WEIGHT": 2.0, "LEVELS": ["p4", "p7"]},
            {"NAME": "AlignedL1", "WEIGHT": 0.0},
        ]
    )
    batch = make_batch(SIZES)
    found = run(distiller, batch)
    student, teacher = student_features(distiller, batch), distiller.teacher.model.neck_features(batch, 1)
    values = [v.item() for name, v in found.items() if name.startswith("loss_distill")]
    expected = [manual_l1(student, teacher, ["p3"]), 2 * manual_l1(student, teacher, ["p4", "p7"]), 0.0]
    assert len(set(found)) == 6 and values == pytest.approx(expected, rel=1e-4)


def test_without_losses_it_is_the_student(make_distiller, tiny_model, make_batch):
    """The control of every comparison; also without any teacher."""
    batch = make_batch(SIZES)
    student, plain = (tiny_model(levels=range(2, 7), seed=1) for _ in range(2))
    control = Distiller(student, [], between([], {}, {}), RESOLUTIONS["L"], w_det=0.5)
    with EventStorage(0):
        expected = {k: 0.5 * v for k, v in plain(downsample_batch(batch, 1, "cpu")).items()}
    for distiller in (control.train(), make_distiller(losses=[], w_det=0.5)):
        torch.testing.assert_close(run(distiller, batch), expected)


def test_losses_need_a_teacher(make_distiller):
    distiller = make_distiller()
    with pytest.raises(ValueError, match=r"DISTILL\.TEACHERS is empty"):
        Distiller(distiller.student, [], distiller.losses, RESOLUTIONS["L"])


# --- batches ----------------------------------------------------------------------------------------------------------


def test_distillation_loss_does_not_grow_with_the_batch(make_distiller, make_batch):
    """Peers sum over the batch; two copies of an image must cost what one does."""
    distiller = make_distiller()
    distiller.student.eval()  # BatchNorm of the student out of the way
    neck, prepare = distiller.student.backbone, distiller.student.preprocess_image
    distiller.student.forward = lambda inputs: {"loss": 0 * neck(prepare(inputs).tensor)["p2"].sum()}
    image = make_batch([(64, 96)])
    one, two, four = (run(distiller, image * n)["loss_distill/AlignedL1"].item() for n in (1, 2, 4))
    assert one > 0.01
    assert two == pytest.approx(one, rel=1e-5) and four == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("boxes", [0, [0, 2]])
def test_images_without_objects(make_distiller, make_batch, boxes):
    distiller = make_distiller()
    losses = run(distiller, make_batch(SIZES, boxes=boxes))
    sum(losses.values()).backward()
    assert losses["loss_distill/AlignedL1"] > 0 and all(torch.isfinite(v) for v in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in distiller.student.parameters())


def test_inputs_are_not_modified(make_distiller, make_batch):
    batch, fresh = make_batch(SIZES), make_batch(SIZES)
    items = list(batch)
    run(make_distiller(), batch)
    for item, original, again in zip(batch, items, fresh):
        assert item is original and item.keys() == again.keys()
        assert item["image"].dtype == torch.uint8 and torch.equal(item["image"], again["image"])
        assert torch.equal(item["instances"].gt_boxes.tensor, again["instances"].gt_boxes.tensor)


def test_losses_see_the_batch_in_h_pixels(make_distiller, make_batch):
    distiller = make_distiller()
    seen = []
    distiller.losses[0].loss.register_forward_pre_hook(lambda _module, args: seen.append(args))
    batch = make_batch(SIZES)
    run(distiller, batch)
    ((student, teacher, info),) = seen
    assert info.image_sizes == SIZES
    assert all(a["instances"] is b["instances"] for a, b in zip(info.inputs, batch))
    assert {k: v.shape for k, v in student.items()} == {k: v.shape for k, v in teacher.items()}
    assert set(student) == set(LEVELS) and student["p3"].shape == (2, 8, 16, 16)


def test_reduced_images_are_made_as_configured(make_distiller, make_batch):
    for mode in ("antialias", "nearest"):
        distiller = make_distiller(downsample_mode=mode)
        seen = []
        distiller.student.register_forward_pre_hook(lambda _module, args, seen=seen: seen.extend(args[0]))
        batch = make_batch(SIZES)
        run(distiller, batch)
        for item, reduced in zip(batch, seen):
            assert torch.equal(reduced["image"], downsample(item["image"], 1, mode))
            assert torch.equal(reduced["instances"].gt_boxes.tensor, item["instances"].gt_boxes.tensor / 2)


# --- grids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", ["H", "L", "EL"])
@pytest.mark.parametrize("sizes", [[(160, 70)], [(33, 161), (70, 64)]])
def test_what_the_teacher_pads_beyond_the_student_is_cut_off(
    make_distiller, make_teacher, make_batch, resolution, sizes
):
    """A teacher with EL pads to 128, an L student to 64, an H student to 32."""
    distiller = make_distiller(resolution, teacher=make_teacher("H", "L", "EL"))
    batch = make_batch(sizes)
    found = run(distiller, batch)["loss_distill/AlignedL1"].item()
    student = student_features(distiller, batch)
    teacher = distiller.teacher.model.neck_features(batch)
    assert teacher["p3"].shape[-2:] == (32, 16) if sizes[0][0] == 160 else (16, 32)
    if resolution != "EL":
        assert student["p3"].shape[-2:] < teacher["p3"].shape[-2:]
    assert found == pytest.approx(manual_l1(student, teacher), rel=1e-4)


def test_a_teacher_without_the_students_resolution(make_distiller, make_teacher, tiny_model, make_batch):
    """An EL student needs H padded to 128, which an H&L teacher or a plain detector does not do by itself."""
    batch = make_batch([(65, 100), (80, 60)])
    for teacher in (make_teacher("H", "L"), make_teacher("H"), tiny_model()):
        distiller = make_distiller("EL", teacher=teacher)
        found = run(distiller, batch)["loss_distill/AlignedL1"].item()
        features = distiller.teacher.features(batch, 2)
        assert features["p3"].shape[-2:] == (16, 16)
        assert found == pytest.approx(manual_l1(student_features(distiller, batch), features), rel=1e-4)


def test_plain_detector_as_teacher(make_distiller, tiny_model, make_batch):
    """Its own pyramid of H, in evaluation mode."""
    distiller = make_distiller(teacher=tiny_model())
    batch = make_batch([(64, 128), (128, 64)])
    reference = tiny_model().eval()
    images = reference.preprocess_image(batch)
    expected = reference.backbone(images.tensor)
    found = distiller.teacher.features(batch, 1)
    assert list(found) == LEVELS and all(torch.equal(found[name], expected[name]) for name in LEVELS)


def test_student_that_needs_more_padding_than_the_teacher(make_distiller, make_batch):
    distiller = make_distiller()
    neck = distiller.student.backbone
    neck.__class__ = type("Wide", (type(neck),), {"size_divisibility": 128})
    with pytest.raises(ValueError, match=r"level p3.*\(1, 8, 8, 8\).*\(1, 8, 32, 32\).*STUDENT_RESOLUTION L"):
        run(distiller, make_batch([(64, 64)]))


# --- different detectors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("student_arch", "teacher_arch"), [("RetinaNet", "FCOS"), ("FCOS", "RetinaNet")])
def test_student_and_teacher_may_differ_in_kind(make_distiller, tiny_model, make_batch, student_arch, teacher_arch):
    student = tiny_model(student_arch, levels=range(2, 7), seed=1, MODEL__RESNETS__RES2_OUT_CHANNELS=6)
    distiller = make_distiller(student=student, teacher=tiny_model(teacher_arch, resolutions=["H", "L"]))
    batch = make_batch(SIZES)
    losses = run(distiller, batch)
    detection = {"RetinaNet": {"loss_cls", "loss_box_reg"}, "FCOS": {f"loss_fcos_{x}" for x in ("cls", "loc", "ctr")}}
    assert set(losses) == {*detection[student_arch], "loss_distill/AlignedL1"}
    teacher = distiller.teacher.model.neck_features(batch)
    expected = manual_l1(student_features(distiller, batch), teacher)
    assert losses["loss_distill/AlignedL1"].item() == pytest.approx(expected, rel=1e-4)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in student.parameters())


def test_light_head_student(make_distiller, tiny_model, make_batch):
    """Only necks must agree."""
    student = tiny_model(levels=range(2, 7), MODEL__FCOS__CONV_DIMS=[4])
    losses = run(make_distiller(student=student), make_batch(SIZES))
    assert losses["loss_distill/AlignedL1"] > 0


def test_shapes_are_given_in_the_h_frame(tiny_model, make_distiller):
    student = tiny_model(levels=range(2, 7))
    shapes = student_shapes(student, RESOLUTIONS["L"])
    assert {name: (s.channels, s.stride) for name, s in shapes.items()} == {f"p{i}": (8, 2**i) for i in range(3, 8)}
    distiller = make_distiller(student=student)
    assert distiller.teacher.shapes() == shapes
    shapes = student_shapes(student, RESOLUTIONS["EL"])
    assert {name: s.stride for name, s in shapes.items()} == {f"p{i}": 2**i for i in range(4, 9)}


def test_student_with_stock_levels_lacks_the_finest(make_distiller, tiny_model):
    """P3-P7 at L are P4-P8 of H."""
    with pytest.raises(ValueError, match=r"level p3 \(H frame\) does not exist in the student, which has .*'p4'.*'p8'"):
        make_distiller(student=tiny_model(), losses=[{"NAME": "AlignedL1", "LEVELS": ["p3", "p4"]}])


def test_student_of_another_width(make_distiller, tiny_model, make_batch):
    """Its maps go through 1x1 convolutions that are trained with it."""
    student = tiny_model(levels=range(2, 7), MODEL__FPN__OUT_CHANNELS=16)
    distiller = make_distiller(student=student)
    batch = make_batch(SIZES)
    losses = run(distiller, batch)
    layers = distiller.losses[0].adaptation
    assert list(layers) == LEVELS
    adapted = {name: layers[name](x) for name, x in student_features(distiller, batch).items()}
    expected = manual_l1(adapted, distiller.teacher.model.neck_features(batch))
    assert losses["loss_distill/AlignedL1"].item() == pytest.approx(expected, rel=1e-4)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in layers.parameters())
    with pytest.raises(ValueError, match=r"p3 .*: student has 16 channels, teacher 8; ADAPTATION: auto"):
        make_distiller(student=student, losses=[{"NAME": "AlignedL1", "ADAPTATION": "none"}])


@pytest.mark.parametrize("sizes", [SIZES, [(65, 100), (80, 60)]])
def test_levels_paired_by_index(make_distiller, tiny_model, make_batch, sizes):
    """A student with stock levels P3-P7 at L has P4-P8 of H; its i-th map is resized to the teacher's i-th."""
    losses = [{"NAME": "AlignedL1", "MATCH": "by_index"}]
    distiller = make_distiller(student=tiny_model(seed=1), losses=losses)
    batch = make_batch(sizes)
    found = run(distiller, batch)["loss_distill/AlignedL1"].item()
    assert distiller.losses[0].levels == LEVELS
    student = student_features(distiller, batch)
    teacher = distiller.teacher.features(batch, 1)
    height, width = (16 * side for side in student["p4"].shape[-2:])  # padded input in H pixels
    resized = {}
    for level in range(3, 8):
        size = (-(-height // 2**level), -(-width // 2**level))
        resized[f"p{level}"] = torch.nn.functional.interpolate(student[f"p{level + 1}"], size, mode="bilinear")
    assert found == pytest.approx(manual_l1(resized, teacher), rel=1e-4)


def test_student_without_a_common_level(make_distiller, tiny_model):
    student = tiny_model()
    student.head_in_features = ["p6", "p7"]
    with pytest.raises(ValueError, match=r"student levels {'p8': 256, 'p9': 512} and teacher levels .* none in"):
        make_distiller("EL", student=student)


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["FCOS", "RetinaNet"])
def test_autocast(make_distiller, tiny_model, make_batch, arch):
    """bf16 gives the losses of fp32 within its precision, and finite gradients."""
    expected = run(make_distiller(student=tiny_model(arch, levels=range(2, 7), seed=1)), make_batch(SIZES))
    distiller = make_distiller(student=tiny_model(arch, levels=range(2, 7), seed=1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(distiller, make_batch(SIZES))
    sum(found.values()).backward()
    torch.testing.assert_close({k: v.float() for k, v in found.items()}, expected, rtol=0.1, atol=0.02)
    assert all(torch.isfinite(p.grad).all() for p in distiller.student.parameters())


def test_teacher_rests_when_distillation_is_over(make_distiller, make_batch, monkeypatch):
    distiller = make_distiller(factor=lambda iteration: 0.0)
    calls = []
    features = distiller.teacher.features
    monkeypatch.setattr(distiller.teacher, "features", lambda *args: calls.append(1) or features(*args))
    for iteration, runs in ((0, 1), (7, 0)):  # at the first iteration mistakes must still surface
        calls.clear()
        losses = run(distiller, make_batch(SIZES), iteration)
        assert len(calls) == runs
        assert any(name.startswith("loss_distill") for name in losses) == bool(runs)


def test_resting_losses_leave_gradients_of_zero(make_distiller, make_batch, monkeypatch):
    """Losses with parameters rest, too, and DistributedDataParallel gets a gradient of each."""
    losses = [{"NAME": "MGD"}, {"NAME": "AlignedL1", "ADAPTATION": "always"}]
    distiller = make_distiller(losses=losses, factor=lambda i: 0.0 if i < 3 else 1.0)
    plain = make_distiller(losses=(), student=copy.deepcopy(distiller.student))
    calls = []
    monkeypatch.setattr(distiller.teacher, "features", lambda *_: calls.append(1))
    batch = make_batch(SIZES)
    with EventStorage(2):
        losses, expected = distiller(batch), plain(batch)
    assert not calls and losses == expected
    sum(losses.values()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in distiller.losses.parameters())
    assert any(p.grad.any() for p in distiller.student.parameters() if p.grad is not None)


def test_images_are_reduced_once_a_step(make_distiller, make_batch, monkeypatch):
    """The teacher's L branch takes what was made for the L student, and nothing else if it reduces otherwise."""
    distiller, batch, calls = make_distiller("L"), make_batch([(64, 96), (64, 96)]), []
    original = resolution.downsample
    monkeypatch.setattr(resolution, "downsample", lambda x, k, mode: calls.append(k) or original(x, k, mode))
    with EventStorage(0):
        shared = distiller(batch)["loss_distill/AlignedL1"]
        assert sorted(calls) == [0, 0, 1, 1]
        distiller.teacher.model.downsample_mode = "nearest"
        calls.clear()
        assert distiller(batch)["loss_distill/AlignedL1"] != shared and sorted(calls) == [0, 0, 1, 1, 1, 1]
    assert "downsampled_images" not in batch[0]


def test_a_step_is_gone_when_its_losses_are(make_distiller, tiny_model, make_batch):
    """Without the cycle collector, which on a GPU comes too late: a step holds maps of all networks."""
    teacher, student = tiny_model("RetinaNet"), tiny_model("RetinaNet", levels=range(2, 7), seed=1)
    distiller = make_distiller(teacher=teacher, student=student, losses=[{"NAME": "Chen"}, {"NAME": "AlignedL1"}])
    seen = []
    distiller.on_context.append(lambda context: seen.append(weakref.ref(context)))
    gc.disable()
    try:
        with EventStorage():
            sum(distiller(make_batch([(64, 64)] * 2)).values()).backward()
        assert seen[0]() is None
    finally:
        gc.enable()
