"""Region proposal network and RoI pooler on small feature maps: sampling, losses, gradients, proposals, edge cases."""

import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels, convert_boxes_to_pooler_format
from detectron2.modeling.proposal_generator import build_proposal_generator
from detectron2.modeling.proposal_generator.proposal_utils import (
    add_ground_truth_to_proposals,
    find_top_rpn_proposals,
)
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage

STRIDES = {"p2": 4, "p3": 8, "p4": 16}
SIZES = [(120, 160), (97, 131)]


def make_features(generator, channels=8):
    return {
        name: torch.randn(2, channels, 128 // s, 160 // s, generator=generator) for name, s in STRIDES.items()
    }


def make_gt(empty=()):
    boxes = [[[10.0, 12, 60, 90], [70, 20, 150, 100], [5, 5, 21, 25], [70, 20, 150, 100]], [[30.0, 8, 99, 80]]]
    gt = [Instances(size, gt_boxes=Boxes(torch.tensor(b))) for size, b in zip(SIZES, boxes)]
    return [x[:0] if i in empty else x for i, x in enumerate(gt)]


def make_rpn(**changes):
    cfg = get_cfg()
    cfg.MODEL.RPN.IN_FEATURES = list(STRIDES)
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64]]
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 32
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN, cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 200, 60
    cfg.MODEL.RPN.PRE_NMS_TOPK_TEST, cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 120, 40
    for key, value in changes.items():
        cfg.merge_from_list([f"MODEL.{key.replace('__', '.')}", value])
    torch.manual_seed(7)
    rpn = build_proposal_generator(cfg, {name: ShapeSpec(channels=8, stride=s) for name, s in STRIDES.items()})
    drawn = [float(x.double().sum()) for x in rpn.state_dict().values()]
    with torch.no_grad():
        for weight in rpn.parameters():
            weight.mul_(20)
    return rpn, drawn


def proposals_of(found):
    return [
        [x.proposal_boxes.tensor, x.objectness_logits, list(x.image_size), sorted(x.get_fields())] for x in found
    ]


def network(out):
    variants = {
        "plain": {}, "two convolutions": {"RPN__CONV_DIMS": [-1, 12]}, "one wide": {"RPN__CONV_DIMS": [12]},
        "as wide as the one before": {"RPN__CONV_DIMS": [12, -1]},
        "boundary": {"RPN__BOUNDARY_THRESH": 8}, "minimum size": {"PROPOSAL_GENERATOR__MIN_SIZE": 12},
        "smooth": {"RPN__SMOOTH_L1_BETA": 0.5, "RPN__LOSS_WEIGHT": 3.0, "RPN__BBOX_REG_LOSS_WEIGHT": 0.25},
        "giou": {"RPN__BBOX_REG_LOSS_TYPE": "giou"}, "diou": {"RPN__BBOX_REG_LOSS_TYPE": "diou"},
        "ciou": {"RPN__BBOX_REG_LOSS_TYPE": "ciou"}, "weights": {"RPN__BBOX_REG_WEIGHTS": (2.0, 2.0, 1.0, 1.0)},
        "all anchors": {"RPN__BATCH_SIZE_PER_IMAGE": 10000, "RPN__POSITIVE_FRACTION": 1.0},
    }
    images = ImageList(torch.zeros(2, 3, 128, 160), SIZES)
    for name, changes in variants.items():
        rpn, drawn = make_rpn(**changes)
        out[f"{name}.state_dict"] = [list(rpn.state_dict()), drawn]
        features = {k: x.requires_grad_() for k, x in make_features(torch.Generator().manual_seed(1)).items()}
        maps = list(features.values())
        out[f"{name}.head"] = [list(x) for x in rpn.rpn_head(maps)]
        anchors = rpn.anchor_generator(maps)
        for empty in ((), (1,), (0, 1)):
            if name not in ("plain", "boundary") and empty:
                continue
            case = f"{name}.without gt {empty}"
            torch.manual_seed(3)
            labels, boxes = rpn.label_and_sample_anchors(anchors, make_gt(empty))
            out[f"{case}.labels"] = list(labels)
            out[f"{case}.boxes"] = [b[c == 1] for b, c in zip(boxes, labels)]
            torch.manual_seed(3)
            rpn.zero_grad()
            with EventStorage() as storage:
                found, losses = rpn(images, features, make_gt(empty))
            out[f"{case}.losses"] = {k: float(v.detach()) for k, v in sorted(losses.items())}
            gradients = torch.autograd.grad(sum(losses.values()), [*rpn.parameters(), *maps], allow_unused=True)
            out[f"{case}.gradients"] = list(gradients)
            out[f"{case}.logged"] = {k: v[0] for k, v in sorted(storage.latest().items())}
            out[f"{case}.proposals"] = proposals_of(found)
            assert not any(x.proposal_boxes.tensor.requires_grad for x in found)
        rpn.eval()
        found, losses = rpn(images, features)
        out[f"{name}.test"] = [proposals_of(found), len(losses)]
        assert len(found[0]) > 5


def selection(out):
    g = torch.Generator().manual_seed(2)
    corner = torch.rand(2, 300, 2, generator=g) * 140 - 10
    boxes = torch.cat((corner, corner + torch.rand(2, 300, 2, generator=g) * 60), dim=2)
    logits = torch.randn(2, 300, generator=g)
    logits[0, 10:20] = logits[0, 10]
    boxes[0, 10:20] = boxes[0, 10]
    split = [200, 97, 3]
    cases = {
        "plain": (0.7, 100, 50, 0.0), "strict": (0.3, 300, 300, 0.0), "large": (0.5, 50, 20, 25.0),
        "none left": (0.5, 50, 20, 1000.0),
    }
    for name, arguments in cases.items():
        for training in (True, False):
            found = find_top_rpn_proposals(
                list(boxes.split(split, dim=1)), list(logits.split(split, dim=1)), SIZES, *arguments, training
            )
            out[f"select.{name}.{training}"] = proposals_of(found)
    out["boxes are left alone"] = boxes
    broken, unsure = boxes.clone(), logits.clone()
    broken[0, 3, 1], unsure[1, 7], unsure[1, 250] = float("inf"), float("nan"), float("inf")
    pair = list(broken.split(split, dim=1)), list(unsure.split(split, dim=1))
    out["select.not finite"] = proposals_of(find_top_rpn_proposals(*pair, SIZES, 0.7, 100, 50, 0.0, False))
    try:
        find_top_rpn_proposals(*pair, SIZES, 0.7, 100, 50, 0.0, True)
        out["diverged"] = "no error"
    except FloatingPointError:
        out["diverged"] = "FloatingPointError"
    gt = make_gt(empty=(1,))
    joined = add_ground_truth_to_proposals(gt, find_top_rpn_proposals(*pair, SIZES, 0.7, 100, 50, 0.0, False))
    out["with ground truth"] = proposals_of(joined)
    joined = add_ground_truth_to_proposals([x.gt_boxes for x in gt], [x[:2] for x in joined])
    out["with boxes"] = proposals_of(joined)


def pooling(out):
    g = torch.Generator().manual_seed(4)
    side = 2 ** (torch.rand(200, 1, generator=g) * 9)
    corner = torch.rand(200, 2, generator=g) * 100
    boxes = torch.cat((corner, corner + side * (0.3 + torch.rand(200, 2, generator=g))), dim=1)
    exact = torch.tensor([[0.0, 0, s, s] for s in (0, 28, 55.999, 56, 112, 223.99, 224, 225, 448, 1000)])
    lists = [Boxes(boxes), Boxes(torch.zeros(0, 4)), Boxes(exact)]
    for limits in ((2, 5, 224, 4), (1, 3, 112, 3), (3, 3, 224, 4)):
        out[f"levels.{limits}"] = assign_boxes_to_levels(lists, *limits)
    out["pooler format"] = convert_boxes_to_pooler_format(lists)

    features = [torch.randn(2, 3, 256 // s, 320 // s, generator=g).requires_grad_() for s in (4, 8, 16)]
    pairs = [Boxes(boxes[:60]), Boxes(boxes[60:64])]
    for kind in ("ROIAlign", "ROIAlignV2", "ROIPool"):
        for ratio, size in ((0, 7), (2, 5)):
            pooler = ROIPooler(size, [1 / 4, 1 / 8, 1 / 16], ratio, kind)
            pooled = pooler(features, pairs)
            weight = torch.linspace(-1, 1, pooled.numel()).view_as(pooled)
            out[f"pool.{kind}.{ratio}"] = [pooled, *torch.autograd.grad((pooled * weight).sum(), features)]
            single = ROIPooler((3, size), [1 / 8], ratio, kind)
            out[f"pool one level.{kind}.{ratio}"] = single(features[1:2], pairs)
            nothing = [Boxes(torch.zeros(0, 4))] * 2
            out[f"pool nothing.{kind}.{ratio}"] = [pooler(features, nothing), single(features[:1], nothing)]
    out["pooler.attributes"] = [
        pooler.output_size, pooler.min_level, pooler.max_level, pooler.canonical_level, pooler.canonical_box_size,
        len(pooler.level_poolers),
    ]


def probe(workdir):
    out = {}
    for part in (network, selection, pooling):
        part(out)
    return out
