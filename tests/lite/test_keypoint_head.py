"""Keypoint head of R-CNNs. Passes on detectron2 and on detectron2-lite."""

import math

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.modeling.roi_heads import (
    ROI_KEYPOINT_HEAD_REGISTRY,
    BaseKeypointRCNNHead,
    KRCNNConvDeconvUpsampleHead,
    build_keypoint_head,
)
from detectron2.modeling.roi_heads.keypoint_head import keypoint_rcnn_inference, keypoint_rcnn_loss
from detectron2.structures import Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from refusals import refused

torch.set_num_threads(1)
SIZE = (32, 48)
SKIPPED = "kpts_num_skipped_batches"


def boxes(*rows):
    return Boxes(torch.tensor(rows, dtype=torch.float32).reshape(-1, 4))


def proposals(rows, keypoints):
    points = torch.tensor(keypoints, dtype=torch.float32).reshape(len(rows), 3, 3)
    return Instances(SIZE, proposal_boxes=boxes(*rows), gt_keypoints=Keypoints(points))


def loss_and_scalars(logits, instances, normalizer=None):
    with EventStorage() as storage:
        loss = keypoint_rcnn_loss(logits, instances, normalizer)
    return loss, {name: value for name, (value, _) in storage.latest().items()}


# On 2 x 2 cells: the first point is in cell 1, the second has no label, the third is outside the box.
BOX, POINTS = [8, 8, 16, 24], [[13, 9, 2], [9, 9, 0], [17, 9, 2]]


class TestLoss:
    def test_by_hand(self):
        logits = torch.full((1, 3, 2, 2), 7.0)
        logits[0, 0] = torch.tensor([[0.0, math.log(5)], [0, 0]])
        loss, logged = loss_and_scalars(logits, [proposals([BOX], [POINTS])])
        assert loss.item() == pytest.approx(math.log(8 / 5), rel=1e-6) and not logged

    @pytest.mark.parametrize("normalizer, factor", [(None, 1 / 2), (4.0, 1 / 4), (1, 1)])
    def test_normalizers(self, normalizer, factor):
        """Two images with a valid keypoint each; another image has no boxes."""
        gt = [proposals([BOX], [POINTS]), proposals([], []), proposals([BOX], [POINTS[::-1]])]
        loss, _ = loss_and_scalars(torch.zeros(2, 3, 2, 2), gt, normalizer)
        assert loss.item() == pytest.approx(2 * math.log(4) * factor, rel=1e-6)

    def test_against_the_definition(self):
        g = torch.Generator().manual_seed(0)
        corner = torch.rand(5, 2, generator=g) * 20
        rows = torch.cat((corner, corner + 4 + torch.rand(5, 2, generator=g) * 20), dim=1)
        points = torch.rand(5, 4, 3, generator=g) * torch.tensor([20.0, 20, 3])
        points[..., 2].floor_()
        points[..., :2] += corner[:, None]
        logits = torch.randn(5, 4, 6, 6, generator=g)
        total = valid = 0
        for maps, (x0, y0, x1, y1), instance in zip(logits.tolist(), rows.tolist(), points.tolist()):
            for heatmap, (x, y, visibility) in zip(maps, instance):
                if visibility > 0 and x0 <= x < x1 and y0 <= y < y1:
                    row, column = int((y - y0) / (y1 - y0) * 6), int((x - x0) / (x1 - x0) * 6)
                    weights = [math.exp(value) for line in heatmap for value in line]
                    total -= math.log(math.exp(heatmap[row][column]) / sum(weights))
                    valid += 1
        assert 3 < valid < 20
        gt = Instances(SIZE, proposal_boxes=Boxes(rows), gt_keypoints=Keypoints(points))
        loss, _ = loss_and_scalars(logits, [gt[:2], gt[2:]])
        assert loss.item() == pytest.approx(total / valid, rel=1e-5)

    def test_gradient_reaches_valid_keypoints_only(self):
        logits = torch.zeros(1, 3, 2, 2, requires_grad=True)
        loss_and_scalars(logits, [proposals([BOX], [POINTS])])[0].backward()
        assert logits.grad[0, 0].tolist() == [[0.25, -0.75], [0.25, 0.25]] and not logits.grad[0, 1:].any()

    def test_a_perfect_prediction_costs_nothing(self):
        logits = torch.zeros(1, 3, 2, 2)
        logits[0, 0, 0, 1] = 60
        assert loss_and_scalars(logits, [proposals([BOX], [POINTS])])[0].item() < 1e-6

    @pytest.mark.parametrize("normalizer", [None, 3.0])
    def test_batches_without_valid_keypoints_are_counted(self, normalizer):
        hidden = [[x, y, 0] for x, y, _ in POINTS]
        counts = []
        for gt in ([proposals([BOX], [hidden])], [proposals([], [])], [Instances(SIZE, proposal_boxes=boxes())]):
            logits = torch.randn(len(gt[0]), 3, 2, 2, requires_grad=True)
            loss, logged = loss_and_scalars(logits, gt, normalizer)
            loss.backward()
            assert loss.item() == 0 and not logits.grad.any() and list(logged) == [SKIPPED]
            counts.append(logged[SKIPPED])
        assert counts[1] - counts[0] == counts[2] - counts[1] == 1

    def test_inputs_that_do_not_fit(self):
        with refused("heatmaps must be square, not 2 x 3"):
            loss_and_scalars(torch.zeros(1, 3, 2, 4)[..., :3], [proposals([BOX], [POINTS])])
        with refused("got heatmaps of 1 boxes for 2 instances"):
            loss_and_scalars(torch.zeros(1, 3, 2, 2), [proposals([BOX], [POINTS])] * 2)


class TestInference:
    def test_peaks(self):
        logits = torch.full((2, 2, 8, 8), -10.0, requires_grad=True)
        with torch.no_grad():
            logits[0, 0, 2, 5] = logits[0, 1, 0, 0] = logits[1, 0, 7, 7] = logits[1, 1, 3, 4] = 10
        found = [
            Instances(SIZE, pred_boxes=boxes([10, 20, 18, 28])), Instances(SIZE, pred_boxes=boxes()),
            Instances(SIZE, pred_boxes=boxes([8, 0, 24, 32])),
        ]
        assert keypoint_rcnn_inference(logits, found) is None
        assert [tuple(x.pred_keypoints.shape) for x in found] == [(1, 2, 3), (0, 2, 3), (1, 2, 3)]
        first, second = found[0].pred_keypoints[0], found[2].pred_keypoints[0]
        assert first[:, :2].tolist() == [[15.5, 22.5], [10.5, 20.5]] and (first[:, 2] > 0.99).all()
        # Cell (7, 7) of the last box: x 22..24, y 28..32; cell (3, 4): x 16..18, y 12..16.
        assert 22 < second[0, 0] < 24 and 28 < second[0, 1] < 32
        assert 16 < second[1, 0] < 18 and 12 < second[1, 1] < 16
        assert torch.equal(found[2].pred_keypoint_heatmaps, logits[1:])
        assert not any(x.requires_grad for f in found for x in (f.pred_keypoints, f.pred_keypoint_heatmaps))

    def test_the_score_is_a_probability_of_the_cell(self):
        """A box of as many pixels as cells: no resampling, the peak is a cell."""
        logits = torch.zeros(1, 1, 4, 4)
        logits[0, 0, 1, 2] = math.log(5)
        found = [Instances(SIZE, pred_boxes=boxes([0, 0, 4, 4]))]
        keypoint_rcnn_inference(logits, found)
        assert found[0].pred_keypoints[0, 0, 2].item() == pytest.approx(5 / 20, rel=1e-5)

    def test_no_detections(self):
        found = [Instances(SIZE, pred_boxes=boxes()), Instances(SIZE, pred_boxes=boxes())]
        keypoint_rcnn_inference(torch.zeros(0, 5, 8, 8), found)
        assert all(x.pred_keypoints.shape == (0, 5, 3) for x in found)
        assert all(x.pred_keypoint_heatmaps.shape == (0, 5, 8, 8) for x in found)


class TestHead:
    def make(self, **changes):
        options = {"num_keypoints": 3, "conv_dims": (6, 5)}
        return KRCNNConvDeconvUpsampleHead(ShapeSpec(channels=4), **{**options, **changes})

    def test_names_and_shapes(self):
        head = self.make()
        assert [(k, tuple(v.shape)) for k, v in head.state_dict().items()] == [
            ("conv_fcn1.weight", (6, 4, 3, 3)), ("conv_fcn1.bias", (6,)), ("conv_fcn2.weight", (5, 6, 3, 3)),
            ("conv_fcn2.bias", (5,)), ("score_lowres.weight", (5, 3, 4, 4)), ("score_lowres.bias", (3,)),
        ]
        assert head.layers(torch.rand(2, 4, 7, 7)).shape == (2, 3, 28, 28)
        assert head.layers(torch.rand(0, 4, 7, 7)).shape == (0, 3, 28, 28)

    def test_the_layers_in_order(self):
        head = self.make(conv_dims=(6,)).double()
        x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
        y = torch.conv2d(x, head.conv_fcn1.weight, head.conv_fcn1.bias, padding=1).relu()
        y = torch.conv_transpose2d(y, head.score_lowres.weight, head.score_lowres.bias, stride=2, padding=1)
        middle = head.layers(x)[:, :, 1:-1:2, 1:-1:2]
        # Twice as many samples: an odd one lies a quarter of the way from a cell to the next, in both directions.
        near, far = y[:, :, :-1], y[:, :, 1:]
        rows = 0.75 * near + 0.25 * far
        torch.testing.assert_close(middle, 0.75 * rows[..., :-1] + 0.25 * rows[..., 1:])

    def test_initial_values(self):
        torch.manual_seed(0)
        head = self.make(conv_dims=(64,), num_keypoints=17)
        assert head.conv_fcn1.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.1)
        assert head.score_lowres.weight.std().item() == pytest.approx(math.sqrt(2 / (16 * 64)), rel=0.1)
        assert not head.conv_fcn1.bias.any() and not head.score_lowres.bias.any()

    @pytest.mark.parametrize("normalizer, divisor", [("visible", 2), (5.0, 5.0 * 3)])
    def test_training(self, normalizer, divisor):
        """A number is multiplied by the number of images, with and without boxes."""
        head = self.make(loss_weight=4.0, loss_normalizer=normalizer)
        gt = [proposals([BOX], [POINTS]), proposals([BOX], [POINTS]), proposals([], [])]
        x = torch.rand(2, 4, 3, 3)
        with EventStorage():
            losses = head(x, gt)
            total = keypoint_rcnn_loss(head.layers(x), gt, 1.0)
        assert list(losses) == ["loss_keypoint"]
        torch.testing.assert_close(losses["loss_keypoint"], total * 4 / divisor)
        losses["loss_keypoint"].backward()
        assert all(p.grad.isfinite().all() for p in head.parameters()) and head.conv_fcn1.weight.grad.any()

    def test_inference(self):
        head = self.make().eval()
        x = torch.rand(1, 4, 3, 3)
        (found,) = head(x, [Instances(SIZE, pred_boxes=boxes(BOX))])
        assert found.pred_keypoints.shape == (1, 3, 3)
        assert torch.equal(found.pred_keypoint_heatmaps, head.layers(x).detach())

    @pytest.mark.parametrize("visible, normalizer", [(True, "visible"), (False, 9 * 512 * 0.25)])
    def test_from_config(self, visible, normalizer):
        cfg = get_cfg()
        node = cfg.MODEL.ROI_KEYPOINT_HEAD
        node.NUM_KEYPOINTS, node.CONV_DIMS, node.LOSS_WEIGHT = 9, (8,), 2.5
        node.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS = visible
        head = build_keypoint_head(cfg, ShapeSpec(channels=4, width=14, height=14))
        assert isinstance(head, BaseKeypointRCNNHead) and head.num_keypoints == 9 and head.loss_weight == 2.5
        assert head.loss_normalizer == normalizer and head.score_lowres.weight.shape == (8, 9, 4, 4)

    def test_own_head_by_name(self):
        class Flat(BaseKeypointRCNNHead):
            def layers(self, x):
                return x[:, :1].expand(-1, self.num_keypoints, -1, -1)

        ROI_KEYPOINT_HEAD_REGISTRY.register(Flat)
        cfg = get_cfg()
        cfg.MODEL.ROI_KEYPOINT_HEAD.NAME = "Flat"
        head = build_keypoint_head(cfg, ShapeSpec(channels=4)).eval()
        (found,) = head(torch.zeros(1, 4, 8, 8), [Instances(SIZE, pred_boxes=boxes(BOX))])
        assert found.pred_keypoints.shape == (1, 17, 3)
        ROI_KEYPOINT_HEAD_REGISTRY._obj_map.pop("Flat")

    def test_bad_arguments(self):
        with refused("loss_normalizer must be a number or 'visible', not 'all'"):
            self.make(loss_normalizer="all")
        with pytest.raises(NotImplementedError):
            BaseKeypointRCNNHead(num_keypoints=3)(torch.zeros(1, 4, 2, 2), [])


def test_postprocessing_scales_positions_and_keeps_scores():
    found = Instances((20, 30), pred_boxes=boxes([4, 6, 12, 14], [20, 10, 28, 10]))
    found.pred_keypoints = torch.tensor([[[5.0, 7, 0.25], [30, 20, 0.5]], [[1, 2, 3], [4, 5, 6]]])
    result = detector_postprocess(found, 40, 90)
    assert result.pred_keypoints.tolist() == [[[15, 14, 0.25], [90, 40, 0.5]]]
    assert len(detector_postprocess(found[:0], 40, 90).pred_keypoints) == 0
