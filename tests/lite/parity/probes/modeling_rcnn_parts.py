"""RoI heads on small feature maps: heads, sampling, losses of every kind, gradients, detections, empty images."""

import torch
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    build_roi_heads,
    select_foreground_proposals,
)
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.modeling.roi_heads.roi_heads import select_proposals_with_visible_keypoints
from detectron2.structures import Boxes, ImageList, Instances, Keypoints
from detectron2.utils.events import EventStorage

STRIDES = {"p2": 4, "p3": 8, "p4": 16, "res4": 16}
SIZES = [(120, 160), (97, 131)]
NUM_CLASSES = 3
FED = "parity_probe_with_image_counts"


def make_features(channels=8):
    g = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(2, 32 if name == "res4" else channels, 128 // s, 160 // s, generator=g).requires_grad_()
        for name, s in STRIDES.items()
    }


def make_gt(empty=()):
    boxes = [[[10.0, 12, 60, 90], [70, 20, 150, 100], [5, 5, 21, 25], [70, 20, 150, 100]], [[30.0, 8, 99, 80]]]
    classes = [[0, 2, 1, 1], [2]]
    gt = []
    for i, (size, b, c) in enumerate(zip(SIZES, boxes, classes)):
        x = Instances(size, gt_boxes=Boxes(torch.tensor(b)), gt_classes=torch.tensor(c))
        x.gt_number = torch.arange(len(c)) + 10 * i
        x.other = torch.arange(len(c))
        gt.append(x[:0] if i in empty else x)
    return gt


def make_proposals(number=60):
    g = torch.Generator().manual_seed(2)
    proposals = []
    for size, truth in zip(SIZES, make_gt()):
        near = truth.gt_boxes.tensor.repeat(6, 1)
        near = near + torch.randn(near.shape, generator=g) * 5
        corner = torch.rand(number, 2, generator=g) * 90
        far = torch.cat((corner, corner + 4 + torch.rand(number, 2, generator=g) * 60), dim=1)
        boxes = Boxes(torch.cat((near, far)))
        boxes.clip(size)
        boxes = boxes[boxes.nonempty()]
        logits = torch.randn(len(boxes), generator=g)
        proposals.append(Instances(size, proposal_boxes=boxes, objectness_logits=logits))
    return proposals


def make_heads(name="StandardROIHeads", **changes):
    MetadataCatalog.get(FED).class_image_count = [
        {"id": 2, "image_count": 9}, {"id": 1, "image_count": 4}, {"id": 3, "image_count": 30}
    ]
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = (FED,)
    cfg.MODEL.ROI_HEADS.NAME = name
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4"] if name != "Res5ROIHeads" else ["res4"]
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 24
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.3
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 4
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 2, 16
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = name == "CascadeROIHeads"
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 8, 4
    cfg.TEST.DETECTIONS_PER_IMAGE = 20
    for key, value in changes.items():
        cfg.merge_from_list([f"MODEL.{key.replace('__', '.')}", value])
    torch.manual_seed(7)
    shapes = {k: ShapeSpec(channels=32 if k == "res4" else 8, stride=s) for k, s in STRIDES.items()}
    heads = build_roi_heads(cfg, shapes)
    drawn = [float(x.double().sum()) for x in heads.state_dict().values()]
    with torch.no_grad():
        for key, weight in heads.named_parameters():
            if "cls_score" in key or "bbox_pred" in key:
                weight.mul_(60)
    return heads, drawn


def instances_of(found):
    plain = []
    for x in found:
        fields = {k: v.tensor if hasattr(v, "tensor") else v for k, v in sorted(x.get_fields().items())}
        plain.append([list(x.image_size), fields])
    return plain


VARIANTS = {
    "standard": {},
    "convolutions": {"ROI_BOX_HEAD__NUM_CONV": 2, "ROI_BOX_HEAD__CONV_DIM": 6, "ROI_BOX_HEAD__NUM_FC": 1},
    "normed": {"ROI_BOX_HEAD__NUM_CONV": 1, "ROI_BOX_HEAD__CONV_DIM": 32, "ROI_BOX_HEAD__NORM": "GN",
               "ROI_BOX_HEAD__NUM_FC": 0},
    "agnostic": {"ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG": True, "ROI_BOX_HEAD__SMOOTH_L1_BETA": 0.3},
    "giou": {"ROI_BOX_HEAD__BBOX_REG_LOSS_TYPE": "giou", "ROI_BOX_HEAD__BBOX_REG_LOSS_WEIGHT": 2.5},
    "diou": {"ROI_BOX_HEAD__BBOX_REG_LOSS_TYPE": "diou"}, "ciou": {"ROI_BOX_HEAD__BBOX_REG_LOSS_TYPE": "ciou"},
    "sigmoid": {"ROI_BOX_HEAD__USE_SIGMOID_CE": True},
    "federated": {"ROI_BOX_HEAD__USE_SIGMOID_CE": True, "ROI_BOX_HEAD__USE_FED_LOSS": True,
                  "ROI_BOX_HEAD__FED_LOSS_NUM_CLASSES": 3},
    "pred boxes": {"ROI_BOX_HEAD__TRAIN_ON_PRED_BOXES": True},
    "pred boxes agnostic": {"ROI_BOX_HEAD__TRAIN_ON_PRED_BOXES": True, "ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG": True},
    "no ground truth among them": {"ROI_HEADS__PROPOSAL_APPEND_GT": False},
    "ignored": {"ROI_HEADS__IOU_THRESHOLDS": [0.3, 0.6], "ROI_HEADS__IOU_LABELS": [0, -1, 1]},
    "all proposals": {"ROI_HEADS__BATCH_SIZE_PER_IMAGE": 1000, "ROI_HEADS__POSITIVE_FRACTION": 1.0},
    "old pooler": {"ROI_BOX_HEAD__POOLER_TYPE": "ROIPool"},
    "cascade": {"ROI_HEADS__NAME": "CascadeROIHeads"},
    "cascade of two": {
        "ROI_HEADS__NAME": "CascadeROIHeads", "ROI_BOX_CASCADE_HEAD__IOUS": (0.5, 0.75),
        "ROI_BOX_CASCADE_HEAD__BBOX_REG_WEIGHTS": ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0)),
        "ROI_BOX_HEAD__BBOX_REG_LOSS_TYPE": "giou",
    },
    "res5": {"ROI_HEADS__NAME": "Res5ROIHeads"},
}


def heads_in_all_forms(out):
    images = ImageList(torch.zeros(2, 3, 128, 160), SIZES)
    for name, changes in VARIANTS.items():
        changes = dict(changes)
        heads, drawn = make_heads(changes.pop("ROI_HEADS__NAME", "StandardROIHeads"), **changes)
        out[f"{name}.state_dict"] = [list(heads.state_dict()), drawn]
        out[f"{name}.frozen"] = [key for key, p in heads.named_parameters() if not p.requires_grad]
        features = make_features()
        cases = [(), (1,), (0, 1)] if name in ("standard", "cascade", "sigmoid", "res5") else [()]
        for empty in cases:
            case = f"{name}.without gt {empty}"
            torch.manual_seed(3)
            with EventStorage() as storage:
                samples = heads.label_and_sample_proposals(make_proposals(), make_gt(empty))
                out[f"{case}.sampled"] = instances_of(samples)
                out[f"{case}.logged while sampling"] = {k: v[0] for k, v in sorted(storage.latest().items())}
            torch.manual_seed(3)
            with EventStorage() as storage:
                returned, losses = heads(images, features, make_proposals(), make_gt(empty))
            out[f"{case}.returned"] = instances_of(returned)
            out[f"{case}.losses"] = {k: float(v.detach()) for k, v in losses.items()}
            inputs = [p for p in (*heads.parameters(), *features.values()) if p.requires_grad]
            out[f"{case}.gradients"] = list(torch.autograd.grad(sum(losses.values()), inputs, allow_unused=True))
            out[f"{case}.logged"] = {k: v[0] for k, v in sorted(storage.latest().items())}
        heads.eval()
        with torch.no_grad():
            found, nothing = heads(images, features, make_proposals())
            out[f"{name}.detections"] = [instances_of(found), nothing]
            assert len(found[0]) > 2
            none = [x[:0] for x in make_proposals()]
            out[f"{name}.no proposals"] = instances_of(heads(images, features, none)[0])
            out[f"{name}.given boxes"] = instances_of(heads.forward_with_given_boxes(features, found))


def box_heads(out):
    shape = ShapeSpec(channels=4, height=5, width=3)
    for norm in ("", "BN", "FrozenBN", "LN"):
        for convs, linears in (([6, 5], [7]), ([], [8, 9]), ([6], [])):
            torch.manual_seed(5)
            head = FastRCNNConvFCHead(shape, conv_dims=convs, fc_dims=linears, conv_norm=norm)
            key = f"box head.{norm}.{len(convs)}.{len(linears)}"
            out[f"{key}.state_dict"] = dict(head.state_dict())
            x = torch.linspace(-1, 1, 3 * 60).view(3, 4, 5, 3)
            s = head.output_shape
            out[f"{key}.output"] = [head(x), [s.channels, s.height, s.width, s.stride]]
            out[f"{key}.children"] = [k for k, _ in head.named_children()]


def inference(out):
    g = torch.Generator().manual_seed(6)
    corner = torch.rand(40, NUM_CLASSES, 2, generator=g) * 90 - 5
    boxes = torch.cat((corner, corner + torch.rand(40, NUM_CLASSES, 2, generator=g) * 80), dim=2).flatten(1)
    boxes[5:9] = boxes[5]
    scores = (torch.randn(40, NUM_CLASSES + 1, generator=g) * 2).softmax(dim=1)
    scores[5:9] = scores[5]
    for name, b in (("each class", boxes), ("agnostic", boxes[:, :4])):
        for limits in ((0.05, 0.5, 100), (0.3, 0.3, 5), (0.05, 0.5, -1), (0.99999, 0.5, 10), (0.0, 0.9, 0)):
            found, rows = fast_rcnn_inference(
                [b[:25], b[25:], b[:0]], [scores[:25], scores[25:], scores[:0]], [*SIZES, (10, 10)], *limits
            )
            out[f"inference.{name}.{limits}"] = [instances_of(found), list(rows)]
    # Only the last row: detectron2 numbers the rows that remain.
    broken = boxes.clone()
    broken[39, 2] = float("nan")
    found, rows = fast_rcnn_inference([broken], [scores], SIZES[:1], 0.05, 0.5, 100)
    out["inference.not finite"] = [instances_of(found), list(rows)]


def output_layers(out):
    transform = Box2BoxTransform((10.0, 10.0, 5.0, 5.0))
    for agnostic in (False, True):
        torch.manual_seed(8)
        layers = FastRCNNOutputLayers(
            ShapeSpec(channels=4, height=2, width=2), box2box_transform=transform, num_classes=NUM_CLASSES,
            cls_agnostic_bbox_reg=agnostic, loss_weight=3.0,
        )
        predictions = layers(torch.linspace(-5, 9, 16 * 10).view(10, 4, 2, 2))
        proposals = [x[:n] for x, n in zip(make_proposals(), (7, 3))]
        for p, classes in zip(proposals, ([0, 3, 1, 2, 3, 0, 1], [3, 3, 3])):
            p.gt_classes = torch.tensor(classes)
        proposals[0].gt_boxes = make_proposals()[0].proposal_boxes[10:17]
        key = f"layers.{agnostic}"
        out[f"{key}.predictions"] = list(predictions)
        out[f"{key}.boxes"] = layers.predict_boxes(predictions, proposals)
        out[f"{key}.probs"] = list(layers.predict_probs(predictions, proposals))
        out[f"{key}.boxes of gt"] = list(layers.predict_boxes_for_gt_classes(predictions, proposals))
        with EventStorage() as storage:
            losses = layers.losses(predictions, proposals)
            nothing = layers.losses((predictions[0][:0], predictions[1][:0]), [x[:0] for x in proposals])
        out[f"{key}.losses"] = [{k: float(v.detach()) for k, v in x.items()} for x in (losses, nothing)]
        out[f"{key}.logged"] = {k: v[0] for k, v in storage.latest().items()}
        out[f"{key}.weights"] = dict(layers.loss_weight)


def selection(out):
    proposals = make_proposals()
    for p in proposals:
        p.gt_classes = torch.arange(len(p)) % 5 - 1
    chosen, masks = select_foreground_proposals(proposals, 3)
    out["foreground"] = [instances_of(chosen), masks]
    points = torch.tensor([[[0.0, 0, 2]], [[10, 10, 1]], [[10.01, 5, 2]], [[5, 5, 0]], [[5, 5, 0.5]]])
    box = Boxes(torch.tensor([[0.0, 0, 10, 10]] * 5))
    p = Instances((50, 50), proposal_boxes=box, gt_keypoints=Keypoints(points), gt_number=torch.arange(5))
    with EventStorage() as storage:
        found = select_proposals_with_visible_keypoints([p, p[:0], p[3:]])
        out["visible keypoints"] = [[x.gt_number for x in found], storage.latest()["keypoint_head/num_fg_samples"][0]]


def probe(workdir):
    out = {}
    for part in (heads_in_all_forms, box_heads, inference, output_layers, selection):
        part(out)
    return out
