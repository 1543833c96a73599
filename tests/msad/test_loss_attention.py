"""FKD and FGD against NumPy, term by term, and values worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances
from helpers import between, evaluate, make_context

from msad.distill.losses.fgd import GlobalContext, focal_masks
from msad.distill.losses.fkd import NonLocal

SIZES = {"p3": (8, 6), "p4": (4, 3), "p5": (2, 2)}


def maps(channels, n=2, scale=1.0):
    return {name: scale * torch.randn(n, channels, *size) for name, size in SIZES.items()}


def shapes(channels):
    return {name: ShapeSpec(channels=channels, stride=2 ** int(name[1:])) for name in SIZES}


def ground_truth(*per_image):
    out = []
    for boxes in per_image:
        gt = Instances((64, 48))
        gt.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).view(-1, 4))
        out.append(gt)
    return make_context([(64, 48)] * len(out), out)


@torch.no_grad()
def shake(module):
    """Zero-initialised layers hide what they scale."""
    for p in module.parameters():
        p.add_(0.2 * torch.randn_like(p))
    return module


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def attentions(x, temperature):
    """Of one image (C, h, w): (h, w) and (C,)."""
    c, h, w = x.shape
    space = h * w * softmax(np.abs(x).mean(0).ravel() / temperature).reshape(h, w)
    return space, c * softmax(np.abs(x).mean((1, 2)) / temperature)


def terms(loss, student, teacher, batch):
    return {k.rsplit("/", 1)[1]: v.item() for k, v in evaluate(loss, student, teacher, batch).items()}


# --- FGD --------------------------------------------------------------------------------------------------------------


def test_masks_by_hand():
    """A box of 2x2 cells inside one of 4x4: weights 1/4 in the corner and 1/16 elsewhere."""
    boxes = torch.tensor([[0.0, 0, 1, 1], [0, 0, 3, 3]])
    foreground, background = focal_masks(boxes, torch.tensor([0, 0]), 1, (4, 4), 1)
    expected = torch.full((4, 4), 1 / 16)
    expected[:2, :2] = 1 / 4
    assert torch.equal(foreground[0], expected) and background.abs().max() == 0


def loop_masks(gt, stride, size):
    h, w = size
    foreground = np.zeros((h, w))
    for x0, y0, x1, y1 in gt.gt_boxes.tensor.tolist():
        left, top = int(np.floor(x0 / stride)), int(np.floor(y0 / stride))
        right, bottom = int(np.ceil(x1 / stride)), int(np.ceil(y1 / stride))
        for y in range(max(top, 0), min(bottom, h - 1) + 1):
            for x in range(max(left, 0), min(right, w - 1) + 1):
                foreground[y, x] = max(foreground[y, x], 1 / ((right - left + 1) * (bottom - top + 1)))
    background = (foreground == 0).astype(float)
    return foreground, background / max(background.sum(), 1)


BATCH = [[[5, 9, 22, 17.5], [3, 3, 40, 60], [8, 16, 16, 24]], []]


@pytest.mark.parametrize("level", list(SIZES))
def test_masks_equal_loops(level):
    batch, stride = ground_truth(*BATCH, [[0, 0, 48, 64]]), 2 ** int(level[1:])
    found = focal_masks(*batch.boxes(torch.device("cpu")), stride, SIZES[level], 3)
    for i, gt in enumerate(item["instances"] for item in batch.inputs):
        for mask, expected in zip(found, loop_masks(gt, stride, SIZES[level])):
            np.testing.assert_allclose(mask[i].numpy(), expected, rtol=1e-6)
    assert found[1][1].sum().item() == pytest.approx(1), "an image without objects is all background"
    assert found[1][2].sum().item() == 0, "and one full of them has none"


def context(block, x):
    """GcBlock of one image (C, h, w), from the definition."""
    p = {k: v.detach().double().numpy() for k, v in block.named_parameters()}
    weights = softmax(np.tensordot(p["where.weight"][0], x, axes=1).ravel())
    pooled = x.reshape(len(x), -1) @ weights
    hidden = p["transform.0.weight"] @ pooled + p["transform.0.bias"]
    hidden = (hidden - hidden.mean()) / np.sqrt(hidden.var() + 1e-5)
    hidden = np.maximum(hidden * p["transform.1.weight"] + p["transform.1.bias"], 0)
    return x + (p["transform.3.weight"] @ hidden + p["transform.3.bias"])[:, None, None]


@pytest.mark.parametrize("temperature", [0.5, 0.8])
def test_fgd_equals_numpy(temperature):
    student, teacher, batch = maps(4), maps(4, scale=2), ground_truth(*BATCH)
    options = {"ALPHA": 1.6e-3, "BETA": 8e-4, "GAMMA": 7e-4, "LAM": 8e-6, "TEMPERATURE": temperature}
    (loss,) = between([{"NAME": "FGD", "WEIGHT": 2, **options}], shapes(4), shapes(4))
    shake(loss)
    expected = dict.fromkeys(("foreground", "background", "attention", "global"), 0.0)
    for name, s in student.items():
        for i, gt in enumerate(item["instances"] for item in batch.inputs):
            a, b = s[i].double().numpy(), teacher[name][i].double().numpy()
            (space, channels), (space_s, channels_s) = attentions(b, temperature), attentions(a, temperature)
            weighted = channels[:, None, None] * space * (a - b) ** 2
            foreground, background = loop_masks(gt, 2 ** int(name[1:]), SIZES[name])
            expected["foreground"] += 2 * 1.6e-3 * (foreground * weighted).sum() / 2
            expected["background"] += 2 * 8e-4 * (background * weighted).sum() / 2
            gap = np.abs(space - space_s).sum() + np.abs(channels - channels_s).sum()
            expected["attention"] += 2 * 7e-4 * gap / 2
            blocks = loss.loss.student_context[name], loss.loss.teacher_context[name]
            expected["global"] += 2 * 8e-6 * ((context(blocks[0], a) - context(blocks[1], b)) ** 2).sum() / 2
    assert terms(loss, student, teacher, batch) == pytest.approx(expected, rel=1e-5)


def test_fgd_begins_without_context():
    assert torch.equal(GlobalContext(4)(torch.randn(2, 4, 5, 6)), torch.zeros(2, 4))
    (loss,) = between([{"NAME": "FGD"}], shapes(4), shapes(4))
    same = maps(4)
    assert set(terms(loss, same, same, ground_truth(*BATCH)).values()) == {0.0}


def test_fgd_without_objects_is_background():
    (loss,) = between([{"NAME": "FGD"}], shapes(4), shapes(4))
    found = terms(loss, maps(4), maps(4), ground_truth([], []))
    assert found["foreground"] == 0 and found["background"] > 0 and found["attention"] > 0


def test_fgd_trains_both_contexts():
    (loss,) = between([{"NAME": "FGD"}], shapes(16), shapes(32))
    shake(loss)
    sum(evaluate(loss, maps(16), maps(32), ground_truth(*BATCH)).values()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in loss.parameters())


def count(module):
    return sum(p.numel() for p in module.parameters())


FIVE = {f"p{level}": ShapeSpec(channels=256, stride=2**level) for level in range(3, 8)}


def test_the_published_size_of_fgd():
    """Both sides' GcBlock on each level: 256 -> 1 without bias; 256 -> 128, LayerNorm, 128 -> 256."""
    (loss,) = between([{"NAME": "FGD"}], FIVE, FIVE)
    block = 256 + (256 * 128 + 128) + 2 * 128 + (128 * 256 + 256)
    assert count(loss) == 2 * 5 * block


# --- FKD --------------------------------------------------------------------------------------------------------------


def array(parameter):
    return parameter.detach().double().numpy()


def pointwise(layer, x):
    """1x1 convolution of (N, C, h, w)."""
    out = np.einsum("oc,nchw->nohw", array(layer.weight)[:, :, 0, 0], x)
    return out if layer.bias is None else out + array(layer.bias)[:, None, None]


def pool(x, kernel):
    kh, kw = min(kernel, x.shape[2]), min(kernel, x.shape[3])
    rows, columns = x.shape[2] // kh, x.shape[3] // kw
    out = np.zeros((*x.shape[:2], rows, columns))
    for y, x0 in np.ndindex(rows, columns):
        out[:, :, y, x0] = x[:, :, y * kh : (y + 1) * kh, x0 * kw : (x0 + 1) * kw].max((2, 3))
    return out


def non_local(block, x):
    """y_i = x_i + BN(W sum_j (q_i . k_j) v_j / number of keys), with the pairwise products written out."""
    n, _, h, w = x.shape
    queries = pointwise(block.query, x).reshape(n, -1, h * w)
    keys, values = (pool(pointwise(layer, x), block.subsample) for layer in (block.key, block.value))
    keys, values = keys.reshape(n, keys.shape[1], -1), values.reshape(n, values.shape[1], -1)
    relation = np.einsum("ncq,nck->nqk", queries, keys) / keys.shape[2]
    out = pointwise(block.output, np.einsum("nqk,nck->ncq", relation, values).reshape(n, -1, h, w))
    mean, var = out.mean((0, 2, 3), keepdims=True), out.var((0, 2, 3), keepdims=True)
    gain, shift = (array(p)[:, None, None] for p in (block.norm.weight, block.norm.bias))
    return x + (out - mean) / np.sqrt(var + block.norm.eps) * gain + shift


def fkd_terms(loss, student, teacher, temperature, same_channels):
    totals = dict.fromkeys(("feature", "spatial", "channel", "relation"), 0.0)
    for name in student:
        parts, s, t = loss.loss.levels[name], student[name].double().numpy(), teacher[name].double().numpy()
        adapted = pointwise(parts["feature"], s)
        total = 0.0
        for i in range(len(s)):
            (space_t, channels_t), (space_s, channels_s) = attentions(t[i], temperature), attentions(s[i], temperature)
            if not same_channels:
                channels_s = attentions(adapted[i], temperature)[1]
            mask = (space_t + space_s) / 2 * ((channels_t + channels_s) / 2)[:, None, None]
            total += (mask * (adapted[i] - t[i]) ** 2).sum()
        totals["feature"] += np.sqrt(total)
        kernel, bias = array(parts["spatial"].weight)[0, 0], array(parts["spatial"].bias)
        padded = np.pad(s.mean(1), ((0, 0), (1, 1), (1, 1)))
        convolved = np.zeros_like(s[:, 0]) + bias
        for y, x in np.ndindex(*s.shape[-2:]):
            convolved[:, y, x] += (padded[:, y : y + 3, x : x + 3] * kernel).sum((1, 2))
        totals["spatial"] += np.linalg.norm(convolved - t.mean(1))
        linear = s.mean((2, 3)) @ array(parts["channel"].weight).T + array(parts["channel"].bias)
        totals["channel"] += np.linalg.norm(linear - t.mean((2, 3)))
        related = pointwise(parts["relation"], non_local(parts["student_nonlocal"], s))
        totals["relation"] += np.linalg.norm(related - non_local(parts["teacher_nonlocal"], t))
    return totals


@pytest.mark.parametrize(("channels", "temperature"), [(8, 0.1), (8, 0.5), (12, 0.5)])
def test_fkd_equals_numpy(channels, temperature):
    student, teacher = maps(channels), maps(8, scale=2)
    entry = {"NAME": "FKD", "ALPHA": 0.5, "BETA": 3, "TEMPERATURE": temperature}
    (loss,) = between([entry], shapes(channels), shapes(8))
    shake(loss)
    expected = fkd_terms(loss, student, teacher, temperature, channels == 8)
    weights = {"feature": 0.5, "spatial": 3, "channel": 3, "relation": 0.5}
    found = terms(loss, student, teacher, None)
    assert found == pytest.approx({k: weights[k] * v for k, v in expected.items()}, rel=1e-5)


def test_non_local_begins_as_identity_and_takes_any_size():
    for n, h, w in ((2, 9, 5), (1, 1, 1), (1, 3, 20)):
        block, x = NonLocal(8, 4, 8), torch.randn(n, 8, h, w)
        assert torch.equal(block(x), x)
        shake(block)(x).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in block.parameters())


def test_the_published_size_of_fkd():
    """Non-local blocks of 64 channels on the two finest levels and 128 on the others; keys thinned 8, 4, 2, 2, 2."""
    (loss,) = between([{"NAME": "FKD"}], FIVE, FIVE)
    pointwise = 256 * 256 + 256  # feature, relation and, between vectors, channel
    for name, hidden, subsample in zip(FIVE, (64, 64, 128, 128, 128), (8, 4, 2, 2, 2), strict=True):
        parts = loss.loss.levels[name]
        blocks = parts["student_nonlocal"], parts["teacher_nonlocal"]
        block = 3 * (256 * hidden + hidden) + hidden * 256 + 2 * 256  # queries, keys, values; output; BatchNorm
        assert [count(module) for module in blocks] == [block] * 2, name
        assert [module.subsample for module in blocks] == [subsample] * 2, name
        assert count(parts) == 3 * pointwise + (3 * 3 + 1) + 2 * block, name


def test_fkd_counts_images():
    """Norms over the batch: two copies cost sqrt(2) times one; with PER_IMAGE, the same."""
    one_s, one_t = maps(8, n=1), maps(8, n=1)
    two_s, two_t = ({k: torch.cat([v, v]) for k, v in x.items()} for x in (one_s, one_t))
    for per_image, factor in ((False, 2**0.5), (True, 1.0)):
        (loss,) = between([{"NAME": "FKD", "PER_IMAGE": per_image}], shapes(8), shapes(8))
        one, two = terms(loss, one_s, one_t, None), terms(loss, two_s, two_t, None)
        assert two == pytest.approx({k: factor * v for k, v in one.items()}, rel=1e-5)


def test_fkd_trains_all_of_its_parts():
    (loss,) = between([{"NAME": "FKD"}], shapes(12), shapes(8))
    assert not loss.adaptation
    shake(loss)
    sum(evaluate(loss, maps(12), maps(8)).values()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in loss.parameters())


def test_two_stage_fkd_has_no_channel_mask():
    """Where the attention of channels is left out, the feature term is weighed by space alone; by hand."""
    student, teacher = maps(8), maps(8, scale=2)
    (loss,) = between([{"NAME": "FKD", "CHANNEL_MASK": False, "TEMPERATURE": 0.5, "ALPHA": 1.0}], shapes(8), shapes(8))
    expected = 0.0
    for name, s in student.items():
        t = teacher[name]
        space = sum(
            s[0, 0].numel() * (x.abs().mean(1).flatten(1) / 0.5).softmax(1).view(len(x), *x.shape[2:]) for x in (s, t)
        )
        difference = (space / 2).sqrt()[:, None] * (loss.loss.levels[name]["feature"](s) - t)
        expected += difference.square().sum().sqrt().item()
    assert terms(loss, student, teacher, None)["feature"] == pytest.approx(expected, rel=1e-4)
