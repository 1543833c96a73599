"""Faster, Mask, Keypoint and Cascade R-CNN on a tiny pyramid. Passes on detectron2 and on detectron2-lite."""

import math

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    Backbone,
    GeneralizedRCNN,
    ProposalNetwork,
    StandardROIHeads,
    build_model,
)
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import (
    ROI_HEADS_REGISTRY,
    CascadeROIHeads,
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    Res5ROIHeads,
    ROIHeads,
    build_roi_heads,
    select_foreground_proposals,
)
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.modeling.roi_heads.roi_heads import select_proposals_with_visible_keypoints
from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage

torch.set_num_threads(1)
REFUSED = (AssertionError, ValueError, KeyError, TypeError)
STRIDES = {"p2": 4, "p3": 8, "p4": 16}
NUM_CLASSES = 3


@BACKBONE_REGISTRY.register()
class PyramidOfOneLayer(Backbone):
    """p2, p3 and p4 of 8 channels, each from one convolution."""

    size_divisibility = 16

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.convs = torch.nn.ModuleDict({name: torch.nn.Conv2d(3, 8, s, stride=s) for name, s in STRIDES.items()})
        self._out_features = list(STRIDES)
        self._out_feature_channels = dict.fromkeys(STRIDES, 8)
        self._out_feature_strides = STRIDES

    def forward(self, x):
        return {name: conv(x).tanh() for name, conv in self.convs.items()}


def make_cfg(**changes):
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "PyramidOfOneLayer"
    cfg.MODEL.PIXEL_STD = [57.0, 57.0, 57.0]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64]]
    cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = list(STRIDES)
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 50
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 20
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 1, 8
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 3
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM, cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION = 4, 4
    cfg.MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS = (4,)
    cfg.MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION, cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 4, 2
    cfg.TEST.DETECTIONS_PER_IMAGE = 7
    for key, value in changes.items():
        cfg.merge_from_list([f"MODEL.{key.replace('__', '.')}", value])
    return cfg


KINDS = {
    "faster": {},
    "mask": {"MASK_ON": True},
    "keypoint": {"KEYPOINT_ON": True},
    "both": {"MASK_ON": True, "KEYPOINT_ON": True},
    "cascade": {"ROI_HEADS__NAME": "CascadeROIHeads", "ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG": True, "MASK_ON": True},
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def make_model(kind="faster", **changes):
    torch.manual_seed(0)
    model = build_model(make_cfg(**KINDS[kind], **changes))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "backbone" not in name and weight.dim() > 1:
                weight.mul_(10)
    return model


def instances(size, boxes, classes):
    tensor = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    gt = Instances(size, gt_boxes=Boxes(tensor), gt_classes=torch.tensor(classes, dtype=torch.int64))
    gt.gt_masks = PolygonMasks([[[x0, y0, x1, y0, x1, y1, x0, y1]] for x0, y0, x1, y1 in tensor.tolist()])
    centers = (tensor[:, None, :2] + tensor[:, None, 2:]) / 2
    points = torch.cat((centers, torch.full_like(centers[..., :1], 2)), dim=2)
    gt.gt_keypoints = Keypoints(points.repeat(1, 2, 1))
    return gt


def batch(*ground_truths, size=(64, 80)):
    g = torch.Generator().manual_seed(1)
    return [
        {
            "image": torch.randint(0, 256, (3, *size), generator=g).to(torch.uint8),
            "instances": instances(size, boxes, classes),
        }
        for boxes, classes in ground_truths
    ]


ONE = ([[8, 8, 40, 40]], [1])
TWO = ([[8, 8, 40, 40], [30, 2, 78, 60]], [1, 2])
NONE = ([], [])


def train(model, inputs):
    with EventStorage() as storage:
        losses = model(inputs)
    return losses, {name: value for name, (value, _) in storage.latest().items()}


class TestModels:
    @each_kind
    def test_losses_and_gradients(self, kind):
        model = make_model(kind)
        losses, logged = train(model, batch(TWO, NONE))
        expected = {"loss_rpn_cls", "loss_rpn_loc"}
        if kind == "cascade":
            expected |= {f"{name}_stage{k}" for name in ("loss_cls", "loss_box_reg") for k in range(3)}
            assert {"stage0/fast_rcnn/cls_accuracy", "stage2/roi_head/num_fg_samples"} <= set(logged)
        else:
            expected |= {"loss_cls", "loss_box_reg"}
            assert {"fast_rcnn/cls_accuracy", "fast_rcnn/fg_cls_accuracy", "fast_rcnn/false_negative"} <= set(logged)
        expected |= {"loss_mask"} if kind in ("mask", "both", "cascade") else set()
        expected |= {"loss_keypoint"} if kind in ("keypoint", "both") else set()
        assert set(losses) == expected and all(x.dim() == 0 and torch.isfinite(x) for x in losses.values())
        assert {"rpn/num_pos_anchors", "rpn/num_neg_anchors", "roi_head/num_fg_samples"} <= set(logged)
        sum(losses.values()).backward()
        assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in model.parameters())

    @each_kind
    def test_without_ground_truth_all_parameters_still_get_gradients(self, kind):
        model = make_model(kind)
        losses, logged = train(model, batch(NONE, NONE))
        sum(losses.values()).backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        assert losses["loss_rpn_loc"] == 0 and logged["roi_head/num_fg_samples"] == 0
        assert "fast_rcnn/fg_cls_accuracy" not in logged

    @each_kind
    def test_detections(self, kind):
        model = make_model(kind).eval()
        inputs = batch(ONE, ONE)
        inputs[0].update(height=128, width=40)
        with torch.no_grad():
            results = [x["instances"] for x in model(inputs)]
        assert [tuple(x.image_size) for x in results] == [(128, 40), (64, 80)]
        for x, (height, width) in zip(results, [(128, 40), (64, 80)]):
            assert 0 < len(x) <= 7 and (x.scores.diff() <= 0).all()
            assert ((x.pred_classes >= 0) & (x.pred_classes < NUM_CLASSES)).all()
            boxes = x.pred_boxes.tensor
            assert (boxes >= 0).all() and (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()
            assert x.has("pred_masks") == (kind in ("mask", "both", "cascade"))
            assert x.has("pred_keypoints") == (kind in ("keypoint", "both"))
            if x.has("pred_masks"):
                assert x.pred_masks.shape == (len(x), height, width) and x.pred_masks.dtype == torch.bool
            if x.has("pred_keypoints"):
                assert x.pred_keypoints.shape == (len(x), 2, 3)

    @each_kind
    def test_given_boxes(self, kind):
        """Masks and keypoints for boxes from elsewhere; those of the model itself get what they had."""
        model = make_model(kind).eval()
        inputs = batch(ONE, ONE)
        with torch.no_grad():
            found = model.inference(inputs, do_postprocess=False)
            bare = [Instances(x.image_size, pred_boxes=x.pred_boxes, pred_classes=x.pred_classes) for x in found]
            again = model.inference(inputs, detected_instances=bare, do_postprocess=False)
        for a, b in zip(found, again):
            assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
            for name in ("pred_masks", "pred_keypoints"):
                assert a.has(name) == b.has(name)
                if a.has(name):
                    torch.testing.assert_close(a.get(name), b.get(name))
        with pytest.raises(REFUSED):
            model.roi_heads.forward_with_given_boxes({}, [Instances((64, 80), scores=torch.zeros(1))])

    def test_image_in_a_batch_gives_what_it_gives_alone(self):
        model = make_model("both").eval()
        inputs = batch(ONE, ONE)
        with torch.no_grad():
            together = [x["instances"] for x in model(inputs)]
            alone = [model([x])[0]["instances"] for x in inputs]
        for a, b in zip(together, alone):
            torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor, rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(a.scores, b.scores)
            assert torch.equal(a.pred_classes, b.pred_classes)

    def test_mixed_precision(self):
        model = make_model("both", ROI_HEADS__POSITIVE_FRACTION=1.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses, _ = train(model, batch(TWO))
            sum(losses.values()).backward()
            with torch.no_grad():
                assert model.eval()(batch(ONE))[0]["instances"].pred_boxes.tensor.dtype == torch.float32
        assert all(torch.isfinite(x) for x in losses.values())
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())

    def test_refusals(self):
        model = make_model()
        with pytest.raises(REFUSED), EventStorage():
            model([{"image": torch.zeros(3, 64, 80)}])
        with pytest.raises((*REFUSED, RuntimeError)):
            model.inference(batch(ONE))

    def test_proposals_that_come_with_the_inputs(self):
        model = make_model(PROPOSAL_GENERATOR__NAME="PrecomputedProposals").eval()
        inputs = batch(ONE)
        assert model.proposal_generator is None
        with pytest.raises(REFUSED):
            model(inputs)
        boxes = Boxes(torch.tensor([[8.0, 8, 40, 40], [0, 0, 20, 20]]))
        inputs[0]["proposals"] = Instances((64, 80), proposal_boxes=boxes, objectness_logits=torch.zeros(2))
        with torch.no_grad():
            assert len(model(inputs)[0]["instances"]) > 0
        losses, _ = train(model.train(), inputs)
        assert set(losses) == {"loss_cls", "loss_box_reg"}

    def test_proposal_network(self):
        cfg = make_cfg(META_ARCHITECTURE="ProposalNetwork")
        model = build_model(cfg)
        assert isinstance(model, ProposalNetwork)
        losses, _ = train(model, batch(TWO, NONE))
        assert set(losses) == {"loss_rpn_cls", "loss_rpn_loc"}
        with torch.no_grad():
            inputs = [{**batch(ONE)[0], "height": 128, "width": 160}]
            found = model.eval()(inputs)[0]["proposals"]
        assert tuple(found.image_size) == (128, 160) and 0 < len(found) <= 20
        assert sorted(found.get_fields()) == ["objectness_logits", "proposal_boxes"]

    def test_visualization(self, monkeypatch):
        model = make_model(PROPOSAL_GENERATOR__MIN_SIZE=4)
        model.vis_period, drawn = 1, []
        with EventStorage() as storage:
            monkeypatch.setattr(storage, "put_image", lambda name, image: drawn.append(image))
            model(batch(TWO))
        assert len(drawn) == 1 and drawn[0].shape[0] == 3

    def test_registered_and_configurable(self):
        cfg = make_cfg()
        model = META_ARCH_REGISTRY.get("GeneralizedRCNN")(cfg)

        class Mine(GeneralizedRCNN):
            pass

        assert isinstance(model.roi_heads, StandardROIHeads) and model.input_format == "BGR"
        mine = Mine(cfg, input_format="RGB")
        assert mine.input_format == "RGB" and list(mine.state_dict()) == list(model.state_dict())
        with pytest.raises(REFUSED):
            Mine(cfg, input_format=None, vis_period=3)

    def test_names_of_weights(self):
        names = set(make_model("both").state_dict())
        assert {
            "proposal_generator.rpn_head.conv.weight", "proposal_generator.rpn_head.anchor_deltas.bias",
            "roi_heads.box_head.fc1.weight", "roi_heads.box_predictor.cls_score.weight",
            "roi_heads.box_predictor.bbox_pred.bias", "roi_heads.mask_head.predictor.weight",
            "roi_heads.keypoint_head.score_lowres.weight",
        } <= names
        assert not any("anchor_generator" in name or "pixel" in name for name in names)
        cascade = make_model("cascade").state_dict()
        assert cascade["roi_heads.box_predictor.2.bbox_pred.weight"].shape == (4, 8)
        assert "roi_heads.box_head.1.fc1.weight" in cascade


def make_heads(**kwargs):
    options = {
        "num_classes": NUM_CLASSES, "batch_size_per_image": 6, "positive_fraction": 0.5,
        "proposal_matcher": Matcher([0.5], [0, 1]),
    }
    return ROIHeads(**{**options, **kwargs})


def proposals_at(*rows):
    boxes = Boxes(torch.tensor(rows, dtype=torch.float32).reshape(-1, 4))
    return Instances((64, 80), proposal_boxes=boxes, objectness_logits=torch.zeros(len(boxes)))


class TestSampling:
    rows = [[8, 8, 40, 36], [9, 9, 40, 40], [30, 2, 78, 50], [0, 0, 9, 9], [60, 50, 70, 60], [50, 50, 60, 60]]

    def sample(self, heads, gt):
        with EventStorage() as storage:
            (drawn,) = heads.label_and_sample_proposals([proposals_at(*self.rows)], [instances((64, 80), *gt)])
        return drawn, {name: value for name, (value, _) in storage.latest().items()}

    def test_by_hand(self):
        drawn, logged = self.sample(make_heads(batch_size_per_image=100, positive_fraction=1.0), TWO)
        found = {tuple(b.tolist()): (int(c), tuple(g.tolist())) for b, c, g in zip(
            drawn.proposal_boxes.tensor, drawn.gt_classes, drawn.gt_boxes.tensor)}
        first, second = map(tuple, TWO[0])
        assert len(drawn) == len(self.rows) + 2  # the ground truth is among them
        assert found[tuple(self.rows[0])] == found[tuple(self.rows[1])] == found[first] == (1, first)
        assert found[tuple(self.rows[2])] == found[second] == (2, second)
        assert all(found[tuple(row)][0] == NUM_CLASSES for row in self.rows[3:])
        assert (drawn.gt_classes[:5] < NUM_CLASSES).all() and logged == {
            "roi_head/num_fg_samples": 5, "roi_head/num_bg_samples": 3
        }
        assert len(drawn.gt_masks) == 8 and drawn.gt_keypoints.tensor.shape == (8, 2, 3)

    def test_numbers(self):
        for _ in range(5):
            drawn, logged = self.sample(make_heads(batch_size_per_image=4, positive_fraction=0.3), TWO)
            assert (drawn.gt_classes < NUM_CLASSES).tolist() == [True, False, False, False]
            assert logged["roi_head/num_fg_samples"] == 1
        drawn, _ = self.sample(make_heads(proposal_append_gt=False, positive_fraction=1.0), TWO)
        assert len(drawn) == 6

    def test_no_ground_truth(self):
        drawn, logged = self.sample(make_heads(), NONE)
        assert drawn.gt_classes.tolist() == [NUM_CLASSES] * 6 and logged["roi_head/num_fg_samples"] == 0
        assert not drawn.has("gt_boxes")

    def test_no_proposals(self):
        with EventStorage():
            (drawn,) = make_heads().label_and_sample_proposals([proposals_at()], [instances((64, 80), *ONE)])
        assert drawn.proposal_boxes.tensor.tolist() == ONE[0] and drawn.gt_classes.tolist() == [1]

    def test_ignored_proposals_are_not_drawn(self):
        heads = make_heads(
            batch_size_per_image=100, positive_fraction=1.0, proposal_matcher=Matcher([0.3, 0.95], [0, -1, 1])
        )
        drawn, _ = self.sample(heads, TWO)
        assert sorted(drawn.gt_classes.tolist()) == [1, 2, 3, 3, 3]

    def test_foreground(self):
        p = proposals_at(*self.rows)
        p.gt_classes = torch.tensor([0, 3, 2, -1, 3, 1])
        (chosen, nothing), masks = select_foreground_proposals([p, p[1:2]], NUM_CLASSES)
        assert chosen.gt_classes.tolist() == [0, 2, 1] and len(nothing) == 0
        assert [m.tolist() for m in masks] == [[True, False, True, False, False, True], [False]]

    def test_visible_keypoints(self):
        p = proposals_at(*[[0, 0, 10, 10]] * 4)
        p.gt_keypoints = Keypoints(torch.tensor([[[0.0, 10, 2]], [[5, 5, 0]], [[5, 10.01, 2]], [[5, 5, 1]]]))
        p.number = torch.arange(4)
        with EventStorage() as storage:
            (chosen,) = select_proposals_with_visible_keypoints([p])
        assert chosen.number.tolist() == [0, 3]
        assert storage.latest()["keypoint_head/num_fg_samples"][0] == 2


def make_layers(**kwargs):
    torch.manual_seed(0)
    transform = Box2BoxTransform((1.0, 1.0, 1.0, 1.0))
    return FastRCNNOutputLayers(ShapeSpec(channels=4), box2box_transform=transform, num_classes=NUM_CLASSES, **kwargs)


def labelled(classes):
    p = proposals_at(*[[0, 0, 10, 10]] * len(classes))
    p.gt_classes = torch.tensor(classes)
    p.gt_boxes = Boxes(torch.tensor([[5.0, 0, 15, 10]] * len(classes)))
    return p


def losses_of(layers, predictions, proposals):
    with EventStorage() as storage:
        losses = layers.losses(predictions, proposals)
    return losses, {name: value for name, (value, _) in storage.latest().items()}


class TestOutputLayers:
    def test_losses_by_hand(self):
        """Four proposals of which two hold objects; the target is half a width to the right."""
        logits = torch.zeros(4, 4)
        logits[0, 1] = logits[2, 3] = logits[3, 3] = math.log(5.0)
        deltas = torch.zeros(4, 12)
        deltas[0, 4], deltas[0, 0], deltas[1, 8 + 2] = 0.25, 9.0, 1.0  # class 1: dx; class 0 does not count
        layers = make_layers(loss_weight={"loss_box_reg": 3.0})
        losses, logged = losses_of(layers, (logits, deltas), [labelled([1, 2]), labelled([3, 3])])
        # Three are right with probability 5/8, one is undecided between four.
        assert losses["loss_cls"].item() == pytest.approx((3 * math.log(8 / 5) + math.log(4)) / 4, rel=1e-5)
        assert losses["loss_box_reg"].item() == pytest.approx(3 * (0.25 + 0.5 + 1.0) / 4, rel=1e-5)
        assert logged["fast_rcnn/cls_accuracy"] == 0.75 and logged["fast_rcnn/fg_cls_accuracy"] == 0.5
        assert logged["fast_rcnn/false_negative"] == 0

    def test_class_agnostic(self):
        layers = make_layers(cls_agnostic_bbox_reg=True, smooth_l1_beta=1.0)
        deltas = torch.zeros(2, 4)
        deltas[0, 0], deltas[1, 0] = 0.3, 7.0
        losses, _ = losses_of(layers, (torch.zeros(2, 4), deltas), [labelled([2, 3])])
        assert losses["loss_box_reg"].item() == pytest.approx(0.5 * 0.2**2 / 2, rel=1e-4)

    @pytest.mark.parametrize("kind, expected", [("giou", 1 - 1 / 3), ("diou", 1 - 1 / 3 + 25 / 325)])
    def test_overlap_losses(self, kind, expected):
        layers = make_layers(box_reg_loss_type=kind)
        losses, _ = losses_of(layers, (torch.zeros(1, 4), torch.zeros(1, 12)), [labelled([0])])
        assert losses["loss_box_reg"].item() == pytest.approx(expected, rel=1e-4)

    def test_unknown_loss(self):
        with pytest.raises(REFUSED):
            losses_of(make_layers(box_reg_loss_type="l7"), (torch.zeros(1, 4), torch.zeros(1, 12)), [labelled([0])])

    def test_no_proposals(self):
        x = torch.zeros(0, 4, requires_grad=True)
        losses, _ = losses_of(make_layers(), make_layers()(x), [labelled([0])[:0]])
        assert all(value == 0 for value in losses.values())

    def test_sigmoid(self):
        logits = torch.zeros(2, 4)
        logits[0, 1] = math.log(3.0)
        layers = make_layers(use_sigmoid_ce=True)
        losses, _ = losses_of(layers, (logits, torch.zeros(2, 12)), [labelled([1, 3])])
        assert losses["loss_cls"].item() == pytest.approx((math.log(4 / 3) + 5 * math.log(2)) / 2, rel=1e-5)
        (scores,) = layers.predict_probs((logits, None), [labelled([1, 3])])
        assert scores[0].tolist() == pytest.approx([0.5, 0.75, 0.5, 0.5])

    def test_federated_loss_counts_shown_and_drawn_classes(self):
        weights = torch.tensor([1.0, 1.0, 0.0])
        layers = make_layers(
            use_sigmoid_ce=True, use_fed_loss=True, fed_loss_num_classes=2, get_fed_loss_cls_weights=lambda: weights
        )
        assert "fed_loss_cls_weights" in layers.state_dict()
        shown = torch.tensor([1, 1])
        drawn = layers.get_fed_loss_classes(shown, 2, NUM_CLASSES, weights)
        assert drawn.tolist() == [1, 0]  # class 2 has no chance
        losses, _ = losses_of(layers, (torch.zeros(2, 4), torch.zeros(2, 12)), [labelled([1, 1])])
        assert losses["loss_cls"].item() == pytest.approx(2 * math.log(2), rel=1e-5)
        with pytest.raises(REFUSED):
            make_layers(use_fed_loss=True, get_fed_loss_cls_weights=lambda: weights)

    def test_federated_loss_weights_come_from_the_data_set(self):
        counts = [{"id": 3, "image_count": 0}, {"id": 1, "image_count": 16}, {"id": 2, "image_count": 9}]
        MetadataCatalog.get("rcnn_test_with_counts").class_image_count = counts
        cfg = make_cfg(ROI_BOX_HEAD__USE_FED_LOSS=True, ROI_BOX_HEAD__USE_SIGMOID_CE=True)
        cfg.DATASETS.TRAIN = ("rcnn_test_with_counts",)
        layers = FastRCNNOutputLayers(cfg, ShapeSpec(channels=4))
        assert layers.fed_loss_cls_weights.tolist() == [4, 3, 0]

    def test_boxes(self):
        layers = make_layers()
        deltas = torch.zeros(3, 12)
        deltas[:, 4] = 0.5
        proposals = [labelled([1]), labelled([0, 3])]
        boxes = layers.predict_boxes((None, deltas), proposals)
        assert [tuple(b.shape) for b in boxes] == [(1, 12), (2, 12)]
        assert boxes[0][0].tolist() == [0, 0, 10, 10, 5, 0, 15, 10, 0, 0, 10, 10]
        own = layers.predict_boxes_for_gt_classes((None, deltas), proposals)
        assert [b.tolist() for b in own] == [[[5, 0, 15, 10]], [[0, 0, 10, 10]] * 2]

    def test_detections_by_hand(self):
        boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [-5, 50, 20, 99], [float("nan"), 0, 1, 1]])
        scores = torch.tensor([[0.6, 0.1, 0.3], [0.5, 0.4, 0.1], [0.2, 0.7, 0.1], [0.9, 0.1, 0.0]])
        (found,), (rows,) = fast_rcnn_inference([boxes], [scores], [(64, 80)], 0.15, 0.5, 10)
        # Row 1 loses class 0 to row 0, which overlaps it, and keeps class 1; background is no class.
        assert rows.tolist() == [2, 0, 1, 2] and found.pred_classes.tolist() == [1, 0, 1, 0]
        assert found.scores.tolist() == pytest.approx([0.7, 0.6, 0.4, 0.2])
        assert found.pred_boxes.tensor[0].tolist() == [0, 50, 20, 64]
        (found,), _ = fast_rcnn_inference([boxes], [scores], [(64, 80)], 0.15, 0.5, 2)
        assert found.scores.tolist() == pytest.approx([0.7, 0.6])

    def test_boxes_of_each_class(self):
        boxes = torch.arange(8.0).repeat(1, 1) + torch.tensor([0, 0, 9, 9] * 2)
        (found,), _ = fast_rcnn_inference([boxes], [torch.tensor([[0.3, 0.6, 0.1]])], [(64, 80)], 0.2, 0.5, 9)
        assert found.pred_classes.tolist() == [1, 0]
        assert found.pred_boxes.tensor.tolist() == [[4, 5, 15, 16], [0, 1, 11, 12]]


class TestBoxHead:
    shape = ShapeSpec(channels=4, height=5, width=3)

    def test_layers(self):
        head = FastRCNNConvFCHead(self.shape, conv_dims=[6, 8], fc_dims=[7])
        assert [name for name, _ in head.named_children()] == ["conv1", "conv2", "flatten", "fc1", "fc_relu1"]
        assert head.output_shape.channels == 7 and head(torch.randn(2, 4, 5, 3)).shape == (2, 7)
        assert head.conv1.bias is not None and (head(torch.randn(2, 4, 5, 3)) >= 0).all()
        maps = FastRCNNConvFCHead(self.shape, conv_dims=[6], fc_dims=[], conv_norm="BN")
        assert maps.output_shape == ShapeSpec(channels=6, height=5, width=3) and maps.conv1.bias is None
        assert maps(torch.randn(2, 4, 5, 3)).shape == (2, 6, 5, 3)

    def test_nothing(self):
        with pytest.raises(REFUSED):
            FastRCNNConvFCHead(self.shape, conv_dims=[], fc_dims=[])


class TestHeads:
    shapes = {name: ShapeSpec(channels=8, stride=s) for name, s in STRIDES.items()}

    def test_channels_must_agree(self):
        shapes = {**self.shapes, "p3": ShapeSpec(channels=9, stride=8)}
        with pytest.raises(REFUSED):
            build_roi_heads(make_cfg(), shapes)

    def test_training_on_predicted_boxes(self):
        heads = build_roi_heads(make_cfg(ROI_BOX_HEAD__TRAIN_ON_PRED_BOXES=True), self.shapes)
        with torch.no_grad():
            heads.box_predictor.bbox_pred.bias.fill_(1.0)
        features = {name: torch.randn(1, 8, 64 // s, 80 // s) for name, s in STRIDES.items()}
        with EventStorage():
            (after,), _ = heads(None, features, [proposals_at([8, 8, 40, 36])], [instances((64, 80), *ONE)])
        assert not after.proposal_boxes.tensor.requires_grad
        # A tenth of the size to the right and down, then e^(1/5) times as large.
        centers = after.proposal_boxes.get_centers()
        near = ((centers - torch.tensor([24 + 3.2, 24 + 3.2])).abs() < 0.5).all(dim=1)
        assert near.any() and (after.proposal_boxes.area()[near] > 1400).all()

    def test_cascade_stages(self):
        heads = build_roi_heads(make_cfg(**KINDS["cascade"]), self.shapes)
        assert isinstance(heads, CascadeROIHeads) and len(heads.box_head) == 3
        thresholds = [[t for t in m.thresholds if math.isfinite(t)] for m in heads.proposal_matchers]
        assert thresholds == [[0.5], [0.6], [0.7]]
        assert heads.box_predictor[1].box2box_transform.weights == (20.0, 20.0, 10.0, 10.0)

    def test_cascade_gradient_is_a_third(self):
        gradients = []
        for stages in (1, 3):
            torch.manual_seed(0)  # the weights of the first stage are drawn first
            cfg = make_cfg(**KINDS["cascade"], ROI_HEADS__BATCH_SIZE_PER_IMAGE=100)
            cascade = cfg.MODEL.ROI_BOX_CASCADE_HEAD
            cascade.IOUS, cascade.BBOX_REG_WEIGHTS = cascade.IOUS[:stages], cascade.BBOX_REG_WEIGHTS[:stages]
            heads = build_roi_heads(cfg, self.shapes)
            g = torch.Generator().manual_seed(2)
            features = {
                name: torch.randn(1, 8, 64 // s, 80 // s, generator=g).requires_grad_() for name, s in STRIDES.items()
            }
            with EventStorage():
                _, losses = heads(None, features, [proposals_at([8, 8, 40, 36])], [instances((64, 80), *ONE)])
            gradients.append(torch.autograd.grad(losses["loss_cls_stage0"], features["p2"])[0])
        assert gradients[0].abs().sum() > 0
        torch.testing.assert_close(gradients[1], gradients[0] / 3)

    @pytest.mark.parametrize("changes", [
        {"ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG": False}, {"ROI_HEADS__IOU_THRESHOLDS": [0.6]},
        {"ROI_BOX_CASCADE_HEAD__IOUS": (0.5, 0.6)},
    ])
    def test_cascade_settings_that_do_not_fit(self, changes):
        with pytest.raises(REFUSED):
            build_roi_heads(make_cfg(**{**KINDS["cascade"], **changes}), self.shapes)

    @pytest.mark.parametrize("mask_on", [False, True])
    def test_res5(self, mask_on):
        torch.manual_seed(0)
        cfg = make_cfg(ROI_HEADS__NAME="Res5ROIHeads", MASK_ON=mask_on, ROI_BOX_HEAD__POOLER_RESOLUTION=4)
        cfg.MODEL.ROI_HEADS.IN_FEATURES = ["res4"]
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 2, 1
        heads = build_roi_heads(cfg, {"res4": ShapeSpec(channels=8, stride=16)})
        assert isinstance(heads, Res5ROIHeads) and heads.res5[2].conv3.weight.shape[:2] == (16, 8)
        features = {"res4": torch.randn(1, 8, 4, 5, requires_grad=True)}
        with EventStorage():
            _, losses = heads(None, features, [proposals_at([8, 8, 40, 36])], [instances((64, 80), *ONE)])
        assert set(losses) == {"loss_cls", "loss_box_reg"} | ({"loss_mask"} if mask_on else set())
        sum(losses.values()).backward()
        assert features["res4"].grad.abs().sum() > 0
        with torch.no_grad():
            found, _ = heads.eval()(None, features, [proposals_at([8, 8, 40, 36], [0, 0, 60, 60])])
        assert len(found[0]) > 0 and found[0].has("pred_masks") == mask_on

    def test_unregistered_name(self):
        with pytest.raises(KeyError):
            ROI_HEADS_REGISTRY.get("NoSuchHeads")
