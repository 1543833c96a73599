"""Anchors, matching, box transforms, sampling and postprocessing on fixed inputs."""

import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import ANCHOR_GENERATOR_REGISTRY, build_anchor_generator, detector_postprocess
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import (
    Box2BoxTransform,
    Box2BoxTransformLinear,
    _dense_box_regression_loss,
)
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import Boxes, Instances

TOLERANCE = 1e-5


def random_boxes(n, seed):
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=g) * 80
    return torch.cat((corner, corner + 1 + torch.rand(n, 2, generator=g) * 60), dim=1)


def anchors(out):
    features = [torch.zeros(1, 1, 3, 5), torch.zeros(1, 1, 2, 3)]
    for name, options in {
        "shared": {"sizes": [[32.0, 50.0]], "aspect_ratios": [[0.5, 1.0, 2.0]]},
        "flat": {"sizes": [16, 64], "aspect_ratios": [1.0, 3]},
        "per_level": {"sizes": [[8], [16]], "aspect_ratios": [[1.0], [0.3]], "offset": 0.0},
        "offset": {"sizes": [[8], [16]], "aspect_ratios": [[1.0]], "offset": 0.25},
    }.items():
        generator = DefaultAnchorGenerator(strides=[8, 16], **options)
        out[f"anchors.{name}"] = [a.tensor for a in generator(features)]
        out[f"anchors.{name}.info"] = [
            generator.num_anchors, generator.num_cell_anchors, generator.box_dim, list(generator.state_dict()),
            list(generator.strides), generator.num_features, generator.offset,
        ]
    out["cell_anchors"] = generator.generate_cell_anchors()
    cfg = get_cfg()
    made = build_anchor_generator(cfg, [ShapeSpec(stride=16)])
    out["anchors.cfg"] = [a.tensor for a in made(features[:1])]
    out["anchors.registered"] = "DefaultAnchorGenerator" in ANCHOR_GENERATOR_REGISTRY


def matching(out):
    g = torch.Generator().manual_seed(0)
    # Rounded, so that there are ties and values on the thresholds; an empty row for the low-quality rule.
    quality = (torch.rand(6, 50, generator=g) * 10).round() / 10
    quality[2] = 0
    for name, thresholds, labels in [("two", [0.3, 0.7], [0, -1, 1]), ("one", [0.5], [0, 1])]:
        for low in (False, True):
            matcher = Matcher(thresholds, labels, allow_low_quality_matches=low)
            out[f"matcher.{name}.{low}"] = list(matcher(quality))
            out[f"matcher.{name}.{low}.dtypes"] = [str(x.dtype) for x in matcher(quality)]
            out[f"matcher.{name}.{low}.empty"] = list(matcher(torch.zeros(0, 4)))
            out[f"matcher.{name}.{low}.attributes"] = [
                list(matcher.thresholds), list(matcher.labels), matcher.allow_low_quality_matches
            ]
    labels = torch.randint(-1, 4, (200,), generator=g)
    for total, fraction in [(40, 0.5), (40, 0.01), (1000, 0.25), (60, 1.0)]:
        positive, negative = subsample_labels(labels, total, fraction, 3)
        assert ((labels[positive] >= 0) & (labels[positive] < 3)).all() and (labels[negative] == 3).all()
        assert len(set(positive.tolist() + negative.tolist())) == len(positive) + len(negative)
        out[f"subsample.{total}.{fraction}"] = [len(positive), len(negative)]
    torch.manual_seed(1)
    out["subsample.seeded"] = list(subsample_labels(labels, 30, 0.5, 3))


def transforms(out):
    source, target = random_boxes(20, 1), random_boxes(20, 2)
    deltas = torch.randn(20, 4, generator=torch.Generator().manual_seed(3)) * 3
    for name, transform in {
        "rcnn": Box2BoxTransform((10.0, 10.0, 5.0, 5.0)),
        "unit": Box2BoxTransform((1, 1, 1, 1), scale_clamp=0.5),
        "linear": Box2BoxTransformLinear(),
        "linear_pixels": Box2BoxTransformLinear(normalize_by_size=False),
    }.items():
        out[f"{name}.deltas"] = transform.get_deltas(source, target)
        out[f"{name}.boxes"] = transform.apply_deltas(deltas, source)
        out[f"{name}.round_trip"] = transform.apply_deltas(transform.get_deltas(source, target), source)
        out[f"{name}.empty"] = [
            transform.get_deltas(source[:0], target[:0]), transform.apply_deltas(deltas[:0], source[:0])
        ]
        out[f"{name}.half"] = transform.apply_deltas(deltas.half(), source)
        if name in ("rcnn", "unit"):
            out[f"{name}.classes"] = transform.apply_deltas(torch.cat((deltas, -deltas, deltas * 2), 1), source)
        mask = torch.rand(2, 20, generator=torch.Generator().manual_seed(7)) > 0.6
        predicted = torch.stack((deltas, deltas / 3)) / 5
        for kind, beta in [("smooth_l1", 0.0), ("smooth_l1", 0.5), ("giou", 0.0), ("diou", 0.0), ("ciou", 0.0)]:
            for fg in (mask, torch.zeros_like(mask)):
                leaf = predicted.clone().requires_grad_()
                loss = _dense_box_regression_loss(
                    [Boxes(source[:12]), Boxes(source[12:])], transform, [leaf[:, :12], leaf[:, 12:]],
                    [target, target.flip(0)], fg, box_reg_loss_type=kind, smooth_l1_beta=beta,
                )
                loss.backward()
                out[f"{name}.{kind}.{beta}.{int(fg.sum())}"] = [float(loss), leaf.grad]


def postprocessing(out):
    boxes = torch.tensor([[5.0, 5, 60, 60], [10, 20, 190, 66], [120, 2, 130, 4], [20, 10, 20, 30]])
    for height, width in [(140, 100), (35, 333), (70, 100)]:
        found = Instances((70, 100), pred_boxes=Boxes(boxes.clone()), scores=torch.arange(4.0))
        found.pred_keypoints = torch.arange(24.0).reshape(4, 2, 3)
        found.pred_masks = torch.rand(4, 1, 14, 14, generator=torch.Generator().manual_seed(1))
        result = detector_postprocess(found, height, width)
        out[f"postprocess.{height}"] = [
            result.pred_boxes.tensor, result.scores, result.pred_keypoints, list(result.image_size)
        ]
        # A pixel on the threshold may fall either way, so areas are compared.
        out[f"postprocess.{height}.mask_area"] = [x.sum() / (height * width) for x in result.pred_masks.float()]
    proposals = Instances((70, 100), proposal_boxes=Boxes(boxes.clone()))
    out["postprocess.proposals"] = detector_postprocess(proposals, 50, 50).proposal_boxes.tensor
    scores = torch.rand(3, 20, 24, generator=torch.Generator().manual_seed(2))
    out["sem_seg"] = sem_seg_postprocess(scores, (17, 23), 40, 50)
    out["permute"] = permute_to_N_HWA_K(torch.arange(48.0).view(2, 6, 2, 2), 3)


def probe(workdir):
    out = {}
    for part in (anchors, matching, transforms, postprocessing):
        part(out)
    return out
