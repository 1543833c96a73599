"""ROI heads by themselves: sampling, losses, boxes, cascade. Passes on detectron2 and on detectron2-lite."""

import math

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.layers import ShapeSpec
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
from detectron2.structures import Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from refusals import refused
from tiny_rcnn import (
    KINDS,
    NONE,
    NUM_CLASSES,
    ONE,
    STRIDES,
    TWO,
    instances,
    make_cfg,
)

torch.set_num_threads(1)


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
        with refused("box regression loss 'l7' is unknown"):
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
        with refused("the federated loss needs use_sigmoid_ce and weights of the classes"):
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
        with refused("needs at least one convolution or linear layer"):
            FastRCNNConvFCHead(self.shape, conv_dims=[], fc_dims=[])


class TestHeads:
    shapes = {name: ShapeSpec(channels=8, stride=s) for name, s in STRIDES.items()}

    def test_channels_must_agree(self):
        shapes = {**self.shapes, "p3": ShapeSpec(channels=9, stride=8)}
        with refused("are pooled together but have [8, 9] channels"):
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

    @pytest.mark.parametrize("changes, message", [
        ({"ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG": False}, "needs MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG True"),
        ({"ROI_HEADS__IOU_THRESHOLDS": [0.6]}, "starts with 0.5, which must be MODEL.ROI_HEADS.IOU_THRESHOLDS: 0.6"),
        ({"ROI_BOX_CASCADE_HEAD__IOUS": (0.5, 0.6)}, "has 2 IOUS and 3 BBOX_REG_WEIGHTS"),
    ])
    def test_cascade_settings_that_do_not_fit(self, changes, message):
        with refused(message):
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
