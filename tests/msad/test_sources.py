"""Several teachers, teachers at other scales, means of teachers, and taps other than the neck."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.utils.events import EventStorage
from helpers import make_context

from msad import load_config
from msad.distill.distiller import Distiller, student_shapes
from msad.distill.losses import build_losses
from msad.distill.losses.pairing import crop_to_common
from msad.distill.teachers import Ensemble, FrozenTeacher
from msad.engine.build import teacher_entries
from msad.modeling.adapters import adapt
from msad.modeling.features import run_neck
from msad.resolution import RESOLUTIONS, batch_images

SIZES = [(96, 128), (80, 100)]


def make(student, teachers, entries, resolution="L", ensembles=()):
    """A Distiller of ``entries`` under several teachers."""
    resolution = RESOLUTIONS[resolution]
    shapes = {teacher.name: teacher.shapes for teacher in teachers}
    of = {ensemble.name: ensemble.shapes({n: s() for n, s in shapes.items()}) for ensemble in ensembles}
    shapes |= {name: lambda tap, found=found: found for name, found in of.items()}
    members = [member for ensemble in ensembles for member in ensemble.members]
    default = [name for name in shapes if name not in members]
    losses = build_losses(
        entries, lambda tap="neck": student_shapes(student, resolution, tap), shapes, default=default
    )
    return Distiller(student, teachers, losses, resolution, ensembles=ensembles).train()


def l_student(tiny_model, **options):
    return tiny_model(levels=range(2, 7), seed=1, **options)


def step(distiller, batch):
    with EventStorage(0):
        return distiller(batch)


def test_losses_of_several_teachers_add_up(tiny_model, make_batch):
    student, batch = l_student(tiny_model), make_batch(SIZES)
    a, b = (FrozenTeacher(tiny_model(seed=seed), name=name) for seed, name in ((2, "a"), (3, "b")))
    both = step(make(student, [a, b], [{"NAME": "AlignedL1"}]), batch)
    alone = [step(make(student, [teacher], [{"NAME": "AlignedL1"}]), batch) for teacher in (a, b)]
    for name, found in zip("ab", alone):
        torch.testing.assert_close(both[f"loss_distill/AlignedL1@{name}"], found["loss_distill/AlignedL1"])
    assert {name for name in both if "distill" in name} == {"loss_distill/AlignedL1@a", "loss_distill/AlignedL1@b"}


def test_an_entry_may_name_its_source(tiny_model, make_batch):
    a, b = (FrozenTeacher(tiny_model(seed=seed), name=name) for seed, name in ((2, "a"), (3, "b")))
    entries = [{"NAME": "AlignedL1", "SOURCE": "b"}, {"NAME": "FitNet", "SOURCE": ["b"]}]
    distiller = make(l_student(tiny_model), [a, b], entries)
    a.features = None  # nothing reads it, so it must not run
    found = step(distiller, make_batch(SIZES))
    assert {"loss_distill/AlignedL1@b", "loss_distill/FitNet@b"} < set(found)
    with pytest.raises(ValueError, match=r"AlignedL1: SOURCE 'c' is none of the names .*\(a, b\)"):
        make(l_student(tiny_model), [a, b], [{"NAME": "AlignedL1", "SOURCE": "c"}])


def test_mean_of_teachers(tiny_model, make_batch):
    student, batch = l_student(tiny_model), make_batch(SIZES)
    a, b = (FrozenTeacher(tiny_model(seed=seed), name=name) for seed, name in ((2, "a"), (3, "b")))
    distiller = make(student, [a, b], [{"NAME": "NaiveL2"}], ensembles=[Ensemble("mean", ["a", "b"], [3, 1])])
    seen = []
    distiller.on_context.append(seen.append)
    found = step(distiller, batch)
    (context,) = seen
    for level, mean in context.sources["mean"].items():
        expected = 0.75 * context.sources["a"][level] + 0.25 * context.sources["b"][level]
        torch.testing.assert_close(mean, expected)
    assert [name for name in found if "distill" in name] == ["loss_distill/NaiveL2@mean"]


def test_means_need_equal_shapes(tiny_model):
    a, b = FrozenTeacher(tiny_model(), name="a"), FrozenTeacher(tiny_model(), name="b", scale=0.5)
    with pytest.raises(ValueError, match="mean m needs equal levels, channels and strides"):
        Ensemble("m", ["a", "b"]).shapes({"a": a.shapes(), "b": b.shapes()})
    with pytest.raises(ValueError, match="MEAN_OF needs two names or more"):
        Ensemble("m", ["a"])
    for weights in ([0, 0], [2, -1]):
        with pytest.raises(ValueError, match="as many WEIGHTS_OF, not negative and not all 0, got"):
            Ensemble("m", ["a", "b"], weights)
    assert Ensemble("m", ["a", "b"], [2, 0]).weights == [1, 0]


# --- scale ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_a_teacher_at_a_power_of_two_is_aligned(tiny_model, make_batch, scale):
    """Its levels are renamed, its strides are those of the H frame, and its grids are the student's."""
    teacher = FrozenTeacher(tiny_model(levels=range(3, 8)), name="t", scale=scale)
    move = {0.5: 1, 2.0: -1}[scale]
    assert {name: shape.stride for name, shape in teacher.shapes().items()} == {
        f"p{level + move}": 2 ** (level + move) for level in range(3, 8)
    }
    distiller = make(l_student(tiny_model), [teacher], [{"NAME": "AlignedL1"}])
    seen = []
    distiller.on_context.append(seen.append)
    step(distiller, make_batch(SIZES))
    (context,) = seen
    common = context.student.keys() & context.sources["t"].keys()
    assert len(common) == 4
    for name in common:
        assert context.student[name].shape == context.sources["t"][name].shape


@pytest.mark.parametrize("scale", [0.5, 0.75, 1.0])
def test_a_quarter_size_student_under_teachers_of_any_scale(tiny_model, make_batch, scale):
    """Table 13 of the progressive paper: each level of the student, resized to its partner's grid, by hand."""
    teacher = FrozenTeacher(tiny_model(seed=4), name="t", scale=scale)
    student = tiny_model(levels=range(3, 8), seed=1)  # stock levels, on a quarter of the image
    distiller = make(student, [teacher], [{"NAME": "NaiveL2", "MATCH": "by_index", "WEIGHT": 1.0}], "EL")
    seen = []
    distiller.on_context.append(seen.append)
    found = step(distiller, make_batch([(96, 128)] * 2))["loss_distill/NaiveL2"]
    (context,) = seen
    total = 0.0
    for own, level in zip(context.student, teacher.adapter.levels):
        t = list(context.sources["t"].values())[teacher.adapter.levels.index(level)]
        s_stride, t_stride = 2 ** int(own[1:]), 2 ** int(level[1:]) / scale
        s, t = crop_to_common(context.student[own], t, (s_stride, t_stride))
        total += F.mse_loss(F.interpolate(s, size=t.shape[-2:], mode="bilinear", align_corners=False), t)
    assert found.item() == pytest.approx(total.item(), rel=1e-4)


def test_levels_that_cannot_be_aligned_are_an_error(tiny_model):
    teacher = FrozenTeacher(tiny_model(), name="t", scale=0.75)
    with pytest.raises(ValueError, match=r"student has stride \d+, teacher [\d.]+; MATCH: by_index"):
        make(l_student(tiny_model), [teacher], [{"NAME": "AlignedL1"}])


@pytest.mark.parametrize(("size", "small"), [((96, 128), (72, 96)), ((97, 130), (73, 98))])  # 72.75, 97.5
def test_what_a_scaled_teacher_sees(tiny_model, make_batch, size, small):
    """Its features are those of the image resized by hand, to the nearest whole pixels."""
    model, (item,) = tiny_model(seed=2).eval(), make_batch([size])
    found = FrozenTeacher(model, scale=0.75).features([item], 0)
    small = F.interpolate(item["image"][None].float(), size=small, mode="bilinear", antialias=True)
    images = batch_images(list(small), model.pixel_mean, model.pixel_std, 32)
    with torch.no_grad():
        expected = run_neck(model.backbone, images.tensor, adapt(model).levels)
    for level in expected:
        torch.testing.assert_close(found[level], expected[level])


@pytest.mark.parametrize("scale", [0, -1.0, float("inf"), float("nan")])
def test_impossible_scales(tiny_model, scale):
    with pytest.raises(ValueError, match="SCALE must be above 0"):
        FrozenTeacher(tiny_model(), scale=scale)


def test_predictions_of_a_scaled_teacher_are_not_compared(tiny_model):
    teacher = FrozenTeacher(tiny_model(), name="t", scale=0.5)
    with pytest.raises(ValueError, match="Chen compares predictions, which only a teacher of SCALE 1 has, not 't'"):
        make(l_student(tiny_model), [teacher], [{"NAME": "Chen"}])


@pytest.mark.parametrize(
    ("entry", "message"),
    [({"SCALE": "half"}, "SCALE must be a number, not 'half'"), ({"WEIGHTS": 3}, "WEIGHTS must be a text, not 3"),
     ({"MEAN_OF": "abc"}, "MEAN_OF must be a list, not 'abc'"),
     ({"MEAN_OF": ["a", "b"], "WEIGHTS_OF": [1, "x"]}, "WEIGHTS_OF must be a list, each of it a number")],
)  # fmt: skip
def test_values_of_another_kind_are_named(entry, message):
    common = {} if "MEAN_OF" in entry else {"CONFIG": "a.yaml", "WEIGHTS": "a.pth"}
    cfg = load_config("", ["DISTILL.TEACHERS", [{**common, **entry}]])
    with pytest.raises(ValueError, match=rf"^DISTILL.TEACHERS\[0\]: {message}"):
        teacher_entries(cfg)


# --- taps -------------------------------------------------------------------------------------------------------------


def test_bottom_up_features_are_compared_where_strides_agree(tiny_model, make_batch):
    """res4 of half the image lies on the grid of res5 of the whole one."""
    teacher, student = FrozenTeacher(tiny_model(seed=2), name="t"), l_student(tiny_model)
    entry = {"NAME": "NaiveL2", "TAP": "bottom_up", "LEVELS": ["res5"], "WEIGHT": 1.0}
    distiller = make(student, [teacher], [entry])
    (pair,) = distiller.losses[0].pairs
    assert (pair.student, pair.teacher, pair.strides) == ("res4", "res5", (32, 32))
    seen = []
    distiller.on_context.append(seen.append)
    found = step(distiller, make_batch(SIZES))["loss_distill/NaiveL2"]
    (context,) = seen
    s, t = context.taps["bottom_up"]["student"]["res4"], context.taps["bottom_up"]["t"]["res5"]
    s = distiller.losses[0].adaptation["res5"](s)
    assert found.item() == pytest.approx(F.mse_loss(s, t[..., : s.shape[-2], : s.shape[-1]]).item(), rel=1e-5)
    found.backward()
    assert student.backbone.bottom_up.res4[0].conv1.weight.grad.abs().sum() > 0
    assert not student.backbone._forward_hooks and not student.backbone.bottom_up._forward_hooks


def test_tapped_maps_are_cut_where_strides_agree():
    """The teacher's image is padded further, so that its map of equal stride is larger."""
    shapes = {"res5": ShapeSpec(channels=2, stride=32)}
    (loss,) = build_losses([{"NAME": "NaiveL2", "TAP": "bottom_up"}], lambda tap: shapes, {"t": lambda tap: shapes})
    s, t = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 4, 6)
    context = make_context([(96, 128)], taps={"bottom_up": {"student": {"res5": s}, "t": {"res5": t}}})
    found = loss(context)["loss_distill/NaiveL2"]
    torch.testing.assert_close(found, loss.weight * F.mse_loss(s, t[..., :3, :4]))


def test_the_h_branch_of_a_multi_resolution_teacher_is_tapped(tiny_model, make_batch):
    model = tiny_model(resolutions=["H", "L"], seed=2)
    teacher = FrozenTeacher(model, name="t")
    entry = {"NAME": "NaiveL2", "TAP": "bottom_up", "LEVELS": ["res5"], "MATCH": "by_index"}
    distiller, batch, seen = make(l_student(tiny_model), [teacher], [entry]), make_batch(SIZES), []
    distiller.on_context.append(seen.append)
    step(distiller, batch)
    images = model.branch_images(batch, model.resolutions[0], 1)
    with torch.no_grad():
        expected = model.detector.backbone.bottom_up(images.tensor)["res5"]
    torch.testing.assert_close(seen[0].taps["bottom_up"]["t"]["res5"], expected)


def test_unknown_taps(tiny_model):
    teacher = FrozenTeacher(tiny_model(), name="t")
    with pytest.raises(ValueError, match=r"TAP must be one of neck, bottom_up.*, not 'stem'"):
        make(l_student(tiny_model), [teacher], [{"NAME": "NaiveL2", "TAP": "stem"}])
    with pytest.raises(ValueError, match="Chen compares predictions and takes no TAP"):
        make(l_student(tiny_model), [teacher], [{"NAME": "Chen", "TAP": "bottom_up"}])


@pytest.mark.parametrize(
    ("sizes", "strides", "expected"),
    [
        (((6, 8), (12, 16)), (16, 8), ((6, 8), (12, 16))),  # equal areas stay whole
        (((4, 4), (12, 12)), (16, 8), ((4, 4), (8, 8))),  # the teacher is padded further
        (((8, 8), (12, 12)), (32, 32 / 3), ((4, 4), (12, 12))),  # the student is
    ],
)
def test_common_area(sizes, strides, expected):
    maps = [torch.zeros(1, 1, *size) for size in sizes]
    assert tuple(tuple(x.shape[-2:]) for x in crop_to_common(*maps, strides)) == expected
