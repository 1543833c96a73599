"""What all distillation losses share: pairs of levels, adaptation layers, seeds, options, boxes; and their training."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances
from helpers import between, evaluate, make_context
from runs import SAVED, assert_equal_weights, config, left_by_a_killed_run, train
from torch import nn

from msad.distill.distiller import student_shapes
from msad.distill.losses import DISTILL_LOSS_REGISTRY, build_losses
from msad.distill.losses.pairing import LevelPair, build_adaptation, pair_levels
from msad.distill.losses.shared import attention, locations_in_boxes, rasterize_max
from msad.distill.teachers import FrozenTeacher
from msad.engine import DistillTrainer
from msad.export.plain import export
from msad.resolution import get_resolution


def shapes(levels, channels=4):
    return {f"p{i}": ShapeSpec(channels=channels, stride=2**i) for i in levels}


# --- pairs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("match", "levels", "expected"),
    [
        ("by_stride", None, "p4-p4 p5-p5 p6-p6 p7-p7"),
        ("by_stride", ["p6", "p4"], "p4-p4 p6-p6"),
        ("by_index", None, "p4-p3 p5-p4 p6-p5 p7-p6 p8-p7"),
        ("by_index", ["p7", "p3"], "p4-p3 p8-p7"),
    ],
)
def test_pairs(match, levels, expected):
    pairs = pair_levels(shapes(range(4, 9)), shapes(range(3, 8)), match, levels)
    assert " ".join(f"{p.student}-{p.teacher}" for p in pairs) == expected


@pytest.mark.parametrize(
    ("student", "teacher", "match", "levels", "message"),
    [
        (range(3, 8), range(3, 8), "by_size", None, "MATCH must be one of by_stride, by_index, not 'by_size'"),
        (range(3, 5), range(3, 8), "by_index", ["p6"], r"level p6 \(H frame\) does not exist in the student"),
        (range(3, 5), range(3, 8), "by_stride", ["p6"], r"p6 .* does not exist in the student.*MATCH: by_index"),
        (range(3, 8), range(3, 5), "by_index", ["p6"], r"level p6 \(H frame\) does not exist in the teacher"),
        ([3], [4], "by_stride", None, "none in common"),
    ],
)
def test_wrong_pairs_are_named(student, teacher, match, levels, message):
    with pytest.raises(ValueError, match=message):
        pair_levels(shapes(student), shapes(teacher), match, levels)


def test_a_short_pyramid_is_paired_as_far_as_it_goes():
    assert pair_levels(shapes(range(5, 7)), shapes(range(3, 8)), "by_index", None) == [
        ("p5", "p3", (32, 8)), ("p6", "p4", (64, 16))
    ]  # fmt: skip


@pytest.mark.parametrize(("levels", "expected"), [(["p5"], "p5-p5"), (None, "p3-p3 p4-p4 p5-p5")])
def test_stages_of_networks_are_paired_from_the_last(levels, expected):
    """One side may also show its stem."""
    for student, teacher in ((range(3, 6), range(2, 6)), (range(2, 6), range(3, 6))):
        pairs = pair_levels(shapes(student), shapes(teacher), "by_index", levels, from_last=True)
        assert " ".join(f"{p.student}-{p.teacher}" for p in pairs) == expected


@pytest.mark.parametrize("name", ["FKD", "MGD", "FitNet"])
def test_the_order_of_levels_does_not_matter(name):
    """FKD's modules depend on the place of a level, and all weights on the order in which they are drawn."""
    one, other = (
        between([{"NAME": name, "LEVELS": levels}], shapes(range(3, 8), 8), shapes(range(3, 8), 16))[0]
        for levels in (["p3", "p5", "p7"], ["p7", "p3", "p5"])
    )
    assert one.levels == other.levels == ["p3", "p5", "p7"]
    assert_equal_weights(one.state_dict(), other.state_dict())
    if name == "FKD":
        parts = [other.loss.levels[level]["teacher_nonlocal"] for level in ("p3", "p5", "p7")]
        assert [(part.subsample, part.query.out_channels) for part in parts] == [(8, 4), (4, 4), (2, 8)]


# --- adaptation layers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "student", "expected"),
    [("auto", 4, []), ("auto", 6, ["p3", "p4"]), ("always", 4, ["p3", "p4"]), ("none", 4, [])],
)
def test_adaptors_where_they_are_needed(mode, student, expected):
    pairs = [LevelPair("p3", "p3", (8, 8)), LevelPair("p4", "p4", (16, 16))]
    layers = build_adaptation(pairs, shapes([3, 4], student), shapes([3, 4], 4), mode)
    assert list(layers) == expected
    for layer in layers.values():
        assert layer(torch.zeros(2, student, 3, 5)).shape == (2, 4, 3, 5)
        assert sum(p.numel() for p in layer.parameters()) == student * 4 + 4


def test_adaptor_with_normalisation():
    layers = build_adaptation([LevelPair("p3", "p3", (8, 8))], shapes([3], 6), shapes([3], 4), "auto", "BN")
    out = layers["p3"](5 + 3 * torch.randn(4, 6, 8, 8))
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.std((0, 2, 3)), torch.ones(4), rtol=0.01, atol=0)


@pytest.mark.parametrize(("norm", "words"), [("GN", "divisible"), ("Batch", "Batch")])
def test_a_normalisation_that_does_not_fit_names_the_level(norm, words):
    where = f"^DISTILL.LOSSES: distillation level p3 .*: ADAPTATION_NORM {norm} of 4 channels: .*{words}"
    with pytest.raises(ValueError, match=where):
        build_adaptation([LevelPair("p3", "p3", (8, 8))], shapes([3], 6), shapes([3], 4), "auto", norm)


@pytest.mark.parametrize("source", [5, [], ["a", "a"], {"a": 1}])
def test_sources_that_are_none(source):
    with pytest.raises(ValueError, match=r"^DISTILL.LOSSES: FitNet: SOURCE must be a name, or a list of different"):
        build_losses([{"NAME": "FitNet", "SOURCE": source}], lambda _: shapes([3]), {"a": lambda _: shapes([3])})


def test_unknown_adaptor():
    with pytest.raises(ValueError, match="ADAPTATION must be one of auto, always, none, not 'yes'"):
        between([{"NAME": "FitNet", "ADAPTATION": "yes"}], shapes([3]), shapes([3]))


class Raw(nn.Module):
    """A loss that adapts by itself."""

    default_weight = 0.25

    def __init__(self, levels, channels, student_channels, strides, gain=2.0):
        super().__init__()
        self.seen = levels, channels, student_channels, strides
        self.gain = gain

    def forward(self, student, teacher, batch):
        return {"sum": self.gain * sum(x.sum() for x in student.values())}


@pytest.fixture
def raw(monkeypatch):
    monkeypatch.setitem(DISTILL_LOSS_REGISTRY._obj_map, "Raw", Raw)


def test_a_loss_gets_what_its_constructor_asks_for(raw):
    (loss,) = between([{"NAME": "Raw", "MATCH": "by_index"}], shapes([4, 5], 6), shapes([3, 4], 8))
    assert loss.loss.seen == (["p3", "p4"], {"p3": 8, "p4": 8}, {"p3": 6, "p4": 6}, {"p3": 8, "p4": 16})
    assert not loss.adaptation
    student = {"p4": torch.ones(1, 6, 2, 2), "p5": torch.ones(1, 6, 1, 1)}
    teacher = {"p3": torch.ones(1, 8, 4, 4), "p4": torch.ones(1, 8, 2, 2)}
    (value,) = evaluate(loss, student, teacher).values()
    assert value.item() == 0.25 * 2 * 6 * (16 + 4), "default weight, resized to the teacher's grid, six channels"
    with pytest.raises(ValueError, match="Raw adapts channels by itself and takes no ADAPTATION"):
        between([{"NAME": "Raw", "ADAPTATION": "always"}], shapes([3]), shapes([3]))


def test_numbers_that_yaml_reads_as_text(raw):
    (loss,) = between([{"NAME": "Raw", "WEIGHT": "2e-5", "GAIN": "1e-3"}], shapes([3]), shapes([3]))
    assert (loss.weight, loss.loss.gain) == (2e-5, 1e-3)
    for key in ("WEIGHT", "GAIN"):
        with pytest.raises(ValueError, match=f"Raw: {key} must be a number, not 'much'"):
            between([{"NAME": "Raw", key: "much"}], shapes([3]), shapes([3]))
    with pytest.raises(ValueError, match=r"Raw has no option CHANNELS .*\(options: WEIGHT, .*, GAIN\)"):
        between([{"NAME": "Raw", "CHANNELS": 3}], shapes([3]), shapes([3]))


@pytest.mark.parametrize(
    ("name", "key", "value", "wanted"),
    [
        ("FitNet", "GT_ONLY", "False", "True or False, without quotation marks"),
        ("FKD", "PER_IMAGE", "no", "True or False, without quotation marks"),
        ("AlignedL1", "NORMALIZE", 1, "True or False, without quotation marks"),
        ("CWD", "TAU", 0, "above 0"),
        ("FGD", "TEMPERATURE", -0.5, "above 0"),
        ("FKD", "TEMPERATURE", "0", "above 0"),
        ("LD", "TEMPERATURE", 0, "above 0"),
        ("LD", "CLS_TEMPERATURE", 0, "above 0"),
        ("Chen", "NU", -1, "at least 0"),
        ("Chen", "FOCUS", -1, "at least 0"),
        ("FGD", "ALPHA", -1e-3, "at least 0"),
        ("FKD", "BETA", -1, "at least 0"),
        ("LD", "W_VLR", -0.25, "at least 0"),
        ("CWD", "TAU", True, "a number"),
        ("CWD", "WEIGHT", float("nan"), "a number"),
        ("CWD", "WEIGHT", None, "a number"),
        ("SDF", "EMBEDDING", "16", "a whole number"),
        ("SDF", "EMBEDDING", True, "a whole number"),
        ("SDF", "EMBEDDING", 0, "above 0"),
        ("SDF", "DILATIONS", 2, "a list"),
        ("SDF", "DILATIONS", [], "a list, each of it a whole number"),
        ("SDF", "DILATIONS", [1, "2"], "a list, each of it a whole number"),
        ("SDF", "DILATIONS", [1, 0], "above 0"),
        ("FitNet", "REDUCTION", 3, "a text"),
        ("FKD", "LEVELS", "p3", "a list"),
        ("FKD", "TAP", False, "a text"),
    ],
)
def test_values_of_another_kind_are_refused(name, key, value, wanted):
    with pytest.raises(ValueError, match=f"^DISTILL.LOSSES: {name}: {key} must be {wanted}, not "):
        between([{"NAME": name, key: value}], shapes([3]), shapes([3]))


def test_values_of_the_right_kind_are_taken():
    (loss,) = between([{"NAME": "SDF", "EMBEDDING": 3, "DILATIONS": [2]}], shapes([3]), shapes([3]))
    assert loss.loss.student["p3"].dilations == (2,)
    (loss,) = between([{"NAME": "FKD", "PER_IMAGE": True, "TEMPERATURE": 1}], shapes([3]), shapes([3]))
    assert loss.loss.per_image is True and loss.loss.temperature == 1.0


@pytest.mark.parametrize(
    ("kind", "hint"),
    [("MD", "; did you mean MagnitudeMD"), ("fgd", "; did you mean FGD"), ("FitNets", "; did you mean FitNet"),
     ("Naive", "; did you mean NaiveL2"), ("xyzzy", r" \(known")],
)  # fmt: skip
def test_hints_for_unknown_losses(kind, hint):
    with pytest.raises(ValueError, match=f"unknown loss '{kind}'{hint}"):
        between([{"NAME": kind}], shapes([3]), shapes([3]))


def test_initial_weights_depend_on_seed_and_name_alone():
    def weights(entries, seed=5):
        built = between(entries, shapes([3, 4], 6), shapes([3, 4], 4), seed=seed)
        return {loss.name: torch.cat([p.flatten() for p in loss.parameters()]) for loss in built}

    one = [{"NAME": "FitNet"}]
    state = torch.get_rng_state()
    expected = weights(one)["FitNet"]
    assert torch.equal(torch.get_rng_state(), state), "what is drawn afterwards does not depend on the losses"
    torch.rand(7)
    assert torch.equal(weights(one)["FitNet"], expected)
    several = weights([{"NAME": "AlignedL1"}, *one, *one])
    assert torch.equal(several["FitNet"], expected)
    assert not torch.equal(several["FitNet_2"], expected) and not torch.equal(weights(one, 6)["FitNet"], expected)


# --- maps and boxes ---------------------------------------------------------------------------------------------------


def test_attention_by_hand():
    """Means 1, 1, 1, 2 at T 0.5: the digits of FGD's spatial attention."""
    x = torch.tensor([[1.0, -1.0], [1.0, 2.0]]).expand(1, 3, 2, 2)
    expected = torch.tensor([[[0.3850, 0.3850], [0.3850, 2.8450]]])
    torch.testing.assert_close(attention(x, 0.5)[0], expected, rtol=0, atol=1e-4)
    channels = torch.tensor([1.0, -1.0, 1.0, 2.0]).view(1, 4, 1, 1).expand(1, 4, 3, 5)
    torch.testing.assert_close(attention(channels, 0.5)[1], expected.view(1, 4), rtol=0, atol=1e-4)


def test_attention_sums():
    x = torch.randn(2, 6, 3, 5)
    spatial, channel = attention(x, 0.1)
    torch.testing.assert_close(spatial.sum((1, 2)), torch.full((2,), 15.0))
    torch.testing.assert_close(channel.sum(1), torch.full((2,), 6.0))
    assert all(a.dtype == torch.float32 for a in attention(x.bfloat16(), 0.1))


def test_rectangles_overlap_by_maximum():
    rows = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 1, 1]], dtype=torch.bool)
    columns = torch.tensor([[1, 0], [1, 1], [0, 1]], dtype=torch.bool)
    canvas = rasterize_max(rows, columns, torch.tensor([0, 0, 2]), torch.tensor([2.0, 1.0, 3.0]), 3)
    assert canvas.tolist() == [[[2, 0], [2, 1], [1, 1]], [[0, 0]] * 3, [[0, 3]] * 3]


def test_cells_inside_equal_loops():
    boxes = torch.tensor([[3.9, 0, 21, 13], [20, 20, 28, 27.9], [0, 0, 3, 3], [-9, -9, 99, 5]])
    image = torch.tensor([0, 0, 1, 1])
    found = locations_in_boxes(boxes, image, 8, (4, 5), 3)
    for n in range(3):
        for i in range(4):
            for j in range(5):
                x, y = 8 * j + 4, 8 * i + 4
                hits = [b[0] < x < b[2] and b[1] < y < b[3] for b, k in zip(boxes.tolist(), image) if k == n]
                assert found[n, i, j] == any(hits)
    assert found.sum() == 6 + 0 + 0 + 5
    assert locations_in_boxes(boxes[:0], image[:0], 8, (4, 5), 2).tolist() == torch.zeros(2, 4, 5).tolist()


def instances(*boxes):
    out = Instances((64, 64))
    out.gt_boxes = Boxes(torch.tensor(boxes).view(-1, 4))
    return out


def test_boxes_of_a_batch_are_joined_once():
    gt = [instances([0.0, 1, 2, 3], [4, 5, 6, 7]), instances(), instances([8.0, 9, 10, 11])]
    batch = make_context([(64, 64)] * 3, gt)
    boxes, image = batch.boxes(torch.device("cpu"))
    assert boxes.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]] and image.tolist() == [0, 0, 2]
    assert batch.boxes(torch.device("cpu"))[0] is boxes
    boxes, image = make_context([(64, 64)], [instances()]).boxes(torch.device("cpu"))
    assert boxes.shape == (0, 4) and image.shape == (0,) and image.dtype == torch.int64


# --- training ---------------------------------------------------------------------------------------------------------

ADAPTED = [{"NAME": "FitNet", "ADAPTATION": "always", "ADAPTATION_NORM": "BN"}]


@pytest.fixture
def student(project, teacher_weights, tmp_path):
    def make(output="run", **options):
        return config(project, teacher_weights, "student", tmp_path / output, **{"DISTILL.LOSSES": ADAPTED, **options})

    return make


def test_adaptors_are_trained_saved_resumed_and_dropped(student, tmp_path):
    whole, expected, _ = train(student())
    trained = whole.distiller.losses.state_dict()
    start = DistillTrainer(student("start")).distiller.losses.state_dict()
    assert len(trained) == 5 * (1 + 5), "weight of the convolution; weight, bias, statistics of BatchNorm"
    assert all(not torch.equal(trained[k], start[k]) for k in trained)

    left_by_a_killed_run(tmp_path / "run", tmp_path / "killed")
    again, resumed, _ = train(student("killed"), resume=True)
    assert resumed.steps == expected.steps[SAVED:]
    assert_equal_weights(again.distiller.losses.state_dict(), trained)

    cfg = student()
    export(cfg, str(Path(cfg.OUTPUT_DIR) / "model_final.pth"), tmp_path / "exported")
    exported = torch.load(tmp_path / "exported" / "model.pth", weights_only=True)
    assert set(exported) == {"model"}
    assert_equal_weights(exported["model"], whole.distiller.student.state_dict())
    shutil.rmtree(tmp_path / "exported")


def test_random_masks_and_trained_parts_resume(student, tmp_path):
    losses = {"DISTILL.LOSSES": [{"NAME": "MGD", "WEIGHT": 1e-3}, {"NAME": "FKD"}, {"NAME": "FGD"}]}
    whole, expected, _ = train(student(**losses))
    left_by_a_killed_run(tmp_path / "run", tmp_path / "killed")
    again, resumed, _ = train(student("killed", **losses), resume=True)
    assert resumed.steps == expected.steps[SAVED:]
    assert sum("loss_distill" in key for key in resumed.steps[0]["losses"]) == 1 + 4 + 4
    assert_equal_weights(again.distiller.losses.state_dict(), whole.distiller.losses.state_dict())


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_adaptors_are_optimized_like_the_student(student, optimizer):
    decay = {"SOLVER.WEIGHT_DECAY": 0.3, "SOLVER.WEIGHT_DECAY_NORM": 0.1, "SOLVER.OPTIMIZER": optimizer}
    run = DistillTrainer(student(**decay))
    groups = {id(p): group for group in run.optimizer.param_groups for p in group["params"]}
    (convolution, norm) = run.distiller.losses[0].adaptation["p3"]
    assert (groups[id(convolution.weight)]["weight_decay"], groups[id(norm.weight)]["weight_decay"]) == (0.3, 0.1)
    student = run.distiller.student.head.cls_score.weight
    assert groups[id(convolution.weight)]["lr"] == groups[id(student)]["lr"] > 0


@pytest.mark.parametrize(
    ("entry", "pairs"),
    [
        ({}, [("res2", "res3", 8), ("res3", "res4", 16), ("res4", "res5", 32)]),
        ({"LEVELS": ["res4"]}, [("res3", "res4", 16)]),
    ],
)
def test_stages_of_networks_are_paired_by_their_strides(tiny_model, entry, pairs):
    """At L a stage of one name has twice the stride in H pixels, and the teacher's finest has no partner."""
    student, teacher = tiny_model(levels=range(2, 7), seed=1), FrozenTeacher(tiny_model(seed=3))
    ours = functools.partial(student_shapes, student, get_resolution("L"))
    (loss,) = build_losses([{"NAME": "FitNet", "TAP": "bottom_up", **entry}], ours, {"teacher": teacher.shapes})
    assert [tuple(pair) for pair in loss.pairs] == [(s, t, (stride, stride)) for s, t, stride in pairs]
