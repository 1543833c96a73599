"""RetinaNet and FCOS on a tiny backbone: targets, losses, inference and how subclasses hook in."""

import math

import pytest
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import FCOS, META_ARCH_REGISTRY, Backbone, RetinaNet, build_model
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from refusals import refused

torch.set_num_threads(1)
STRIDES = {"p3": 8, "p4": 16}
NUM_CLASSES = 3


class TinyPyramid(Backbone):
    """p3 and p4, 4 channels each, from two convolutions; inputs must be multiples of 16."""

    size_divisibility = 16

    def __init__(self):
        super().__init__()
        self.conv3 = torch.nn.Conv2d(3, 4, 8, stride=8)
        self.conv4 = torch.nn.Conv2d(3, 4, 16, stride=16)
        self._out_features = list(STRIDES)
        self._out_feature_channels = dict.fromkeys(STRIDES, 4)
        self._out_feature_strides = STRIDES

    def forward(self, x):
        # Coarse first: the order of the dict must not matter.
        return {"p4": self.conv4(x), "p3": self.conv3(x)}


def shapes():
    return [ShapeSpec(channels=4, stride=s) for s in STRIDES.values()]


def make_retinanet(**kwargs):
    torch.manual_seed(0)
    options = {
        "backbone": TinyPyramid(),
        "head": RetinaNetHead(input_shape=shapes(), num_classes=NUM_CLASSES, num_anchors=2, conv_dims=[4]),
        "head_in_features": list(STRIDES),
        "anchor_generator": DefaultAnchorGenerator(
            sizes=[[16, 24], [32, 48]], aspect_ratios=[1.0], strides=list(STRIDES.values()), offset=0.5
        ),
        "box2box_transform": Box2BoxTransform((1.0, 1.0, 1.0, 1.0)),
        "anchor_matcher": Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True),
        "num_classes": NUM_CLASSES,
        "pixel_mean": [100.0, 110.0, 120.0],
        "pixel_std": [50.0, 51.0, 52.0],
    }
    return RetinaNet(**{**options, **kwargs})


def make_fcos(**kwargs):
    torch.manual_seed(0)
    head = FCOSHead(input_shape=shapes(), num_classes=NUM_CLASSES, conv_dims=[4])
    options = {"pixel_mean": [100.0, 110.0, 120.0], "pixel_std": [50.0, 51.0, 52.0], "num_classes": NUM_CLASSES}
    return FCOS(backbone=TinyPyramid(), head=head, **{**options, **kwargs})


def instances(size, boxes, classes):
    tensor = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return Instances(size, gt_boxes=Boxes(tensor), gt_classes=torch.tensor(classes, dtype=torch.int64))


def batch(*ground_truths, size=(40, 60)):
    g = torch.Generator().manual_seed(1)
    return [
        {
            "image": torch.randint(0, 256, (3, *size), generator=g).to(torch.uint8),
            "instances": instances(size, boxes, classes),
        }
        for boxes, classes in ground_truths
    ]


ONE = ([[4, 4, 28, 28]], [1])
TWO = ([[4, 4, 28, 28], [30, 2, 58, 39]], [1, 2])
NONE = ([], [])
both = pytest.mark.parametrize("make", [make_retinanet, make_fcos])


def train(model, inputs):
    model.train()
    with EventStorage():
        return model(inputs)


def total(losses):
    return sum(losses.values())


class TestCommon:
    @both
    def test_preprocessing(self, make):
        model = make()
        images = model.preprocess_image(batch(ONE) + batch(ONE, size=(20, 70)))
        assert images.tensor.shape == (2, 3, 48, 80) and [tuple(s) for s in images.image_sizes] == [(40, 60), (20, 70)]
        raw = batch(ONE)[0]["image"].float()
        torch.testing.assert_close(images.tensor[0, 1, :40, :60], (raw[1] - 110) / 51)
        assert images.tensor[0, :, 40:].abs().sum() == 0 and images.tensor[1, :, :, 70:].abs().sum() == 0

    @both
    def test_state_dict_has_weights_only(self, make):
        model = make()
        assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
        assert model.pixel_mean.shape == (3, 1, 1) and model.device.type == "cpu"

    @both
    def test_losses_are_finite_and_have_gradients(self, make):
        model = make()
        losses = train(model, batch(TWO, NONE))
        assert all(x.dim() == 0 and torch.isfinite(x) for x in losses.values())
        total(losses).backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        assert model.head.bbox_pred.weight.grad.abs().sum() > 0

    @both
    def test_without_ground_truth_all_parameters_still_get_gradients(self, make):
        model = make()
        losses = train(model, batch(NONE, NONE))
        total(losses).backward()
        assert all(p.grad is not None for p in model.parameters())
        assert model.head.bbox_pred.weight.grad.abs().sum() == 0

    @both
    def test_loss_of_a_batch_is_the_sum_over_its_images(self, make):
        model = make()
        model._ema_update = lambda name, value, initial_value, momentum=0.9: 1.0
        inputs = batch(TWO, ONE, NONE)
        whole = train(model, inputs)
        parts = [train(model, [x]) for x in inputs]
        for name, value in whole.items():
            torch.testing.assert_close(value, sum(p[name] for p in parts), rtol=1e-5, atol=1e-6)

    @both
    def test_losses_use_label_anchors_and_losses_of_the_instance(self, make):
        model, calls = make(), []
        plain = train(make(), batch(ONE))
        labels, losses = model.label_anchors, model.losses
        model.label_anchors = lambda anchors, gt: calls.append("label") or labels(anchors, [x[:1] for x in gt])
        model.losses = lambda *args: calls.append("losses") or losses(*args)
        wrapped = train(model, batch(TWO))
        assert calls == ["label", "losses"] and set(wrapped) == set(plain)

    @both
    def test_moving_average(self, make):
        model = make()
        start = 100 if make is make_retinanet else 300
        counts = []
        for inputs in (batch(TWO, ONE), batch(NONE)):
            with EventStorage() as storage:
                model(inputs)
            counts.append(storage.latest()["num_pos_anchors"][0] * len(inputs))
        assert counts[0] > 1 and counts[1] == 0
        assert model.loss_normalizer == pytest.approx((start * 0.9 + counts[0] * 0.1) * 0.9 + 1 * 0.1)
        assert model._ema_update("other", 5.0, 1.0, momentum=0.5) == pytest.approx(3.0)
        assert model.other == pytest.approx(3.0)

    @both
    def test_training_without_annotations_is_refused(self, make):
        with pytest.raises((AssertionError, ValueError), match=r"(?i)instances|annotations"):
            train(make(), [{"image": torch.zeros(3, 16, 16)}])

    @both
    def test_inference_size_and_order(self, make):
        model = make(test_score_thresh=0.0, test_topk_candidates=10, max_detections_per_image=7).eval()
        with torch.no_grad():
            model.head.cls_score.weight.normal_(0, 1.0)
            inputs = batch(ONE, ONE)
            inputs[0].update(height=80, width=30)
            results = [x["instances"] for x in model(inputs)]
        assert [tuple(x.image_size) for x in results] == [(80, 30), (40, 60)]
        for x, (height, width) in zip(results, [(80, 30), (40, 60)]):
            assert 0 < len(x) <= 7
            assert (x.scores.diff() <= 0).all() and ((x.scores > 0) & (x.scores < 1)).all()
            assert (x.pred_classes >= 0).all() and (x.pred_classes < NUM_CLASSES).all()
            boxes = x.pred_boxes.tensor
            assert (boxes >= 0).all() and (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()

    @both
    def test_image_in_a_batch_gives_what_it_gives_alone(self, make):
        model = make(test_score_thresh=0.0, test_topk_candidates=20).eval()
        inputs = batch(ONE, ONE)
        with torch.no_grad():
            model.head.cls_score.weight.normal_(0, 1.0)
            together = [x["instances"] for x in model(inputs)]
            alone = [model([x])[0]["instances"] for x in inputs]
        for a, b in zip(together, alone):
            torch.testing.assert_close(a.scores, b.scores)
            torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor)

    @both
    def test_nothing_above_the_threshold(self, make):
        model = make(test_score_thresh=0.999).eval()
        result = model(batch(ONE))[0]["instances"]
        assert len(result) == 0 and result.pred_boxes.tensor.shape == (0, 4)
        assert {"pred_boxes", "scores", "pred_classes"} == set(result.get_fields())

    def test_suppression_is_per_class(self):
        model = make_retinanet(test_nms_thresh=0.5).eval()
        anchors = [Boxes([[0.0, 0, 10, 10], [0, 0, 10, 9], [30, 30, 40, 40]])]
        scores = [torch.tensor([[0.9, 0.0, 0.6], [0.8, 0.7, 0.0], [0.0, 0.5, 0.01]])]
        found = model.inference_single_image(anchors, scores, [torch.zeros(3, 4)], (50, 50))
        torch.testing.assert_close(found.scores, torch.tensor([0.9, 0.7, 0.6, 0.5]))
        assert found.pred_classes.tolist() == [0, 1, 2, 1]
        assert found.pred_boxes.tensor[3].tolist() == [30, 30, 40, 40]

    def test_decoding_limits(self):
        model = make_retinanet()
        anchors = Boxes([[0.0, 0, 10, 10], [5, 5, 9, 9]])
        scores = torch.tensor([[0.3, 0.05, 0.8], [0.6, 0.4, 0.01]])
        deltas = torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0]])
        one = model._decode_per_level_predictions(anchors, scores, deltas, 0.05, 3, (20, 20))
        torch.testing.assert_close(one.scores, torch.tensor([0.8, 0.6, 0.4]))
        assert one.pred_classes.tolist() == [2, 0, 1]
        assert one.pred_boxes.tensor.tolist() == [[0, 0, 10, 10], [9, 5, 13, 9], [9, 5, 13, 9]]
        many = model._decode_multi_level_predictions([anchors] * 2, [scores] * 2, [deltas] * 2, 0.05, 1, (20, 20))
        torch.testing.assert_close(many.scores, torch.tensor([0.8, 0.8]))

    def test_default_features_are_ordered_by_stride(self):
        model = make_fcos()
        assert list(model.head_in_features) == ["p3", "p4"]

    def test_transposed_predictions(self):
        model = make_fcos()
        predictions = [[torch.rand(2, c, 3, 4), torch.rand(2, c, 1, 2)] for c in (6, 8)]
        result = model._transpose_dense_predictions(predictions, [3, 4])
        assert [[tuple(x.shape) for x in p] for p in result] == [[(2, 24, 3), (2, 4, 3)], [(2, 24, 4), (2, 4, 4)]]
        with refused("the head made 2 predictions, 3 are expected"):
            model._transpose_dense_predictions(predictions, [3, 4, 1])

    def test_abstract_parts(self):
        model = DenseDetector(TinyPyramid(), torch.nn.Identity(), pixel_mean=[0.0], pixel_std=[1.0])
        with pytest.raises(NotImplementedError):
            model.forward_training(None, None, None, None)


class TestHeads:
    def test_initial_values(self):
        head = RetinaNetHead(
            input_shape=shapes(), num_classes=NUM_CLASSES, num_anchors=2, conv_dims=[4, 8], prior_prob=0.2
        )
        assert torch.allclose(head.cls_score.bias.sigmoid(), torch.tensor(0.2))
        assert head.bbox_pred.bias.abs().sum() == 0 and head.cls_score.weight.shape == (6, 8, 3, 3)
        assert 0.007 < torch.cat([p.flatten() for n, p in head.named_parameters() if "weight" in n]).std() < 0.013

    def test_levels_have_own_statistics(self):
        head = RetinaNetHead(input_shape=shapes(), num_classes=1, num_anchors=1, conv_dims=[4], norm="BN")
        head.train()
        features = [torch.full((1, 4, 4, 4), 5.0), torch.full((1, 4, 2, 2), -5.0)]
        for _ in range(2):
            head(features)
        norm = head.cls_subnet[1]
        assert not torch.allclose(norm[0].running_mean, norm[1].running_mean)
        assert [int(n.num_batches_tracked) for n in norm] == [2, 2]

    def test_centerness_sits_on_the_box_tower(self):
        head = FCOSHead(input_shape=shapes(), num_classes=2, conv_dims=[4])
        features = [torch.randn(1, 4, 4, 4), torch.randn(1, 4, 2, 2)]
        logits, distances, centerness = head(features)
        assert [x.shape[1] for x in (logits[0], distances[0], centerness[1])] == [2, 4, 1]
        torch.testing.assert_close(centerness[1], head.ctrness(head.bbox_subnet(features[1])))
        torch.testing.assert_close(logits[1], head.cls_score(head.cls_subnet(features[1])))


class TestRetinaNet:
    def test_labels_by_hand(self):
        model = make_retinanet()
        fine = Boxes([[0.0, 0, 10, 10], [0, 0, 10, 20], [20, 20, 30, 30]])
        anchors = [fine, Boxes([[0.0, 0, 10, 23], [50, 50, 60, 60]])]
        gt = [instances((64, 64), [[0, 0, 10, 10], [51, 51, 54, 54]], [2, 0]), instances((64, 64), *NONE)]
        labels, boxes = model.label_anchors(anchors, gt)
        # IoU with the first box: 1, 0.5, 0, 10/23 (ignored); the second box has only its low-quality match.
        assert labels[0].tolist() == [2, 2, NUM_CLASSES, -1, 0]
        assert boxes[0][[0, 1, 4]].tolist() == [[0, 0, 10, 10], [0, 0, 10, 10], [51, 51, 54, 54]]
        assert labels[1].tolist() == [NUM_CLASSES] * 5 and boxes[1].shape == (5, 4)

    @pytest.mark.parametrize("alpha", [0.3, 0.0, -1.0])  # below 0: classes are not weighted
    def test_losses_by_general_formulas(self, alpha):
        model = make_retinanet(focal_loss_alpha=alpha, focal_loss_gamma=1.5, smooth_l1_beta=0.1)
        g = torch.Generator().manual_seed(4)
        anchors = [Boxes([[0.0, 0, 10, 10], [0, 0, 10, 20]]), Boxes([[20, 20, 40, 40.0]])]
        logits = [torch.randn(2, n, NUM_CLASSES, generator=g, requires_grad=True) for n in (2, 1)]
        deltas = [torch.randn(2, n, 4, generator=g) for n in (2, 1)]
        labels = [torch.tensor([0, 3, -1]), torch.tensor([3, 3, 2])]
        gt = [torch.tensor([[1.0, 1, 9, 12]] * 3), torch.tensor([[20.0, 18, 44, 42]] * 3)]
        with EventStorage():
            losses = model.losses(anchors, logits, labels, deltas, gt)
        normalizer = 0.9 * 100 + 0.1 * 2
        flat, label = torch.cat(logits, 1).flatten(0, 1), torch.cat(labels)
        onehot = torch.nn.functional.one_hot(label[label >= 0], NUM_CLASSES + 1)[:, :-1].float()
        focal = torchvision.ops.sigmoid_focal_loss(flat[label >= 0], onehot, alpha=alpha, gamma=1.5, reduction="sum")
        torch.testing.assert_close(losses["loss_cls"], focal / normalizer)
        boxes = torch.cat([a.tensor for a in anchors])[[0, 2]]
        wanted = model.box2box_transform.get_deltas(boxes, torch.stack([gt[0][0], gt[1][2]]))
        got = torch.stack([deltas[0][0, 0], deltas[1][1, 0]])
        regression = torch.nn.functional.smooth_l1_loss(got, wanted, beta=0.1, reduction="sum")
        torch.testing.assert_close(losses["loss_box_reg"], regression / normalizer)

        (ours,) = torch.autograd.grad(losses["loss_cls"] * normalizer, logits[0], retain_graph=True)
        (theirs,) = torch.autograd.grad(focal, logits[0])
        torch.testing.assert_close(ours, theirs)

    def test_extreme_logits_stay_finite(self):
        model = make_retinanet()
        logits = [torch.tensor([[[200.0, -200, 0]] * 2], requires_grad=True), torch.zeros(1, 1, 3)]
        with EventStorage():
            loss = model.losses(
                [Boxes([[0.0, 0, 9, 9]] * 2), Boxes([[0, 0, 9, 9.0]])], logits, [torch.tensor([1, 3, -1])],
                [torch.zeros(1, 2, 4), torch.zeros(1, 1, 4)], [torch.tensor([[0.0, 0, 9, 9]] * 3)],
            )["loss_cls"]
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(logits[0].grad).all()
        # Class 1 at -200 is missed (0.25 * 200), class 0 at 200 wrongly found twice (0.75 * 200 each).
        rest = 2 * 0.75 * 0.25 * math.log(2)
        assert loss.item() * model.loss_normalizer == pytest.approx(0.25 * 200 + 2 * 0.75 * 200 + rest, rel=1e-4)

    def test_from_cfg(self):
        cfg = get_cfg()
        cfg.MODEL.DEVICE = "cpu"
        cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
        cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
        cfg.MODEL.RESNETS.DEPTH = 18
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
        cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
        cfg.MODEL.FPN.OUT_CHANNELS = 16
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
        node = cfg.MODEL.RETINANET
        node.NUM_CLASSES, node.NUM_CONVS, node.PRIOR_PROB = 5, 2, 0.3
        node.IOU_THRESHOLDS, node.BBOX_REG_WEIGHTS, node.BBOX_REG_LOSS_TYPE = [0.3, 0.6], (1.0, 2.0, 3.0, 4.0), "giou"
        node.SCORE_THRESH_TEST, node.NMS_THRESH_TEST, node.TOPK_CANDIDATES_TEST = 0.11, 0.22, 33
        node.FOCAL_LOSS_ALPHA, node.FOCAL_LOSS_GAMMA, node.SMOOTH_L1_LOSS_BETA = 0.5, 1.0, 0.7
        cfg.TEST.DETECTIONS_PER_IMAGE = 44
        model = build_model(cfg)
        assert isinstance(model, RetinaNet) and "RetinaNet" in META_ARCH_REGISTRY
        assert (model.num_classes, model.box_reg_loss_type, model.max_detections_per_image) == (5, "giou", 44)
        assert (model.test_score_thresh, model.test_nms_thresh, model.test_topk_candidates) == (0.11, 0.22, 33)
        assert (model.focal_loss_alpha, model.focal_loss_gamma, model.smooth_l1_beta) == (0.5, 1.0, 0.7)
        assert tuple(model.box2box_transform.weights) == (1.0, 2.0, 3.0, 4.0)
        assert model.anchor_matcher.thresholds[1:-1] == [0.3, 0.6] and model.anchor_matcher.allow_low_quality_matches
        assert len([m for m in model.head.cls_subnet if isinstance(m, torch.nn.Conv2d)]) == 2
        assert model.head.cls_score.out_channels == 5 * 3 and model.anchor_generator.num_anchors == [3] * 5
        assert list(model.head_in_features) == ["p3", "p4", "p5", "p6", "p7"]

        class Narrow(RetinaNet):
            pass

        assert Narrow(cfg, num_classes=4).num_classes == 4

    def test_visualization(self, monkeypatch):
        model = make_retinanet(test_score_thresh=0.0, max_detections_per_image=3).eval()
        drawn = []
        with EventStorage() as storage, torch.no_grad():
            monkeypatch.setattr(storage, "put_image", lambda name, image: drawn.append((name, image)))
            inputs = batch(TWO)
            model.visualize_training(inputs, [x["instances"] for x in model(inputs)])
        ((name, image),) = drawn
        # Event files are compared by the tag.
        assert name == "Top: GT bounding boxes; Bottom: 20 Highest Scoring Results" and image.shape == (3, 80, 60)

    def test_mixed_precision(self):
        model = make_retinanet()
        exact = train(model, batch(TWO))
        del model.loss_normalizer
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = train(model, batch(TWO))
            assert all(x.dtype == torch.float32 for x in losses.values())
            total(losses).backward()
            with torch.no_grad():
                assert model.eval()(batch(ONE))[0]["instances"].pred_boxes.tensor.dtype == torch.float32
        for name, value in exact.items():
            torch.testing.assert_close(losses[name], value, rtol=0.03, atol=0)
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())

    def test_levels_with_unequal_anchors_are_refused(self):
        cfg = get_cfg()
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8], [16, 32]]
        with refused("need equally many anchors, not [3, 6]"):
            RetinaNetHead(cfg, shapes())

    def test_unknown_box_loss_is_refused(self):
        model = make_retinanet(box_reg_loss_type="nothing")
        with pytest.raises(ValueError, match="nothing"):
            train(model, batch(ONE))


class TestFCOS:
    def test_matching_by_hand(self):
        model = make_fcos()
        anchors = model.anchor_generator([torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 4, 4)])
        # Centre (20, 20), 24 wide: cells of p3 with centres less than 12 px away; too small for p4.
        labels, boxes = model.label_anchors(anchors, [instances((64, 64), [[8, 8, 32, 32]], [1])])
        grid = (labels[0][:64].view(8, 8) == 1).nonzero().tolist()
        assert grid == [[y, x] for y in (1, 2, 3) for x in (1, 2, 3)]
        assert (labels[0][64:] == NUM_CLASSES).all()
        assert (boxes[0][:64][labels[0][:64] == 1] == torch.tensor([8.0, 8, 32, 32])).all()

    def test_large_boxes_go_to_the_coarse_level(self):
        model = make_fcos()
        anchors = model.anchor_generator([torch.zeros(1, 4, 32, 32), torch.zeros(1, 4, 16, 16)])
        labels, _ = model.label_anchors(anchors, [instances((256, 256), [[0, 0, 250, 250]], [0])])
        assert (labels[0][: 32 * 32] == NUM_CLASSES).all() and (labels[0][32 * 32 :] == 0).sum() == 9

    def test_smaller_box_wins(self):
        model = make_fcos()
        anchors = model.anchor_generator([torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 4, 4)])
        # Both are centred on cell (2, 2); the other cells are on or outside of the border of the small one.
        gt = instances((64, 64), [[2, 2, 38, 38], [12, 12, 28, 28]], [0, 2])
        label = model.label_anchors(anchors, [gt])[0][0][:64].view(8, 8)
        assert label[1:4, 1:4].tolist() == [[0, 0, 0], [0, 2, 0], [0, 0, 0]]

    def test_quality_matrix(self):
        model = make_fcos()
        anchors = model.anchor_generator([torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 4, 4)])
        quality = model._match_anchors(Boxes([[8.0, 8, 32, 32], [60, 60, 61, 61]]), anchors)
        assert quality.shape == (2, 64 + 16)
        assert (quality[0] > 0).sum() == 9 and (quality[1] > 0).sum() == 0

    def test_center_radius(self):
        model = make_fcos(center_sampling_radius=0.6)
        anchors = model.anchor_generator([torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 4, 4)])
        labels, _ = model.label_anchors(anchors, [instances((64, 64), [[8, 8, 32, 32]], [1])])
        assert (labels[0] == 1).nonzero().flatten().tolist() == [2 * 8 + 2]

    def test_centerness_by_hand(self):
        model = make_fcos()
        anchors = [Boxes([[0.0, 0, 8, 8]]), Boxes([[8.0, 8, 16, 16]])]
        gt = [torch.tensor([[2.0, 0, 12, 8], [8, 8, 16, 16]])]
        expected = math.sqrt((2 / 8) * (4 / 4))
        torch.testing.assert_close(model.compute_ctrness_targets(anchors, gt), torch.tensor([[expected, 1.0]]))

    def test_scores_are_geometric_means(self):
        model = make_fcos(test_score_thresh=0.1, test_nms_thresh=1.0).eval()
        with torch.no_grad():
            for p in model.head.parameters():
                p.zero_()
            model.head.cls_score.bias.copy_(torch.tensor([0.0, -50, -50]))
            model.head.ctrness.bias.fill_(math.log(0.25 / 0.75))
            result = model(batch(ONE))[0]["instances"]
        assert len(result) == 0  # Zero distances: empty boxes are dropped.
        with torch.no_grad():
            model.head.bbox_pred.bias.fill_(1.0)
            result = model(batch(ONE))[0]["instances"]
        # 40 x 60 is padded to 48 x 64: 6 * 8 + 3 * 4 cells, each with a box around its centre.
        assert len(result) == 60
        torch.testing.assert_close(result.scores, torch.full((60,), math.sqrt(0.5 * 0.25)))

    def test_losses_by_general_formulas(self):
        model = make_fcos()
        g = torch.Generator().manual_seed(4)
        anchors = [Boxes([[0.0, 0, 8, 8], [8, 0, 16, 8]]), Boxes([[0.0, 0, 16, 16]])]
        logits = [torch.randn(1, n, NUM_CLASSES, generator=g) for n in (2, 1)]
        deltas = [torch.rand(1, n, 4, generator=g) for n in (2, 1)]
        centerness = [torch.randn(1, n, 1, generator=g) for n in (2, 1)]
        gt = [torch.tensor([[1.0, 1, 9, 12], [0, 0, 0, 0], [2, 3, 15, 18]])]
        with EventStorage():
            losses = model.losses(anchors, logits, [torch.tensor([1, 3, 0])], deltas, gt, centerness)
        normalizer = 0.9 * 300 + 0.1 * 2
        boxes = torch.cat([a.tensor for a in anchors])
        decoded = model.box2box_transform.apply_deltas(torch.cat(deltas, 1)[0], boxes)
        giou = torchvision.ops.generalized_box_iou_loss(decoded[[0, 2]], gt[0][[0, 2]], reduction="sum")
        torch.testing.assert_close(losses["loss_fcos_loc"], giou / normalizer, rtol=1e-4, atol=1e-6)
        target = model.compute_ctrness_targets(anchors, gt)[0][[0, 2]]
        got = torch.cat(centerness, 1)[0, [0, 2], 0]
        bce = torch.nn.functional.binary_cross_entropy_with_logits(got, target, reduction="sum")
        torch.testing.assert_close(losses["loss_fcos_ctr"], bce / normalizer)
        onehot = torch.tensor([[0.0, 1, 0], [0, 0, 0], [1, 0, 0]])
        focal = torchvision.ops.sigmoid_focal_loss(torch.cat(logits, 1)[0], onehot, reduction="sum")
        torch.testing.assert_close(losses["loss_fcos_cls"], focal / normalizer)

    def test_head_is_retinanets_with_one_anchor(self):
        assert isinstance(make_fcos().head, RetinaNetHead)
        with pytest.raises(TypeError):
            FCOSHead(input_shape=shapes(), num_classes=2, conv_dims=[4], num_anchors=2)
