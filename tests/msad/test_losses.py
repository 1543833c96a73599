"""AlignedL1 against NumPy, and how entries of DISTILL.LOSSES become losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from helpers import between, evaluate, make_context
from torch import nn

from msad.distill.losses import DISTILL_LOSS_REGISTRY
from msad.distill.losses.aligned import AlignedL1, standardise

H, W = 64, 96
SIZES = [(64, 96), (40, 50)]
BATCH = make_context(image_sizes=SIZES, gt=[])


def maps(levels=(3, 4, 5), n=2, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = {f"p{i}": (n, 4, -(-H // 2**i), -(-W // 2**i)) for i in levels}
    return {name: torch.randn(size, generator=generator, dtype=dtype) for name, size in sizes.items()}


def shapes(levels=range(3, 8), channels=4, base=1):
    return {f"p{i}": ShapeSpec(channels=channels, stride=base * 2**i) for i in levels}


def aligned(levels, **options):
    return AlignedL1(list(levels), {name: 2 ** int(name[1:]) for name in levels}, **options)


def numpy_l1(student, teacher, normalize=False, sizes=None):
    total = 0.0
    for name in student:
        stride, (rows, cols) = 2 ** int(name[1:]), student[name].shape[-2:]
        ends = [(-(-h // stride), -(-w // stride)) for h, w in sizes] if sizes else [(rows, cols)] * len(student[name])
        s, t = ([image[:, :h, :w] for image, (h, w) in zip(x[name].double().numpy(), ends)] for x in (student, teacher))
        if normalize:
            for side in (s, t):
                every = np.concatenate([crop.reshape(len(crop), -1) for crop in side], axis=1)
                mean, deviation = every.mean(1), np.sqrt(every.var(1) + 1e-6)
                side[:] = [(crop - mean[:, None, None]) / deviation[:, None, None] for crop in side]
        total += np.mean([np.abs(a - b).mean() for a, b in zip(s, t)])
    return total


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mask_padding", [False, True])
def test_aligned_l1_equals_numpy(normalize, mask_padding):
    student, teacher = maps(seed=1), maps(seed=2)
    loss = aligned(student, normalize=normalize, mask_padding=mask_padding)
    (value,) = loss(student, teacher, BATCH).values()
    assert value.shape == ()
    expected = numpy_l1(student, teacher, normalize, SIZES if mask_padding else None)
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_hand_value():
    """Levels are summed, elements averaged: |1| + mean(|0|, |2|)."""
    student = {"p3": torch.zeros(1, 1, 2, 2), "p4": torch.zeros(1, 1, 1, 2)}
    teacher = {"p3": torch.ones(1, 1, 2, 2), "p4": torch.tensor([[[[0.0, 2.0]]]])}
    assert aligned(["p3", "p4"])(student, teacher, BATCH)["l1"].item() == 2.0


def test_released_value():
    """0.6 sum_l mean |S - T| is alpha T^2 mean |S / T - T / T| with alpha 0.2 and T 3."""
    student, teacher = maps(seed=1), maps(seed=2)
    released = sum((0.2 * 9 * (student[k] / 3 - teacher[k] / 3).abs().mean()).item() for k in student)
    (loss,) = between([{"NAME": "AlignedL1", "WEIGHT": 0.6}], shapes((3, 4, 5)), shapes((3, 4, 5)))
    assert evaluate(loss, student, teacher, BATCH)["loss_distill/AlignedL1"].item() == pytest.approx(released, rel=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mask_padding", [False, True])
def test_identical_features_cost_nothing(normalize, mask_padding):
    student = maps()
    loss = aligned(student, normalize=normalize, mask_padding=mask_padding)
    assert loss(student, {k: v.clone() for k, v in student.items()}, BATCH)["l1"].item() == 0.0


def test_normalised_loss_ignores_scale_and_offset():
    student, teacher = maps(seed=1), maps(seed=2)
    scaled = {k: 100 * v + 7 for k, v in teacher.items()}
    plain, normal = aligned(student), aligned(student, normalize=True)
    torch.testing.assert_close(normal(student, scaled, BATCH), normal(student, teacher, BATCH), rtol=1e-4, atol=0)
    assert plain(student, scaled, BATCH)["l1"] > 20 * plain(student, teacher, BATCH)["l1"]


def test_standardised_maps():
    x = 3 * torch.randn(2, 4, 5, 6) + torch.arange(4.0).view(4, 1, 1)
    z = standardise(x)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.var((0, 2, 3), correction=0), torch.ones(4), rtol=1e-4, atol=0)
    assert torch.isfinite(standardise(torch.full((1, 2, 3, 3), 5.0))).all(), "a constant channel"
    assert standardise(x.half()).dtype == torch.float32 and standardise(x.double()).dtype == torch.float64


@pytest.mark.parametrize("normalize", [False, True])
def test_padding_counts_only_if_not_masked(normalize):
    student, teacher = maps(seed=1), maps(seed=2)
    spoilt = {k: v.clone() for k, v in student.items()}
    for name, value in spoilt.items():
        stride = 2 ** int(name[1:])
        value[1, :, -(-40 // stride) :] = 50.0
        value[1, :, :, -(-50 // stride) :] = 50.0
    masked, plain = (aligned(student, normalize=normalize, mask_padding=m) for m in (True, False))
    torch.testing.assert_close(masked(spoilt, teacher, BATCH), masked(student, teacher, BATCH))
    assert abs(plain(spoilt, teacher, BATCH)["l1"] / plain(student, teacher, BATCH)["l1"] - 1) > 0.01


@pytest.mark.parametrize(
    ("name", "stride", "size", "rows"),
    [("p3", 8 / 1.5, 96, 18), ("p3", 8 / 0.75, 96, 9), ("res5", 32, 90, 3), ("p3", 8 / 1.5, 50, 10)],
)
def test_padding_begins_where_the_grid_says(name, stride, size, rows):
    """Levels of a teacher whose SCALE is no power of two, and of the bottom-up, have no stride in their names."""
    loss = AlignedL1([name], {name: stride}, mask_padding=True)
    student = {name: torch.zeros(1, 2, 20, 20)}
    context = make_context([(size, size)], [])
    for last, expected in ((rows - 1, 1 / rows), (rows, 0.0)):  # the last row of the image, the first of its padding
        teacher = {name: torch.zeros(1, 2, 20, 20)}
        teacher[name][..., last, :] = 1.0
        assert loss(student, teacher, context)["l1"].item() == pytest.approx(expected)


@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"mask_padding": True}])
def test_batch_of_copies_costs_what_one_image_does(options):
    one_s, one_t = maps(n=1, seed=1), maps(n=1, seed=2)
    two_s, two_t = ({k: torch.cat([v, v]) for k, v in x.items()} for x in (one_s, one_t))
    loss = aligned(one_s, **options)
    one = loss(one_s, one_t, make_context([SIZES[1]], []))["l1"]
    two = loss(two_s, two_t, make_context([SIZES[1]] * 2, []))["l1"]
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"mask_padding": True}])
def test_gradient(options):
    student, teacher = maps((4, 5), dtype=torch.float64, seed=1), maps((4, 5), dtype=torch.float64, seed=2)
    names = list(student)
    loss = aligned(names, **options)

    def value(*tensors):
        return loss(dict(zip(names, tensors)), teacher, BATCH)["l1"]

    assert torch.autograd.gradcheck(value, [x.requires_grad_() for x in student.values()])
    value(*student.values()).backward()
    assert all(v.grad is None for v in teacher.values())
    if not options:  # d/dS mean |S - T| = sign(S - T) / number of elements
        expected = (student["p4"] - teacher["p4"]).detach().sign() / student["p4"].numel()
        torch.testing.assert_close(student["p4"].grad, expected)


def test_half_precision_features():
    student, teacher = maps(seed=1), maps(seed=2)
    expected = aligned(student, mask_padding=True)(student, teacher, BATCH)["l1"]
    student, teacher = ({k: v.bfloat16() for k, v in x.items()} for x in (student, teacher))
    found = aligned(student, mask_padding=True)(student, teacher, BATCH)["l1"]
    assert found.item() == pytest.approx(expected.item(), rel=0.02)


# --- from DISTILL.LOSSES to losses ------------------------------------------------------------------------------------


@pytest.fixture
def two_terms():
    """A registered loss with two terms and a parameter."""

    class TwoTerms(nn.Module):
        def __init__(self, levels, gain=1.0):
            super().__init__()
            self.levels = levels
            self.gain = nn.Parameter(torch.tensor(float(gain)))

        def forward(self, student, teacher, batch):
            assert list(student) == list(teacher) == self.levels
            return {"a": self.gain * len(student), "b": 0 * self.gain}

    DISTILL_LOSS_REGISTRY.register(TwoTerms)
    yield TwoTerms
    DISTILL_LOSS_REGISTRY._obj_map.pop("TwoTerms")


def test_entry_becomes_a_weighted_loss():
    entry = {"NAME": "AlignedL1", "WEIGHT": 0.5, "LEVELS": ["p4", "p5"], "NORMALIZE": True}
    (loss,) = between([entry], shapes(), shapes())
    assert (loss.name, loss.weight, loss.levels) == ("AlignedL1", 0.5, ["p4", "p5"])
    assert isinstance(loss.loss, AlignedL1) and loss.loss.normalize and not loss.loss.mask_padding
    student, teacher = maps(range(3, 8), seed=1), maps(range(3, 8), seed=2)
    expected = 0.5 * numpy_l1({k: student[k] for k in ("p4", "p5")}, teacher, normalize=True)
    assert evaluate(loss, student, teacher, BATCH)["loss_distill/AlignedL1"].item() == pytest.approx(expected, rel=1e-5)
    assert entry == {"NAME": "AlignedL1", "WEIGHT": 0.5, "LEVELS": ["p4", "p5"], "NORMALIZE": True}


def test_defaults_are_weight_one_and_all_common_levels():
    """A student at L with stock levels P3-P7 has P4-P8 of H."""
    (loss,) = between([{"NAME": "AlignedL1"}], shapes(range(4, 9)), shapes(range(3, 8)))
    assert loss.weight == 1.0 and loss.levels == ["p4", "p5", "p6", "p7"]


def test_no_entries_no_losses():
    assert len(between([], shapes(), shapes())) == 0


def test_terms_are_named_and_weighted(two_terms):
    (loss,) = between([{"NAME": "TwoTerms", "WEIGHT": 2, "GAIN": 3.0, "LEVELS": ["p3", "p4"]}], shapes(), shapes())
    found = evaluate(loss, maps(range(3, 8)), maps(range(3, 8)), BATCH)
    assert {k: v.item() for k, v in found.items()} == {"loss_distill/TwoTerms/a": 12.0, "loss_distill/TwoTerms/b": 0.0}
    assert [name for name, _ in loss.named_parameters()] == ["loss.gain"]


def test_names_stay_apart(two_terms):
    entries = [{"NAME": n} for n in ("AlignedL1", "TwoTerms", "AlignedL1", "AlignedL1")]
    losses = between(entries, shapes(), shapes())
    assert [loss.name for loss in losses] == ["AlignedL1", "TwoTerms", "AlignedL1_2", "AlignedL1_3"]
    names = [name for loss in losses for name in evaluate(loss, maps(range(3, 8)), maps(range(3, 8)), BATCH)]
    assert len(names) == len(set(names)) == 5


@pytest.mark.parametrize("name", ["AlignedL2", "alignedl1", None])
def test_unknown_loss_names_the_nearest(name):
    message = rf"DISTILL\.LOSSES: unknown loss {name!r}; did you mean AlignedL1\?" if name else "unknown loss None"
    with pytest.raises(ValueError, match=message):
        between([{"NAME": name} if name else {"WEIGHT": 1.0}], shapes(), shapes())


def test_unknown_option_names_the_nearest():
    with pytest.raises(ValueError, match=r"AlignedL1 has no option NORMALISE; did you mean NORMALIZE\?.*MASK_PADDING"):
        between([{"NAME": "AlignedL1", "NORMALISE": True}], shapes(), shapes())
    with pytest.raises(ValueError, match=r"no option WEIGTH; did you mean WEIGHT\?"):
        between([{"NAME": "AlignedL1", "WEIGTH": 2.0}], shapes(), shapes())


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (shapes(), shapes(range(4, 8)), r"level p3 \(H frame\) does not exist in the teacher, which has .*LEVELS"),
        (shapes(range(4, 8)), shapes(), r"level p3 \(H frame\) does not exist in the student"),
        (shapes(channels=8), shapes(), r"p3 \(H frame\): student has 8 channels, teacher 4; ADAPTATION: auto"),
        (shapes(base=2), shapes(), r"p3 \(H frame\): student has stride 16, teacher 8; MATCH: by_index"),
    ],
)
def test_wrong_levels_are_named(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        between([{"NAME": "AlignedL1", "LEVELS": ["p3", "p5"], "ADAPTATION": "none"}], student, teacher)


def test_nothing_in_common():
    message = r"student levels {'p3': 8} and teacher levels {'p7': 128} .* have none in common"
    with pytest.raises(ValueError, match=message):
        between([{"NAME": "AlignedL1"}], shapes([3]), shapes([7]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_masked_mean_is_safe_in_half_precision(dtype):
    """As under mixed precision: the loss is float32, and its gradient finite at the first scale of a GradScaler."""
    student, teacher = maps(range(3, 5), seed=1), maps(range(3, 5), seed=2)
    half = {name: x.to(dtype).requires_grad_() for name, x in student.items()}
    loss = aligned(student, mask_padding=True)
    with torch.autocast("cpu", dtype):
        found = loss(half, {name: x.to(dtype) for name, x in teacher.items()}, BATCH)["l1"]
    assert found.dtype == torch.float32
    exact = loss({k: x.float() for k, x in half.items()}, {k: x.to(dtype).float() for k, x in teacher.items()}, BATCH)
    assert found.item() == pytest.approx(exact["l1"].item(), rel=1e-5)
    (3 * 65536 * found).backward()
    assert all(x.grad.isfinite().all() for x in half.values())
