"""Mask head of R-CNNs. Passes on detectron2 and on detectron2-lite."""

import math

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.modeling.roi_heads import (
    ROI_MASK_HEAD_REGISTRY,
    BaseMaskRCNNHead,
    MaskRCNNConvUpsampleHead,
    build_mask_head,
)
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_inference, mask_rcnn_loss
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks, ROIMasks
from detectron2.utils.events import EventStorage
from refusals import refused

torch.set_num_threads(1)
SIZE = (16, 24)
SCALARS = ["mask_rcnn/accuracy", "mask_rcnn/false_positive", "mask_rcnn/false_negative"]


def boxes(*rows):
    return Boxes(torch.tensor(rows, dtype=torch.float32).reshape(-1, 4))


def left_half(x0, y0, x1, y1):
    middle = (x0 + x1) / 2
    return [np.array([x0, y0, middle, y0, middle, y1, x0, y1])]


def proposals(*rows, classes=None, bitmasks=False):
    """Matched proposals; the object in each fills the left half of its box."""
    masks = PolygonMasks([left_half(*row) for row in rows])
    if bitmasks:
        masks = BitMasks.from_polygon_masks(masks, *SIZE)
    classes = torch.tensor(classes or [0] * len(rows), dtype=torch.int64)
    return Instances(SIZE, proposal_boxes=boxes(*rows), gt_masks=masks, gt_classes=classes)


def loss_and_scalars(logits, instances):
    with EventStorage() as storage:
        loss = mask_rcnn_loss(logits, instances)
    return loss, {name: value for name, (value, _) in storage.latest().items()}


def slow_loss(logits, targets, classes):
    """By the definition, cell by cell."""
    total, cells = 0.0, 0
    for maps, target, label in zip(logits.tolist(), targets.tolist(), classes):
        chosen = maps[label if len(maps) > 1 else 0]
        for row, truth in zip(chosen, target):
            for x, t in zip(row, truth):
                p = 1 / (1 + math.exp(-x))
                total -= math.log(p if t else 1 - p)
                cells += 1
    return total / cells


class TestLoss:
    @pytest.mark.parametrize("bitmasks", [False, True])
    def test_by_hand(self, bitmasks):
        """2 x 2 cells, the left ones are foreground; only the map of class 1 counts."""
        logits = torch.full((1, 2, 2, 2), 100.0)
        logits[0, 1] = torch.tensor([[math.log(3), -math.log(3)], [-math.log(4), math.log(4)]])
        gt = proposals([4, 2, 12, 10], classes=[1], bitmasks=bitmasks)
        loss, logged = loss_and_scalars(logits, [gt])
        # Probabilities of the truth: 3/4, 3/4 above and 1/5, 1/5 below.
        assert loss.item() == pytest.approx((2 * math.log(4 / 3) + 2 * math.log(5)) / 4, rel=1e-6)
        assert list(logged) == SCALARS and list(logged.values()) == [0.5, 0.5, 0.5]

    def test_logged_shares_have_their_own_bases(self):
        # 16 cells, 8 of them foreground: 2 are missed, 1 is found where there is nothing.
        logits = torch.where(torch.arange(4) < 2, 1.0, -1.0).repeat(4, 1)
        logits[0, 0] = logits[1, 0] = -1
        logits[0, 3] = 1
        _, logged = loss_and_scalars(logits[None, None], [proposals([4, 2, 12, 10])])
        assert [logged[name] for name in SCALARS] == [pytest.approx(v) for v in (13 / 16, 1 / 8, 2 / 8)]

    @pytest.mark.parametrize("maps", [1, 3])
    def test_against_the_definition(self, maps):
        """Two images of unequal numbers of boxes; one without."""
        g = torch.Generator().manual_seed(0)
        rows = [[[4, 2, 12, 10], [0, 0, 8, 12], [3, 3, 23, 15]], [], [[8, 4, 20, 8]]]
        classes = [[2, 0, 1], [], [2]]
        gt = [proposals(*r, classes=c) for r, c in zip(rows, classes)]
        logits = torch.randn(4, maps, 6, 6, generator=g)
        target = torch.zeros(4, 6, 6, dtype=torch.bool)
        target[:, :, :3] = True
        loss, _ = loss_and_scalars(logits, gt)
        expected = slow_loss(logits, target, [2, 0, 1, 2])
        assert loss.item() == pytest.approx(expected, rel=1e-5)

    def test_a_perfect_prediction_costs_nothing(self):
        logits = torch.full((1, 1, 4, 4), 50.0)
        logits[..., 2:] = -50
        loss, logged = loss_and_scalars(logits, [proposals([4, 2, 12, 10])])
        assert loss.item() < 1e-6 and [logged[name] for name in SCALARS] == [1, 0, 0]

    def test_only_the_true_class_is_trained(self):
        logits = torch.zeros(2, 3, 4, 4, requires_grad=True)
        loss, _ = loss_and_scalars(logits, [proposals([4, 2, 12, 10], [0, 0, 8, 8], classes=[2, 0])])
        loss.backward()
        assert (logits.grad.abs().sum(dim=(2, 3)) > 0).tolist() == [[False, False, True], [True, False, False]]
        # The gradient of the mean of -log p: (p - t) / cells.
        assert logits.grad[0, 2, 0].tolist() == [-0.5 / 32, -0.5 / 32, 0.5 / 32, 0.5 / 32]

    def test_a_shifted_proposal_sees_a_shifted_mask(self):
        gt = proposals([4, 2, 12, 10])
        gt.proposal_boxes = boxes([6, 2, 14, 10])  # the object fills the first quarter of it
        logits = torch.full((1, 1, 4, 4), -50.0)
        logits[..., :1] = 50
        assert loss_and_scalars(logits, [gt])[0].item() < 1e-6

    @pytest.mark.parametrize("images", [[proposals()], [Instances(SIZE, proposal_boxes=boxes())] * 2])
    def test_no_boxes(self, images):
        logits = torch.zeros(0, 3, 4, 4, requires_grad=True)
        loss, logged = loss_and_scalars(logits, images)
        loss.backward()
        assert loss.item() == 0 and logits.grad.shape == logits.shape and not logged

    def test_inputs_that_do_not_fit(self):
        gt = [proposals([4, 2, 12, 10])]
        for shape, message in [
            ((1, 1, 4, 3), "masks must be square, not 4 x 3"),
            ((2, 3, 4, 4), "got masks of 2 boxes for 1 instances"),
        ]:
            with refused(message), EventStorage():
                mask_rcnn_loss(torch.zeros(shape), gt)

    def test_images_for_tensorboard(self):
        logits = torch.randn(2, 1, 4, 4)
        with EventStorage(start_iter=5) as storage:
            mask_rcnn_loss(logits, [proposals([4, 2, 12, 10], [0, 0, 8, 8])], vis_period=5)
            first = len(storage._vis_data)
            storage.step()
            mask_rcnn_loss(logits, [proposals([4, 2, 12, 10], [0, 0, 8, 8])], vis_period=5)
        assert first == len(storage._vis_data) == 2
        tag, image, iteration = storage._vis_data[1]
        assert tag == "Left: mask prediction;   Right: mask GT (1)"
        assert iteration == 5 and image.shape == (3, 4, 8)
        torch.testing.assert_close(image[0, :, :4], logits[1, 0].sigmoid())
        assert image[2, :, 4:].tolist() == [[1, 1, 0, 0]] * 4


class TestInference:
    def detections(self, *classes):
        return Instances(SIZE, pred_classes=torch.tensor(classes, dtype=torch.int64))

    def test_the_mask_of_the_predicted_class(self):
        logits = torch.arange(3.0).view(1, 3, 1, 1).expand(3, 3, 2, 2)
        found = [self.detections(2, 0), self.detections(), self.detections(1)]
        assert mask_rcnn_inference(logits, found) is None
        assert [tuple(x.pred_masks.shape) for x in found] == [(2, 1, 2, 2), (0, 1, 2, 2), (1, 1, 2, 2)]
        values = torch.cat([x.pred_masks[:, 0, 0, 0] for x in found])
        torch.testing.assert_close(values, torch.tensor([2.0, 0, 1]).sigmoid())

    def test_masks_that_do_not_depend_on_the_class(self):
        logits = torch.randn(2, 1, 2, 2)
        found = [self.detections(7, 3)]
        mask_rcnn_inference(logits, found)
        torch.testing.assert_close(found[0].pred_masks, logits.sigmoid())

    @pytest.mark.parametrize("maps", [1, 5])
    def test_no_detections(self, maps):
        found = [self.detections(), self.detections()]
        mask_rcnn_inference(torch.zeros(0, maps, 4, 4), found)
        assert all(x.pred_masks.shape == (0, 1, 4, 4) for x in found)


class TestHead:
    def make(self, **changes):
        options = {"num_classes": 3, "conv_dims": [6, 6, 5]}
        return MaskRCNNConvUpsampleHead(ShapeSpec(channels=4), **{**options, **changes})

    def test_names_and_shapes(self):
        head = self.make()
        assert [(k, tuple(v.shape)) for k, v in head.state_dict().items() if k.endswith("weight")] == [
            ("mask_fcn1.weight", (6, 4, 3, 3)), ("mask_fcn2.weight", (6, 6, 3, 3)), ("deconv.weight", (6, 5, 2, 2)),
            ("predictor.weight", (3, 5, 1, 1)),
        ]
        assert head.layers(torch.rand(2, 4, 7, 7)).shape == (2, 3, 14, 14)
        assert head.layers(torch.rand(0, 4, 7, 7)).shape == (0, 3, 14, 14)
        assert "mask_fcn1.bias" in head.state_dict()

    def test_the_layers_in_order(self):
        head = self.make(conv_dims=[6, 5]).double()
        x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
        y = torch.conv2d(x, head.mask_fcn1.weight, head.mask_fcn1.bias, padding=1).relu()
        y = torch.conv_transpose2d(y, head.deconv.weight, head.deconv.bias, stride=2).relu()
        y = torch.conv2d(y, head.predictor.weight, head.predictor.bias)
        torch.testing.assert_close(head.layers(x), y)

    def test_norm_replaces_the_bias(self):
        state = self.make(conv_dims=[32, 5], conv_norm="GN").state_dict()
        assert "mask_fcn1.norm.weight" in state and "mask_fcn1.bias" not in state and "deconv.bias" in state

    def test_initial_values(self):
        torch.manual_seed(0)
        head = self.make(conv_dims=[64, 64], num_classes=80)
        for name, deviation in {"mask_fcn1": math.sqrt(2 / (9 * 64)), "predictor": 0.001}.items():
            module = getattr(head, name)
            assert module.weight.std().item() == pytest.approx(deviation, rel=0.1) and not module.bias.any()

    def test_training_and_inference(self):
        head = self.make(loss_weight=4.0)
        x = torch.rand(2, 4, 4, 4)
        gt = [proposals([4, 2, 12, 10], classes=[1]), proposals([0, 0, 8, 8], classes=[2])]
        with EventStorage() as storage:
            losses = head(x, gt)
            torch.testing.assert_close(losses["loss_mask"], 4 * mask_rcnn_loss(head.layers(x), gt))
        assert list(losses) == ["loss_mask"] and set(storage.latest()) == set(SCALARS)
        losses["loss_mask"].backward()
        assert all(p.grad.isfinite().all() for p in head.parameters()) and head.mask_fcn1.weight.grad.any()

        found = [Instances(SIZE, pred_classes=torch.tensor([1])), Instances(SIZE, pred_classes=torch.tensor([0]))]
        result = head.eval()(x, found)
        assert result[0].pred_masks.shape == (1, 1, 8, 8)
        torch.testing.assert_close(result[1].pred_masks[0, 0], head.layers(x)[1, 0].sigmoid())

    @pytest.mark.parametrize("agnostic, maps", [(False, 7), (True, 1)])
    def test_from_config(self, agnostic, maps):
        cfg = get_cfg()
        cfg.VIS_PERIOD, cfg.MODEL.ROI_HEADS.NUM_CLASSES = 11, 7
        node = cfg.MODEL.ROI_MASK_HEAD
        node.NUM_CONV, node.CONV_DIM, node.CLS_AGNOSTIC_MASK = 2, 8, agnostic
        node.NAME = "MaskRCNNConvUpsampleHead"
        head = build_mask_head(cfg, ShapeSpec(channels=4, width=14, height=14))
        assert isinstance(head, BaseMaskRCNNHead) and head.vis_period == 11 and head.loss_weight == 1.0
        assert head.mask_fcn2.weight.shape == (8, 8, 3, 3) and head.deconv.weight.shape == (8, 8, 2, 2)
        assert head.predictor.weight.shape == (maps, 8, 1, 1)

    def test_own_head_by_name(self):
        class OneCell(BaseMaskRCNNHead):
            def layers(self, x):
                return x.mean(dim=(1, 2, 3)).view(-1, 1, 1, 1)

        ROI_MASK_HEAD_REGISTRY.register(OneCell)
        cfg = get_cfg()
        cfg.MODEL.ROI_MASK_HEAD.NAME = "OneCell"
        head = build_mask_head(cfg, ShapeSpec(channels=4)).eval()
        (found,) = head(torch.zeros(1, 4, 2, 2), [Instances(SIZE, pred_classes=torch.tensor([0]))])
        assert found.pred_masks.item() == 0.5
        ROI_MASK_HEAD_REGISTRY._obj_map.pop("OneCell")

    def test_without_layers(self):
        with refused("conv_dims must name at least the channels of the upsampling"):
            self.make(conv_dims=[])
        with pytest.raises(NotImplementedError):
            BaseMaskRCNNHead()(torch.zeros(1, 4, 2, 2), [])


class TestPostprocessing:
    def detections(self, masks):
        """An object in the left half of a box, in the network's input of half the size of the image."""
        return Instances((20, 30), pred_boxes=boxes([4, 6, 12, 14], [20, 10, 28, 10]), pred_masks=masks)

    @pytest.mark.parametrize("kind", [torch.Tensor, ROIMasks])
    def test_pasted_in_the_image(self, kind):
        soft = torch.zeros(2, 1, 2, 2)
        soft[..., 0] = 1
        result = detector_postprocess(self.detections(soft if kind is torch.Tensor else ROIMasks(soft[:, 0])), 40, 60)
        # The second box is empty and goes. Box: x 8..24, y 12..28; between the two cells the mask falls to one half.
        assert result.pred_masks.shape == (1, 40, 60) and result.pred_masks.dtype == torch.bool
        expected = torch.zeros(40, 60, dtype=torch.bool)
        expected[12:28, 8:16] = True
        inner = slice(16, 24)  # beyond the middle of the outer cells the mask fades towards the border of the box
        assert torch.equal(result.pred_masks[0, inner, 12:], expected[inner, 12:])
        assert not result.pred_masks[0, :12].any() and not result.pred_masks[0, :, :8].any()

    def test_threshold(self):
        soft = torch.full((2, 1, 2, 2), 0.6)
        areas = [
            detector_postprocess(self.detections(soft.clone()), 20, 30, mask_threshold=t).pred_masks.sum().item()
            for t in (0.59, 0.61)
        ]
        # Full strength between the middles of the outer cells only: 4 x 4 pixels of the 8 x 8 of the box.
        assert areas == [16, 0]

    def test_no_detections(self):
        none = self.detections(torch.zeros(2, 1, 2, 2))[:0]
        assert detector_postprocess(none, 40, 60).pred_masks.shape == (0, 40, 60)
