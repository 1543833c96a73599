"""The cross-scale assistant of ScaleKD by itself: attention, grids, options, memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from helpers import make_context
from torch.utils._python_dispatch import TorchDispatchMode

from msad.distill.assistants import build_assistants
from msad.distill.cross_scale import Aggregation, CrossScaleAssistant, CrossScaleAttention

NAME = "CrossScaleAssistant"


def array(x):
    return x.detach().double().numpy()


def test_attention_equals_numpy():
    """Eqs. (3) to (6) with loops over heads, on a grid that the larger ratio does not divide."""
    torch.manual_seed(0)
    module = CrossScaleAttention(6, 4, 4, 8, heads=4, ratios=(2, 1))
    x, y = torch.randn(1, 6, 3, 2), torch.randn(1, 4, 5, 3)
    found = array(module(x, y))[0]
    queries = array(module.query(x.flatten(2).transpose(1, 2)))[0]
    heads = []
    for i in range(2):
        grid = module.of_keys[i](y)
        tokens = grid.flatten(2).transpose(1, 2)
        key, value = (array(layer[i](tokens))[0] for layer in (module.keys, module.values))
        on_map = torch.tensor(value.T, dtype=torch.float32).reshape(1, 4, *grid.shape[-2:])
        value = value + array(module.project[i](on_map))[0].reshape(4, -1).T
        for h in range(2):
            q = queries[:, 4 * i + 2 * h : 4 * i + 2 * h + 2]
            k, v = key[:, 2 * h : 2 * h + 2], value[:, 2 * h : 2 * h + 2]
            score = q @ k.T / np.sqrt(2)
            weight = np.exp(score - score.max(1, keepdims=True))
            heads.append(weight / weight.sum(1, keepdims=True) @ v)
    expected = np.concatenate(heads, axis=1) @ array(module.output.weight).T + array(module.output.bias)
    np.testing.assert_allclose(found.reshape(8, -1).T, expected, rtol=1e-4, atol=1e-5)


def test_attention_sees_the_image_alone():
    """Keys and values of a padded map are those of the map without its padding, image by image."""
    torch.manual_seed(0)
    module = CrossScaleAttention(6, 4, 4, 8, heads=4, ratios=(2, 1))
    x, y, sizes = torch.randn(2, 6, 3, 2), torch.randn(2, 4, 6, 5), [(5, 3), (6, 4)]
    found = module(x, y, extents=sizes)
    for i, (rows, cols) in enumerate(sizes):
        alone = module(x[i : i + 1], y[i : i + 1, :, :rows, :cols])
        torch.testing.assert_close(found[i : i + 1], alone, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, module(x, y), atol=1e-2)
    torch.testing.assert_close(module(x, y, extents=[(6, 5)] * 2), module(x, y))


@pytest.mark.parametrize(("qkv", "size"), [("eq", (40, 56)), ("text", (32, 64))])
@pytest.mark.parametrize("scale", [1, 2])
def test_targets_do_not_depend_on_the_batch(qkv, size, scale):
    """What lies beside an image of ``size`` in a batch does not move what the student learns from it, and no less of
    the image is seen than without it."""
    torch.manual_seed(0)
    levels, area = range(3, 6), {"p3": (), "p4": (), "p5": ()}
    theirs = {f"p{i}": ShapeSpec(channels=12, stride=2**i / scale) for i in levels}
    assistant = CrossScaleAssistant(shapes(3, 8), {"t": theirs}, qkv=qkv, heads=4, ratio=4)
    found = []
    for beside in (0.0, 9.0, None):
        generator, maps = torch.Generator().manual_seed(1), []
        for channels, factor in ((8, 1), (12, scale)):
            maps.append({f"p{i}": torch.randn(1, channels, factor * 64 >> i, factor * 96 >> i, generator=generator)
                         for i in levels})  # fmt: skip
            for name, x in maps[-1].items():
                rows, cols = (-(-side * factor // 2 ** int(name[1:])) for side in size)
                if beside is None:
                    maps[-1][name] = x[:, :, :rows, :cols]
                else:
                    x[:, :, rows:], x[..., cols:] = beside, beside
                area[name] = area[name] or (..., slice(rows), slice(cols))
        context = make_context([] if beside is None else [size], student=maps[0], sources={"t": maps[1]})
        found.append({name: x[area[name]] for name, x in assistant.features(context).items()})
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[0], found[2], rtol=1e-4, atol=1e-5)


def test_aggregation_completes_the_border():
    assert Aggregation(4, 8, 4)(torch.randn(1, 4, 9, 6)).shape == (1, 8, 3, 2)
    assert Aggregation(4, 8, 8)(torch.randn(1, 4, 3, 2)).shape == (1, 8, 1, 1)


def shapes(first, channels, levels=3):
    return {f"p{i}": ShapeSpec(channels=channels, stride=2**i) for i in range(first, first + levels)}


@pytest.mark.parametrize("qkv", ["eq", "text"])
@pytest.mark.parametrize("first", [2, 3])
def test_output_is_on_the_students_grid(qkv, first):
    """Also under a teacher at twice the input, whose levels pair by index."""
    assistant = CrossScaleAssistant(shapes(3, 8), {"t": shapes(first, 12)}, qkv=qkv, heads=4, ratio=4)
    student = {f"p{i}": torch.randn(2, 8, 64 >> i, 96 >> i) for i in range(3, 6)}
    teacher = {f"p{i}": torch.randn(2, 12, 64 >> i, 96 >> i) for i in range(first, first + 3)}
    found = assistant.features(make_context([], student=student, sources={"t": teacher}))
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in student.items()}
    assert assistant.shapes() == shapes(3, 8)
    ratios = [[m.ratio for m in level.of_keys] for level in assistant.attention.values()]
    double = 2 if first == 2 and qkv == "eq" else 1
    assert ratios == [[4 * double, 2 * double], [2 * double, double], [double, max(double // 2, 1)]]


def test_plain_attention_and_wrong_options():
    plain = CrossScaleAssistant(shapes(3, 8), {"t": shapes(3, 8)}, heads=4, multiscale=False)
    assert {m.ratio for level in plain.attention.values() for m in level.of_keys} == {1}
    with pytest.raises(ValueError, match="QKV must be 'eq' or 'text', not 'kqv'"):
        CrossScaleAssistant(shapes(3, 8), {"t": shapes(3, 8)}, qkv="kqv")
    with pytest.raises(ValueError, match=r"no teacher is named 'u' \(t\)"):
        CrossScaleAssistant(shapes(3, 8), {"t": shapes(3, 8)}, teacher="u")
    with pytest.raises(ValueError, match="3 HEADS must divide 8 channels"):
        CrossScaleAssistant(shapes(3, 8), {"t": shapes(3, 8)}, heads=3)


def test_ratios_of_each_level():
    """As they are given, whatever the teacher's grid, and a group of heads for each."""
    given = [[6, 3, 2, 1], [4, 2], [1]]
    assistant = CrossScaleAssistant(shapes(3, 8), {"t": shapes(2, 8)}, heads=4, ratios=given)
    assert [[m.ratio for m in level.of_keys] for level in assistant.attention.values()] == given
    assert [level.heads for level in assistant.attention.values()] == [1, 2, 4]


@pytest.mark.parametrize("ratios", [[[4, 2]], [[4], [2], [0]], [[4], [2], []], [[4], [2], [True]], [4, 2, 1]])
def test_wrong_ratios_are_named(ratios):
    with pytest.raises(ValueError, match="RATIOS must be 3 lists of whole numbers above 0, one for each level, not"):
        build_assistants([{"NAME": NAME, "RATIOS": ratios}], shapes(3, 8), {"t": shapes(3, 8)})


def test_a_level_without_a_partner_is_named():
    """The student's heads, which the assistant learns from, need all levels."""
    with pytest.raises(ValueError, match=r"p6 of the student \(H frame\) has no partner in t under MATCH: by_stride"):
        CrossScaleAssistant(shapes(4, 8), {"t": shapes(3, 8)}, match="by_stride")


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [("HEADS", "4", "a whole number"), ("HEADS", 0, "above 0"), ("RATIO", "8", "a whole number"),
     ("RATIO", 0, "above 0"), ("RATIO", 1.5, "a whole number"), ("MULTISCALE", "False", "True or False, .*"),
     ("TEACHER", 1, "a text")],
)  # fmt: skip
def test_wrong_values_of_the_assistant_are_named(key, value, wanted):
    with pytest.raises(ValueError, match=f"^DISTILL.ASSISTANTS: {NAME}: {key} must be {wanted}, not {value!r}$"):
        build_assistants([{"NAME": NAME, key: value}], shapes(3, 8), {"t": shapes(3, 8)})


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operator returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            self.elements = max(self.elements, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("size", [(512, 384), (500, 300)])
@pytest.mark.parametrize("multiscale", [True, False])
def test_no_scores_of_all_pairs_are_stored(multiscale, size):
    """Neither forward nor backward, and not by plain attention either: 64 x 48 queries have as many keys there."""
    student = {f"p{i}": torch.randn(1, 16, 64 >> i, 48 >> i, requires_grad=True) for i in range(3)}
    named = dict(zip(("p3", "p4", "p5"), student.values()))
    assistant = CrossScaleAssistant(shapes(3, 16), {"t": shapes(3, 16)}, heads=4, multiscale=multiscale)
    with Largest() as largest:
        context = make_context([size], student=named, sources={"t": {k: x.detach() for k, x in named.items()}})
        sum(x.square().sum() for x in assistant.features(context).values()).backward()
    assert largest.elements < 64 * 48 * 200 < (64 * 48) ** 2
