"""Pairs of head predictions that tests of losses between them share, and what they compute of them."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from detectron2.modeling.box_regression import Box2BoxTransform, Box2BoxTransformLinear
from detectron2.structures import Boxes, Instances
from helpers import between, make_context

from msad.distill.context import HeadPair
from msad.distill.losses.registry import WeightedLoss
from msad.modeling.detectors import atss
from msad.modeling.detectors.distribution import DistributionTransform
from msad.modeling.head_outputs import coordinates, decode

K, BINS, SIZE = 3, 9, 3.0
WEIGHTS = (10.0, 10.0, 5.0, 5.0)
BOXES = [[[6.0, 9.0, 40.0, 30.0], [20.0, 4.0, 60.0, 44.0]], [[8.0, 8.0, 30.0, 50.0]]]
UNEVEN = [[[6.3, 9.1, 40.2, 31.0], [20.7, 4.2, 60.0, 45.0]], [[8.1, 8.4, 30.0, 50.9]]]
TRANSFORMS = {
    "distributions": DistributionTransform(BINS - 1),
    "fcos": Box2BoxTransformLinear(normalize_by_size=True),
    "retinanet": Box2BoxTransform(weights=WEIGHTS),
    "rpn": Box2BoxTransform(weights=WEIGHTS),
    "roi": Box2BoxTransform(weights=WEIGHTS),
}


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def grid(h, w, stride):
    y, x = torch.meshgrid(torch.arange(h) * 1.0, torch.arange(w) * 1.0, indexing="ij")
    return torch.stack([x, y, x + 1, y + 1], dim=-1).reshape(-1, 4) * stride


def make_pair(kind="distributions", boxes=BOXES, seed=0, dtype=torch.float32, identical=False, **changes):
    """A pair of the kind on two levels of a 64x64 image each, ground truth assigned by ATSS; and its batch."""
    generator = torch.Generator().manual_seed(seed)
    n, sizes = len(boxes), [64, 16]
    cells = [grid(8, 8, 8), grid(4, 4, 16)]
    gt = []
    for b in boxes:
        gt.append(Instances((64, 64)))
        gt[-1].gt_boxes = Boxes(torch.tensor(b).view(-1, 4))
    batch = make_context([(64, 64)] * n, gt)
    flat, image = batch.boxes(torch.device("cpu"))
    matched = atss.assign(cells, flat, image, n, size=SIZE)
    labels = torch.where(matched < len(flat), matched % K, K)
    targets = torch.cat([flat, torch.zeros(1, 4)])[matched]
    anchors, classes, name = torch.cat(cells), K, "dense"
    if kind in ("rpn", "retinanet"):
        anchors = atss.anchors_around(anchors, 4.0)
        labels[:, ::7] = -1
    if kind == "rpn":
        classes, name = 1, "rpn"
        labels = torch.where(labels < 0, -1, (labels == K).long())
    if kind == "roi":
        name = "roi"
        labels, targets, anchors = labels.view(1, -1), targets.view(1, -1, 4), (3 + anchors).repeat(n, 1)
    width = {"distributions": 4 * BINS, "roi": 4 * K}.get(kind, 4)
    shapes = [(*labels.shape, classes + (kind == "roi")), (*labels.shape, width)]
    student = [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]
    teacher = [x.clone() if identical else torch.randn(x.shape, generator=generator, dtype=dtype) for x in student]
    pair = HeadPair(
        name, classes, student[0].requires_grad_(), teacher[0], student[1].requires_grad_(), teacher[1], labels,
        targets.to(dtype), anchors.to(dtype), TRANSFORMS[kind].get_deltas,
        (partial(coordinates, TRANSFORMS[kind]),) * 2,
        partial(decode, TRANSFORMS[kind]), sizes,
        partial(atss.valuable_region, cells, n, topk=9, size=SIZE),
    )  # fmt: skip
    for key, value in changes.items():
        setattr(pair, key, value)
    batch.pair_heads = lambda source: [pair]
    return pair, batch


def call(loss, context):
    """A loss between predictions, built from an entry or not."""
    return loss(context) if isinstance(loss, WeightedLoss) else loss(context.heads("teacher"), context)


def values(loss, batch):
    return {k: v.item() for k, v in call(loss, batch).items()}


def array(x):
    return x.detach().double().numpy()


def build(name, **options):
    return between([{"NAME": name, **options}], {}, {})[0]
