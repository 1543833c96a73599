"""What every feature loss must do: gradients, batches, empty ground truth, precision, other channels, other sizes."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from helpers import between, evaluate, make_context

from msad.distill.losses import DISTILL_LOSS_REGISTRY
from msad.distill.losses.fkd import NonLocal

ALL = ["AlignedL1", "FitNet", "CWD", "FKD", "FGD", "MGD", "PKD"]
ALL += ["NaiveL2", "MagnitudeMD", "LAD", "PAD", "CAD", "Angular", "SDF"]
OPTIONS = {  # weights at which every term counts for maps as small as these
    "FGD": {"ALPHA": 1.0, "BETA": 1.0, "GAMMA": 0.1, "LAM": 0.1},
    "FKD": {"ALPHA": 0.1, "BETA": 1.0, "TEMPERATURE": 0.5},
    "MGD": {"WEIGHT": 0.01},
    "SDF": {"WEIGHT": 1.0, "EMBEDDING": 2},
}
SIZES = {"p3": (4, 3), "p4": (2, 2)}


def maps(channels=4, n=2, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(n, channels, *size, generator=generator, dtype=dtype) for k, size in SIZES.items()}


def build(name, student=4, teacher=4, **options):
    def shapes(channels):
        return {k: ShapeSpec(channels=channels, stride=2 ** int(k[1:])) for k in SIZES}

    (loss,) = between([{"NAME": name, **OPTIONS.get(name, {}), **options}], shapes(student), shapes(teacher))
    with torch.no_grad():  # what begins at zero hides what it scales
        for p in loss.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return loss


def batch(n=2, boxes=((2.0, 3.0, 15.0, 20.0), (8.0, 8.0, 24.0, 32.0))):
    gt = Instances((32, 24))
    gt.gt_boxes = Boxes(torch.tensor(boxes).view(-1, 4))
    return make_context([(32, 24)] * n, [gt] * n)


def total(loss, student, teacher, info=None):
    torch.manual_seed(0)  # of masks
    return sum(evaluate(loss, student, teacher, info or batch(len(student["p3"]))).values())


def test_the_list_is_complete():
    ours = {name: cls for name, cls in DISTILL_LOSS_REGISTRY if cls.__module__.startswith("msad.")}
    assert {name for name, cls in ours.items() if not getattr(cls, "heads", ())} == set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_gradient(name, monkeypatch):
    """Of the student's maps, by finite differences; none reaches the teacher's."""
    loss = build(name).double()
    student, teacher = maps(dtype=torch.float64, seed=1), maps(dtype=torch.float64, seed=2)
    if name == "FKD":  # its attention weighs and is not itself trained
        weights = {s.shape: s.abs() for s in student.values()}
        monkeypatch.setattr(loss.loss, "_weights", lambda _channels, s, _t: weights[s.shape])
    names = list(student)

    def value(*tensors):
        return total(loss, dict(zip(names, tensors)), teacher)

    assert torch.autograd.gradcheck(value, [x.requires_grad_() for x in student.values()])
    value(*student.values()).backward()
    assert all(x.grad.abs().max() > 0 for x in student.values())
    assert all(p.grad is not None for p in loss.parameters() if p.requires_grad)
    assert not any(x.requires_grad for x in teacher.values())


@pytest.mark.parametrize("name", sorted(set(ALL) - {"MGD", "FKD", "FGD", "SDF"}))
def test_zero_at_identical_maps(name):
    assert total(build(name), maps(), maps()).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_two_copies_of_an_image(name):
    """Cost what one does, except for FKD (sqrt 2, as documented) and PKD ((n - 1) / n of n cells)."""
    options = {"MASK_RATIO": 0.0} if name == "MGD" else {}  # masks differ between copies
    loss = build(name, **options)
    if name == "PKD":
        loss.pairs = loss.pairs[:1]
    one_s, one_t = maps(n=1, seed=1), maps(n=1, seed=2)
    two_s, two_t = ({k: torch.cat([v, v]) for k, v in x.items()} for x in (one_s, one_t))
    factor = {"FKD": 2**0.5, "PKD": (23 / 24) / (11 / 12)}.get(name, 1.0)
    assert total(loss, two_s, two_t).item() == pytest.approx(factor * total(loss, one_s, one_t).item(), rel=1e-5)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("mode", ["batch of objects", "no objects", "one cell"])
def test_extreme_batches(name, mode):
    loss = build(name, **({"GT_ONLY": True} if name == "FitNet" else {}))
    student, teacher = maps(seed=1), maps(seed=2)
    info = batch(boxes=()) if mode == "no objects" else batch()
    if mode == "one cell":  # P7 of a small image, one image a process
        student, teacher = ({k: v[:1, :, :1, :1] for k, v in x.items()} for x in (student, teacher))
        info = batch(1)
    for x in student.values():
        x.requires_grad_()
    value = total(loss, student, teacher, info)
    value.backward()
    assert value.isfinite() and all(x.grad.isfinite().all() for x in student.values())
    assert all(p.grad.isfinite().all() for p in loss.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(name, dtype):
    """Half precision maps under autocast: float32 results close to those of float32 maps."""
    loss = build(name, student=6)
    student, teacher = maps(6, seed=1), maps(seed=2)
    expected = total(loss, student, teacher)
    student, teacher = ({k: 1 * v.to(dtype) for k, v in x.items()} for x in (student, teacher))
    for x in student.values():
        x.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        found = total(loss, student, teacher)
    found.backward()
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected.item(), rel=0.05)
    assert all(x.grad.isfinite().all() for x in student.values())


@pytest.mark.parametrize("name", ALL)
def test_large_half_precision_maps_do_not_overflow(name):
    """Sums of squares of activations around 100 exceed float16's largest number, 65504."""
    loss = build(name, **{"FGD": {"LAM": 0.0}, "MGD": {"MASK_RATIO": 0.0}}.get(name, {}))
    student, teacher = ({k: (100 * v).half() for k, v in maps(seed=i).items()} for i in (1, 2))
    with torch.autocast("cpu", dtype=torch.float16):
        assert total(loss, student, teacher).isfinite()


@pytest.mark.parametrize("scale", [10, 100])
def test_non_local_products_do_not_overflow_float16(scale):
    """Queries, keys and values of a wide map multiply to far more than 65504."""
    block = NonLocal(256, 64, 2)
    torch.nn.init.ones_(block.norm.weight)
    x = (scale * (torch.randn(1, 256, 12, 12) + 1)).half().float()
    expected = block(x)
    half = x.half().requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16):
        found = block(half)
    found.square().mean().backward()
    assert found.dtype == torch.float32 and half.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in block.parameters())
    added, wanted = (y.detach() - x for y in (found, expected))
    assert (added - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("resolution", "match"), [("L", "by_stride"), ("H", "by_stride"), ("L", "by_index")])
def test_in_a_step_of_distillation(make_distiller, tiny_model, make_batch, name, resolution, match):
    """A student of half the channels, at L and at H, against a multi-resolution teacher; images of different sizes."""
    shift = 1 if (resolution, match) == ("L", "by_stride") else 0
    student = tiny_model(levels=range(3 - shift, 8 - shift), seed=1, MODEL__FPN__OUT_CHANNELS=4)
    distiller = make_distiller(
        resolution, student=student, losses=[{"NAME": name, "MATCH": match, **OPTIONS.get(name, {})}]
    )
    with EventStorage(0):
        losses = distiller(make_batch([(64, 96), (90, 128)], boxes=[2, 0]))
    distillation = [v for k, v in losses.items() if k.startswith(f"loss_distill/{name}")]
    assert distillation and all(v.isfinite() for v in losses.values()) and sum(distillation) > 0
    sum(losses.values()).backward()
    trained = [p for p in distiller.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    of_losses = [p for p in distiller.losses.parameters() if p.requires_grad]
    assert len(trained) == len(list(student.parameters())) + len(of_losses)


@pytest.mark.parametrize("name", ["MGD", "FKD", "FGD"])
def test_channels_differ(name):
    """Generators and contexts work on the teacher's channels."""
    loss = build(name, student=6)
    assert set(loss.adaptation) == (set() if name == "FKD" else set(SIZES))
    assert total(loss, maps(6, seed=1), maps(seed=2)) > 0
